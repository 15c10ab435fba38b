"""DoRA adapters as peft writes them, sent to a real server: what peft's own forward gives, in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.loader import load_base_model
from loramux_server.base.source import EMBEDDED_NAME
from support.peft_replies import PROMPT, assert_it_answers_as_peft_does
from support.real_adapters import ADAPTERS
from support.real_server import RealServer

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def perturbed(model: Any) -> None:
    """What training does: B and the magnitudes move."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_B" in name:
                parameter += 0.02 * noise
            elif "magnitude" in name:
                parameter *= 1 + 0.05 * noise


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_dora_adapter_of_peft_answers_as_peft_does(server: RealServer, embedded_cache: Path, tmp_path: Path) -> None:
    base = load_base_model(
        EMBEDDED_NAME, device=CpuDevice(), cache_dir=embedded_cache, report=lambda line: None, exact=True
    )
    prompt: list[int] = base.tokenizer(PROMPT)["input_ids"]
    torch.manual_seed(0)  # the adapter is the same in every run
    model: Any = get_peft_model(
        base.model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, use_dora=True, target_modules=TARGETS)
    ).eval()
    perturbed(model)
    model.save_pretrained(tmp_path / "dora")
    sent = server.upload("dora", tmp_path / "dora")
    assert sent.status_code == 201, sent.text
    assert any(note.startswith("DoRA") for note in sent.json()["notes"])

    assert_it_answers_as_peft_does(server, "dora", model, prompt, ADAPTERS[:6])
    with server.client() as client:
        chat = {"model": "dora", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
        assert client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
        client.delete("/v1/adapters/dora")
