from __future__ import annotations

from collections.abc import Iterable

import pytest

from loramux_adapters.artifact.config import parse_config
from loramux_adapters.artifact.coverage import coverage_of, in_words
from support.adapter_files import config_bytes

LINEARS = [
    *(f"model.layers.{layer}.{name}" for layer in range(6) for name in ("attn.q_proj", "attn.v_proj", "mlp.up_proj")),
    "lm_head",
]
BOTH = ["q_proj", "v_proj"]


def notes(modules: Iterable[str], **config: object) -> tuple[object, list[str]]:
    found = coverage_of([*modules], parse_config(config_bytes(**config)), LINEARS)
    return found.layers, found.notes


def modules(names: Iterable[str], layers: Iterable[int]) -> list[str]:
    numbers = [*layers]
    return [module for module in LINEARS if module.split(".")[-1] in names and int(module.split(".")[2]) in numbers]


def test_all_layers_need_no_word_whatever_is_adapted_in_them() -> None:
    assert notes(modules(["q_proj"], range(6))) == ((6, 6), [])
    assert notes(modules(["q_proj"], range(6)), target_modules=None) == ((6, 6), [])
    assert notes([*LINEARS], target_modules=".*") == ((6, 6), [])


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": BOTH, "layers_to_transform": [4, 5]},
        {"target_modules": r"model\.layers\.[45]\.attn\.[qv]_proj"},
        {"target_modules": [f"model.layers.{layer}.attn.{name}" for layer in (4, 5) for name in BOTH]},
        {"target_modules": BOTH, "exclude_modules": r".*layers\.[0-3]\..*"},
    ],
)
def test_layers_that_the_config_leaves_out_are_said_to_be_so(config: dict[str, object]) -> None:
    layers, said = notes(modules(BOTH, [4, 5]), **config)
    assert layers == (2, 6) and said == ["2 of 6 layers carry weights, as the config says: layers 4 to 5"]


def test_layers_that_the_config_wants_and_the_file_does_not_hold_are_named() -> None:
    layers, said = notes(modules(BOTH, [0, 1, 3]), target_modules=BOTH)
    assert layers == (3, 6)
    assert said == ["3 of 6 layers carry weights: the config leaves none out, but there are none for layers 2, 4 to 5"]
    assert notes(modules(BOTH, [0, 1, 3]), target_modules=None)[1] == said


def test_modules_that_are_missing_in_layers_that_carry_others_are_named_with_the_layers() -> None:
    there = {*modules(BOTH, range(6))} - {"model.layers.3.attn.q_proj", "model.layers.5.attn.q_proj"}
    assert notes(there, target_modules=BOTH) == ((6, 6), ["attn.q_proj has no weights in layers 3, 5"])


def test_the_output_layer_is_in_no_layer() -> None:
    assert notes(["lm_head"], target_modules=["lm_head"]) == (
        (0, 6),
        ["0 of 6 layers carry weights, as the config says"],
    )


def test_a_base_without_numbered_layers_has_no_count() -> None:
    found = coverage_of(["a.b"], parse_config(config_bytes()), ["a.b", "a.c"])
    assert (found.layers, found.notes) == (None, [])


def test_patterns_that_take_too_long_cost_the_note_alone() -> None:
    config = parse_config(config_bytes(target_modules="(a|a)*b|(.*x)*y|model.*"))
    config.rule.targets._budget._seconds = 0  # type: ignore[union-attr]
    assert coverage_of(modules(BOTH, [1]), config, LINEARS).layers == (1, 6)


def test_numbers_in_words() -> None:
    assert in_words({3, 0, 1, 2, 7, 9}) == "layers 0 to 3, 7, 9"
    assert in_words({4}) == "layer 4"
    assert in_words(range(0, 100, 2)).endswith("14 and more")
