"""Every kernel compiles for every card, and keeps its numbers in registers; no card is needed to know that."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support import triton_interpreter
from support.compiled_kernels import SHARED_LIMIT, SMS, TABLES, Built, built_elsewhere

MODULES = sorted(path.stem.removeprefix("compiled_") for path in TABLES.glob("compiled_*.py"))


@pytest.fixture(scope="module")
def built() -> list[Built]:
    if not triton_interpreter.INSTALLED:
        pytest.skip(triton_interpreter.WHY_NOT)
    return built_elsewhere([], SMS)


@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_without_spills_and_fit_into_shared_memory(built: list[Built], module: str) -> None:
    ours = [one for one in built if one.module == module]
    assert ours
    assert [one for one in ours if one.faulty] == []


def test_kernels_that_spill_or_do_not_fit_or_do_not_compile_are_faulty() -> None:
    good = Built("nf4", "product", 86, registers=128, shared=SHARED_LIMIT[86])
    assert not good.faulty
    for change in ({"local": 8}, {"shared": SHARED_LIMIT[86] + 1}, {"error": "CompilationError"}):
        assert replace(good, **change).faulty
