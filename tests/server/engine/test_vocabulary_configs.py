"""Adapters of embeddings and output heads, made by peft, in one batch against peft's forward on the same base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_adapters.lora.verify import check_adapter
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.engine.scheduling.sequence import Batch, SamplingParams, ScheduledSequence
from loramux_server.kernels.choice import available_kernels, choose_kernels
from support.stepping import CPU, Stepper
from support.tiny_models import save_tiny_model
from support.vocabulary_adapters import ATTENTION, KINDS, PROMPT, TIED, write

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
MEAN, MOST = 0.01, 0.15  # of the mean change of a log probability


def load(directory: Path, cache: Path, *, exact: bool = False, kernels: str | None = None) -> BaseModel:
    return load_base_model(
        str(directory),
        device=CPU,
        cache_dir=cache,
        report=lambda line: None,
        exact=exact,
        kernels=None if kernels is None else choose_kernels(CPU, kernels),
    )


@pytest.fixture(autouse=True)
def untrained_gradients() -> Iterator[None]:
    """peft wants gradients for what it makes."""
    with torch.enable_grad():
        yield


@pytest.mark.parametrize("kernels", [None, "modules", "tensor"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_the_vocabulary_agree_with_peft_in_one_batch(
    tied: bool, architecture: str, kernels: str | None, tmp_path: Path
) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture, tie_word_embeddings=tied)
    names = TIED if tied else list(KINDS)
    expected = []
    for index, name in enumerate(names):
        model = load(directory, tmp_path / "cache", exact=True).model
        if not expected:
            expected.append(model(torch.tensor([PROMPT])).logits[0].detach())  # type: ignore[operator]
        expected.append(write(model, tmp_path / str(index), KINDS[name], index))

    base = load(directory, tmp_path / "cache")
    stepper = Stepper(base.model, kernels=kernels)
    slots: list[Any] = [None, *(Slot(8 * place, 8) for place in range(len(names)))]
    for index, slot in enumerate(slots[1:]):
        checked = check_adapter(tmp_path / str(index), base.info(), 64)
        assert checked.adapter.tokens is not None
        stepper.load(slot, checked.adapter)
    with torch.inference_mode():
        sequences = [stepper.sequence(str(index), PROMPT, slot) for index, slot in enumerate(slots)]
        ours = torch.stack([stepper.logits([(each, 1) for each in sequences]) for _ in PROMPT], 1)
        for index, slot in enumerate(slots):
            assert torch.equal(stepper.prefill(stepper.sequence("alone", PROMPT, slot), 7), ours[index, -1]), index
    for index, theirs in enumerate(expected):
        difference = (ours[index].float().log_softmax(-1) - theirs.log_softmax(-1)).abs()
        if index == 0:
            assert difference.max() <= 0.04
            continue
        change = (theirs.log_softmax(-1) - expected[0].log_softmax(-1)).abs().mean()
        assert change > 0.02, names[index - 1]
        assert difference.mean() <= MEAN * change and difference.max() <= MOST * change, names[index - 1]


@pytest.mark.parametrize(
    ("tied", "architecture", "sets"),
    [
        (False, "granite", ("native", "modules")),
        (True, "gemma", ("native", "modules")),
        (False, "gemma2", ("native",)),  # PyTorch's own tanh is the modules' last word
    ],
)
def test_a_mixed_batch_has_the_same_bits_alone_and_on_every_instruction_set(
    tied: bool, architecture: str, sets: tuple[str, ...], tmp_path: Path
) -> None:
    """With the base, adapters of the vocabulary and sums of them in it; by a whole step and module by module."""
    directory = save_tiny_model(tmp_path / "base", architecture, tie_word_embeddings=tied)
    names = [name for name in TIED if "embedding, saved" not in name]
    for index, name in enumerate(names):
        write(load(directory, tmp_path / "cache", exact=True).model, tmp_path / str(index), KINDS[name], index)
    found = []
    for kernels in available_kernels(CPU):
        if not kernels.startswith(sets):
            continue
        base = load(directory, tmp_path / "cache", kernels=kernels)
        stepper = Stepper(base.model, kernels=kernels)
        assert (stepper.runner.decoder is None) == kernels.startswith("modules")
        slots = [Slot(8 * place, 8) for place in range(len(names))]
        for index, slot in enumerate(slots):
            stepper.load(slot, check_adapter(tmp_path / str(index), base.info(), 64).adapter)
        scaled = [ScaledSlot(slot, factor) for slot, factor in zip(slots, (0.7, -0.4, 1.0, 1.5, 0.2), strict=False)]
        uses: list[Any] = [None, *slots, tuple(scaled), tuple(scaled[1:3])]
        prompts = [[*PROMPT[place % 5 :], 3] for place in range(len(uses))]
        sequences = [stepper.sequence(str(place), prompts[place], use) for place, use in enumerate(uses)]
        with torch.inference_mode():
            stepper.logits([(sequence, len(sequence.prompt) - 1) for sequence in sequences])
            found.append(stepper.logits([(sequence, 1) for sequence in sequences]))
            for place, use in enumerate(uses):
                again = stepper.sequence("alone", prompts[place], use)
                assert torch.equal(stepper.prefill(again, 5), found[-1][place]), (kernels, place)
    assert len(found) > 2 and all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kernels", [None, "modules", "tensor"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_added_tokens_widen_the_logits_of_their_own_rows_alone(
    architecture: str, kernels: str | None, tmp_path: Path
) -> None:
    directory = save_tiny_model(tmp_path / "base", architecture, tie_word_embeddings=False)
    model: Any = load(directory, tmp_path / "cache", exact=True).model
    model.resize_token_embeddings(325, mean_resizing=False)
    prompt = [*PROMPT, 322, 5, 324]
    settings = {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}
    theirs = write(model, tmp_path / "0", settings, 0, prompt)

    base = load(directory, tmp_path / "cache")
    stepper = Stepper(base.model, kernels=kernels)
    checked = check_adapter(tmp_path / "0", base.info(), 64)
    assert "it adds 5 tokens to the base's" in checked.notes
    slot = Slot(0, 8)
    stepper.load(slot, checked.adapter)
    with torch.inference_mode():
        params = SamplingParams(temperature=0.0, max_tokens=8, digests=True, logprobs=3)
        both = stepper.sequence("own", prompt, slot, params), stepper.sequence("base", PROMPT, None, params)
        ours = torch.stack([stepper.logits([(both[0], 1)])[0] for _ in prompt[:-1]])
        difference = (ours.float().log_softmax(-1) - theirs[:-1].log_softmax(-1)).abs()
        assert ours.shape == (len(prompt) - 1, 325)
        assert difference.mean() <= 0.02 and difference.max() <= 0.2
        stepper.logits([(both[1], len(PROMPT) - 1)])
        rows = [ScheduledSequence(each, 1, samples=True) for each in reversed(both)]
        found = stepper.runner.start(Batch(rows)).results()
        mixed = stepper.runner.forward(Batch(rows))
        assert mixed.shape == (2, 325) and bool((mixed[0, 320:] == -torch.inf).all())
        for row, result, width in zip(rows, found, (320, 325), strict=True):
            alone = stepper.runner.start(Batch([row])).results()
            assert alone == [result] and result.digest is not None
            assert result.token_id == int(mixed[rows.index(row), :width].argmax())


def test_a_token_that_only_the_adapter_knows_can_be_chosen_and_read_again(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=False)
    model: Any = load(directory, tmp_path / "cache", exact=True).model
    model.resize_token_embeddings(321, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[320] = 8 * model.lm_head.weight[7]
    settings = {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}
    write(model, tmp_path / "0", settings, 0)
    base = load(directory, tmp_path / "cache")
    stepper = Stepper(base.model)
    stepper.load(Slot(0, 8), check_adapter(tmp_path / "0", base.info(), 64).adapter)
    allowed = SamplingParams(temperature=0.0, max_tokens=8, allowed_token_ids=(320, 5), logprobs=2)
    with torch.inference_mode():
        own, bare = (
            stepper.sequence("own", PROMPT, Slot(0, 8), allowed),
            stepper.sequence("base", PROMPT, None, allowed),
        )
        chosen = []
        for _ in range(4):
            rows = [ScheduledSequence(each, each.num_tokens - each.num_computed, samples=True) for each in (bare, own)]
            for row, result in zip(rows, stepper.runner.start(Batch(rows)).results(), strict=True):
                assert result.token_id is not None and result.error is None
                row.sequence.num_computed += row.num_tokens
                row.sequence.output.append(result.token_id)
        chosen = own.output
    assert set(bare.output) == {5} and 320 in chosen


def test_what_peft_writes_of_a_resized_vocabulary_unasked_is_the_same_version(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=False)
    model: Any = load(directory, tmp_path / "cache", exact=True).model
    model.resize_token_embeddings(325, mean_resizing=False)
    settings = {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]}
    made = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **settings))
    made.save_pretrained(tmp_path / "asked", save_embedding_layers=False)
    made.save_pretrained(tmp_path / "unasked")
    base = load(directory, tmp_path / "cache").info()
    assert check_adapter(tmp_path / "unasked", base, 64).version == check_adapter(tmp_path / "asked", base, 64).version

    file = tmp_path / "unasked" / "adapter_model.safetensors"
    tensors = load_file(file)
    repeated = [name for name in tensors if ".modules_to_save." in name]
    assert repeated, "peft writes them twice"
    tensors[repeated[0]] = tensors[repeated[0]] + 1
    save_file(tensors, file)
    with pytest.raises(AdapterRejected, match="are the same weight with other numbers"):
        check_adapter(tmp_path / "unasked", base, 64)
