"""Thousands of hostile archives, headers, configs and bodies: each is refused by name, or it is what it says it is.

Whatever comes in, nothing is written outside of its directory, nothing is imported, no other error escapes, and no
message shows a path of the server or the address of an object.
"""

from __future__ import annotations

import builtins
import gzip
import importlib
import io
import json
import re
import shutil
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from loramux_adapters.artifact.archive import unpack
from loramux_adapters.artifact.format import UPLOAD_PARTS
from loramux_adapters.artifact.safetensors_header import read_header
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterError, AdapterRejected, AdapterTooLarge, BaseMismatch
from loramux_adapters.lora.verify import check_adapter
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.api.adapters.upload import _PartWriter
from loramux_server.errors import RequestError
from support.adapter_files import TINY_LINEARS, write_adapter

LIMIT = 2**16
LINEARS = {path: sizes for path, sizes in TINY_LINEARS.items() if "q_proj" in path}
BASE = BaseInfo("aa" * 32, LINEARS)
LEAK = re.compile(r"0x[0-9a-f]{4,}|/tmp|/home|/srv|Traceback|\.py\b")

many = settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
some = settings(many, max_examples=500)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = write_adapter(tmp_path_factory.mktemp("good"), LINEARS, rank=2, dtype="BF16")
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """A fresh directory in one that must stay empty but for it, for each example."""

    def fresh() -> Path:
        return Path(tempfile.mkdtemp(dir=tmp_path))

    yield fresh
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("tmp")] == []


def no_leak(error: Exception) -> None:
    assert not LEAK.search(str(error)), str(error)


# archives

PARTS = st.sampled_from(["adapter", "..", ".", "", "x" * 300, "a\\b", "c:", "caf\u00e9", "\u202e", "\0", "~", "%2e%2e"])
NAMES = st.one_of(
    st.sampled_from([*UPLOAD_PARTS.values(), "README.md", "adapter_model.bin", "tokenizer.json"]),
    st.lists(PARTS, min_size=1, max_size=4).map("/".join),
    st.tuples(PARTS, st.sampled_from([*UPLOAD_PARTS.values()])).map("/".join),
    st.text(max_size=20),
)
TYPES = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
CONTENTS = st.binary(max_size=60) | st.integers(0, 2 * LIMIT).map(bytes)
MEMBERS = st.lists(st.tuples(NAMES, CONTENTS, TYPES), max_size=6)


def tarred(members: list[tuple[str, bytes, bytes]], format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content, kind in members:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size, entry.linkname = kind, len(content), "../../etc/passwd"
            try:
                archive.addfile(entry, io.BytesIO(content))
            except (ValueError, OverflowError):  # this name does not fit this dialect
                continue
    return buffer.getvalue()


def zipped(members: list[tuple[str, bytes, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, kind in members:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = {tarfile.SYMTYPE: 0o120777, tarfile.FIFOTYPE: 0o010777}.get(kind, 0o100644) << 16
            try:
                archive.writestr(entry, content)
            except UnicodeEncodeError:
                continue
    return buffer.getvalue()


def mutated(raw: bytes, changes: list[tuple[float, int]], cut: float | None) -> bytes:
    """`raw` with bytes changed at these shares of its length, and cut off at that one."""
    data = bytearray(raw)
    for where, value in changes:
        data[int(where * (len(data) - 1))] ^= value
    return bytes(data) if cut is None else bytes(data[: int(cut * len(data))])


CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=3)
CUT = st.none() | st.floats(0, 1)


@many
@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(members=MEMBERS, kind=st.sampled_from(["zip", "ustar", "gnu", "pax"]), changes=CHANGES, cut=CUT, good_first=...)
def test_an_archive_of_anything_writes_only_regular_files_below_its_limit_into_its_directory(
    room: Callable[[], Path],
    good: dict[str, bytes],
    members: list[tuple[str, bytes, bytes]],
    kind: str,
    changes: list[tuple[float, int]],
    cut: float | None,
    good_first: bool,
) -> None:
    if good_first:
        members = [(name, content, tarfile.REGTYPE) for name, content in good.items()] + members
    if kind == "zip":
        raw = mutated(zipped(members), changes, cut)
    else:
        dialect = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}[kind]
        raw = gzip.compress(mutated(tarred(members, dialect), changes, cut), 1)
    place = room()
    (place / "target").mkdir()
    (place / "archive").write_bytes(raw)
    try:
        unpack(place / "archive", place / "target", LIMIT)
    except (AdapterRejected, AdapterTooLarge) as error:
        no_leak(error)
    assert {path.name for path in place.iterdir()} == {"target", "archive"}
    written = list((place / "target").rglob("*"))
    assert all(path.is_file() and not path.is_symlink() and path.parent == place / "target" for path in written)
    assert sum(path.stat().st_size for path in written) <= LIMIT
    shutil.rmtree(place)


# the header of the weights

DTYPES = st.sampled_from(["F32", "F16", "BF16", "I8", "F64", "BOOL", "", "\u0000", None, 4])
SIZES = st.integers(-3, 5) | st.integers() | st.sampled_from([2**31, 2**63, 2**64, True, 1.5, None, "4"])
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {"dtype": DTYPES, "shape": st.lists(SIZES, max_size=4), "data_offsets": st.lists(SIZES, max_size=3)}
    ),
    st.fixed_dictionaries(
        {
            "dtype": st.just("F32"),
            "shape": st.just([2, 2]),
            "data_offsets": st.sampled_from([[0, 16], [16, 32], [8, 24]]),
        }
    ),
    st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)),
)
LIES = st.integers(-9, 9) | st.integers(-(2**62), 2**62)
HEADERS = st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), ENTRIES, max_size=4)


