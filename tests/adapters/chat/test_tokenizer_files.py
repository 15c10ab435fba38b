"""Tokenizer files beside an adapter: the base's own in whatever shape are accepted, another template is kept, more is
refused by name."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from loramux_adapters.artifact.own_tokens import OwnTokens, parse_own_tokens
from loramux_adapters.chat import compare, tokenizer_files
from loramux_adapters.chat.encoder import TextEncoder
from loramux_adapters.chat.tokenizer_files import TokenizerFiles
from loramux_adapters.errors import AdapterRejected
from support.tokenizer_families import CHATML, NAMES, family

Spec = dict[str, Any]
OTHER = CHATML.replace("m.content", "m.content | trim")


def files_of(name: str) -> TokenizerFiles:
    return TokenizerFiles(family(name))


def reasons(directory: Path, name: str = "byte-level BPE") -> list[str]:
    with pytest.raises(AdapterRejected) as caught:
        files_of(name).own_text(directory)
    return caught.value.reasons


def changed(name: str, change: Callable[[Spec], object]) -> str:
    spec = json.loads(family(name).backend_tokenizer.to_str())
    change(spec)
    return json.dumps(spec)


@pytest.mark.parametrize("name", NAMES)
def test_the_bases_own_files_are_accepted_as_transformers_saves_them(name: str, tmp_path: Path) -> None:
    family(name).save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) >= 3
    assert files_of(name).own_text(tmp_path).chat_template is None
    assert TokenizerFiles(family(name), tmp_path).own_text(tmp_path).chat_template is None


def other_spelling(spec: Spec) -> None:
    """What another release writes: other order, older shape of merges, what training leaves behind."""
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    spec["model"]["vocab"] = dict(reversed(spec["model"]["vocab"].items()))
    spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    spec["padding"] = {
        **{"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
    }
    spec["pre_tokenizer"]["trim_offsets"] = False
    spec["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def test_what_means_the_same_is_accepted_however_it_is_written(tmp_path: Path) -> None:
    name, backend = "byte-level BPE", family("byte-level BPE").backend_tokenizer
    spec = json.loads(backend.to_str())
    (tmp_path / "tokenizer.json").write_text(changed(name, other_spelling), encoding="utf-8")
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"], indent=1))
    merges = "\n".join(" ".join(pair) for pair in spec["model"]["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": backend.token_to_id("<|im_end|>")}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": "<|im_end|>", "padding_side": "left", "model_max_length": 99, "chat_template": CHATML})
    )
    (tmp_path / "chat_template.jinja").write_text(CHATML + "\n")
    assert files_of(name).own_text(tmp_path).chat_template is None


def sentencepiece_model(pieces: list[str]) -> bytes:
    """A model file with these pieces, a score and a type for each."""
    model = b""
    for piece in pieces:
        text = piece.encode()
        message = bytes([10, len(text)]) + text + b"\x15\x00\x00\x80\xbf" + b"\x18\x01"
        model += bytes([10, len(message)]) + message
    return model


def test_a_sentencepiece_model_is_compared_by_its_pieces(tmp_path: Path) -> None:
    vocabulary = json.loads(family("Llama 2").backend_tokenizer.to_str())["model"]["vocab"]
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model(pieces))
    assert files_of("Llama 2").own_text(tmp_path).chat_template is None
    path.write_bytes(sentencepiece_model([*pieces, "<new>"]))
    assert reasons(tmp_path, "Llama 2") == ["tokenizer.model adds tokens, which are not served: '<new>'"]
    path.write_bytes(sentencepiece_model(pieces)[:-3])
    assert reasons(tmp_path, "Llama 2") == ["tokenizer.model is damaged"]


def added(spec: Spec) -> None:
    for number, text in enumerate(["<one>", "<two>"], start=len(spec["model"]["vocab"]) + 2):
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": number, "content": text})


def read_back(own: OwnTokens) -> OwnTokens:
    return parse_own_tokens(own.dump())


def test_tokens_that_follow_the_bases_are_the_adapters_own(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(changed("byte-level BPE", added), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<two>"}))
    own = files_of("byte-level BPE").own_text(tmp_path).tokens
    assert own is not None and own == read_back(own)
    first = own.tokens[0].id
    assert [(token.id, token.content, token.special) for token in own.tokens] == [
        (first, "<one>", True),
        (first + 1, "<two>", True),
    ]
    assert (own.end, own.size) == (first + 1, first + 2)

    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "own_tokens.json").write_bytes(own.dump())
    assert files_of("byte-level BPE").own_text(kept).tokens == own, "what is downloaded can be sent again"


ODD = [
    " ",
    "\n",
    "\0",
    " x",
    "e\u0301",
    "\ufb01",
    "\u200b",
    "\U000f0001",
    "<|im_start|> ",
    "A" * 256,
    "<a",
    "</s>x",
    "\u0130",
]


@pytest.mark.parametrize("name", ["byte-level BPE", "Llama 2", "WordPiece"])
@pytest.mark.parametrize("special", [True, False])
def test_odd_tokens_are_served_or_refused_and_break_nothing(name: str, special: bool, tmp_path: Path) -> None:
    first = max(family(name).get_vocab().values()) + 1
    served = 0
    for content in ODD:
        for normalized in (True, False):
            token = {"content": content, "special": special, "normalized": normalized, "lstrip": content == "<a"}
            said = {"added_tokens_decoder": {str(first): token}}
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
            try:
                own = files_of(name).own_text(tmp_path).tokens
            except AdapterRejected:
                continue
            assert own is not None
            extended = copy.deepcopy(family(name))
            compare.add_tokens(extended.backend_tokenizer, own.tokens)
            encoder = TextEncoder(extended)
            assert first in encoder.encode(f"a {content} b", around=False)
            served += 1
    assert served > len(ODD) // 2


def test_tokens_with_other_ids_than_the_next_are_refused(tmp_path: Path) -> None:
    said = {"added_tokens_decoder": {"9999": {"content": "<new>", "special": False}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert reasons(tmp_path)[0].startswith("its tokenizer adds '<new>' as token 9999; new ones have to follow")


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"tokens": []},
        {"tokens": [{"id": -1, "content": "x"}]},
        {"tokens": [{"id": True, "content": "x"}]},
        {"tokens": [{"id": 1, "content": ""}]},
        {"tokens": [{"id": 1, "content": "x" * 257}]},
        {"tokens": [{"id": 1, "content": "x", "special": 1}]},
        {"tokens": [{"id": 2, "content": "x"}, {"id": 1, "content": "y"}]},
        {"tokens": [{"id": 1, "content": "x"}], "eos_token": "y"},
        {"tokens": [{"id": 1 + number, "content": str(number)} for number in range(4097)]},
    ],
)
def test_a_damaged_list_of_tokens_is_refused(said: dict[str, object]) -> None:
    with pytest.raises(AdapterRejected, match=r"own_tokens\.json is damaged"):
        parse_own_tokens(json.dumps(said).encode())


def unmarked(spec: Spec) -> None:
    spec["added_tokens"][0]["special"] = False


def swapped(spec: Spec) -> None:
    vocabulary = spec["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda spec: spec["added_tokens"].pop(), "lacks tokens of the base: '<|im_end|>'"),
        (swapped, "gives 'a', 'b' other ids than the base does"),
        (unmarked, "treats '<|im_start|>' otherwise than the base does"),
        (lambda spec: spec["model"]["merges"].pop(), "has other merges than the base"),
        (lambda spec: spec["model"].update(ignore_merges=True), "other settings than the base (ignore_merges)"),
        (lambda spec: spec.update(normalizer={"type": "NFKC"}), "normalizes text otherwise than the base does"),
        (lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True), "splits text otherwise than the base"),
        (lambda spec: spec.clear(), "is no tokenizer"),
    ],
)
def test_a_tokenizer_that_means_something_else_is_refused_with_what_it_is(
    change: Callable[[Spec], object], says: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(changed("byte-level BPE", change), encoding="utf-8")
    (reason,) = reasons(tmp_path)
    assert reason.startswith("tokenizer.json ") and says in reason


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("added_tokens.json", {"<new>": 9999}, "adds tokens, which are not served: '<new>'"),
        ("added_tokens.json", {"<|im_end|>": 3}, "gives '<|im_end|>' other ids"),
        ("special_tokens_map.json", {"additional_special_tokens": ["<new>"]}, "adds tokens, which are not served"),
        ("special_tokens_map.json", {"pad_token": "[PAD]"}, "adds tokens, which are not served: '[PAD]'"),
        ("tokenizer_config.json", {"eos_token": "<|im_start|>"}, "names another end token ('<|im_start|>') than"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<new>"}}}, "adds tokens"),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "rag", "template": "x"}]},
            "none of them is named default",
        ),
        ("tokenizer_config.json", {"chat_template": 5}, "that is no text"),
        ("vocab.json", {"a": 1}, "gives 'a' other ids"),
        ("vocab.json", [], "is damaged"),
        ("merges.txt", {}, "has other merges than the base"),
        ("vocab.txt", {}, "adds tokens, which are not served: '{}'"),
        ("chat_template.json", [], "is damaged"),
    ],
)
def test_each_file_is_looked_at(name: str, content: Any, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    assert any(reason.startswith(f"{name} ") and says in reason for reason in reasons(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 100_000, b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"])
def test_whatever_is_in_them_the_answer_is_a_refusal(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    if (name, content) != ("tokenizer.model", b""):
        assert reasons(tmp_path)


def test_another_chat_template_is_returned_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": OTHER}))
    assert files_of("byte-level BPE").own_text(tmp_path).chat_template == OTHER
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": OTHER + "\n"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert files_of("byte-level BPE").own_text(tmp_path).chat_template == OTHER
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1].content }}\n")
    assert files_of("byte-level BPE").own_text(tmp_path).chat_template == "{{ messages[-1].content }}", (
        "as in transformers"
    )


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ messages[-1].content }}\n{% for x in range(10**9) %}{% endfor %}", r"line 2"),
        ("{{ messages[-1].content }}\n{% for x in range(1000000000) %}{% endfor %}", r"line 2"),
        ("{{ messages[-1].content }}\n\n{% if %}", r"line 3"),
        ("{{ messages[-1].content | nothing }}", r"line 1"),
        ("{{ raise_exception('no') }}", r"cannot be used: no$"),
        ("You are a pirate.", r"leaves out what the user says"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_its_line(source: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(AdapterRejected, match=f"its chat template cannot be used: .*{says}|{says}"):
        files_of("byte-level BPE").own_text(tmp_path)


def test_a_template_may_refuse_a_system_message(tmp_path: Path) -> None:
    source = family("Gemma").chat_template
    (tmp_path / "chat_template.jinja").write_text(source)
    assert files_of("byte-level BPE").own_text(tmp_path).chat_template == source


def test_sizes_are_bounded_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files.subprocess, "run", lambda *args, **kwargs: pytest.fail("was read"))
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(64 * 2**20 + 1)
    assert reasons(tmp_path) == ["tokenizer.json is larger than 64 MiB"]


def test_a_process_that_fails_or_hangs_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "added_tokens.json").write_text("{}")
    monkeypatch.setattr(compare, "SECONDS", 0.0)
    assert reasons(tmp_path) == ["its tokenizer files cannot be read (added_tokens.json)"]


def test_a_tokenizer_of_20_mb_holds_up_no_other_thread(tmp_path: Path) -> None:
    spec = json.loads(family("byte-level BPE").backend_tokenizer.to_str())
    spec["model"]["vocab"] |= {f"a rather long token {number:08}": 1000 + number for number in range(400_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert (tmp_path / "tokenizer.json").stat().st_size > 15e6
    files = files_of("byte-level BPE")
    files.own_text(tmp_path / "none")
    found: list[list[str]] = []

    def check() -> None:
        try:
            files.own_text(tmp_path)
        except AdapterRejected as error:
            found.append(error.reasons)

    worker = threading.Thread(target=check)
    worker.start()
    pauses, last = [0.0], time.perf_counter()
    while worker.is_alive():
        time.sleep(0.002)
        pauses.append(time.perf_counter() - last)
        last = time.perf_counter()
    assert "adds tokens" in found[0][0] and "and 399995 more" in found[0][0]
    assert sorted(pauses)[-1] < 0.5, "parsing it here would take longer"


def test_the_comparison_is_the_same_in_this_process(tmp_path: Path) -> None:
    base = family("byte-level BPE").backend_tokenizer.to_str()
    family("byte-level BPE").save_pretrained(tmp_path)
    ends = {"bos_token": None, "eos_token": "<|im_end|>"}
    assert compare.compare(tmp_path, base, tmp_path, ends).reasons == []
    Tokenizer.from_str(changed("byte-level BPE", added)).save(str(tmp_path / "tokenizer.json"))
    found = compare.compare(tmp_path, base, None, ends)
    assert found.tokens is not None and [token.content for token in found.tokens.tokens] == ["<one>", "<two>"]
    assert found.tokens == read_back(found.tokens)
