from __future__ import annotations

import re

import pytest

from loramux_adapters.errors import InvalidAdapterName
from loramux_adapters.names import MAX_NAME, NAME_FORM, PATH_WORDS, check_name, file_name_of, is_name

LONGEST = "o" * 100 + "/" + "n" * 154


@pytest.mark.parametrize(
    "name", ["a", "_a", "0", "A.b_c-1", "org/adapter", "org/a/b", "a..b", LONGEST, *sorted(PATH_WORDS)]
)
def test_names_as_people_and_hubs_write_them(name: str) -> None:
    assert check_name(name) == name and is_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "/", "a/", "/a", "a//b", ".", "..", "a/.", "a/..", "../a", "a/../b", ".a", "a/.b", "-a", "a/-b", "a b", "a\n"]
    + [
        "a\0b",
        "a\x1b[31m",
        "a:b",
        "a/b:c",
        "a@b",
        "a+b",
        "a,b",
        "a\\b",
        "a%2Fb",
        "é",
        "a\u2024b",
        "\u202ea",
        "a" * 256,
    ],
)
def test_any_other_name_is_refused_with_the_form_that_is_allowed(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(InvalidAdapterName, match=re.escape(NAME_FORM)):
        check_name(name)


@pytest.mark.parametrize("word", sorted(PATH_WORDS))
def test_a_name_cannot_end_like_a_path_of_the_api(word: str) -> None:
    assert not is_name(f"org/{word}") and is_name(f"{word}/adapter")
    with pytest.raises(InvalidAdapterName, match="the last part of a name cannot be archive, pin, rollback"):
        check_name(f"org/{word}")


def test_the_bases_name_is_taken() -> None:
    with pytest.raises(InvalidAdapterName, match="belongs to the base model"):
        check_name("org/base", {"org/base"})


def test_a_long_name_without_an_end_is_refused_at_once() -> None:
    assert not is_name("a/" * 100_000)


def test_a_file_name_is_one_part_of_a_path_and_of_no_great_length() -> None:
    assert MAX_NAME == len(LONGEST)
    assert (file_name_of("spam"), file_name_of("org/spam")) == ("spam", "org--spam")
    assert len(file_name_of(LONGEST)) == 80 and "/" not in file_name_of(LONGEST)
    assert file_name_of(LONGEST) != file_name_of(LONGEST[:-1] + "x")
