"""Chunks and temperature of attention, as transformers computes them for one text alone."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loramux_server.errors import BaseModelError
from loramux_server.kernels.attention.by_position import Temperature, chunk_of, temperature_of
from loramux_server.kernels.attention.paged_attention import use_eager_attention, use_our_attention
from support.tiny_models import tiny_config


def test_factors_follow_positions_and_not_places_in_the_batch() -> None:
    factors = Temperature(0.5, 8).factors(torch.tensor([0, 6, 7, 14, 15, 300, 6], dtype=torch.int32))
    expected = [1.0, 1.0, *(1 + 0.5 * math.log1p(step) for step in (1, 1, 2, 37)), 1.0]
    assert factors.dtype == torch.float32
    assert torch.equal(factors, torch.tensor(expected, dtype=torch.float32))


def test_transformers_own_temperature_is_switched_off_and_on_again() -> None:
    model: Any = AutoModelForCausalLM.from_config(tiny_config("llama4_text"))
    layers = [layer.self_attn for layer in model.model.layers]
    assert [temperature_of(each) for each in layers] == [None] * 3
    for _ in range(2):  # once more changes nothing
        use_our_attention(model)
        assert [each.attn_temperature_tuning for each in layers] == [True, False, True], "used without rotation alone"
        assert [temperature_of(each) for each in layers] == [None, Temperature(0.5, 8), None]
    use_eager_attention(model)
    assert all(each.attn_temperature_tuning for each in layers)
    assert [temperature_of(each) for each in layers] == [None] * 3


def test_a_layer_sees_chunks_where_its_config_says_so() -> None:
    kinds = ["chunked_attention", "full_attention"]
    config = SimpleNamespace(layer_types=kinds, attention_chunk_size=20)
    found = [chunk_of(SimpleNamespace(config=config, layer_idx=layer)) for layer in range(2)]
    assert found == [20, 0]
    assert chunk_of(SimpleNamespace()) == chunk_of(SimpleNamespace(config=SimpleNamespace(), layer_idx=0)) == 0
    config.attention_chunk_size = 0
    with pytest.raises(BaseModelError, match="attention_chunk_size is 0"):
        chunk_of(SimpleNamespace(config=config, layer_idx=0))
