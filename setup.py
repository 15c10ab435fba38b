"""The optional compiled CPU kernels; everything else about the package is in pyproject.toml.

They are one shared library beside their Python modules, with a C ABI and without Python's headers: the same file serves
every version of Python, and a compiler for C++ is all that building it needs. Without one the package installs all the
same and the tensor code does the work.
"""

from __future__ import annotations

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

SOURCES = "server/loramux_server/kernels/compiled/csrc"
FLAGS = ["-O3", "-std=c++17", "-pthread", "-g0"]  # the first two decide bits; Python may have been built with -g
# The kernels of exact integers are compiled once for each instruction set; where one is not known here, its file is
# empty. No product and sum may become an fma that is not written as one: the bits are the same on all of them.
EXACT = ["-ffp-contract=off", "-fno-math-errno"]
INSTRUCTION_SETS = {
    "portable": [],
    "avx2": ["-march=x86-64-v3"],
    "avx_vnni": ["-march=x86-64-v3", "-mavxvnni"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_vnni": ["-march=x86-64-v4", "-mavx512vnni"],
    "neon": [],
}


def files(pattern: str) -> list[str]:
    """Sources of this kind, relative to this file."""
    root = Path(__file__).parent.resolve()
    return sorted(path.relative_to(root).as_posix() for path in (root / SOURCES).glob(pattern))


class BuildKernels(build_ext):
    """Builds a plain shared library; if it cannot be built, that is reported in one line and it is left out."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return list(ext.export_symbols)  # no PyInit_*: this is not a Python module

    def build_extension(self, ext: Extension) -> None:
        try:
            self._compile_for_instruction_sets(ext)
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            reason = (str(error).splitlines() or ["unknown reason"])[0]
            print(f"loramux: {ext.name} was not built ({reason}); the slower tensor path will be used")

    def _compile_for_instruction_sets(self, ext: Extension) -> None:
        is_x86 = self._target().startswith(("x86_64", "amd64"))

        def compiled(name: str, flags: list[str]) -> list[str]:
            source = [f"{SOURCES}/exact/{name}.cpp"]
            for more in ([*EXACT, *flags], EXACT) if is_x86 and flags else (EXACT,):
                try:
                    return self.compiler.compile(
                        source, output_dir=self.build_temp, extra_postargs=[*FLAGS, *more], depends=ext.depends
                    )
                except CCompilerError:
                    if more is EXACT:
                        raise
            return []

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # each thread waits for a compiler
            for objects in pool.map(compiled, INSTRUCTION_SETS.keys(), INSTRUCTION_SETS.values()):
                ext.extra_objects += objects

    def _target(self) -> str:
        """What the compiler makes code for, "aarch64-linux-gnu" say: CC and CXX may name one for another processor."""
        compiler = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        asked = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True)
        return (asked.stdout if asked.returncode == 0 else platform.machine()).strip().lower()


class Wheel(bdist_wheel):
    """A wheel for this platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "loramux_server.kernels.compiled._kernels",
            sources=[*files("*.cpp"), f"{SOURCES}/exact/exact.cpp", f"{SOURCES}/exact/training.cpp"],
            depends=[*files("*.h"), *files("exact/*.h")],
            language="c++",
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
