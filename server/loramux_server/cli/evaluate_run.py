"""Puts an evaluation in process together: bases one at a time, and on each the adapters that belong to it."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import Device
from loramux_adapters.evaluation.evaluated import Role
from loramux_server.base.loader import BaseModel, load_base_model
from loramux_server.base.source import BaseSource, Report
from loramux_server.config.environment import kernels_of
from loramux_server.engine.local_engine import LocalAdapter, LocalEngine
from loramux_server.evaluation.contenders import Contender, Subject
from loramux_server.evaluation.local_scorer import LocalScorer
from loramux_server.kernels.choice import choose_kernels


class Bases:
    """One base in one precision at a time, on the serving path or in fp32.

    Attributes:
        opened: the last base that was loaded.
    """

    def __init__(self, source: BaseSource, *, device: Device, cache_dir: Path, max_rank: int, report: Report) -> None:
        self._source, self._device, self._cache_dir = source, device, cache_dir
        self._max_rank, self._report = max_rank, report
        self._engine: LocalEngine | None = None
        self._opened = ("", False)

    def engine(self, quantize: str, *, exact: bool = False) -> LocalEngine:
        """The base in this precision; one of another precision is let go first. Raises BaseModelError.

        Args:
            exact: its weights as they are, computed with in fp32 on the CPU by transformers' own code: slow.
        """
        if self._engine is None or self._opened != (quantize, exact):
            self._engine = None
            gc.collect()
            if exact:
                self._report("loading the base once more, to compare with fp32 (--no-fidelity leaves this out)")
            base = self._load(quantize, exact)
            self._engine = LocalEngine.open(base, max_rank=self._max_rank, check=not exact)
            self._opened = quantize, exact
        return self._engine

    def subject(self, quantize: str, notes: Sequence[str] = ()) -> Subject:
        """This base in an evaluation's words."""
        engine = self.engine(quantize)
        base = engine.base
        return Subject(
            base=base.name,
            base_id=base.base_id,
            quantize=quantize,
            from_gguf=base.source.from_gguf,
            numerics_id=engine.numerics_id,
            notes=tuple(notes),
        )

    def _load(self, quantize: str, exact: bool) -> BaseModel:
        device = CpuDevice() if exact else self._device
        return load_base_model(
            self._source,
            device=device,
            cache_dir=self._cache_dir,
            report=self._report,
            quantize=quantize,
            exact=exact,
            kernels=None if exact else choose_kernels(device, kernels_of(os.environ)),
        )


def contender(
    bases: Bases, name: str, role: Role, directory: Path | None, quantize: str, *, exact: bool = False
) -> Contender:
    """An adapter, or with None the bare base, to be opened when its turn comes."""
    loaded: list[LocalAdapter] = []

    def start() -> LocalScorer:
        engine = bases.engine(quantize, exact=exact)
        if directory is not None:
            loaded.append(engine.load(directory))
        return LocalScorer(engine, loaded[0] if loaded else None)

    def stop() -> None:
        while loaded:
            bases.engine(quantize, exact=exact).unload(loaded.pop())

    return Contender(name, role, start, stop)
