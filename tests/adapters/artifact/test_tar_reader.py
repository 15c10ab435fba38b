from __future__ import annotations

import gzip
import io
import tarfile
import zlib

import pytest

from loramux_adapters.artifact.tar_reader import Gunzipped, TarFile, TarRefused, tar_files


def header(name: str = "a", size: int = 0, kind: bytes = b"0") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


END = bytes(1024)


def files(data: bytes) -> list[TarFile]:
    return list(tar_files(io.BytesIO(data), max_entries=10))


def test_content_can_be_read_in_part_or_not_at_all() -> None:
    archive = io.BytesIO(header("a", 700) + bytes(1024) + header("b", 3) + b"xyz".ljust(512, b"\0") + END)
    reader = tar_files(archive, max_entries=10)
    assert next(reader) == TarFile("a", 700)
    archive.read(10)
    assert next(reader) == TarFile("b", 3)
    assert archive.read(3) == b"xyz"
    assert list(reader) == []


def test_directories_are_passed_over() -> None:
    assert files(header("d", 0, b"5") + header("d/a") + END) == [TarFile("d/a", 0)]


@pytest.mark.parametrize(
    "data",
    [
        b"", header()[:100], header("a", 5000) + bytes(512), header("a", 2**70) + END, b"x" * 512, header() ,
        header("a", 600, b"x") + bytes(512), header("a", 30, b"x") + b"99 path=x\n".ljust(512, b"\0") + END,
        header("a", 30, b"x") + b"-1 path=x\n".ljust(512, b"\0") + END,
        header("a", 30, b"x") + b"x".ljust(512, b"\0") + END, header("a", 2**20, b"L") + END,
        header("a", 0, b"2") + END, header("a", 0, b"S") + END, header("a", 0, b"Z") + END,
    ],
)  # fmt: skip
def test_damage_and_special_files_are_refused(data: bytes) -> None:
    with pytest.raises(TarRefused):
        files(data)


def test_a_negative_size_is_refused() -> None:
    damaged = header().replace(b"00000000000\0", b"-0000000001\0", 1)
    with pytest.raises(TarRefused):
        files(damaged + END)


def test_a_wrong_check_sum_is_refused() -> None:
    with pytest.raises(TarRefused, match="damaged header"):
        files(header("a").replace(b"a", b"b", 1) + END)


class CountedBytes(io.BytesIO):
    """Knows how many bytes were read of it."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


PAX_EMPTY = header("p", 0, b"x")
EVERY_KIND = {
    "directories": header("d", 0, b"5"),
    "directories with content": header("d", 512, b"5") + bytes(512),
    "files": header("a"),
    "pax headers": PAX_EMPTY,
    "pax headers for all": header("g", 0, b"g"),
    "GNU names": header("L", 2, b"L") + b"x\0".ljust(512, b"\0"),
    "pax headers of many records": header("x", 1200, b"x") + (b"6 a=b\n" * 200).ljust(1536, b"\0"),
    "largest pax headers": header("x", 65_536, b"x") + b"65536 a=".ljust(65_535, b"x") + b"\n",
}


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_entry_counts_of_any_kind(kind: str) -> None:
    entry = EVERY_KIND[kind]
    archive = CountedBytes(entry * 6000 + END)
    with pytest.raises(TarRefused, match="more than 1000 entries|oversized header"):
        list(tar_files(archive, max_entries=1000))
    assert archive.count <= min(4001 * len(entry), 1001 * len(entry) + 8 * 2**20)


def test_records_of_a_pax_header_are_counted() -> None:
    with pytest.raises(TarRefused, match="oversized header"):
        files(header("x", 6 * 300, b"x") + (b"6 a=b\n" * 300).ljust(2048, b"\0") + END)


def test_as_many_entries_as_allowed_are_read_with_the_headers_that_tools_put_before_them() -> None:
    pax = header("p", 10, b"x") + b"10 path=n\n".ljust(512, b"\0")
    assert files((pax + header("a")) * 9 + header("d", 0, b"5") + END) == [TarFile("n", 0)] * 9


@pytest.mark.parametrize(
    "rest", [header(), b"x", bytes(2**20) + b"x", bytes(2**20 + 1)], ids=["a header", "text", "late", "much"]
)
def test_what_follows_the_end_is_refused_unless_it_is_padding(rest: bytes) -> None:
    with pytest.raises(TarRefused, match="something follows its end"):
        files(header() + END[:512] + rest)
    assert files(header() + END + bytes(9216)) == [TarFile("a", 0)]


def gunzipped(data: bytes) -> bytes:
    return Gunzipped(io.BytesIO(data)).readall()


@pytest.mark.parametrize("text", [b"", b"x", bytes(10**6), bytes(range(256)) * 3000], ids=len)
def test_gzip_is_read_in_one_stream_or_in_several_with_zeros_behind_it(text: bytes) -> None:
    packed = gzip.compress(text, mtime=0)
    assert gunzipped(packed) == text
    assert gunzipped(packed * 3 + bytes(1000)) == text * 3
    reader = io.BufferedReader(Gunzipped(io.BytesIO(packed)), 512)
    assert b"".join(iter(lambda: reader.read(100), b"")) == text


def test_empty_gzip_streams_are_counted() -> None:
    with pytest.raises(TarRefused, match="more than 1000 gzip streams"):
        gunzipped(gzip.compress(b"") * 2000)


def test_what_follows_a_gzip_stream_is_refused() -> None:
    with pytest.raises(TarRefused, match="something follows its end"):
        gunzipped(gzip.compress(b"x") + b"PK")


def test_a_gzip_stream_that_is_cut_or_has_a_wrong_check_sum_is_damage() -> None:
    packed = gzip.compress(bytes(range(256)) * 300)
    for cut in (5, 30, len(packed) - 8, len(packed) - 1):
        with pytest.raises(EOFError):
            gunzipped(packed[:cut])
    with pytest.raises(zlib.error):
        gunzipped(packed[:-8] + b"\0\0\0\0" + packed[-4:])
