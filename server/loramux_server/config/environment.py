"""What every command takes from the process's environment before it begins."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

KEY_VARIABLES = ("LORAMUX_ADMIN_KEY", "LORAMUX_API_KEY")
KERNELS_VARIABLE = "LORAMUX_KERNELS"
_QUIET = {
    "TQDM_DISABLE": "1",  # bars of whoever uses tqdm
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
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
    """Which set of kernels to run on, by name (kernels/choice.py); None leaves the choice to the device."""
    return environ.get(KERNELS_VARIABLE) or None


def quiet_libraries() -> None:
    """To be called before libraries are imported: their bars, advice and warnings stay away from the terminal.

    Their errors are still shown, and so is all that is ours.
    """
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
