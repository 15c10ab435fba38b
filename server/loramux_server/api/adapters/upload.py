"""An adapter upload: a multipart body, parsed as it comes, into a staging directory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from loramux_adapters.artifact.archive import unpack
from loramux_adapters.artifact.format import UPLOAD_PARTS
from loramux_adapters.artifact.mlx_layout import convert_mlx
from loramux_adapters.errors import AdapterTooLarge
from loramux_server.api.http.body import blocks, refuse_encoded
from loramux_server.api.http.dependencies import Limits
from loramux_server.api.http.errors import BodyStalled
from loramux_server.api.http.worker_threads import run_in_thread
from loramux_server.errors import RequestError

ARCHIVE = "archive"
_ARCHIVE_FILE = "archive:upload"  # no member of an archive can have this name
_BLOCK = 256 * 2**10  # bytes of the body that go to a worker thread at a time
_SMALL_PART = 4 * 2**20
_LARGE = ("weights", "archive", "tokenizer", "vocab", "vocab_txt", "merges", "tokenizer_model")
_OVERHEAD = 8 * _SMALL_PART + 2**20  # bytes of a body beside its weights: the small parts, boundaries and headers
_MAX_HEADERS = 8
_MAX_HEADER_LINE = 1024
_MAX_BOUNDARY = 70  # RFC 2046
_RAW = (b"", b"binary", b"8bit", b"7bit")


async def receive_upload(request: Request, directory: Path, limits: Limits) -> None:
    """Write the files of an upload into `directory` under their PEFT names, and in PEFT's layout if they are mlx-lm's.

    The body has the parts `config` and `weights`, and may have `card`, `fingerprint` and a tokenizer's; or it has the
    part `archive` alone. Parsing and writing happen in a worker thread.
    Raises RequestError, AdapterTooLarge, AdapterRejected, BodyNotDecodable, BodyStalled, OSError, and ClientDisconnect.
    """
    refuse_encoded(request)
    writer = _PartWriter(_boundary_of(request), directory, limits.upload_bytes)
    too_large = AdapterTooLarge(limits.upload_bytes)
    try:
        async with asyncio.timeout(limits.upload_seconds):
            async for block in blocks(
                request, limit=limits.upload_bytes + _OVERHEAD, too_large=too_large, pace=limits.pace, size=_BLOCK
            ):
                await run_in_thread(writer.feed, block)
        parts = writer.finish()
    except TimeoutError as error:
        raise BodyStalled(f"the upload did not arrive within {limits.upload_seconds:g} seconds") from error
    finally:
        writer.close()
    if ARCHIVE in parts:
        await run_in_thread(unpack, directory / _ARCHIVE_FILE, directory, limits.upload_bytes)
        await run_in_thread((directory / _ARCHIVE_FILE).unlink)
    await run_in_thread(convert_mlx, directory)


def _boundary_of(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= _MAX_BOUNDARY:
        raise RequestError(
            "an upload is 'Content-Type: multipart/form-data' with a boundary; its parts are config and weights, or "
            "archive",
            code="invalid_content_type",
        )
    return boundary


class _PartWriter:
    """Callbacks of the parser; each part goes to its file. Used by one thread at a time."""

    def __init__(self, boundary: bytes, directory: Path, limit: int) -> None:
        self._directory = directory
        self._limit = limit
        self._parts: set[str] = set()
        self._file: BinaryIO | None = None
        self._left = 0  # bytes that the current part may still have
        self._too_large: Exception = AdapterTooLarge(limit)
        self._complete = False
        self._headers: dict[bytes, bytes] = {}
        self._name = self._value = b""
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self.close,
            "on_end": self._end,
        }
        self._parser = MultipartParser(
            boundary,
            callbacks,  # type: ignore[arg-type]  # a TypedDict of callables
            max_header_count=_MAX_HEADERS,
            max_header_size=_MAX_HEADER_LINE,
        )

    def feed(self, data: bytes) -> None:
        """Raises RequestError, AdapterTooLarge, OSError."""
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise RequestError("the multipart body is malformed", code="invalid_multipart") from error

    def finish(self) -> set[str]:
        """The names of the parts. Raises RequestError if the body is not whole or parts are missing."""
        if not self._complete:
            raise RequestError("the multipart body ends before its last boundary", code="invalid_multipart")
        if ARCHIVE in self._parts:
            if len(self._parts) > 1:
                raise RequestError("the part 'archive' must be the only one", param=ARCHIVE)
        else:
            for name in ("config", "weights"):
                if name not in self._parts:
                    raise RequestError(f"the part '{name}' is missing ({UPLOAD_PARTS[name]})", param=name)
        return self._parts

    def close(self) -> None:
        """End the current part, if there is one."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _begin(self) -> None:
        self._headers = {}

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _open(self) -> None:
        name = self._part_name()
        self._parts.add(name)
        is_large = name in _LARGE
        self._left = self._limit if is_large else min(_SMALL_PART, self._limit)
        self._file = (self._directory / UPLOAD_PARTS.get(name, _ARCHIVE_FILE)).open("xb")

    def _part_name(self) -> str:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        raw = options.get(b"name", b"")
        name = raw.decode("ascii", "replace")
        if kind != b"form-data" or (name not in UPLOAD_PARTS and name != ARCHIVE):
            known = ", ".join([*UPLOAD_PARTS, ARCHIVE])
            raise RequestError(f"unknown part {ascii(name[:64])}; the parts of an upload are {known}", param=name[:64])
        if name in self._parts:
            raise RequestError(f"the part '{name}' comes twice", param=name)
        if self._headers.get(b"content-transfer-encoding", b"").strip().lower() not in _RAW:
            raise RequestError(f"the part '{name}' must be sent as it is, without a transfer encoding", param=name)
        return name

    def _data(self, data: bytes, start: int, end: int) -> None:
        assert self._file is not None
        self._left -= end - start
        if self._left < 0:
            raise self._too_large
        self._file.write(memoryview(data)[start:end])

    def _end(self) -> None:
        self._complete = True
