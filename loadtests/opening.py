"""Time to open a store of 10,000 adapters, as the server's start report says it.

    python -m loadtests opening

A backup of tiny adapters, each with weights of its own, is written by hand and restored into a new store. Then servers
start on it, some of them with the store's files put out of the system's memory before.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import re
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import LoadTestError
from .process import Program, own_program, started_server
from .report import Figure, figures_table, machine, write_json

MODULE, WIDE_IN, WIDE_OUT, ALPHA = "model.layers.0.self_attn.q_proj", 8, 8, 2
CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": ALPHA, "target_modules": ["q_proj"]}
STAGE = re.compile(rb"open the adapter store(?: \.\.\.)? ([0-9.]+) s")
LONGEST = 2.0  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, help="directory of the base checkpoint (default: the server's default)")
    parser.add_argument("--adapters", type=int, default=10_000, help="in the store (default: 10,000)")
    parser.add_argument("--starts", type=int, default=3, help="of each kind (default: 3)")
    parser.add_argument("--store", type=Path, help="of an earlier run, or where to make one (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results"), help="where opening.json goes")


def main(args: argparse.Namespace) -> int:
    """0 if the target is reached."""
    with tempfile.TemporaryDirectory(prefix="loadtest-opening-") as scratch:
        store = args.store or Path(scratch) / "store"
        restoring = None
        if not store.exists():
            backup = Path(scratch) / "backup.tar.gz"
            write_backup(backup, args.adapters)
            restoring = restore(own_program(), backup, store)
            print(f"{args.adapters} adapters restored in {restoring:.0f} s", flush=True)
        seconds: dict[str, list[float]] = {"from disk": [], "from memory": []}
        for _ in range(args.starts):
            for how, found in seconds.items():
                if how == "from disk":
                    forget(store)
                found.append(opening_seconds(args.base, store, args.out / "server-opening.log.tmp"))
                print(f"opened {how} in {found[-1]:.1f} s", flush=True)
    figures: list[Figure] = [
        (f"to open {args.adapters} adapters {how}, s", median, f"<= {LONGEST:g}", median <= LONGEST)
        for how, found in seconds.items()
        if (median := statistics.median(found)) is not None
    ]
    print(figures_table(figures))
    document = {"adapters": args.adapters, "restoring": restoring, "seconds": seconds, "machine": machine()}
    write_json(args.out / "opening.json", document)
    return 0 if all(reached for *_, reached in figures) else 1


def opening_seconds(base: Path | None, store: Path, log: Path) -> float:
    """Of a server that starts, as its report says."""
    with started_server(base, log=log, store=store):
        found = STAGE.search(log.read_bytes())
    if found is None:
        raise LoadTestError(f"the start report does not say how long the store took; it is in {log}")
    return float(found[1])


def restore(program: Program, backup: Path, store: Path) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    line = [*program.words, "adapters", "restore", str(backup), "--adapter-dir", str(store)]
    done = subprocess.run(line, env=program.environ, capture_output=True, check=False)
    if done.returncode:
        raise LoadTestError(f"the backup was not restored: {done.stderr[-500:].decode(errors='replace')}")
    return time.monotonic() - began


def forget(store: Path) -> None:
    """Have the system read the store's files from the disk again; what it knows of names and directories stays."""
    os.sync()
    for path in store.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def write_backup(target: Path, count: int) -> None:
    """A backup as `loramux adapters backup` writes it."""
    weights = {digest: content for digest, content in map(tiny_weights, range(count))}
    config = json.dumps(CONFIG).encode()
    files = {
        digest: {"adapter_config.json": config, "adapter_model.safetensors": raw} for digest, raw in weights.items()
    }
    manifest = {
        "format": "loramux backup 1",
        "adapters": [_manifest_entry(number, digest) for number, digest in enumerate(weights)],
        "files": {digest: {name: len(raw) for name, raw in own.items()} for digest, own in files.items()},
    }
    with gzip.open(target, "wb", compresslevel=1) as zipped:
        with tarfile.open(fileobj=zipped, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for name, raw in [("manifest.json", json.dumps(manifest).encode()), *_members(files)]:
                entry = tarfile.TarInfo(name)
                entry.size = len(raw)
                tar.addfile(entry, io.BytesIO(raw))


def _members(files: Mapping[str, Mapping[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    for digest, own in files.items():
        for name, raw in own.items():
            yield f"versions/{digest}/{name}", raw


def _manifest_entry(number: int, digest: str) -> dict[str, Any]:
    version = {
        "digest": digest,
        "rank": 1,
        "target_modules": "q_proj",
        "base_id": None,
        "checked_base": None,
        "created": 1_700_000_000 + number,
        "fingerprint": "none",
    }
    times = {"created": version["created"], "updated": version["created"]}
    return {"name": f"tiny{number:05d}", "current": digest, "pinned": False, **times, "versions": [version]}


def tiny_weights(number: int) -> tuple[str, bytes]:
    """A safetensors file with one pair of its own, and the version that it is: a digest over what the pair computes."""
    a = hashlib.sha512(b"%d" % number).digest()[: 2 * WIDE_IN]
    b = bytes(2 * WIDE_OUT)
    name = f"base_model.model.{MODULE}"
    header = json.dumps(
        {
            f"{name}.lora_A.weight": {"dtype": "F16", "shape": [1, WIDE_IN], "data_offsets": [0, len(a)]},
            f"{name}.lora_B.weight": {
                "dtype": "F16",
                "shape": [WIDE_OUT, 1],
                "data_offsets": [len(a), len(a) + len(b)],
            },
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    line = json.dumps([MODULE, float(ALPHA).hex(), "F16", [1, WIDE_IN], "F16", [WIDE_OUT, 1]]).encode()
    digest = hashlib.sha256(b"loramux adapter 1\n" + line + b"\n" + a + b).hexdigest()
    return digest, len(header).to_bytes(8, "little") + header + a + b
