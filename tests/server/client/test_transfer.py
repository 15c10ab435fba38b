from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_server.client.transfer import ArchiveStream, extract, files_to_send, open_to_send
from loramux_server.errors import CommandFailed
from support.adapter_files import as_hub_snapshot

CONFIG = b'{"r": 8}'
WEIGHTS = os.urandom(600_000)


def adapter(directory: Path, **more: bytes) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_bytes(CONFIG)
    (directory / "adapter_model.safetensors").write_bytes(WEIGHTS)
    for name, content in more.items():
        (directory / f"{name}.json").write_bytes(content)
    return directory


def archive(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "") -> io.BytesIO:
    """A tar.gz of these files; `kind` and `link` apply to the last one."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for index, (name, content) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if index == len(members) - 1:
                info.type, info.linkname = kind, link
            tar.addfile(info, io.BytesIO(content))
    packed.seek(0)
    return packed


GOOD = (("adapter_config.json", CONFIG), ("adapter_model.safetensors", WEIGHTS))


def test_a_tokenizer_goes_along_and_other_files_of_the_directory_stay_where_they_are(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "a", tokenizer=b"{}")
    (directory / "README.md").write_text("hello")

    assert [path.name for path in files_to_send(directory).values()] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]


def test_a_directory_that_is_no_adapter_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="there is no directory"):
        files_to_send(tmp_path / "missing")
    with pytest.raises(CommandFailed, match="holds no adapter_config.json"):
        files_to_send(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(CONFIG)
    with pytest.raises(CommandFailed, match="holds no adapter_model.safetensors$"):
        files_to_send(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CommandFailed, match="adapter_model.bin is a pickle.*st.save_file"):
        files_to_send(tmp_path)


def test_the_weights_of_mlx_lm_are_sent_as_the_weights(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "a")
    (directory / "adapter_model.safetensors").rename(directory / "adapters.safetensors")
    assert files_to_send(directory)["weights"].name == "adapters.safetensors"


def test_links_of_the_hubs_cache_are_sent_and_links_that_lead_out_are_not(tmp_path: Path) -> None:
    snapshot = as_hub_snapshot(adapter(tmp_path / "a"), tmp_path / "models--org--a")
    for path in files_to_send(snapshot).values():
        with open_to_send(path) as file:
            assert file.read() in (CONFIG, WEIGHTS)
    (tmp_path / "secret").write_bytes(WEIGHTS)
    (snapshot / "card.json").symlink_to("../../../secret")
    with pytest.raises(CommandFailed, match="'card.json' is a symbolic link to '../../../secret', which leads out"):
        open_to_send(files_to_send(snapshot)["card"])


@pytest.mark.parametrize("folder", ["", "spam/", "./"])
def test_an_archive_becomes_a_new_directory(tmp_path: Path, folder: str) -> None:
    names = extract(archive(*((folder + name, content) for name, content in GOOD)), tmp_path / "new" / "spam")

    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert (tmp_path / "new" / "spam" / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert os.listdir(tmp_path / "new") == ["spam"]


def test_an_empty_directory_is_filled_and_any_other_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    extract(archive(*GOOD), tmp_path / "empty")
    assert len(os.listdir(tmp_path / "empty")) == 2

    with pytest.raises(CommandFailed, match="is not empty"):
        extract(archive(*GOOD), tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CommandFailed, match="exists and is not a directory"):
        extract(archive(*GOOD), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "member",
    ["../../evil.sh", "/etc/passwd", "adapter_model.bin", "a/../b.py", "adapter_config.json"],
)
def test_an_archive_with_anything_unexpected_leaves_nothing_behind(tmp_path: Path, member: str) -> None:
    with pytest.raises(CommandFailed, match="which is not expected there"):
        extract(archive(*GOOD, (member, b"x")), tmp_path / "spam")

    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(CommandFailed, match="which is not expected there"):
        extract(archive(GOOD[0], ("adapter_model.safetensors", b""), kind=kind, link="/etc/passwd"), tmp_path / "spam")

    assert os.listdir(tmp_path) == []


def test_an_archive_that_grows_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="larger than an adapter can be"):
        extract(archive(*GOOD), tmp_path / "spam", max_bytes=len(WEIGHTS))

    assert os.listdir(tmp_path) == []


def test_an_archive_of_too_many_entries_is_refused_of_any_kind(tmp_path: Path) -> None:
    directory = tarfile.TarInfo("d")
    directory.type = tarfile.DIRTYPE
    many = io.BytesIO(gzip.compress(directory.tobuf() * 100_000))
    with pytest.raises(CommandFailed, match="more than 1000 entries"):
        extract(many, tmp_path / "spam")
    assert os.listdir(tmp_path) == []


def test_a_damaged_or_incomplete_archive_is_refused(tmp_path: Path) -> None:
    whole = archive(*GOOD).getvalue()
    for damaged in (b"", b"not gzip", whole[: len(whole) // 2], whole[:-400_000] + b"\0" * 400_000):
        with pytest.raises(CommandFailed, match="is damaged"):
            extract(io.BytesIO(damaged), tmp_path / "spam")
    with pytest.raises(CommandFailed, match="holds no adapter_model.safetensors"):
        extract(archive(GOOD[0]), tmp_path / "spam")

    assert os.listdir(tmp_path) == []


class NetworkDown(Exception):
    """Stands for what httpx raises."""


def test_pieces_from_the_network_are_read_as_one_stream() -> None:
    pieces = iter([b"ab", b"", b"cdefg", b"h"])
    stream = ArchiveStream(pieces)

    assert [stream.read(3) for _ in range(5)] == [b"ab", b"cde", b"fg", b"h", b""]


def test_a_connection_that_breaks_is_not_mistaken_for_a_damaged_archive(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield archive(*GOOD).getvalue()[:400_000]
        raise NetworkDown

    with pytest.raises(NetworkDown):
        extract(io.BufferedReader(ArchiveStream(pieces())), tmp_path / "spam")

    assert os.listdir(tmp_path) == []
