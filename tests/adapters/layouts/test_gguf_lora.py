"""A LoRA in GGUF -> PEFT: written by the gguf package in llama.cpp's layout, and all that can be wrong with a file."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.artifact.format import read_config
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.layouts.gguf_file import read_gguf_header, read_rows
from loramux_adapters.layouts.gguf_lora import _NAMES, Heads, convert_gguf, halves_apart, needs_heads
from loramux_adapters.lora.verify import check_adapter
from support.adapter_files import write_adapter
from support.foreign_adapters import halves_of, write_gguf_lora

HEADS = Heads(4, 2)


def linears(names: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{layer}.{name}": size for layer in range(2) for name, size in names.items()}


SIZES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "self_attn.qkv_proj": (64, 128),
    "mlp.gate_proj": (64, 96),
    "mlp.up_proj": (64, 96),
    "mlp.gate_up_proj": (64, 192),
    "mlp.down_proj": (96, 64),
}


def converted(file: Path, target: Path, heads: Heads | None = HEADS) -> Path:
    target.mkdir()
    convert_gguf(file, target, heads)
    return target


@pytest.mark.parametrize("architecture", sorted(_NAMES))
def test_every_architecture_comes_back_as_it_was(tmp_path: Path, architecture: str) -> None:
    """The names are the gguf package's own, so that ours are held against them."""
    base = linears({name: SIZES[name] for name in _NAMES[architecture].values()})
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    if gguf.get_tensor_name_map(arch, 2).get_name("lm_head") is not None:  # it is not tied to the embedding
        base["lm_head"] = (64, 96)
    adapter = write_adapter(tmp_path / "peft", base, rank=4, alpha=6)
    file = write_gguf_lora(adapter, tmp_path / "l.gguf", architecture, heads=4, kv_heads=2, layers=2)
    target = converted(file, tmp_path / "converted")
    info = BaseInfo("aa" * 32, base)
    assert check_adapter(target, info, 64).version == check_adapter(adapter, info, 64).version
    assert read_config(target).notes == (f"converted from llama.cpp's GGUF of a {architecture} model: alpha 6",)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_every_type_that_a_lora_is_written_in_is_read(tmp_path: Path, kind: str) -> None:
    adapter = write_adapter(tmp_path / "peft", linears(SIZES), targets=["q_proj", "up_proj"], rank=32)
    file = write_gguf_lora(adapter, tmp_path / "l.gguf", "qwen2", heads=4, kv_heads=2, layers=2, kind=kind)
    target = converted(file, tmp_path / "converted", None)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32}[kind]
    reader = gguf.GGUFReader(file)
    told = {tensor.name: tensor for tensor in reader.tensors}
    for module, (a, b) in halves_of(target).items():
        place = (
            module.replace("model.layers", "blk").replace("self_attn.q_proj", "attn_q").replace("mlp.up_proj", "ffn_up")
        )
        for half, matrix in (("a", a), ("b", b)):
            one = told[f"{place}.weight.lora_{half}"]
            expected = torch.from_numpy(np.array(gguf.quants.dequantize(one.data, one.tensor_type), dtype=np.float32))
            assert matrix.dtype == dtype and torch.equal(matrix.float(), expected)


def test_an_alpha_of_nothing_counts_the_product_once(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "peft", linears(SIZES), targets=["up_proj"], rank=4, alpha=64)
    file = write_gguf_lora(adapter, tmp_path / "l.gguf", "llama", heads=4, kv_heads=2, layers=2, alpha=0.0)
    assert not needs_heads(file)
    config = read_config(converted(file, tmp_path / "converted", None))
    assert (config.rank, config.alpha) == (4, 4.0)


def test_heads_are_asked_for_where_rows_are_ordered_by_them(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "peft", linears(SIZES), targets=["k_proj"], rank=4)
    plain = write_gguf_lora(adapter, tmp_path / "q.gguf", "qwen2", heads=4, kv_heads=2, layers=2)
    file = write_gguf_lora(adapter, tmp_path / "l.gguf", "llama", heads=4, kv_heads=2, layers=2)
    assert needs_heads(file) and not needs_heads(plain)
    with pytest.raises(AdapterRejected, match="name the base, whose config says how many"):
        converted(file, tmp_path / "a", None)
    with pytest.raises(AdapterRejected, match="32 outputs, which are not 5 heads: is --base another"):
        converted(file, tmp_path / "b", Heads(4, 5))


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3))
def test_rows_in_turn_come_apart(heads: int, half: int, columns: int) -> None:
    rows = np.arange(heads * 2 * half * columns).reshape(heads * 2 * half, columns)
    in_turn = rows.reshape(heads, 2, half, columns).swapaxes(1, 2).reshape(rows.shape)
    assert np.array_equal(halves_apart(in_turn, heads), rows)


