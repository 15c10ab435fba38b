"""The optional compiled CPU kernels; everything else about the package is in pyproject.toml.

Each package with C++ sources in its `csrc/` gets one shared library `_kernels.so` beside its modules: a plain C ABI
without Python headers, loaded through ctypes. Without a compiler, or without sources, the package installs all the same
and the tensor code does the work.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

SHARED = "adapters/loramux_adapters/csrc"  # headers that the kernels of both packages include
PACKAGES = {"loramux_adapters": "adapters/loramux_adapters", "loramux_server": "server/loramux_server"}
FLAGS = ["-O3", "-std=c++17", "-pthread"]


def kernels(package: str, directory: str) -> list[Extension]:
    """The library of one package, or nothing if it has no sources. Its paths are relative to this file."""
    root = Path(__file__).parent.resolve()
    sources = sorted(path.relative_to(root).as_posix() for path in (root / directory / "csrc").glob("*.cpp"))
    if not sources:
        return []
    folders = {SHARED, f"{directory}/csrc"}
    headers = sorted(path.relative_to(root).as_posix() for folder in folders for path in (root / folder).glob("*.h"))
    return [
        Extension(
            f"{package}._kernels",
            sources=sources,
            depends=headers,
            include_dirs=[SHARED],
            language="c++",
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]


class BuildKernels(build_ext):
    """Builds plain shared libraries; one that cannot be built is reported in one line and left out."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return list(ext.export_symbols)  # no PyInit_*: this is not a Python module

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            reason = (str(error).splitlines() or ["unknown reason"])[0]
            print(f"loramux: {ext.name} was not built ({reason}); the slower tensor path will be used")


setup(
    ext_modules=[extension for package, directory in PACKAGES.items() for extension in kernels(package, directory)],
    cmdclass={"build_ext": BuildKernels},
)
