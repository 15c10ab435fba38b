"""What stands between products: as in PyTorch, and the same bits whatever rows stand beside a row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_server.kernels.gpu import rows as ops
from loramux_server.kernels.gpu.launch import launch_now
from loramux_server.kernels.layers.recognition import RMSNorm

WIDTHS = (64, 96, 576, 1024, 3072, 8192)
NORMS: dict[str, dict[str, Any]] = {  # of which families
    "llama, qwen": {"norm": 1},
    "gemma": {"norm": 1, "after": 2},
    "olmo 2": {"after": 2},
    "granite": {"norm": 1, "factor": 0.22},
    "neither": {},
}
SICK = (math.nan, -math.inf, math.inf)
NUMPY_TELLS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of infinities, in the interpreter


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norms_of(kind: str, width: int, device: torch.device) -> dict[str, Any]:
    def made(value: Any) -> Any:
        return RMSNorm((1.0 + random(width, seed=value) / 5).to(device), 1e-5) if isinstance(value, int) else value

    return {name: made(value) for name, value in NORMS[kind].items()}


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """But for the last bit of its dtype, and for sums in another order."""
    loose = 4e-6 if found.dtype == torch.float32 else 2 * torch.finfo(found.dtype).eps
    return torch.allclose(found.float(), expected.float(), rtol=loose, atol=loose, equal_nan=True)


@pytest.mark.parametrize("rows", [1, 5, 130, 300])
def test_tokens_that_are_not_known_yet_are_those_that_were_chosen(device: torch.device, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    answers = torch.randint(1000, (7, 46), dtype=torch.int32, generator=generator).to(device)
    tokens = torch.randint(-7, 400, (rows,), dtype=torch.int32, generator=generator).to(device)
    tokens[-1] = -7
    found, expected = (torch.full((rows + 1,), 9, dtype=torch.int32, device=device) for _ in range(2))
    ops.resolve_tokens(launch_now, found[:rows], tokens, answers[:, 2])
    ops.resolve_tokens_reference(expected[:rows], tokens, answers[:, 2])
    assert torch.equal(found, expected)
    assert int(found[rows - 1]) == int(answers[6, 2])
    assert torch.equal(found[:rows][tokens >= 0], tokens[tokens >= 0])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_an_embedding_is_its_row_times_the_factor(
    device: torch.device, act: torch.dtype, width: int, index: torch.dtype
) -> None:
    embedding = random(50, width).to(device, act)
    tokens = torch.tensor([49, 0, 7, 7], dtype=index, device=device)
    for factor in (1, math.sqrt(width)):
        x, expected = (torch.full((4, width), 9.0, device=device) for _ in range(2))
        ops.embed(launch_now, x, tokens, embedding, factor)
        ops.embed_reference(expected, tokens, embedding, factor)
        assert torch.equal(x, expected)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", NORMS)
def test_a_residual_sum_and_its_norm_are_those_of_pytorch(
    device: torch.device, act: torch.dtype, width: int, kind: str
) -> None:
    norms = norms_of(kind, width, device)
    for added in (torch.float32, act, None):
        x = random(3, width).to(device)
        part = None if added is None else random(3, width, seed=5).to(device, added)
        n, expected, expected_x = torch.empty(3, width, dtype=act, device=device), torch.empty_like(x), x.clone()
        ops.add_norm(launch_now, n, x, part, **norms)
        ops.add_norm_reference(expected, expected_x, part, **norms)
        assert near(x, expected_x)
        assert near(n, expected.to(act))
        whole = torch.empty_like(expected)
        ops.add_norm(launch_now, whole, x, None, norm=norms.get("norm"))
        assert torch.equal(whole.to(act), n), "the sum and the norm, one after the other"


@NUMPY_TELLS
@pytest.mark.parametrize("kind", NORMS)
def test_a_row_has_the_same_bits_alone_and_beside_rows_that_are_not_finite(
    device: torch.device, act: torch.dtype, kind: str
) -> None:
    width, norms = 160, norms_of(kind, 160, device)
    x, part = random(7, width).to(device), random(7, width, seed=5).to(device, act)
    for row, value in zip((1, 3, 5), SICK, strict=True):
        x[row, row] = value
    part[6, 2] = math.nan
    together, total = torch.empty(7, width, dtype=act, device=device), x.clone()
    ops.add_norm(launch_now, together, total, part, **norms)
    for row in (0, 2, 4):
        n, alone = torch.empty(1, width, dtype=act, device=device), x[row : row + 1].clone()
        ops.add_norm(launch_now, n, alone, part[row : row + 1], **norms)
        assert torch.equal(n[0], together[row]) and torch.equal(alone[0], total[row])
        assert n.isfinite().all()
    for row in (1, 3, 5, 6):
        assert not together[row].isfinite().all()


def test_a_norm_of_nothing_but_zeros_is_zero(device: torch.device, act: torch.dtype) -> None:
    x, n = torch.zeros(1, 64, device=device), torch.full((1, 64), 3.0, dtype=act, device=device)
    ops.add_norm(launch_now, n, x, x.clone(), **norms_of("gemma", 64, device))
    assert not n.any() and not x.any()


def test_rows_that_no_block_of_threads_holds_are_refused(device: torch.device) -> None:
    x = torch.zeros(1, 16400, device=device)
    with pytest.raises(ops.RowTooWide, match=r"rows of 16400 numbers; norms are of at most 16384"):
        ops.add_norm(launch_now, x.clone(), x)


@pytest.mark.parametrize("width", [64, 1000, 2304])
def test_sampled_rows_are_gathered_as_they_are(device: torch.device, act: torch.dtype, width: int) -> None:
    for dtype in (torch.float32, act):
        x = random(9, width).to(device, dtype)
        x[4, 0], x[4, 1] = math.nan, math.inf
        rows = torch.tensor([8, 4, 4, 0], dtype=torch.int32, device=device)
        to, expected = (torch.zeros(4, width, dtype=dtype, device=device) for _ in range(2))
        ops.gather_rows(launch_now, to, x, rows)
        ops.gather_rows_reference(expected, x, rows)
        assert torch.equal(to.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("inner", [96, 1000, 1536])
@pytest.mark.parametrize("gelu", [False, True])
def test_a_gate_is_that_of_pytorch_and_each_row_alone(
    device: torch.device, act: torch.dtype, inner: int, gelu: bool
) -> None:
    for dtype in (torch.float32, act):
        gate_up = (random(5, 2 * inner) * 4).to(device, dtype)
        out, expected, exact = (
            torch.empty(5, inner, dtype=to, device=device) for to in (act, torch.float32, torch.float32)
        )
        ops.gate(launch_now, out, gate_up, gelu=gelu)
        ops.gate(launch_now, exact, gate_up, gelu=gelu)
        ops.gate_reference(expected, gate_up, gelu=gelu)
        assert near(exact, expected)
        assert near(out, expected.to(act))
        alone = torch.empty(1, inner, dtype=act, device=device)
        ops.gate(launch_now, alone, gate_up[3:4], gelu=gelu)
        assert torch.equal(alone[0], out[3])


@pytest.mark.parametrize("gelu", [False, True])
def test_a_gate_far_out_is_finite_and_one_that_is_not_a_number_stays_so(device: torch.device, gelu: bool) -> None:
    gate_up = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, 1e12, math.nan, 2.0] + [1.0] * 7 + [math.nan]])
    out = torch.empty(1, 8, device=device)
    ops.gate(launch_now, out, gate_up.to(device), gelu=gelu)
    expected = torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4, 1e12], device=device)
    assert torch.allclose(out[0, :6], expected, rtol=1e-6, atol=1e-30)
    assert out[0, 6:].isnan().all()


def test_a_bias_is_added_to_each_row(device: torch.device, act: torch.dtype) -> None:
    for of_y, of_bias in ((torch.float32, act), (act, torch.float32), (torch.float32, torch.float32)):
        y, bias = random(3, 1100).to(device, of_y), random(1100, seed=1).to(device, of_bias)
        expected = y.clone()
        ops.add_bias(launch_now, y, bias)
        ops.add_bias_reference(expected, bias)
        assert torch.equal(y, expected)


@pytest.mark.parametrize(("divisor", "softcap"), [(16.0, 0.0), (13.0, 0.0), (1.0, 30.0), (8.0, 25.0), (1.0, 0.0)])
def test_logits_are_divided_and_capped_in_rows_of_any_stride(
    device: torch.device, divisor: float, softcap: float
) -> None:
    padded = random(4, 1536).to(device) * 40
    padded[2, 5] = math.nan
    expected, logits = padded.clone(), padded[:, :1500]
    ops.finish_logits(launch_now, logits, divisor=divisor, softcap=softcap)
    ops.finish_logits_reference(expected[:, :1500], divisor=divisor, softcap=softcap)
    assert near(padded, expected)
    assert softcap or torch.equal(padded.nan_to_num(7.0), expected.nan_to_num(7.0))


@settings(deadline=None, max_examples=15)
@given(width=st.integers(1, 300), count=st.integers(1, 4), data=st.data())
def test_any_width_and_any_rows(device: torch.device, act: torch.dtype, width: int, count: int, data: Any) -> None:
    norms = norms_of(data.draw(st.sampled_from(sorted(NORMS))), width, device)
    x, part = random(count, width).to(device) * 100, random(count, width, seed=3).to(device)
    expected_x, n, expected = x.clone(), torch.empty(count, width, dtype=act, device=device), torch.empty_like(x)
    row = data.draw(st.integers(0, count - 1))
    alone, n_alone = x[row : row + 1].clone(), torch.empty(1, width, dtype=act, device=device)
    ops.add_norm(launch_now, n, x, part, **norms)
    ops.add_norm_reference(expected, expected_x, part, **norms)
    ops.add_norm(launch_now, n_alone, alone, part[row : row + 1], **norms)
    assert near(x, expected_x) and near(n, expected.to(act))
    assert torch.equal(n_alone[0], n[row]) and torch.equal(alone[0], x[row])


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (9, 1100)])
def test_embeddings_of_adapters_take_the_place_of_the_bases(device: torch.device, rows: int, width: int) -> None:
    embedding = random(20, width, seed=1).to(torch.bfloat16).to(device)
    tokens = torch.arange(rows, dtype=torch.int32).to(device)
    at = torch.tensor([*range(0, rows, 2)], dtype=torch.int32).to(device)
    known = (torch.arange(len(at)) % 2 == 0).int().to(device)
    more = random(len(at), width, seed=2).to(device)
    found, expected = (torch.full((rows, width), 7.0, device=device) for _ in range(2))
    ops.own_embeddings(launch_now, found, at, known, more, tokens, embedding, 3.0)
    ops.own_embeddings_reference(expected, at, known, more, tokens, embedding, 3.0)
    assert near(found, expected)
    assert torch.equal(found[1::2], torch.full_like(found[1::2], 7.0))


@pytest.mark.parametrize(("rows", "vocabulary", "more", "every"), [(1, 40, 0, 3), (5, 1500, 4, 1), (3, 300, 2, 7)])
def test_logits_of_adapters_are_added_to_their_rows_alone(
    device: torch.device, rows: int, vocabulary: int, more: int, every: int
) -> None:
    tokens = torch.arange(0, vocabulary + more, every, dtype=torch.int32).to(device)
    logits = random(rows, vocabulary, seed=1).to(device)
    wide = torch.full((rows, max(more, 1)), -math.inf).to(device)
    wide[0, 0] = 2.0
    at = torch.arange(rows, dtype=torch.int32).flip(0)[: max(1, rows - 1)].to(device)
    products, factors = random(len(at), len(tokens), seed=2).to(device), random(len(at), seed=3).to(device)
    found, expected = (logits.clone(), wide.clone()), (logits.clone(), wide.clone())
    ops.own_logits(launch_now, *found, products, tokens, at, factors)
    ops.own_logits_reference(*expected, products, tokens, at, factors)
    assert all(near(*pair) for pair in zip(found, expected, strict=True))
    for row in set(range(rows)) - set(at.tolist()):
        assert torch.equal(found[0][row], logits[row]) and torch.equal(found[1][row], wide[row])
    alone = logits.clone(), wide.clone()
    ops.own_logits(launch_now, *alone, products[:1], tokens, at[:1], factors[:1])
    assert torch.equal(alone[0][at[0]], found[0][at[0]])
