"""The greedy token of each row of logits.

Semantics: the first of a row's largest values, and whether it is finite; a row with NaN is not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from loramux_server.kernels.native import NativeLibrary

Argmax = Callable[[torch.Tensor], tuple[list[int], list[bool]]]  # logits [rows, vocabulary] -> (tokens, finite)


def argmax_by_tensors(logits: torch.Tensor) -> tuple[list[int], list[bool]]:
    """The path of every device, and the slow reference."""
    values = logits.float()  # exact, and much faster to search than bf16 on CPUs
    index = values.argmax(-1)  # NaN counts as the largest
    return index.tolist(), values.gather(-1, index[:, None]).isfinite().flatten().tolist()


class NativeArgmax:
    """The same in one pass of compiled code (csrc/argmax.cpp), for bf16 on the CPU; other tensors go its way."""

    def __init__(self, library: NativeLibrary) -> None:
        self._call = library.function("loramux_argmax")

    def __call__(self, logits: torch.Tensor) -> tuple[list[int], list[bool]]:
        if logits.device.type != "cpu" or logits.dtype != torch.bfloat16 or not logits.is_contiguous():
            return argmax_by_tensors(logits)
        rows, count = logits.shape
        index, finite = np.empty(rows, dtype=np.int64), np.empty(rows, dtype=np.bool_)
        self._call(index.ctypes.data, finite.ctypes.data, logits.data_ptr(), rows, count, torch.get_num_threads())
        return index.tolist(), finite.tolist()
