"""The kernels of exact integers: right, and the same bits on every instruction set, alone and in company."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from loramux_adapters.lora.ops import Arena, LoraRows
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_server.kernels.compiled.abi import VectorIsa
from loramux_server.kernels.compiled.adapter_kernels import NativeAddLora
from loramux_server.kernels.compiled.library import Compiled, NativeLibrary, native_library
from support.exact_models import Array, Decoder, Linear, at
from support.exact_steps import ADAPTERS, SHAPES, feed, sequences_of


@pytest.fixture(scope="module")
def library() -> NativeLibrary:
    found = native_library()
    if found is None:
        pytest.skip("there are no compiled kernels")
    return found


def sets_of(library: NativeLibrary) -> list[VectorIsa]:
    found = library.function("loramux_exact_isas")()
    return [isa for isa in VectorIsa if found & 1 << isa]


@pytest.mark.parametrize("name", SHAPES)
def test_a_whole_step_is_near_double_precision_and_the_same_on_every_instruction_set(
    library: NativeLibrary, name: str
) -> None:
    decoder = Decoder(library, SHAPES[name])
    sequences = sequences_of(decoder.shape)
    together = feed(decoder, VectorIsa.PORTABLE, sequences, chunk=7)
    for index, (tokens, logits) in enumerate(zip(sequences, together, strict=True)):
        expected = decoder.reference(tokens, list(ADAPTERS[index % len(ADAPTERS)]))
        assert np.abs(logits - expected).max() < 4e-3 * np.abs(expected).max()
    for isa in sets_of(library):
        for index, logits in enumerate(feed(decoder, isa, sequences, chunk=7, threads=2)):
            assert logits.tobytes() == together[index].tobytes(), isa.name


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_has_the_same_bits_alone_and_in_company_whatever_the_chunks(library: NativeLibrary, name: str) -> None:
    decoder = Decoder(library, SHAPES[name])
    sequences = sequences_of(decoder.shape)
    isa = sets_of(library)[-1]
    together = feed(decoder, isa, sequences, chunk=64)
    for chunk in (1, 3, 16):
        for logits, expected in zip(feed(decoder, isa, sequences, chunk), together, strict=True):
            assert logits.tobytes() == expected.tobytes()
    for index in range(len(sequences)):
        alone = feed(decoder, isa, [tokens if index == other else [0] for other, tokens in enumerate(sequences)], 64)
        assert alone[index].tobytes() == together[index].tobytes()


@pytest.mark.parametrize("name", ["Llama", "Phi-3", "Qwen2", "OLMo 2"])
def test_a_step_of_so_many_rows_that_weights_are_laid_out_for_them_gives_the_bits_of_one_of_few(
    library: NativeLibrary, name: str
) -> None:
    decoder, random = Decoder(library, SHAPES[name]), np.random.default_rng(1)
    lengths = (150, 140, 130, 101)  # together more than 512, from where on all instruction sets do
    sequences = [random.integers(0, decoder.shape.vocabulary, length).tolist() for length in lengths]
    few = feed(decoder, VectorIsa.PORTABLE, sequences, chunk=23)  # 92 rows: none does
    for isa in sets_of(library):
        for chunk, threads in ((150, 1), (150, 2), (24, 1), (49, 3)):
            for logits, expected in zip(feed(decoder, isa, sequences, chunk, threads), few, strict=True):
                assert np.isfinite(logits).all()
                assert logits.tobytes() == expected.tobytes(), (isa.name, chunk, threads)


def test_a_sick_row_harms_no_other_of_many(library: NativeLibrary) -> None:
    decoder, random = Decoder(library, SHAPES["Llama"]), np.random.default_rng(1)
    sequences = [random.integers(1, decoder.shape.vocabulary, 150).tolist() for _ in range(4)]
    well = feed(decoder, VectorIsa.PORTABLE, sequences, chunk=23)
    decoder.embedding[0, 5] = 0x7FC0  # NaN
    sequences[2][70] = 0
    for isa in sets_of(library):
        found = feed(decoder, isa, sequences, chunk=150)
        assert np.isnan(found[2][70:]).all(axis=1).all()
        assert found[2][:70].tobytes() == well[2][:70].tobytes()
        for index in (0, 1, 3):
            assert found[index].tobytes() == well[index].tobytes(), isa.name


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (192, 96), (576, 64)])
def test_a_product_is_near_double_precision_and_the_same_everywhere(
    library: NativeLibrary, rows: int, inputs: int, outputs: int
) -> None:
    random = np.random.default_rng(rows)
    linear = Linear.random(random, inputs, outputs, 8, bias=False)
    x = (random.normal(0, 1, (rows, inputs)) * 10.0 ** random.uniform(-3, 3, (rows, 1))).astype(np.float32)
    x[:, 5] *= 100  # one large number in each row
    got = {isa: product(library, linear, x, isa) for isa in sets_of(library)}
    expected = x.astype(float) @ linear.weight.T
    portable = got[VectorIsa.PORTABLE]
    assert (np.abs(portable - expected).max(axis=1) < 1e-3 * np.abs(expected).max(axis=1)).all()
    assert {y.tobytes() for y in got.values()} == {portable.tobytes()}
    alone = np.concatenate([product(library, linear, row[None], max(got)) for row in x])
    assert alone.tobytes() == portable.tobytes()


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_row_with_a_number_that_is_none_is_not_finite_and_harms_no_other(
    library: NativeLibrary, broken: float
) -> None:
    random = np.random.default_rng(0)
    linear = Linear.random(random, 128, 64, 8, bias=False)
    x = random.normal(0, 1, (9, 128)).astype(np.float32)
    for isa in sets_of(library):
        whole = product(library, linear, x, isa)
        sick = x.copy()
        sick[4, 100] = broken
        got = product(library, linear, sick, isa)
        assert not np.isfinite(got[4]).any()
        others = [row for row in range(9) if row != 4]
        assert got[others].tobytes() == whole[others].tobytes()


def test_zeros_and_numbers_too_small_to_matter_give_zeros(library: NativeLibrary) -> None:
    linear = Linear.random(np.random.default_rng(0), 64, 32, 8, bias=False)
    x = np.zeros((2, 64), dtype=np.float32)
    x[1] = 1e-38
    for isa in sets_of(library):
        assert not product(library, linear, x, isa).any()


def product(library: NativeLibrary, linear: Linear, x: Array, isa: VectorIsa) -> Array:
    outputs, inputs = linear.weight.shape
    y = np.full((len(x), outputs), np.nan, dtype=np.float32)
    x = np.ascontiguousarray(x)
    call = library.function("loramux_exact_product")
    call(at(y), at(x), at(linear.codes), at(linear.scales), len(x), inputs, outputs, isa, 2)
    return y


@pytest.mark.skipif(native_library() is None, reason="there are no compiled kernels")
def test_a_product_and_a_sum_are_rounded_once_on_every_instruction_set() -> None:
    """Also where a sum in double, rounded to a float, would be rounded twice: next to the middle of two floats."""
    library = native_library()
    assert library is not None
    cases = []  # c + x * a
    for step in range(128):
        a = np.float32(1 + step / 128)  # a number of bf16
        x = np.float32(2) / a
        beside = Fraction(float(x)) * Fraction(float(a)) / 2 - 1
        if 0 < abs(beside) <= Fraction(1, 2**30):
            c = 1.0 if beside > 0 else 1 + 2.0**-23
            cases += [(c, float(x) * 2.0**-25, float(a)), (c * 2.0**-127, float(x) * 2.0**-80, float(a) * 2.0**-71)]
            assert np.float32(np.float64(x * np.float32(2.0**-25)) * np.float64(a) + c) != 1 + 2.0**-23, "no such case"
    assert len(cases) >= 4
    for c, x, a in cases:
        inputs, arena = (
            torch.zeros(1, 32),
            Arena(torch.zeros(8, 32).bfloat16(), torch.zeros(8, 16).bfloat16(), torch.ones(1, dtype=torch.uint8)),
        )
        inputs[0, 0], inputs[0, 16], arena.a[0, 0], arena.a[0, 16], arena.bt[0] = c, x, 1.0, a, 1.0
        rows = LoraRows.build([((ScaledSlot(Slot(0, 8)),), 1)])
        assert rows is not None
        found = []
        for isa in library.isas:
            y = torch.zeros(1, 16)
            NativeAddLora(Compiled(library, isa))(y, inputs, arena, rows)
            found.append(float(y[0, 0]))
        assert len(set(found)) == 1, (c, x, a, found)
        if c >= 1:  # the others are below the normal floats
            assert found[0] == 1 + 2.0**-23, (c, x, a, found)
