"""Runs one change of a store again and again, killed with -9 each time at the next step of it.

`crash_store.py ACTION STEPS TEMPLATE UPLOAD WORK`: for k = 1, 2, ... copies the store TEMPLATE to WORK/k and runs
ACTION on it in a child that is killed before its k-th step. A step is a call from the store's code to the system or to
SQLite, of which one line may make many; if STEPS is "lines", a line of that code is one, too. The first child that gets
to the end is the last. Prints how many were killed, and at how many of them a call was about to be made.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import loramux_adapters.store.store as store_module
from loramux_adapters.artifact.format import digest_of, read_config
from loramux_adapters.errors import AdapterCorrupt
from loramux_adapters.store.records import UploadRow
from loramux_adapters.store.snapshot import AdapterCopy
from loramux_adapters.store.store import AdapterStore

FOLDER = Path(store_module.__file__).parent
WATCHED = {str(path) for path in FOLDER.glob("*.py")}
CALLS = ("os.", "open", "shutil.", "sqlite3.", "fcntl.")  # audit events


def publish(store: AdapterStore, upload: Path, name: str = "tuned") -> None:
    with store.stage() as staging:
        for path in upload.iterdir():
            shutil.copy(path, staging.directory)
        store.publish(name, staging, rank=4, base_id=None, target_modules=["q_proj"])


def publish_new(store: AdapterStore, upload: Path) -> None:
    publish(store, upload, "fresh")


def rollback(store: AdapterStore, upload: Path) -> None:
    store.rollback("tuned")


def pin(store: AdapterStore, upload: Path) -> None:
    store.pin("tuned")


def delete(store: AdapterStore, upload: Path) -> None:
    store.delete("tuned")


def delete_leased(store: AdapterStore, upload: Path) -> None:
    """Garbage collection at the end of the last lease."""
    lease = store.acquire("tuned")
    store.delete("tuned")
    lease.release()


def collect_others(store: AdapterStore, upload: Path) -> None:
    """Garbage collection of what another process deleted."""
    tool = AdapterStore(upload_root(store), owner=False)
    tool.delete("tuned")
    store.refresh()


def set_aside(store: AdapterStore, upload: Path) -> None:
    """A version that was damaged on disk is found at its load; `read_config` stands for the load, which needs torch."""
    version = store.record("tuned").version
    try:
        store.load(version)
    except AdapterCorrupt:
        return
    raise AssertionError("the damage was not found")


def repair(store: AdapterStore, upload: Path) -> None:
    publish(store, upload)


def restore(store: AdapterStore, upload: Path) -> None:
    """From a backup, in place of what the name has."""
    digest = digest_of(read_config(upload), upload)
    kept = UploadRow("tuned", digest, 4, "q_proj", 1, base_id=None, checked_base=None, created=1, fingerprint="none")
    with store.stage() as staging:
        files = staging.directory / digest
        shutil.copytree(upload, files)
        store.restore(AdapterCopy("tuned", [kept], {digest: files}, digest, False, 1, 1), replace=True)


def upload_root(store: AdapterStore) -> Path:
    return store.directory("0" * 64).parent.parent


ACTIONS: dict[str, Callable[[AdapterStore, Path], None]] = {
    "publish": publish_new,
    "replace": publish,
    "rollback": rollback,
    "pin": pin,
    "delete": delete,
    "gc-last-lease": delete_leased,
    "gc-others": collect_others,
    "gc-opening": lambda store, upload: None,
    "quarantine": set_aside,
    "repair": repair,
    "restore": restore,
}


class Steps:
    """Kills this process before step `limit`."""

    def __init__(self, limit: int, calls: int, *, lines: bool) -> None:
        self.lines = lines
        self._left = limit
        self._calls = calls  # a pipe: one byte if the step was a call

    def step(self, is_call: bool) -> None:
        self._left -= 1
        if self._left == 0:
            if is_call:
                os.write(self._calls, b"x")
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(CALLS) and from_the_store(sys._getframe(1)):
            self.step(True)

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            self.step(False)
        return self.trace


def from_the_store(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != __file__:
        if frame.f_code.co_filename in WATCHED:
            return True
        frame = frame.f_back
    return False


class TracedConnection(sqlite3.Connection):
    """Every statement is a step: SQLite raises no audit event for one."""

    steps: Steps

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        self.steps.step(True)
        if arguments[0] == "PRAGMA synchronous = FULL":  # as with fsync: only a power cut would tell
            return super().execute("PRAGMA synchronous = OFF")
        return super().execute(*arguments)


def run(action: Callable[[AdapterStore, Path], None], root: Path, upload: Path, steps: Steps) -> None:
    connect = sqlite3.connect
    TracedConnection.steps = steps
    # for all of this process, which does nothing else and is killed
    sqlite3.connect = lambda *args, **options: connect(*args, factory=TracedConnection, **options)  # type: ignore
    is_opening = action is ACTIONS["gc-opening"]
    if not is_opening:
        # the statements of its opening are no steps of the change
        TracedConnection.steps = Steps(0, -1, lines=False)
        store = AdapterStore(root, keep_versions=2)
        TracedConnection.steps = steps
    sys.addaudithook(steps.audit)
    if steps.lines:
        sys.settrace(steps.trace)
    if is_opening:
        store = AdapterStore(root, keep_versions=2)
    action(store, upload)
    sys.settrace(None)
    os._exit(0)


def main() -> None:
    sync = os.fsync
    os.fsync = lambda fd: None  # what a killed process wrote is not lost; only a power cut would tell the difference
    name, granularity = sys.argv[1:3]
    template, upload, work = map(Path, sys.argv[3:])
    read_config(upload)  # imported before the children are
    if name == "quarantine":
        import loramux_adapters.lora.weights  # noqa: F401
    killed = calls = 0
    while True:
        root = work / str(killed + 1)
        shutil.copytree(template, root)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            run(ACTIONS[name], root, upload, Steps(killed + 1, writer, lines=granularity == "lines"))
        os.close(writer)
        _, status = os.waitpid(child, 0)
        calls += len(os.read(reader, 1))
        os.close(reader)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        killed += 1
    os.fsync = sync
    print(killed, calls)


if __name__ == "__main__":
    main()
