"""One conversation over HTTP with a server on each instruction set of this processor: the replies are equal, each byte.

`make test-isa ISA=avx2` runs all tests of this folder on one of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramux_server.kernels.compiled.library import native_library
from support.adapter_files import write_adapter
from support.real_server import RealServer, running_server
from support.tiny_models import COMMON, save_tiny_model

LIBRARY = native_library()
LABELS = [isa.label for isa in LIBRARY.isas] if LIBRARY is not None else []

_HIDDEN, _INNER, _VOCABULARY = COMMON["hidden_size"], COMMON["intermediate_size"], COMMON["vocab_size"]
LINEARS = {
    f"model.layers.{layer}.{module}": sizes
    for layer in range(COMMON["num_hidden_layers"])
    for module, sizes in {
        "self_attn.q_proj": (_HIDDEN, 64),
        "self_attn.k_proj": (_HIDDEN, 32),
        "self_attn.o_proj": (64, _HIDDEN),
        "mlp.gate_proj": (_HIDDEN, _INNER),
        "mlp.down_proj": (_INNER, _HIDDEN),
    }.items()
} | {"lm_head": (_HIDDEN, _VOCABULARY)}
ADAPTERS = {"narrow": {"rank": 3, "targets": ["q_proj", "down_proj"]}, "wide": {"rank": 24}}
OTHERWISE_EACH_TIME = ("id", "created", "updated")


@pytest.mark.skipif(len(LABELS) < 2, reason="there is one instruction set at most")
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_a_conversation_has_the_same_bytes_on_every_instruction_set(architecture: str, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", architecture)
    directories = {
        name: write_adapter(tmp_path / name, LINEARS, seed=index, std_b=0.1, **kind)  # type: ignore[arg-type]
        for index, (name, kind) in enumerate(ADAPTERS.items())
    }
    said = {}
    for label in LABELS:
        flags = ["--base", str(base), "--cache-dir", str(tmp_path / "cache")]
        with running_server(tmp_path / f"store-{label}", *flags, environ={"LORAMUX_ISA": label}) as server:
            assert any(line.endswith(f"compiled kernels on {label.upper()}") for line in server.lines), server.lines
            said[label] = conversation(server, directories)
    first, *others = LABELS
    assert len(set(said[first])) == len(said[first]), "adapters, seeds or turns without effect prove nothing"
    for label in others:
        for found, expected in zip(said[label], said[first], strict=True):
            assert found == expected, f"{label} and {first} differ"


def conversation(server: RealServer, directories: dict[str, Path]) -> list[str]:
    """All that the server says: to uploads, and to the base, adapters and sums of them, whole and streamed."""
    said = []
    for name, directory in directories.items():
        response = server.upload(name, directory)
        assert response.status_code == 201, response.text
        said.append(plain(response.text))
    with server.client() as client:
        base = client.get("/v1/models").json()["data"][0]["id"]
    question = {"role": "user", "content": "Wer hat das Meer so blau gemacht, und wann?"}
    drawn = {"temperature": 0.9, "seed": 7, "top_p": 0.95}
    said.append(ask(server, base, [question]))
    said.append(ask(server, base, [question], **drawn))
    for name in directories:
        answer = ask(server, name, [question], **drawn)
        text = json.loads(answer)["choices"][0]["message"]["content"]
        turns = [question, {"role": "assistant", "content": text}, {"role": "user", "content": "Und warum?"}]
        said += [answer, ask(server, name, turns), *streamed(server, name, turns, **(drawn | {"seed": 8}))]
    parts = [{"name": name, "scale": scale} for name, scale in zip(directories, (0.7, -0.4), strict=True)]
    said.append(ask(server, base, [question], adapters=parts, **drawn))
    return said


def body_of(model: str, messages: list[dict[str, str]], more: dict[str, Any]) -> dict[str, Any]:
    shown = {"max_tokens": 24, "logprobs": True, "top_logprobs": 5}
    return {"model": model, "messages": messages, "temperature": 0, **shown, **more}


def ask(server: RealServer, model: str, messages: list[dict[str, str]], **more: Any) -> str:
    with server.client() as client:
        response = client.post("/v1/chat/completions", json=body_of(model, messages, more))
    assert response.status_code == 200, response.text
    return plain(response.text)


def streamed(server: RealServer, model: str, messages: list[dict[str, str]], **more: Any) -> list[str]:
    """What the stream says, as one."""
    body = body_of(model, messages, more | {"stream": True})
    with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]", lines
    return ["\n".join(plain(line) for line in lines[:-1])]


def plain(reply: str) -> str:
    """A reply without what is another one each time."""

    def without(part: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in part.items() if name not in OTHERWISE_EACH_TIME}

    return json.dumps(json.loads(reply, object_hook=without))
