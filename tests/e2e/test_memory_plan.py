"""The memory plan against the embedded base in memory, as `loramux train` holds it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import ON_HOST
from loramux_adapters.device.peak import PeakMemory
from loramux_adapters.training.model.model import LoraModel
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run.optimizer import make_optimizer
from loramux_adapters.training.run.plan import plan_memory
from loramux_server.base.loader import load_base_model, resident_bytes
from loramux_server.base.source import EMBEDDED_NAME
from support.measured_memory import different_rows, optimizer_bytes, saved_by_a_step

CPU = CpuDevice()


def test_base_adapter_and_optimizer_are_planned_within_a_tenth(
    embedded_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(rank=16, batch_size=8)
    base = load_base_model(EMBEDDED_NAME, device=CPU, cache_dir=embedded_cache, report=lambda line: None, training=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.source.directory))
    planned = plan_memory(skeleton, recipe, sequence=128, learned=2, layout=ON_HOST)
    measured = resident_bytes(base.model)

    model = LoraModel.build(base.model, recipe)
    optimizer = make_optimizer(model.trainable, recipe)
    batch = different_rows(8, 128, learned=2, vocabulary=skeleton.config.vocab_size)
    before, peak = psutil.Process().memory_info().rss, PeakMemory(CPU)
    model.loss(batch, grad_scale=1.0)
    added = peak.peak() - before
    optimizer.step()
    kept = saved_by_a_step(model, base.model, batch)
    measured += sum(parameter.nbytes for parameter in model.trainable.values()) + optimizer_bytes(optimizer)

    expected = planned.base + planned.adapter + planned.optimizer
    step = planned.activations + planned.work + planned.gradients
    with capsys.disabled():
        print("\nmemory plan, MiB planned and measured:")
        for what, left, right in (
            ("base, adapter and optimizer", expected, measured),
            ("activations kept", planned.activations, kept),
            ("what a step adds to the process", step, added),
        ):
            print(f"  {what}: {left / 2**20:.1f}, {right / 2**20:.1f} ({100 * (left / right - 1):+.1f} %)")
    assert expected == pytest.approx(measured, rel=0.1)
    assert planned.activations == pytest.approx(kept, rel=0.1)
