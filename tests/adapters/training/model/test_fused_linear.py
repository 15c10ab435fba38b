"""The fused LoRA layer against the same layer written down plainly."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from loramux_adapters.training.model.fused_linear import FrozenWeight, keep_mask, lora_linear

SCALE = 2.0


def make(bias: bool, dtype: torch.dtype, nested: bool = False) -> tuple[nn.Linear, torch.Tensor]:
    """A frozen layer 64 -> 128 and its weight as the layer stands for it; NF4 where `nested`."""
    torch.manual_seed(1)
    layer = nn.Linear(64, 128, bias=bias).to(dtype).requires_grad_(False)
    if not nested:
        return layer, layer.weight.detach()
    four = Linear4bit(64, 128, bias=bias, compute_dtype=dtype, quant_type="nf4")
    four.load_state_dict(layer.state_dict())
    four.to("cpu").requires_grad_(False)
    return four, bnb.dequantize_4bit(four.weight.data, four.weight.quant_state)


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """x [2, 7, 64], A [4, 64], B [128, 4]."""
    torch.manual_seed(2)
    shapes, kinds = ((2, 7, 64), (4, 64), (128, 4)), (dtype, torch.float32, torch.float32)
    return [torch.randn(shape).to(kind).requires_grad_() for shape, kind in zip(shapes, kinds, strict=True)]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_it_gives_the_plain_result_and_the_plain_gradients(
    dtype: torch.dtype, tolerance: float, bias: bool, nested: bool
) -> None:
    layer, weight = make(bias, dtype, nested)
    x, a, b = inputs(dtype)
    y = lora_linear(x, a, b, FrozenWeight(layer), SCALE, 0.0)
    direction = torch.randn_like(y)
    ours = [y.detach(), *torch.autograd.grad(y, (x, a, b), direction)]
    x64, a64, b64 = (tensor.detach().double().requires_grad_() for tensor in (x, a, b))
    plain = nn.functional.linear(x64, weight.double(), None if layer.bias is None else layer.bias.double())
    plain = plain + SCALE * (x64 @ a64.t() @ b64.t())
    theirs = [plain.detach(), *torch.autograd.grad(plain, (x64, a64, b64), direction.double())]
    for left, right in zip(ours, theirs, strict=True):
        assert (left.double() - right).norm() < tolerance * right.norm()


def test_a_delta_smaller_than_the_last_bit_of_the_result_is_not_lost() -> None:
    """Added after rounding, about a fifth of a delta of 0.05 standard deviations would be."""
    torch.manual_seed(3)
    layer = nn.Linear(576, 512, bias=False).bfloat16().requires_grad_(False)
    layer.weight.data.normal_()
    x = torch.randn(400, 576).bfloat16()
    a, b = torch.randn(4, 576) / 24, torch.randn(512, 4) * 0.05
    delta = ((x @ a.bfloat16().t()) @ b.bfloat16().t()).double()
    y = lora_linear(x, a, b, FrozenWeight(layer), 1.0, 0.0).double()
    bare = x.double() @ layer.weight.double().t()
    kept = ((y - bare) * delta).mean() / (delta * delta).mean()
    assert abs(float(kept) - 1) < 0.08


def test_nothing_but_x_a_and_b_gets_a_gradient_and_a_frozen_x_gets_none() -> None:
    layer, _ = make(True, torch.float32)
    x, a, b = inputs(torch.float32)
    lora_linear(x.detach(), a, b, FrozenWeight(layer), SCALE, 0.0).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None and x.grad is None
    assert a.grad is not None and b.grad is not None


def test_dropout_zeroes_inputs_of_the_delta_alone_and_its_gradient_knows_which() -> None:
    layer, weight = make(False, torch.float32)
    x, a, b = inputs(torch.float32)
    torch.manual_seed(4)
    y = lora_linear(x, a, b, FrozenWeight(layer), SCALE, 0.25)
    direction = torch.randn_like(y)
    torch.manual_seed(4)
    kept = keep_mask(x.detach().reshape(-1, 64), 0.25).view(x.shape)
    plain = x @ weight.t() + SCALE * ((x * kept / 0.75) @ a.t() @ b.t())
    assert torch.allclose(y, plain, atol=1e-4)
    for left, right in zip(
        torch.autograd.grad(y, (x, a, b), direction), torch.autograd.grad(plain, (x, a, b), direction), strict=True
    ):
        assert torch.allclose(left, right, atol=1e-3)


def test_a_mask_is_the_same_from_the_same_seed_and_keeps_its_share() -> None:
    x = torch.empty(301, 997)
    torch.manual_seed(5)
    first = keep_mask(x, 0.1)
    other = keep_mask(x, 0.1)
    torch.manual_seed(5)
    assert torch.equal(first, keep_mask(x, 0.1))
    assert not torch.equal(first, other)
    assert abs(float(first.float().mean()) - 0.9) < 0.005
    assert (first.float().mean(0) - 0.9).abs().max() < 0.1


def test_no_dropout_share_is_rounded_to_none_or_all() -> None:
    x = torch.empty(1000, 100)
    torch.manual_seed(6)
    assert 0.3 < float(keep_mask(x, 0.5).float().mean()) < 0.7
    assert float(keep_mask(x, 0.999).float().mean()) < 0.01
