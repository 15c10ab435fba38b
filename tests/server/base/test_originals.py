"""What of a checkpoint counts as the 16-bit weights of a layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loramux_server.base.originals import original_weights
from loramux_server.errors import BaseModelError


def test_a_layer_is_read_as_it_is_and_what_is_not_there_or_was_quantized_is_refused(tmp_path: Path) -> None:
    weight = torch.randn(2, 3).bfloat16()
    there = {"kept": weight, "four": torch.zeros(2, 3).byte(), "eight": weight.to(torch.float8_e4m3fn)}
    save_file({f"{name}.weight": tensor for name, tensor in there.items()}, tmp_path / "part.safetensors")
    files = {f"{name}.weight": "part.safetensors" for name in there} | {"gone.weight": "other.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    read = original_weights(tmp_path, lambda name: [f"other.{name}", name])
    assert torch.equal(read("kept"), weight)
    for name in ("four", "eight"):  # an 8-bit one is nothing without its scales
        with pytest.raises(BaseModelError, match="was quantized before"):
            read(name)
    for name in ("gone", "unknown"):
        with pytest.raises(BaseModelError, match=f"holds no {name}.weight"):
            read(name)
