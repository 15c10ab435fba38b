"""Angles of rotary positions: right to the last bit of fp32, and the same whatever PyTorch's own functions give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig
from transformers.models.cohere.modeling_cohere import CohereRotaryEmbedding
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama4 import modeling_llama4

from loramux_server.errors import BaseModelError
from loramux_server.kernels.compiled.library import NativeLibrary, native_library
from loramux_server.kernels.layers.rotary import LONG, Angles, Turn, settle_angles, tables_of, use_angles

LONGEST = 1 << 20
SCALED: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
]


@pytest.fixture(scope="module")
def library() -> NativeLibrary:
    found = native_library()
    if found is None:
        pytest.skip("there are no compiled kernels")
    return found


def module_of(rope: dict[str, Any], head_dim: int = 96) -> Any:
    config = AutoConfig.for_model("llama", head_dim=head_dim, max_position_embeddings=131072, rope_parameters=rope)
    return LlamaRotaryEmbedding(config)


def exactly(positions: NDArray[Any], inv_freq: NDArray[Any], factor: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """cos and sin in extended precision, in which position times frequency is exact."""
    angles = positions.astype(np.longdouble)[:, None] * inv_freq.astype(np.longdouble)
    return np.cos(angles) * factor, np.sin(angles) * factor


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="there is no extended precision here to compare with")
@pytest.mark.parametrize("factor", [1.0, 1.1386294])
def test_angles_are_the_nearest_numbers_of_fp32_up_to_a_million_positions(
    library: NativeLibrary, factor: float
) -> None:
    frequencies = (1 / 10000.0 ** (np.arange(40) / 40)).astype(np.float32)
    call = library.function("loramux_exact_angles")
    for first in (0, 777, 40000, 131072 - 300, LONGEST // 3, LONGEST - 600):
        cos, sin = torch.full((600, 40), 9.0), torch.full((600, 40), 9.0)
        place = torch.from_numpy(frequencies).data_ptr()
        call(cos.data_ptr(), sin.data_ptr(), place, first, 600, 40, factor)
        exact = exactly(np.arange(first, first + 600), frequencies, factor)
        for ours, expected in zip((cos.numpy(), sin.numpy()), exact, strict=True):
            half = np.spacing(np.abs(ours)).astype(np.longdouble) / 2
            assert (np.abs(ours - expected) <= half * 1.000001).all()
            assert (ours == expected.astype(np.float32)).mean() > 0.9999


@pytest.mark.parametrize("rope", SCALED, ids=[f"{rope['rope_type']} {rope['rope_theta']:.0f}" for rope in SCALED])
def test_a_module_gives_its_models_angles(library: NativeLibrary, rope: dict[str, Any]) -> None:
    ours, own = module_of(rope), module_of(rope)
    use_angles(ours, library)
    positions = torch.tensor([[5, 0, 700, 3, 2000]])
    for got, expected in zip(ours(torch.empty(1), positions), own(torch.empty(1), positions), strict=True):
        assert got.shape == expected.shape == (1, 5, 96)
        assert torch.allclose(got, expected, rtol=0, atol=1e-3)  # its own products are rounded to fp32
    half, _ = ours(torch.empty(1, dtype=torch.bfloat16), positions)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("rope", SCALED, ids=[f"{rope['rope_type']} {rope['rope_theta']:.0f}" for rope in SCALED])
def test_the_last_bit_of_pytorchs_powers_does_not_matter(
    library: NativeLibrary, rope: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is another one on processors with AVX2 than on those with AVX-512."""
    plain = module_of(rope)
    use_angles(plain, library)
    powers = torch.Tensor.__rpow__

    def others(exponent: torch.Tensor, base: float) -> torch.Tensor:
        return powers(exponent, base) * (1 + 2**-23 * (torch.arange(len(exponent)) % 2))

    monkeypatch.setattr(torch.Tensor, "__rpow__", others)
    odd = module_of(rope)
    monkeypatch.undo()
    assert not torch.equal(odd.inv_freq, plain.inv_freq)
    use_angles(odd, library)
    positions = torch.arange(100)[None]
    for ours, theirs in zip(odd(torch.empty(1), positions), plain(torch.empty(1), positions), strict=True):
        assert torch.equal(ours, theirs)


