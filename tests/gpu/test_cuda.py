"""The CUDA path on a real device: the same functions, the same answers. Run with `make test-gpu`."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from loramux_adapters.device.choice import device_named
from loramux_adapters.device.cuda import CudaDevice
from loramux_adapters.lora.ops import Arena, add_lora_loop
from loramux_adapters.lora.slots import Slot
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.base.loader import load_base_model
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.start_check import Checker
from loramux_server.kernels.attention.kv_cache import KVCache, KVShape
from loramux_server.kernels.attention.paged_attention import AttentionParams, AttentionStep, attend_reference
from loramux_server.kernels.choice import choose_kernels
from support.adapter_files import write_adapter
from support.lora_rows import RANKS, make_arena, make_rows, make_sums
from support.stepping import Stepper, relative_difference
from support.tiny_models import save_tiny_model

PROMPTS = [list(range(40)), [5, 6, 7], list(range(100, 133))]
SLOTS = [None, Slot(0, 8), Slot(16, 16)]


# collected also without one (tests/test_gpu_tests.py)
CUDA = CudaDevice(torch.device("cuda"))


def stepper_on(name: str, tmp_path: Path) -> Stepper:
    device = device_named(name)
    base = load_base_model(
        str(tmp_path / "base"), device=device, cache_dir=tmp_path / "cache", report=lambda line: None
    )
    stepper = Stepper(base.model, device=device)
    for index, slot in enumerate(SLOTS[1:]):
        assert slot is not None
        directory = write_adapter(tmp_path / f"adapter-{index}", dict(base.linears), rank=8, seed=index, std_b=0.2)
        stepper.load(slot, load_host_adapter(directory))
    return stepper


def test_a_device_is_there() -> None:
    assert torch.cuda.is_available(), "these tests need a CUDA device"


def test_cuda_gives_the_cpus_answers_within_rounding(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", "llama")
    logits = {}
    for device in ("cpu", "cuda"):
        stepper = stepper_on(device, tmp_path)
        sequences = [stepper.sequence(str(i), p, s) for i, (p, s) in enumerate(zip(PROMPTS, SLOTS, strict=True))]
        logits[device] = stepper.logits([(sequence, len(sequence.prompt)) for sequence in sequences]).cpu()
    for ours, theirs in zip(logits["cuda"], logits["cpu"], strict=True):
        assert relative_difference(ours, theirs) < 0.1


def test_rows_of_a_mixed_batch_agree_with_their_solo_runs(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", "llama")
    stepper = stepper_on("cuda", tmp_path)
    pairs = list(enumerate(zip(PROMPTS, SLOTS, strict=True)))
    alone = [stepper.prefill(stepper.sequence(f"a{i}", prompt, slot), chunk=7) for i, (prompt, slot) in pairs]
    sequences = [stepper.sequence(f"s{i}", prompt, slot) for i, (prompt, slot) in pairs]
    together = stepper.logits([(sequence, len(sequence.prompt)) for sequence in sequences])
    for expected, got in zip(alone, together, strict=True):
        assert relative_difference(got, expected) < 0.05


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi3"])
def test_the_checks_at_start_pass(architecture: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", architecture)
    base = load_base_model(str(tmp_path / "base"), device=CUDA, cache_dir=tmp_path / "cache", report=lambda line: None)
    stepper = Stepper(base.model, device=CUDA)
    Checker(
        stepper.runner,
        stepper.slots,
        base.model,
        vocabulary=256,
        num_blocks=256,
        config=SchedulerConfig(max_num_seqs=20),
        device=CUDA,
    ).run()


def test_the_plain_path_is_on_the_librarys_kernels_where_it_has_them() -> None:
    """What the tensor paths would do slowly; on a device without them this says so."""
    kernels = choose_kernels(CUDA, "cuda", KVShape(2, 3, 64))
    if CUDA.capability in ((9, 0), (10, 0)):
        assert kernels.lora == "grouped"
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # from PyTorch 2.13 on
        assert kernels.attention.startswith("varlen")


@pytest.mark.parametrize("counts", [[1] * 12, [12, 6, 3, 2, 1], [24], [20, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("composed", [False, True])
def test_deltas_on_the_device_equal_the_loop_on_the_cpu(counts: list[int], composed: bool) -> None:
    rows = make_sums(counts, RANKS) if composed else make_rows(counts)
    on_cpu = make_arena(576, 192)
    arena = Arena(on_cpu.a.cuda(), on_cpu.bt.cuda(), on_cpu.targeted.cuda())
    x, y = torch.randn(rows.num_rows, 576).bfloat16(), torch.randn(rows.num_rows, 192).bfloat16()
    got = y.cuda()
    choose_kernels(CUDA, "cuda", KVShape(1, 3, 64)).add_lora(got, x.cuda(), arena, rows)
    add_lora_loop(y, x, on_cpu, rows)
    assert (got.cpu().float() - y.float()).abs().mean() <= 0.01


@pytest.mark.parametrize("window", [0, 7])
def test_attention_on_the_device_equals_the_reference(window: int) -> None:
    device, shape = CUDA.place, KVShape(1, 3, 64)
    attend = choose_kernels(CUDA, "cuda", shape).attend
    tables = torch.tensor([[4, 1, 3], [2, 0, 0]], dtype=torch.int32, device=device)
    runs = ((0, 0, 40, 0), (1, 40, 5, 0))
    sequence = torch.tensor([0] * 40 + [1] * 5, dtype=torch.int32, device=device)
    position = torch.tensor([*range(40), *range(5)], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(45, heads, 64, device=device).bfloat16() for heads in (9, 3, 3))
    outs = [
        path(
            q,
            k,
            v,
            0,
            AttentionStep(KVCache(shape, 6, CUDA), path, tables, sequence, position, runs),
            AttentionParams(0.125, window=window),
        )
        for path in (attend, attend_reference)
    ]
    torch.testing.assert_close(*outs, rtol=0.05, atol=0.05)
