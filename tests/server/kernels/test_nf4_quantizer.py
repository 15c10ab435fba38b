"""The compiled quantizer gives the numbers of the slow one, with any number of threads."""

from __future__ import annotations

import pytest
import torch

from loramux_adapters import nf4
from loramux_server.kernels.compiled.library import Compiled, native_library
from loramux_server.kernels.layers.nf4_linear import codes_of
from loramux_server.kernels.layers.nf4_quantizer import quantize_into

LIBRARY = native_library()


@pytest.mark.skipif(LIBRARY is None, reason="there are no compiled kernels")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", [(32, 64), (96, 192), (64, 576), (1536, 576)])
def test_codes_and_scales_are_those_of_the_reference(shape: tuple[int, int], threads: int) -> None:
    assert LIBRARY is not None
    outputs, inputs = shape
    torch.manual_seed(inputs)
    weight = (torch.randn(shape) * torch.logspace(-4, 2, outputs)[:, None]).bfloat16()
    weight[0, :64] = 0
    expected_codes, expected_scales = nf4.quantize(weight)
    codes = torch.empty(outputs // 16, inputs // 4, 32, dtype=torch.uint8)
    scales = torch.empty(inputs // 64, outputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        quantize_into(codes, scales, weight, Compiled(LIBRARY, LIBRARY.isas[-1]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(codes_of(codes), expected_codes)
    assert torch.equal(scales.t(), expected_scales)
