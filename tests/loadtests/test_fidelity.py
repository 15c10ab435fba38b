"""The load test of fidelity: its figures from known distributions, and its reference from a real checkpoint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from loadtests.errors import LoadTestError
from loadtests.fidelity import compare, load_exact

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.loader import load_base_model
from loramux_server.kernels.choice import choose_kernels
from support.stepping import Stepper
from support.tiny_models import save_tiny_model

TEXTS = {"a": 0, "b": 1, "c": 2}


def logs(*shares: float) -> list[float]:
    return [math.log(share) for share in shares]


def test_equal_distributions_are_no_way_apart() -> None:
    exact = logs(0.5, 0.25, 0.125, 0.125)
    found = compare([dict(zip("ab", exact, strict=False))], [exact], TEXTS)
    assert max(map(abs, found.divergence)) < 1e-12
    assert found.difference == (0, 0) and found.unlike == 0 and found.positions == 1


def test_what_is_not_told_counts_as_one_token() -> None:
    served = {"a": math.log(0.4), "b": math.log(0.3), "twice": math.log(0.2)}
    found = compare([served], [logs(0.3, 0.4, 0.2, 0.1)], TEXTS)
    expected = 0.3 * math.log(0.3 / 0.4) + 0.4 * math.log(0.4 / 0.3)  # the rest is 0.3 on both sides
    assert found.divergence[0] == pytest.approx(expected)
    assert found.difference[1] == pytest.approx(math.log(4 / 3)) and found.unlike == 1


def test_another_base_is_named() -> None:
    with pytest.raises(LoadTestError, match="is it the same base"):
        compare([{"x": -1.0}], [logs(0.5, 0.5)], TEXTS)


def test_the_reference_is_the_served_weights_in_fp32(tmp_path: Path) -> None:
    cpu = CpuDevice()
    checkpoint = save_tiny_model(tmp_path / "base")
    kernels = choose_kernels(cpu, "reference")
    base = load_base_model(str(checkpoint), device=cpu, cache_dir=tmp_path, report=lambda line: None, kernels=kernels)
    ids = [5, 9, 200, 31, 7]
    stepper = Stepper(base.model, kernels="reference")
    served = stepper.prefill(stepper.sequence("x", ids), chunk=len(ids))
    with torch.inference_mode():
        exact = load_exact(checkpoint)(input_ids=torch.tensor([ids])).logits[0, -1]
    assert served.dtype == exact.dtype == torch.float32
    assert (served - exact).abs().max() < 1e-5 * exact.std()
