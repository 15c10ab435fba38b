"""From logits to tokens on the device: bit for bit what the reference gives, which is near double precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_server.engine.sampler import uniform
from loramux_server.kernels.compiled.sampling import Draw, Sampling, TensorSampling, candidates
from loramux_server.kernels.decoder.asks import Ask, AskedSampling
from loramux_server.kernels.gpu import sampling as ours
from loramux_server.kernels.gpu.launch import launch_now
from loramux_server.kernels.gpu.sampling import SamplingError, SamplingSizes, SamplingTables

SLOW = TensorSampling()
NUMPY_TELLS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of infinities, in the interpreter
FILTERS = {
    "none": Draw(0, 0.0),
    "cold": Draw(0, 0.0, temperature=0.2),
    "least": Draw(0, 0.0, temperature=5e-324),
    "huge": Draw(0, 0.0, temperature=1e30),
    "top-k": Draw(0, 0.0, top_k=7),
    "top-k 1": Draw(0, 0.0, top_k=1),
    "top-k all": Draw(0, 0.0, top_k=1 << 40),
    "top-k many": Draw(0, 0.0, top_k=120, temperature=3.0),
    "top-p": Draw(0, 0.0, top_p=0.9),
    "top-p 0": Draw(0, 0.0, top_p=0.0),
    "top-p nearly all": Draw(0, 0.0, top_p=0.9999999),
    "top-p hot": Draw(0, 0.0, temperature=9.0, top_p=0.95),
    "min-p": Draw(0, 0.0, min_p=0.05),
    "min-p 1": Draw(0, 0.0, min_p=1.0),
    "all": Draw(0, 0.0, temperature=0.7, top_k=40, top_p=0.8, min_p=0.02),
    "top-p and min-p": Draw(0, 0.0, top_p=0.97, min_p=0.01),
    "all three, hot": Draw(0, 0.0, temperature=9.0, top_k=110, top_p=0.97, min_p=0.3),
}


def logits_of(width: int, rows: int, device: torch.device, scale: float = 4.0) -> torch.Tensor:
    """Padded rows; what pads them would win."""
    padded = torch.full((rows, width + 19), 1e6)
    padded[:, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * scale
    return padded.to(device)[:, :width]


def tables_for(asks: list[Ask], width: int, device: torch.device) -> SamplingTables:
    tables = SamplingTables.on(SamplingSizes(len(asks), width), device)
    put(tables, asks)
    return tables


def sampling(asks: int = 256) -> AskedSampling:
    """By the kernels, so many asks at a time."""

    def answer(logits: torch.Tensor, some: Sequence[Ask]) -> np.ndarray:
        tables = tables_for(list(some), logits.shape[1], logits.device)
        ours.sample(launch_now, tables, logits, len(some))
        return ours.answers_of(tables.answers.cpu().numpy().copy())

    return AskedSampling(answer, SLOW.changed, asks)


def put(tables: SamplingTables, asks: list[Ask]) -> None:
    staging = np.empty(tuple(tables.asks.shape), dtype=np.int64)
    ours.fill(staging, asks, tables.sizes.vocabulary)
    tables.asks.copy_(torch.from_numpy(staging))


def both(logits: torch.Tensor, asks: list[Ask]) -> tuple[np.ndarray, np.ndarray]:
    """The kernels' answers, and the reference's."""
    tables = tables_for(asks, logits.shape[1], logits.device)
    tables.answers.zero_()
    ours.sample(launch_now, tables, logits, len(asks))
    found = ours.answers_of(tables.answers.cpu().numpy().copy())
    ours.sample_reference(tables, logits, len(asks))
    return found, ours.answers_of(tables.answers.cpu().numpy())


@NUMPY_TELLS
@pytest.mark.parametrize("width", [1, 2, 64, 257, 600])
def test_the_first_largest_is_found_and_what_is_not_finite(device: torch.device, width: int) -> None:
    logits = logits_of(width, 14, device)
    logits[1] = 0.0
    logits[2] = -0.0
    logits[3, width // 2 :] = 0.0
    logits[3, : width // 2] = -0.0
    logits[4] = -math.inf
    logits[5, width - 1] = math.inf
    logits[6, 0] = -math.inf
    logits[7] = -3e38
    logits[8] = 3e38
    logits[9, width - 1] = 50.0
    logits[10, ::7] = 60.0  # ties
    logits[11] = torch.finfo(torch.float32).tiny / 4  # denormal
    path: Sampling = sampling()
    expected = SLOW.search(logits)
    assert expected[0][1] == expected[0][2] == expected[0][3] == expected[0][10] == expected[0][11] == 0
    assert [row for row in range(14) if not expected[1][row]] == ([4, 5, 6] if width == 1 else [4, 5])
    assert path.search(logits) == expected
    assert path.search(logits[::3]) == SLOW.search(logits[::3])


@NUMPY_TELLS
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_a_row_that_is_not_finite_says_so_and_harms_no_other(device: torch.device, bad: float) -> None:
    logits = logits_of(260, 3, device)
    asks = [Ask(0, FILTERS["all"], top=3), Ask(1, FILTERS["none"], top=0), Ask(2, FILTERS["none"], top=0)]
    whole, _ = both(logits, asks)
    logits[0, 257], logits[1, 0] = bad, bad
    found, expected = both(logits, asks)
    assert found["finite"].tolist() == expected["finite"].tolist() == [0, 0, 1]
    assert found[2:].tobytes() == whole[2:].tobytes()


@pytest.mark.parametrize("width", [1, 17, 257, 600])
def test_log_sums_are_near_double_precision(device: torch.device, width: int) -> None:
    logits = logits_of(width, 6, device)
    logits[1] *= 0.001  # flat
    logits[2] *= 1000  # steep
    logits[3] = 7.5
    logits[4, width // 2 + 1 :] = -math.inf
    logits[5, :] = -3e4
    rows = [3, 0, 1, 2, 4, 5, 0]
    exact = torch.logsumexp(logits[rows].double(), -1).tolist()
    assert sampling(asks=4).log_sums(logits, rows) == pytest.approx(exact, rel=1e-7, abs=5e-7)


def test_a_certain_token_has_the_log_probability_zero(device: torch.device) -> None:
    logits = torch.full((1, 300), -500.0, device=device)
    logits[0, 77] = 3.25
    found, _ = both(logits, [Ask(0, top=1)])
    assert found["log_sum"].tolist() == [3.25]
    assert found["logprob"].tolist() == found["logprobs"][:, 0].tolist() == [0.0]


@pytest.mark.parametrize(("width", "wanted"), [(1, 20), (19, 7), (257, 20), (257, 30)])
def test_the_likeliest_stand_in_order_and_of_equal_ones_the_lower(
    device: torch.device, width: int, wanted: int
) -> None:
    logits = logits_of(width, 6, device)
    logits[1] = logits[1].round()  # many ties
    logits[2] = 1.0
    logits[3, ::2], logits[3, 1::2] = 0.0, -0.0
    logits[4, width // 2 + 1 :] = -math.inf
    rows = [5, 4, 3, 2, 1]
    expected = [sorted(range(width), key=lambda token: (-row[token], token))[:wanted] for row in logits[rows].tolist()]
    path = sampling()
    assert path.first_tokens(logits, rows, wanted) == SLOW.first_tokens(logits, rows, wanted) == expected


@NUMPY_TELLS
@pytest.mark.parametrize("name", FILTERS)
def test_a_draw_is_that_of_the_reference(device: torch.device, name: str) -> None:
    for width, numbers in ((250, (uniform(0, len(name)), 1 - 2.0**-53, 0.0)), (270, (uniform(1, len(name)),))):
        logits = logits_of(width, 3, device, scale=2.0)
        logits[1] = logits[1].round()
        logits[2, : width - 1] -= 40
        draws = [FILTERS[name]._replace(uniform=number) for number in numbers]
        found, expected = both(logits, [Ask(row, draw, top=2) for row, draw in enumerate(draws)])
        assert found["chosen"].tolist() == expected["chosen"].tolist()
        assert found["likeliest"].tolist() == expected["likeliest"].tolist()
        assert np.allclose(found["logprob"], expected["logprob"], rtol=1e-6, atol=1e-6)
        assert np.allclose(found["log_sum"], expected["log_sum"], rtol=0, atol=1e-7)


@NUMPY_TELLS
@pytest.mark.parametrize("name", FILTERS)
def test_the_reference_draws_as_double_precision_does(name: str) -> None:
    """Two millionths of probability are let go, where one token ends and the next begins."""
    for width in (1, 5, 257, 5003):
        logits = logits_of(width, 3, torch.device("cpu"), scale=2.0)
        logits[1] = logits[1].round()
        logits[2, : width - 1] -= 40
        draws = [
            FILTERS[name]._replace(row=row, uniform=number)
            for row in range(3)
            for number in (0.0, 1e-9, *(uniform(row, index) for index in range(30)), 1 - 2.0**-53)
        ]
        tables = tables_for([Ask(draw.row, draw) for draw in draws], width, torch.device("cpu"))
        ours.sample_reference(tables, logits, len(draws))
        chosen = ours.answers_of(tables.answers.numpy())["chosen"].tolist()
        for row in range(3):
            moved = [shares_of(logits[row], FILTERS[name], by) for by in (0.0, -1e-6, 1e-6)]
            for token, draw in zip(chosen, draws, strict=True):
                if draw.row == row:
                    ends = [its.get(token, (1.0, 0.0)) for its in moved]
                    assert any(low - 2e-6 <= draw.uniform <= high + 2e-6 for low, high in ends), (width, token, draw)


def shares_of(logits: torch.Tensor, draw: Draw, moved: float) -> dict[int, tuple[float, float]]:
    """The numbers that draw each candidate, in double; top-p and min-p `moved` by so much, of theirs."""
    draw = draw._replace(min_p=draw.min_p * (1 + moved))
    if draw.top_p < 1.0:
        draw = draw._replace(top_p=draw.top_p + moved)
    values, tokens = candidates(logits.double(), draw)
    mass = values.softmax(-1).cumsum(-1)
    ends = (mass / mass[-1]).tolist() if len(mass) else []
    names = range(len(ends)) if tokens is None else tokens.tolist()
    return {token: (low, high) for token, low, high in zip(names, [0.0, *ends][:-1], ends, strict=True)}


def test_weights_are_the_exponentials(device: torch.device) -> None:
    distance = -torch.arange(0, 32, 0.01)
    exact = distance.double().exp() * (distance > ours.kernels.FARTHEST)
    found = ours.weights_of(distance).double() * 2.0**-ours.kernels.UNIT_BITS
    assert ((found - exact).abs() <= exact * 2e-7 + 2.0**-44).all()
    assert int(ours.weights_of(torch.zeros(1))) == 2**44


def test_many_candidates_are_searched_in_the_whole_row(device: torch.device) -> None:
    """More of them than are kept of tiles, and more in one interval than are listed."""
    width = 4500
    flat = torch.randn(width, generator=torch.Generator().manual_seed(3)) / 10
    logits = torch.stack([torch.full((width,), 3.0), torch.where(torch.arange(width) % 3 == 0, 1.5, 1.0), flat])
    draws = [
        Draw(0, 0.7, top_p=0.9, top_k=4400),
        Draw(1, 0.95, temperature=5.0, top_k=4400),
        Draw(2, 0.9, top_p=0.9, min_p=0.75),
    ]
    found, expected = both(logits.to(device), [Ask(draw.row, draw, top=0) for draw in draws])
    assert found["chosen"].tolist() == expected["chosen"].tolist()
    assert found["chosen"][0] == round(0.7 * 0.9 * 4400), "equal ones stand in the order of their numbers"
    assert found["chosen"][1] % 3 > 0, "the lesser ones stand behind the larger"


def test_an_answer_is_the_same_alone_and_in_company_of_any_others(device: torch.device) -> None:
    width = 250
    logits = logits_of(width, 3, device)
    several = ("none", "top-p", "top-k many", "all three, hot")
    asks = [Ask(index % 3, FILTERS[name]._replace(uniform=0.77), top=index) for index, name in enumerate(several)]
    asks += [Ask(0), Ask(1, token=5, top=0), Ask(2, FILTERS["cold"])]
    together, _ = both(logits, asks)
    back, _ = both(logits.flip(0), [ask._replace(row=2 - ask.row) for ask in reversed(asks[2:])])
    assert back[::-1].tobytes() == together[2:].tobytes()
    for index in (1, 4):
        alone, _ = both(logits[asks[index].row][None].clone(), [asks[index]._replace(row=0)])
        assert alone.tobytes() == together[index : index + 1].tobytes()


def test_a_token_that_is_asked_for_is_chosen_and_has_its_log_probability(device: torch.device) -> None:
    logits = logits_of(200, 2, device)
    asks = [Ask(1, token=token, top=0) for token in (0, 199, 3)] + [Ask(1, FILTERS["cold"], token=9, top=2)]
    found, _ = both(logits, asks)
    exact = logits[1].double().log_softmax(-1).cpu()
    assert found["chosen"].tolist() == [0, 199, 3, 9]
    assert found["logprob"].tolist() == pytest.approx(exact[[0, 199, 3, 9]].tolist(), rel=1e-6, abs=1e-6)
    assert set(found["greedy"].tolist()) == {int(logits[1].argmax())}


def test_rows_that_ask_nothing_get_no_answer_and_one_for_the_largest_costs_only_that(device: torch.device) -> None:
    logits = logits_of(100, 2, device)
    tables = tables_for([Ask(0), Ask(1)], 100, device)
    put(tables, [Ask(1)])
    tables.answers.fill_(-7)
    for name in ("keys", "masses", "counts", "lists"):
        tables.scratch[name].fill_(-9)
    ours.sample(launch_now, tables, logits, 2)
    found = ours.answers_of(tables.answers.cpu().numpy())
    assert found["chosen"][0] == found["greedy"][0] == int(logits[1].argmax())
    assert (tables.answers[1] == -7).all()
    for name in ("keys", "masses", "counts", "lists"):
        assert (tables.scratch[name] == -9).all(), name


def test_what_is_launched_once_answers_other_asks_of_other_logits(device: torch.device) -> None:
    """As in a graph: the same tensors and numbers, whatever lies in them."""
    logits = logits_of(130, 2, device)
    tables = tables_for([Ask(0), Ask(1)], 130, device)
    launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
    ours.sample(lambda kernel, grid, *args, **named: launches.append((kernel, grid, args, named)), tables, logits, 2)
    assert len(launches) == 5
    for asks in ([Ask(1, FILTERS["top-p hot"], top=1), Ask(0)], [Ask(0, FILTERS["none"])]):
        put(tables, asks)
        logits.add_(torch.randn(logits.shape, generator=torch.Generator().manual_seed(len(asks))).to(device))
        for kernel, grid, args, named in launches:
            launch_now(kernel, grid, *args, **named)
        found = ours.answers_of(tables.answers[: len(asks)].cpu().numpy())
        expected, _ = both(logits, asks)
        assert found["chosen"].tolist() == expected["chosen"].tolist()


def test_a_vocabulary_of_fifty_thousand_is_one_like_any_other(device: torch.device) -> None:
    logits = logits_of(50_257, 1, device)
    asks = [Ask(0, Draw(0, 0.4)), Ask(0, Draw(0, 0.6, top_p=0.9), top=20)]
    found, expected = both(logits, asks)
    for name in ("greedy", "chosen", "likeliest"):
        assert found[name].tolist() == expected[name].tolist()
    assert np.allclose(found["log_sum"], expected["log_sum"], rtol=0, atol=1e-7)


@NUMPY_TELLS
@settings(deadline=None, max_examples=10)
@given(data=st.data(), width=st.integers(1, 90))
def test_any_ask_of_any_logits_is_answered_as_by_the_reference(device: torch.device, data: Any, width: int) -> None:
    numbers = st.sampled_from([-math.inf, -30.5, -4.0, -1.0, -0.0, 0.0, 0.25, 0.5, 2.0, 9.0])
    row = data.draw(st.lists(numbers, min_size=width, max_size=width))
    draw = Draw(
        row=0,
        uniform=data.draw(st.floats(0, 1, exclude_max=True)),
        temperature=data.draw(st.sampled_from([0.05, 0.7, 1.0, 3.0])),
        top_k=data.draw(st.integers(0, 100)),
        top_p=data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
        min_p=data.draw(st.sampled_from([0.0, 0.01, 0.4, 1.0])),
    )
    found, expected = both(torch.tensor([row], device=device), [Ask(0, draw, top=data.draw(st.integers(0, 20)))])
    assert found["finite"].tolist() == expected["finite"].tolist()
    if expected["finite"][0]:
        for name in ("greedy", "chosen", "likeliest"):
            assert found[name].tolist() == expected[name].tolist()


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (Ask(0, top=21), "the 21 likeliest tokens are asked for; they are 0 to 20"),
        (Ask(0, token=30), "token 30 is none of 30"),
        (Ask(0, Draw(0, 1.0)), "drawn by 1.0 at temperature 1.0"),
        (Ask(0, Draw(0, 0.5, temperature=0.0)), "at temperature 0.0"),
    ],
)
def test_what_cannot_be_asked_is_refused(ask: Ask, says: str) -> None:
    with pytest.raises(SamplingError, match=says):
        ours.fill(np.empty((1, 5), dtype=np.int64), [ask], 30)


def test_tables_of_other_sizes_are_refused(device: torch.device) -> None:
    sizes = SamplingSizes(2, 30)
    tables = SamplingTables.on(sizes, device)
    with pytest.raises(SamplingError, match="300000 tokens; logits of 1 to 262144 can be sampled here"):
        SamplingSizes(1, 300_000)
    with pytest.raises(SamplingError, match="3 rows are asked for, and there is room for 2"):
        ours.fill(np.empty((2, 5), dtype=np.int64), [Ask(0)] * 3, 30)
    with pytest.raises(SamplingError, match=r"logits of 31 tokens"):
        ours.sample(launch_now, tables, torch.zeros(2, 31, device=device), 2)
    with pytest.raises(SamplingError, match=r"a table of \(2, 22\)"):
        SamplingTables(sizes, tables.asks, tables.answers[:, 1:], tables.scratch)
    with pytest.raises(SamplingError, match="scratch 'keys'"):
        SamplingTables(sizes, tables.asks, tables.answers, tables.scratch | {"keys": tables.scratch["keys"][:9]})
