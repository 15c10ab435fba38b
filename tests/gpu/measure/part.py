"""What the programs here share: their flags, the device they run on, and results that are there also if they die."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from loramux_adapters.device.device import Device
from measure.shapes import EIGHT_B, TINY, Shape


class Part:
    """One program of `make gpu`.

    Attributes:
        device: where it measures; in a dry run an emulated one, on which kernels run in Triton's interpreter.
        dry: nothing is measured: it is tried whether the program runs.
        until: the moment of `time.monotonic` when it should be at its end.
        rounds: of interleaved samples.
    """

    def __init__(self, about: str | None) -> None:
        parser = argparse.ArgumentParser(description=about)
        parser.add_argument("--out", type=Path, required=True, help="JSON of what was found, after each finding")
        parser.add_argument("--seconds", type=float, default=120.0, help="within which it should be at its end")
        parser.add_argument("--scratch", type=Path, help="a directory for large files")
        parser.add_argument("--dry", action="store_true", help="a tiny shape on an emulated device: are there errors?")
        self.args = parser.parse_args()
        self.dry: bool = self.args.dry
        self.until = time.monotonic() + self.args.seconds
        self.rounds = 1 if self.dry else 9
        self.shape: Shape = TINY if self.dry else EIGHT_B
        self.device = emulated() if self.dry else card()
        self._found: dict[str, Any] = {}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def write(self, **findings: Any) -> None:
        """Adds findings to the file, which is never half written."""
        self._found |= findings
        beside = self.args.out.with_suffix(".part")
        beside.write_text(json.dumps(self._found), encoding="utf-8")
        os.replace(beside, self.args.out)

    def say(self, line: str) -> None:
        print(line, flush=True)


class Launches:
    """Writes down what a device launches while `log` is a list: (kernel, grid, arguments, constants)."""

    log: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] | None = None

    def launch(self, kernel: Any, grid: tuple[int, ...], /, *args: Any, **constants: Any) -> None:
        if self.log is not None:
            self.log.append((kernel, grid, args, constants))
        super().launch(kernel, grid, *args, **constants)  # type: ignore[misc]


def card() -> Device:
    """Raises RuntimeError: PyTorch finds none."""
    import torch

    from loramux_adapters.device.cuda import CudaDevice

    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no CUDA device here; --dry tries the programs without one")

    class MeasuredCard(Launches, CudaDevice):
        pass

    return MeasuredCard(torch.device("cuda", torch.cuda.current_device()))


def emulated() -> Device:
    from support import triton_interpreter

    triton_interpreter.prepare()
    from support.emulated import EmulatedDevice

    class MeasuredEmulation(Launches, EmulatedDevice):
        pass

    return MeasuredEmulation(kernels="triton")
