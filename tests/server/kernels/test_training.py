"""The compiled kernels of training: against slow references in fp64, and with equal bits on all instruction sets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.training.model.packed_attention import attend_reference, attend_with
from loramux_adapters.training.model.row_layout import LayerAttention, PackedRows
from loramux_server.kernels.compiled.library import Compiled, native_library
from loramux_server.kernels.layers.nf4_linear import BLOCK, NF4Linear, codes_of
from loramux_server.kernels.layers.packed_head import PackedHead
from loramux_server.kernels.training import CompiledTraining, training_kernels

library = native_library()
if library is None:
    pytest.skip("the kernels are not compiled", allow_module_level=True)
CPU = CpuDevice()
COMPILED = [Compiled(library, isa) for isa in library.isas]
BEST = COMPILED[-1]
LEVELS = torch.tensor([-2047, -1425, -1075, -808, -582, -378, -186, 0, 163, 329, 504, 692, 902, 1152, 1480, 2047])


def on_every_isa(compute: Callable[[Compiled], torch.Tensor]) -> torch.Tensor:
    """What `compute` gives, after it gave the same bits on every instruction set and with one thread and two."""
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found += [compute(compiled) for compiled in COMPILED]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])
    return found[0]


def far(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest relative error of a row."""
    return float(((ours.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(64, 32, 1), (192, 96, 7), (128, 352, 300), (576, 192, 13)])
def test_the_product_over_outputs_is_that_of_the_very_numbers_that_are_served(
    inputs: int, outputs: int, rows: int
) -> None:
    torch.manual_seed(0)
    four = Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    layer = NF4Linear.of(four, BEST)
    levels = LEVELS[codes_of(layer.weight.detach()).int()].double() / 2047
    weight = levels * layer.scales.t().repeat_interleave(BLOCK, dim=1).double()
    dy = torch.randn(rows, outputs) * torch.logspace(-3, 3, rows)[:, None]
    dx = on_every_isa(lambda compiled: NF4Linear.of(four, compiled).product_transposed(dy))
    # an error of half of 1/16383 of a block's largest number, which is about 2.5 times the usual one, for each number
    assert far(dx, dy.double() @ weight) < 3e-4
    alone = layer.product_transposed(dy[-1:])
    assert torch.equal(alone[0], dx[-1])


@pytest.mark.parametrize(
    ("inputs", "outputs", "rows"), [(64, 32, 32), (192, 96, 50), (128, 352, 131), (64, 32, 512), (192, 352, 531)]
)
def test_many_rows_at_once_are_multiplied_as_each_is_alone(inputs: int, outputs: int, rows: int) -> None:
    torch.manual_seed(8)
    four = Linear4bit(inputs, outputs, bias=False, quant_type="nf4").to("cpu")
    x = torch.randn(rows, inputs) * torch.logspace(-3, 3, rows)[:, None]
    x[3, 5], x[4], x[5, 63] = float("nan"), 0.0, float("inf")
    together = on_every_isa(lambda compiled: NF4Linear.of(four, compiled).product(x).nan_to_num(nan=-1e30))
    layer = NF4Linear.of(four, BEST)
    alone = torch.cat([layer.product(row[None]) for row in x])
    assert alone[3].isnan().all() and torch.equal(together, alone.nan_to_num(nan=-1e30))


def test_rows_without_a_gradient_are_passed_over() -> None:
    """A token that is not learned has none above the last attention."""
    torch.manual_seed(9)
    layer = NF4Linear.of(Linear4bit(128, 96, bias=False, quant_type="nf4").to("cpu"), BEST)
    dy = torch.randn(70, 96)
    dy[torch.rand(70) < 0.6] = 0.0
    learned = dy.any(1)
    expected = torch.zeros(70, 128)
    expected[learned] = layer.product_transposed(dy[learned])
    found = on_every_isa(lambda compiled: NF4Linear(layer.weight, layer.scales, None, compiled).product_transposed(dy))
    assert 0 < learned.sum() < 70 and torch.equal(found, expected)


def test_a_sick_row_of_gradients_harms_no_other() -> None:
    torch.manual_seed(1)
    layer = NF4Linear.of(Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu"), BEST)
    dy = torch.randn(5, 64)
    whole = layer.product_transposed(dy)
    dy[1, 3], dy[3, 60], dy[4] = float("nan"), float("inf"), 0.0
    found = layer.product_transposed(dy)
    assert not found[[1, 3]].isfinite().any() and torch.equal(found[4], torch.zeros(64))
    assert torch.equal(found[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("vocabulary", [320, 259])
def test_the_head_goes_back_by_its_own_numbers(vocabulary: int) -> None:
    torch.manual_seed(2)
    dense = nn.Linear(128, vocabulary, bias=False).bfloat16().requires_grad_(False)
    head = PackedHead.of(dense, BEST)
    dy = torch.zeros(9, head.padded)
    dy[:, :vocabulary] = torch.randn(9, vocabulary)
    dx = on_every_isa(lambda compiled: PackedHead.of(dense, compiled).product_transposed(dy))
    # the weight is rounded to 1/2047 of a block's largest number, the gradient to 1/16383
    assert far(dx, dy[:, :vocabulary].double() @ dense.weight.double()) < 1e-3
    assert torch.equal(head.product(torch.randn(2, 128))[:, vocabulary:], torch.zeros(2, head.padded - vocabulary))


@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 1, 1), (3, 5, 7), (40, 8, 64), (8, 64, 40), (70, 97, 33)])
def test_products_of_any_shape_and_stride(rows: int, columns: int, depth: int) -> None:
    torch.manual_seed(3)
    lefts = torch.randn(rows, depth), torch.randn(depth, rows).t()
    rights = torch.randn(depth, columns), torch.randn(columns, depth).t()
    base = torch.randn(rows, columns)
    for a in lefts:
        for b in rights:
            exact = a.double() @ b.double()
            bound = 1e-6 * (a.abs().double() @ b.abs().double() + 1)
            plain = on_every_isa(lambda compiled, a=a, b=b: CompiledTraining(compiled).matmul(a, b))  # type: ignore[misc]
            assert ((plain - exact).abs() <= bound).all()
            added = on_every_isa(
                lambda compiled, a=a, b=b: CompiledTraining(compiled).matmul(a, b, base.clone())  # type: ignore[misc]
            )
            assert ((added - (exact + base)).abs() <= bound + 1e-6 * base.abs()).all()


def test_a_norm_goes_back() -> None:
    torch.manual_seed(4)
    x, weight, dy = torch.randn(5, 48) * 3, torch.randn(48), torch.randn(5, 48)
    exact = x.double().requires_grad_()
    (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5) * weight).backward(dy.double())
    dx = on_every_isa(lambda compiled: CompiledTraining(compiled).norm_gradient(dy, x, weight, 1e-5))
    assert exact.grad is not None and far(dx, exact.grad) < 1e-6


