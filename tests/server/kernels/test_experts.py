"""The experts of a layer in one call: the bits of one expert after the other, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from loramux_adapters.lora.ops import LoraRows
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_server.kernels.compiled.abi import VectorIsa
from loramux_server.kernels.compiled.library import Compiled, native_library
from loramux_server.kernels.layers.experts import ExpertForm, Experts
from support.random_experts import random_experts

LIBRARY = native_library()
ISAS = LIBRARY.isas if LIBRARY else ()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiler was there at installation")

FORMS = {
    "SiLU": ExpertForm(12, 128, 192),
    "gpt-oss": ExpertForm(12, 192, 64, bias=True, alpha=1.702, limit=3.0, above=1.0),
    "GELU": ExpertForm(5, 64, 64, gelu=True),
}
CHOSEN = 3
USES = [
    (),
    (ScaledSlot(Slot(0, 8)),),
    (ScaledSlot(Slot(8, 8), 0.5), ScaledSlot(Slot(16, 16), -0.7)),
    (ScaledSlot(Slot(16, 16)),),
]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def compiled(isa: VectorIsa | None = None) -> Compiled:
    """`isa`: the fastest if None."""
    assert LIBRARY is not None
    return LIBRARY.best if isa is None else Compiled(LIBRARY, isa)


def inputs(form: ExpertForm, rows: int, chosen: int = CHOSEN) -> Inputs:
    """Rows, experts and weights; of gates and ups some are beyond a limit of 3."""
    generator = torch.Generator().manual_seed(rows)
    scores = torch.randn(rows, form.count, generator=generator)
    weights, index = scores.softmax(-1).topk(chosen)
    return torch.randn(rows, form.outer, generator=generator), index, weights


def lora_of(rows: int) -> LoraRows | None:
    return LoraRows.build([(USES[row * 7 // 3 % len(USES)], 1) for row in range(rows)])


def one_by_one(experts: Experts, *given: torch.Tensor) -> torch.Tensor:
    together, experts.together = experts.together, None
    try:
        y: torch.Tensor = experts(*given)
    finally:
        experts.together = together
    return y


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize("name", FORMS)
def test_one_call_has_the_bits_of_one_expert_after_the_other(name: str, rows: int) -> None:
    form = FORMS[name]
    given, threads = inputs(form, rows), torch.get_num_threads()
    for isa in ISAS:
        experts = random_experts(form, compiled(isa))
        expected = one_by_one(experts, *given)
        for number in (1, 3):
            torch.set_num_threads(number)
            try:
                assert torch.equal(experts(*given), expected), (isa.label, number)
            finally:
                torch.set_num_threads(threads)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_adapters_of_experts_are_added_with_the_same_bits(name: str, affine: bool) -> None:
    form = FORMS[name]
    given, rows = inputs(form, 29), lora_of(29)
    found = []
    for isa in ISAS:
        experts = random_experts(form, compiled(isa), ranks=32, affine=affine)
        base = experts(*given)
        experts.set_lora(rows)
        found.append(experts(*given))
        assert torch.equal(found[-1], one_by_one(experts, *given)), isa.label
        changed = (found[-1] != base).any(1)
        assert changed.tolist() == [bool(USES[row * 7 // 3 % len(USES)]) for row in range(29)]
    assert all(torch.equal(y, found[0]) for y in found)


def test_adapters_that_have_nothing_for_experts_change_nothing() -> None:
    experts = random_experts(FORMS["SiLU"], compiled(), ranks=32)
    given = inputs(FORMS["SiLU"], 6)
    expected = experts(*given)
    for module in experts.modules():
        if (arena := getattr(module, "arena", None)) is not None:
            arena.targeted.zero_()
    experts.set_lora(lora_of(6))
    assert torch.equal(experts(*given), expected)


def test_a_row_has_its_bits_alone_and_in_company() -> None:
    experts = random_experts(FORMS["gpt-oss"], compiled(), ranks=32, affine=True)
    given, rows = inputs(FORMS["gpt-oss"], 40), lora_of(40)
    experts.set_lora(rows)
    together = experts(*given)
    for row in (0, 7, 39):
        experts.set_lora(LoraRows.build([(USES[row * 7 // 3 % len(USES)], 1)]))
        assert torch.equal(experts(*(part[row : row + 1] for part in given))[0], together[row])


def test_many_rows_go_through_in_turns_with_the_same_bits() -> None:
    """12 million numbers between products at once: 700 rows of these are two turns."""
    form = ExpertForm(10, 1024, 512)
    experts = random_experts(form, compiled(), ranks=32)
    given, rows = inputs(form, 700, chosen=10), lora_of(700)
    experts.set_lora(rows)
    together = experts(*given)
    assert torch.equal(together, one_by_one(experts, *given))
    experts.set_lora(LoraRows.build([(USES[699 * 7 // 3 % len(USES)], 1)]))
    assert torch.equal(experts(*(part[699:] for part in given))[0], together[699])


def test_a_row_that_is_no_number_harms_no_other() -> None:
    experts = random_experts(FORMS["gpt-oss"], compiled())
    x, index, weights = inputs(FORMS["gpt-oss"], 9)
    expected = experts(x, index, weights)
    sick = x.clone()
    sick[4, 70] = torch.nan
    got = experts(sick, index, weights)
    assert torch.equal(got[:4], expected[:4]) and torch.equal(got[5:], expected[5:])
    assert not got[4].isfinite().any()
    assert torch.equal(got[4].isnan(), one_by_one(experts, sick, index, weights)[4].isnan())


def test_layers_that_others_took_the_place_of_are_read_where_they_lie() -> None:
    form = FORMS["SiLU"]
    experts, others = random_experts(form, compiled()), random_experts(form, compiled(), ranks=32)
    given = inputs(form, 5)
    experts(*given)
    experts[3] = others[3]
    experts.layers_changed()
    experts.set_lora(lora_of(5))
    assert torch.equal(experts(*given), one_by_one(experts, *given))
