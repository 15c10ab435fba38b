"""`loramux adapters convert`: an adapter that another tool wrote -> a PEFT directory, on this machine alone."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux_adapters.artifact.config import CONFIG_FILE, CONVERTED_KEY, MAX_CONFIG_BYTES
from loramux_adapters.artifact.format import (
    MLX_WEIGHTS_FILE,
    PICKLES,
    SOURCE_FILES,
    WEIGHTS_FILE,
    pair_up,
    pickle_reason,
    read_header,
)
from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.artifact.reading.strict_json import parse_object
from loramux_adapters.errors import AdapterRejected
from loramux_server.cli import frame
from loramux_server.client.transfer import check_target
from loramux_server.errors import BaseModelError, CommandFailed
from loramux_server.plain_text import for_reader

if TYPE_CHECKING:
    from loramux_adapters.layouts.gguf_lora import Heads

app = frame.new_app()

_GGUF, _SAFETENSORS = ".gguf", ".safetensors"
_BESIDE = tuple(name for name in SOURCE_FILES if name not in (CONFIG_FILE, WEIGHTS_FILE, MLX_WEIGHTS_FILE))
_EPILOG = """\
It reads a directory that mlx-lm wrote, a GGUF file that llama.cpp's convert_lora_to_gguf wrote, or a safetensors file
whose tensors are named lora_down, lora_up and alpha, as Kohya's scripts and diffusers name them.

Examples:

    loramux adapters convert support-f16.gguf support --base acme/support-base
    loramux adapters push support"""


@app.command(cls=frame.Command, epilog=_EPILOG)
def convert(
    ctx: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="a directory or file that another tool wrote")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a new or empty directory")],
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="TEXT",
            help="the base it was trained on, as for `loramux serve`; needed for GGUF files of families whose query "
            "and key rows llama.cpp reorders (Llama, Mistral and others): its config says how many heads there are",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Bring an adapter that another tool wrote into PEFT's form, on this machine alone.

    No number changes. A chat template, tokenizer files and generation_config.json beside it go along.
    """
    check_target(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".loramux-", dir=directory.parent))
    except OSError as error:
        raise CommandFailed(f"cannot write to {directory.parent}: {error.strerror}") from error
    try:
        origin = _convert(source, staging, lambda: _heads(ctx, base))
        layout = pair_up(read_header(staging / WEIGHTS_FILE))
        staging.chmod(0o755)
        os.replace(staging, directory)
    except OSError as error:
        raise CommandFailed(f"cannot convert {source}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    ranks = sorted({pair.rank for pair in layout.pairs.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    frame.show(f"{source} -> {directory}: {len(layout.pairs)} modules of {rank}, from {origin}")
    frame.show_command(f"loramux adapters push {directory}")


def _convert(source: Path, staging: Path, heads: Callable[[], Heads]) -> str:
    """What it was, in words. Raises AdapterRejected, CommandFailed, BaseModelError, OSError."""
    from loramux_adapters.layouts.gguf_lora import convert_gguf, needs_heads
    from loramux_adapters.layouts.kohya_names import convert_kohya, has_kohya_names

    if not source.exists():
        raise CommandFailed(f"there is no file or directory {source}")
    if source.is_dir() and (source / CONFIG_FILE).exists():
        return _convert_mlx(source, staging)
    file = _file_in(source) if source.is_dir() else source
    with open_regular(file) as opened:
        begins = opened.read(4)
    if begins == b"GGUF" or file.suffix == _GGUF:
        convert_gguf(file, staging, heads() if needs_heads(file) else None)
    elif file.name in PICKLES or file.suffix in (".bin", ".pt", ".pth"):
        raise AdapterRejected([pickle_reason(file.name)])
    elif has_kohya_names(read_header(file)):
        convert_kohya(file, staging)
    else:
        raise AdapterRejected(
            [
                f"{file.name} has no names that are known here: neither lora_down and lora_up nor llama.cpp's; if it "
                f"is PEFT's or mlx-lm's, its {CONFIG_FILE} belongs beside it"
            ]
        )
    if source.is_dir():
        _copy_beside(source, staging)
    return _origin(staging)


def _convert_mlx(source: Path, staging: Path) -> str:
    from loramux_server.publishing.adapter_files import copy_adapter

    before = (source / CONFIG_FILE).read_bytes()
    copy_adapter(source, (), staging, limit=None)
    if not (staging / WEIGHTS_FILE).exists():
        pickles = [pickle_reason(name) for name in PICKLES if (source / name).exists()]
        raise AdapterRejected(pickles or [f"{source} holds no {WEIGHTS_FILE} and no {MLX_WEIGHTS_FILE}"])
    if (staging / CONFIG_FILE).read_bytes() == before:
        raise CommandFailed(f"{source} is in PEFT's form already: `loramux adapters push {source}` takes it")
    return _origin(staging)


def _file_in(directory: Path) -> Path:
    """The one file that holds weights. Raises CommandFailed."""
    found = sorted(path for path in directory.iterdir() if path.suffix in (_GGUF, _SAFETENSORS))
    if len(found) == 1:
        return found[0]
    if not found:
        raise CommandFailed(f"{directory} holds no {CONFIG_FILE}, and no .gguf or .safetensors file")
    names = ", ".join(path.name for path in found[:4])
    raise CommandFailed(f"{directory} holds {len(found)} files with weights ({names}): name one of them")


def _copy_beside(source: Path, staging: Path) -> None:
    for name in _BESIDE:
        if (source / name).exists():
            with open_regular(source / name) as file, (staging / name).open("xb") as copy:
                shutil.copyfileobj(file, copy)


def _origin(staging: Path) -> str:
    return str(parse_object((staging / CONFIG_FILE).read_bytes(), limit=MAX_CONFIG_BYTES)[CONVERTED_KEY])


def _heads(ctx: typer.Context, base: str | None) -> Heads:
    """How many heads the base's attention has. Raises CommandFailed, BaseModelError."""
    from loramux_adapters.layouts.gguf_lora import Heads
    from loramux_server.base.identity import read_json
    from loramux_server.base.source import resolve_base
    from loramux_server.config.environment import cache_dir_of

    if base is None:
        raise CommandFailed(
            "llama.cpp orders the rows of this model's query and key projections by head: name the base with --base; "
            "its config says how many heads there are"
        )

    def report(line: str) -> None:
        print(for_reader(line, sys.stderr), file=sys.stderr)

    found = resolve_base(base, cache_dir_of(None, ctx.obj), report, weights=False)
    config = read_json(found.directory / "config.json")
    text = config.get("text_config", config)
    queries = text.get("num_attention_heads")
    keys = text.get("num_key_value_heads", queries)
    if not all(isinstance(count, int) and 0 < count < 2**16 for count in (queries, keys)):
        raise BaseModelError(f"config.json of {base} does not say how many attention heads there are")
    return Heads(queries, keys)
