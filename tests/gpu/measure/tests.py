"""The tests that need a device, and the kernels' own, compiled: a process for each file, several at a time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure.part import Part

ROOT = Path(__file__).parents[3]
PLACES = ("tests/gpu", "tests/server/kernels/gpu", "tests/adapters/device", "tests/adapters/lora/test_slot_copy.py")
SLOWEST_FIRST = ("test_whole_step.py", "test_attention.py", "test_nf4.py", "test_lora.py", "test_sampling.py")
TRIED = "tests/server/kernels/gpu/test_dense.py"  # in a dry run; of the others it is seen that they can be collected
LINES = 60  # of a file's output, where it fails


def files() -> list[str]:
    """Those that take longest first."""
    found = []
    for place in PLACES:
        path = ROOT / place
        found += sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
    order = {name: number for number, name in enumerate(SLOWEST_FIRST)}
    left_out = {"test_compile.py", "step", "check"}  # for this part: what is compiled or interpreted without a card
    names = [path.relative_to(ROOT).as_posix() for path in found if not left_out & set(path.parts)]
    return sorted(names, key=lambda name: order.get(name.rpartition("/")[2], len(order)))


def run(names: list[str], seconds: float, *flags: str) -> dict[str, Any]:
    """Some files; the packages are those of this environment, not the checkout's own."""
    command = [sys.executable, "-m", "pytest", *names, "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "pythonpath=tests .", "-W", "default", *flags]
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            status: int | None = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=max(seconds, 1.0)
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", " ".join(lines[-1:]))
    }
    found = {"file": " ".join(names), "status": status, "seconds": round(time.monotonic() - began, 1), **counts}
    return found if status == 0 else found | {"output": lines[-LINES:]}


def main() -> int:
    part = Part(__doc__)
    todo: list[tuple[tuple[str, ...], tuple[str, ...]]] = [((name,), ()) for name in files()]
    if part.dry:
        todo = [((TRIED,), ()), (tuple(files()), ("--collect-only",))]
    jobs = max(1, min(8, (os.cpu_count() or 1) // 2))
    done: list[dict[str, Any]] = []
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(lambda names, flags: run(list(names), part.left, *flags), *one) for one in todo]
        for future in running:
            done.append(future.result())
            part.write(files=done)
    bad = [one for one in done if one["status"] != 0]
    for one in bad:
        words = "out of time" if one["status"] is None else f"status {one['status']}"
        part.say("\n".join([f"== {one['file']}: {words}", *one["output"][-12:]]))
    total = {word: sum(one.get(word, 0) for one in done) for word in ("passed", "failed", "error", "skipped")}
    part.write(total=total)
    part.say(
        f"{len(done)} files, {len(bad)} of them bad: {', '.join(f'{count} {word}' for word, count in total.items())}"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
