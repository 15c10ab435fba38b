"""Much host memory to a device, of which little is pinned at a time."""

from __future__ import annotations

import torch

from loramux_adapters.device.device import Device, Event

_NBYTES = 32 << 20


class Upload:
    """Copies through two pinned buffers in turn, on the device's main stream: one is filled while the other is copied.

    Owner: one thread. The buffers are taken at the first copy.

    Attributes:
        nbytes: of each buffer.
    """

    def __init__(self, device: Device, nbytes: int = _NBYTES) -> None:
        self.device, self.nbytes = device, nbytes
        self._buffers: list[torch.Tensor] = []
        self._read: list[Event | None] = [None, None]
        self._turn = 0
        self._landing: torch.Tensor | None = None

    def buffer(self) -> torch.Tensor:
        """[nbytes] uint8, pinned: the next buffer, which nothing reads any more. `started` follows the copies from it.

        Raises:
            DeviceFull: so much pinned memory cannot be had.
        """
        if not self._buffers:
            self._buffers = [self.device.pinned((self.nbytes,), torch.uint8) for _ in self._read]
        self._turn ^= 1
        if (event := self._read[self._turn]) is not None:
            event.synchronize()
        return self._buffers[self._turn]

    def started(self) -> None:
        """All copies from the buffer that was given last were started."""
        self._read[self._turn] = self.device.main.record()

    def landing(self) -> torch.Tensor:
        """[nbytes] uint8 on the device, always the same: for what is turned into something else there.

        What is copied there waits for what was started before on the main stream, so it may be used again at once.

        Raises:
            DeviceFull: there is no room for it.
        """
        if self._landing is None:
            self._landing = self.device.scratch((self.nbytes,), torch.uint8)
        return self._landing

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """to[...] = source, in the dtype of `to`; `source` may be changed or freed afterwards.

        Args:
            to: on the device, of any strides; a row of it (what its first index gives) is no larger than a buffer.
            source: in host memory, of the same shape.
        Raises:
            DeviceFull: there is no pinned memory.
        """
        assert to.shape == source.shape, (to.shape, source.shape)
        if not to.numel():
            return
        to, source = (each.reshape(1) if each.dim() == 0 else each for each in (to, source))
        each = self.nbytes // (to[0].numel() * to.dtype.itemsize)
        assert each, f"a row of {tuple(to.shape)} does not fit a buffer of {self.nbytes} bytes"
        for begin in range(0, len(to), each):
            part = source[begin : begin + each]
            staged = self.buffer()[: part.numel() * to.dtype.itemsize].view(to.dtype).view(part.shape)
            staged.copy_(part)
            self.device.copy(to[begin : begin + each], staged)
            self.started()
