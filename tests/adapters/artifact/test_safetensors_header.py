from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loramux_adapters.artifact.safetensors_header import MAX_HEADER_BYTES, MAX_TENSORS, TensorSpec, read_header
from loramux_adapters.errors import AdapterRejected


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write(path: Path, header: object, data: bytes = bytes(16), length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def reasons_for(path: Path) -> list[str]:
    with pytest.raises(AdapterRejected) as caught:
        read_header(path)
    assert all(str(path.parent) not in reason for reason in caught.value.reasons)
    return caught.value.reasons


def test_a_file_of_the_library_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.ones(1, 1).half()}
    save_file(tensors, path, metadata={"format": "pt"})
    specs = read_header(path)
    assert {name: (spec.dtype, spec.shape, spec.nbytes) for name, spec in specs.items()} == {
        "a": ("F32", (2, 3), 24),
        "b": ("BF16", (4,), 8),
        "c": ("F16", (1, 1), 2),
    }
    spec = specs["a"]
    assert path.read_bytes()[spec.offset : spec.offset + spec.nbytes] == tensors["a"].numpy().tobytes()


def test_a_header_without_tensors_is_an_empty_file(tmp_path: Path) -> None:
    assert read_header(write(tmp_path / "w", {}, b"")) == {}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(dtype="F64")},
        {"a": entry(dtype="F8_E4M3", shape=(16,))},
        {"a": entry(dtype="I32")},
        {"a": entry(dtype="BOOL", shape=(16,))},
        {"a": entry(dtype=["F32"])},
        {"a": entry(shape=(2, 3))},
        {"a": entry(shape=(-2, -2))},
        {"a": entry(shape=(True, 4))},
        {"a": entry(shape=(2.0, 2))},
        {"a": entry(shape=[1] * 9)},
        {"a": {**entry(), "shape": 4}},
        {"a": entry(offsets=(0, 12))},
        {"a": entry(offsets=(-16, 0))},
        {"a": entry(offsets=(16, 0))},
        {"a": entry(offsets=(False, 16))},
        {"a": entry(offsets=(0, 16, 32))},
        {"a": entry(offsets=(0.0, 16))},
        {"a": {"dtype": "F32", "shape": [2, 2]}},
        {"a": {**entry(), "extra": 1}},
        {"a": [1]},
        {"a": None},
        {"a": entry(offsets=(4, 20))},
        {"a": entry(shape=(2,), offsets=(0, 8))},
        {"a": entry(), "b": entry()},
        {"a": entry(shape=(2,), offsets=(0, 8)), "b": entry(shape=(1,), offsets=(12, 16))},
        {"a": entry(shape=(3,), offsets=(0, 12)), "b": entry(shape=(2,), offsets=(8, 16))},
        {"a": entry(shape=(2**40, 2**40), offsets=(0, 2**82))},
        {"a": entry(), "__metadata__": {"format": 1}},
        {"a": entry(), "__metadata__": ["pt"]},
        {},
        b"[]",
        b" {}",
        b"{}x",
        b'{"a": \xff}',
        json.dumps({"a": entry()}).encode()[:-1] + b', "a": {}}',
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}',
    ],
)
def test_a_header_that_does_not_describe_the_data_is_refused(tmp_path: Path, header: object) -> None:
    assert reasons_for(write(tmp_path / "w", header))


@pytest.mark.parametrize("length", [0, 1, 10**3, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_a_length_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    assert reasons_for(write(tmp_path / "w", {"a": entry()}, length=length))


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_shorter_than_its_length_field_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "w"
    path.write_bytes(bytes(size))
    assert "too short" in reasons_for(path)[0]


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    header = {f"t{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(MAX_TENSORS + 1)}
    assert "more than" in reasons_for(write(tmp_path / "w", header, b""))[-1]


def test_every_bad_tensor_is_named(tmp_path: Path) -> None:
    found = reasons_for(write(tmp_path / "w", {"a": entry(dtype="F64"), "b\n": entry(shape=(3,))}))
    assert len(found) == 2 and "'a'" in found[0] and r"'b\n'" in found[1]


def test_only_a_regular_file_is_opened(tmp_path: Path) -> None:
    write(tmp_path / "w", {"a": entry()})
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder", "absent"):
        assert name in reasons_for(tmp_path / name)[0]


SCALARS = st.one_of(st.integers(-2, 20), st.booleans(), st.none(), st.floats(0, 4), st.sampled_from(["F32", "F16", ""]))
ENTRIES = st.builds(
    entry,
    dtype=st.sampled_from(["F32", "F16", "BF16", "F64", 1]),
    shape=st.lists(st.integers(-1, 4) | SCALARS, max_size=3),
    offsets=st.lists(st.integers(-1, 32) | SCALARS, min_size=1, max_size=3),
)


@settings(max_examples=400)
@given(
    header=st.dictionaries(st.text(max_size=3), ENTRIES | SCALARS, max_size=3),
    data=st.integers(0, 32).map(bytes),
    tail=st.binary(max_size=4),
)
def test_what_is_accepted_the_library_accepts_too(
    tmp_path: Path, header: dict[str, object], data: bytes, tail: bytes
) -> None:
    path = write(tmp_path / "w", json.dumps(header).encode() + tail, data)
    try:
        specs = read_header(path)
    except AdapterRejected as error:
        assert error.reasons
        return
    with safe_open(path, framework="pt") as file:
        assert {name: tuple(file.get_tensor(name).shape) for name in file.keys()} == {
            name: spec.shape for name, spec in specs.items()
        }


@settings(max_examples=300)
@given(position=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 300))
def test_a_damaged_file_is_refused_or_still_sound(tmp_path: Path, position: int, value: int, cut: int) -> None:
    path = tmp_path / "w"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4).half()}, path)
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] = value
    path.write_bytes(raw[:cut] if cut < len(raw) else raw)
    try:
        specs = read_header(path)
    except AdapterRejected:
        return
    assert all(isinstance(spec, TensorSpec) for spec in specs.values())
    try:
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(specs)
    except SafetensorError as error:
        pytest.fail(f"accepted a file that the library refuses: {error}")


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file"),
        (b"PK\3\4\0\0\x08\x08" + bytes(64), "a pickle, as torch.save writes it"),
        (pickle.dumps({"a": 1}, 2), "a pickle"),
        (pickle.dumps({"a": list(range(1000))}, 4), "a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (gzip.compress(bytes(range(256)) * 9, mtime=0), "an archive"),
    ],
)
def test_what_is_taken_for_weights_by_mistake_is_called_by_its_name(tmp_path: Path, start: bytes, what: str) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(start)
    (reason,) = reasons_for(path)
    assert f"adapter_model.safetensors is {what}" in reason