def written(path: Path, architecture: str = "qwen2", **options: Any) -> Path:
    """A file of one tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    if options.get("type", "adapter") is not None:
        writer.add_type(options.get("type", "adapter"))
    writer.add_string("adapter.type", options.get("adapter", "lora"))
    if options.get("alpha") is not None:
        writer.add_float32("adapter.lora.alpha", options["alpha"])
    for name, shape in options.get("tensors", {"blk.0.attn_q.weight.lora_a": (2, 64)}).items():
        writer.add_tensor(name, np.ones(shape, dtype=options.get("dtype", np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PAIR = {"blk.0.attn_q.weight.lora_a": (2, 64), "blk.0.attn_q.weight.lora_b": (64, 2)}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"type": "model"}, "no LoRA: general.type is 'model'"),
        ({"adapter": "control_vector"}, "and no LoRA"),
        ({"alpha": None}, "adapter.lora.alpha of the GGUF file is not a number"),
        ({"alpha": float("nan")}, "adapter.lora.alpha of the GGUF file is not a number"),
        ({"alpha": -1.0}, "adapter.lora.alpha of the GGUF file is not a number"),
        ({"alpha": float("inf"), "tensors": PAIR}, "has alpha inf"),
        ({"architecture": "rwkv7"}, "of the architecture 'rwkv7', whose names are not known here"),
        ({}, "has no lora_b"),
        ({"tensors": PAIR | {"token_embd.weight.lora_a": (2, 64)}}, "an embedding's, which is not converted"),
        ({"tensors": PAIR | {"blk.0.attn_norm.weight": (64,)}}, "is no linear layer's"),
        ({"tensors": PAIR | {"blk.0.ffn_up.weight.lora_a": (4, 2, 64)}}, "LoRA of experts is not converted"),
        ({"tensors": {"blk.0.attn_q.weight.lora_a": (2, 64), "blk.0.attn_q.weight.lora_b": (64, 3)}}, "ranks 2 and 3"),
        ({"dtype": np.int32}, "is of GGUF's type 26; F32, F16, Q8_0, BF16 are read"),
        ({"tensors": {}}, "it holds no LoRA weights"),
    ],
)
def test_what_is_none_is_refused_by_name(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    architecture = options.pop("architecture", "qwen2")
    file = written(tmp_path / "l.gguf", architecture, **({"alpha": 4.0} | options))
    with pytest.raises(AdapterRejected) as caught:
        converted(file, tmp_path / "converted")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "cut short"),
        (b"GGML" + bytes(100), "is no GGUF file, whatever its name says"),
        (b"version https://git-lfs", "is no GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(100), "of a version of GGUF that is not read"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(100), "of a version of GGUF that is not read"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "claims more tensors or metadata"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "claims more tensors or metadata"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60), "has a text of"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"\xff" + bytes(20), "not UTF-8"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<I", 99), "of an unknown type"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 0, 2**62), "cut short"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**62), "cut short"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 9, 1), "of an unknown type"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + struct.pack("<I", 2**31), "has 2147483648 dimensions"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"a" + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0),
            "is cut short, or out of place",
        ),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, raw: bytes, says: str) -> None:
    (tmp_path / "l.gguf").write_bytes(raw)
    with pytest.raises(AdapterRejected, match=says):
        read_gguf_header(tmp_path / "l.gguf")


def test_damage_anywhere_is_a_refusal_or_read_within_bounds(tmp_path: Path) -> None:
    """Bytes changed and cut at random: nothing but `AdapterRejected` comes of it."""
    adapter = write_adapter(tmp_path / "peft", linears(SIZES), targets=["q_proj"], rank=4)
    whole = write_gguf_lora(adapter, tmp_path / "l.gguf", "llama", heads=4, kv_heads=2, layers=2).read_bytes()
    source = random.Random(7)
    refused = 0
    for turn in range(400):
        data = bytearray(whole)
        for _ in range(source.randint(1, 4)):
            data[source.randrange(min(len(data), 700))] = source.randrange(256)
        if turn % 4 == 0:
            del data[source.randrange(len(data)) :]
        (tmp_path / "l.gguf").write_bytes(data)
        target = tmp_path / f"t{turn}"
        target.mkdir()
        try:
            convert_gguf(tmp_path / "l.gguf", target, HEADS)
        except AdapterRejected:
            refused += 1
    assert refused > 200


def test_data_that_ends_early_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "l.gguf", alpha=4.0, tensors=PAIR)
    spec = read_gguf_header(file).tensors["blk.0.attn_q.weight.lora_b"]
    with file.open("r+b") as opened:
        opened.truncate(spec.offset + 10)
    with pytest.raises(AdapterRejected, match="cut short, or out of place"):
        read_gguf_header(file)
    with pytest.raises(AdapterRejected, match="ended while it was read"):
        read_rows(file, spec)