@pytest.mark.parametrize("gelu", [False, True])
def test_an_activation_goes_forth_and_back(gelu: bool) -> None:
    x, dy = torch.linspace(-9, 9, 403), torch.linspace(1, 2, 403)
    exact = x.double().requires_grad_()
    y = nn.functional.gelu(exact, approximate="tanh") if gelu else nn.functional.silu(exact)
    y.backward(dy.double())
    ours = on_every_isa(lambda compiled: CompiledTraining(compiled).activation(x, gelu=gelu))
    slopes = on_every_isa(lambda compiled: CompiledTraining(compiled).activation_gradient(dy, x, gelu=gelu))
    assert (ours - y.detach()).abs().max() < 2e-6
    assert exact.grad is not None and (slopes - exact.grad).abs().max() < 3e-6


@pytest.mark.parametrize("gelu", [False, True])
def test_a_gate_goes_forth_and_back(gelu: bool) -> None:
    torch.manual_seed(10)
    gate, up, dy = (torch.randn(9, 48) * 3 for _ in range(3))
    exact = [x.double().requires_grad_() for x in (gate, up)]
    y = (nn.functional.gelu(exact[0], approximate="tanh") if gelu else nn.functional.silu(exact[0])) * exact[1]
    y.backward(dy.double())
    ours = on_every_isa(lambda compiled: CompiledTraining(compiled).gated(gate, up, gelu=gelu))
    slopes = on_every_isa(
        lambda compiled: torch.cat(CompiledTraining(compiled).gated_gradient(dy, gate, up, gelu=gelu))
    ).chunk(2)
    assert far(ours, y.detach()) < 1e-6
    for found, x in zip(slopes, exact, strict=True):
        assert x.grad is not None and far(found, x.grad) < 2e-6


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("vocabulary", [320, 259])
def test_losses_with_their_gradients_in_one_pass(vocabulary: int, softcap: float) -> None:
    torch.manual_seed(5)
    logits, labels = torch.randn(6, 320) * 4, torch.randint(0, vocabulary, (6,))
    labels[0] = int(logits[0, :vocabulary].argmax())
    logits[:, vocabulary:] = 0
    exact = logits[:, :vocabulary].double().requires_grad_()
    z = exact * 0.5
    z = softcap * torch.tanh(z / softcap) if softcap else z
    theirs = nn.functional.cross_entropy(z, labels, reduction="none")
    theirs.sum().backward()

    def losses(compiled: Compiled, gradient: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        given = logits.clone()
        ops = CompiledTraining(compiled)
        found = ops.token_losses(given, labels, vocabulary, factor=0.5, softcap=softcap, gradient=gradient)
        return given, *found

    ours = on_every_isa(lambda compiled: losses(compiled, False)[1])
    slopes = on_every_isa(lambda compiled: losses(compiled, True)[0])
    assert (ours - theirs.detach()).abs().max() < 2e-6
    assert exact.grad is not None and (slopes[:, :vocabulary] - exact.grad).abs().max() < 1e-6
    assert not slopes[:, vocabulary:].any()
    assert torch.equal(losses(BEST, True)[2], z.argmax(-1) == labels)
    logits[2, 7] = float("nan")
    sick = losses(BEST, True)
    assert sick[1][2].isnan() and sick[0][2, :vocabulary].isnan().any()
    assert torch.equal(sick[1][[0, 1, 3, 4, 5]], ours[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("window", [0, 4, 50])
@pytest.mark.parametrize(
    ("shared", "lengths"), [(0, (7,)), (5, (7, 9, 3, 9)), (11, (1, 1)), (3, (40, 2, 1, 39)), (20, (110, 60))]
)
def test_attention_of_packed_rows_gives_the_reference_and_its_gradients(
    shared: int, lengths: tuple[int, ...], window: int, softcap: float
) -> None:
    torch.manual_seed(6)
    tokens, rows, params = shared + sum(lengths), PackedRows(shared, lengths), LayerAttention(0.3, softcap, window)
    qkv = [torch.randn(tokens, heads, 16).requires_grad_() for heads in (6, 2, 2)]
    direction = torch.randn(tokens, 6, 16)

    def all_of(compiled: Compiled) -> torch.Tensor:
        out = attend_with(CompiledTraining(compiled), *qkv, rows, params)
        return torch.cat([x.flatten() for x in (out.detach(), *torch.autograd.grad(out, qkv, direction))])

    slow = attend_reference(*qkv, rows, params)
    theirs = [slow.detach(), *torch.autograd.grad(slow, qkv, direction)]
    ours = on_every_isa(all_of).split([x.numel() for x in theirs])
    for left, right in zip(ours, theirs, strict=True):
        assert (left - right.flatten()).norm() < 2e-6 * right.norm()


def test_no_gradient_reaches_another_row_or_a_later_token() -> None:
    torch.manual_seed(7)
    qkv = [torch.randn(12, heads, 16).requires_grad_() for heads in (4, 2, 2)]
    out = attend_with(CompiledTraining(BEST), *qkv, PackedRows(0, (5, 7)), LayerAttention(0.3))
    for gradient in torch.autograd.grad(out[2].sum(), qkv):
        assert gradient[:3].abs().sum() > 0
        assert gradient[3:].abs().sum() == 0


def test_a_base_without_compiled_layers_has_no_compiled_training() -> None:
    assert training_kernels(nn.Sequential(nn.Linear(64, 64)), CPU) is None
    layer = NF4Linear.of(Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu"), BEST)
    assert isinstance(training_kernels(nn.Sequential(layer), CPU), CompiledTraining)
