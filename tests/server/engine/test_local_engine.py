"""The serving path in one process: the same bits as one sequence at a time, batched and with shared beginnings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loramux_adapters.errors import AdapterRejected, BaseMismatch, DataError, MemoryShort
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.engine.local_engine import Adapter, Offline
from loramux_server.engine.local_steps import STEP_TOKENS
from loramux_server.engine.sequence import SamplingParams
from support.adapter_files import write_adapter
from support.stepping import Stepper
from support.tiny_models import save_tiny_model

CPU = torch.device("cpu")
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
def offline(base: BaseModel) -> Iterator[Offline]:
    yield Offline.open(base, rows=4, tokens=2048, max_rank=16)


def prompts(beginning: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    same = torch.randint(0, 256, (beginning,), generator=generator).tolist()
    lengths = (40, 7, 19, 1, 300, 33, 40)
    return [same + torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def solo(offline: Offline, prompt: list[int], continuation: list[int], adapter: Adapter | None) -> list[float]:
    """The continuation's log probabilities, fed one sequence at a time and a token at a time after the prompt."""
    stepper = Stepper.__new__(Stepper)
    stepper.runner, stepper._free = offline._runner, list(range(100))
    params = SamplingParams(temperature=0.0, max_tokens=200)
    sequence = stepper.sequence("solo", prompt, None if adapter is None else adapter.slot, params)
    logits, found = stepper.prefill(sequence, chunk=9), []
    for token in continuation:
        found.append(float(logits.float().log_softmax(-1)[token]))
        sequence.output.append(token)
        logits = stepper.logits([(sequence, 1)])[0]
    return found


@pytest.mark.parametrize("beginning", [0, 50])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_score_has_the_bits_of_one_sequence_fed_alone(
    offline: Offline, tmp_path: Path, beginning: int, adapted: bool
) -> None:
    adapter = offline.load(write_adapter(tmp_path / "a", offline.base.linears, std_b=0.2)) if adapted else None
    continuations = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11], [12, 13], [14]]
    rows = list(zip(prompts(beginning), continuations, strict=True))

    scores = offline.score(rows, adapter)

    assert scores == [solo(offline, prompt, continuation, adapter) for prompt, continuation in rows]


def test_rows_with_the_same_prompt_share_it_and_keep_their_own_continuations(offline: Offline) -> None:
    prompt, other = prompts()[0], prompts()[2]
    rows = [(prompt, [1, 2, 3]), (prompt, [4]), (other, [9]), (prompt, []), (prompt, [1, 5]), (other, [9, 9])]

    scores = offline.score(rows, None)

    assert scores == [solo(offline, prompt, continuation, None) for prompt, continuation in rows]


def test_a_long_answer_is_scored_at_each_of_its_tokens(offline: Offline) -> None:
    prompt, answer = prompts()[4], prompts()[4][:150]  # more heads than a step takes

    (score,) = offline.score([(prompt, answer)], None)

    assert score == solo(offline, prompt, answer, None)


def test_the_probabilities_of_all_tokens_sum_to_one(offline: Offline) -> None:
    (prompt,) = prompts()[:1]
    scores = offline.score([(prompt, [token]) for token in range(320)], None)

    assert sum(torch.tensor(scores).exp().flatten()) == pytest.approx(1.0, abs=1e-3)


def test_replies_are_the_same_alone_and_in_company(offline: Offline, tmp_path: Path) -> None:
    adapter = offline.load(write_adapter(tmp_path / "a", offline.base.linears, std_b=0.2))
    asked = prompts(40)

    together = offline.generate(asked, adapter, max_tokens=5, stop_ids=NO_STOP)
    alone = [offline.generate([prompt], adapter, max_tokens=5, stop_ids=NO_STOP)[0] for prompt in asked]

    assert together == alone
    assert all(len(reply.tokens) == len(reply.logprobs) == 5 and not reply.ended for reply in together)
    assert together != offline.generate(asked, None, max_tokens=5, stop_ids=NO_STOP)


def test_a_reply_scores_as_it_was_generated(offline: Offline) -> None:
    asked = prompts()
    replies = offline.generate(asked, None, max_tokens=6, stop_ids=NO_STOP)

    scores = offline.score([(prompt, reply.tokens) for prompt, reply in zip(asked, replies, strict=True)], None)

    assert scores == [reply.logprobs for reply in replies]
    measured = offline.ask([(asked[0], replies[0].tokens), (asked[0], [replies[0].tokens[0] + 1])], None).scores
    assert [token.is_best for token in measured[0]] == [True] * 6
    assert not measured[1][0].is_best


def test_scores_and_replies_of_one_pass_are_those_of_two(offline: Offline) -> None:
    asked = prompts(20)
    rows = [(prompt, tokens) for prompt in asked for tokens in ([1, 2, 3], [4], [5, 6])]

    both = offline.ask(rows, None, max_tokens=4)

    assert [[token.logprob for token in found] for found in both.scores] == offline.score(rows, None)
    replies = [both.replies[tuple(prompt)] for prompt in asked]
    assert replies == offline.generate(asked, None, max_tokens=4, stop_ids=NO_STOP)


