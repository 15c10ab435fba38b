"""From logits to tokens: right against double precision, and the same bits on every instruction set."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from itertools import product
from typing import NamedTuple

import pytest
import torch

from loramux_server.engine.sampler import uniform
from loramux_server.kernels.compiled.library import Compiled, NativeLibrary, native_library
from loramux_server.kernels.compiled.sampling import (
    Draw,
    NativeSampling,
    Sampling,
    TensorSampling,
    candidates,
    logprobs_of,
)

SLOW = TensorSampling()
WIDTHS = (1, 2, 15, 16, 17, 255, 256, 257, 320, 5003, 49152)


@pytest.fixture(scope="module")
def library() -> NativeLibrary:
    found = native_library()
    if found is None:
        pytest.skip("there are no compiled kernels")
    return found


@pytest.fixture(scope="module")
def paths(library: NativeLibrary) -> list[NativeSampling]:
    """One for each instruction set of this machine."""
    return [NativeSampling(Compiled(library, isa)) for isa in library.isas]


def logits_of(width: int, rows: int = 12, scale: float = 4.0, seed: int = 0) -> torch.Tensor:
    """Padded rows, as the head leaves them; what pads them would win."""
    padded = torch.full((rows, -(-width // 32) * 32 + 32), 1e6)
    padded[:, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + width)) * scale
    return padded[:, :width]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_first_largest_is_found_and_what_is_not_finite(paths: list[NativeSampling], width: int) -> None:
    logits = logits_of(width, 26)
    logits[1] = 0.0
    logits[2] = -0.0
    logits[3, width // 2 :] = 0.0
    logits[3, : width // 2] = -0.0
    logits[4] = float("-inf")
    logits[5, width - 1] = float("inf")
    logits[6, 0] = float("-inf")
    logits[7, width // 2] = float("-inf")
    logits[8] = -3e38
    logits[9] = 3e38
    logits[10, width - 1] = 50.0
    logits[11, ::7] = 60.0  # ties
    logits[12] = torch.finfo(torch.float32).tiny / 4  # denormal
    expected = SLOW.search(logits)
    assert expected[0][1] == expected[0][2] == expected[0][3] == expected[0][11] == expected[0][12] == 0
    assert [row for row in range(13) if not expected[1][row]] == ([4, 5, 6, 7] if width == 1 else [4, 5])
    for path in paths:
        assert path.search(logits) == expected
        assert path.search(logits[::2]) == (expected[0][::2], expected[1][::2])
        assert path.search(logits.bfloat16()) == SLOW.search(logits.bfloat16())
        assert path.search(logits.t().contiguous().t()) == expected
    for bad, place in product((math.nan, -math.nan), {0, width // 3, width - 1}):
        sick = logits_of(width)
        whole = SLOW.search(sick)
        sick[4, place] = bad
        for path in paths:
            tokens, finite = path.search(sick)
            assert finite == [row != 4 for row in range(12)]
            assert tokens[:4] + tokens[5:] == whole[0][:4] + whole[0][5:]


@pytest.mark.parametrize("width", WIDTHS)
def test_log_probabilities_are_near_double_precision_and_the_same_everywhere(
    paths: list[NativeSampling], width: int
) -> None:
    logits = logits_of(width)
    logits[1] *= 0.001  # flat
    logits[2] *= 1000  # steep
    logits[3] = 7.5
    logits[4, width // 2 + 1 :] = float("-inf")
    logits[5, :] = -3e4
    rows = [9, 0, 1, 2, 3, 4, 5, 0]
    exact = torch.logsumexp(logits[rows].double(), -1).tolist()
    assert SLOW.log_sums(logits, rows) == pytest.approx(exact, rel=1e-12, abs=1e-12)
    found = [path.log_sums(logits, rows) for path in paths]
    assert found[0] == pytest.approx(exact, rel=1e-7, abs=5e-7)
    assert found == [found[0]] * len(paths)
    for path in paths:
        assert path.log_sums(logits[4:5], [0]) == found[0][5:6], "alone as in company"
    tokens = [width // 2] * len(rows)
    logprobs = logprobs_of(logits, rows, tokens, dict(zip(rows, found[0], strict=True)))
    expected = logits[rows].double().log_softmax(-1)[:, width // 2].tolist()
    assert logprobs == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_certain_token_has_the_log_probability_zero(paths: list[NativeSampling]) -> None:
    logits = torch.full((1, 300), -500.0)
    logits[0, 77] = 3.25
    for path in paths:
        assert path.log_sums(logits, [0]) == [3.25]
        assert path.log_sums(logits[:, 77:78], [0]) == [3.25]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("wanted", [1, 2, 5, 20, 300, 1 << 20])
def test_the_likeliest_stand_in_order_and_of_equal_ones_the_lower(
    paths: list[NativeSampling], width: int, wanted: int
) -> None:
    logits = logits_of(width, 6)
    logits[1] = logits[1].round()  # many ties
    logits[2] = 1.0
    logits[3, ::2], logits[3, 1::2] = 0.0, -0.0
    logits[4, width // 2 :] = float("-inf")
    rows = [5, 4, 3, 2, 1, 0]
    expected = [sorted(range(width), key=lambda token: (-row[token], token))[:wanted] for row in logits[rows].tolist()]
    assert SLOW.first_tokens(logits, rows, wanted) == expected
    for path in paths:
        assert path.first_tokens(logits, rows, wanted) == expected


FILTERS = {
    "none": Draw(0, 0.0),
    "cold": Draw(0, 0.0, temperature=0.2),
    "tiny": Draw(0, 0.0, temperature=1e-6),
    "least": Draw(0, 0.0, temperature=5e-324),
    "hot": Draw(0, 0.0, temperature=2.0),
    "huge": Draw(0, 0.0, temperature=1e30),
    "top-k": Draw(0, 0.0, top_k=7),
    "top-k 1": Draw(0, 0.0, top_k=1),
    "top-k all": Draw(0, 0.0, top_k=1 << 40),
    "top-p": Draw(0, 0.0, top_p=0.9),
    "top-p 0": Draw(0, 0.0, top_p=0.0),
    "top-p nearly all": Draw(0, 0.0, top_p=0.9999999),
    "top-p hot": Draw(0, 0.0, temperature=2.0, top_p=0.95),
    "min-p": Draw(0, 0.0, min_p=0.05),
    "min-p 1": Draw(0, 0.0, min_p=1.0),
    "all": Draw(0, 0.0, temperature=0.7, top_k=40, top_p=0.8, min_p=0.02),
    "top-p and min-p": Draw(0, 0.0, top_p=0.97, min_p=0.01),
    "top-k and top-p": Draw(0, 0.0, top_k=300, top_p=0.99),
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_draw_is_that_of_double_precision_and_the_same_everywhere(paths: list[NativeSampling], name: str) -> None:
    """Two millionths of probability are let go, where one token ends and the next begins."""
    for width in (1, 5, 257, 5003):
        logits = logits_of(width, 4, scale=2.0)
        logits[1] = logits[1].round()
        logits[2, : width - 1] -= 40
        draws = [
            FILTERS[name]._replace(row=row, uniform=number)
            for row in range(4)
            for number in (0.0, 1e-9, *(uniform(row, index) for index in range(40)), 1 - 2.0**-53)
        ]
        found = [path.draw(logits, draws) for path in paths]
        assert found == [found[0]] * len(paths)
        for path in paths:
            assert path.draw(logits, draws[50:51]) == found[0][50:51], "alone as in company"
        for row in range(4):
            shares = [shares_of(logits[row], FILTERS[name], moved) for moved in (0.0, -1e-6, 1e-6)]
            for drawn, draw in zip(found[0], draws, strict=True):
                if draw.row == row:  # the nucleus may have a token more or less where it ends within a millionth of p
                    assert any(draw.uniform in its.get(drawn, Between(1, 0)) for its in shares), (width, drawn, draw)
                    assert shares[0][SLOW.draw(logits, [draw])[0]].low <= draw.uniform + 2e-6


class Between(NamedTuple):
    """The numbers that draw a token."""

    low: float
    high: float

    def __contains__(self, number: object) -> bool:
        return isinstance(number, float) and self.low - 2e-6 <= number <= self.high + 2e-6


def shares_of(logits: torch.Tensor, draw: Draw, moved: float) -> dict[int, Between]:
    """Each candidate's share in double; top-p `moved` by so much."""
    if draw.top_p < 1.0:
        draw = draw._replace(top_p=draw.top_p + moved)
    values, tokens = candidates(logits.double(), draw)
    mass = values.softmax(-1).cumsum(-1)
    ends = (mass / mass[-1]).tolist()
    names = range(len(ends)) if tokens is None else tokens.tolist()
    return {token: Between(low, high) for token, low, high in zip(names, [0.0, *ends[:-1]], ends, strict=True)}