@many
@given(
    header=HEADERS, data=st.integers(0, 48), lie=st.integers(-9, 9) | st.integers(-(2**62), 2**62), raw=st.booleans()
)
def test_a_header_that_is_accepted_is_one_that_the_library_reads_in_the_same_way(
    room: Callable[[], Path], header: dict[str, Any], data: int, lie: int, raw: bool
) -> None:
    text = json.dumps(header).encode()
    length = len(text) + (lie if raw else 0)
    path = room() / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", length % 2**64) + text + bytes(data))
    try:
        specs = read_header(path)
    except AdapterRejected as error:
        no_leak(error)
        assert error.reasons
    else:
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == specs.keys()
            for name, spec in specs.items():
                assert tuple(file.get_slice(name).get_shape()) == spec.shape
        assert sum(spec.nbytes for spec in specs.values()) == data
    shutil.rmtree(path.parent)


# the whole adapter

HOSTILE = {
    "auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"},
    "auto_map": {"AutoModel": "evil.module--Thing"},
    "megatron_core": "evil_megatron",
    "megatron_config": {"x": "y"},
    "tokenizer_kwargs": {"trust_remote_code": True},
    "_attn_implementation_internal": "evil/kernel",
    "corda_config": {"x": 1},
    "peft_type": "EVIL",
    "target_modules": "(a+)+$",
    "r": 10**9,
    "lora_alpha": float("1e308"),
    "rank_pattern": {"(a|a)*b": 8},
    "base_model_name_or_path": "http://169.254.169.254/latest",
    "revision": "../../..",
    "custom_module_mapping": {"x": "os.system"},
}
KEYS = st.sampled_from(
    [*HOSTILE, "bias", "fan_in_fan_out", "use_dora", "alpha_pattern", "task_type", "loramux_base_id"]
)
VALUES = st.one_of(
    st.sampled_from([*HOSTILE.values()]),
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=10),
    st.lists(st.text(max_size=5), max_size=2),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch, good: dict[str, bytes], tmp_path: Path) -> list[str]:
    """Names that anyone imports by a string, or for the first time, from now on."""
    imported: list[str] = []
    warm = tmp_path / "tmp-warm"  # what the check itself imports late
    warm.mkdir()
    for name, content in good.items():
        (warm / name).write_bytes(content)
    load_host_adapter(warm) if check_adapter(warm, BASE, 64) else None
    real, real_import = importlib.import_module, builtins.__import__

    def spy(name: str, package: str | None = None) -> Any:
        imported.append(name)
        return real(name, package)

    def spy_import(name: str, *args: Any, **options: Any) -> Any:
        if any(word in name for word in ("evil", "subprocess", "megatron", "peft")):
            imported.append(name)
        return real_import(name, *args, **options)

    monkeypatch.setattr(importlib, "import_module", spy)
    monkeypatch.setattr(builtins, "__import__", spy_import)
    return imported


