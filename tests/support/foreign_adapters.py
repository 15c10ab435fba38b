"""Adapters as other tools write them, made of a PEFT directory by those tools' documented layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

_PERMUTED = {"llama", "granite", "smollm3", "olmo", "arcee", "mistral3"}


def halves_of(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module path -> A [rank, in] and B [out, rank], of the files of a PEFT directory."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = sorted({name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors})
    return {
        module: (
            tensors[f"base_model.model.{module}.lora_A.weight"],
            tensors[f"base_model.model.{module}.lora_B.weight"],
        )
        for module in modules
    }


def write_gguf_lora(
    adapter: Path,
    file: Path,
    architecture: str,
    *,
    heads: int,
    kv_heads: int,
    layers: int,
    kind: str = "F32",
    alpha: float | None = None,
    **metadata: str,
) -> Path:
    """As llama.cpp's convert_lora_to_gguf does it. `kind`: F32, F16, BF16 or Q8_0."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(arch, layers)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", config["lora_alpha"] if alpha is None else alpha)
    writer.add_array("general.tags", ["a", "b"])
    for key, value in metadata.items():
        writer.add_string(key, value)
    for module, (a, b) in halves_of(adapter).items():
        place = names.get_name(module)
        assert place is not None, module
        rows = {"q_proj": heads, "k_proj": kv_heads}.get(module.rpartition(".")[2])
        if architecture in _PERMUTED and rows is not None:
            size = b.shape[0] // rows
            b = b.reshape(rows, 2, size // 2, -1).swapaxes(1, 2).reshape(b.shape)
        for half, matrix in (("a", a), ("b", b)):
            _add(writer, f"{place}.weight.lora_{half}", matrix.float().contiguous().numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: Any, name: str, matrix: np.ndarray[Any, Any], kind: str) -> None:
    """Rows that are no whole blocks of Q8_0 stay F16, as the tool leaves them."""
    if kind == "Q8_0" and matrix.shape[-1] % 32:
        kind = "F16"
    quantization = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(matrix, quantization), raw_dtype=quantization)


def write_kohya(adapter: Path, file: Path, *, flat: str | None = None, old: bool = False, alpha: bool = True) -> Path:
    """With lora_down, lora_up and alpha. `flat`: prefix of names whose dots are `_`. `old`: lora.down and lora.up."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = {}
    for module, (a, b) in halves_of(adapter).items():
        stem = module if flat is None else flat + module.replace(".", "_")
        down, up = ("lora.down", "lora.up") if old else ("lora_down", "lora_up")
        tensors[f"{stem}.{down}.weight"], tensors[f"{stem}.{up}.weight"] = a.contiguous(), b.contiguous()
        if alpha:
            own = config["alpha_pattern"].get(module, config["lora_alpha"])
            tensors[f"{stem}.alpha"] = torch.tensor(float(own), dtype=a.dtype)
    save_file(tensors, file)
    return file


def write_mlx(adapter: Path, directory: Path, *, layers: int) -> Path:
    """As mlx-lm does it."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    directory.mkdir()
    tensors = {}
    for module, (a, b) in halves_of(adapter).items():
        tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"] = a.T.contiguous(), b.T.contiguous()
    save_file(tensors, directory / "adapters.safetensors")
    run = {
        "fine_tune_type": "lora",
        "num_layers": layers,
        "model": "tiny",
        "lora_parameters": {"rank": config["r"], "scale": config["lora_alpha"] / config["r"], "dropout": 0.0},
    }
    (directory / "adapter_config.json").write_text(json.dumps(run))
    return directory
