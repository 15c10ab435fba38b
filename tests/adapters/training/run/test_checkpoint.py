from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_adapters.errors import CheckpointError
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run.checkpoint import Checkpoint, Checkpoints

MADE_OF: dict[str, Any] = {"data": "d" * 64, "base": "b" * 64, "recipe": Recipe().as_json()}


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        tensors={"parameter/a": torch.full((3, 2), float(step)), "optimizer/step/a": torch.tensor(step)},
        numbers={"optimizer/step/b": step},
        log=b'{"kind": "step"}\n' * step,
        peak_bytes=1000 + step,
    )


def saved(directory: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(directory, MADE_OF)
    for step in steps:
        checkpoints.save(checkpoint(step))
    return checkpoints


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """What a full disk does, as far as a test may: writing fails in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    saved(tmp_path / "c", 5)

    found = Checkpoints(tmp_path / "c", MADE_OF).latest()

    assert found is not None
    assert (found.step, found.log, found.numbers, found.peak_bytes) == (
        5,
        checkpoint(5).log,
        {"optimizer/step/b": 5},
        1005,
    )
    assert {name: tensor.tolist() for name, tensor in found.tensors.items()} == {
        name: tensor.tolist() for name, tensor in checkpoint(5).tensors.items()
    }


def test_no_directory_means_a_run_from_the_start(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nothing", MADE_OF).latest() is None


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 5, 10, 15, 20)

    assert names(tmp_path) == ["step-00000015", "step-00000020"]


@pytest.mark.parametrize("file", ["state.safetensors", "log.jsonl", "checkpoint.json"])
@pytest.mark.parametrize("harm", ["torn", "bit", "gone"])
def test_a_damaged_newest_one_falls_back_to_the_one_before(tmp_path: Path, file: str, harm: str) -> None:
    saved(tmp_path, 5, 10)
    path = tmp_path / "step-00000010" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "torn": lambda: path.write_bytes(path.read_bytes()[:-7]),
        "bit": lambda: path.write_bytes(content),
        "gone": path.unlink,
    }[harm]()

    checkpoints = Checkpoints(tmp_path, MADE_OF)
    found = checkpoints.latest()

    assert found is not None and found.step == 5
    assert len(checkpoints.damaged) == 1 and "step-00000010" in checkpoints.damaged[0]

    checkpoints.save(checkpoint(10))  # its place is taken by a whole one
    again = Checkpoints(tmp_path, MADE_OF)
    assert (found := again.latest()) is not None and found.step == 10
    assert again.damaged == []


def test_when_none_is_whole_nothing_is_started_over_in_silence(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    (tmp_path / "step-00000005" / "state.safetensors").write_bytes(b"")

    with pytest.raises(CheckpointError, match="no checkpoint can be read.*--overwrite"):
        Checkpoints(tmp_path, MADE_OF).latest()


def test_a_run_of_something_else_is_refused_and_what_differs_is_named(tmp_path: Path) -> None:
    saved(tmp_path, 5)
    other = MADE_OF | {"data": "e" * 64, "recipe": Recipe(rank=16, target_modules=("q_proj",)).as_json()}

    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path, other).latest()

    message = str(caught.value)
    assert "data was dddddddddddd..., is eeeeeeeeeeee..." in message
    assert "rank was 8, is 16" in message
    assert 'target_modules was [], is ["q_proj"]' in message
    assert "base" not in message.split("something else:")[1].split(". Give")[0]


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 5)
    monkeypatch.setattr("loramux_adapters.training.run.checkpoint.FORMAT", 2)

    with pytest.raises(CheckpointError, match="another version of loramux"):
        Checkpoints(tmp_path, MADE_OF).latest()


@pytest.mark.parametrize("size", [0, 100, 300])
def test_a_full_disk_leaves_what_was_saved(tmp_path: Path, size: int) -> None:
    checkpoints = saved(tmp_path, 5)

    with (
        no_file_larger_than(size),
        pytest.raises(CheckpointError, match=r"step 10 cannot be written.*step 5 is still there.*Make room"),
    ):
        checkpoints.save(checkpoint(10))

    assert names(tmp_path) == ["step-00000005"]
    found = Checkpoints(tmp_path, MADE_OF).latest()
    assert found is not None and found.step == 5


def test_what_a_killed_save_left_behind_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 5)
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "state.safetensors").write_bytes(b"half")

    assert (found := Checkpoints(tmp_path, MADE_OF).latest()) is not None and found.step == 5
    checkpoints.save(checkpoint(10))
    assert names(tmp_path) == ["step-00000005", "step-00000010"]


def test_a_checkpoint_is_json_and_safetensors_only(tmp_path: Path) -> None:
    saved(tmp_path, 5)

    assert names(tmp_path / "step-00000005") == ["checkpoint.json", "log.jsonl", "state.safetensors"]
    index = json.loads((tmp_path / "step-00000005" / "checkpoint.json").read_text())
    assert index["content"]["made_of"] == MADE_OF
