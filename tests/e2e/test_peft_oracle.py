"""Our mixed batch against peft's own model on the same packed NF4 base, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.lora.slots import ScaledSlot, Slot, bucket_of
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.loader import load_base_model
from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.engine.scheduling.sequence import Sequence
from support.real_adapters import ADAPTERS
from support.stepping import Stepper

PROMPT = "The three things that every good cook knows about bread are"
TOKENS = 8
SUM = {ADAPTERS[1]: 0.7, ADAPTERS[4]: -0.5, ADAPTERS[10]: 1.5}  # of different rank and targets
MEAN, MAX, GAP = 0.1, 0.4, 0.25  # tolerances between kernels that round differently


def peft_greedy(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Tokens and log probabilities [TOKENS, vocabulary] of a greedy reply by transformers' own generate."""
    with torch.inference_mode():
        result = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.stack([step[0] for step in result.logits]).float()
    return result.sequences[0, len(prompt) :].tolist(), logits.log_softmax(-1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_mixed_batch_agrees_with_peft(adapter_dirs: dict[str, Path], embedded_cache: Path) -> None:
    base = load_base_model(EMBEDDED_NAME, device=CpuDevice(), cache_dir=embedded_cache, report=lambda line: None)
    prompt = base.tokenizer(PROMPT)["input_ids"]
    oracle = {"base": peft_greedy(base.model, prompt)}
    names = [ADAPTERS[index] for index in (0, 1, 2, 4, 7, 10, 12, 15)]
    peft_model = PeftModel.from_pretrained(base.model, adapter_dirs[names[0]], adapter_name=names[0])
    for name in names:
        if name != names[0]:
            peft_model.load_adapter(adapter_dirs[name], adapter_name=name)
        peft_model.set_adapter(name)
        peft_model.eval()
        oracle[name] = peft_greedy(peft_model, prompt)
    peft_model.base_model.set_adapter(list(SUM))
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            for name, scale in SUM.items():
                module.set_scale(name, scale)
    peft_model.eval()
    oracle["sum"] = peft_greedy(peft_model, prompt)
    plain = peft_model.unload()

    stepper = Stepper(plain, rows=1024)
    rows: dict[str, Sequence] = {"base": stepper.sequence("base", prompt)}
    slots: dict[str, Slot] = {}
    offset = 0
    for name in names:
        adapter = load_host_adapter(adapter_dirs[name])
        rank = bucket_of(adapter.rank)
        offset = -(-offset // rank) * rank
        slot = Slot(offset, rank)
        offset += rank
        stepper.load(slot, adapter)
        slots[name] = slot
        rows[name] = stepper.sequence(name, prompt, slot)
    rows["sum"] = stepper.sequence("sum", prompt, tuple(ScaledSlot(slots[name], scale) for name, scale in SUM.items()))

    # teacher-forced along the oracle's tokens, all rows in one batch
    sequences = list(rows.values())
    steps = [stepper.logits([(sequence, len(prompt)) for sequence in sequences])]
    for position in range(TOKENS - 1):
        for name, sequence in rows.items():
            sequence.output.append(oracle[name][0][position])
        steps.append(stepper.logits([(sequence, 1) for sequence in sequences]))
    ours = torch.stack(steps, 1).float().log_softmax(-1)  # [rows, TOKENS, vocabulary]

    differences, flips = [], []
    for index, name in enumerate(rows):
        tokens, expected = oracle[name]
        chosen = torch.tensor(tokens)[:, None]
        differences.append((ours[index].gather(-1, chosen) - expected.gather(-1, chosen)).abs().flatten())
        for position in range(TOKENS):
            if int(ours[index, position].argmax()) != tokens[position]:
                top = expected[position].topk(2).values
                flips.append(float(top[0] - top[1]))
    difference = torch.cat(differences)
    print(
        f"{len(rows)} rows x {TOKENS} tokens against peft: mean {difference.mean():.3f}, max {difference.max():.3f}, "
        f"{len(flips)} tokens differ at top-2 gaps {[round(gap, 3) for gap in flips]}"
    )
    assert difference.mean() <= MEAN
    assert difference.max() <= MAX
    assert all(gap < GAP for gap in flips)
