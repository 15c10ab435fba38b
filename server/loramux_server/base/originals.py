"""The 16-bit weights of a base that is in memory in NF4, read from its checkpoint one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loramux_server.errors import BaseModelError

_INDEX = "model.safetensors.index.json"


def original_weights(directory: Path) -> Callable[[str], torch.Tensor]:
    """A function: path of a linear layer -> its weight [out, in] as the checkpoint holds it.

    Raises:
        BaseModelError: the checkpoint's list of files cannot be read. The function raises it too, for a layer that is
            not in the files under its own name.
    """
    index = directory / _INDEX
    try:
        files: dict[str, str] | None = (
            json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else None
        )
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"{index} cannot be read: {error}") from error

    def read(path: str) -> torch.Tensor:
        name = f"{path}.weight"
        file = directory / (files.get(name, "") if files is not None else "model.safetensors")
        try:
            with safe_open(file, "pt") as opened:
                weight: torch.Tensor = opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise BaseModelError(
                f"the base's checkpoint holds no {name}, which init loftq starts from; use init default"
            ) from error
        return weight

    return read
