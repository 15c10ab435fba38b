"""Conversions that take long: one at a time, behind all other work, and ended when nobody waits for them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from loramux_adapters.artifact.format import CONFIG_FILE
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterRejected
from loramux_server.api.http.worker_threads import run_in_thread
from loramux_server.errors import ServerBusy, ServerDraining
from loramux_server.serving.residual_adapters import ResidualAdapters
from support.adapter_files import TINY_LINEARS, write_adapter

BASE = BaseInfo("aa" * 32, TINY_LINEARS)


def sent(directory: Path, init: str = "pissa") -> Path:
    return write_adapter(directory, TINY_LINEARS, rank=4, extra_config={"init_lora_weights": init})


class Originals:
    """Random weights, each given when the test says so.

    Attributes:
        asked, at_once: how many were asked for, and the most that were at the same time.
        nice: of the threads that asked.
    """

    def __init__(self) -> None:
        self.begun, self.proceed = threading.Event(), threading.Event()
        self.asked = self.at_once = self._now = 0
        self.nice: set[int] = set()
        self._lock = threading.Lock()

    def __call__(self, path: str) -> torch.Tensor:
        with self._lock:
            self.asked, self._now = self.asked + 1, self._now + 1
            self.at_once = max(self.at_once, self._now)
        if sys.platform == "linux":
            self.nice.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        self.begun.set()
        assert self.proceed.wait(20)
        with self._lock:
            self._now -= 1
        inputs, outputs = TINY_LINEARS[path]
        return torch.randn(outputs, inputs)


def soon(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it does not come true")


def test_one_at_a_time_and_others_pass_them(tmp_path: Path) -> None:
    originals = Originals()
    residual = ResidualAdapters(BASE, 64, originals)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) if sys.platform == "linux" else 0
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(residual.convert, sent(tmp_path / name)) for name in ("a", "b")]
        assert originals.begun.wait(20)
        plain = sent(tmp_path / "plain", init="gaussian")
        residual.convert(plain)
        assert json.loads((plain / CONFIG_FILE).read_text())["init_lora_weights"] == "gaussian"
        originals.proceed.set()
        for each in both:
            with pytest.raises(AdapterRejected, match="trained on another base"):
                each.result(20)
    assert originals.at_once == 1 and originals.asked == 2 * len(TINY_LINEARS)
    if sys.platform == "linux":
        assert originals.nice == {19}
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_whoever_waits_too_long_for_a_turn_is_told_to_come_again(tmp_path: Path) -> None:
    originals = Originals()
    residual = ResidualAdapters(BASE, 64, originals, wait=0.1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(residual.convert, sent(tmp_path / "a"))
        assert originals.begun.wait(20)
        with pytest.raises(ServerBusy, match="try again later"):
            residual.convert(sent(tmp_path / "b"))
        originals.proceed.set()
        with pytest.raises(AdapterRejected):
            first.result(20)


def test_a_server_that_stops_waits_for_one_layer(tmp_path: Path) -> None:
    """And whoever waits for its turn gives up."""
    originals = Originals()
    residual = ResidualAdapters(BASE, 64, originals)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(residual.convert, sent(tmp_path / name)) for name in ("a", "b")]
        assert originals.begun.wait(20)
        residual.stop()
        soon(lambda: any(each.done() for each in both))
        originals.proceed.set()
        for each in both:
            with pytest.raises(ServerDraining):
                each.result(20)
    assert originals.asked == 1


@pytest.mark.anyio
async def test_a_client_that_leaves_ends_what_it_asked_for(tmp_path: Path) -> None:
    originals = Originals()
    residual = ResidualAdapters(BASE, 64, originals)
    first = asyncio.create_task(run_in_thread(residual.convert, sent(tmp_path / "a")))
    assert await asyncio.to_thread(originals.begun.wait, 20)
    second = asyncio.create_task(run_in_thread(residual.convert, sent(tmp_path / "b")))
    await asyncio.sleep(0.05)
    second.cancel()
    await asyncio.wait([second], timeout=20)
    assert second.cancelled() and not first.done()
    first.cancel()
    await asyncio.sleep(0.05)
    originals.proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert originals.asked == 1
    with pytest.raises(AdapterRejected):  # the next one is not taken for one that was left
        await run_in_thread(residual.convert, sent(tmp_path / "c"))
