"""Adapters that change tokens of a base with tied weights, sent to a real server: what peft's own forward gives."""

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

TARGETS = ["q_proj", "v_proj"]


def perturbed(model: Any) -> None:
    """What training does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None
            if noise is not None and ("lora_B" in name or "lora_embedding" in name):
                parameter += 0.02 * noise
            elif noise is not None and "trainable_tokens_delta" in name:
                parameter += 0.5 * parameter.std() * noise


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["tokens", "lora"])
def test_an_adapter_of_tokens_answers_as_peft_does(
    kind: str, server: RealServer, embedded_cache: Path, tmp_path: Path
) -> None:
    base = load_base_model(
        EMBEDDED_NAME, device=CpuDevice(), cache_dir=embedded_cache, report=lambda line: None, exact=True
    )
    prompt: list[int] = base.tokenizer(PROMPT)["input_ids"]
    common = [*sorted({*prompt, *range(28, 60), *base.tokenizer(" the a is of to and").input_ids})]
    settings: dict[str, Any] = (
        {"target_modules": TARGETS, "trainable_token_indices": common}
        if kind == "tokens"
        else {"target_modules": [*TARGETS, "embed_tokens"]}
    )
    torch.manual_seed(0)  # the adapter is the same in every run
    model: Any = get_peft_model(base.model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, **settings)).eval()
    perturbed(model)
    model.save_pretrained(tmp_path / kind, save_embedding_layers=False)
    sent = server.upload(kind, tmp_path / kind)
    assert sent.status_code == 201, sent.text
    assert any(note.startswith("it changes") for note in sent.json()["notes"])

    assert_it_answers_as_peft_does(server, kind, model, prompt, ADAPTERS[:4])
    with server.client() as client:
        client.delete(f"/v1/adapters/{kind}")
