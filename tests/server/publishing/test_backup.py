"""A store's adapters in one file and back, through the commands and with hostile files."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.artifact.coverage import LayerCount
from loramux_adapters.artifact.format import KNOWN_FILES, WEIGHTS_FILE
from loramux_adapters.store.index_file import INDEX_FILE
from loramux_adapters.store.rebuild import rebuild_index
from loramux_adapters.store.store import AdapterStore
from loramux_server.cli import main as cli
from loramux_server.errors import CommandFailed
from loramux_server.publishing.backup import restore_backup, write_backup
from support.adapter_files import TINY_LINEARS, write_adapter

Open = Callable[..., AdapterStore]


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Open]:
    opened: list[AdapterStore] = []

    def open_(name: str, **options: Any) -> AdapterStore:
        opened.append(AdapterStore(tmp_path / name, keep_versions=3, **options))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


def upload(store: AdapterStore, name: str, seed: int, *, extra: bool = False) -> str:
    with store.stage() as staging:
        write_adapter(staging.directory, TINY_LINEARS, targets=["q_proj"], rank=4, seed=seed)
        if extra:
            (staging.directory / "card.json").write_text('{"about": "x"}')
            (staging.directory / "fingerprint.json").write_text('{"prompts": []}')
        facts: Any = {"layers": LayerCount(1, 2), "notes": ["one", "two"]} if extra else {}
        return store.publish(name, staging, rank=4, base_id=None, target_modules=["q_proj"], **facts).version


@pytest.fixture
def source(open_store: Open) -> AdapterStore:
    store = open_store("source")
    upload(store, "a", 0, extra=True)
    upload(store, "a", 1)
    upload(store, "a", 2)
    store.rollback("a")
    upload(store, "b", 1)
    store.pin("b")
    return store


def rewritten(backup: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], object]) -> Path:
    """The backup with its members changed by a stranger."""
    with tarfile.open(backup) as tar:
        members = []
        for entry in tar:
            file = tar.extractfile(entry)
            assert file is not None
            members.append((entry, file.read()))
    change(members)
    with tarfile.open(backup, "w:gz", format=tarfile.USTAR_FORMAT) as tar:
        for entry, data in members:
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return backup


def test_names_versions_pointers_pins_cards_and_fingerprints_come_back(
    source: AdapterStore, open_store: Open, tmp_path: Path
) -> None:
    upload(source, "org/b", 7)
    assert write_backup(source, tmp_path / "b.tar.gz").done == ["a", "b", "org/b"]
    target = open_store("target")
    assert restore_backup(target, tmp_path / "b.tar.gz", replace=False).done == ["a", "b", "org/b"]
    assert target.records() == source.records()
    for record in source.records():
        for kept in record.versions:
            assert target.load(kept.version).version == kept.version
            files = [path for path in source.directory(kept.version).iterdir() if path.name in KNOWN_FILES]
            for path in files:
                assert (target.directory(kept.version) / path.name).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "target" / "staging").iterdir())
    assert target.rollback("a").outcome == "rolled_back"


def test_a_backup_of_before_layers_were_counted_is_restored(
    source: AdapterStore, open_store: Open, tmp_path: Path
) -> None:
    write_backup(source, tmp_path / "b.tar.gz")

    def forget(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        manifest = json.loads(members[0][1])
        for adapter in manifest["adapters"]:
            for version in adapter["versions"]:
                for field in ("adapted_layers", "base_layers", "notes"):
                    del version[field]
        members[0] = members[0][0], json.dumps(manifest).encode()

    target = open_store("target")
    old = rewritten(tmp_path / "b.tar.gz", forget)
    assert restore_backup(target, old, replace=False).done == ["a", "b"]
    versions = [version for record in target.records() for version in record.versions]
    assert all((version.layers, version.notes) == (None, []) for version in versions)


def test_a_name_that_is_there_stays_unless_it_is_to_be_replaced(
    source: AdapterStore, open_store: Open, tmp_path: Path
) -> None:
    write_backup(source, tmp_path / "b.tar.gz")
    target = open_store("target")
    mine = upload(target, "a", 9)
    first = restore_backup(target, tmp_path / "b.tar.gz", replace=False)
    assert (first.done, first.there_already) == (["b"], ["a"])
    assert target.record("a").version == mine
    assert restore_backup(target, tmp_path / "b.tar.gz", replace=True).done == ["a", "b"]
    assert target.records() == source.records()
    assert not target.directory(mine).exists()


def test_what_is_uploaded_while_it_is_written_changes_nothing_in_it(
    source: AdapterStore, open_store: Open, tmp_path: Path
) -> None:
    before = source.records()
    with source.snapshot() as (directory, rows):
        source.delete("a")
        source.delete("b")
        assert all((directory / row.upload.digest / WEIGHTS_FILE).stat().st_size for row in rows)
        assert {row.upload.name for row in rows} == {record.name for record in before}
    assert source.records() == [] and not list((tmp_path / "source" / "versions").iterdir())


def test_the_records_of_versions_are_no_part_of_a_backup_and_written_anew(
    source: AdapterStore, open_store: Open, tmp_path: Path
) -> None:
    write_backup(source, tmp_path / "backup")
    with tarfile.open(tmp_path / "backup") as tar:
        assert {name.rpartition("/")[2] for name in tar.getnames()} <= {"manifest.json", *KNOWN_FILES}
    target = open_store("target")
    restore_backup(target, tmp_path / "backup", replace=False)
    target.check_integrity()
    before = target.records()
    target.close()
    (tmp_path / "target" / INDEX_FILE).unlink()
    assert rebuild_index(tmp_path / "target").is_whole
    assert open_store("target").records() == before


def test_the_commands_list_what_is_set_aside_and_make_the_index_anew(
    source: AdapterStore, open_store: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--adapter-dir", str(tmp_path / "source")]
    before = source.records()
    shutil.copytree(source.directory(before[0].version), tmp_path / "source" / "versions" / ("0" * 64))
    source.close()
    assert cli.main(["adapters", "quarantine", *where], {}) == 0
    assert capsys.readouterr().out == "nothing is set aside\n"
    (tmp_path / "source" / INDEX_FILE).unlink()
    for command in ("backup", "restore"):
        assert cli.main(["adapters", command, str(tmp_path / "file"), *where], {}) == 1
        assert "rebuild-index" in capsys.readouterr().err
    assert cli.main(["adapters", "rebuild-index", *where], {}) == 1  # since a stray stays unknown
    said = capsys.readouterr().out
    assert "made anew: 2 adapters with 4 versions" in said and f"not back: version {'0' * 12}" in said
    assert cli.main(["adapters", "quarantine", *where], {}) == 0
    assert f"quarantine/{'0' * 64}." in capsys.readouterr().out
    assert open_store("source").records() == before
    for command in ("rebuild-index", "quarantine"):
        assert cli.main(["adapters", command, "--adapter-dir", str(tmp_path / "none")], {}) == 1
        assert "holds no adapter store" in capsys.readouterr().err


def test_a_damaged_version_is_left_out_and_named(source: AdapterStore, open_store: Open, tmp_path: Path) -> None:
    current = source.record("a").version
    (source.directory(current) / WEIGHTS_FILE).write_bytes(b"rotten")
    with pytest.raises(Exception, match="not those|cannot be read"):
        source.load(current)
    outcome = write_backup(source, tmp_path / "b.tar.gz")
    assert f"a@{current[:12]}" in outcome.refused
    target = open_store("target")
    assert "a" in restore_backup(target, tmp_path / "b.tar.gz", replace=False).done
    assert current not in {kept.version for kept in target.record("a").versions}


def test_an_adapter_whose_files_were_changed_is_refused_and_the_others_are_restored(
    source: AdapterStore, open_store: Open, tmp_path: Path
) -> None:
    write_backup(source, tmp_path / "b.tar.gz")
    only_in_a = source.record("a").versions[-1].version

    def flip(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        for index, (entry, data) in enumerate(members):
            if entry.name == f"versions/{only_in_a}/{WEIGHTS_FILE}":
                members[index] = entry, data[:-1] + bytes([data[-1] ^ 1])

    target = open_store("target")
    outcome = restore_backup(target, rewritten(tmp_path / "b.tar.gz", flip), replace=False)
    assert (outcome.done, [*outcome.refused]) == (["b"], ["a"])
    assert [record.name for record in target.records()] == ["b"]


def hostile(manifest: dict[str, Any], kind: str) -> None:
    adapter, files = manifest["adapters"][0], manifest["files"]
    digest = next(iter(files))
    if kind == "a file more":
        files[digest]["evil.py"] = 3
    elif kind == "a way out":
        files["../../x"] = files.pop(digest)
    elif kind == "another format":
        manifest["format"] = "loramux backup 2"
    elif kind == "an unknown key":
        adapter["run"] = "x"
    elif kind == "a current version that it does not keep":
        adapter["current"] = "0" * 64
    elif kind == "no version":
        adapter["versions"] = []
    elif kind == "a size that no disk has":
        files[digest][WEIGHTS_FILE] = 2**61
    elif kind == "a negative size":
        files[digest][WEIGHTS_FILE] = -1
    elif kind == "a size that lies":
        files[digest][WEIGHTS_FILE] += 1
    elif kind == "one name twice":
        manifest["adapters"].append(adapter)
    elif kind == "a rank that is none":
        adapter["versions"][0]["rank"] = True


@pytest.mark.parametrize(
    "kind",
    ["a file more", "a way out", "another format", "an unknown key", "a current version that it does not keep"]
    + ["no version", "a size that no disk has", "a negative size", "a size that lies", "one name twice"]
    + ["a rank that is none"],
)
def test_a_manifest_that_lies_restores_nothing(
    source: AdapterStore, open_store: Open, tmp_path: Path, kind: str
) -> None:
    write_backup(source, tmp_path / "b.tar.gz")

    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        manifest = json.loads(members[0][1])
        hostile(manifest, kind)
        members[0] = members[0][0], json.dumps(manifest).encode()

    target = open_store("target")
    with pytest.raises(CommandFailed):
        restore_backup(target, rewritten(tmp_path / "b.tar.gz", change), replace=True)
    assert target.records() == [] and not list((tmp_path / "target" / "staging").iterdir())


def test_an_illegal_name_is_refused(source: AdapterStore, open_store: Open, tmp_path: Path) -> None:
    write_backup(source, tmp_path / "b.tar.gz")

    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[0] = members[0][0], members[0][1].replace(b'"name": "a"', b'"name": "../../a"')

    outcome = restore_backup(open_store("target"), rewritten(tmp_path / "b.tar.gz", change), replace=False)
    assert outcome.done == ["b"] and [*outcome.refused] == ["../../a"]


@pytest.mark.parametrize("kind", ["link", "hard link", "twice", "missing", "first is no manifest", "after the end"])
def test_an_archive_with_a_trick_in_it_restores_nothing(
    source: AdapterStore, open_store: Open, tmp_path: Path, kind: str
) -> None:
    backup = tmp_path / "b.tar.gz"
    write_backup(source, backup)

    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        if kind == "link":
            members[2][0].type, members[2][0].linkname = tarfile.SYMTYPE, "/etc/passwd"
            members[2] = members[2][0], b""
        elif kind == "hard link":
            members[2][0].type, members[2][0].linkname = tarfile.LNKTYPE, members[1][0].name
            members[2] = members[2][0], b""
        elif kind == "twice":
            members.append(members[1])
        elif kind == "missing":
            members.pop()
        elif kind == "first is no manifest":
            members.append(members.pop(0))

    rewritten(backup, change)
    if kind == "after the end":
        backup.write_bytes(backup.read_bytes() + gzip.compress(bytes(2**22)))
    target = open_store("target")
    with pytest.raises(CommandFailed):
        restore_backup(target, backup, replace=True)
    assert target.records() == []


def test_a_bomb_is_given_up_before_it_fills_the_disk(source: AdapterStore, open_store: Open, tmp_path: Path) -> None:
    backup = tmp_path / "b.tar.gz"
    write_backup(source, backup)

    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        manifest = json.loads(members[0][1])
        digest = members[1][0].name.split("/")[1]
        manifest["files"][digest][WEIGHTS_FILE] = 2**27
        for index, (entry, _) in enumerate(members):
            if entry.name == f"versions/{digest}/{WEIGHTS_FILE}":
                members[index] = entry, bytes(2**27)
        members[0] = members[0][0], json.dumps(manifest).encode()

    rewritten(backup, change)
    target = open_store("target")
    with pytest.raises(CommandFailed, match="far more"):
        restore_backup(target, backup, replace=True)
    assert target.records() == []


@settings(max_examples=300)
@given(data=st.data())
def test_a_backup_with_bytes_changed_anywhere_restores_only_what_is_sound(
    source: AdapterStore, open_store: Open, tmp_path: Path, data: st.DataObject
) -> None:
    whole = tmp_path / "whole.tar.gz"
    if not whole.exists():
        write_backup(source, whole)
    raw = bytearray(gzip.decompress(whole.read_bytes()))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(raw))))
    changed = tmp_path / "changed.tar.gz"
    changed.write_bytes(gzip.compress(bytes(raw[:cut]), 1))
    shutil.rmtree(tmp_path / "target", ignore_errors=True)
    target = AdapterStore(tmp_path / "target")
    try:
        restore_backup(target, changed, replace=True)
    except CommandFailed:
        assert target.records() == []
    for record in target.records():
        for kept in record.versions:
            assert target.load(kept.version).version == kept.version
    target.close()


def test_the_commands_back_up_and_restore(
    source: AdapterStore, open_store: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The source is open in a server meanwhile."""
    file, target = str(tmp_path / "b.tar.gz"), tmp_path / "target"
    assert cli.main(["adapters", "backup", file, "--adapter-dir", str(tmp_path / "source")], {}) == 0
    assert cli.main(["adapters", "restore", file], {"LORAMUX_ADAPTER_DIR": str(target)}) == 0
    assert capsys.readouterr().out == "2 adapters backed up\n2 adapters restored\n"
    assert cli.main(["adapters", "restore", file, "--adapter-dir", str(target)], {}) == 0
    assert "left as they are" in capsys.readouterr().out
    assert open_store("target").records() == source.records()
    assert cli.main(["adapters", "backup", file, "--adapter-dir", str(target)], {}) == 1
    assert "exists; name a new file" in capsys.readouterr().err
    assert cli.main(["adapters", "backup", str(tmp_path / "c"), "--adapter-dir", str(tmp_path / "none")], {}) == 1
    assert "holds no adapter store" in capsys.readouterr().err and not (tmp_path / "none").exists()
    (tmp_path / "text").write_text("no backup")
    assert cli.main(["adapters", "restore", str(tmp_path / "text"), "--adapter-dir", str(target)], {}) == 1
    assert "no backup" in capsys.readouterr().err
