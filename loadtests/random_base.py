"""Checkpoints with random weights in the shape of a family: they cost what real ones cost, and say nothing.

Names and shapes of the tensors are those of the published checkpoints, so that a server reads them as it reads these.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LoadTestError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SPREAD = 0.02  # standard deviation of the weights
_OF_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "rope_theta": 1_000_000.0,
        "attention_bias": False,
        "use_sliding_window": False,
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": 512,
        "attention_bias": False,
    },
}
_NORMS = {
    "qwen3": ("input_layernorm", "post_attention_layernorm"),
    "gemma3_text": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


@dataclass(frozen=True, slots=True)
class RandomBase:
    """Sizes of one. `family`: "qwen3" or "gemma3_text", as transformers names them."""

    label: str
    family: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def config(self, tokenizer_of: Mapping[str, Any]) -> dict[str, Any]:
        """Its config.json, with the vocabulary of another base."""
        config = {
            **_FAMILIES[self.family],
            **{name: tokenizer_of[name] for name in _OF_THE_TOKENIZER if name in tokenizer_of},
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }
        if self.family == "gemma3_text":
            config["query_pre_attn_scalar"] = self.head_dim
            kinds = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(self.layers)]
            config["layer_types"] = kinds
        return config

    def shapes(self, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of the checkpoint; those of one dimension are norms."""
        queries, values = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (vocabulary, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            yield f"{at}.self_attn.q_proj.weight", (queries, self.hidden)
            yield f"{at}.self_attn.k_proj.weight", (values, self.hidden)
            yield f"{at}.self_attn.v_proj.weight", (values, self.hidden)
            yield f"{at}.self_attn.o_proj.weight", (self.hidden, queries)
            yield f"{at}.mlp.gate_proj.weight", (self.mlp, self.hidden)
            yield f"{at}.mlp.up_proj.weight", (self.mlp, self.hidden)
            yield f"{at}.mlp.down_proj.weight", (self.hidden, self.mlp)
            for name in ("q_norm", "k_norm"):
                yield f"{at}.self_attn.{name}.weight", (self.head_dim,)
            for name in _NORMS[self.family]:
                yield f"{at}.{name}.weight", (self.hidden,)

    def write(self, directory: Path, base: Path) -> Path:
        """Writes it, with the tokenizer of `base`, a checkpoint's directory; returns `directory`."""
        import torch
        from safetensors.torch import save_file

        try:
            of = json.loads((base / "config.json").read_text(encoding="utf-8"))
            config = self.config(of)
            vocabulary = int(config["vocab_size"])
        except (OSError, ValueError, KeyError) as error:
            raise LoadTestError(f"{base} has no config.json with a vocab_size: {error}") from error
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        if not (base / TOKENIZER_FILES[0]).exists():
            raise LoadTestError(f"{base} has no {TOKENIZER_FILES[0]}")
        for name in TOKENIZER_FILES:
            if (base / name).exists():
                shutil.copy(base / name, directory / name)
        random = torch.Generator().manual_seed(0)
        weights = {
            name: torch.full(shape, 0.0 if self.family == "gemma3_text" else 1.0).bfloat16()  # Gemma adds one
            if len(shape) == 1
            else torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, SPREAD, generator=random)
            for name, shape in self.shapes(vocabulary)
        }
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
