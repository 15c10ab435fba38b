from __future__ import annotations

import asyncio
import io
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fakes_api import Server, make_server
from support.raw_call import RawCall

BOUNDARY = b"XbX"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY.decode()}"
CONFIG, WEIGHTS = b'{"r": 4}', bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


def part(name: str, content: bytes, extra: bytes = b"") -> bytes:
    head = b'--%s\r\nContent-Disposition: form-data; name="%s"; filename="../../etc/x"\r\n' % (BOUNDARY, name.encode())
    return head + extra + b"\r\n" + content + b"\r\n"


END = b"--" + BOUNDARY + b"--\r\n"
GOOD = part("config", CONFIG) + part("weights", WEIGHTS) + END


async def put(server: Server, body: Any, content_type: str = CONTENT_TYPE, query: str = "") -> httpx.Response:
    async with server.client() as client:
        return await client.put("/v1/adapters/new" + query, content=body, headers={"content-type": content_type})


@pytest.mark.anyio
async def test_the_parts_become_the_files_of_a_peft_directory(server: Server) -> None:
    body = part("config", CONFIG) + part("weights", WEIGHTS) + part("card", b"{}") + part("fingerprint", b"[]") + END
    reply = await put(server, body)
    assert reply.status_code == 201
    assert server.store.files["new"] == {
        "adapter_config.json": CONFIG,
        "adapter_model.safetensors": WEIGHTS,
        "card.json": b"{}",
        "fingerprint.json": b"[]",
    }


@pytest.mark.anyio
async def test_a_client_library_can_upload(server: Server) -> None:
    async with server.client() as client:
        reply = await client.put("/v1/adapters/new", files={"config": CONFIG, "weights": ("w.safetensors", WEIGHTS)})
    assert reply.status_code == 201
    assert server.store.files["new"]["adapter_model.safetensors"] == WEIGHTS


@settings(max_examples=60)
@given(weights=st.binary(max_size=400), cuts=st.lists(st.integers(0, 900), max_size=12))
def test_no_content_and_no_chunking_changes_what_is_stored(tmp_path: Path, weights: bytes, cuts: list[int]) -> None:
    body = part("config", CONFIG) + part("weights", weights + b"\r\n--Xb") + END
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]

    async def chunks() -> AsyncIterator[bytes]:
        for start, end in zip(edges, edges[1:], strict=False):
            yield body[start:end]

    async def upload() -> Server:
        server = make_server(tmp_path)
        assert (await put(server, chunks())).status_code == 201
        return server

    assert asyncio.run(upload()).store.files["new"]["adapter_model.safetensors"] == weights + b"\r\n--Xb"


@pytest.mark.anyio
async def test_an_archive_is_unpacked(server: Server) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("mine/adapter_config.json", CONFIG)
        archive.writestr("mine/adapter_model.safetensors", WEIGHTS)
    reply = await put(server, part("archive", buffer.getvalue()) + END)
    assert reply.status_code == 201
    assert server.store.files["new"] == {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}


@pytest.mark.anyio
async def test_a_broken_archive_is_422(server: Server) -> None:
    reply = await put(server, part("archive", b"tar!....") + END)
    assert (reply.status_code, reply.json()["error"]["reasons"]) == (
        422,
        ["the archive is neither a zip nor a tar or tar.gz"],
    )


