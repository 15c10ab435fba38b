"""The kernels of exact integers: right, and the same bits on every instruction set, alone and in company."""

from __future__ import annotations

import numpy as np
import pytest

from loramux_server.kernels.abi import VectorIsa
from loramux_server.kernels.native import NativeLibrary, native_library
from support.exact_models import TILE, Array, Decoder, Linear, Row, Shape, at

SHAPES = {
    "Llama": Shape(),
    "Qwen2": Shape(bias=True),
    "Qwen3": Shape(qk_norm="head", head_dim=64),
    "Mistral": Shape(window=11),
    "Gemma 2": Shape(post_norms=True, gelu=True, softcap=8.0, logit_softcap=3.0, embedding_factor=11.3),
    "Gemma 3": Shape(post_norms=True, gelu=True, qk_norm="head", window=9, head_dim=96, heads=2, kv_heads=1),
    "Phi-3": Shape(fused=True),
    "Granite": Shape(residual_factor=0.22, logit_factor=0.125, embedding_factor=12.0),
    "OLMo 2": Shape(pre_norms=False, post_norms=True, qk_norm="whole"),
    "SmolLM3": Shape(rotary=False, heads=9, kv_heads=3, head_dim=64, hidden=192),
    "many heads": Shape(heads=28, kv_heads=2, head_dim=16, hidden=64),
    "long heads": Shape(heads=2, kv_heads=2, head_dim=256, hidden=64),
}
ADAPTERS: list[tuple[tuple[int, int, float], ...]] = [
    (),
    ((0, 8, 1.0),),
    ((8, 16, 0.5),),
    ((0, 8, 1.0), (24, 8, -2.0)),
]


@pytest.fixture(scope="module")
def library() -> NativeLibrary:
    found = native_library()
    if found is None:
        pytest.skip("there are no compiled kernels")
    return found


def sets_of(library: NativeLibrary) -> list[VectorIsa]:
    found = library.function("loramux_exact_isas")()
    return [isa for isa in VectorIsa if found & 1 << isa]


def feed(decoder: Decoder, isa: VectorIsa, sequences: list[list[int]], chunk: int, threads: int = 1) -> list[Array]:
    """Logits of every token of each sequence; `chunk` tokens of each go into a step, all sequences together."""
    width = -(-max(map(len, sequences)) // TILE)
    tables = np.arange(len(sequences) * width, dtype=np.int32).reshape(len(sequences), width)[::-1].copy()
    cache = decoder.cache(len(sequences) * width)
    logits: list[list[Array]] = [[] for _ in sequences]
    for first in range(0, max(map(len, sequences)), chunk):
        rows = [
            Row(token, first + offset, index, ADAPTERS[index % len(ADAPTERS)])
            for index, tokens in enumerate(sequences)
            for offset, token in enumerate(tokens[first : first + chunk])
        ]
        got = decoder.run(isa, cache, rows, list(range(len(rows))), tables, threads)
        for row, its in zip(rows, got, strict=True):
            logits[row.sequence].append(its)
    return [np.stack(each) for each in logits]


def sequences_of(shape: Shape) -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(0, shape.vocabulary, length).tolist() for length in (37, 5, 16, 23, 1)]


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
