"""What the server holds: its own byte counts beside what the system says, and beside what merged copies would take."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .process import Server
from .report import table

TOLERANCE = 0.10


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the server after its rounds.

    Attributes:
        pools: what the server's metrics state, byte for byte.
        libraries: resident size of a Python with the same libraries and no model: the stated overhead.
        process: resident size as the system counts it: rss, pss, private; empty where it does not tell.
        merged: the base merged in bf16 once for each adapter, the usual way without such a server.
    """

    pools: dict[str, int]
    libraries: int
    process: dict[str, int]
    merged: int

    @property
    def accounted(self) -> int:
        return sum(self.pools.values()) + self.libraries

    @property
    def off_by(self) -> float | None:
        """(resident - accounted) / accounted."""
        return self.process["rss"] / self.accounted - 1 if self.process else None


def read_memory(server: Server, base: Path, adapters: int) -> Memory:
    """The memory of a server on this machine, now."""
    assert server.pid is not None
    checkpoint = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    metrics = server.call("GET", "/metrics").decode()
    return Memory(pools(metrics), library_bytes(), resident_bytes(server.pid), adapters * checkpoint)


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


def library_bytes() -> int:
    """Resident size of a Python that has imported what such a server needs and computed once; 0 if nobody tells."""
    code = (
        "import os, torch, bitsandbytes, fastapi, uvicorn, prometheus_client\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM\n"
        "ones = torch.ones(64, 64, dtype=torch.bfloat16)\n"
        "torch.nn.functional.linear(ones, ones)\n"
        "from loadtests.memory import resident_bytes\n"
        "print(resident_bytes(os.getpid()).get('rss', 0))\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    return int(printed.split()[-1])


def memory_table(memory: Memory, adapters: int) -> str:
    """Parts, sum, what the system says and whether they agree."""
    rows = [["memory", "MiB"]]
    rows += [[f"pool {pool}", _mebibytes(size)] for pool, size in memory.pools.items()]
    rows += [["libraries, no model (stated overhead)", _mebibytes(memory.libraries)]]
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
