"""Random LoRA adapters in PEFT's format, of the shapes that a checkpoint's config.json tells.

They cost what real adapters cost. Their effect is scaled so that replies differ from the base's and stay readable.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from .errors import LoadTestError
from .workload import adapter_ranks

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STRENGTH = 0.2  # visible in the text, which stays readable


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes of a decoder whose layers are named like Llama's."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shapes:
        """From a config.json. Raises KeyError where a size is missing."""
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            mlp=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        )

    def linear(self, name: str) -> tuple[str, int, int]:
        """Path within a layer, in_features and out_features of one of LINEARS."""
        queries, values = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": ("self_attn.q_proj", self.hidden, queries),
            "k_proj": ("self_attn.k_proj", self.hidden, values),
            "v_proj": ("self_attn.v_proj", self.hidden, values),
            "o_proj": ("self_attn.o_proj", queries, self.hidden),
            "gate_proj": ("mlp.gate_proj", self.hidden, self.mlp),
            "up_proj": ("mlp.up_proj", self.hidden, self.mlp),
            "down_proj": ("mlp.down_proj", self.mlp, self.hidden),
        }[name]


# The server's default base, so that it can be load-tested without knowing where it is stored.
SMOLLM2_135M = Shapes(layers=30, hidden=576, mlp=1536, heads=9, kv_heads=3, head_dim=64)


def make_adapter(
    directory: Path,
    shapes: Shapes,
    *,
    rank: int,
    targets: Sequence[str] = LINEARS,
    strength: float = STRENGTH,
    seed: int = 0,
    dtype: str = "float32",
    base_model_name: str = "",
) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        strength: size of an output's change for an input of unit variance, whatever the rank and width.
        dtype: of the tensors, as numpy calls it; peft writes float32.
    """
    rng = np.random.default_rng(seed)
    alpha = 2 * rank
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for layer in range(shapes.layers):
        for target in targets:
            path, wide_in, wide_out = shapes.linear(target)
            name = f"base_model.model.model.layers.{layer}.{path}"
            down = rng.standard_normal((rank, wide_in), dtype=np.float32) / wide_in**0.5
            up = rng.standard_normal((wide_out, rank), dtype=np.float32) * (strength * rank / (alpha * rank**0.5))
            tensors[f"{name}.lora_A.weight"] = down.astype(dtype)
            tensors[f"{name}.lora_B.weight"] = up.astype(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(targets),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def make_adapters(
    root: Path,
    shapes: Shapes,
    ranks: Sequence[int],
    *,
    prefix: str = "load",
    targets: Sequence[str] = LINEARS,
    strength: float = STRENGTH,
    seed: int = 0,
    dtype: str = "float32",
) -> dict[str, Path]:
    """One adapter per entry of `ranks`, each with other random weights; name -> directory below `root`."""
    made = {f"{prefix}{number:03d}": root / f"{prefix}{number:03d}" for number in range(len(ranks))}
    for number, (directory, rank) in enumerate(zip(made.values(), ranks, strict=True)):
        own = seed * 100_003 + number
        make_adapter(directory, shapes, rank=rank, targets=targets, strength=strength, seed=own, dtype=dtype)
    return made


def read_shapes(base: Path | None) -> Shapes:
    """Of the checkpoint in a directory; of the server's default base for None."""
    if base is None:
        return SMOLLM2_135M
    try:
        return Shapes.from_config(json.loads((base / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        raise LoadTestError(f"{base} has no config.json of a decoder like Llama: {error}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, help="directory with config.json (default: shapes of SmolLM2-135M)")
    parser.add_argument("--out", type=Path, required=True, help="where one directory per adapter is written")
    parser.add_argument("--count", type=int, default=16, help="adapters (default: 16)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16], help="their ranks, taken in turn (default: 16)")
    parser.add_argument("--targets", nargs="+", choices=LINEARS, default=LINEARS, help="linear layers (default: all)")
    parser.add_argument("--strength", type=float, default=STRENGTH, help=f"size of the effect (default: {STRENGTH})")
    parser.add_argument("--seed", type=int, default=0)


def main(args: argparse.Namespace) -> int:
    """Write them and say where."""
    ranks = adapter_ranks(tuple(args.ranks), args.count)
    made = make_adapters(
        args.out, read_shapes(args.base), ranks, targets=args.targets, strength=args.strength, seed=args.seed
    )
    for name, directory in made.items():
        print(f"{name}  {directory}")
    return 0
