"""Wheels for a machine without network: gathered where there is one, installed beside what that machine has.

    python -m loadtests.gpu.wheels --python 3.12 --out dist/gpu

makes our wheel and downloads, at the versions of constraints.txt, what it needs beside PyTorch, Triton, CUDA's
libraries and numpy, which a machine with a GPU has: its PyTorch decides their versions. peft and pytest come along. Of
bitsandbytes' wheel `--cuda 130` keeps the library of one version of CUDA alone, a sixth of its size.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import LoadTestError

ROOT = Path(__file__).parents[2]
MORE = ("peft", "pytest", "psutil", "hypothesis")  # beside what our wheel asks for
# these come with the machine's PyTorch, or are asked for by nothing that runs here
LEFT_OUT = re.compile(
    r"torch|triton|numpy|sympy|mpmath|networkx|setuptools|pip|wheel|(nvidia|cuda)[-_].*", re.IGNORECASE
)
PLATFORMS = (
    *(f"manylinux_2_{version}_x86_64" for version in (28, 27, 24, 17, 12, 5)),
    *("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"),
)


def pins(constraints: str) -> dict[str, str]:
    """Package -> version of a constraints file, names as package indexes normalize them."""
    found = {}
    for line in constraints.splitlines():
        name, equals, version = line.partition("==")
        if equals and not line.startswith("#"):
            found[normalized(name)] = version.strip()
    return found


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def needed(wheel: Path, pinned: dict[str, str]) -> list[str]:
    """Lines name==version of what our wheel and MORE need, directly or not, as far as constraints.txt knows it."""
    from importlib import metadata

    wanted, todo = dict[str, str](), [*map(_name, _requirements(wheel)), *MORE]
    while todo:
        name = normalized(todo.pop())
        if name in wanted or LEFT_OUT.fullmatch(name) or name not in pinned:
            continue
        wanted[name] = f"{name}=={pinned[name]}"
        try:
            todo += [_name(line) for line in metadata.requires(name) or () if "extra ==" not in line]
        except metadata.PackageNotFoundError as error:
            raise LoadTestError(f"{name} is not installed here, so nobody knows what it needs: make install") from error
    return sorted(wanted.values())


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    return [line.partition(":")[2] for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]


def _name(requirement: str) -> str:
    found = re.match(r"\s*([A-Za-z0-9._-]+)", requirement)
    assert found is not None
    return found[1]


def gather(out: Path, *, python: str, cuda: str | None) -> list[Path]:
    """Fills `out` with wheels for `python` ("3.12") on Linux on x86-64; older ones there are removed.

    Raises:
        LoadTestError: one cannot be made or had.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.whl"):
        old.unlink()
    _run([sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)], "our wheel cannot be made")
    (ours,) = out.glob("loramux-*.whl")
    wanted = needed(ours, pins((ROOT / "constraints.txt").read_text(encoding="utf-8")))
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    download += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    _run([*download, "--dest", str(out), *wanted], "some wheels cannot be had")
    if cuda is not None:
        for wheel in out.glob("bitsandbytes-*.whl"):
            keep_one_cuda(wheel, cuda)
    return sorted(out.glob("*.whl"))


def keep_one_cuda(wheel: Path, version: str) -> None:
    """Takes the libraries of other versions of CUDA, and of other makers' cards, out of bitsandbytes' wheel.

    Raises:
        LoadTestError: it has none of this version.
    """
    smaller = wheel.with_suffix(".smaller")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as to:
        kept = f"libbitsandbytes_cuda{version}.so"
        if not any(name.endswith("/" + kept) for name in source.namelist()):
            have = sorted(re.findall(r"libbitsandbytes_cuda(\d+)\.so", " ".join(source.namelist())))
            raise LoadTestError(f"{wheel.name} has no library for CUDA {version}, only for {', '.join(have)}")
        for item in source.infolist():
            is_other = re.search(r"/libbitsandbytes_(cuda|rocm|xpu)\d*\.(so|dll)$", item.filename)
            if not is_other or item.filename.endswith("/" + kept):
                to.writestr(item, source.read(item))
    smaller.replace(wheel)


def install(wheels: Path, site: Path) -> None:
    """Installs them into the directory `site`, without network and without touching the environment.

    Raises:
        LoadTestError: there are none, or pip refuses one.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise LoadTestError(f"{wheels} holds no wheels; `make gpu-wheels` gathers them on a machine with network")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    pip += ["--find-links", str(wheels), "--no-deps", "--no-compile", "--target", str(site)]
    _run([*pip, *map(str, found)], "the wheels cannot be installed")


def _run(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise LoadTestError(f"{what}:\n{done.stdout[-3000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    parser.add_argument("--python", default=here, help=f"of the machine with the GPU (default: {here})")
    parser.add_argument("--cuda", metavar="VERSION", help='keep one library of bitsandbytes alone, "130" say')
    parser.add_argument("--out", type=Path, default=Path("dist/gpu"), help="default: dist/gpu")
    args = parser.parse_args()
    try:
        found = gather(args.out, python=args.python, cuda=args.cuda)
    except LoadTestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(found)} wheels, {sum(wheel.stat().st_size for wheel in found) / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
