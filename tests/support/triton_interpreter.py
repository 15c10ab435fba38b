"""Triton on a machine without CUDA: its interpreter, with products whose bits mean something.

The interpreter is chosen when Triton is imported. tests/conftest.py does so, for bitsandbytes imports Triton where it
is installed; a program of its own calls `prepare` before it imports that, or a module of `loramux_server.kernels.gpu`.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

import torch

INSTALLED = find_spec("triton") is not None
WHY_NOT = "Triton is not installed: `pip install loramux[dev]` brings it on Linux on x86-64"


def prepare() -> torch.device:
    """The device that kernels run on here: CUDA where there is one, else the CPU through the interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not INSTALLED:
        raise ImportError(WHY_NOT)
    if "triton" in sys.modules and not _interprets():
        raise ImportError("Triton was imported and cannot interpret any more; set TRITON_INTERPRET=1 and start again")
    os.environ["TRITON_INTERPRET"] = "1"
    _sum_products_in_float64()
    _turn_scalars_into_indices()
    _compute_with_infinities()
    return torch.device("cpu")


def _interprets() -> bool:
    """What Triton decided when it was imported: its own functions were decorated then."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.sigmoid, InterpretedFunction)


def _sum_products_in_float64() -> None:
    """`tl.dot` of the interpreter is numpy's matmul in fp32, whose bits depend on the shapes of tiles.

    A product of two fp16 numbers needs 22 bits, so sums in float64 are exact for all but extreme numbers: rounded once,
    they are the same for any tile.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        for operand in (a, b):
            if operand.dtype.scalar not in (tl.float16, tl.float32):
                raise TypeError(f"the interpreter has no products of {operand.dtype.scalar}: use fp16 here")
        wide = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return interpreter.TensorHandle(wide.astype(d.data.dtype), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _turn_scalars_into_indices() -> None:
    """The interpreter's scalars are arrays of one number; numpy 2.4 takes none for an integer, as `range` needs it."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    if patch.__name__ != patch_lang_tensor.__name__:  # not twice
        interpreter._patch_lang_tensor = patch_lang_tensor


def _compute_with_infinities() -> None:
    """A device does not warn of NaN, infinity and overflow, which tests send on purpose; numpy does."""
    import numpy as np
    from triton.runtime import interpreter

    call = interpreter.GridExecutor.__call__

    def quiet_call(self: Any, *args: Any, **constants: Any) -> None:
        with np.errstate(all="ignore"):
            call(self, *args, **constants)

    if call.__name__ != quiet_call.__name__:  # not twice
        interpreter.GridExecutor.__call__ = quiet_call
