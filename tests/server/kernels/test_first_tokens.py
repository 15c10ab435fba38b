"""The first token without all logits: what a search of all logits finds, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_server.kernels.compiled.library import Compiled, NativeLibrary, native_library
from loramux_server.kernels.decoder.decoder import Decoder
from support.decoders import Served, random_model

LIBRARY = native_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="there are no compiled kernels")

FAMILIES = ["Llama", "Granite", "Gemma 2", "Gemma 3"]  # the second divides its logits, the third caps them
SCREENED = 4  # rows, at most


def library() -> NativeLibrary:
    assert LIBRARY is not None
    return LIBRARY


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Served]:
    return request.param, Served(random_model(request.param))


def decoders(served: Served) -> Iterator[Decoder]:
    assert served.decoder is not None
    for isa in library().isas:
        yield Decoder(Compiled(library(), isa), served.decoder.description)


class Found:
    """What steps found, beside the search of the logits that the same steps give without the question.

    Attributes:
        screened: rows whose token was found without their logits.
        others: rows whose logits were given, as they are without the question.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.screened, self.others = decoder, 0, 0

    def forward(self, tokens: list[int], heads: list[int], step: Any, lora: Any, head: Any) -> torch.Tensor:
        logits = self.decoder.forward(tokens, heads, step, lora, head).clone()
        given, first = self.decoder.first_tokens(tokens, heads, step, lora, head)
        for row, token in enumerate(first):
            if token >= 0:
                self.screened += 1
                assert torch.isfinite(logits[row].max()) and not logits[row].isnan().any()
                assert token == int((logits[row] == logits[row].max()).nonzero()[0])
            else:
                self.others += 1
                assert torch.equal(given[row].nan_to_num(7.0), logits[row].nan_to_num(7.0))
        return logits


def sequences(lengths: list[int], vocabulary: int = 333) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


@contextmanager
def changed_head(served: Served) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Bytes of the head, flat, and scales [in / 64, padded]; when this ends they are as before."""
    head = served.model.get_output_embeddings().base_layer
    before = head.weight.clone(), head.scales.clone()
    try:
        yield head.weight.data.view(-1), head.scales
    finally:
        head.weight.copy_(before[0])
        head.scales.copy_(before[1])


def test_it_is_the_token_that_a_search_of_all_logits_finds(family: tuple[str, Served]) -> None:
    name, served = family
    for decoder in decoders(served):
        for count in range(1, SCREENED + 2):
            found = Found(decoder)
            served.feed(found.forward, sequences([24] * count), chunk=1)
            expected = 24 * count if name != "Gemma 2" and count <= SCREENED else 0
            assert (found.screened, found.others) == (expected, 24 * count - expected)


def all_the_same(numbers: torch.Tensor, scales: torch.Tensor) -> None:
    numbers.fill_(0x11)
    scales.fill_(0.01)


def all_zero(numbers: torch.Tensor, scales: torch.Tensor) -> None:
    scales.zero_()


def some_are_the_first_together(numbers: torch.Tensor, scales: torch.Tensor) -> None:
    all_the_same(numbers, scales)
    scales[:, [47, 48, 300]] *= 2
    scales[:, [49, 301]] *= 2
    high = numbers[: len(numbers) // 3 * 2].view(scales.shape[1] // 16, -1, 16, 2)
    high[3, :, 1] = high[18, :, 13] = 0xEE  # below zero: one of both kinds is the first, whatever the row


def only_low_halves_differ(numbers: torch.Tensor, scales: torch.Tensor) -> None:
    high = len(numbers) // 3 * 2
    numbers[:high] = 0x22
    numbers[high:] = torch.randint(256, (high // 2,), generator=torch.Generator().manual_seed(1)).byte()
    scales.fill_(0.01)


def too_small_for_normal_numbers(numbers: torch.Tensor, scales: torch.Tensor) -> None:
    scales *= 1e-38


@pytest.mark.parametrize(
    "change",
    [all_the_same, all_zero, some_are_the_first_together, only_low_halves_differ, too_small_for_normal_numbers],
)
def test_of_equal_and_nearly_equal_logits_it_is_the_first_largest(
    change: Callable[[torch.Tensor, torch.Tensor], None], family: tuple[str, Served]
) -> None:
    name, served = family
    if name == "Gemma 2":
        pytest.skip("its capped logits are not screened")
    with changed_head(served) as head:
        change(*head)
        for decoder in decoders(served):
            found = Found(decoder)
            served.feed(found.forward, sequences([9, 9, 9]), chunk=1)
            assert (found.screened, found.others) == (27, 0)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e38])
def test_where_a_logit_may_not_be_finite_all_are_given(scale: float, family: tuple[str, Served]) -> None:
    _, served = family
    with changed_head(served) as (_, scales):
        scales[1, 200] = scale
        for decoder in decoders(served):
            found = Found(decoder)
            served.feed(found.forward, sequences([9]), chunk=1)
            assert found.screened == 0 or scale == 1e38  # which may be too large for one row and not for another


def test_where_dividing_makes_an_infinity_of_the_largest_logit_all_are_given() -> None:
    served = Served(random_model("Granite", logits_scaling=1e-5))
    with changed_head(served) as (_, scales):
        scales.mul_(1e32 / scales.max())  # logits are finite before they are divided
        for decoder in decoders(served):
            found = Found(decoder)
            served.feed(found.forward, sequences([9]), chunk=1)
            assert (found.screened, found.others) == (0, 9)


def test_of_rows_with_an_adapter_on_the_head_all_logits_are_given(family: tuple[str, Served]) -> None:
    name, served = family
    head = served.model.get_output_embeddings()
    adapters = [(), (ScaledSlot(Slot(16, 16), 0.5),)]
    for decoder in decoders(served):
        found = Found(decoder)
        served.feed(found.forward, sequences([9, 9]), adapters, chunk=1)
        assert found.screened == 0
        head.arena.targeted[2:4] = 0
        try:
            served.feed(found.forward, sequences([9, 9]), adapters, chunk=1)
        finally:
            head.arena.targeted.fill_(1)
        assert found.screened == (0 if name == "Gemma 2" else 18)
