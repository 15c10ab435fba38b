"""The serving path in one process: the same bits as one sequence at a time, batched and with shared beginnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.errors import AdapterRejected, BaseMismatch, DataError
from loramux_adapters.lora.slots import Slot
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.engine.local_engine import STEP_TOKENS, LocalEngine
from loramux_server.engine.scheduling.sequence import SamplingParams
from loramux_server.errors import SequenceFailed
from support.adapter_files import write_adapter
from support.stepping import Stepper, told
from support.tiny_models import save_tiny_model

CPU = CpuDevice()
NO_STOP: frozenset[int] = frozenset()


def load(tmp_path: Path, quantize: str = "nf4") -> BaseModel:
    directory = tmp_path / "base"
    if not directory.exists():
        save_tiny_model(directory)
    return load_base_model(
        str(directory), device=CPU, cache_dir=tmp_path / "cache", report=lambda line: None, quantize=quantize
    )


@pytest.fixture
def base(tmp_path: Path) -> Iterator[BaseModel]:
    yield load(tmp_path)


@pytest.fixture
def engine(base: BaseModel) -> Iterator[LocalEngine]:
    yield LocalEngine.open(base, rows=4, tokens=2048, max_rank=16)


def prompts(beginning: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    same = torch.randint(0, 256, (beginning,), generator=generator).tolist()
    lengths = (40, 7, 19, 1, 300, 33, 40)
    return [same + torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


class Solo:
    """The same base with a runner of its own: one sequence at a time, a token at a time after the prompt."""

    def __init__(self, base: BaseModel) -> None:
        self._stepper = Stepper(base.model)

    def load(self, directory: Path) -> Slot:
        slot = Slot(0, 16)
        self._stepper.load(slot, load_host_adapter(directory))
        return slot

    def score(self, prompt: list[int], continuation: Sequence[int], slot: Slot | None = None) -> list[float]:
        """Log probability of each token of the continuation."""
        params = SamplingParams(temperature=0.0, max_tokens=200)
        sequence = self._stepper.sequence("solo", prompt, slot, params)
        logits, found = self._stepper.prefill(sequence, chunk=9), []
        for token in continuation:
            found.append(told(logits, token).logprob)
            sequence.output.append(token)
            logits = self._stepper.logits([(sequence, 1)])[0]
        self._stepper.release(sequence)
        return found


@pytest.fixture
def solo(tmp_path: Path) -> Solo:
    return Solo(load(tmp_path))


@pytest.mark.parametrize("beginning", [0, 50])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_score_has_the_bits_of_one_sequence_fed_alone(
    engine: LocalEngine, solo: Solo, tmp_path: Path, beginning: int, adapted: bool
) -> None:
    adapter, slot = None, None
    if adapted:
        directory = write_adapter(tmp_path / "a", engine.base.linears, std_b=0.2)
        adapter, slot = engine.load(directory), solo.load(directory)
    continuations = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11], [12, 13], [14]]
    rows = list(zip(prompts(beginning), continuations, strict=True))

    scores = engine.score(rows, adapter)

    assert scores == [solo.score(prompt, continuation, slot) for prompt, continuation in rows]


def test_rows_with_the_same_prompt_share_it_and_keep_their_own_continuations(engine: LocalEngine, solo: Solo) -> None:
    prompt, other = prompts()[0], prompts()[2]
    rows = [(prompt, [1, 2, 3]), (prompt, [4]), (other, [9]), (prompt, []), (prompt, [1, 5]), (other, [9, 9])]

    scores = engine.score(rows, None)

    assert scores == [solo.score(prompt, continuation) for prompt, continuation in rows]


def test_continuations_that_begin_alike_keep_their_own_scores(engine: LocalEngine, solo: Solo) -> None:
    prompt = prompts()[2]
    tails = [[5, 6, 7, 8], [5, 6], [5, 6, 7, 9], [5], [5, 6, 8, 8, 8], [6, 6, 7, 8], [5, 6, 7, 8, 9], [5, 6]]

    both = engine.ask([(prompt, tail) for tail in tails], None, max_tokens=3)

    assert [[one.logprob for one in found] for found in both.scores] == [solo.score(prompt, tail) for tail in tails]
    assert both.replies[tuple(prompt)] == engine.generate([prompt], None, max_tokens=3, stop_ids=NO_STOP)[0]


def test_a_long_answer_is_scored_at_each_of_its_tokens(engine: LocalEngine, solo: Solo) -> None:
    prompt, answer = prompts()[4], prompts()[4][:150]  # more heads than a step takes

    (score,) = engine.score([(prompt, answer)], None)

    assert score == solo.score(prompt, answer)


def test_the_probabilities_of_all_tokens_sum_to_one(engine: LocalEngine) -> None:
    (prompt,) = prompts()[:1]
    scores = engine.score([(prompt, [token]) for token in range(320)], None)

    assert sum(torch.tensor(scores).exp().flatten()) == pytest.approx(1.0, abs=1e-3)


def test_replies_are_the_same_alone_and_in_company(engine: LocalEngine, tmp_path: Path) -> None:
    adapter = engine.load(write_adapter(tmp_path / "a", engine.base.linears, std_b=0.2))
    asked = prompts(40)

    together = engine.generate(asked, adapter, max_tokens=5, stop_ids=NO_STOP)
    alone = [engine.generate([prompt], adapter, max_tokens=5, stop_ids=NO_STOP)[0] for prompt in asked]

    assert together == alone
    assert all(len(reply.tokens) == len(reply.logprobs) == 5 and not reply.ended for reply in together)
    assert together != engine.generate(asked, None, max_tokens=5, stop_ids=NO_STOP)


def test_a_reply_scores_as_it_was_generated(engine: LocalEngine) -> None:
    asked = prompts()
    replies = engine.generate(asked, None, max_tokens=6, stop_ids=NO_STOP)

    scores = engine.score([(prompt, reply.tokens) for prompt, reply in zip(asked, replies, strict=True)], None)

    assert scores == [reply.logprobs for reply in replies]
    measured = engine.ask([(asked[0], replies[0].tokens), (asked[0], [replies[0].tokens[0] + 1])], None).scores
    assert [token.is_best for token in measured[0]] == [True] * 6
    assert not measured[1][0].is_best


def test_scores_and_replies_of_one_pass_are_those_of_two(engine: LocalEngine) -> None:
    asked = prompts(20)
    rows = [(prompt, tokens) for prompt in asked for tokens in ([1, 2, 3], [4], [5, 6])]

    both = engine.ask(rows, None, max_tokens=4)

    assert [[token.logprob for token in found] for found in both.scores] == engine.score(rows, None)
    replies = [both.replies[tuple(prompt)] for prompt in asked]
    assert replies == engine.generate(asked, None, max_tokens=4, stop_ids=NO_STOP)


def test_a_reply_ends_at_a_stop_token_which_is_left_out(engine: LocalEngine) -> None:
    prompt = prompts()[0]
    free = engine.generate([prompt], None, max_tokens=8, stop_ids=NO_STOP)[0]
    stop = free.tokens[3]
    first = free.tokens.index(stop)

    stopped = engine.generate([prompt], None, max_tokens=8, stop_ids=frozenset({stop}))[0]

    assert stopped.ended
    assert stopped.tokens == free.tokens[:first]
    assert stopped.logprobs == free.logprobs[:first]


def test_more_prompts_than_the_cache_holds_take_turns(base: BaseModel) -> None:
    small = LocalEngine.open(base, rows=8, tokens=336, max_rank=8)
    asked = prompts()

    replies = small.generate(asked, None, max_tokens=4, stop_ids=NO_STOP)

    assert all(len(reply.tokens) == 4 for reply in replies)
    assert replies[0] == small.generate(asked[:1], None, max_tokens=4, stop_ids=NO_STOP)[0]


def test_a_prompt_that_is_longer_than_the_context_is_refused_with_both_lengths(engine: LocalEngine) -> None:
    assert engine.context == 512
    with pytest.raises(DataError, match="510 tokens and 4 after it .* 512"):
        engine.generate([[1] * 510], None, max_tokens=5, stop_ids=NO_STOP)
    with pytest.raises(DataError, match="no tokens"):
        engine.score([([], [1])], None)
    assert len(engine.score([([1] * 510, [1, 2, 3])], None)[0]) == 3


def test_a_prompt_of_more_than_a_step_is_fed_in_pieces(engine: LocalEngine, solo: Solo) -> None:
    prompt = [1, *prompts()[4], *prompts()[4][:100]]
    assert len(prompt) > STEP_TOKENS

    assert engine.score([(prompt, [5, 6])], None) == [solo.score(prompt, [5, 6])]


def test_adapters_are_checked_as_uploads_are(engine: LocalEngine, tmp_path: Path) -> None:
    linears = engine.base.linears
    good = engine.load(
        write_adapter(
            tmp_path / "good",
            linears,
            extra_config={"loramux_base_id": "f" * 64} | {"loramux_base_id": engine.base.base_id},
        )
    )
    assert good.base_verified and good.rank == 8
    assert not engine.load(write_adapter(tmp_path / "unnamed", linears, seed=1)).base_verified
    with pytest.raises(BaseMismatch):
        engine.load(write_adapter(tmp_path / "other", linears, extra_config={"loramux_base_id": "f" * 64}))
    with pytest.raises(AdapterRejected, match="at most 16"):
        engine.load(write_adapter(tmp_path / "large", linears, rank=32))


def test_more_adapters_than_the_device_holds_take_turns_on_it(engine: LocalEngine, tmp_path: Path) -> None:
    made = [write_adapter(tmp_path / f"a{seed}", engine.base.linears, rank=16, seed=seed) for seed in range(3)]
    loaded = [engine.load(directory) for directory in made]
    asked = prompts()[:2]

    first, *others = ([engine.generate(asked, one, max_tokens=3, stop_ids=NO_STOP) for one in loaded] for _ in range(2))

    assert others == [first]
    assert len({str(replies) for replies in first}) == 3


def test_an_adapter_stays_until_it_is_unloaded_as_often_as_it_was_loaded(engine: LocalEngine, tmp_path: Path) -> None:
    made = [write_adapter(tmp_path / f"a{seed}", engine.base.linears, rank=16, seed=seed) for seed in range(3)]
    adapter, *others = [engine.load(directory) for directory in made]
    engine.load(made[0])
    row = (prompts()[0], [1])

    engine.unload(adapter)
    before = engine.score([row], adapter)
    engine.unload(adapter)
    for other in others:  # they take its place on the device
        assert engine.score([row], other) != before

    with pytest.raises(SequenceFailed, match="not loaded"):
        engine.score([row], adapter)
    assert engine.score([row], engine.load(made[0])) == before


def test_a_model_whose_output_is_not_finite_says_so(engine: LocalEngine, tmp_path: Path) -> None:
    broken = engine.load(write_adapter(tmp_path / "a", engine.base.linears, std_b=1e37))

    with pytest.raises(SequenceFailed, match="not finite"):
        engine.score([(prompts()[0], [1, 2, 3])], broken)
    assert len(engine.score([(prompts()[0], [1, 2, 3])], None)[0]) == 3


def test_a_16_bit_base_runs_too_and_gives_nearly_the_same(engine: LocalEngine, tmp_path: Path) -> None:
    plain = LocalEngine.open(load(tmp_path, "none"), rows=4, tokens=1024, max_rank=16)
    directory = write_adapter(tmp_path / "a", engine.base.linears, std_b=0.05)
    rows = [(prompt, [1]) for prompt in prompts()]

    ours = torch.tensor(engine.score(rows, engine.load(directory)))
    theirs = torch.tensor(plain.score(rows, plain.load(directory)))

    assert 0 < (ours - theirs).abs().mean() < 1.5
    assert "16 bit" in plain.numerics_id and "NF4" in engine.numerics_id


def test_the_numerics_id_names_versions_kernels_and_device(engine: LocalEngine) -> None:
    processor = "any cpu" if engine.base.kernels.isa else "cpu "  # compiled kernels give the same bits on all
    for part in (f"torch {torch.__version__}", "bitsandbytes", "NF4", "attention", "LoRA", processor):
        assert part in engine.numerics_id
    assert engine.checked.batch_invariant