BAD = {
    "no part": END,
    "empty body": b"",
    "no weights": part("config", CONFIG) + END,
    "no config": part("weights", WEIGHTS) + END,
    "unknown part": part("config", CONFIG) + part("pickle", b"x") + END,
    "part twice": part("config", CONFIG) + part("config", CONFIG) + END,
    "archive and more": part("archive", b"PK") + part("config", CONFIG) + END,
    "no end": GOOD[: -len(END)],
    "end in a header": GOOD[:30],
    "not multipart": b"{}",
    "other boundary": GOOD.replace(BOUNDARY, b"other"),
    "no disposition": b"--XbX\r\nContent-Type: a/b\r\n\r\nx\r\n" + END,
    "no name": b"--XbX\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END,
    "attachment": b'--XbX\r\nContent-Disposition: attachment; name="config"\r\n\r\nx\r\n' + END,
    "star name": b"--XbX\r\nContent-Disposition: form-data; name*=utf-8''config\r\n\r\nx\r\n" + END,
    "traversal name": part("../config", CONFIG) + END,
    "nul in name": part("config\x00", CONFIG) + END,
    "base64": part("config", CONFIG, b"Content-Transfer-Encoding: base64\r\n") + END,
    "many headers": part("config", CONFIG, b"".join(b"X-%d: y\r\n" % n for n in range(20))) + END,
    "long header": part("config", CONFIG, b"X: " + b"y" * 5000 + b"\r\n") + END,
    "header without end": b"--XbX\r\n" + b"X" * 10**6,
    "colon missing": b"--XbX\r\nContent-Disposition\r\n\r\nx\r\n" + END,
    "nul in header": b"--XbX\r\n\x00: x\r\n\r\nx\r\n" + END,
    "bare newlines": GOOD.replace(b"\r\n", b"\n"),
    "only newlines": b"\r\n" * 10**5,
    "semicolons": b'--XbX\r\nContent-Disposition: form-data; name="' + b";" * 900 + b"\r\n\r\nx\r\n" + END,
}


@pytest.mark.anyio
@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
async def test_a_body_that_is_no_upload_is_400_and_stores_nothing(server: Server, body: bytes) -> None:
    reply = await put(server, body)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert "new" not in server.store.known
    assert server.check.seen == []
    assert list(server.store.root.iterdir()) == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "content_type",
    ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=", "multipart/mixed; boundary=XbX",
     "multipart/form-data; boundary=" + "x" * 71, "multipart/form-data; boundary*=utf-8''XbX", ";" * 5000],
)  # fmt: skip
async def test_a_content_type_without_a_usable_boundary_is_400(server: Server, content_type: str) -> None:
    reply = await put(server, GOOD, content_type)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_content_type")


@pytest.mark.anyio
async def test_more_bytes_than_allowed_are_413_before_they_are_read(tmp_path: Path) -> None:
    limit = 2**20
    server = make_server(tmp_path, upload_bytes=limit)
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        yield part("config", CONFIG) + part("weights", b"")[:-2]
        while True:
            read += 2**16
            yield bytes(2**16)

    reply = await put(server, endless())
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "adapter_too_large")
    assert read <= limit + 2**18
    assert list(server.store.root.iterdir()) == []


@pytest.mark.anyio
async def test_an_announced_length_over_the_limit_is_413_at_once(tmp_path: Path) -> None:
    server = make_server(tmp_path, upload_bytes=1000)
    call = RawCall(
        server.app,
        "PUT",
        "/v1/adapters/new",
        headers=[(b"content-type", CONTENT_TYPE.encode()), (b"content-length", b"9" * 18)],
        more_body=True,
    )
    await call.task
    assert call.sent[0]["status"] == 413


@pytest.mark.anyio
async def test_a_small_part_that_is_large_is_413(server: Server) -> None:
    reply = await put(server, part("config", bytes(4 * 2**20 + 1)) + part("weights", WEIGHTS) + END)
    assert reply.status_code == 413


@pytest.mark.anyio
async def test_an_upload_that_stalls_is_408_and_leaves_nothing(tmp_path: Path) -> None:
    server = make_server(tmp_path, stall_seconds=0.05)

    async def drip() -> AsyncIterator[bytes]:
        for byte in GOOD:
            yield bytes([byte])
            await asyncio.sleep(0.01)

    reply = await put(server, drip())
    assert (reply.status_code, reply.json()["error"]["code"]) == (408, "body_too_slow")
    assert list(server.store.root.iterdir()) == []


@pytest.mark.anyio
async def test_a_client_that_leaves_in_the_middle_leaves_nothing(server: Server) -> None:
    call = RawCall(
        server.app,
        "PUT",
        "/v1/adapters/new",
        GOOD[:100],
        headers=[(b"content-type", CONTENT_TYPE.encode())],
        more_body=True,
    )
    await call.disconnect()
    assert "new" not in server.store.known
    assert list(server.store.root.iterdir()) == []


@pytest.mark.anyio
async def test_a_full_disk_is_not_told_by_path(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, mode: str) -> Any:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "open", full)
    reply = await put(server, GOOD)
    assert reply.status_code == 500
    assert str(server.store.root) not in reply.text
