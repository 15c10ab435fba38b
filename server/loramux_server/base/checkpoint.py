"""The weights of a checkpoint, one tensor at a time from its mapped files, by the names that the model has for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from loramux_server.base.architecture.experts import TensorPiece
from loramux_server.base.identity import read_json
from loramux_server.base.prequantized import is_quantized, numbers_of
from loramux_server.errors import BaseModelError
from loramux_server.kernels.layers.nf4_layout import Nf4Numbers

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


class Weights(Protocol):
    """What a base is made of. Names are those of the model's parameters and buffers; tensors lie in host memory.

    Attributes:
        quantized: it was quantized before, all but what it left in 16 bits.
    """

    @property
    def quantized(self) -> bool: ...

    def holds(self, name: str) -> bool: ...

    def quantizes(self, name: str) -> bool:
        """Whether it holds this one in the form of `nf4`."""

    def dense(self, name: str) -> torch.Tensor:
        """One that it holds, as floats; one that was quantized before is multiplied out. Raises BaseModelError."""

    def nf4(self, name: str) -> Nf4Numbers | None:
        """One that it holds, as it was quantized before; None: it was not. Raises BaseModelError."""


class ModelWeights:
    """`Weights` of a model in host memory."""

    def __init__(self, model: nn.Module) -> None:
        self._held: Mapping[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )

    @property
    def quantized(self) -> bool:
        return False

    def holds(self, name: str) -> bool:
        return name in self._held

    def quantizes(self, name: str) -> bool:
        return False

    def dense(self, name: str) -> torch.Tensor:
        return self._held[name].detach()

    def nf4(self, name: str) -> Nf4Numbers | None:
        return None


class CheckpointWeights:
    """`Weights` of safetensors files, which stay mapped until `close`."""

    def __init__(
        self,
        directory: Path,
        prefix: str = "",
        *,
        quantized: bool = False,
        names: Callable[[str], Iterable[str | TensorPiece]] | None = None,
    ) -> None:
        """
        Args:
            quantized: its config says that bitsandbytes quantized it to NF4.
            prefix: under which a model with a head has the model without one ("model"): some checkpoints leave it out,
                and some have it where the model does not.
            names: of a parameter of the model, what the checkpoint may call it, or of what it may be a piece; None: it
                is called as the model does.
        Raises:
            BaseModelError: there are no such files, or they cannot be read.
        """
        self._prefix = f"{prefix}." if prefix else ""
        self._names = names or (lambda name: (name,))
        self.quantized = quantized
        self._opened = ExitStack()
        self._files: dict[str, Any] = {}
        try:
            for path in files_of(directory):
                file: Any = self._opened.enter_context(safe_open(path, "pt"))
                self._files |= dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError) as error:
            self.close()
            raise BaseModelError(f"the base's weights in {directory} cannot be read: {error}") from error

    def __enter__(self) -> CheckpointWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._files = {}
        self._opened.close()

    def holds(self, name: str) -> bool:
        return self._name(name) is not None

    def dense(self, name: str) -> torch.Tensor:
        numbers = self.nf4(name)
        if numbers is not None:
            return numbers.dequantized()
        found = self._name(name)
        assert found is not None, name
        return self._read(found)

    def quantizes(self, name: str) -> bool:
        found = self._name(name)
        return isinstance(found, str) and is_quantized(found, self._files.__contains__)

    def nf4(self, name: str) -> Nf4Numbers | None:
        found = self._name(name)
        if not isinstance(found, str) or not self.quantizes(name):
            return None
        return numbers_of(found, self._files.__contains__, self._read)

    def _name(self, name: str) -> str | TensorPiece | None:
        """What the checkpoint calls it."""
        there = (
            each
            for each in self._candidates(name)
            if (each.stored if isinstance(each, TensorPiece) else each) in self._files
        )
        return next(there, None)

    def _candidates(self, name: str) -> Iterator[str | TensorPiece]:
        yield from self._names(name)
        if self._prefix:
            yield name.removeprefix(self._prefix)
            yield self._prefix + name

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise BaseModelError(f"the base's checkpoint holds no {name}")
        return self._files[name].get_slice(name)

    def _read(self, name: str | TensorPiece) -> torch.Tensor:
        try:
            if isinstance(name, TensorPiece):
                return name.read(self._slice)
            tensor: torch.Tensor = self._files[name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise BaseModelError(f"the base's tensor {name} cannot be read: {error}") from error
        return tensor


def files_of(directory: Path) -> list[Path]:
    """The safetensors files that make the checkpoint, as transformers chooses them. Raises BaseModelError."""
    if (directory / WHOLE).is_file():
        return [directory / WHOLE]
    if not (directory / INDEX).is_file():
        raise BaseModelError(f"{directory} holds neither {WHOLE} nor {INDEX}")
    files = read_json(directory / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(each, str) for each in files.values()):
        raise BaseModelError(f"{INDEX} of the base does not say which file holds which weight")
    return [directory / name for name in sorted(set(files.values()))]
