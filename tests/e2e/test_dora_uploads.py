"""DoRA adapters as peft writes them, sent to a real server: what peft's own forward gives, in any company."""

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

    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
    names = ["dora", *ADAPTERS[:6]]
    alone = {name: whole(server, body | {"model": name}).reply for name in names}
    with ThreadPoolExecutor(2 * len(names)) as pool:
        together = list(pool.map(lambda name: whole(server, body | {"model": name}).reply, 2 * names))
    assert together == [alone[name] for name in 2 * names]

    said = alone["dora"]
    ids = base.tokenizer(PROMPT + said.text)["input_ids"]
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
        chat = {"model": "dora", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
        assert client.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
        client.delete("/v1/adapters/dora")
