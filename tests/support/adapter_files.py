"""Small real adapters on disk, written as peft writes them, without peft."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.shapes import llama_linears

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MINIMAL_CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
TINY_LINEARS: Mapping[str, tuple[int, int]] = llama_linears(2, 64, 32, 128, 96)


def write_adapter(
    directory: Path,
    linears: Mapping[str, tuple[int, int]],
    *,
    rank: int = 8,
    alpha: float = 16,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    dtype: str = "F32",
    std_b: float = 0.02,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    extra_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a PEFT directory for `linears` (module path -> (in, out)) and return it.

    `targets` are suffixes of module paths; None takes all. `extra_config` adds to the config or overrides it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    chosen = [module for module in linears if targets is None or _ends_with(module, targets)]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in chosen:
        in_features, out_features = linears[module]
        module_rank = _rank(module, rank, rank_pattern or {})
        a = torch.randn(module_rank, in_features, generator=generator) / in_features**0.5
        b = torch.randn(out_features, module_rank, generator=generator) * std_b
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.to(DTYPES[dtype])
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.to(DTYPES[dtype])
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "alpha_pattern": dict(alpha_pattern or {}),
        "auto_mapping": None,
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": dict(rank_pattern or {}),
        "target_modules": list(targets) if targets is not None else sorted({m.rpartition(".")[2] for m in chosen}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": use_rslora,
        **(extra_config or {}),
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return directory


def as_hub_snapshot(adapter: Path, model: Path) -> Path:
    """Move an adapter's files to where the cache of Hugging Face's hub has them, in `model`; returns the snapshot."""
    snapshot, blobs = model / "snapshots" / "0123abcd", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in adapter.iterdir():
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    adapter.rmdir()
    return snapshot


def _ends_with(module: str, targets: Sequence[str]) -> bool:
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _rank(module: str, rank: int, rank_pattern: Mapping[str, int]) -> int:
    for key, value in rank_pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return rank


def config_bytes(**fields: object) -> bytes:
    """The least `adapter_config.json` that is accepted, with these fields added or replaced."""
    return json.dumps({**MINIMAL_CONFIG, **fields}).encode()
