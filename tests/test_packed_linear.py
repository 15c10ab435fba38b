from __future__ import annotations

import copy

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn

from loramux_server.base.packed_linear import PackedLinear4bit, pack

needs_the_kernel = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="bitsandbytes packs weights on CPUs with AVX512-BF16 alone"
)


def quantized(inputs: int, outputs: int, *, bias: bool = False) -> Linear4bit:
    torch.manual_seed(inputs * outputs)
    layer = Linear4bit(inputs, outputs, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight.data = layer.weight.data.bfloat16()
    if bias:
        layer.bias.data = torch.randn(outputs).bfloat16()
    return layer.to("cpu").eval()  # quantizes


@needs_the_kernel
@pytest.mark.parametrize("rows", [1, 2, 7, 32, 129])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (576, 192), (1536, 576)])
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_a_packed_layer_gives_the_bits_that_bitsandbytes_gives(
    rows: int, inputs: int, outputs: int, bias: bool
) -> None:
    theirs = quantized(inputs, outputs, bias=bias)
    ours = nn.Sequential(copy.deepcopy(theirs))
    pack(ours)
    assert type(ours[0]) is PackedLinear4bit
    x = torch.randn(rows, inputs).bfloat16()
    expected = theirs(x)
    assert type(theirs) is Linear4bit
    assert torch.equal(ours(x), expected)
    assert torch.equal(ours(x[None])[0], expected)
    wide = torch.randn(rows, 2 * inputs).bfloat16()
    wide[:, :inputs] = x
    assert torch.equal(ours(wide[:, :inputs]), expected), "rows with a gap between them"
    assert torch.equal(ours(x.T.contiguous().T), expected), "columns are made dense first"
    assert torch.equal(ours(x.float()), theirs(x.float())), "other dtypes go bitsandbytes' own way"


@needs_the_kernel
def test_layers_that_must_not_be_packed_stay_as_they_are() -> None:
    kept = quantized(64, 32)
    kept.support_avx512bf16_for_cpu = False
    model = nn.Sequential(kept, nn.Linear(32, 32))
    pack(model)
    assert [type(layer) for layer in model] == [Linear4bit, nn.Linear]
    assert not getattr(kept.weight.quant_state, "packing_format_for_cpu", False)
