"""What lies on the emulated device: CPU tensors whose memory it gave, known by address for as long as they live."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

import torch
from torch.multiprocessing.reductions import StorageWeakRef

Kind = Literal["device", "pinned"]


class FreedMemory(RuntimeError):
    """A graph reads or writes memory that has been freed since it was captured."""


@dataclass(frozen=True, slots=True)
class _Block:
    ref: StorageWeakRef
    kind: Kind
    nbytes: int


class Blocks:
    """Memory that the device gave and nobody freed yet."""

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}
        self._lock = threading.Lock()  # adapters are read beside steps
        self._most = 0  # bytes held if none were freed since `held` counted them
        self.peak = 0

    def add(self, tensor: torch.Tensor, kind: Kind) -> None:
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return
        with self._lock:
            self._blocks[storage.data_ptr()] = _Block(StorageWeakRef(storage), kind, storage.nbytes())
            self._most += storage.nbytes() if kind == "device" else 0
        if self._most > self.peak:
            self.peak = max(self.peak, self.held)

    def has_room_for(self, nbytes: int, total: int) -> bool:
        return self._most + nbytes <= total or self.held + nbytes <= total

    def kind_of(self, tensor: torch.Tensor) -> Kind | None:
        """None: it lies in host memory that is not pinned. What is empty lies anywhere."""
        if not tensor.numel():
            return "device"
        storage = tensor.untyped_storage()
        block = self._blocks.get(storage.data_ptr())
        # another tensor may lie where one was freed
        return block.kind if block is not None and block.ref.cdata == storage._cdata else None

    @property
    def held(self) -> int:
        """Bytes on the device."""
        with self._lock:
            self._blocks = {address: block for address, block in self._blocks.items() if not block.ref.expired()}
            self._most = sum(block.nbytes for block in self._blocks.values() if block.kind == "device")
            return self._most


class Address:
    """A tensor as a graph remembers it: where it begins, its dtype, shape and strides. It keeps no memory alive."""

    def __init__(self, tensor: torch.Tensor, what: str) -> None:
        """`what` it is, for the error when it is gone."""
        self._ref = StorageWeakRef(tensor.untyped_storage())
        self._what = f"{what} ({str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)})"
        self._form = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        self._dtype = tensor.dtype

    def tensor(self) -> torch.Tensor:
        """Raises FreedMemory: nobody held it."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._ref.cdata)
        if storage is None:
            raise FreedMemory(f"{self._what} was freed or moved since the capture")
        offset, shape, stride = self._form
        return torch.empty(0, dtype=self._dtype).set_(storage, offset, shape, stride)
