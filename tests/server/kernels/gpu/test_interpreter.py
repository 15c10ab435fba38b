"""What the tests' interpreter adds to Triton's: products whose bits do not depend on tiles."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from loramux_server.kernels.gpu.launch import launch_now
from support.triton_interpreter import prepare

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled on this machine")


@triton.jit
def _product(x, w, y, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr):
    k, n, m = tl.arange(0, INPUTS), tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
    a = tl.load(x + m[:, None] * INPUTS + k[None, :])
    b = tl.load(w + n[None, :] * INPUTS + k[:, None])
    tl.store(y + m[:, None] * OUTPUTS + n[None, :], tl.dot(a, b))


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = torch.empty(x.shape[0], w.shape[0])
    launch_now(_product, (1,), x, w, y, INPUTS=x.shape[1], OUTPUTS=w.shape[0], ROWS=x.shape[0])
    return y


def test_products_have_the_same_bits_in_tiles_of_any_shape() -> None:
    prepare()  # once more changes nothing
    torch.manual_seed(0)
    x, w = torch.randn(32, 256).half(), torch.randn(64, 256).half()
    whole = product(x, w)
    assert torch.equal(product(x[:1], w[:16]), whole[:1, :16])
    assert torch.equal(product(x[16:18], w[32:]), whole[16:18, 32:])
    assert torch.equal(whole, (x.double() @ w.double().t()).float())


def test_products_that_it_would_get_wrong_are_refused() -> None:
    with pytest.raises(Exception, match="no products of bf16"):
        product(torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16())
