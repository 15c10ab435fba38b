from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from loramux_adapters.artifact.config import parse_config
from support.adapter_files import TINY_LINEARS, config_bytes

MODULES = [
    *TINY_LINEARS,
    "model.layers.1.layers.2.q_proj",
    "encoder.h.1.q_proj",
    "layers.1.q_proj",
    "q_proj",
    "xq_proj",
]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["self_attn.q_proj"]},
        {"target_modules": []},
        {"target_modules": ["proj"]},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"target_modules": "q_proj"},
        {"target_modules": r"^(model(?=\.).*\.(q_proj|v_proj))$"},
        {"target_modules": r"^(?!.*encoder).*(q_proj)", "exclude_modules": r"(?!model\.).*"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj", "v_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj", "model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []},
    ],
)
def test_a_module_is_a_target_where_peft_says_so(fields: dict[str, Any]) -> None:
    rule = parse_config(config_bytes(**fields)).rule
    peft_config = SimpleNamespace(
        **{
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "target_parameters": None,
            **fields,
        }
    )
    for module in MODULES:
        assert rule.matches(module) == bool(check_target_module_exists(peft_config, module)), module


def test_all_linear_leaves_the_output_layer_out() -> None:
    rule = parse_config(config_bytes(target_modules="ALL-linear")).rule
    assert rule.matches("model.layers.0.mlp.up_proj") and not rule.matches("lm_head")


def test_without_targets_whatever_the_file_holds_is_meant() -> None:
    rule = parse_config(config_bytes(target_modules=None)).rule
    assert rule.matches("lm_head") and rule.matches("model.layers.0.mlp.up_proj")
