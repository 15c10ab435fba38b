"""What the server holds: its own byte counts beside what the system says, and beside what merged copies would take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .process import Server
from .report import table

TOLERANCE = 0.10


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the server after its rounds.

    Attributes:
        pools: what the server's metrics state: exact bytes of base, adapters and KV cache, and the overhead (libraries,
            tokenizer, working memory) that it measured once, before its first request.
        process: resident size as the system counts it: rss, pss, private; empty where it does not tell.
        merged: the base merged in bf16 once for each adapter, the usual way without such a server.
    """

    pools: dict[str, int]
    process: dict[str, int]
    merged: int

    @property
    def accounted(self) -> int:
        return sum(self.pools.values())

    @property
    def off_by(self) -> float | None:
        """(resident - accounted) / accounted."""
        return self.process["rss"] / self.accounted - 1 if self.process else None


def read_memory(server: Server, base: Path, adapters: int) -> Memory:
    """The memory of a server on this machine, now."""
    assert server.pid is not None
    checkpoint = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    metrics = server.call("GET", "/metrics").decode()
    return Memory(pools(metrics), resident_bytes(server.pid), adapters * checkpoint)


def pools(metrics: str) -> dict[str, int]:
    """pool -> bytes from the lines `loramux_...bytes{pool="..."} value` of a metrics page."""
    found = re.findall(r'^loramux_\w*bytes\{[^}]*pool="([^"]+)"[^}]*\} (\S+)$', metrics, re.MULTILINE)
    return {pool: int(float(value)) for pool, value in found}


def resident_bytes(pid: int) -> dict[str, int]:
    """Rss, Pss and private (clean and dirty) bytes of a process; empty where the system does not tell."""
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    if not rollup.exists():
        return {}
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", rollup.read_text(encoding="utf-8"), re.MULTILINE))
    sizes = {name: int(value) * 1024 for name, value in fields.items()}
    return {
        "rss": sizes["Rss"],
        "pss": sizes["Pss"],
        "private": sizes["Private_Clean"] + sizes["Private_Dirty"],
    }


def memory_table(memory: Memory, adapters: int) -> str:
    """Parts, sum, what the system says and whether they agree."""
    rows = [["memory", "MiB"]]
    rows += [[f"pool {pool}", _mebibytes(size)] for pool, size in memory.pools.items()]
    rows += [["accounted", _mebibytes(memory.accounted)]]
    rows += [[f"process {kind}", _mebibytes(size)] for kind, size in memory.process.items()]
    rows += [[f"{adapters} merged bf16 copies would take", _mebibytes(memory.merged)]]
    text = table(rows)
    if memory.off_by is not None:
        within = "within" if abs(memory.off_by) <= TOLERANCE else "NOT within"
        text += f"\nrss is {memory.off_by:+.1%} off what is accounted: {within} {TOLERANCE:.0%}"
    return text


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f}"
