"""Adapters as other tools write them, on the real base: served as the PEFT adapter that computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from support.adapter_files import as_hub_snapshot, write_adapter
from support.real_server import RealServer

LAYERS, FROM = 30, 14  # of the embedded base; the first that is adapted
LINEARS = {f"model.layers.{layer}.self_attn.q_proj": (576, 576) for layer in range(FROM, LAYERS)}
ASK = {"prompt": "Bread is made of", "max_tokens": 8, "temperature": 0, "logprobs": 1}


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "peft", LINEARS, rank=8, alpha=160, std_b=0.05)


def as_mlx(peft: Path, directory: Path) -> Path:
    directory.mkdir()
    names = {"lora_A": "lora_a", "lora_B": "lora_b"}
    tensors = {}
    for name, tensor in load_file(peft / "adapter_model.safetensors").items():
        module, half = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        tensors[f"{module}.{names[half]}"] = tensor.T.contiguous()
    save_file(tensors, directory / "adapters.safetensors")
    parameters = {"rank": 8, "dropout": 0.0, "scale": 20.0, "keys": ["self_attn.q_proj"]}
    run = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters, "model": "x", "iters": 100}
    (directory / "adapter_config.json").write_text(json.dumps(run))
    return directory


def answer(server: RealServer, name: str) -> Any:
    with server.client() as client:
        (choice,) = client.post("/v1/completions", json={"model": name, **ASK}).json()["choices"]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def test_an_adapter_of_mlx_lm_answers_as_its_peft_twin(server: RealServer, peft: Path, tmp_path: Path) -> None:
    mlx = as_mlx(peft, tmp_path / "mlx")
    files = {
        "config": (mlx / "adapter_config.json").read_bytes(),
        "weights": (mlx / "adapters.safetensors").read_bytes(),
    }
    with server.client() as client:
        twin = server.upload("twin", peft).json()
        sent = client.put("/v1/adapters/from-mlx", files=files).json()
        shown = client.get("/v1/adapters/from-mlx").json()
    assert twin["layers"] == sent["layers"] == {"adapted": 16, "of": LAYERS}
    assert sent["version"] == twin["version"] and answer(server, "from-mlx") == answer(server, "twin")
    assert "converted from mlx-lm's layout" in sent["notes"][0] and shown["notes"] == sent["notes"]
    assert twin["notes"] == [
        "16 of 30 layers carry weights: the config leaves none out, but there are none for layers 0 to 13"
    ]
    assert sent["notes"][1] == "16 of 30 layers carry weights, as the config says: layers 14 to 29"
    with server.client() as client:
        for name in ("twin", "from-mlx"):
            client.delete(f"/v1/adapters/{name}")


def test_a_snapshot_of_the_hubs_cache_is_pushed(server: RealServer, peft: Path, tmp_path: Path) -> None:
    from loramux_server.client.adapters import AdaptersClient

    snapshot = as_hub_snapshot(peft, tmp_path / "models--org--mine")
    client = AdaptersClient(server.url, server.key or None)
    assert client.push("from-hub", snapshot).status == 201
    client.remove("from-hub")
