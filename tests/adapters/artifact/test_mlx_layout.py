from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loramux_adapters.artifact import mlx_layout
from loramux_adapters.artifact.format import CONFIG_FILE, MLX_WEIGHTS_FILE, WEIGHTS_FILE, read_config, scale_of
from loramux_adapters.artifact.mlx_layout import _alpha, convert_mlx
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.verify import check_adapter
from support.adapter_files import TINY_LINEARS, write_adapter

BASE = BaseInfo("aa" * 32, TINY_LINEARS)
QV = ["self_attn.q_proj", "self_attn.v_proj"]
# As release 0.32 saves it: every option of the run.
RUN: dict[str, Any] = {
    "adapter_path": "adapters",
    "batch_size": 4,
    "clear_cache_threshold": 0,
    "config": None,
    "data": "mlx-community/WikiSQL",
    "fine_tune_type": "lora",
    "grad_checkpoint": False,
    "iters": 1000,
    "learning_rate": 1e-05,
    "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 20.0},
    "lr_schedule": None,
    "mask_prompt": False,
    "max_seq_length": 2048,
    "model": "Qwen/Qwen3-0.6b",
    "num_layers": 16,
    "optimizer": "adam",
    "optimizer_config": {"adam": {}},
    "report_to": None,
    "resume_adapter_file": None,
    "seed": 0,
    "test": False,
    "train": True,
}


def mlx_weights(names: Iterable[str] = QV, layers: Iterable[int] = (0, 1), rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in layers:
        for name in names:
            module = f"model.layers.{layer}.{name}"
            inputs, outputs = TINY_LINEARS.get(module, (64, 64))
            tensors[f"{module}.lora_a"] = torch.randn(inputs, rank, generator=generator)
            tensors[f"{module}.lora_b"] = torch.randn(rank, outputs, generator=generator)
    return tensors


def write_mlx(directory: Path, tensors: dict[str, torch.Tensor], file: str = MLX_WEIGHTS_FILE, **run: object) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / file)
    (directory / CONFIG_FILE).write_text(json.dumps(RUN | run, indent=4))
    return directory


def reasons_for(directory: Path) -> list[str]:
    with pytest.raises(AdapterRejected) as caught:
        convert_mlx(directory)
    return caught.value.reasons


