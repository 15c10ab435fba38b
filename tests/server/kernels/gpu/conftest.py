"""One test for the interpreter and for a device: `device` says which of the two this machine has.

On a machine with a CUDA device these tests run compiled, elsewhere in Triton's interpreter on the CPU. Where Triton is
not installed they are left out; test_compile.py then is skipped with the reason.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support import triton_interpreter

DEVICE = triton_interpreter.prepare() if triton_interpreter.INSTALLED else None
FOLDER = Path(__file__).parent
NEED_TRITON = [str(path.relative_to(FOLDER)) for path in FOLDER.rglob("test_*.py") if path.name != "test_compile.py"]
# whole steps run in Triton's interpreter here; on a card tests/gpu has those
INTERPRETED = ["step", "check"]
collect_ignore = NEED_TRITON if DEVICE is None else INTERPRETED if DEVICE.type == "cuda" else []


@pytest.fixture
def device() -> torch.device:
    """Where tensors lie and kernels run: CUDA, or the CPU through the interpreter."""
    assert DEVICE is not None
    return DEVICE


@pytest.fixture
def act(device: torch.device) -> torch.dtype:
    """The dtype of activations: bf16 on sm_80 and newer, fp16 on older cards and in the interpreter."""
    wide = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if wide else torch.float16
