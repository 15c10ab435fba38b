"""Trains a tiny real model again and again, each time in a process that SIGKILL ends somewhere, and then to the end.

    python crash_training.py CHECKPOINT DIRECTORY

Every case trains in DIRECTORY/<case> and leaves the adapter in DIRECTORY/<case>/adapter. The libraries are imported
once; each attempt is a fork, made before this process has computed anything.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.training.data.batches import Row
from loramux_adapters.training.model.model import LoraModel
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run.trace import StepRecord
from loramux_adapters.training.run.trainer import Trainer
from loramux_server.base.loader import load_base_model
from support.fakes_training import Remembering

# case -> what ends each attempt but the last: after that step, or at that rename (a checkpoint takes its name by one)
CASES: dict[str, list[tuple[str, int]]] = {
    "unharmed": [],
    "before the first checkpoint": [("step", 2)],
    "between checkpoints": [("step", 5)],
    "twice": [("step", 4), ("step", 8)],
    "while a checkpoint is made": [("rename", 2)],
}
RECIPE = Recipe(
    rank=4, dropout=0.2, batch_size=4, accumulation=2, epochs=3, learning_rate=0.01, seed=7, save_dtype="float32"
)


def rows() -> list[Row]:
    return [
        Row(tuple((5 * index + offset) % 250 for offset in range(6 + index % 5)), (False,) + (True,) * (5 + index % 5))
        for index in range(14)
    ]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def attempt(checkpoint: Path, run_dir: Path, end: tuple[str, int] | None) -> None:
    base = load_base_model(
        str(checkpoint),
        device=CpuDevice(),
        cache_dir=run_dir / "cache",
        report=lambda line: None,
        training=True,
    )
    torch.manual_seed(os.getpid())  # a run may owe nothing to what came before it
    model = LoraModel.build(base.model, RECIPE)
    generator = torch.Generator().manual_seed(RECIPE.seed)
    with torch.no_grad():
        for parameter in model.trainable.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    def after_step(record: StepRecord) -> None:
        if end == ("step", record.step):
            die()

    if end is not None and end[0] == "rename":
        renames = 0
        rename = os.rename

        def counted(source: Path, target: Path) -> None:
            nonlocal renames
            renames += 1
            if renames == end[1]:
                die()
            rename(source, target)

        os.rename = counted  # type: ignore[assignment]
    outcome = Trainer(
        model,
        rows(),
        rows()[:3],
        RECIPE,
        run_dir=run_dir,
        data_sha256="data",
        base_id=base.base_id,
        observer=Remembering(after_step),
        checkpoint_every=3,
    ).run()
    assert outcome.finished and end is None
    model.save(run_dir / "adapter", base_name=base.name, base_id=base.base_id, dtype=RECIPE.save_dtype)


def in_fork(checkpoint: Path, run_dir: Path, end: tuple[str, int] | None) -> int:
    """Runs one attempt and returns how it ended: minus the signal, or the exit code."""
    child = os.fork()
    if child == 0:
        try:
            attempt(checkpoint, run_dir, end)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(checkpoint: Path, directory: Path) -> None:
    for case, ends in CASES.items():
        run_dir = directory / case
        run_dir.mkdir()
        for end in ends:
            code = in_fork(checkpoint, run_dir, end)
            assert code == -signal.SIGKILL, (case, end, code)
        assert in_fork(checkpoint, run_dir, None) == 0, case


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
