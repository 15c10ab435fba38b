"""Random adapters of embeddings and output heads, as peft writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

PROMPT = [3, 300, 7, *range(20, 33), 305, 3, 41]
ATTENTION = ["q_proj", "v_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "few tokens": {"target_modules": ATTENTION, "trainable_token_indices": [300, 3, 305]},
    "tokens of both": {
        "target_modules": ATTENTION,
        "trainable_token_indices": {"embed_tokens": [300, 3], "lm_head": [7, 19, 8]},
    },
    "tokens of the head": {"target_modules": ATTENTION, "trainable_token_indices": {"lm_head": [7, 19, 8]}},
    "saved head": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    "saved both": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
    "LoRA on the embedding": {"target_modules": [*ATTENTION, "embed_tokens"]},
    "LoRA on both": {"target_modules": ["embed_tokens", "lm_head", "down_proj"]},
    "LoRA on the embedding alone": {"target_modules": ["embed_tokens"]},
    "LoRA on the embedding, saved head": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
}
TIED = [kind for kind in KINDS if kind not in ("tokens of both", "LoRA on both")]


def write(model: Any, directory: Path, settings: dict[str, Any], seed: int, prompt: list[int] = PROMPT) -> torch.Tensor:
    """A random adapter of these settings, as peft writes it, and the logits [tokens, vocabulary] that it gives."""
    torch.manual_seed(seed)
    model.lm_head.__dict__.pop("forward", None)  # it would be the original's in peft's copy
    made = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    ).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
            elif ".modules_to_save." in name:
                some = torch.rand(len(parameter)) < 0.4
                some[[3, 300, 7]] = True
                parameter[some] += 0.3 * parameter.std() * torch.randn_like(parameter[some])
        logits: torch.Tensor = made(torch.tensor([prompt])).logits[0]
    made.save_pretrained(directory, save_embedding_layers=False)
    made.unload()
    return logits
