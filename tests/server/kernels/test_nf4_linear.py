"""NF4 layers on our kernel: bitsandbytes' own weights, the product it means, and each row alone."""

from __future__ import annotations

import copy

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn

from loramux_server.base.loader import resident_bytes
from loramux_server.kernels.abi import Isa
from loramux_server.kernels.native import native_library
from loramux_server.kernels.nf4_linear import NF4Linear, keep_unpacked, pack, tiles, unpacked

LIBRARY = native_library()
needs_the_kernel = pytest.mark.skipif(
    LIBRARY is None or LIBRARY.best_isa < Isa.AVX512_BF16, reason="the kernel is compiled, and needs AVX512-BF16"
)
SHAPES = [(64, 32), (128, 96), (576, 192), (1536, 576)]


def quantized(inputs: int, outputs: int, *, bias: bool = False, double: bool = True) -> Linear4bit:
    torch.manual_seed(inputs * outputs)
    layer = Linear4bit(
        inputs, outputs, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=double
    )
    layer.weight.data = layer.weight.data.bfloat16()
    if bias:
        layer.bias.data = torch.randn(outputs).bfloat16()
    return layer.to("cpu").eval()  # quantizes


def packed(layer: Linear4bit) -> NF4Linear:
    assert LIBRARY is not None
    model = nn.Sequential(copy.deepcopy(layer))
    pack(model, LIBRARY)
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


@needs_the_kernel
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 13, 32, 129])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@torch.inference_mode()
def test_a_layer_gives_the_product_with_bitsandbytes_own_weights(rows: int, inputs: int, outputs: int) -> None:
    layer = quantized(inputs, outputs)
    weight = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    x = torch.randn(rows, inputs).bfloat16()
    found, expected = packed(layer)(x).float(), x.float() @ weight.T
    assert (found - expected).norm() < 0.005 * expected.norm()
    assert ((found - expected).abs() < 0.02 * expected.std() + 0.01 * expected.abs()).all()


@needs_the_kernel
@torch.inference_mode()
def test_the_product_is_exact_up_to_one_rounding_of_the_levels_and_one_of_the_sum() -> None:
    layer = quantized(128, 64)
    state = layer.weight.quant_state
    scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    levels = state.code.bfloat16().double()[unpacked(layer.weight.data, 64, 128).long()]
    weight = (levels.view(64, 2, 64) * scales.double().view(64, 2, 1)).view(64, 128)
    x = torch.randn(40, 128).bfloat16()
    torch.testing.assert_close(packed(layer)(x).double(), x.double() @ weight.T, rtol=2**-8, atol=1e-5)


@needs_the_kernel
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@torch.inference_mode()
def test_the_bits_of_a_row_depend_neither_on_its_company_nor_on_the_threads(inputs: int, outputs: int) -> None:
    layer = packed(quantized(inputs, outputs))
    x = torch.randn(70, inputs).bfloat16()
    together, threads = layer(x), torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        try:
            assert torch.equal(torch.cat([layer(row[None]) for row in x]), together)
            assert torch.equal(layer(x[5:42]), together[5:42])
            assert torch.equal(layer(x.flip(0)).flip(0), together)
        finally:
            torch.set_num_threads(threads)


@needs_the_kernel
@torch.inference_mode()
def test_shapes_biases_gaps_and_dtypes() -> None:
    layer = packed(quantized(128, 64, bias=True))
    x = torch.randn(6, 128).bfloat16()
    expected = layer(x)
    plain = packed(quantized(128, 64))
    assert torch.equal(expected, plain(x) + layer.bias)
    assert torch.equal(layer(x.view(1, 2, 3, 128)).view(6, 64), expected)
    wide = torch.randn(6, 256).bfloat16()
    wide[:, :128] = x
    assert torch.equal(layer(wide[:, :128]), expected), "rows with a gap between them"
    assert torch.equal(layer(x.T.contiguous().T), expected), "columns are made dense first"
    assert torch.equal(layer(x.float()), expected.float()), "other dtypes are rounded to bf16 and back"
    assert torch.equal(packed(quantized(128, 64, double=False))(x), packed(quantized(128, 64, double=False))(x))


@needs_the_kernel
def test_a_packed_model_takes_the_bytes_of_its_codes_and_scales() -> None:
    layer = packed(quantized(128, 64))
    assert (
        resident_bytes(nn.Sequential(layer))
        == 128 * 64 // 2 + 4 * 128 * 64 // 64 + layer.weight.quant_state.code.numel() * 4
    )


@needs_the_kernel
def test_layers_that_must_not_be_packed_stay_as_they_are() -> None:
    assert LIBRARY is not None
    model = nn.Sequential(quantized(64, 32), quantized(64, 48), nn.Linear(32, 32))
    keep_unpacked(model, all_layers=False)
    pack(model, LIBRARY)
    assert [type(layer) for layer in model] == [NF4Linear, Linear4bit, nn.Linear]
    trained = nn.Sequential(quantized(64, 32))
    keep_unpacked(trained, all_layers=True)
    pack(trained, LIBRARY)
    assert type(trained[0]) is Linear4bit
