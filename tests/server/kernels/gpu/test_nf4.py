"""Products with NF4 weights: the reference's numbers, any shape, and each row alone."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit

from loramux_adapters import nf4 as plain
from loramux_server.kernels.gpu import nf4_levels
from loramux_server.kernels.gpu.launch import launch_now
from loramux_server.kernels.gpu.nf4 import (
    Nf4Weights,
    nf4_dequantize,
    nf4_dequantize_reference,
    nf4_product,
    nf4_product_reference,
    why_not,
)
from loramux_server.kernels.gpu.split_sums import ROW_TILES, parts_of, row_tiles_of, scratch_numbers
from support import ptx

# inputs, outputs: one block; outputs that are no multiple of a tile; several parts, of unequal length
SHAPES = [(64, 64), (192, 40), (576, 96), (1088, 20)]


def weights_on(device: torch.device, inputs: int, outputs: int, seed: int = 0) -> Nf4Weights:
    torch.manual_seed(seed)
    weights = Nf4Weights.packed(*plain.quantize(torch.randn(outputs, inputs) * inputs**-0.5))
    return Nf4Weights(weights.codes.to(device), weights.scales.to(device))


def rows_on(device: torch.device, act: torch.dtype, rows: int, inputs: int) -> torch.Tensor:
    torch.manual_seed(rows)
    return torch.randn(rows, inputs).to(device, act)


def product(x: torch.Tensor, w: Nf4Weights, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    y = torch.full((x.shape[0], w.outputs), 7.0, device=x.device, dtype=dtype)
    scratch = torch.full((scratch_numbers(x.shape[0], w.inputs, w.outputs),), torch.nan, device=x.device)
    nf4_product(launch_now, y, x, w, scratch, **options)
    return y


def linear(inputs: int, outputs: int, *, double: bool, quant_type: str = "nf4") -> Any:
    torch.manual_seed(inputs)
    layer = Linear4bit(inputs, outputs, bias=False, quant_type=quant_type, compress_statistics=double)
    layer.weight.data = torch.randn(outputs, inputs, dtype=torch.bfloat16) * 0.05
    return layer.to("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_assembly_gives_the_level_of_every_code_in_every_place(dtype: torch.dtype) -> None:
    text = nf4_levels.look_up_bf16() if dtype == torch.bfloat16 else nf4_levels.look_up_fp16()
    pairs = np.arange(65536, dtype=np.uint32)
    codes = np.concatenate([pairs | (pairs * np.uint32(40503) % 65536) << np.uint32(16), pairs << np.uint32(16)])
    done = ptx.run(text, {"$4": codes})
    found = np.stack(
        [done[f"${register}"] >> np.uint32(16 * half) & 0xFFFF for register in range(4) for half in (0, 1)]
    )
    bits = torch.tensor(nf4_levels.LEVELS).to(dtype)
    nibbles = np.stack([codes >> np.uint32(8 * byte + 4 * high) & 15 for high in (0, 1) for byte in range(4)])
    values = torch.from_numpy(found.astype(np.uint16).view(np.int16)).view(dtype)
    assert torch.equal(values, bits[torch.from_numpy(nibbles.astype(np.int64))])


def test_codes_count_every_level_once() -> None:
    assert sorted(nf4_levels.ORDER) == list(range(16))


@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_weights_keep_their_values(double: bool, device: torch.device) -> None:
    layer = linear(128, 96, double=double).to(device)
    state = layer.weight.quant_state
    weights = Nf4Weights.of(layer)
    assert (weights.inputs, weights.outputs) == (128, 96)
    codes, scales = weights.unpacked()
    wanted = bnb.dequantize_4bit(layer.weight.data, state).float()
    assert torch.equal(plain.dequantize(codes.cpu(), scales.cpu()).to(state.dtype).float(), wanted.cpu())


def test_quantized_weights_are_packed_and_unpacked_without_loss() -> None:
    codes, scales = plain.quantize(torch.randn(40, 192))
    again, same = Nf4Weights.packed(codes, scales).unpacked()
    assert torch.equal(codes, again) and torch.equal(scales, same)


def test_what_cannot_be_read_is_refused_with_a_reason() -> None:
    assert "fp4" in why_not(linear(128, 64, double=True, quant_type="fp4"))
    assert "multiple of 64" in why_not(linear(96, 64, double=True))
    assert "not quantized" in why_not(Linear4bit(64, 64))
    with pytest.raises(ValueError, match="cannot be read by the NF4 kernels"):
        Nf4Weights.of(linear(96, 64, double=True))


@pytest.mark.parametrize("inputs, outputs", SHAPES)
@pytest.mark.parametrize("rows", [1, 5, 17, 40])
def test_products_are_those_of_the_reference(
    inputs: int, outputs: int, rows: int, device: torch.device, act: torch.dtype
) -> None:
    w, x = weights_on(device, inputs, outputs), rows_on(device, act, rows, inputs)
    wanted = torch.empty(rows, outputs, device=device)
    nf4_product_reference(wanted, x, w)
    torch.testing.assert_close(product(x, w), wanted, rtol=1e-5, atol=1e-5)


def test_outputs_may_be_rounded_and_have_a_bias(device: torch.device, act: torch.dtype) -> None:
    for inputs, outputs in SHAPES[:3]:
        w, x = weights_on(device, inputs, outputs), rows_on(device, act, 3, inputs)
        bias = torch.randn(outputs).to(device, act)
        wanted = torch.empty(3, outputs, device=device, dtype=act)
        nf4_product_reference(wanted, x, w, bias=bias)
        torch.testing.assert_close(product(x, w, act, bias=bias), wanted, rtol=2**-7, atol=1e-4)


def test_rows_and_results_may_be_columns_of_wider_tensors(device: torch.device, act: torch.dtype) -> None:
    w = weights_on(device, 128, 64)
    wide, to = rows_on(device, act, 3, 256), torch.full((3, 96), 7.0, device=device)
    nf4_product(launch_now, to[:, 16:80], wide[:, 64:192], w, torch.empty(0, device=device))
    assert torch.equal(to[:, 16:80], product(wide[:, 64:192].contiguous(), w))
    assert bool((to[:, :16] == 7).all() and (to[:, 80:] == 7).all())


def test_stacked_weights_give_the_outputs_side_by_side(device: torch.device, act: torch.dtype) -> None:
    one, other = weights_on(device, 192, 64, 1), weights_on(device, 192, 24, 2)
    x = rows_on(device, act, 4, 192)
    assert torch.equal(product(x, Nf4Weights.stack([one, other])), torch.cat([product(x, one), product(x, other)], 1))


def test_weights_that_lie_side_by_side_are_stacked_where_they_are(device: torch.device) -> None:
    whole = weights_on(device, 192, 60)
    one, other, third = whole.part(8, 20), whole.part(20, 50), whole.part(50, 60)
    stacked = Nf4Weights.stack([one, other, third])
    assert stacked.codes.data_ptr() == one.codes.data_ptr() and stacked.scales.data_ptr() == one.scales.data_ptr()
    for found, expected in zip(stacked.unpacked(), whole.part(8, 60).unpacked(), strict=True):
        assert torch.equal(found, expected)
    for apart in ([one, third], [other, one], [one, weights_on(device, 192, 60).part(20, 50)], [whole, whole]):
        copied = Nf4Weights.stack(apart)
        assert copied.codes.data_ptr() != apart[0].codes.data_ptr()
        assert torch.equal(copied.codes, torch.cat([each.codes for each in apart], 1))


@pytest.mark.parametrize("inputs, outputs", [(192, 40), (576, 72)])
def test_a_row_has_the_same_bits_alone_and_among_any_others(
    inputs: int, outputs: int, device: torch.device, act: torch.dtype
) -> None:
    w, x = weights_on(device, inputs, outputs), rows_on(device, act, 34, inputs)
    together = product(x, w)
    for first, end in ((0, 1), (33, 34), (3, 20), (1, 34)):
        assert torch.equal(product(x[first:end].contiguous(), w), together[first:end])
    for tiles in ((8,), (16,), (32, 64), (64,)):
        assert torch.equal(product(x, w, row_tiles=tiles), together)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_harms_no_other(bad: float, device: torch.device, act: torch.dtype) -> None:
    w, x = weights_on(device, 576, 72), rows_on(device, act, 5, 576)
    wanted = product(x, w)
    x[2, 400] = bad
    y = product(x, w)
    assert not y[2].isfinite().any()
    assert torch.equal(y[[0, 1, 3, 4]], wanted[[0, 1, 3, 4]])


def test_no_rows_are_no_work(device: torch.device, act: torch.dtype) -> None:
    assert product(rows_on(device, act, 0, 64), weights_on(device, 64, 64)).shape == (0, 64)


def test_scratch_that_is_too_small_is_refused(device: torch.device, act: torch.dtype) -> None:
    w, x = weights_on(device, 576, 96), rows_on(device, act, 2, 576)
    with pytest.raises(AssertionError):
        nf4_product(launch_now, torch.empty(2, 96, device=device), x, w, torch.empty(5, device=device))


def test_sums_are_cut_so_that_few_outputs_fill_a_device() -> None:
    found = {
        shape: parts_of(*shape) for shape in [(4096, 28672), (4096, 6144), (14336, 4096), (4096, 1024), (576, 960)]
    }
    assert found == {(4096, 28672): 2, (4096, 6144): 8, (14336, 4096): 8, (4096, 1024): 8, (576, 960): 2}
    assert parts_of(64, 64) == 1
    assert parts_of(4096, 128256) == 1


def test_old_cards_take_the_tile_that_fits_into_their_registers() -> None:
    assert row_tiles_of((7, 5)) == ROW_TILES[:1]
    assert row_tiles_of((9, 0)) == ROW_TILES


@pytest.mark.parametrize("inputs, outputs", SHAPES)
def test_dequantized_weights_are_those_of_the_reference(
    inputs: int, outputs: int, device: torch.device, act: torch.dtype
) -> None:
    w = weights_on(device, inputs, outputs)
    for dtype in (act, torch.float32):
        found, wanted = (torch.empty(outputs, inputs, device=device, dtype=dtype) for _ in range(2))
        nf4_dequantize(launch_now, found, w)
        nf4_dequantize_reference(wanted, w)
        assert torch.equal(found, wanted)
