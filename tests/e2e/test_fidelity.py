"""What is served on the CPU beside fp32 on the same NF4 weights, over the whole distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loadtests.fidelity import TARGET, TEXT

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.loader import load_base_model
from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.engine.scheduling.sequence import Batch, ScheduledSequence
from loramux_server.kernels.choice import available_kernels, choose_kernels
from support.stepping import Stepper

CPU = CpuDevice()


def logits_of(kernels: str, cache: Path) -> tuple[list[int], torch.Tensor]:
    """The text's tokens, and the logits behind every beginning of it."""
    base = load_base_model(
        EMBEDDED_NAME, device=CPU, cache_dir=cache, report=lambda line: None, kernels=choose_kernels(CPU, kernels)
    )
    ids = base.tokenizer(TEXT)["input_ids"]
    stepper = Stepper(base.model, kernels=kernels)
    row = ScheduledSequence(stepper.sequence("text", ids), len(ids), samples=False, num_scored=len(ids))
    return ids, stepper.runner.forward(Batch([row])).clone()


@pytest.mark.skipif("native" not in available_kernels(CPU), reason="no compiler was there at installation")
def test_the_served_distribution_is_next_to_that_of_fp32(embedded_cache: Path) -> None:
    ids, exact_logits = logits_of("reference", embedded_cache)
    _, served_logits = logits_of("native", embedded_cache)
    lowest = next(name for name in available_kernels(CPU) if name.startswith("native-"))
    assert torch.equal(logits_of(lowest, embedded_cache)[1], served_logits), lowest

    exact, served = (logits.double().log_softmax(-1) for logits in (exact_logits, served_logits))
    divergence = (exact.exp() * (exact - served)).sum(-1)
    assert 0 < divergence.mean() <= TARGET
    read = torch.tensor(ids[1:])[:, None]
    apart = (exact[:-1].gather(1, read) - served[:-1].gather(1, read)).abs()
    assert apart.mean() < 0.005 and apart.max() < 0.05
    assert int((exact.argmax(-1) != served.argmax(-1)).sum()) <= len(ids) // 50
