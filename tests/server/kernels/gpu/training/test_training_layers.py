"""Each part of training on the Triton kernels against plain autograd in fp32 on the weights that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from loramux_adapters.device.device import Device
from loramux_adapters.training.model.fused_linear import FrozenWeight, keep_mask, lora_linear
from loramux_adapters.training.model.packed_attention import attend_reference
from loramux_adapters.training.model.row_layout import LayerAttention, PackedRows
from loramux_server.kernels.gpu.nf4 import Nf4Weights, nf4_product
from loramux_server.kernels.gpu.split_sums import scratch_numbers
from loramux_server.kernels.gpu.step.nf4_linear import TritonNF4Linear
from loramux_server.kernels.gpu.training import layers as training_layers
from loramux_server.kernels.gpu.training.attention import attend_rounded
from loramux_server.kernels.gpu.training.layers import TrainedDense, TrainedNF4Linear, rounded_product
from loramux_server.kernels.gpu.training.operations import TritonTraining
from support.gpu_training import devices

INPUTS, OUTPUTS, RANK, ROWS = 128, 96, 4, 70


@pytest.fixture(params=devices(), ids=lambda make: make.__name__)
def on(request: pytest.FixtureRequest) -> Iterator[Device]:
    device: Device = request.param()
    with device.used():
        yield device


def nf4_layer(on: Device, *, inputs: int = INPUTS, bias: bool = True) -> TrainedNF4Linear:
    torch.manual_seed(0)
    linear = Linear4bit(inputs, OUTPUTS, bias=bias, quant_type="nf4").to("cpu")
    weights = Nf4Weights.of(linear)
    placed = Nf4Weights(on.put(weights.codes), on.put(weights.scales))
    held = None if linear.bias is None else on.put(linear.bias.detach())
    return TrainedNF4Linear(TritonNF4Linear(placed, held, on), on)


def dense_layer(on: Device) -> TrainedDense:
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS).to(on.activations).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.data = on.put(parameter.data)
    return TrainedDense(linear, on)


def random(on: Device, *shape: int, size: float = 1.0, seed: int = 1) -> torch.Tensor:
    return on.put(size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def in_slots(weights: torch.Tensor) -> torch.Tensor:
    """Numbers that a slot of the server holds as they are."""
    return weights.bfloat16().float()


def near(ours: torch.Tensor, theirs: torch.Tensor, part: float) -> bool:
    return bool((ours - theirs).norm() <= part * theirs.norm())


@contextmanager
def in_small_parts() -> Iterator[None]:
    """As if 64 rows were too many at once."""
    before, training_layers.MOST_BYTES = training_layers.MOST_BYTES, 1
    try:
        yield
    finally:
        training_layers.MOST_BYTES = before


@pytest.mark.parametrize("make", [nf4_layer, dense_layer], ids=["NF4", "16 bits"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_layer_with_lora_has_the_values_and_gradients_of_plain_fp32(
    on: Device, make: Callable[[Device], Any], dropout: float
) -> None:
    layer = make(on)
    x, a, b = (
        random(on, ROWS, INPUTS),
        in_slots(random(on, RANK, INPUTS)),
        in_slots(random(on, OUTPUTS, RANK, size=0.1)),
    )
    leaves = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    torch.manual_seed(3)
    y = lora_linear(*leaves, FrozenWeight(layer, TritonTraining(on)), 2.0, dropout)
    slopes = random(on, ROWS, OUTPUTS, size=1e-6, seed=2)  # as small as gradients are
    y.backward(slopes)

    plain = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    torch.manual_seed(3)
    keep = 1.0
    if dropout:
        keep = keep_mask(x, dropout).float() / (1 - dropout)
    weight, bias = layer.dequantized(), layer.bias.float()
    expected = plain[0] @ weight.t() + bias + 2.0 * ((plain[0] * keep) @ plain[1].t()) @ plain[2].t()
    expected.backward(slopes)
    part = 2e-3 if on.activations == torch.float16 else 2e-2
    assert y.dtype == torch.float32 and near(y, expected, part)
    for ours, theirs in zip(leaves, plain, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert ours.grad.dtype == torch.float32 and near(ours.grad, theirs.grad, part)


def test_the_product_has_the_bits_that_are_served_in_parts_of_any_size(on: Device) -> None:
    layer, x = nf4_layer(on, inputs=512), random(on, ROWS, 512)
    served = on.scratch((ROWS, OUTPUTS), torch.float32)
    sums = on.scratch((scratch_numbers(ROWS, 512, OUTPUTS),), torch.float32)
    nf4_product(on.launch, served, x.to(on.activations), layer.nf4, sums)
    whole = layer.product(x)
    with in_small_parts():
        parts = layer.product(x)
    assert torch.equal(whole, served) and torch.equal(parts, served)


def test_layers_that_read_the_same_keep_one_copy_of_it_in_16_bits(on: Device) -> None:
    weights = [FrozenWeight(nf4_layer(on), TritonTraining(on)) for _ in range(2)]
    x = random(on, 3, INPUTS)
    first, second = (weight.read(x) for weight in weights)
    assert first.dtype == on.activations and first.data_ptr() == second.data_ptr()
    x.mul_(2)
    assert torch.equal(weights[0].read(x), 2 * first)


def test_gradients_too_small_for_fp16_are_not_lost() -> None:
    a = torch.randn(70, 64) * torch.logspace(-12, 3, 70)[:, None]
    a[3] = 0
    b = torch.randn(64, 32).half()
    with in_small_parts():
        got = rounded_product(a, b)
    expected = a @ b.float()
    assert ((got - expected).norm(dim=1) <= 2e-3 * expected.norm(dim=1)).all()
    assert near(rounded_product(a, b.bfloat16()), a @ b.bfloat16().float(), 1e-2)


def test_products_of_mixed_dtypes_are_taken_in_parts(on: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    ops, half, full = TritonTraining(on), random(on, 9, 7).to(on.activations), random(on, 7, 5)
    for most in (2**26, 60):
        monkeypatch.setattr("loramux_server.kernels.gpu.training.operations.MOST_BYTES", most)
        assert near(ops.matmul(half, full), half.float() @ full, 1e-6)
        assert near(ops.matmul(full.t(), half.t()), full.t() @ half.float().t(), 1e-6)
        added = random(on, 9, 5)
        assert near(ops.matmul(half, full, added.clone()), added + half.float() @ full, 1e-6)


@pytest.mark.parametrize("gelu", [False, True])
def test_what_stands_between_layers_has_the_gradients_of_autograd(
    on: Device, gelu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux_server.kernels.gpu.training.operations.MOST_BYTES", 200)
    ops, x, up, weight = TritonTraining(on), random(on, 5, 16), random(on, 5, 16, seed=2), random(on, 16, seed=3)
    dy = random(on, 5, 16, seed=4)
    activation = (lambda z: nn.functional.gelu(z, approximate="tanh")) if gelu else nn.functional.silu

    def gradients(function: Callable[..., torch.Tensor], *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [tensor.float().clone().requires_grad_() for tensor in given]
        return torch.autograd.grad(function(*leaves), leaves, dy)

    def norm(z: torch.Tensor) -> torch.Tensor:
        return weight * z / (z.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    assert near(ops.norm(x, weight, 1e-5), norm(x), 1e-6)
    assert near(ops.norm_gradient(dy, x, weight, 1e-5), gradients(norm, x)[0], 1e-5)
    assert near(ops.activation(x, gelu=gelu), activation(x), 1e-6)
    assert near(ops.activation_gradient(dy, x, gelu=gelu), gradients(activation, x)[0], 1e-5)
    x, up = x.to(ops.kept), up.to(ops.kept)
    assert near(ops.gated(x, up, gelu=gelu), activation(x.float()) * up.float(), 1e-6)
    expected = gradients(lambda gate, by: activation(gate) * by, x, up)
    for ours, theirs in zip(ops.gated_gradient(dy, x, up, gelu=gelu), expected, strict=True):
        assert near(ours, theirs, 1e-5)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_losses_and_their_gradients_are_those_of_cross_entropy(on: Device, softcap: float) -> None:
    logits, labels = random(on, 6, 40, size=2.0), on.put(torch.tensor([0, 3, 29, 7, 11, 2]))
    leaf = logits.clone().requires_grad_()
    z = leaf[:, :30] * 0.5
    z = softcap * torch.tanh(z / softcap) if softcap else z
    expected = nn.functional.cross_entropy(z, labels, reduction="none")
    expected.sum().backward()
    assert leaf.grad is not None
    correct = z.argmax(1) == labels
    for gradient in (False, True):
        given = logits.clone()
        losses, said = TritonTraining(on).token_losses(
            given, labels, 30, factor=0.5, softcap=softcap, gradient=gradient
        )
        assert torch.allclose(losses.float(), expected.detach(), rtol=1e-5) and torch.equal(said, correct)
        if gradient:
            assert torch.allclose(given, leaf.grad, atol=1e-6)


@pytest.mark.parametrize(
    "params", [LayerAttention(0.3), LayerAttention(0.3, window=4), LayerAttention(0.3, softcap=2.0)]
)
@pytest.mark.parametrize("rows", [PackedRows(0, (5, 12, 6)), PackedRows(3, (4, 9))], ids=["apart", "one beginning"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_has_the_values_and_gradients_of_the_reference(
    params: LayerAttention, rows: PackedRows, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    tokens = rows.shared + sum(rows.lengths)
    drawn = [torch.randn(tokens, heads, 16).to(dtype).float() for heads in (4, 2, 2)]
    ours, theirs = ([x.clone().requires_grad_() for x in drawn] for _ in range(2))
    got, expected = attend_rounded(*ours, rows, params, dtype), attend_reference(*theirs, rows, params)
    slopes = torch.randn(got.shape) * 1e-6
    got.backward(slopes)
    expected.backward(slopes)
    part = 1e-5 if dtype == torch.float16 else 2e-2
    assert got.dtype == torch.float32 and near(got, expected, part)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.grad is not None and its.grad is not None and near(mine.grad, its.grad, part)
