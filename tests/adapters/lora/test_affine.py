"""Magnitudes and biases beside the pairs of an adapter: what is read of them, what is refused, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux_adapters.artifact.format import WEIGHTS_FILE, digest_of, read_config
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterRejected, VectorsNotServed
from loramux_adapters.lora.verify import check_adapter
from loramux_adapters.lora.weights import load_host_adapter
from loramux_adapters.store.store import AdapterStore
from support.adapter_files import TINY_LINEARS, write_adapter

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
NORM = "model.layers.0.input_layernorm"


class Weights:
    """A base of dense weights; the queries have a bias."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.of = {
            path: torch.randn(outputs, inputs, generator=generator) for path, (inputs, outputs) in TINY_LINEARS.items()
        }
        self.own = torch.randn(TINY_LINEARS[QUERY][1], generator=generator)

        self.tokens = None
        self.vectors = True

    def __contains__(self, module: object) -> bool:
        return module in self.of

    def norms(self, module: str, a: torch.Tensor, bt: torch.Tensor) -> torch.Tensor:
        return (self.of[module] + bt.t() @ a).norm(dim=1)

    def bias(self, module: str) -> torch.Tensor | None:
        return self.own if module == QUERY else None


WEIGHTS = Weights()
BASE = BaseInfo(
    "aa" * 32, TINY_LINEARS, lambda name, tensor: name == f"{NORM}.bias" and not tensor.any(), weights=WEIGHTS
)
Tensors = dict[str, torch.Tensor]


def adapter(
    directory: Path,
    change: Callable[[Tensors], None],
    targets: tuple[str, ...] = ("q_proj", "down_proj"),
    **config: Any,
) -> Path:
    write_adapter(directory, TINY_LINEARS, targets=targets, rank=4, std_b=0.3, extra_config=config)
    tensors = load_file(directory / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, directory / WEIGHTS_FILE)
    return directory


def name_of(module: str, end: str) -> str:
    return f"base_model.model.{module}.{end}"


