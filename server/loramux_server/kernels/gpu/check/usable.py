"""Whether kernels in Triton run on a device; this module can be imported without Triton."""

from __future__ import annotations

import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from loramux_adapters.device.device import Device

OLDEST = (7, 5)  # compute capability: fp16 products since Volta, and what this Triton still compiles for
_ROWS, _INPUTS, _OUTPUTS = 5, 64, 80  # of the first product: tiles that are not full


def why_no_triton(device: Device, *, again: bool = False) -> str:
    """Why they do not run there, and what to do about it, as the rest of a sentence; empty where they do.

    On a card the first call takes some seconds, in which the first kernel is compiled.

    Args:
        again: they ran when this was asked before, so that no kernel need be tried.
    """
    if find_spec("triton") is None:
        return (
            "Triton is not installed: it comes with PyTorch for CUDA on Linux, or by `pip install triton` in the "
            "version that this PyTorch names"
        )
    if torch.version.hip:
        return "this PyTorch is for processors of AMD's, on which they were never tried"
    try:
        capability = device.capability
    except (AssertionError, RuntimeError) as error:  # PyTorch's, without CUDA or without a driver
        return f"there is no device {device} that answers ({first_line(error)})"
    if (0, 0) < capability < OLDEST:
        mine, needed = (".".join(map(str, pair)) for pair in (capability, OLDEST))
        return f"{device.name} has compute capability {mine}, and they need {needed} (T4, RTX 20) or newer"
    return _why_nothing_compiles() or ("" if again else _why_first_kernel_fails(device))


def _why_nothing_compiles() -> str:
    """Triton has a C compiler make what starts a kernel, and that includes Python's own header."""
    import triton

    if triton.knobs.runtime.interpret:
        return ""
    compiler = triton.knobs.build.cc or shutil.which("gcc") or shutil.which("clang")
    if not compiler or shutil.which(compiler) is None:
        what = f"CC names {compiler}, which is not there" if compiler else "there is none"
        return f"Triton needs a C compiler and {what}: install gcc (apt install gcc), or name one in CC"
    scheme = sysconfig.get_default_scheme()
    folder = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    if not (Path(folder) / "Python.h").is_file():
        return f"Triton needs Python.h in {folder}: install Python's headers (apt install python3-dev)"
    return ""


def _why_first_kernel_fails(device: Device) -> str:
    """A product of small whole numbers, which is exact in any order and on any card."""
    from loramux_server.kernels.gpu.dense import dense_product
    from loramux_server.kernels.gpu.split_sums import row_tiles_of, scratch_numbers

    x = (torch.arange(_ROWS * _INPUTS) % 7 - 3).view(_ROWS, _INPUTS)
    weight = (torch.arange(_OUTPUTS * _INPUTS) % 11 - 5).view(_OUTPUTS, _INPUTS)
    expected = (x @ weight.t()).float()
    try:
        with device.used(), torch.inference_mode():
            act = device.activations
            y = device.reserve((_ROWS, _OUTPUTS), torch.float32)
            scratch = device.scratch((max(1, scratch_numbers(_ROWS, _INPUTS, _OUTPUTS)),), torch.float32)
            tiles = row_tiles_of(device.capability)
            given = device.put(x.to(act)), device.put(weight.to(act))
            dense_product(device.launch, y, *given, scratch, row_tiles=tiles)
            found = device.take(y)
    except Exception as error:  # whatever a compiler, a driver or a card says
        return f"a first small kernel fails ({first_line(error)}): try another version of Triton or of the driver"
    if torch.equal(found, expected):
        return ""
    return "a first small kernel gives a wrong result: try another version of Triton or of the driver"


def first_line(error: Exception) -> str:
    """Of what an error says, and its kind."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = type(error).__name__
    return f"{kind}: {said[:200]}" if said else kind
