"""Training on a real card: gradients beside peft's own, and an 8B shape within its plan. Run with `make test-gpu`.

The tests in tests/server/kernels/gpu/training/ run compiled on a card too.
"""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from loramux_adapters.device.cuda import CudaDevice
from loramux_adapters.device.device import ON_CARD
from loramux_adapters.training.model.model import LoraModel
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run.optimizer import make_optimizer, why_not_8_bit
from loramux_adapters.training.run.plan import plan_memory
from loramux_server.kernels.gpu.step.nf4_linear import pack
from loramux_server.kernels.training import training_kernels
from support.decoders import random_model, slow_twin
from support.gpu_training import by_peft, cosine, gradients, random_base, randomize, rows
from support.measured_memory import different_rows
from support.shapes import LLAMA_8B

CUDA = CudaDevice(torch.device("cuda"))
MIB = 2**20
CONFIG = LlamaConfig(**LLAMA_8B)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


@pytest.mark.parametrize("family", ["Llama 3", "Qwen3", "Gemma 2", "Phi-3"])
def test_gradients_are_as_near_to_fp32_as_those_of_peft_on_bitsandbytes_layers(family: str) -> None:
    recipe = Recipe(rank=4, alpha=8)
    base = random_model(family)
    twin, theirs = slow_twin(base), copy.deepcopy(base).cuda()
    _, expected = by_peft(twin, recipe, rows())
    theirs.set_attn_implementation("eager")
    theirs.is_loaded_in_4bit = True  # peft then takes its own layers for these
    _, by_bitsandbytes = by_peft(theirs, recipe, rows())
    pack(base, CUDA)
    model = LoraModel.build(base, recipe, ops=training_kernels(base, CUDA), device=CUDA)
    randomize(model.trainable, CUDA)
    _, ours = gradients(model, rows(), CUDA)

    def near(found: dict[str, torch.Tensor]) -> float:
        left, right = (torch.cat([each[name].cpu().flatten() for name in expected]) for each in (found, expected))
        return cosine(left, right)

    assert near(ours) > 0.995
    assert near(ours) >= near(by_bitsandbytes) - 0.002


def test_the_8_bit_optimizer_runs() -> None:
    assert why_not_8_bit(CUDA) == ""


@pytest.mark.parametrize(("examples", "tokens"), [(2, 2048), (8, 512)])
def test_an_8b_shape_trains_within_its_plan(examples: int, tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe(rank=16, batch_size=examples, max_length=tokens, gradient_checkpointing=True)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(CONFIG)
    planned = plan_memory(skeleton, recipe, sequence=tokens, learned=tokens // 4, layout=ON_CARD)
    if planned.total > CUDA.memory().free:
        pytest.skip(f"{CUDA.name} has {CUDA.memory().free / MIB:,.0f} MiB free; it takes {planned.total / MIB:,.0f}")
    before = CUDA.memory().held
    base = random_base(CONFIG, CUDA)
    model = LoraModel.build(base, recipe, ops=training_kernels(base, CUDA), device=CUDA)
    optimizer = make_optimizer(model.trainable, recipe, CUDA)
    batch = different_rows(examples, tokens, learned=tokens // 4, vocabulary=CONFIG.vocab_size)
    seconds = 0.0
    for _ in range(2):
        CUDA.restart_peak()
        began = time.perf_counter()
        loss = model.loss(batch, grad_scale=1 / batch.learned)
        nn.utils.clip_grad_norm_(model.trainable.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        CUDA.synchronize()
        seconds = time.perf_counter() - began
    peak, expected = CUDA.memory().peak - before, planned.total - planned.context
    with capsys.disabled():
        print(
            f"\n8B shape, {examples} x {tokens} tokens: {examples * tokens / seconds:,.0f} tokens/s; "
            f"{peak / MIB:,.0f} MiB, planned {expected / MIB:,.0f}"
        )
    assert loss.loss_sum > 0
    assert 0.75 * expected <= peak <= expected