def test_frequencies_that_a_checkpoint_brings_are_kept(library: NativeLibrary) -> None:
    module = module_of(SCALED[0])
    module.inv_freq *= 1.01
    use_angles(module, library)
    cos, _ = module(torch.empty(1), torch.tensor([[1]]))
    assert torch.allclose(cos[0, 0, :48], module.inv_freq.double().cos().float(), rtol=0, atol=1e-7)


def test_each_kind_of_layer_has_its_own_table(library: NativeLibrary) -> None:
    config = AutoConfig.for_model("gemma3_text", head_dim=64)
    ours, own = Gemma3RotaryEmbedding(config), Gemma3RotaryEmbedding(config)
    use_angles(ours, library)
    tables = tables_of(ours)
    assert tables is not None and set(tables) == {"full_attention", "sliding_attention"}
    positions = torch.arange(200)[None]
    for kind in tables:
        for got, expected in zip(
            ours(torch.empty(1), positions, kind), own(torch.empty(1), positions, kind), strict=True
        ):
            assert torch.allclose(got, expected, rtol=0, atol=1e-4)


def test_a_table_that_grew_has_the_bits_of_one_made_at_once(library: NativeLibrary) -> None:
    inv_freq = module_of(SCALED[0]).inv_freq
    grown, whole = Angles(library, inv_freq, 1.0), Angles(library, inv_freq, 1.0)
    for count in (1, 3, 4, 100, 90, 1000):
        grown.know(count)
    whole.know(1024)
    assert len(grown.cos) == 1024  # the next power of two
    assert torch.equal(grown.cos, whole.cos) and torch.equal(grown.sin, whole.sin)


def test_a_few_positions_far_out_have_the_bits_of_a_table_and_make_none(library: NativeLibrary) -> None:
    inv_freq = module_of(SCALED[0]).inv_freq
    few, table = Angles(library, inv_freq, 1.5), Angles(library, inv_freq, 1.5)
    table.know(1000)
    positions = torch.tensor([[999, 0, 513]])
    for ours, expected in zip(few.at(positions), (table.cos, table.sin), strict=True):
        assert torch.equal(ours, expected[positions])
    assert len(few.cos) == 0
    many = torch.arange(100)
    assert torch.equal(few.at(many)[0], table.cos[:100]) and len(few.cos) == 128


def test_positions_whose_angles_would_not_be_exact_are_refused(library: NativeLibrary) -> None:
    table = Angles(library, torch.tensor([1e5]), 1.0)
    table.know(16)
    assert len(table.cos) == 16
    with pytest.raises(BaseModelError, match="position 99 is beyond the 16 that have exact angles here"):
        table.know(100)


def test_dynamic_frequencies_are_those_of_the_longest_text_and_other_modules_are_left_alone(
    library: NativeLibrary,
) -> None:
    dynamic = module_of({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    plain = module_of({"rope_type": "default", "rope_theta": 10000.0})
    positions = torch.arange(50)[None]
    for module in (dynamic, plain):
        use_angles(module, library)
    x = torch.zeros(1)
    assert all(torch.equal(*parts) for parts in zip(dynamic(x, positions), plain(x, positions), strict=True))
    other = nn.Linear(2, 2)
    use_angles(other, library)
    assert tables_of(other) is None and "forward" not in other.__dict__


def test_frequencies_of_long_texts_are_taken_row_by_row(library: NativeLibrary) -> None:
    module = module_of(
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + i / 10 for i in range(48)],
            "long_factor": [3.0 + i for i in range(48)],
            "original_max_position_embeddings": 64,
        }
    )
    x, places = torch.zeros(1), torch.arange(100)[None]
    theirs_long, theirs_short = module(x, places), module(x, places[:, :40])
    use_angles(module, library)
    assert tables_of(module) is None
    mixed = torch.cat([places + LONG, places[:, :40]], dim=1)
    for ours, long, short in zip(module(x, mixed), theirs_long, theirs_short, strict=True):
        assert torch.allclose(ours, torch.cat([long, short], dim=1), atol=2e-5)
        assert not torch.allclose(long[:, :40], short, atol=0.1)
    alone = module(x, places[:, :40])
    assert all(torch.equal(part[:, 100:], own) for part, own in zip(module(x, mixed), alone, strict=True))
    assert settle_angles(module, 65) == 64 and tables_of(module) is None
    assert settle_angles(module, 64) == 0 and tables_of(module) is not None
    assert all(torch.equal(*parts) for parts in zip(module(x, places[:, :40]), alone, strict=True))


