from __future__ import annotations

import io
import tarfile

import pytest

from loramux_adapters.artifact.tar_reader import TarFile, TarRefused, tar_files


def header(name: str = "a", size: int = 0, kind: bytes = b"0") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


END = bytes(1024)


def files(data: bytes) -> list[TarFile]:
    return list(tar_files(io.BytesIO(data)))


def test_content_can_be_read_in_part_or_not_at_all() -> None:
    archive = io.BytesIO(header("a", 700) + bytes(1024) + header("b", 3) + b"xyz".ljust(512, b"\0") + END)
    reader = tar_files(archive)
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
