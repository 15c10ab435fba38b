"""NF4 in tensors: bitsandbytes' own numbers, and the compiled quantizer's."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from loramux_adapters import nf4

SHAPES = [(32, 64), (96, 192), (48, 576), (1536, 576)]


def weight(shape: tuple[int, int]) -> torch.Tensor:
    """With a block of zeros, a block of one number, and rows of very different sizes."""
    torch.manual_seed(shape[0] + shape[1])
    made = torch.randn(shape) * torch.logspace(-4, 2, shape[0])[:, None]
    made[0, :64] = 0
    made[1, :64] = -0.25
    return made.bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_bitsandbytes_own(shape: tuple[int, int]) -> None:
    w = weight(shape)
    codes, scales = nf4.quantize(w)
    packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    pairs = packed.reshape(-1)
    assert torch.equal(codes, torch.stack([pairs >> 4, pairs & 15], dim=1).view(shape))
    assert state.state2 is not None
    its = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # the mean is summed in another order, and without AVX2 the 8-bit levels are others in their last bit
    torch.testing.assert_close(scales.view(-1), its, rtol=2**-20, atol=2**-20 * float(its.abs().max()))
    back = bnb.dequantize_4bit(packed, state).float()
    torch.testing.assert_close(nf4.dequantize(codes, scales), back, rtol=2**-7, atol=1e-4)


def test_the_levels_are_bitsandbytes_own() -> None:
    assert torch.equal(nf4.levels(), bnb.get_4bit_type("nf4", device="cpu"))
    assert len(nf4.scale_levels()) == 256 and bool((nf4.scale_levels().diff() > 0).all())
    torch.testing.assert_close(nf4.scale_levels(), bnb.create_dynamic_map(), rtol=1e-6, atol=0)


def test_equal_scales_keep_their_value() -> None:
    codes, scales = nf4.quantize(torch.full((32, 64), 0.5))
    assert torch.equal(scales, torch.full((32, 1), 0.5)) and bool((codes == 15).all())
