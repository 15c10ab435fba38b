"""Runs one change of a store again and again, killed each time at the next line that it executes.

`crash_store.py ACTION TEMPLATE UPLOAD WORK`: for k = 1, 2, ... copies the store TEMPLATE to WORK/k and runs ACTION on
it in a child that ends, without any clean-up, before it executes its k-th line of the store's code. The first child
that gets to the end is the last. Prints how many were killed.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import loramux_adapters.store as store_module
from loramux_adapters.store import AdapterStore

KILLED = 77
WATCHED = {
    str(Path(store_module.__file__).with_name(name)) for name in ("store.py", "store_files.py", "store_index.py")
}


def publish(store: AdapterStore, upload: Path) -> None:
    with store.stage() as staging:
        for path in upload.iterdir():
            shutil.copy(path, staging.directory)
        store.publish("tuned", staging, rank=8, base_id=None, target_modules=["q_proj"])


def delete(store: AdapterStore, upload: Path) -> None:
    store.delete("tuned")


ACTIONS: dict[str, Callable[[AdapterStore, Path], None]] = {"publish": publish, "delete": delete}


def run_until_line(action: Callable[[AdapterStore, Path], None], root: Path, upload: Path, limit: int) -> None:
    store = AdapterStore(root, keep_versions=1)
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            lines += 1
            if lines == limit:
                os._exit(KILLED)
        return trace

    sys.settrace(trace)
    action(store, upload)
    sys.settrace(None)
    os._exit(0)


def main() -> None:
    os.fsync = lambda fd: None  # what a killed process wrote is not lost; only a power cut would tell the difference
    name, template, upload, work = sys.argv[1], *map(Path, sys.argv[2:])
    killed = 0
    while True:
        root = work / str(killed + 1)
        shutil.copytree(template, root)
        child = os.fork()
        if child == 0:
            run_until_line(ACTIONS[name], root, upload, killed + 1)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            break
        assert code == KILLED, code
        killed += 1
    print(killed)


if __name__ == "__main__":
    main()
