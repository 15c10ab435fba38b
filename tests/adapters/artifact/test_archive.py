from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.artifact.archive import unpack
from loramux_adapters.errors import AdapterRejected, AdapterTooLarge

LIMIT = 2**20
FILES = {"adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": bytes(range(256)) * 30}
Pack = Callable[[Mapping[str, bytes]], bytes]


def zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=format) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def tar_of(*members: tarfile.TarInfo) -> bytes:
    """The members without content, after a good adapter."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in FILES.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for member in members:
            archive.addfile(member)
    return buffer.getvalue()


def unpacked(tmp_path: Path, data: bytes, limit: int = LIMIT) -> dict[str, bytes]:
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "archive").write_bytes(data)
    try:
        unpack(tmp_path / "archive", target, limit)
    finally:
        files = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
        everything = {path.name for path in tmp_path.iterdir()}
    assert everything == {"target", "archive"}
    return files


both = pytest.mark.parametrize("pack", [zipped, tarred])


@both
@pytest.mark.parametrize("home", ["", "my-adapter/", "./", "a/b/c/"])
def test_an_adapter_is_found_wherever_it_stands(tmp_path: Path, pack: Pack, home: str) -> None:
    assert unpacked(tmp_path, pack({home + name: content for name, content in FILES.items()})) == FILES


@both
def test_folders_beside_and_below_the_adapter_are_left_out(tmp_path: Path, pack: Pack) -> None:
    more = {"a/checkpoint-1/adapter_config.json": b"old", "a/checkpoint-1/optimizer.pt": b"x", "b/readme": b"y"}
    assert unpacked(tmp_path, pack(more | {"a/" + name: content for name, content in FILES.items()})) == FILES


@both
def test_other_files_beside_the_config_come_along_to_be_judged(tmp_path: Path, pack: Pack) -> None:
    files = FILES | {"adapter_model.bin": b"pickle"}
    assert unpacked(tmp_path, pack(files)) == files


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_dialect_of_tar_is_read_with_long_names(tmp_path: Path, format: int) -> None:
    home = "d" * 90 + "/" + "e" * 60 + "/"
    assert unpacked(tmp_path, tarred({home + name: content for name, content in FILES.items()}, format)) == FILES


UNSAFE = [
    "/etc/x",
    "../x",
    "a/../../x",
    "a//x",
    "a/./x",
    "c:/x",
    "a\\..\\x",
    "x\x01",
    "x\u202e",
    "n" * 2000,
    "a/..",
    "..",
]


@both
@pytest.mark.parametrize("name", UNSAFE)
def test_a_name_that_leads_elsewhere_is_refused_and_nothing_is_written(tmp_path: Path, pack: Pack, name: str) -> None:
    with pytest.raises(AdapterRejected, match="name"):
        unpacked(tmp_path, pack(FILES | {name: b"x"}))
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_links_and_special_files_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("link")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(AdapterRejected, match="link or another special file"):
        unpacked(tmp_path, tar_of(member))


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("adapter_config.json", b"{}")
        link = zipfile.ZipInfo("adapter_model.safetensors")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(AdapterRejected, match="link"):
        unpacked(tmp_path, buffer.getvalue())


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_packed_in_another_way_is_refused(tmp_path: Path, method: int) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("adapter_config.json", b"{}" * 100)
    with pytest.raises(AdapterRejected, match="deflate"):
        unpacked(tmp_path, buffer.getvalue())


@both
def test_a_bomb_is_refused_without_being_written(tmp_path: Path, pack: Pack) -> None:
    with pytest.raises(AdapterTooLarge):
        unpacked(tmp_path, pack(FILES | {"zeros": bytes(2 * LIMIT)}))
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize("size", [10, 2**31])
def test_a_zip_that_lies_about_a_size_is_refused(tmp_path: Path, size: int) -> None:
    data = zipped(FILES | {"zeros": bytes(50_000)})
    lie = data.replace((50_000).to_bytes(4, "little"), size.to_bytes(4, "little"))
    with pytest.raises((AdapterRejected, AdapterTooLarge)):
        unpacked(tmp_path, lie)


@pytest.mark.parametrize("at", [2**31, 2**32 - 1])
def test_a_zip_whose_directory_points_outside_of_the_file_is_refused(tmp_path: Path, at: int) -> None:
    data = zipped(FILES)
    end = data.rindex(b"PK\x05\x06")
    lie = data[: end + 16] + at.to_bytes(4, "little") + data[end + 20 :]
    with pytest.raises(AdapterRejected, match="damaged"):
        unpacked(tmp_path, lie)


def test_a_tar_header_that_announces_a_huge_extension_is_refused(tmp_path: Path) -> None:
    extension = tarfile.TarInfo("x")
    extension.type, extension.size = tarfile.XHDTYPE, 2**40
    with pytest.raises(AdapterRejected, match="oversized header"):
        unpacked(tmp_path, gzip.compress(extension.tobuf(tarfile.GNU_FORMAT)))


def test_a_sparse_map_in_an_extension_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("adapter_model.safetensors")
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    with pytest.raises(AdapterRejected, match="special file"):
        unpacked(tmp_path, tar_of(member))


@both
def test_too_many_files_are_refused(tmp_path: Path, pack: Pack) -> None:
    with pytest.raises(AdapterRejected, match="more than 1000 entries"):
        unpacked(tmp_path, pack(FILES | {f"f{number}": b"" for number in range(1000)}))


def test_a_zip_with_a_huge_directory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejected, match="damaged"):
        unpacked(tmp_path, zipped({f"{number:0200}": b"" for number in range(6000)}))


@both
@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "holds no adapter_config.json|neither"),
        ({"adapter_model.safetensors": b"x"}, "holds no adapter_config.json"),
        ({"a/adapter_config.json": b"x", "b/adapter_config.json": b"x"}, "more than one"),
    ],
)
def test_an_archive_without_one_adapter_is_refused(
    tmp_path: Path, pack: Pack, files: dict[str, bytes], reason: str
) -> None:
    with pytest.raises(AdapterRejected, match=reason):
        unpacked(tmp_path, pack(files))


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("adapter_config.json")
    with pytest.raises(AdapterRejected, match="two files of one name"):
        unpacked(tmp_path, tar_of(member))


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_archive_is_refused_or_read_and_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = data.draw(st.sampled_from([zipped(FILES), tarred(FILES), gzip.decompress(tarred(FILES))]))
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(len(damaged) // 2, len(damaged)))]
    raw = bytes(damaged)
    packed = raw if raw[:2] in (b"PK", b"\x1f\x8b") else gzip.compress(raw)
    try:
        unpacked(tmp_path_factory.mktemp("fuzz"), packed)
    except (AdapterRejected, AdapterTooLarge) as error:
        assert str(error).isprintable()


@pytest.mark.parametrize("name", ["", "./", "/"])
def test_a_file_without_a_name_is_refused(tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for known, content in FILES.items():
            archive.writestr(known, content)
        archive.writestr(zipfile.ZipInfo(name), b"x")
    if name.endswith("/"):  # an empty directory, if anything
        assert unpacked(tmp_path, buffer.getvalue()).keys() == FILES.keys()
    else:
        with pytest.raises(AdapterRejected, match="a name"):
            unpacked(tmp_path, buffer.getvalue())


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_name_that_no_file_system_takes_is_refused(tmp_path: Path, pack: Pack) -> None:
    with pytest.raises(AdapterRejected, match="too long"):
        unpacked(tmp_path, pack({**FILES, "x" * 300: b"?"}))


def plain_tar(files: Mapping[str, bytes]) -> bytes:
    return gzip.decompress(tarred(files))


def test_a_tar_that_is_not_compressed_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    assert unpacked(tmp_path, plain_tar({"my-adapter/" + name: content for name, content in FILES.items()})) == FILES


def directories(count: int) -> bytes:
    entry = tarfile.TarInfo("d")
    entry.type = tarfile.DIRTYPE
    return entry.tobuf() * count


def empty_zip_directories(count: int) -> bytes:
    return zipped(FILES | {f"{number}/": b"" for number in range(count)})


@pytest.mark.parametrize(
    "data",
    [
        directories(1001) + plain_tar(FILES),
        gzip.compress(directories(1001) + plain_tar(FILES)),
        gzip.compress(directories(100_000)) * 10 + tarred(FILES),
        empty_zip_directories(1001),
    ],
    ids=["tar", "tar.gz", "a million in ten streams", "zip"],
)
def test_directories_count_as_files_do(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(AdapterRejected, match="more than 1000 entries"):
        unpacked(tmp_path, data)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_an_archive_that_unpacks_out_of_proportion_is_refused_below_the_limit_too(tmp_path: Path, pack: Pack) -> None:
    with pytest.raises(AdapterRejected, match="far more than weights would"):
        unpacked(tmp_path, pack(FILES | {"zeros": bytes(20 * 2**20)}), limit=2**40)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tarred(FILES) + b"x", "something follows its end"),
        (gzip.compress(plain_tar(FILES) + b"x" * 512), "something follows its end"),
        (gzip.compress(plain_tar(FILES)) * 2, "something follows its end"),
        (plain_tar(FILES) + b"x", "something follows its end"),
        (tarred(FILES)[:-4] + b"\0\0\0\0", "damaged"),
        (b"BZh91AY", "bzip2; a zip, tar or tar.gz is taken"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"GGUF\3\0\0\0", "a GGUF file"),
        ((2).to_bytes(8, "little") + b"{}", "safetensors file.*part 'weights'"),
        (b"", "neither a zip nor a tar or tar.gz"),
    ],
)
def test_what_is_no_whole_archive_of_ours_is_refused_by_what_it_is(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(AdapterRejected, match=reason):
        unpacked(tmp_path, data)
    assert list((tmp_path / "target").iterdir()) == []
