"""The base id: what a base model is, whatever device it runs on and however kernels pack its weights."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loramux_server.errors import BaseModelError

# Recorded in checkpoints but without influence on what the model computes. How bitsandbytes quantized one lies in its
# tensors; its config tells what it would compute in.
_CONFIG_NOISE = {
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures"),
    "quantization_config",
}
_TOKENIZER_KEYS = {
    *("bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token", "add_eos_token", "add_prefix_space"),
    *("chat_template", "added_tokens_decoder", "legacy", "clean_up_tokenization_spaces"),
}
_CHUNK = 1 << 22  # bytes read at a time
_TOLD_BYTES = 1 << 28  # digesting them takes half a second or more
_TOKENIZER_FILES = ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"]


def compute_base_id(directory: Path, recipe: dict[str, Any]) -> str:
    """sha256, hex, over the source weights, the config, the tokenizer and the quantization recipe.

    Weights count by tensor name, dtype, shape and bytes, so sharding and file metadata do not matter.

    Raises:
        BaseModelError: the directory holds no safetensors weights, or they cannot be read.
    """
    return _base_id(recipe, _parts(directory))


def cached_base_id(
    directory: Path, recipe: dict[str, Any], cache_dir: Path, report: Callable[[str], None] = lambda line: None
) -> str:
    """`compute_base_id`; what it read of the checkpoint is remembered in `cache_dir`, for any recipe.

    For as long as the files are the same ones: name, device, inode, size, and the times of the last change of content
    and of anything. The last of these no program can set, so a file that is exchanged for one of the same size and
    time is noticed; a directory that is renamed is not digested again.
    """
    files = sorted(path for path in directory.iterdir() if path.is_file())
    found = [(path.name, path.stat()) for path in files]
    stats = [(name, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in found]
    key = hashlib.sha256(_canonical(stats)).hexdigest()
    remembered = cache_dir / "base-ids" / f"{key}.json"
    if (parts := _remembered(remembered)) is not None:
        return _base_id(recipe, parts)
    size = sum(s.st_size for name, s in found if name.endswith(".safetensors"))
    if size >= _TOLD_BYTES:
        report(f"digesting the checkpoint ({size / 2**20:,.0f} MiB, once)")
    parts = _parts(directory)
    try:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        partial = remembered.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")  # others start meanwhile
        partial.write_text(json.dumps([[label, content.hex()] for label, content in parts], indent=0))
        partial.replace(remembered)
    except OSError as error:
        raise BaseModelError(
            f"the cache directory cannot be used ({error.strerror}); choose one with --cache-dir"
        ) from error
    return _base_id(recipe, parts)


def _base_id(recipe: dict[str, Any], parts: list[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256(b"loramux base id 1\n")
    for label, content in [("recipe", _canonical(recipe)), *parts]:
        _add(digest, label, content)
    return digest.hexdigest()


def _parts(directory: Path) -> list[tuple[str, bytes]]:
    """(what, its digest, or itself where it is short) of all that makes a checkpoint, in the order of the base id."""
    config = read_json(directory / "config.json")
    parts = [("config", _canonical({key: config[key] for key in config if key not in _CONFIG_NOISE}))]
    tokenizer_config = directory / "tokenizer_config.json"
    if tokenizer_config.is_file():
        settings = read_json(tokenizer_config)
        parts.append(("tokenizer", _canonical({key: settings[key] for key in settings if key in _TOKENIZER_KEYS})))
    for name in _TOKENIZER_FILES:
        if (directory / name).is_file():
            parts.append((name, hashlib.sha256((directory / name).read_bytes()).digest()))
    return [*parts, *sorted(_tensor_digests(directory).items())]


def _remembered(path: Path) -> list[tuple[str, bytes]] | None:
    """None where nothing is, or nothing that can be read: it is digested again."""
    try:
        return [(str(label), bytes.fromhex(content)) for label, content in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return None


def _tensor_digests(directory: Path) -> dict[str, bytes]:
    """Tensor name -> digest of (dtype, shape, bytes), over every safetensors file of the checkpoint."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise BaseModelError(
            "the base holds no safetensors weights; pickled checkpoints (.bin, .pt) are not loaded, convert them"
        )
    found: dict[str, bytes] = {}
    for path in files:
        try:
            found |= _digests_of_file(path)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise BaseModelError(f"{path.name} of the base is not a readable safetensors file: {error}") from error
    return found


def _digests_of_file(path: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise ValueError("its header is longer than the file (a git-lfs pointer, perhaps, or a broken download)")
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (int(offset) for offset in entry["data_offsets"])
            if not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(f"it is cut short: tensor {name} is not complete")
            digest = hashlib.sha256(_canonical([entry["dtype"], entry["shape"]]))
            file.seek(8 + length + begin)
            for start in range(begin, end, _CHUNK):
                digest.update(file.read(min(_CHUNK, end - start)))
            found[name] = digest.digest()
    return found


def _add(digest: hashlib._Hash, label: str, content: bytes) -> None:
    """Length-prefixed, so that no two different inputs can run together into the same bytes."""
    for part in (label.encode(), content):
        digest.update(struct.pack("<Q", len(part)))
        digest.update(part)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a checkpoint. Raises BaseModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"{path.name} of the base cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{path.name} of the base is not a JSON object")
    return value
