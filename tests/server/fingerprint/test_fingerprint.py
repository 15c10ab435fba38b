"""Fingerprints: made and compared on a real tiny model and on a fake one, read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.evaluation.scores import TokenScore
from loramux_server.base.loader import load_base_model
from loramux_server.engine.local_engine import Asked, LocalAdapter, LocalEngine, LocalReply
from loramux_server.fingerprint import fingerprint
from loramux_server.fingerprint.file import MAX_BYTES, MAX_PROMPTS, MAX_TOKENS, Fingerprint, Witness, parse
from loramux_server.fingerprint.replay import MAX_TOLERANCE
from support.adapter_files import write_adapter
from support.tiny_models import save_tiny_model

PROMPTS = [[1, 2, 3], [40, 41, 42, 43, 44, 45], [7]]
ADAPTER = LocalAdapter(Path(), "a" * 64, 8, base_verified=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    root = tmp_path_factory.mktemp("fingerprint")
    base = load_base_model(
        str(save_tiny_model(root / "base")),
        device=CpuDevice(),
        cache_dir=root / "cache",
        report=lambda line: None,
    )
    return LocalEngine.open(base, rows=4, tokens=1024, max_rank=16)


@pytest.fixture
def adapter(engine: LocalEngine, tmp_path: Path) -> Any:
    loaded = engine.load(write_adapter(tmp_path / "adapter", engine.base.linears, std_b=0.2))
    yield loaded
    engine.unload(loaded)


def read_back(made: dict[str, Any]) -> Fingerprint:
    return parse(json.dumps(made).encode())


def test_a_fingerprint_is_answered_exactly_where_it_was_made(engine: LocalEngine, adapter: LocalAdapter) -> None:
    made = read_back(fingerprint.make(engine, PROMPTS, adapter, max_tokens=12))

    found = fingerprint.compare(engine, made.prompts, adapter)

    assert found.equal and found.tokens == 36
    assert "bit for bit" in found.words()


def test_a_fingerprint_says_what_was_asked_and_answered(engine: LocalEngine, adapter: LocalAdapter) -> None:
    made = read_back(fingerprint.make(engine, PROMPTS, adapter, max_tokens=4))

    assert made.base_id == engine.base.base_id and made.version == adapter.version
    assert made.numerics_id == engine.numerics_id
    assert [said.ids for said in made.prompts] == [tuple(prompt) for prompt in PROMPTS]
    assert made.prompts[0].text == engine.base.tokenizer.decode(PROMPTS[0])
    [alone] = engine.generate([PROMPTS[1]], adapter, max_tokens=4, stop_ids=frozenset())
    assert made.prompts[1].tokens == tuple(alone.tokens) and made.prompts[1].logprobs == tuple(alone.logprobs)


def test_another_adapter_of_the_same_shape_answers_otherwise(
    engine: LocalEngine, adapter: LocalAdapter, tmp_path: Path
) -> None:
    made = read_back(fingerprint.make(engine, PROMPTS, adapter))
    other = engine.load(write_adapter(tmp_path / "other", engine.base.linears, std_b=0.2, seed=1))

    found = fingerprint.compare(engine, made.prompts, other)

    assert not found.equal and found.max > MAX_TOLERANCE


class Said(SimpleNamespace):
    """An LocalEngine whose model says fixed words: a function from the tokens so far to the logprobs of 4 tokens."""

    def __init__(self, model: Callable[[Sequence[int]], Sequence[float]], numerics_id: str = "here") -> None:
        base = SimpleNamespace(
            base_id="b" * 64,
            vocabulary=4,
            tokenizer=SimpleNamespace(decode=lambda ids: " ".join(map(str, ids))),
        )
        super().__init__(numerics_id=numerics_id, base=base, says=model)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        adapter: LocalAdapter | None,
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
    ) -> list[LocalReply]:
        replies = []
        for prompt in prompts:
            reply = LocalReply([], [], ended=False)
            for _ in range(max_tokens):
                logprobs = self.says([*prompt, *reply.tokens])
                reply.tokens.append(max(range(4), key=lambda token: logprobs[token]))
                reply.logprobs.append(max(logprobs))
            replies.append(reply)
        return replies

    def ask(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: LocalAdapter | None) -> Asked:
        def scored(so_far: Sequence[int], token: int) -> TokenScore:
            logprobs = self.says(so_far)
            return TokenScore(logprobs[token], logprobs[token] == max(logprobs))

        return Asked(
            [[scored([*ids, *tokens[:place]], token) for place, token in enumerate(tokens)] for ids, tokens in rows], {}
        )


def steady(so_far: Sequence[int]) -> list[float]:
    """Counts in a circle, always with the same confidence."""
    following = (so_far[-1] + 1) % 4
    return [-0.5 if token == following else -1.0 for token in range(4)]


def compared(model: Callable[[Sequence[int]], Sequence[float]]) -> fingerprint.Agreement:
    """What the steady model said against what another says."""
    said = fingerprint.witness(cast(LocalEngine, Said(steady)), [[0], [2, 1]], ADAPTER, max_tokens=6)
    return fingerprint.compare(cast(LocalEngine, Said(model)), said, ADAPTER)


def shifted(by: float) -> Callable[[Sequence[int]], list[float]]:
    return lambda so_far: [logprob - by for logprob in steady(so_far)]


def test_the_mean_and_the_largest_difference_are_measured() -> None:
    def once(by: float) -> Callable[[Sequence[int]], list[float]]:
        return lambda so_far: shifted(by if len(so_far) == 4 else 0)(so_far)

    assert compared(shifted(0.0)).equal
    assert (compared(shifted(0.05)).mean, compared(shifted(0.05)).max) == (pytest.approx(0.05), pytest.approx(0.05))
    assert (compared(once(0.3)).mean, compared(once(0.3)).max) == (pytest.approx(0.05), pytest.approx(0.3))
    assert not compared(shifted(0.05)).equal and not compared(shifted(0.05)).flips


def flipping(gap: float, places: Sequence[int]) -> Callable[[Sequence[int]], list[float]]:
    """After as many tokens as `places` says, token 3 beats the expected one by `gap`."""

    def model(so_far: Sequence[int]) -> list[float]:
        logprobs = steady(so_far)
        if len(so_far) in places:
            logprobs[3] = max(logprobs) + gap
        return logprobs

    return model


def test_every_flip_is_counted_by_itself_with_its_gap() -> None:
    found = compared(flipping(0.1, [3, 5]))

    # [0] is answered 1 2 3 0 1 2, of which place 2 (the 3 itself) and place 4 (a 1) follow 3 and 5 tokens;
    # [2, 1] is answered 2 3 0 1 2 3, of which place 1 (the 3 itself) and place 3 (a 1) follow 3 and 5 tokens.
    assert [(flip.prompt, flip.position) for flip in found.flips] == [(0, 4), (1, 3)]
    assert found.widest == pytest.approx(0.1)
    assert "2 of 12 greedy tokens differ, at gaps up to 0.100" in found.words()


def test_only_a_sensible_number_of_prompts_and_tokens_is_made() -> None:
    engine = cast(LocalEngine, Said(steady))
    with pytest.raises(ValueError):
        fingerprint.make(engine, [], ADAPTER)
    with pytest.raises(ValueError):
        fingerprint.make(engine, [[0]], ADAPTER, max_tokens=MAX_TOKENS + 1)


GOOD = Fingerprint("here", "b" * 64, "a" * 64, (Witness("0", (0,), "1 2", (1, 2), (-0.5, 0.0)),))


def changed(**fields: Any) -> bytes:
    """A good file with other fields; those of its prompt begin with `prompt_`."""
    data = json.loads(json.dumps(GOOD.as_json()))
    for name, value in fields.items():
        place = data["prompts"][0] if name.startswith("prompt_") else data
        place[name.removeprefix("prompt_")] = value
    return json.dumps(data).encode()


def test_a_written_fingerprint_is_read_back_as_it_was() -> None:
    assert parse(changed()) == GOOD


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"[]", "not a JSON object"),
        (b"{", "not valid JSON"),
        (b" " * (MAX_BYTES + 1), "more than"),
        (changed(format=2), "format 1"),
        (changed(format=True), "format 1"),
        (changed(extra=1), "no others"),
        (changed(version="A" * 64), "version"),
        (changed(version=None), "no version"),
        (changed(base_id="short"), "base_id"),
        (changed(numerics_id=5), "numerics_id"),
        (changed(prompts=[]), "prompts"),
        (changed(prompts=[{}]), "fields"),
        (changed(prompts=json.loads(changed())["prompts"] * (MAX_PROMPTS + 1)), "prompts"),
        (changed(prompt_ids=[]), "ids"),
        (changed(prompt_ids=[-1]), "ids"),
        (changed(prompt_ids=[True]), "ids"),
        (changed(prompt_ids=[2**31]), "ids"),
        (changed(prompt_tokens=[1]), "number of tokens"),
        (changed(prompt_tokens=[1] * (MAX_TOKENS + 1)), "tokens"),
        (changed(prompt_logprobs=[0.5, 0.0]), "logprobs"),
        (changed(prompt_logprobs=["0", 0.0]), "logprobs"),
        (changed(prompt_text="x" * 70_000), "text"),
    ],
)
def test_a_strangers_file_is_refused_with_the_reason(raw: bytes, why: str) -> None:
    with pytest.raises(AdapterRejected, match=why):
        parse(raw)


def test_a_base_is_asked_about_nothing_behind_a_token_that_it_does_not_know() -> None:
    said = [
        Witness("a", (1, 2), "b", (3, 4), (-1.0, -2.0)),
        Witness("a", (1, 2), "b", (3, 9, 4), (-1.0, -2.0, -3.0)),
        Witness("a", (1, 9), "b", (3,), (-1.0,)),
        Witness("a", (1,), "b", (9, 1), (-1.0, -2.0)),
    ]
    assert fingerprint.as_far_as(said, 9) == (said[0], Witness("a", (1, 2), "b", (3,), (-1.0,)))
