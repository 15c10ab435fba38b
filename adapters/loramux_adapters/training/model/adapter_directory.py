"""A trained adapter on disk, as peft itself writes and reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from loramux_adapters.artifact.config import BASE_ID_KEY, CONFIG_FILE
from loramux_adapters.artifact.format import WEIGHTS_FILE


def write_adapter(
    directory: Path,
    config: Any,
    tensors: Mapping[str, torch.Tensor],
    *,
    base_name: str,
    base_id: str,
    dtype: torch.dtype,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
        directory: made if it is not there; files of these names in it are replaced.
        config: peft's LoraConfig.
        tensors: peft's parameter names -> A [rank, in] and B [out, rank].
        dtype: of the tensors on disk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    fields |= {"base_model_name_or_path": base_name, "inference_mode": True, BASE_ID_KEY: base_id}
    text = json.dumps(fields, indent=2, sort_keys=True, default=str)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    weights = {name.replace(".default.", "."): _copy(tensor, dtype) for name, tensor in tensors.items()}
    save_file(weights, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def _copy(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
