from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_server.base.detokenizer import Detokenizer


def decode_bytes(tokens: Sequence[int]) -> str:
    """One token per byte, as byte-level BPE decodes them."""
    return bytes(tokens).decode("utf-8", "replace")


PIECES = ["▁Hello", "▁world", "▁", "ing", "▁a", ",", "\n", "▁▁", "é"] + [f"<0x{byte:02X}>" for byte in range(256)]


def decode_pieces(tokens: Sequence[int]) -> str:
    """As SentencePiece with byte fallback: the first space goes; a run of byte tokens is text, or all of it is not."""
    text, run = "", b""
    for piece in [*(PIECES[token] for token in tokens), None]:
        byte = re.fullmatch("<0x(..)>", piece or "")
        if byte:
            run += bytes.fromhex(byte[1])
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError:
            text += "\ufffd" * len(run)
        run = b""
        text += (piece or "").replace("▁", " ")
    return text.removeprefix(" ")


def pieces_of(text: str) -> list[int]:
    return [PIECES.index(f"<0x{byte:02X}>") for byte in text.encode()]


def run(detokenizer: Detokenizer, tokens: Sequence[int]) -> tuple[str, list[str]]:
    """The whole text, and what each token gave."""
    parts = [detokenizer.add(token) for token in tokens]
    return "".join(parts) + detokenizer.flush(), parts


def test_a_character_spread_over_tokens_appears_when_it_is_complete() -> None:
    text, parts = run(Detokenizer(decode_bytes), "a€😀".encode())
    assert text == "a€😀"
    assert parts == ["a", "", "", "€", "", "", "", "😀"]


def test_a_character_that_stays_incomplete_is_given_out_at_the_end() -> None:
    text, parts = run(Detokenizer(decode_bytes), b"ok\xf0\x9f")
    assert (text, parts) == ("ok\ufffd", ["o", "k", "", ""])


def test_a_leading_space_is_kept_inside_and_dropped_at_the_beginning_of_a_reply() -> None:
    assert run(Detokenizer(decode_pieces), [0, 1, 3, 1])[0] == "Hello worlding world"


def test_a_reply_that_continues_a_text_keeps_its_leading_space() -> None:
    assert run(Detokenizer(decode_pieces, context=[0]), [1])[0] == " world"


def test_a_reply_can_complete_a_character_that_the_prompt_began() -> None:
    assert run(Detokenizer(decode_bytes, context=b"x\xe2\x82"), b"\xac!")[0] == "€!"


def test_byte_fallback_tokens_are_joined_after_other_bytes_and_text() -> None:
    tokens = [0, *pieces_of("é😀"), 1, *pieces_of("€")]
    assert run(Detokenizer(decode_pieces), tokens)[0] == "Helloé😀 world€"


def test_special_tokens_do_not_show() -> None:
    text, _ = run(
        Detokenizer(lambda ids: decode_bytes([i for i in ids if i < 256]), skip=frozenset({300})), [65, 300, 66]
    )
    assert text == "AB"


@given(st.text(max_size=60))
def test_the_pieces_of_any_text_make_the_text(text: str) -> None:
    assert run(Detokenizer(decode_bytes), text.encode())[0] == text


@given(st.lists(st.integers(0, 8), max_size=40))
def test_the_pieces_of_any_words_make_the_text(tokens: list[int]) -> None:
    assert run(Detokenizer(decode_pieces), tokens)[0] == decode_pieces(tokens)


@given(st.binary(max_size=200))
def test_invalid_bytes_never_stop_the_text_or_eat_it(data: bytes) -> None:
    text, _ = run(Detokenizer(decode_bytes), data + b" end")
    assert text.endswith(" end")
    assert [c for c in text if c.isascii()] == [c for c in data.decode("utf-8", "replace") + " end" if c.isascii()]


@pytest.mark.parametrize("data", [b"word " * 2000, b"\xff" * 10000, "😀".encode() * 2500, b"\x80\xf0" * 5000])
def test_the_window_stays_small_whatever_comes(data: bytes) -> None:
    longest = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode_bytes(tokens)

    run(Detokenizer(decode), data)
    assert longest <= 24


