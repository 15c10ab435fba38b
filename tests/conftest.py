"""Fixtures of every test. Nothing heavy is imported here: policy tests run in milliseconds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Whether a generated test passes must not depend on how busy the machine is.
settings.register_profile(
    "loramux", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("loramux")

# As the server does, and before PyTorch is imported: its threads must not spin while others use the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Before Triton is imported, which bitsandbytes does: where there is no CUDA, tests interpret our kernels on the CPU.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def anyio_backend() -> str:
    """Tests marked `anyio` run on asyncio, as the server does."""
    return "asyncio"
