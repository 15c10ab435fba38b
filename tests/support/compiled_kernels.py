"""Triton kernels compiled for cards that are not here, and what the compiler says of them.

Each module of kernels has its table beside its tests, tests/server/kernels/gpu/compiled_<module>.py, with `COMPILED:
list[Compiled]` at the shapes of an 8B model and others that matter. Run as a program, this compiles all of it, or the
modules that are named, prints a table and fails where a kernel is faulty: `make test-cards`, or `python -m
support.compiled_kernels nf4 --sm 75,90`. Compiling needs neither a device nor CUDA, but a process in which Triton does
not interpret.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

TABLES = Path(__file__).parent.parent / "server" / "kernels" / "gpu"
SMS = (75, 80, 86, 89, 90, 100, 120)
AMPERE_ON = SMS[1:]  # Triton has tensor-core products for these
# What one block of threads may have, in bytes (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"; sm_75 with 64 KiB opted in).
SHARED_LIMIT = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


class Compiled(NamedTuple):
    """One kernel with the constants it is started with."""

    name: str
    kernel: Any  # of @triton.jit
    signature: dict[str, str]  # argument -> "*act" (bf16, fp16 on sm_75), "*fp32", "*u8", "i32", ...
    constants: dict[str, Any]  # argument -> value
    options: dict[str, int] = {}  # num_warps, num_stages, maxnreg
    divisible: tuple[
        str, ...
    ] = ()  # numbers that are multiples of 16, as Triton finds out at a start; pointers all are
    sms: tuple[int, ...] = SMS


@dataclass(frozen=True)
class Built:
    """What came out for one card."""

    module: str
    name: str
    sm: int
    registers: int = 0
    local: int = 0  # bytes of each thread in local memory: spilled registers, or arrays that found no registers
    shared: int = 0  # bytes of each block
    product: str = ""  # the kind of tensor-core instruction: wgmma, tcgen05, mma.sync, fma, or none
    error: str = ""
    ptx: dict[str, int] = field(default_factory=dict)  # how often some instructions are there

    @property
    def faulty(self) -> bool:
        """Not compiled, numbers outside of registers, or more shared memory than the card has."""
        return bool(self.error) or self.local > 0 or self.shared > SHARED_LIMIT[self.sm]


def tables(modules: list[str]) -> Iterator[tuple[str, int]]:
    """(module, index in its COMPILED) of the modules named, or of all."""
    for path in sorted(TABLES.glob("compiled_*.py")):
        module = path.stem.removeprefix("compiled_")
        if not modules or module in modules:
            for index in range(len(_table(module))):
                yield module, index


def _table(module: str) -> list[Compiled]:
    path = TABLES / f"compiled_{module}.py"
    spec = importlib.util.spec_from_file_location(f"compiled_{module}", path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    found: list[Compiled] = loaded.COMPILED
    return found


def build(module: str, index: int, sm: int) -> Built:
    """Compiles one kernel for one card; an error of the compiler is told, not raised."""
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    one = _table(module)[index]
    names = list(one.kernel.arg_names)
    unknown = set(names) ^ (set(one.signature) | set(one.constants))
    if unknown:
        return Built(module, one.name, sm, error=f"arguments that the kernel and its table do not share: {unknown}")
    act = "fp16" if sm < 80 else "bf16"
    signature = {n: "constexpr" if n in one.constants else one.signature[n].replace("act", act) for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in one.divisible]
    source = ASTSource(
        fn=one.kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in one.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    try:
        made = triton_compile(source, target=GPUTarget("cuda", sm, 32), options=dict(one.options))
    except Exception as error:  # whatever a compiler may raise becomes a line of the table
        return Built(module, one.name, sm, error=f"{type(error).__name__}: {error}"[:2000].replace("\n", " "))
    ptx = made.asm["ptx"]
    registers, local = _resources(made.asm["cubin"])
    kinds = ("wgmma", "tcgen05", "mma.sync", "fma.rn.f32")
    counts = {kind: ptx.count(kind) for kind in (*kinds, "prmt.b32", "ld.global", "ld.shared", "cp.async.", "bar.sync")}
    product = next((kind for kind in kinds if counts[kind]), "none")
    return Built(module, one.name, sm, registers, local, made.metadata.shared, product, ptx=counts)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of each thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    line = next(line for line in said.stdout.splitlines() if "REG:" in line)
    numbers = dict(part.split(":") for part in line.split() if part.count(":") == 1)
    return int(numbers["REG"]), max(int(numbers["STACK"]), int(numbers["LOCAL"]))


def build_all(modules: list[str], sms: tuple[int, ...], jobs: int = 2) -> list[Built]:
    """All tables, `jobs` processes at a time."""
    work = [(m, i, sm) for m, i in tables(modules) for sm in _table(m)[i].sms if sm in sms]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(build, *zip(*work, strict=True))) if work else []


def built_elsewhere(modules: list[str], sms: tuple[int, ...]) -> list[Built]:
    """`build_all` in a process of its own, in which Triton compiles whatever it does in this one."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "support.compiled_kernels", *modules, "--json", "--sm", ",".join(map(str, sms))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise RuntimeError(f"kernels could not be compiled:\n{done.stdout}{done.stderr}")
    return [Built(**one) for one in json.loads(done.stdout.splitlines()[-1])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--sm", default=",".join(map(str, SMS)))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = build_all(args.modules, tuple(int(sm) for sm in args.sm.split(",")), args.jobs)
    if args.json:
        print(json.dumps([vars(one) for one in found]))
        return 0
    print("| kernel | sm | registers | local bytes | shared bytes | product |\n| --- | --- | --- | --- | --- | --- |")
    for one in found:
        print(
            f"| {one.module}: {one.name} | {one.sm} | {one.registers} | {one.local} | {one.shared} | "
            f"{one.error or one.product} |"
        )
    return int(any(one.faulty for one in found))


if __name__ == "__main__":
    sys.exit(main())