@pytest.mark.parametrize("name", FILTERS)
def test_every_draw_is_a_candidate_that_can_be_drawn(paths: list[NativeSampling], name: str) -> None:
    logits = logits_of(400, 1, scale=3.0)
    logits[0, 100:] = float("-inf")
    values, tokens = candidates(logits[0].double(), FILTERS[name])
    allowed = set(range(400)) if tokens is None else set(tokens.tolist())
    allowed &= {token for token in range(100)}
    draws = [FILTERS[name]._replace(uniform=number) for number in (0.0, 0.5, 1 - 2.0**-53)]
    draws += [FILTERS[name]._replace(uniform=uniform(3, index)) for index in range(500)]
    assert set(paths[-1].draw(logits, draws)) <= allowed
    if name in ("top-k 1", "top-p 0", "min-p 1", "tiny", "least"):
        assert set(paths[-1].draw(logits, draws)) == {int(logits[0].argmax())}


@pytest.mark.parametrize(
    ("draw", "kept"),
    [
        (Draw(0, 0.0, top_k=2), {1, 3}),
        (Draw(0, 0.0, top_k=1), {1}),
        (Draw(0, 0.0, top_p=0.6), {1}),
        (Draw(0, 0.0, top_p=0.7), {1, 3}),
        (Draw(0, 0.0, top_p=0.0), {1}),
        (Draw(0, 0.0, min_p=0.3), {1, 3}),
        (Draw(0, 0.0, min_p=0.1), {1, 2, 3}),
        (Draw(0, 0.0, top_k=3, top_p=0.95, min_p=0.2), {1, 3}),
        (Draw(0, 0.0, top_k=99, top_p=1.0), {0, 1, 2, 3, 4}),
    ],
)
def test_filters_keep_the_right_tokens(paths: list[NativeSampling], draw: Draw, kept: set[int]) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]])
    _, tokens = candidates(logits[0].double(), draw)
    assert kept == (set(range(5)) if tokens is None else set(tokens.tolist()))
    draws = [draw._replace(uniform=index / 2000) for index in range(2000)]
    several: list[Sampling] = [*paths, SLOW]
    for path in several:
        assert set(path.draw(logits, draws)) == kept


