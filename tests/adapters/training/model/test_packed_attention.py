"""Attention over packed rows: the fast path against the reference, and no row sees another."""

from __future__ import annotations

import pytest
import torch

from loramux_adapters.errors import RecipeError
from loramux_adapters.training.model.packed_attention import attend_reference, attention_forward
from loramux_adapters.training.model.padded_attention import attend_padded
from loramux_adapters.training.model.row_layout import LayerAttention, PackedRows

HEADS, KV_HEADS, DIM = 6, 2, 16
SCALING = 0.3


def tokens(count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q [count, HEADS, DIM], k and v [count, KV_HEADS, DIM]."""
    torch.manual_seed(count)
    return [torch.randn(count, heads, DIM).to(dtype).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize(
    ("shared", "lengths"),
    [(0, (7,)), (0, (7, 9, 3, 9)), (5, (7, 9, 3, 9)), (11, (1, 1)), (3, (40, 2, 1, 39, 38)), (20, (290, 300))],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_fast_path_gives_the_reference_and_its_gradients(
    shared: int, lengths: tuple[int, ...], window: int, dtype: torch.dtype, tolerance: float
) -> None:
    qkv = tokens(shared + sum(lengths), dtype)
    direction = torch.randn(qkv[0].shape).to(dtype)
    found = []
    for attend in (attend_padded, attend_reference):
        out = attend(*qkv, PackedRows(shared, lengths), LayerAttention(SCALING, window=window))
        found.append([out.detach(), *torch.autograd.grad(out, qkv, direction)])
    for fast, slow in zip(*found, strict=True):
        assert fast.dtype == dtype
        assert (fast - slow).float().norm() < tolerance * slow.float().norm()


@pytest.mark.parametrize("attend", [attend_padded, attend_reference])
def test_a_row_gets_what_it_gets_alone(attend: object) -> None:
    assert callable(attend)
    lengths = (6, 11, 4)
    q, k, v = tokens(sum(lengths))
    together = attend(q, k, v, PackedRows(0, lengths), LayerAttention(SCALING))
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        alone = attend(q[own], k[own], v[own], PackedRows(0, (length,)), LayerAttention(SCALING))
        assert torch.allclose(together[own], alone, atol=1e-6)
        start += length


def test_a_shared_beginning_gives_what_it_gives_in_each_row() -> None:
    shared, lengths = 4, (3, 5)
    q, k, v = tokens(shared + sum(lengths))
    together = attend_padded(q, k, v, PackedRows(shared, lengths), LayerAttention(SCALING))
    for start, length in ((4, 3), (7, 5)):
        row = [*range(shared), *range(start, start + length)]
        alone = attend_reference(q[row], k[row], v[row], PackedRows(0, (len(row),)), LayerAttention(SCALING))
        assert torch.allclose(together[row], alone, atol=1e-6)


def test_no_gradient_reaches_another_row_or_a_later_token() -> None:
    q, k, v = tokens(12)
    out = attend_padded(q, k, v, PackedRows(0, (5, 7)), LayerAttention(SCALING))
    for gradient in torch.autograd.grad(out[2].sum(), (q, k, v)):
        assert gradient[:3].abs().sum() > 0
        assert gradient[3:].abs().sum() == 0


def test_long_rows_whose_weights_are_computed_again_give_the_gradients_of_kept_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for kept in (0, 1000):
        monkeypatch.setattr("loramux_adapters.training.model.padded_attention._KEEP", kept)
        q, k, v = tokens(20)
        out = attend_padded(q, k, v, PackedRows(2, (10, 8)), LayerAttention(SCALING))
        found.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for again, held in zip(*found, strict=True):
        assert torch.equal(again, held)


def test_rows_of_very_different_length_are_not_padded_to_the_longest() -> None:
    groups = PackedRows(3, (100, 90, 4, 3, 99)).groups()
    assert [(group.first, *group.tokens.shape) for group in groups] == [(0, 1, 3), (3, 3, 100), (3, 2, 4)]
    assert sum(int(group.real.sum()) for group in groups) == 3 + 100 + 90 + 4 + 3 + 99


def forward(**options: object) -> torch.Tensor:
    q, k, v = (x.detach().transpose(0, 1)[None] for x in tokens(6))
    given: dict[str, object] = {"scaling": SCALING, "loramux_rows": PackedRows(0, (2, 4))} | options
    mask = given.pop("mask", None)
    return attention_forward(torch.nn.Module(), q, k, v, mask, **given)[0]  # type: ignore[arg-type]


def test_through_transformers_interface_soft_cap_and_window_reach_the_attention() -> None:
    plain = forward()
    assert plain.shape == (1, 6, HEADS, DIM)
    q, k, v = tokens(6)
    for options in ({"softcap": 0.5}, {"sliding_window": 2}):
        params = LayerAttention(SCALING, float(options.get("softcap", 0)), int(options.get("sliding_window", 0)))
        out = forward(**options)
        assert torch.allclose(out[0], attend_reference(q, k, v, PackedRows(0, (2, 4)), params), atol=1e-6)
        assert not torch.allclose(out, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"s_aux": torch.zeros(1)}, "needs s_aux"),
        ({"mask": torch.zeros(1)}, "needs a mask"),
        ({"loramux_rows": None}, "needs its own keyword arguments"),
    ],
)
def test_a_kind_of_attention_that_is_not_computed_is_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        forward(**options)
