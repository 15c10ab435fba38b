"""Sizes of bases that several tests count with: numbers alone, nothing heavy is imported."""

from __future__ import annotations

from typing import Any

# of Llama 3.1 8B, as its config names them
LLAMA_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def llama_linears(layers: int, hidden: int, values: int, mlp: int, vocabulary: int) -> dict[str, tuple[int, int]]:
    """Module path -> (in, out) of every layer of a Llama that adapters can change.

    values: numbers of a row's keys.
    """
    linears = {
        f"model.layers.{layer}.{module}": sizes
        for layer in range(layers)
        for module, sizes in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, values),
            "self_attn.v_proj": (hidden, values),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, mlp),
            "mlp.up_proj": (hidden, mlp),
            "mlp.down_proj": (mlp, hidden),
        }.items()
    }
    return linears | {"lm_head": (hidden, vocabulary)}