def test_a_second_time_changes_nothing(library: NativeLibrary) -> None:
    module = module_of(SCALED[0])
    use_angles(module, library)
    tables = tables_of(module)
    use_angles(module, library)
    assert tables_of(module) is tables


def test_angles_that_lie_twice_in_a_row_stay_so_and_an_unknown_order_is_refused(library: NativeLibrary) -> None:
    """Cohere's turn neighbours; a table of halves would be wrong for them, and none would notice."""
    config = AutoConfig.for_model("cohere", hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    own, module = CohereRotaryEmbedding(config), CohereRotaryEmbedding(config)
    use_angles(nn.Sequential(module), library)
    x, positions = torch.zeros(1), torch.arange(40)[None]
    for ours, theirs in zip(module(x, positions), own(x, positions), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)

    class Backwards(CohereRotaryEmbedding):
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
            return tuple(part.flip(-1) * torch.arange(part.shape[-1]) for part in super().forward(x, position_ids))

    with pytest.raises(BaseModelError, match=r"Backwards gives angles in an order"):
        use_angles(nn.Sequential(Backwards(config)), library)


@pytest.mark.parametrize(
    ("family", "module", "rotate"),
    [
        ("deepseek_v2", modeling_deepseek_v2.DeepseekV2RotaryEmbedding, modeling_deepseek_v2.apply_rotary_emb),
        ("llama4_text", modeling_llama4.Llama4TextRotaryEmbedding, modeling_llama4.apply_rotary_emb),
    ],
)
def test_complex_angles_turn_by_real_products_and_a_row_has_its_bits_at_any_place(
    library: NativeLibrary, family: str, module: Any, rotate: Any
) -> None:
    config = AutoConfig.for_model(family, rope_parameters=SCALED[3], qk_rope_head_dim=6, head_dim=6)
    ours, own = module(config), module(config)
    use_angles(ours, library)
    positions = torch.tensor([[5, 0, 700, 3, 2000, 9, 8]])
    turn, angles = ours(torch.empty(1), positions), own(torch.empty(1), positions)
    assert isinstance(turn, Turn) and angles.is_complex() and turn.cos.dtype == torch.float32
    rows, generator = positions.shape[1], torch.Generator().manual_seed(2)
    shape = (1, 1, rows, 6) if family == "deepseek_v2" else (1, rows, 1, 6)  # where heads stand
    x = torch.randn(shape, generator=generator)
    got, expected = rotate(x, 2 * x, turn), rotate(x, 2 * x, angles)
    for first, second in zip(got, expected, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=2e-4)  # their angles are rounded products
    re, im = x[..., 0::2].flatten(0, -2), x[..., 1::2].flatten(0, -2)
    exact = torch.stack([re * turn.cos[0] - im * turn.sin[0], re * turn.sin[0] + im * turn.cos[0]], -1)
    assert torch.equal(got[0].flatten(0, -2), exact.flatten(1))
    for row in range(rows):
        place = x.select(x.dim() - 2 if family == "deepseek_v2" else 1, row).reshape(1, 1, 1, 6)
        alone, _ = rotate(place, place, ours(torch.empty(1), positions[:, row : row + 1]))
        assert torch.equal(alone.flatten(), exact[row].flatten())
