"""Whether kernels in Triton run: each reason that they do not, in words that say what to install."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from loramux_adapters.device.cuda import CudaDevice
from loramux_server.kernels.gpu import dense
from loramux_server.kernels.gpu.check import usable
from loramux_server.kernels.gpu.check.usable import why_no_triton
from support.emulated import EmulatedDevice
from support.gpu_steps import AtOnce


class Card(AtOnce):
    """A card for which kernels are compiled."""

    @property
    def capability(self) -> tuple[int, int]:
        return (7, 5)


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton as on a card, up to the first kernel."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(usable, "_why_first_kernel_fails", lambda device: "")


@pytest.mark.parametrize("device", [AtOnce(), EmulatedDevice(), EmulatedDevice(capability=(7, 5), early=0.5)])
def test_they_run_where_a_first_product_is_right(device: Any) -> None:
    assert why_no_triton(device) == ""


def test_no_kernel_is_tried_where_they_ran_before() -> None:
    device = EmulatedDevice()
    assert why_no_triton(device, again=True) == "" and device.started == []
    assert why_no_triton(device) == "" and device.started != []


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usable, "find_spec", lambda name: None)
    assert "pip install triton" in why_no_triton(AtOnce())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card() -> None:
    assert "there is no device cuda that answers" in why_no_triton(CudaDevice(torch.device("cuda")))


def test_a_card_of_another_maker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "of AMD's, on which they were never tried" in why_no_triton(AtOnce())


def test_a_card_that_is_too_old_is_refused() -> None:
    assert "compute capability 6.1, and they need 7.5" in why_no_triton(EmulatedDevice(capability=(6, 1)))


@pytest.mark.usefixtures("compiles")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usable.shutil, "which", lambda name: None)
    assert "there is none: install gcc" in why_no_triton(Card())
    monkeypatch.setattr(triton.knobs.build, "cc", "/opt/cc")
    assert "CC names /opt/cc, which is not there" in why_no_triton(Card())


@pytest.mark.usefixtures("compiles")
def test_without_headers_of_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(usable.shutil, "which", lambda name: name)
    monkeypatch.setattr(usable.sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    assert "python3-dev" in why_no_triton(Card())
    (tmp_path / "Python.h").touch()
    assert why_no_triton(Card()) == ""


def test_a_first_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("\nptxas fatal: unknown architecture\nand more")

    monkeypatch.setattr(dense, "dense_product", fails)
    assert "(RuntimeError: ptxas fatal: unknown architecture)" in why_no_triton(AtOnce())


def test_a_first_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(launch: Any, y: torch.Tensor, x: torch.Tensor, *args: Any, **options: Any) -> None:
        y.copy_(torch.ones_like(y))

    monkeypatch.setattr(dense, "dense_product", wrong)
    assert "gives a wrong result" in why_no_triton(AtOnce())
