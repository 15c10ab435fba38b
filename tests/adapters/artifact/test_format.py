from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux_adapters.artifact.format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    digest_of,
    pair_up,
    read_config,
    read_header,
)
from support.adapter_files import TINY_LINEARS, write_adapter


def digest(directory: Path) -> str:
    return digest_of(read_config(directory), directory)


def edit_config(directory: Path, **fields: object) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_pairs_are_complete_and_agree_on_their_rank(tmp_path: Path) -> None:
    prefix = "base_model.model."
    tensors = {
        f"{prefix}ok.lora_A.weight": torch.ones(2, 4),
        f"{prefix}ok.lora_B.weight": torch.ones(3, 2),
        f"{prefix}half.lora_A.weight": torch.ones(2, 4),
        f"{prefix}ranks.lora_A.weight": torch.ones(2, 4),
        f"{prefix}ranks.lora_B.weight": torch.ones(3, 1),
        f"{prefix}flat.lora_A.weight": torch.ones(4),
        f"{prefix}flat.lora_B.weight": torch.ones(3, 2),
        f"{prefix}twice.lora_A.weight": torch.ones(2, 4),
        f"{prefix}twice.lora_A.default.weight": torch.ones(2, 4),
        f"{prefix}twice.lora_B.weight": torch.ones(3, 2),
        f"{prefix}lm_head.base_layer.weight": torch.ones(3, 4),
    }
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    layout = pair_up(read_header(tmp_path / WEIGHTS_FILE))
    assert layout.pairs.keys() == {"ok", "twice"} and layout.pairs["ok"].rank == 2
    assert layout.base_tensors == {"lm_head.weight": f"{prefix}lm_head.base_layer.weight"}
    for module in ("half", "ranks", "flat", "twice"):
        assert sum(module in reason for reason in layout.reasons) == 1


def test_the_digest_is_the_same_for_the_same_maths(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path, TINY_LINEARS)
    before = digest(directory)
    assert len(before) == 64
    edit_config(directory, target_modules="all-linear", lora_dropout=0.5, revision="x", loramux_base_id="0" * 64)
    tensors = load_file(directory / WEIGHTS_FILE)
    renamed = {name.replace("lora_A.weight", "lora_A.default.weight"): value for name, value in tensors.items()}
    save_file(renamed, directory / WEIGHTS_FILE, metadata={"other": "text"})
    (directory / "card.json").write_text("{}")
    assert digest(directory) == before


@pytest.mark.parametrize("change", ["alpha", "rslora", "alpha_pattern", "bit", "dtype", "fewer"])
def test_the_digest_changes_with_the_maths(tmp_path: Path, change: str) -> None:
    directory = write_adapter(tmp_path, TINY_LINEARS, targets=["q_proj", "v_proj"])
    before = digest(directory)
    tensors = load_file(directory / WEIGHTS_FILE)
    name = next(iter(tensors))
    match change:
        case "alpha":
            edit_config(directory, lora_alpha=17)
        case "rslora":
            edit_config(directory, use_rslora=True)
        case "alpha_pattern":
            edit_config(directory, alpha_pattern={"layers.1.self_attn.q_proj": 1})
        case "bit":
            tensors[name].view(torch.uint8)[0, 0] ^= 1
        case "dtype":
            tensors[name] = tensors[name].half()
        case "fewer":
            write_adapter(directory, TINY_LINEARS, targets=["q_proj"])
            tensors = load_file(directory / WEIGHTS_FILE)
    save_file(tensors, directory / WEIGHTS_FILE)
    assert digest(directory) != before


def test_the_files_are_understood_without_torch_or_peft() -> None:
    program = "import sys, loramux_adapters.store.store; assert not {'torch', 'peft', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)}, timeout=60)
