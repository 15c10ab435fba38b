"""Changed rows of logits: the compiled code gives the reference's bits, and what is forbidden is never drawn."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_server.engine.sampler import uniform
from loramux_server.kernels.compiled.library import Compiled, native_library
from loramux_server.kernels.compiled.logit_changes import EDIT, RowChange, bits_of, flags_of, within, words_for
from loramux_server.kernels.compiled.sampling import Draw, NativeSampling, Sampling, TensorSampling

SLOW = TensorSampling()
library = native_library()
NATIVE = [NativeSampling(Compiled(library, isa)) for isa in library.isas] if library is not None else []
PATHS: list[Sampling] = [SLOW, *NATIVE]
WIDTHS = (1, 31, 32, 33, 500, 5003)
LARGEST = float(np.finfo(np.float32).max)
NOTHING = np.empty(0, dtype=np.int32)
NO_EDITS = np.empty(0, dtype=EDIT)


def padded(width: int, rows: int, seed: int) -> torch.Tensor:
    """Rows as the head leaves them; what pads them would win."""
    logits = torch.full((rows, -(-width // 32) * 32 + 32), 1e6)
    logits[:, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 4
    return logits[:, :width]


def edits_of(width: int, count: int, random: np.random.Generator) -> npt.NDArray[np.void]:
    edits = np.zeros(min(count, width), dtype=EDIT)
    edits["token"] = random.choice(width, len(edits), replace=False)
    edits["repeated"] = random.integers(0, 2, len(edits))
    edits["add"], edits["less"] = random.normal(0, 9, (2, len(edits)))
    edits["add"][::5] = random.choice([LARGEST, -LARGEST, np.inf, -np.inf, np.nan, 0.0], len(edits[::5]))
    edits["less"][::7] = random.choice([LARGEST, -LARGEST, np.inf, -np.inf, 0.0], len(edits[::7]))
    return edits


@given(
    width=st.sampled_from(WIDTHS),
    kinds=st.lists(
        st.tuples(
            st.integers(0, 60),  # edits
            st.integers(0, 9),  # forbidden
            st.sampled_from([None, 0.0, 0.02, 0.5, 0.98, 1.0]),  # share that is allowed
            st.sampled_from([1.0, 1.3, 0.5, 1e-30, 1e30]),
        ),
        max_size=6,
    ),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_compiled_changes_have_the_bits_of_the_reference(
    width: int, kinds: list[tuple[int, int, float | None, float]], seed: int
) -> None:
    random = np.random.default_rng(seed)
    logits = padded(width, 5, seed)
    logits[1, ::3] = float("-inf")
    logits[2, ::3], logits[2, 1::3] = LARGEST, -LARGEST
    logits[3] = 0.0
    changes = [
        RowChange(
            int(random.integers(0, 5)),
            edits_of(width, edits, random),
            random.integers(0, width, forbidden).astype(np.int32),
            None if share is None else bits_of(np.flatnonzero(random.random(width) < share).tolist(), width),
            repetition,
        )
        for edits, forbidden, share, repetition in kinds
    ]
    before = logits.clone()
    expected = SLOW.changed(logits, changes)
    assert expected.shape == (len(changes), width) and expected.dtype == torch.float32
    assert not expected.isnan().any() and not (expected == torch.inf).any()
    for path in NATIVE:
        found = path.changed(logits, changes)
        assert found.numpy().tobytes() == expected.contiguous().numpy().tobytes()
        for at, change in enumerate(changes):
            assert torch.equal(path.changed(logits, [change])[0], found[at]), "alone as in company"
        assert torch.equal(path.changed(logits.bfloat16(), changes), SLOW.changed(logits.bfloat16(), changes))
    assert torch.equal(logits, before), "the model's own logits stay as they are"


@pytest.mark.parametrize("path", PATHS)
def test_each_part_of_a_change_does_what_it_says(path: Sampling) -> None:
    logits = torch.tensor([[0.0, 9.0, -3.0, 2.0], [0.5, -1.5, 2.0, float("-inf")]])
    edits = np.array([(0, 1, -1.0, 0.25), (2, 1, 0.0, 0.5), (3, 0, 1.5, -2.0)], dtype=EDIT)
    change = RowChange(1, edits, np.array([1], dtype=np.int32), None, 2.0)
    assert path.changed(logits, [change]).tolist() == [[-1.25, float("-inf"), 0.5, float("-inf")]]
    allowed = RowChange(0, edits, NOTHING, bits_of([3, 0, 99, -1], 4), 2.0)
    assert path.changed(logits, [allowed]).tolist() == [[-2.25, float("-inf"), float("-inf"), 5.5]]
    assert path.changed(logits, []).shape == (0, 4)


@pytest.mark.parametrize("path", PATHS)
def test_what_may_be_chosen_stays_finite_and_can_be_found(path: Sampling) -> None:
    logits = torch.zeros(1, 40)
    for add in (-np.inf, np.nan, -LARGEST):
        change = RowChange(0, np.array([(7, 0, add, LARGEST)], dtype=EDIT), NOTHING, bits_of([7], 40))
        changed = path.changed(logits, [change])
        assert path.search(changed) == ([7], [True])
        for draw in every_draw():
            assert path.draw(changed, [draw]) == [7]
    nothing = path.changed(logits, [RowChange(0, NO_EDITS, np.array([7], dtype=np.int32), bits_of([7], 40))])
    assert path.search(nothing)[1] == [False]


def every_draw() -> list[Draw]:
    """All ways to draw, with numbers at both ends of their range."""
    filters: list[dict[str, Any]] = [{}, {"top_k": 3}, {"top_k": 1 << 40}, {"top_k": 39}, {"min_p": 1.0}]
    filters += [
        {"top_p": 0.0},
        {"top_p": 0.5},
        {"top_p": 1 - 2.0**-53},
        {"min_p": 1e-30},
        {"top_k": 30, "top_p": 0.999},
    ]
    numbers = (0.0, 0.5, 1 - 2.0**-53, *(uniform(5, index) for index in range(4)))
    return [
        Draw(0, number, temperature, **kind)
        for number, temperature, kind in product(numbers, (1.0, 1e-300, 1e30, 0.3), filters)
    ]


@given(
    width=st.sampled_from((2, 40, 255, 257, 700)),
    kept=st.integers(1, 4),
    scale=st.sampled_from([0.0, 1e-3, 4.0, 100.0, 1e38]),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_what_is_forbidden_is_never_found_and_never_drawn(width: int, kept: int, scale: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(0, 1, (1, width)).astype(np.float32).clip(-3, 3) * np.float32(scale))
    allowed = random.choice(width, min(kept, width - 1), replace=False).tolist()
    logits[0, [token for token in range(width) if token not in allowed]] += scale  # the likeliest are forbidden
    others = np.array([token for token in range(width) if token not in allowed], dtype=np.int32)
    draws = every_draw()
    for change in (RowChange(0, NO_EDITS, NOTHING, bits_of(allowed, width)), RowChange(0, NO_EDITS, others)):
        for path in PATHS:
            changed = path.changed(logits, [change])
            (first,), (possible,) = path.search(changed)
            assert possible and first in allowed
            assert set(path.draw(changed, draws)) <= set(allowed)


@given(st.integers(1, 200).flatmap(lambda width: st.tuples(st.just(width), st.sets(st.integers(-5, 250)))))
def test_bits_stand_for_the_tokens_of_the_vocabulary(case: tuple[int, set[int]]) -> None:
    width, tokens = case
    inside = sorted(token for token in tokens if 0 <= token < width)
    bits = bits_of(tokens, width)
    assert bits.dtype == np.uint32 and len(bits) == words_for(width)
    assert np.flatnonzero(flags_of(bits, width)).tolist() == inside == within(tokens, width).tolist()
    assert [token for token in range(32 * len(bits)) if int(bits[token // 32]) >> token % 32 & 1] == inside
