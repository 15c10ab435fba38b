"""The greedy token of each row: compiled code finds what tensors find."""

from __future__ import annotations

import pytest
import torch

from loramux_server.kernels.argmax import NativeArgmax, argmax_by_tensors
from loramux_server.kernels.native import native_library


@pytest.mark.skipif(native_library() is None, reason="no compiler was there at installation")
@pytest.mark.parametrize("width", [1, 31, 320, 49152])
def test_the_compiled_search_finds_what_the_tensor_search_finds(width: int) -> None:
    library = native_library()
    assert library is not None
    search = NativeArgmax(library)
    logits = (torch.randn(24, width, generator=torch.Generator().manual_seed(width)) * 5).bfloat16()
    logits[1] = 0.0
    logits[2] = -0.0
    logits[3, width // 2 :] = 0.0
    logits[3, : width // 2] = -0.0
    logits[4] = float("-inf")
    logits[5, width - 1] = float("inf")
    logits[6, 0] = float("-inf")
    logits[7] = -logits[7].abs() - 1
    logits[8] = -3e38
    logits[9] = 3e38
    assert search(logits) == argmax_by_tensors(logits)
    assert search(logits[::2]) == argmax_by_tensors(logits[::2]), "rows that do not lie together go the other way"
    for bad in (float("nan"), -float("nan")):
        row = logits[:1].clone()
        row[0, width // 3] = bad
        assert search(row)[1] == argmax_by_tensors(row)[1] == [False]