@pytest.mark.parametrize("key", HOSTILE)
def test_a_hostile_config_key_imports_nothing(
    room: Callable[[], Path], good: dict[str, bytes], imports: list[str], key: str
) -> None:
    place = room()
    config = json.loads(good["adapter_config.json"]) | {key: HOSTILE[key]}
    (place / "adapter_model.safetensors").write_bytes(good["adapter_model.safetensors"])
    (place / "adapter_config.json").write_text(json.dumps(config))
    try:
        check_adapter(place, BASE, 64)
    except (AdapterRejected, BaseMismatch) as error:
        no_leak(error)
    assert imports == []


@some
@given(
    fields=st.dictionaries(KEYS, VALUES, max_size=3),
    changes=CHANGES,
    cut=CUT,
    where=st.sampled_from(["config", "weights", "neither"]),
    card=st.none() | st.binary(max_size=30) | st.dictionaries(KEYS, VALUES, max_size=2).map(lambda d: repr(d).encode()),
)
def test_an_adapter_of_anything_is_refused_by_name_or_can_be_loaded(
    room: Callable[[], Path],
    good: dict[str, bytes],
    fields: dict[str, Any],
    changes: list[tuple[float, int]],
    cut: float | None,
    where: str,
    card: bytes | None,
) -> None:
    place = room()
    config = json.dumps(json.loads(good["adapter_config.json"]) | fields).encode()
    weights = good["adapter_model.safetensors"]
    (place / "adapter_config.json").write_bytes(mutated(config, changes, cut) if where == "config" else config)
    (place / "adapter_model.safetensors").write_bytes(mutated(weights, changes, cut) if where == "weights" else weights)
    if card is not None:
        (place / "card.json").write_bytes(card)
    try:
        checked = check_adapter(place, BASE, 64)
    except (AdapterRejected, BaseMismatch) as error:
        no_leak(error)
    else:
        adapter = load_host_adapter(place)
        assert adapter.modules.keys() <= LINEARS.keys() and 1 <= checked.rank <= 64
        for path, (a, bt) in adapter.modules.items():
            assert (a.shape[1], bt.shape[1]) == LINEARS[path] and a.shape[0] == bt.shape[0] <= checked.rank
            assert a.isfinite().all() and bt.isfinite().all()
    shutil.rmtree(place)


# the body of an upload

BODY = (
    b'--b\r\nContent-Disposition: form-data; name="config"\r\n\r\n{}\r\n'
    b'--b\r\nContent-Disposition: form-data; name="weights"; filename="x"\r\nContent-Type: a/b\r\n\r\nwww\r\n--b--\r\n'
)
PIECES = st.lists(
    st.sampled_from([b"--b\r\n", b"--b--", b"\r\n", b'Content-Disposition: form-data; name="', b'config"', b"\0", b";"])
    | st.sampled_from([b'archive"', b'../../x"', b"Content-Transfer-Encoding: base64", b"\xff" * 9, b"a: b\r\n" * 9]),
    max_size=12,
).map(b"".join)


@some
@given(
    body=st.one_of(st.tuples(st.just(BODY), CHANGES, CUT).map(lambda args: mutated(*args)), PIECES),
    size=st.integers(1, 40),
)
def test_a_body_of_anything_is_refused_or_becomes_known_files(room: Callable[[], Path], body: bytes, size: int) -> None:
    place = room()
    writer = _PartWriter(b"b", place, LIMIT)
    try:
        for start in range(0, len(body), size):
            writer.feed(body[start : start + size])
        writer.finish()
    except (RequestError, AdapterError) as error:
        no_leak(error)
    finally:
        writer.close()
    assert {path.name for path in place.iterdir()} <= {*UPLOAD_PARTS.values(), "archive:upload"}
    shutil.rmtree(place)