def test_a_reply_ends_at_a_stop_token_which_is_left_out(offline: Offline) -> None:
    prompt = prompts()[0]
    free = offline.generate([prompt], None, max_tokens=8, stop_ids=NO_STOP)[0]
    stop = free.tokens[3]
    first = free.tokens.index(stop)

    stopped = offline.generate([prompt], None, max_tokens=8, stop_ids=frozenset({stop}))[0]

    assert stopped.ended
    assert stopped.tokens == free.tokens[:first]
    assert stopped.logprobs == free.logprobs[:first]


def test_more_prompts_than_the_cache_holds_take_turns(base: BaseModel) -> None:
    small = Offline.open(base, rows=8, tokens=336, max_rank=8)
    asked = prompts()

    replies = small.generate(asked, None, max_tokens=4, stop_ids=NO_STOP)

    assert all(len(reply.tokens) == 4 for reply in replies)
    assert replies[0] == small.generate(asked[:1], None, max_tokens=4, stop_ids=NO_STOP)[0]


def test_a_prompt_that_is_longer_than_the_context_is_refused_with_both_lengths(offline: Offline) -> None:
    assert offline.context == 512
    with pytest.raises(DataError, match="510 tokens and 4 after it .* 512"):
        offline.generate([[1] * 510], None, max_tokens=5, stop_ids=NO_STOP)
    with pytest.raises(DataError, match="no tokens"):
        offline.score([([], [1])], None)
    assert len(offline.score([([1] * 510, [1, 2, 3])], None)[0]) == 3


def test_a_prompt_of_more_than_a_step_is_fed_in_pieces(offline: Offline) -> None:
    prompt = [1, *prompts()[4], *prompts()[4][:100]]
    assert len(prompt) > STEP_TOKENS

    assert offline.score([(prompt, [5, 6])], None) == [solo(offline, prompt, [5, 6], None)]


def test_adapters_are_checked_as_uploads_are(offline: Offline, tmp_path: Path) -> None:
    linears = offline.base.linears
    good = offline.load(
        write_adapter(
            tmp_path / "good",
            linears,
            extra_config={"loramux_base_id": "f" * 64} | {"loramux_base_id": offline.base.base_id},
        )
    )
    assert good.base_verified and good.rank == 8
    assert not offline.load(write_adapter(tmp_path / "unnamed", linears, seed=1)).base_verified
    with pytest.raises(BaseMismatch):
        offline.load(write_adapter(tmp_path / "other", linears, extra_config={"loramux_base_id": "f" * 64}))
    with pytest.raises(AdapterRejected, match="at most 16"):
        offline.load(write_adapter(tmp_path / "large", linears, rank=32))


def test_full_slots_say_so_and_an_unloaded_adapter_makes_room(offline: Offline, tmp_path: Path) -> None:
    made = [write_adapter(tmp_path / f"a{seed}", offline.base.linears, rank=16, seed=seed) for seed in range(3)]
    first, second = offline.load(made[0]), offline.load(made[1])
    assert first.slot != second.slot
    with pytest.raises(MemoryShort, match="unload"):
        offline.load(made[2])
    offline.unload(first)
    assert offline.load(made[2]).slot == first.slot


def test_a_16_bit_base_runs_too_and_gives_nearly_the_same(offline: Offline, tmp_path: Path) -> None:
    plain = Offline.open(load(tmp_path, "none"), rows=4, tokens=1024, max_rank=16)
    directory = write_adapter(tmp_path / "a", offline.base.linears, std_b=0.05)
    rows = [(prompt, [1]) for prompt in prompts()]

    ours = torch.tensor(offline.score(rows, offline.load(directory)))
    theirs = torch.tensor(plain.score(rows, plain.load(directory)))

    assert 0 < (ours - theirs).abs().mean() < 1.5
    assert "16 bit" in plain.numerics_id and "NF4" in offline.numerics_id


def test_the_numerics_id_names_versions_kernels_and_device(offline: Offline) -> None:
    for part in (f"torch {torch.__version__}", "bitsandbytes", "NF4", "attention", "LoRA", "cpu x86_64"):
        assert part in offline.numerics_id
    assert offline.checked.batch_invariant


def test_the_deltas_are_the_adapters_own(offline: Offline, tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a", offline.base.linears, std_b=0.2)
    adapter, prompt = offline.load(directory), prompts()[0]
    stepper = Stepper.__new__(Stepper)
    stepper.runner, stepper._free, stepper.slots = offline._runner, list(range(100)), offline._slots
    stepper.load(adapter.slot, load_host_adapter(directory))

    logits = stepper.prefill(stepper.sequence("s", prompt, adapter.slot), chunk=99)

    assert offline.generate([prompt], adapter, max_tokens=1, stop_ids=NO_STOP)[0].tokens == [int(logits.argmax())]
