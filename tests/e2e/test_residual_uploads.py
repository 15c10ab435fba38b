"""PiSSA and OLoRA adapters that peft saved unconverted, sent to a real server: as peft's own conversion answers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.base.source import EMBEDDED_NAME
from support.adapter_files import write_adapter
from support.peft_replies import PROMPT, assert_it_answers_as_peft_does
from support.real_adapters import ADAPTERS
from support.real_server import RealServer

LAYERS = [3, 11, 20]


def load(cache: Path, **options: Any) -> BaseModel:
    return load_base_model(EMBEDDED_NAME, device=CpuDevice(), cache_dir=cache, report=lambda line: None, **options)


def train(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base weights:UserWarning")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_it_answers_as_what_peft_converts_it_to(
    server: RealServer, embedded_cache: Path, tmp_path: Path, init: Any
) -> None:
    whole: Any = load(embedded_cache, quantize="none").model
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=8,
        init_lora_weights=init,
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=LAYERS,
    )
    torch.manual_seed(0)
    model: Any = get_peft_model(whole, copy.deepcopy(config)).eval()
    model.peft_config["default"].init_lora_weights = True  # as peft's own example saves the start
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    train(model)
    model.save_pretrained(tmp_path / "sent")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))

    sent = server.upload(init, tmp_path / "sent")
    assert sent.status_code == 201, sent.text
    assert "begun at the base's 16-bit weights" in sent.json()["notes"][0] and sent.json()["rank"] == 16
    again = server.upload(init, tmp_path / "sent")
    assert (again.status_code, again.json()["version"]) == (200, sent.json()["version"])

    base = load(embedded_cache, exact=True)
    oracle: Any = PeftModel.from_pretrained(base.model, tmp_path / "plain").eval()
    prompt: list[int] = base.tokenizer(PROMPT)["input_ids"]
    assert_it_answers_as_peft_does(server, init, oracle, prompt, ADAPTERS[:4])
    with server.client() as client:
        client.delete(f"/v1/adapters/{init}")


def test_a_start_that_is_random_is_refused_with_how_to_convert_it(server: RealServer, tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    directory = write_adapter(tmp_path, {path: (576, 576)}, extra_config={"init_lora_weights": "pissa_niter_4"})
    refused = server.upload("niter", directory)
    assert refused.status_code == 422 and "path_initial_model_for_weight_conversion" in refused.text