@pytest.mark.parametrize("file", [MLX_WEIGHTS_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_converted_computes_what_mlx_lm_computes(tmp_path: Path, file: str, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in mlx_weights().items()}
    convert_mlx(write_mlx(tmp_path, tensors, file))
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    config, converted = read_config(tmp_path), load_file(tmp_path / WEIGHTS_FILE)
    assert len(converted) == len(tensors)
    for name, tensor in tensors.items():
        if name.endswith(".lora_a"):
            module = name.removesuffix(".lora_a")
            a = converted[f"base_model.model.{module}.lora_A.weight"]
            b = converted[f"base_model.model.{module}.lora_B.weight"]
            assert a.dtype == dtype and torch.equal(a.T, tensor) and torch.equal(b.T, tensors[f"{module}.lora_b"])
            assert scale_of(config, module, 4) == 20.0
    checked = check_adapter(tmp_path, BASE, 64)
    assert (checked.rank, checked.target_modules, checked.layers) == (4, ["q_proj", "v_proj"], (2, 2))
    assert checked.notes[0] == "converted from mlx-lm's layout: rank 4, scale 20 as alpha 80, weights in layers 0 to 1"
    assert config.base_model_name == "Qwen/Qwen3-0.6b"


@pytest.mark.parametrize("run", [{"fine_tune_type": "dora"}, {"fine_tune_type": None, "use_dora": True}])
def test_dora_of_mlx_lm_becomes_dora_of_peft(tmp_path: Path, run: dict[str, Any]) -> None:
    tensors = mlx_weights()
    magnitudes = {
        name.replace(".lora_a", ".m"): torch.linspace(1, 2, TINY_LINEARS[name.removesuffix(".lora_a")][1])
        for name in tensors
        if name.endswith(".lora_a")
    }
    convert_mlx(write_mlx(tmp_path, tensors | magnitudes, **run))
    config, converted = read_config(tmp_path), load_file(tmp_path / WEIGHTS_FILE)
    assert config.use_dora and len(converted) == len(tensors) + len(magnitudes)
    for name, magnitude in magnitudes.items():
        module = name.removesuffix(".m")
        assert torch.equal(converted[f"base_model.model.{module}.lora_magnitude_vector"], magnitude)
        assert torch.equal(converted[f"base_model.model.{module}.lora_A.weight"].T, tensors[f"{module}.lora_a"])
    assert config.notes[0].startswith("converted from mlx-lm's DoRA")


def test_large_weights_are_converted_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_layout, "_PIECE_BYTES", 100)
    test_what_is_converted_computes_what_mlx_lm_computes(tmp_path, WEIGHTS_FILE, torch.float32)
    monkeypatch.setattr(mlx_layout, "_MAX_TENSOR_BYTES", 1000)
    assert "has more than 1000 bytes" in reasons_for(write_mlx(tmp_path / "b", mlx_weights()))[0]


def test_a_converted_adapter_is_left_alone_and_keeps_its_note(tmp_path: Path) -> None:
    convert_mlx(write_mlx(tmp_path, mlx_weights()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    convert_mlx(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_last_layers_alone_are_said_to_be_what_the_config_asks_for(tmp_path: Path) -> None:
    convert_mlx(write_mlx(tmp_path, mlx_weights(layers=[1]), num_layers=1))
    checked = check_adapter(tmp_path, BASE, 64)
    assert checked.layers == (1, 2) and "as the config says: layer 1" in checked.notes[1]


def test_the_output_layer_and_keys_are_taken(tmp_path: Path) -> None:
    tensors = mlx_weights(["mlp.up_proj"]) | {"lm_head.lora_a": torch.ones(64, 4), "lm_head.lora_b": torch.ones(4, 96)}
    parameters = RUN["lora_parameters"] | {"keys": ["mlp.up_proj", "lm_head"]}
    convert_mlx(write_mlx(tmp_path, tensors, num_layers=-1, lora_parameters=parameters))
    assert check_adapter(tmp_path, BASE, 64).target_modules == ["lm_head", "up_proj"]


@given(scale=st.floats(1e-3, 1e3), rank=st.integers(1, 512))
def test_alpha_gives_the_scale_back(scale: float, rank: int) -> None:
    assert _alpha(scale, rank) / rank == pytest.approx(scale, rel=1e-15)
    if rank & (rank - 1) == 0:
        assert _alpha(scale, rank) / rank == scale


@pytest.mark.parametrize(
    ("parameters", "more", "factor"),
    [
        ({"rank": 4, "scale": 10.0, "alpha": 16}, {"num_layers": 16}, 10.0),  # 0.19 to 0.21: alpha is there, and unused
        ({"rank": 4, "scale": 10.0, "alpha": 16}, {"num_layers": 16, "lora_layers": 16}, 10.0),  # one key is unused too
        ({"rank": 4, "scale": 10.0, "alpha": 4}, {"lora_layers": 16}, 10.0),  # no difference
        ({"rank": 4, "scale": 10.0, "alpha": 16}, {"lora_layers": 16}, None),
    ],
)
def test_what_alpha_means_depends_on_the_release(
    tmp_path: Path, parameters: dict[str, Any], more: dict[str, Any], factor: float | None
) -> None:
    write_mlx(tmp_path, mlx_weights())
    run = {key: value for key, value in RUN.items() if key != "num_layers"} | more | {"lora_parameters": parameters}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(run))
    if factor is None:
        assert "scale 10.0 and alpha '16'" in reasons_for(tmp_path)[0]
    else:
        convert_mlx(tmp_path)
        assert scale_of(read_config(tmp_path), "x", 4) == factor


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type of mlx-lm is 'full'"),
        ({"lora_parameters": None}, "lora_parameters of mlx-lm's config is missing"),
        ({"lora_parameters": {"rank": 4, "alpha": 16}}, "scale in lora_parameters"),
        ({"lora_parameters": {"rank": 4, "scale": 10**400}}, "scale in lora_parameters"),
        ({"lora_parameters": {"rank": 4, "scale": 1e308}}, "scale in lora_parameters"),
        ({"lora_parameters": {"rank": 0, "scale": 1}}, "rank in lora_parameters"),
        ({"lora_parameters": {"rank": True, "scale": -1}}, "rank in lora_parameters"),
        ({"num_layers": 1}, "says 1 layers, the last ones, and there are weights in layers 0 to 1"),
        (
            {"lora_parameters": {"rank": 4, "scale": 1, "keys": ["self_attn.q_proj"]}},
            "v_proj' has weights and is",
        ),
    ],
)
def test_what_is_not_mlx_lms_plain_lora_is_refused(tmp_path: Path, run: dict[str, Any], reason: str) -> None:
    assert reason in reasons_for(write_mlx(tmp_path, mlx_weights(), **run))[0]


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("model.layers.0.self_attn.q_proj.m", (64,), "a DoRA magnitude"),
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), "no LoRA weight of mlx-lm"),
        ("model.layers.0.self_attn.q_proj.lora_a_scales", (4, 1), "no LoRA weight of mlx-lm"),
        ("model.layers.0.mlp.switch_mlp.up_proj.lora_a", (8, 4, 64), "LoRA of experts"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path: Path, name: str, shape: tuple[int, ...], reason: str) -> None:
    (found,) = reasons_for(write_mlx(tmp_path, mlx_weights() | {name: torch.ones(shape)}))
    assert name in found and reason in found