def with_magnitudes(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        tensors[name_of(module, "lora_magnitude_vector")] = WEIGHTS.of[module].norm(dim=1) * 1.25


def reasons_for(directory: Path, base: BaseInfo = BASE) -> list[str]:
    with pytest.raises(AdapterRejected) as caught:
        check_adapter(directory, base, 64)
    return caught.value.reasons


@pytest.mark.parametrize("scheme", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora_gives_each_output_its_magnitude(tmp_path: Path, scheme: str) -> None:
    def change(tensors: Tensors) -> None:
        with_magnitudes(tensors)
        for name in [name for name in tensors if name.endswith("lora_magnitude_vector")]:
            tensors[name.replace("lora_magnitude_vector", scheme)] = tensors.pop(name)

    directory = adapter(tmp_path, change, use_dora=True)
    checked = check_adapter(directory, BASE, 64)
    loaded = load_host_adapter(directory, None, WEIGHTS)
    assert checked.version == loaded.version == digest_of(read_config(directory), directory)
    assert any(note.startswith("DoRA") for note in checked.notes)
    assert loaded.affine.keys() == loaded.modules.keys()
    for module, (a, bt) in loaded.modules.items():
        gain, shift = loaded.affine[module]
        assert torch.equal(loaded.affine[module], checked.adapter.affine[module])
        changed = (1 + gain)[:, None] * WEIGHTS.of[module] + bt.float().t() @ a.float()
        wanted = 1.25 * WEIGHTS.of[module].norm(dim=1)
        assert torch.allclose(changed.norm(dim=1), wanted, rtol=2e-3), module
        own = WEIGHTS.bias(module)
        if own is None:
            assert not shift.any()
        else:  # the bias itself is not scaled
            assert torch.allclose((1 + gain) * own + shift, own, atol=1e-5)
    expected = sum(part.nbytes for pair in loaded.modules.values() for part in pair)
    assert loaded.nbytes == expected + sum(part.nbytes for part in loaded.affine.values())


def test_whatever_a_vector_says_is_part_of_the_version(tmp_path: Path) -> None:
    def doubled(tensors: Tensors) -> None:
        with_magnitudes(tensors)
        tensors[name_of(DOWN, "lora_magnitude_vector")] *= 2

    plain = write_adapter(tmp_path / "0", TINY_LINEARS, targets=["q_proj", "down_proj"], rank=4, std_b=0.3)
    one = adapter(tmp_path / "1", with_magnitudes, use_dora=True)
    other = adapter(tmp_path / "2", doubled, use_dora=True)
    versions = [digest_of(read_config(each), each) for each in (plain, one, other)]
    assert len(set(versions)) == 3
    assert versions == [load_host_adapter(each, None, WEIGHTS).version for each in (plain, one, other)]


def test_a_bias_of_lora_b_counts_as_often_as_b(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("lora_B.weight")]:
            tensors[name.replace("weight", "bias")] = torch.arange(tensors[name].shape[0], dtype=torch.float16)

    directory = adapter(tmp_path, change, lora_bias=True)  # alpha 16, rank 4
    loaded = load_host_adapter(directory, None, WEIGHTS)
    for module, affine in loaded.affine.items():
        gain, shift = affine
        assert not gain.any() and torch.equal(shift, 4.0 * torch.arange(TINY_LINEARS[module][1])), module
    assert check_adapter(directory, BASE, 64).adapter.affine.keys() == loaded.modules.keys()


def test_trained_biases_take_the_place_of_the_base_s_own(tmp_path: Path) -> None:
    bias = torch.linspace(-1, 1, TINY_LINEARS[QUERY][1])

    def change(tensors: Tensors) -> None:
        tensors[name_of(QUERY, "base_layer.bias")] = bias
        tensors[name_of(NORM, "bias")] = torch.zeros(64)  # as the base has it

    for kind in ("all", "lora_only"):
        directory = adapter(tmp_path / kind, change, targets=("down_proj",), bias=kind)
        checked = check_adapter(directory, BASE, 64)
        assert checked.adapter.affine.keys() == {QUERY}
        gain, shift = checked.adapter.affine[QUERY]
        assert not gain.any() and torch.allclose(WEIGHTS.own + shift, bias)
        assert load_host_adapter(directory, None, WEIGHTS).version == checked.version


def test_biases_that_are_all_as_they_were_cost_nothing(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[name_of(QUERY, "base_layer.bias")] = WEIGHTS.own.clone()

    assert not check_adapter(adapter(tmp_path, change, bias="all"), BASE, 64).adapter.affine


def put(module: str, end: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name_of(module, end)] = value

    return change


def both(*changes: Callable[[Tensors], None]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for each in changes:
            each(tensors)

    return change


def without(end: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name_of(QUERY, end)]

    return change


QUERIES = TINY_LINEARS[QUERY][1]


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        ({}, with_magnitudes, "has a DoRA magnitude (use_dora), and use_dora is not true in the config"),
        ({"use_dora": True}, lambda tensors: None, "lacks a DoRA magnitude"),
        ({"use_dora": True}, both(with_magnitudes, without("lora_B.weight")), "has lora_A but no lora_B"),
        (
            {"use_dora": True},
            both(with_magnitudes, put("model.layers.0.self_attn.v_proj", "lora_magnitude_vector", torch.ones(32))),
            "has a DoRA magnitude (use_dora) but no lora_A and lora_B",
        ),
        (
            {"use_dora": True},
            both(with_magnitudes, put(QUERY, "lora_magnitude_vector", torch.ones(QUERIES + 1))),
            f"is of shape [{QUERIES + 1}], the base has {QUERIES} outputs there",
        ),
        (
            {"use_dora": True},
            both(with_magnitudes, put(QUERY, "lora_magnitude_vector", torch.full((QUERIES,), torch.inf))),
            "has values that are not finite",
        ),
        ({"use_dora": True, "lora_bias": True}, with_magnitudes, "lora_bias is true beside use_dora"),
        ({}, put(QUERY, "lora_B.bias", torch.ones(QUERIES)), "lora_bias is not true in the config"),
        ({"lora_bias": True}, put(QUERY, "lora_B.bias", torch.ones(QUERIES)), "lacks a bias of lora_B"),
        ({"bias": "all"}, put(DOWN, "base_layer.bias", torch.ones(64)), "is a bias, and the base has none there"),
        ({"bias": "all"}, put(NORM, "bias", torch.ones(64)), "a trained bias of what is no linear layer"),
        ({}, put(QUERY, "base_layer.bias", torch.ones(QUERIES)), "neither a LoRA weight nor a copy of the base's"),
        ({"bias": "all"}, put(QUERY, "base_layer.bias", torch.full((QUERIES,), torch.nan)), "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, config: dict[str, Any], change: Callable[[Tensors], None], reason: str
) -> None:
    assert any(reason in found for found in reasons_for(adapter(tmp_path, change, **config)))


def test_without_the_base_s_weights_it_is_refused_and_others_are_not(tmp_path: Path) -> None:
    elsewhere = replace(BASE, weights=None)
    (reason,) = reasons_for(adapter(tmp_path / "dora", with_magnitudes, use_dora=True), elsewhere)
    assert "start it with --adapter-vectors" in reason
    with pytest.raises(AdapterRejected, match="start it with --adapter-vectors"):
        load_host_adapter(tmp_path / "dora")
    plain = write_adapter(tmp_path / "plain", TINY_LINEARS, extra_config={"bias": "all"})
    assert not check_adapter(plain, elsewhere, 64).adapter.affine


def test_an_adapter_that_only_scales_is_not_told_to_change_nothing(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        with_magnitudes(tensors)
        for name in tensors:
            if "lora_B" in name:
                tensors[name].zero_()

    notes = check_adapter(adapter(tmp_path, change, use_dora=True), BASE, 64).notes
    assert not any("changes nothing" in note or "change nothing" in note for note in notes)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"])
def test_inits_that_take_from_the_base_are_refused_with_how_to_convert(tmp_path: Path, name: str) -> None:
    (reason,) = reasons_for(write_adapter(tmp_path, TINY_LINEARS, extra_config={"init_lora_weights": name}))
    assert "init_lora_weights is" in reason and "path_initial_model_for_weight_conversion" in reason


def test_loftq_of_one_round_is_a_difference_to_the_base_in_nf4(tmp_path: Path) -> None:
    for rounds, taken in ((1, True), (5, False)):
        loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": rounds}}
        directory = write_adapter(tmp_path / str(rounds), TINY_LINEARS, extra_config=loftq)
        if taken:
            assert any("LoftQ" in note for note in check_adapter(directory, BASE, 64).notes)
        else:
            assert "loftq" in reasons_for(directory)[0]


def test_a_stored_version_that_this_device_cannot_serve_is_not_taken_for_damaged(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    try:
        with store.stage() as staging:
            adapter(staging.directory, with_magnitudes, use_dora=True)
            version = store.publish("dora", staging, rank=4, base_id=None, target_modules=["q_proj"]).version
        with pytest.raises(VectorsNotServed, match="start it with --adapter-vectors"):
            store.load(version)
        assert store.load(version, None, WEIGHTS).version == version
    finally:
        store.close()
