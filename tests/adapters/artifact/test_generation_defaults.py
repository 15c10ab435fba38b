"""generation_config.json beside an adapter: read strictly, kept in one form, part of what the version is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from loramux_adapters.artifact.format import CHAT_TEMPLATE_FILE, digest_of, read_config
from loramux_adapters.artifact.generation_defaults import (
    GENERATION_FILE,
    MAX_BYTES,
    NOTHING_SAID,
    GenerationDefaults,
    parse_generation_defaults,
    read_generation_defaults,
)
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.weights import load_host_adapter
from support.adapter_files import TINY_LINEARS, write_adapter

ALL = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "stop_strings": ["END", "###"],
    "max_new_tokens": 100,
    "max_length": 2048,
}
SAID = GenerationDefaults(0.5, 0.9, 20, 0.05, 1.1, ("END", "###"), 100, 2048)


def parsed(**fields: Any) -> GenerationDefaults:
    return parse_generation_defaults(json.dumps(fields).encode())


def test_everything_that_is_applied_is_read_and_written_again() -> None:
    said = parsed(**ALL)
    assert said == SAID and not said.notes
    again = said.dump()
    assert again is not None and parse_generation_defaults(again) == said and json.loads(again) == ALL
    assert parse_generation_defaults(again).dump() == again


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    config = GenerationConfig(do_sample=True, temperature=0.5, top_p=0.9, top_k=20, max_new_tokens=7, eos_token_id=2)
    config.save_pretrained(tmp_path)
    said = read_generation_defaults(tmp_path)
    assert said == GenerationDefaults(temperature=0.5, top_p=0.9, top_k=20, max_tokens=7) and not said.notes


@pytest.mark.parametrize("raw", [b"{}", b'{"eos_token_id": 2, "transformers_version": "5"}', b'{"temperature": null}'])
def test_a_file_that_says_nothing_is_as_none(raw: bytes) -> None:
    assert parse_generation_defaults(raw) == NOTHING_SAID
    assert parse_generation_defaults(raw).dump() is None
    assert not parse_generation_defaults(raw).notes


def test_without_sampling_a_reply_is_greedy() -> None:
    assert parsed(do_sample=False, temperature=0.7).temperature == 0.0
    assert parsed(do_sample=True).temperature is None


def test_one_text_stops_too() -> None:
    assert parsed(stop_strings="END").stop == ("END",)


def test_transformers_own_length_limits_nothing_and_is_told() -> None:
    said = parsed(max_length=20)
    assert said == NOTHING_SAID and "max_length of 20" in said.notes[0]


def test_what_is_not_applied_is_told() -> None:
    said = parsed(num_beams=4, typical_p=1.0, penalty_alpha=0.6, **{"a\x1b": 3})
    assert said.notes == (f"{GENERATION_FILE} says what is not applied here: num_beams, penalty_alpha, a\\x1b",)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.0}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2**31}, "max_new_tokens"),
        ({"max_length": "4096"}, "max_length"),
        ({"max_length": 1}, "max_length"),
        ({"do_sample": 1}, "do_sample"),
        ({"stop_strings": [""]}, "stop_strings"),
        ({"stop_strings": ["x" * 257]}, "stop_strings"),
        ({"stop_strings": ["x"] * 17}, "stop_strings"),
        ({"stop_strings": {"a": 1}}, "stop_strings"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(AdapterRejected) as caught:
        parsed(**fields)
    assert [reason.partition(" ")[0] for reason in caught.value.reasons] == [name]
    assert "correct it, or remove it" in caught.value.reasons[0]


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(AdapterRejected) as caught:
        parsed(temperature=9, top_k=-3)
    assert len(caught.value.reasons) == 2


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b'{"top_p": NaN}',
        b'{"top_p": 1e999}',
        b'{"top_p": 0.5, "top_p": 0.6}',
        b'{"stop_strings": "\\ud800"}',
        b"\xff\xfe",
        b'{"a":' * 50 + b"1" + b"}" * 50,
        b" " * (MAX_BYTES + 1),
        b"version https://git-lfs.github.com/spec/v1",
    ],
)
def test_what_is_no_strict_object_is_refused(raw: bytes) -> None:
    with pytest.raises(AdapterRejected, match=GENERATION_FILE):
        parse_generation_defaults(raw)


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text('{"temperature": 1}')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / GENERATION_FILE).symlink_to(tmp_path / "secret.json")
    with pytest.raises(AdapterRejected, match="symbolic link"):
        read_generation_defaults(tmp_path / "adapter")


def test_two_adapters_agree_on_what_both_say_and_on_the_shorter_context() -> None:
    other = GenerationDefaults(temperature=0.5, top_p=0.8, stop=("END", "###"), context=512)
    assert SAID.agreed(other) == GenerationDefaults(temperature=0.5, stop=("END", "###"), context=512)
    assert SAID.agreed(NOTHING_SAID) == GenerationDefaults(context=2048) == NOTHING_SAID.agreed(SAID)


def test_what_is_said_is_part_of_the_version_and_how_it_is_written_is_not(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "one", TINY_LINEARS, targets=["q_proj"])
    path = directory / GENERATION_FILE

    def version() -> str:
        digest = digest_of(read_config(directory), directory)
        assert load_host_adapter(directory).version == digest
        return digest

    plain = version()
    path.write_text('{"eos_token_id": 5}')
    assert version() == plain  # it says nothing
    path.write_text('{"top_k": 3, "temperature": 0.5}')
    said = version()
    assert said != plain
    path.write_text('{"temperature":0.5,\n"top_k":3, "pad_token_id": 1}')
    assert version() == said
    path.write_text('{"top_k": 4, "temperature": 0.5}')
    assert version() not in (plain, said)


def test_no_chat_template_can_be_taken_for_defaults(tmp_path: Path) -> None:
    """What a template adds to the digest is not what defaults and another template add."""
    directory = write_adapter(tmp_path / "one", TINY_LINEARS, targets=["q_proj"])
    dumped = GenerationDefaults(top_k=3).dump()
    assert dumped is not None
    (directory / GENERATION_FILE).write_bytes(dumped)
    (directory / CHAT_TEMPLATE_FILE).write_text("{{ x }}")
    both = digest_of(read_config(directory), directory)
    (directory / GENERATION_FILE).unlink()
    for text in (
        f"generation defaults {len(dumped)}\n{dumped.decode()}chat template\n{{{{ x }}}}",
        f"{{{{ x }}}}generation defaults {len(dumped)}\n{dumped.decode()}",
    ):
        (directory / CHAT_TEMPLATE_FILE).write_text(text)
        assert digest_of(read_config(directory), directory) != both
