"""Checkpoints of a run: safetensors and JSON, whole or not there, never a pickle; the last two are kept.

<run>/checkpoints/step-00000050/
    state.safetensors   parameters and optimizer state
    log.jsonl           the log up to this step
    checkpoint.json     step, numbers, what the run was made of, and the digests of all of this
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loramux_adapters.digests import sha256_of_file, sha256_of_json
from loramux_adapters.durable_files import remove_tree, replace_directory
from loramux_adapters.errors import CheckpointError

FORMAT = 1
KEPT = 2
_STATE, _LOG, _INDEX = "state.safetensors", "log.jsonl", "checkpoint.json"
_DIRECTORY = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that a run needs to go on as if it had not stopped.

    Attributes:
        step: steps done.
        tensors: parameters and optimizer state by name.
        numbers: the optimizer state that is no tensor, by name.
        log: the lines of the log so far.
        peak_bytes: most memory the run took so far.
    """

    step: int
    tensors: Mapping[str, torch.Tensor]
    numbers: Mapping[str, int | float] = field(default_factory=dict)
    log: bytes = b""
    peak_bytes: int = 0


class Checkpoints:
    """The checkpoints of one run directory; one process at a time uses it.

    Attributes:
        damaged: names of checkpoints that `latest` found unreadable and passed over.
    """

    def __init__(self, directory: Path, made_of: Mapping[str, Any]) -> None:
        """`made_of`: what decides the bits of a run, as plain data; a checkpoint made of anything else is refused."""
        self._directory = directory
        self._made_of: dict[str, Any] = json.loads(json.dumps(dict(made_of)))
        self._good: list[int] = []
        self.damaged: list[str] = []

    def latest(self) -> Checkpoint | None:
        """The newest one that is whole; None if there is none at all.

        Raises:
            CheckpointError: it belongs to another run, or there are some and none is whole.
        """
        for step in sorted(self._steps(), reverse=True):
            try:
                checkpoint = self._read(step)
            except _Damaged as error:
                self.damaged.append(f"{self._path(step)} ({error})")
                continue
            self._good = [step]
            return checkpoint
        if self.damaged:
            raise CheckpointError(
                f"no checkpoint can be read: {'; '.join(self.damaged)}. Restore one, or start again with --overwrite"
            )
        return None

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint; from when this returns it outlives any crash. Keeps this one and the one before.

        Raises:
            CheckpointError: it cannot be written, say because the disk is full; the earlier ones are still there.
        """
        target, partial = self._path(checkpoint.step), self._directory / _PARTIAL
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            remove_tree(partial)
            partial.mkdir()
            self._fill(partial, checkpoint)
            replace_directory(partial, target)
            self._good = [*self._good, checkpoint.step][-KEPT:]
            for step in set(self._steps()) - set(self._good):
                remove_tree(self._path(step))
        except (OSError, SafetensorError) as error:
            _try_to_remove(partial)
            reason = getattr(error, "strerror", None) or str(error)
            raise CheckpointError(
                f"the checkpoint of step {checkpoint.step} cannot be written to {self._directory}: {reason}. "
                f"{self._still_there()} Make room and run the same command again"
            ) from error
        return target

    def remove(self) -> None:
        """Removes all of them, when the adapter that they were for is on disk. Raises OSError."""
        remove_tree(self._directory)

    def _steps(self) -> list[int]:
        if not self._directory.is_dir():
            return []
        found = [_DIRECTORY.fullmatch(path.name) for path in self._directory.iterdir()]
        return [int(match[1]) for match in found if match]

    def _path(self, step: int) -> Path:
        return self._directory / f"step-{step:08d}"

    def _still_there(self) -> str:
        if not self._good:
            return "Nothing had been saved before."
        return f"The checkpoint of step {self._good[-1]} is still there."

    def _fill(self, directory: Path, checkpoint: Checkpoint) -> None:
        save_file(dict(checkpoint.tensors), directory / _STATE)
        (directory / _LOG).write_bytes(checkpoint.log)
        content = {
            "format": FORMAT,
            "step": checkpoint.step,
            "numbers": dict(checkpoint.numbers),
            "peak_bytes": checkpoint.peak_bytes,
            "made_of": self._made_of,
            "sha256": {name: sha256_of_file(directory / name) for name in (_STATE, _LOG)},
        }
        index = {"content": content, "sha256": sha256_of_json(content)}
        (directory / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _read(self, step: int) -> Checkpoint:
        directory = self._path(step)
        try:
            index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
            content = index["content"]
            if index["sha256"] != sha256_of_json(content) or content["step"] != step:
                raise _Damaged(f"{_INDEX} has changed")
            if content["format"] != FORMAT:
                raise CheckpointError(
                    f"{directory} was written by another version of loramux (format {content['format']}, this one "
                    f"reads {FORMAT}); continue it there, or start again with --overwrite"
                )
            for name in (_STATE, _LOG):
                if content["sha256"][name] != sha256_of_file(directory / name):
                    raise _Damaged(f"{name} has changed")
            self._refuse_another_run(content["made_of"])
            return Checkpoint(
                step=step,
                tensors=load_file(directory / _STATE),
                numbers=content["numbers"],
                log=(directory / _LOG).read_bytes(),
                peak_bytes=content["peak_bytes"],
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _Damaged(str(error) or type(error).__name__) from error

    def _refuse_another_run(self, made_of: Mapping[str, Any]) -> None:
        differences = _differences(made_of, self._made_of)
        if differences:
            raise CheckpointError(
                f"{self._directory.parent} holds an unfinished run that was started with something else: "
                f"{'; '.join(differences)}. Give the same settings and data to continue it, name another --out, or "
                "start again with --overwrite"
            )


class _Damaged(Exception):
    """This checkpoint cannot be used; another may."""


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words; fields of a nested mapping one by one."""
    found: list[str] = []
    for key in sorted(set(was) | set(now)):
        old, new = was.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new)
        elif old != new:
            found.append(f"{key} was {_short(old)}, is {_short(new)}")
    return found


def _short(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else json.dumps(value)


def _try_to_remove(directory: Path) -> None:
    """Best effort on the way out with a better error; what is left is removed by the next save."""
    try:
        remove_tree(directory)
    except OSError:
        pass
