"""The 16-bit weights of a base that is in memory in another form, read from its checkpoint one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loramux_server.errors import BaseModelError

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"


def original_weights(directory: Path, names: Callable[[str], Iterable[str]]) -> Callable[[str], torch.Tensor]:
    """A function: path of a linear layer -> its weight [out, in] as the checkpoint holds it.

    Args:
        names: of a parameter of the model, what the checkpoint may call it.
    Raises:
        BaseModelError: the checkpoint's list of files cannot be read. The function raises it too, for a layer that is
            not in the files under its own name, or that was quantized before.
    """
    files = _files(directory)

    def read(path: str) -> torch.Tensor:
        name = f"{path}.weight"
        for each in names(name):
            try:
                return _read(directory, files, each)
            except (OSError, SafetensorError):
                continue
        raise BaseModelError(f"the base's checkpoint holds no {name} by that name")

    return read


def original_tensor(directory: Path, names: Iterable[str]) -> torch.Tensor:
    """What the checkpoint holds under the first of these names that it knows.

    Raises:
        BaseModelError: it knows none, or cannot be read.
    """
    files, names = _files(directory), list(names)
    reasons = []
    for name in names:
        try:
            return _read(directory, files, name)
        except (OSError, SafetensorError) as error:
            reasons.append(str(error))
    raise BaseModelError(f"the base's checkpoint {directory} holds no {' or '.join(names)} ({reasons[0]})")


def _files(directory: Path) -> dict[str, str] | None:
    """Tensor -> its file, where the checkpoint has many."""
    index = directory / _INDEX
    if not index.is_file():
        return None
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"{index} cannot be read: {error}") from error
    return files


def _read(directory: Path, files: dict[str, str] | None, name: str) -> torch.Tensor:
    file = directory / (_WHOLE if files is None else files.get(name, ""))
    with safe_open(file, "pt") as opened:
        weight: torch.Tensor = opened.get_tensor(name)
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise BaseModelError(f"the base's {name} was quantized before: there are no 16-bit weights of it")
    return weight
