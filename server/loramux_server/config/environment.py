"""What every command takes from the process's environment before it begins."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from loramux_server.did_you_mean import suggest
from loramux_server.errors import ConfigError
from loramux_server.kernels.compiled.library import native_library, why_unusable
from loramux_server.kernels.set_names import check_name

KEY_VARIABLES = ("LORAMUX_ADMIN_KEY", "LORAMUX_API_KEY")
KERNELS_VARIABLE = "LORAMUX_KERNELS"
ISA_VARIABLE = "LORAMUX_ISA"
_NO_BARS = {
    "TQDM_DISABLE": "1",  # of whoever uses tqdm
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
_QUIET = {
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def cache_dir_of(given: Path | None, environ: Mapping[str, str]) -> Path:
    """Where a converted base is kept: what `--cache-dir` says, or the user's cache directory."""
    return given or Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loramux"


def key_of(environ: Mapping[str, str]) -> str | None:
    """The key that a command shows a running server: the one that manages adapters, or else the one for requests."""
    return next((environ[variable] for variable in KEY_VARIABLES if environ.get(variable)), None)


def kernels_of(environ: Mapping[str, str]) -> str | None:
    """Which set of kernels to run on, by name (kernels/choice.py); None leaves the choice to the device.

    LORAMUX_ISA says on which instruction set `native` runs, or `modules` where LORAMUX_KERNELS asks for that.

    Raises:
        ConfigError: LORAMUX_ISA names no instruction set that compiled kernels run on here, or LORAMUX_KERNELS asks for
            others, or for what there is not.
    """
    request, isa = environ.get(KERNELS_VARIABLE) or None, environ.get(ISA_VARIABLE)
    if not isa:
        if request is not None:
            try:
                check_name(request)
            except ConfigError as error:
                raise ConfigError(f"{KERNELS_VARIABLE}: {error}") from error
        return request
    kind, _, label = (request or "native").partition("-")
    if kind not in ("native", "modules") or label not in ("", isa):
        raise ConfigError(
            f"{ISA_VARIABLE}={isa} asks for compiled kernels on it, {KERNELS_VARIABLE}={request} for others: unset one"
        )
    library = native_library()
    if library is None:
        raise ConfigError(f"{ISA_VARIABLE}={isa}: there are no compiled kernels here: {why_unusable()}")
    labels = [one.label for one in reversed(library.isas)]
    if isa not in labels:
        raise ConfigError(
            f"{ISA_VARIABLE} must be one of {', '.join(labels)}: the compiled kernels that this processor runs; it is "
            f"{isa!r}{suggest(isa, labels)}"
        )
    return f"{kind}-{isa}"


def before_a_base(environ: Mapping[str, str]) -> None:
    """To be called by every command that loads a base, before PyTorch is imported.

    Raises:
        ConfigError: as `kernels_of`: at once, not after seconds of imports.
    """
    kernels_of(environ)
    bound_spinning()


def no_bars() -> None:
    """To be called before libraries are imported: their progress bars stay out of our lines, on a terminal or not."""
    for variable, value in _NO_BARS.items():
        os.environ.setdefault(variable, value)


def quiet_libraries() -> None:
    """To be called before libraries are imported: their bars, advice and warnings stay away from the terminal.

    Their errors are still shown, and so is all that is ours.
    """
    no_bars()
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    logging.getLogger().setLevel(logging.ERROR)


def bound_spinning() -> None:
    """To be called before PyTorch is imported, which reads it once: its threads spin briefly while they wait.

    Without a bound, anything else on the same cores made steps up to ten times as long; without any spinning, a step of
    32 sequences on 2 cores took 131 ms instead of 88 (tokens/s over HTTP: 197 and 283).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
