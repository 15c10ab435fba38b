"""NF4 layers on our kernel: bitsandbytes' own weights, the product it means, and each row alone."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from torch.nn import functional

from loramux_server.base.loader import resident_bytes
from loramux_server.kernels.compiled.library import Compiled, native_library
from loramux_server.kernels.layers import fp32
from loramux_server.kernels.layers.fp32 import dequantized, run_in_fp32
from loramux_server.kernels.layers.nf4_linear import NF4Linear, codes_of, pack, tiles, unpacked

LIBRARY = native_library()
ISAS = LIBRARY.isas if LIBRARY else ()
needs_the_kernel = pytest.mark.skipif(LIBRARY is None, reason="no compiler was there at installation")
SHAPES = [(64, 32), (128, 96), (576, 192), (1536, 576)]


def quantized(inputs: int, outputs: int, *, bias: bool = False, double: bool = True) -> Any:
    torch.manual_seed(inputs * outputs)
    layer = Linear4bit(
        inputs, outputs, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=double
    )
    layer.weight.data = layer.weight.data.bfloat16()
    if bias:
        layer.bias.data = torch.randn(outputs).bfloat16()
    return layer.to("cpu").eval()  # quantizes


def packed(layer: nn.Module, isa: int = -1) -> NF4Linear:
    assert LIBRARY is not None
    model = nn.Sequential(copy.deepcopy(layer))
    pack(model, Compiled(LIBRARY, ISAS[isa]))
    assert isinstance(model[0], NF4Linear)
    return model[0]


def test_codes_are_taken_apart_and_laid_out_as_the_kernel_reads_them() -> None:
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8)
    weight = (codes[:, 0::2] << 4 | codes[:, 1::2]).reshape(-1, 1)
    assert torch.equal(unpacked(weight, 32, 64), codes)
    laid = tiles(codes)
    assert laid.shape == (2, 16, 32)
    for output, first in ((0, 0), (17, 4), (31, 60)):
        for p in (0, 1):
            byte = int(laid[output // 16, first // 4, 2 * (output % 16) + p])
            assert (byte & 15, byte >> 4) == (codes[output, first + p], codes[output, first + p + 2])
    assert torch.equal(codes_of(laid), codes)


@needs_the_kernel
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 13, 32, 129])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@torch.inference_mode()
def test_a_layer_gives_the_product_with_bitsandbytes_own_weights(rows: int, inputs: int, outputs: int) -> None:
    layer = quantized(inputs, outputs)
    state = layer.weight.quant_state
    state.dtype = torch.float32
    weight = bnb.dequantize_4bit(layer.weight.data, state)
    assert torch.equal(packed(layer).dequantized(), weight)
    x = torch.randn(rows, inputs)
    expected = x.double() @ weight.double().T
    for isa in range(len(ISAS)):
        found = packed(layer, isa)(x).double()
        assert (found - expected).norm() < 4e-4 * expected.norm(), ISAS[isa].label


@needs_the_kernel
@torch.inference_mode()
def test_the_product_is_exact_up_to_the_rounding_of_levels_and_inputs() -> None:
    layer = packed(quantized(128, 64))
    x = torch.randint(-8191, 8192, (40, 128)).float()
    x[:, 3] = x[:, 77] = 16383  # the largest of each block, so that whole numbers stay what they are
    levels = (bnb.get_4bit_type("nf4", device="cpu").double() * 2047).round() / 2047
    scales = layer.scales.double().t().repeat_interleave(64, dim=1)
    weight = levels[codes_of(layer.weight).int()] * scales
    expected = x.double() @ weight.T
    assert (layer(x) - expected).abs().max() < 3e-7 * expected.abs().max()


@needs_the_kernel
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@torch.inference_mode()
def test_the_bits_of_a_row_depend_neither_on_its_company_nor_on_the_threads(inputs: int, outputs: int) -> None:
    source = quantized(inputs, outputs, bias=True)
    x = torch.randn(70, inputs)
    together, threads = packed(source)(x), torch.get_num_threads()
    for isa in range(len(ISAS)):
        layer = packed(source, isa)
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            try:
                assert torch.equal(torch.cat([layer(row[None]) for row in x[:9]]), together[:9])
                assert torch.equal(layer(x[5:42]), together[5:42])
                assert torch.equal(layer(x.flip(0)).flip(0), together)
            finally:
                torch.set_num_threads(threads)


@needs_the_kernel
@torch.inference_mode()
def test_shapes_biases_gaps_and_dtypes() -> None:
    layer = packed(quantized(128, 64, bias=True))
    assert layer.bias is not None
    x = torch.randn(6, 128)
    expected = layer(x)
    plain = packed(quantized(128, 64))
    assert torch.equal(expected, plain(x) + layer.bias)
    assert torch.equal(layer(x.view(1, 2, 3, 128)).view(6, 64), expected)
    wide = torch.randn(6, 256)
    wide[:, :128] = x
    assert torch.equal(layer(wide[:, :128]), expected), "rows with a gap between them"
    assert torch.equal(layer(x.T.contiguous().T), expected), "columns are made dense first"
    half = x.bfloat16()
    assert torch.equal(layer(half), layer(half.float()).bfloat16()), "other dtypes are widened and rounded back"
    single = quantized(128, 64, double=False)
    weight = bnb.dequantize_4bit(single.weight.data, single.weight.quant_state).float()
    torch.testing.assert_close(packed(single)(x), x @ weight.T, rtol=1e-2, atol=1e-2)


@needs_the_kernel
def test_a_packed_model_takes_the_bytes_of_its_codes_and_scales() -> None:
    assert resident_bytes(nn.Sequential(packed(quantized(128, 64)))) == 128 * 64 // 2 + 4 * 128 * 64 // 64


@needs_the_kernel
@torch.inference_mode()
def test_layers_that_no_kernel_takes_are_dequantized_to_fp32() -> None:
    assert LIBRARY is not None
    odd = quantized(64, 48, bias=True)
    model = nn.Sequential(quantized(64, 32), odd, nn.Linear(32, 32).bfloat16())
    weight = bnb.dequantize_4bit(odd.weight.data, odd.weight.quant_state).double()
    pack(model, LIBRARY.best)
    run_in_fp32(model)
    assert [type(layer) for layer in model] == [NF4Linear, Linear4bit, nn.Linear]
    x = torch.randn(5, 64)
    for _ in range(2):  # the first forward in eval mode is the one that would repack it
        found = model[1](x)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), x.double() @ weight.T + odd.bias.double(), rtol=2e-2, atol=2e-2)
    state = odd.weight.quant_state
    assert state.dtype == torch.float32
    exact = bnb.dequantize_4bit(odd.weight.data, state).double()
    fours = functional.linear(functional.pad(x, (0, 0, 0, 3)), exact.float(), odd.bias)[:5]
    assert torch.equal(model[1](x), fours)
    torch.testing.assert_close(model[1](x).double(), x.double() @ exact.T + odd.bias.double(), rtol=1e-5, atol=1e-6)
    assert model[2](torch.randn(1, 32)).dtype == torch.float32


@needs_the_kernel
@pytest.mark.parametrize("room", [True, False])
@torch.inference_mode()
def test_a_layer_of_the_kernels_is_dequantized_to_what_it_stands_for(
    room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp32, "available_bytes", lambda: 2 * 4 * 128 * 64 - (0 if room else 1))
    quant = quantized(128, 64, bias=True)
    layer = packed(quant)
    state, x = quant.weight.quant_state, torch.randn(2, 3, 128)
    state.dtype = torch.float32
    expected = functional.linear(x, bnb.dequantize_4bit(quant.weight.data, state), quant.bias.float())

    found = dequantized(layer)

    assert (found is layer) is not room
    assert torch.equal(found(x), expected)
