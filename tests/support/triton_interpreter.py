"""Triton on a machine without CUDA: its interpreter, with products whose bits mean something.

The interpreter is chosen when Triton is imported. tests/conftest.py does so, for bitsandbytes imports Triton where it
is installed; a program of its own calls `prepare` before it imports that, or a module of `loramux_server.kernels.gpu`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch

INSTALLED = find_spec("triton") is not None
WHY_NOT = "Triton is not installed: `pip install loramux[dev]` brings it on Linux on x86-64"

_prepared = False


def prepare() -> torch.device:
    """The device that kernels run on here: CUDA where there is one, else the CPU through the interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not INSTALLED:
        raise ImportError(WHY_NOT)
    if "triton" in sys.modules and not _interprets():
        raise ImportError("Triton was imported and cannot interpret any more; set TRITON_INTERPRET=1 and start again")
    os.environ["TRITON_INTERPRET"] = "1"
    global _prepared
    if not _prepared:
        _prepared = True
        _sum_products_in_float64()
        _turn_scalars_into_indices()
        _Launches().install()
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

    interpreter._patch_lang_tensor = patch_lang_tensor


class _Launches:
    """Turns Triton's language into the interpreter's at the start of a launch, and back at its end.

    Triton does so again for every function that a program calls, looking through the whole language each time, which
    is half of a test's time. One launch runs at a time: what the interpreter knows of a program is the process's.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._changes: list[tuple[Any, str, Any, Any]] = []  # an object, a name, what it was, what it is in a launch
        self._launches = 0

    def install(self) -> None:
        import numpy as np
        import triton.language as tl
        from triton.runtime import interpreter

        from support import interpreter_speed

        def sees_all() -> None:
            """A function as Triton's own and ours: they know the language by these names."""

        scope = interpreter._patch_lang(FunctionType(sees_all.__code__, {"tl": tl, "core": tl.core}))
        self._changes = [(at, name, was, vars(at)[name]) for at, name, was in scope._changes]
        scope.restore()
        self._changes += [
            (tl.tensor, name, vars(tl.tensor)[name], now) for name, now in interpreter_speed.operators().items()
        ]
        missing, call = interpreter._MISSING, interpreter.GridExecutor.__call__

        def call_in_launch(executor: Any, *args: Any, **constants: Any) -> None:
            # a device does not warn of NaN, infinity and overflow, which tests send on purpose; numpy does
            with self._lock, self._changed(missing), np.errstate(all="ignore"):
                call(executor, *args, **constants)

        interpreter.GridExecutor.__call__ = call_in_launch
        interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()  # nothing is left to be done, nor undone
        interpreter_speed.install()

    @contextmanager
    def _changed(self, missing: object) -> Iterator[None]:
        self._launches += 1
        try:
            if self._launches == 1:
                for at, name, _, now in self._changes:
                    setattr(at, name, now)
            yield
        finally:
            self._launches -= 1
            if self._launches == 0:
                for at, name, was, _ in reversed(self._changes):
                    if was is missing:
                        delattr(at, name)
                    else:
                        setattr(at, name, was)