def test_top_p_is_right_also_where_the_first_thousand_do_not_reach_it(paths: list[NativeSampling]) -> None:
    logits = logits_of(5000, 1, scale=0.01)  # nearly flat
    draw = Draw(0, 1 - 2.0**-53, top_p=0.9)
    _, tokens = candidates(logits[0].double(), draw)
    assert tokens is not None
    mass = logits[0].double().softmax(-1)
    assert mass[tokens].sum() >= 0.9 > mass[tokens[:-1]].sum()
    assert len(tokens) > 4000
    for path in paths:
        assert (
            path.draw(logits, [draw])[0]
            in tokens[-2:].tolist() + SLOW.first_tokens(logits, [0], len(tokens) + 1)[0][-1:]
        )


@pytest.mark.parametrize("name", ["none", "cold", "hot", "top-k", "top-p", "min-p", "all"])
def test_frequencies_follow_the_distribution(paths: list[NativeSampling], name: str) -> None:
    """Chi-square over 20,000 draws of a fixed seed; the bound is its 99.99th percentile (Wilson and Hilferty, 1931)."""
    count, logits = 20_000, logits_of(60, 1, scale=1.5)
    draws = [FILTERS[name]._replace(uniform=uniform(7, index)) for index in range(count)]
    seen = Counter(paths[-1].draw(logits, draws))
    values, tokens = candidates(logits[0].double(), FILTERS[name])
    names = list(range(60)) if tokens is None else tokens.tolist()
    expected = {token: count * share for token, share in zip(names, values.softmax(-1).tolist(), strict=True)}
    often = [token for token in names if expected[token] >= 5]
    rest = count - sum(expected[token] for token in often), count - sum(seen[token] for token in often)
    pairs = [(expected[token], seen[token]) for token in often] + ([rest] if rest[0] >= 5 else [])
    chi_square = sum((got - wanted) ** 2 / wanted for wanted, got in pairs)
    degrees = max(1, len(pairs) - 1)
    assert chi_square < degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3
    assert set(seen) <= set(names)


def test_the_bits_are_those_of_every_other_machine(paths: list[NativeSampling]) -> None:
    """Recorded; a processor, compiler or library that gives others breaks replies that are to be equal anywhere."""
    random = torch.arange(6 * 1999, dtype=torch.int64).view(6, 1999)
    logits = ((random * 2654435761 % 65537).float() - 32768.0) / 4096.0
    draws = [FILTERS[name]._replace(row=index % 6, uniform=uniform(index, 0)) for index, name in enumerate(FILTERS)]
    for path in paths:
        sums = [number.hex() for number in path.log_sums(logits, range(6))]
        words = repr((sums, path.draw(logits, draws * 20), path.first_tokens(logits, range(6), 20)))
        assert hashlib.sha256(words.encode()).hexdigest() == RECORDED


RECORDED = "0d8a70e6e6a26bf30c5559d0c7e11e631ef978bd0015d790459d7bf9753aa12a"