def test_tokens_that_never_end_on_a_whole_character_still_come_out() -> None:
    emoji = "😀".encode()
    vocabulary = [emoji[:2], emoji[2:] + emoji[:2]]
    text, parts = run(
        Detokenizer(lambda ids: b"".join(vocabulary[i] for i in ids).decode("utf-8", "replace")), [0] + [1] * 100
    )
    assert text == "😀" * 100 + "\ufffd"
    assert max(map(len, parts)) <= 24


# stop strings


def reference(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first; of those that end together, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def test_a_stop_string_across_tokens_ends_the_text_before_it() -> None:
    detokenizer = Detokenizer(decode_bytes, stop=["END"])
    text, parts = run(detokenizer, b"one ENDtwo")
    assert detokenizer.stopped
    assert text == "one "
    assert parts == ["o", "n", "e", " ", "", "", "", "", "", ""]


def test_what_only_began_like_a_stop_string_is_given_back() -> None:
    text, parts = run(Detokenizer(decode_bytes, stop=["ENDE"]), b"xENDx")
    assert text == "xENDx"
    assert parts == ["x", "", "", "", "ENDx"]


def test_what_could_still_become_a_stop_string_comes_at_the_end() -> None:
    detokenizer = Detokenizer(decode_bytes, stop=["END"])
    assert run(detokenizer, b"xEN") == ("xEN", ["x", "", ""])
    assert not detokenizer.stopped


def test_a_stop_string_can_hold_a_character_spread_over_tokens() -> None:
    detokenizer = Detokenizer(decode_bytes, stop=["€!"])
    assert run(detokenizer, "a€!b".encode())[0] == "a"
    assert detokenizer.stopped


def test_a_stop_string_is_found_in_the_middle_of_one_token() -> None:
    words = ["say STOP now", "more"]
    detokenizer = Detokenizer(lambda ids: "".join(words[i] for i in ids), stop=["STOP"])
    assert run(detokenizer, [0, 1])[0] == "say "
    assert detokenizer.position == 4


def test_an_empty_stop_string_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="empty"):
        Detokenizer(decode_bytes, stop=[""])


@given(
    st.text(alphabet="ab€", max_size=40),
    st.lists(st.text(alphabet="ab€", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(1, 5), max_size=40),
)
def test_stop_strings_do_not_depend_on_where_tokens_end(text: str, stops: list[str], lengths: list[int]) -> None:
    tokens, rest = [], text
    for length in [*lengths, len(text)]:
        tokens.append(rest[:length])
        rest = rest[length:]
    detokenizer = Detokenizer(lambda ids: "".join(tokens[i] for i in ids), stop=stops)
    whole, parts = run(detokenizer, range(len(tokens)))
    assert (whole, detokenizer.stopped) == reference(text, stops)
    assert detokenizer.position == len(whole)
    shown = ""
    for part in parts:
        shown += part
        assert whole.startswith(shown)


def late_reference(text: str, stops: Sequence[str], first: int) -> str:
    """The text up to and with the stop string that is complete first, of those that end behind `first` characters."""
    for end in range(first + 1, len(text) + 1):
        if any(text[:end].endswith(stop) for stop in stops):
            return text[:end]
    return text


@given(
    st.text("ab", max_size=24),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(0, 12),
    st.booleans(),
)
def test_a_stop_string_may_have_to_come_late_and_may_be_shown(
    text: str, stops: list[str], first: int, include: bool
) -> None:
    detokenizer = Detokenizer(decode_bytes, stop=stops, min_tokens=first, include_stop=include)
    whole, parts = run(detokenizer, text.encode())
    with_stop = late_reference(text, stops, first)
    stopped = any(with_stop.endswith(stop) for stop in stops) and len(with_stop) > first
    by = max((stop for stop in stops if with_stop.endswith(stop)), key=len) if stopped else None
    assert detokenizer.stopped_by == by and detokenizer.stopped == stopped
    assert whole == (with_stop if include or by is None else with_stop.removesuffix(by))
    assert detokenizer.position == len(whole)


def test_tokens_that_do_not_show_count_among_the_first_ones() -> None:
    detokenizer = Detokenizer(
        lambda ids: decode_bytes([i for i in ids if i < 256]), stop=["a"], skip=frozenset({300}), min_tokens=2
    )
    assert run(detokenizer, [300, 97, 97])[0] == "a" and detokenizer.stopped_by == "a"
