"""The directory of one training run: what lies where, who may write, and whether it is finished.

<run>/adapter/      the PEFT directory with card.json, README.md and fingerprint.json; there only when it is whole
<run>/checkpoints/  while the run is not finished
<run>/log.jsonl, curves.png, evaluation.json, evaluation.md, confusion.png
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from loramux_adapters.durable_files import remove_tree, replace_directory
from loramux_adapters.errors import CheckpointError, TrainingError

_RESULTS = ("log.jsonl", "curves.png", "evaluation.json", "evaluation.md", "confusion.png")
_PARTIAL, _LOCK = ".adapter.partial", ".lock"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of a run, whether or not they are there."""

    path: Path

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def is_finished(self) -> bool:
        return self.adapter.is_dir()

    @property
    def is_begun(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("step-*"))

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Makes the directory; for as long as this lasts no other process can write to it.

        One that was made for this and holds nothing in the end goes again.

        Raises:
            TrainingError: the directory cannot be made, or another process trains in it.
        """
        was_there = self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise TrainingError(
                f"{self.path} cannot be written to: {error.strerror}; name another directory with --out"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
            yield
        except BlockingIOError as error:
            raise TrainingError(f"another process trains in {self.path}; wait for it, or name another --out") from error
        finally:
            if not was_there and os.listdir(self.path) == [_LOCK]:
                with suppress(OSError):
                    (self.path / _LOCK).unlink()
                    self.path.rmdir()
            os.close(lock)

    def check_usable(self) -> None:
        """As far as that can be seen without writing anything. Raises TrainingError."""
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise TrainingError(
                f"{self.path} cannot be written to: {there} is "
                f"{'read-only' if there.is_dir() else 'no directory'}; name another directory with --out"
            )

    def clear(self) -> None:
        """Removes what an earlier run left, and nothing else. Raises TrainingError."""
        try:
            for directory in (self.adapter, self.checkpoints, self.path / _PARTIAL):
                remove_tree(directory)
            for name in _RESULTS:
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be cleared: {error.strerror}") from error

    def publish(self, fill: Callable[[Path], None]) -> None:
        """Makes the adapter's directory, which appears whole or not at all; `fill` writes the files into a new one.

        Raises:
            CheckpointError: it cannot be written; the checkpoints are still there.
        """
        partial = self.path / _PARTIAL
        try:
            remove_tree(partial)
            partial.mkdir()
            fill(partial)
            for path in partial.iterdir():  # some libraries make files for their owner alone
                path.chmod(partial.stat().st_mode & 0o666)
            replace_directory(partial, self.adapter)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the adapter cannot be written to {self.adapter}: {error}. The last checkpoint is "
                "still there: make room and run the same command again"
            ) from error