def test_a_half_alone_and_an_embedding_are_refused_as_of_any_adapter(tmp_path: Path) -> None:
    tensors = mlx_weights() | {
        "model.embed_tokens.lora_a": torch.ones(96, 4),
        "model.embed_tokens.lora_b": torch.ones(4, 64),
    }
    del tensors["model.layers.0.self_attn.q_proj.lora_b"]
    convert_mlx(write_mlx(tmp_path, tensors))
    with pytest.raises(AdapterRejected) as caught:
        check_adapter(tmp_path, BASE, 64)
    first, second = caught.value.reasons
    assert "lora_A but no lora_B" in first and "embed_tokens' is no linear layer" in second


def test_the_rank_of_the_weights_has_to_be_the_configs(tmp_path: Path) -> None:
    convert_mlx(write_mlx(tmp_path, mlx_weights(rank=8)))
    with pytest.raises(AdapterRejected, match="rank 8 in the weights and 4 in the config"):
        check_adapter(tmp_path, BASE, 64)


@pytest.mark.parametrize("config", [b"", b"{", b"[]", b'{"peft_type": "LORA", "lora_parameters": {}}', b'{"r": 8}'])
def test_any_other_config_is_left_to_whoever_reads_it(tmp_path: Path, config: bytes) -> None:
    write_adapter(tmp_path, TINY_LINEARS)
    (tmp_path / CONFIG_FILE).write_bytes(config)
    convert_mlx(tmp_path)
    assert (tmp_path / CONFIG_FILE).read_bytes() == config


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    write_mlx(tmp_path, mlx_weights())
    (tmp_path / MLX_WEIGHTS_FILE).unlink()
    assert reasons_for(tmp_path) == ["adapter_model.safetensors is missing"]


def test_an_empty_matrix_of_any_width_costs_nothing(tmp_path: Path) -> None:
    write_mlx(tmp_path, {})
    name = "model.layers.0.self_attn.q_proj.lora_a"
    header = json.dumps({name: {"dtype": "F32", "shape": [0, 2**60], "data_offsets": [0, 0]}}).encode()
    (tmp_path / MLX_WEIGHTS_FILE).write_bytes(len(header).to_bytes(8, "little") + header)
    convert_mlx(tmp_path)
    with pytest.raises(AdapterRejected):
        check_adapter(tmp_path, BASE, 64)


VALUES = st.one_of(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    st.lists(st.text(max_size=5) | st.integers(), max_size=3),
    st.dictionaries(st.sampled_from(["rank", "scale", "alpha", "keys"]), st.integers(-1, 9) | st.text(), max_size=4),
)
PARTS = st.sampled_from(["model", "layers", "0", "9" * 5000, "q_proj", "lora_a", "lora_b", "m", "", "\u0660", "weight"])
KEYS = ["rank", "scale", "alpha", "keys", "dropout"]


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    run=st.dictionaries(st.sampled_from([*RUN, "lora_layers", "use_dora", "peft_type"]), VALUES, max_size=4),
    parameters=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
    names=st.lists(st.lists(PARTS, max_size=6).map(".".join), max_size=4, unique=True),
    shape=st.lists(st.integers(0, 5), max_size=3),
)
def test_an_mlx_directory_of_anything_is_converted_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    run: dict[str, Any],
    parameters: dict[str, Any],
    names: list[str],
    shape: list[int],
) -> None:
    directory = tmp_path_factory.mktemp("fuzz")
    more = {"lora_parameters": RUN["lora_parameters"] | parameters} | run
    write_mlx(directory, {name: torch.ones(shape) for name in names}, **more)
    try:
        convert_mlx(directory)
        check_adapter(directory, BASE, 64)
    except AdapterRejected as error:
        assert error.reasons and all(reason.isprintable() for reason in error.reasons)
