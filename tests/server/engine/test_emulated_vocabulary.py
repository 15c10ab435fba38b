"""Adapters of embeddings and output heads on a card, by its kernels, against peft on the same base and in company."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support import triton_interpreter

if triton_interpreter.INSTALLED:
    triton_interpreter.prepare()
else:
    pytest.skip(triton_interpreter.WHY_NOT, allow_module_level=True)

from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_adapters.lora.verify import check_adapter
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.sequence import Batch, SamplingParams, ScheduledSequence
from support.emulated import EmulatedDevice
from support.stepping import CPU, Stepper
from support.tiny_models import save_tiny_model
from support.vocabulary_adapters import ATTENTION, KINDS, PROMPT, TIED, write

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
STEPS = SchedulerConfig(max_num_seqs=12, max_batch_tokens=40)
SAVED = {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.fixture(autouse=True)
def untrained_gradients() -> Iterator[None]:
    """peft wants gradients for what it makes."""
    with torch.enable_grad():
        yield


def exact(directory: Path, cache: Path) -> Any:
    return load_base_model(str(directory), device=CPU, cache_dir=cache, report=lambda line: None, exact=True).model


def on_a_card(directory: Path, cache: Path, *, graphs: int = 0) -> tuple[BaseModel, Stepper]:
    device = EmulatedDevice(kernels="triton")
    base = load_base_model(str(directory), device=device, cache_dir=cache, report=lambda line: None)
    stepper = Stepper(base.model, rows=128, blocks=160, device=device, config=STEPS, graph_bytes=graphs)
    assert stepper.runner.decoder is not None, stepper.runner.why_by_modules
    return base, stepper


@pytest.mark.parametrize(("tied", "architecture"), [(False, "llama"), (True, "gemma"), (False, "granite")])
def test_adapters_of_the_vocabulary_agree_with_peft_in_one_batch_and_are_the_same_alone(
    tied: bool, architecture: str, tmp_path: Path
) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture, tie_word_embeddings=tied, num_hidden_layers=1)
    names = [name for name in (TIED if tied else KINDS) if "embedding, saved" not in name]
    theirs = [exact(directory, tmp_path / "cache")(torch.tensor([PROMPT])).logits[0].detach()]
    for index, name in enumerate(names):
        theirs.append(write(exact(directory, tmp_path / "cache"), tmp_path / str(index), KINDS[name], index))
    base, stepper = on_a_card(directory, tmp_path / "cache")
    slots = [Slot(8 * place, 8) for place in range(len(names))]
    for index, slot in enumerate(slots):
        stepper.load(slot, check_adapter(tmp_path / str(index), base.info(), 64).adapter)
    scaled = [ScaledSlot(slot, factor) for slot, factor in zip(slots, (0.7, -0.4, 1.0), strict=False)]
    uses: list[Any] = [None, *slots, tuple(scaled)]
    with torch.inference_mode(), stepper.device.used():
        sequences = [stepper.sequence(str(place), PROMPT, use) for place, use in enumerate(uses)]
        for sequence in sequences:
            stepper.logits([(sequence, len(PROMPT) - 1)])
        together = stepper.device.take(stepper.logits([(sequence, 1) for sequence in sequences]))
        for place, use in enumerate(uses):
            alone = stepper.device.take(stepper.prefill(stepper.sequence("alone", PROMPT, use), len(PROMPT) - 1))
            assert torch.equal(alone, together[place]), place
    for index, expected in enumerate(theirs):
        difference = (together[index].float().log_softmax(-1) - expected[-1].log_softmax(-1)).abs()
        change = (expected[-1].log_softmax(-1) - theirs[0][-1].log_softmax(-1)).abs().mean()
        assert (index == 0) == (change <= 0.02)
        assert difference.mean() <= (0.05 * change if index else 0.02), (names[index - 1], difference.mean(), change)


def test_added_tokens_are_chosen_by_their_own_rows_alone_beside_rows_that_graphs_choose(tmp_path: Path) -> None:
    """Rows of the base are told the same beside them as by a graph; what a sequence is told is the same alone."""
    directory = save_tiny_model(tmp_path / "base", tie_word_embeddings=False, num_hidden_layers=1)
    model = exact(directory, tmp_path / "cache")
    model.resize_token_embeddings(325, mean_resizing=False)
    prompt = [*PROMPT[:8], 322, 5, 324]
    theirs = write(model, tmp_path / "0", SAVED, 0, prompt)
    base, stepper = on_a_card(directory, tmp_path / "cache", graphs=1 << 30)
    checked = check_adapter(tmp_path / "0", base.info(), 64)
    assert checked.adapter.tokens is not None
    slot, sampled = Slot(0, 8), SamplingParams(temperature=0.8, seed=4, max_tokens=8, logprobs=3)
    stepper.load(slot, checked.adapter)
    held = stepper.slots.token_bytes(elsewhere=lambda version: True)
    assert held == checked.adapter.tokens.head.rows.nbytes + 4 * len(checked.adapter.tokens.head.tokens)  # type: ignore[union-attr]
    ask_all = (GREEDY, sampled, SamplingParams(temperature=0.0, max_tokens=8, digests=True))
    with torch.inference_mode(), stepper.device.used():
        ours = stepper.device.take(stepper.prefill(stepper.sequence("own", prompt, slot), len(prompt)))
        assert ours.shape == (325,)
        difference = (ours.float().log_softmax(-1) - theirs[-1].log_softmax(-1)).abs()
        assert difference.mean() <= 0.02

        def told(*rows: tuple[Slot | None, list[int], SamplingParams]) -> list[Any]:
            scheduled = [
                ScheduledSequence(stepper.sequence(f"{place}", ids, use, params), len(ids), samples=True)
                for place, (use, ids, params) in enumerate(rows)
            ]
            step = stepper.runner.start(Batch(scheduled))
            results = step.results()
            assert step.ahead == all(use is None and not params.digests for use, _, params in rows)
            for row in scheduled:
                stepper.release(row.sequence)
            return results

        kinds = [(use, ids, params) for params in ask_all for use, ids in ((slot, prompt), (None, PROMPT[:6]))]
        alone = [told(kind)[0] for kind in kinds]
        for first, second in ((0, 1), (2, 3), (4, 5), (1, 2), (3, 0)):
            assert told(kinds[first], kinds[second]) == [alone[first], alone[second]]
        only = SamplingParams(temperature=0.0, max_tokens=8, allowed_token_ids=(320, 324), logprobs=1)
        assert told((slot, prompt, only), kinds[1])[0].token_id in (320, 324)
        assert all(result.token_id < 320 for (use, _, _), result in zip(kinds, alone, strict=True) if use is None)
    stepper.slots.forget(checked.version)
    assert stepper.slots.token_bytes(elsewhere=lambda version: False) == 0


GREEDY = SamplingParams(temperature=0.0, max_tokens=8, logprobs=2)
