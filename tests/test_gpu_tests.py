"""Tests that need a device are seldom run: here they are collected, and those of whole steps run on an emulated one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import triton_interpreter

ROOT = Path(__file__).parent.parent


def pytest_in_a_process(*arguments: str, **environ: str) -> str:
    command = [sys.executable, "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, **environ})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_tests_for_a_gpu_can_be_imported() -> None:
    pytest_in_a_process("tests/gpu", "--collect-only", LORAMUX_TEST_EMULATED="1")


@pytest.mark.skipif(not triton_interpreter.INSTALLED, reason=triton_interpreter.WHY_NOT)
def test_those_of_whole_steps_pass_on_an_emulated_device() -> None:
    """So that they are right the first time they meet a card."""
    assert "failed" not in pytest_in_a_process("tests/gpu/test_whole_step.py", LORAMUX_TEST_EMULATED="1")
