from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from loramux_adapters.durable_files import sealed, unsealed
from loramux_adapters.store.records import UploadRow
from loramux_adapters.store.version_record import Claim, DirectoryRecord, NameFacts, parse_record

DIGEST = "ab" * 32
UPLOAD = UploadRow("org/tuned", DIGEST, 4, "q_proj,v_proj", 1000, "cd" * 32, None, 1000, "close")
RECORD = DirectoryRecord(
    DIGEST,
    7,
    (Claim(UPLOAD, 12, NameFacts(900, 1000, True)), Claim(replace(UPLOAD, name="zwei", base_id=None), 3, None)),
)


def changed(change: Any) -> bytes:
    content = unsealed(RECORD.dump())
    change(content)
    return sealed(content)


def test_a_record_comes_back_as_it_was() -> None:
    assert parse_record(RECORD.dump(), DIGEST) == RECORD
    unkept = DirectoryRecord(DIGEST, 8, (), "the adapter tuned was deleted")
    assert parse_record(unkept.dump(), DIGEST) == unkept


def test_what_a_later_release_added_is_passed_over_and_the_rest_is_kept() -> None:
    def add(content: dict[str, Any]) -> None:
        content["colour"] = "red"
        content["claims"][0]["weight"] = 3
        content["claims"][0]["upload"]["layers"] = {"adapted": 14, "of": 28}
        content["claims"][0]["name"]["owner"] = "me"

    assert parse_record(changed(add), DIGEST) == RECORD


def test_what_an_older_release_did_not_know_is_as_by_default() -> None:
    raw = changed(lambda content: content["claims"][0]["upload"].pop("fingerprint"))
    assert parse_record(raw, DIGEST).claims[0].upload == replace(UPLOAD, fingerprint="none")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(format="loramux version record 9"),
        lambda content: content.update(digest="cd" * 32),
        lambda content: content.update(claims=None),
        lambda content: content["claims"].append(3),
        lambda content: content["claims"][0].pop("upload"),
        lambda content: content["claims"][0]["upload"].pop("rank"),
        lambda content: content["claims"][0]["upload"].update(digest="cd" * 32),
        lambda content: content["claims"][0].update(name=[]),
    ],
)
def test_what_is_no_record_of_the_version_is_refused(change: Any) -> None:
    with pytest.raises(ValueError, match="it |its "):
        parse_record(changed(change), DIGEST)


def test_a_flipped_bit_anywhere_or_a_cut_is_noticed() -> None:
    raw = RECORD.dump()
    for place in range(len(raw) - 1):
        damaged = raw[:place] + bytes([raw[place] ^ 1 << place % 7]) + raw[place + 1 :]
        try:
            assert parse_record(damaged, DIGEST) == RECORD  # white space, say
        except ValueError:
            continue
    for length in range(0, len(raw) - 2, 7):
        with pytest.raises(ValueError):
            parse_record(raw[:length], DIGEST)
    with pytest.raises(ValueError):
        unsealed(b"[" * 100_000)
    assert json.loads(raw)["content"]["digest"] == DIGEST  # for a reader's eyes
