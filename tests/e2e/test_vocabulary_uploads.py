"""Adapters that change tokens of a base with tied weights, sent to a real server: what peft's own forward gives."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.loader import load_base_model
from loramux_server.base.source import EMBEDDED_NAME
from support.real_adapters import ADAPTERS
from support.real_server import RealServer
from support.replies import whole

PROMPT, TOKENS = "The three things that every good cook knows about bread are", 8
MOST, GAP = 0.1, 0.15  # of a token's log probability; between the first two where another one is chosen
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

    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
    names = [kind, *ADAPTERS[:4]]
    alone = {name: whole(server, body | {"model": name}).reply for name in names}
    with ThreadPoolExecutor(2 * len(names)) as pool:
        together = list(pool.map(lambda name: whole(server, body | {"model": name}).reply, 2 * names))
    assert together == [alone[name] for name in 2 * names]

    said = alone[kind]
    with server.client() as client:  # a text may be other tokens than those that were chosen
        told = client.post("/v1/completions", json=body | {"model": kind, "return_token_ids": True}).json()
    ids = prompt + told["choices"][0]["token_ids"][: len(said.logprobs)]  # without an end token
    with torch.inference_mode():
        found = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        with model.disable_adapter():
            bare = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    at = range(len(prompt) - 1, len(ids) - 1)
    assert len(at) == len(said.logprobs) > 2
    theirs = torch.tensor([float(found[place, ids[place + 1]]) for place in at])
    gaps = [float(found[place].max() - found[place, ids[place + 1]]) for place in at]
    assert (theirs - torch.tensor(said.logprobs)).abs().max() <= MOST
    assert max(gaps) <= GAP, "a token that peft would not choose"
    untouched = torch.tensor([float(bare[place, ids[place + 1]]) for place in at])
    assert (untouched - theirs).abs().max() > 3 * MOST, "it changes something"
    with server.client() as client:
        client.delete(f"/v1/adapters/{kind}")
