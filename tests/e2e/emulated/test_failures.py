"""What goes wrong on a device: memory that ends at start or while it serves, and an end while replies run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Iterator
from typing import Any

import httpx
import pytest

from e2e.emulated.conftest import Place
from loramux_adapters.errors import AdapterError
from loramux_server.errors import LoramuxError
from support.emulated import EmulatedDevice
from support.emulated_server import EmulatedServer, emulated_server, settings
from support.replies import streamed, whole

BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "On and on",
    "max_tokens": 6,
    "temperature": 0,
    "logprobs": 0,
    "ignore_eos": True,
}


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_a_device_with_too_little_memory_ends_the_start_and_says_so(place: Place, kernels: str) -> None:
    device = EmulatedDevice(kernels=kernels, total=4 << 20)
    config = settings(place.base, place.files / f"small-{kernels}", cache_dir=place.files / "cache")
    with pytest.raises(LoramuxError, match="no room|memory"), emulated_server(device, config):
        pass


class During(Collection[int]):
    """Allocations that fail: those that code in this file asks for, however deep below it."""

    def __init__(self, file: str) -> None:
        self._file = file

    def __contains__(self, number: object) -> bool:
        frame = sys._getframe(1)
        while (frame := frame.f_back) is not None:  # type: ignore[assignment]
            if frame.f_code.co_filename.endswith(self._file):
                return True
        return False

    def __iter__(self) -> Iterator[int]:
        return iter(())

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    "file",
    [
        *("gpu/step/nf4_linear.py", "lora/lora_linear.py", "attention/kv_cache.py", "decoder/trial.py"),
        *("gpu/step/tables.py", "gpu/step/answers.py", "engine/start_check.py"),
    ],
)
def test_wherever_memory_ends_in_a_start_it_is_said(place: Place, file: str) -> None:
    device = EmulatedDevice(kernels="triton", refuses=During(file))
    config = settings(place.base, place.files / "ended", cache_dir=place.files / "cache")
    with pytest.raises((LoramuxError, AdapterError), match="no room|memory") as raised, emulated_server(device, config):
        pass
    assert isinstance(raised.value, (LoramuxError, AdapterError))


def test_without_room_for_graphs_steps_are_launches_with_the_same_bits(server: EmulatedServer, place: Place) -> None:
    device = EmulatedDevice(kernels="triton", refuses=During("gpu/step/graphs.py"))
    config = settings(place.base, place.files / "launches", cache_dir=place.files / "cache")
    with emulated_server(device, config) as another:
        assert whole(another, BODY).reply == whole(server, BODY).reply
        assert ("replay", "") not in device.started
        drain(another)


def test_steps_of_modules_serve_on_when_memory_ends(place: Place) -> None:
    """The plain path, whose operations take memory in each step. Some work is done early here."""
    device = EmulatedDevice(kernels="cuda", early=0.3, seed=1)
    config = settings(place.base, place.files / "plain", cache_dir=place.files / "cache")
    with emulated_server(device, config) as server:
        assert server.upload("eight", place.adapter("eight", rank=8, seed=8)).status_code == 201
        expected = {name: whole(server, BODY | {"model": name}).reply for name in ("tiny", "eight")}
        assert streamed(server, BODY).reply == expected["tiny"]
        for ahead in (1, 2, 3, 9):
            device.refuses = {device.allocations + ahead}
            with server.client() as client:
                response = client.post("/v1/completions", json=BODY | {"model": "eight"})
            assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_error")
            assert "may be sent again" in response.json()["error"]["message"]
            assert whole(server, BODY | {"model": "eight"}).reply == expected["eight"]
        assert server.metric("loramux_kv_blocks_used") == 0
        drain(server)


def test_replies_do_not_depend_on_the_order_of_work(server: EmulatedServer, place: Place) -> None:
    config = settings(place.base, place.files / "drained", cache_dir=place.files / "cache")
    with emulated_server(EmulatedDevice(kernels="triton", early=0.2, seed=3), config) as another:
        assert another.upload("eight", place.adapter("eight", rank=8, seed=8)).status_code == 201
        for name in ("tiny", "eight"):
            body = BODY | {"model": name}
            assert whole(another, body).reply == whole(server, body).reply


def drain(server: EmulatedServer) -> None:
    """Ends it while a reply streams."""
    body = BODY | {"max_tokens": 20}
    whole_reply = whole(server, body).reply
    refused: list[int] = []

    def end(response: httpx.Response) -> None:
        server.terminate()
        stopped = threading.Event()
        while not stopped.wait(0.02):
            with server.client() as client:
                status = client.get("/ready").status_code
            if status == 503:
                with server.client() as client:
                    refused.append(client.post("/v1/completions", json=body).status_code)
                return

    assert streamed(server, body, end).reply == whole_reply
    assert refused == [503]
    assert server.wait() == 0
    assert server.said("1 reply") and server.said("stopped")
