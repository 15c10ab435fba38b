"""A server that cannot start says why in one line, with the right exit code, and leaves no traceback."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.real_server import clean_environment
from support.tiny_models import save_tiny_model


@dataclass(frozen=True)
class Failure:
    exit_code: int
    told: str  # the last line of stderr
    stdout: str
    seconds: float


def serve(*flags: str, environ: dict[str, str] | None = None) -> Failure:
    """A start that must fail by itself."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "loramux_server", "serve", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env=clean_environment() | (environ or {}),
    )
    output = done.stdout + done.stderr
    assert "Traceback" not in output and 'File "' not in output, output
    return Failure(done.returncode, (done.stderr.splitlines() or [""])[-1], done.stdout, time.monotonic() - began)


def test_a_port_in_use_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        failure = serve("--port", str(port), "--adapter-dir", str(tmp_path / "store"))
    assert failure.exit_code == 1
    assert f"port {port} on 127.0.0.1 is in use" in failure.told and "--port" in failure.told
    assert "load" not in failure.stdout and not (tmp_path / "store").exists()
    assert failure.seconds < 10


WRONG: list[tuple[list[str], dict[str, str], str]] = [
    (["--prot", "8001"], {}, "unknown argument --prot; did you mean --port?"),
    (["--port", "http"], {}, "--port"),
    (["--max-num-seqs", "0"], {}, "--max-num-seqs"),
    (["--max-batch-tokens", "4", "--max-num-seqs", "8"], {}, "--max-batch-tokens"),
    (["--device", "tpu"], {}, "--device"),
    (["--served-model-name", "a:b"], {}, "--served-model-name"),
    (["--config", "no-such-file.toml"], {}, "no-such-file.toml"),
    (["--preload", "no-such-directory"], {}, "--preload: no-such-directory is not a directory"),
    (["--watch-dir", "no-such-directory"], {}, "--watch-dir: no-such-directory is not a directory"),
    (["--lora-path-root", "no-such-directory"], {}, "--lora-path-root: no-such-directory is not a directory"),
    ([], {"LORAMUX_PROT": "8001"}, "LORAMUX_PROT"),
    ([], {"LORAMUX_PORT": "many"}, "LORAMUX_PORT"),
    ([], {"LORAMUX_API_KEY": ""}, "LORAMUX_API_KEY"),
    (["--api-key", "secret"], {}, "--api-key"),
    (["--host", "0.0.0.0"], {}, "set LORAMUX_API_KEY, or listen on 127.0.0.1"),
    (["--host", "::"], {}, "set LORAMUX_API_KEY, or listen on 127.0.0.1"),
    (["--host", "0.0.0.0"], {"LORAMUX_ADMIN_KEY": "only-this"}, "LORAMUX_API_KEY"),
]


@pytest.mark.parametrize(("flags", "environ", "told"), WRONG, ids=[" ".join([*w[0], *w[1]]) for w in WRONG])
def test_a_wrong_setting_is_named(flags: list[str], environ: dict[str, str], told: str) -> None:
    failure = serve(*flags, environ=environ)
    assert failure.exit_code == 2
    assert told in failure.told
    assert "load" not in failure.stdout


def test_a_base_that_is_missing_or_broken_is_told(tmp_path: Path) -> None:
    """Started side by side, as each imports everything first."""
    cut = save_tiny_model(tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    starts = {
        str(tmp_path / "missing"): "is neither a directory, nor a .gguf file, nor a hub id",
        str(cut): "cut short",
    }
    common = ["--port", "0", "--cache-dir", str(tmp_path / "cache"), "--adapter-dir", str(tmp_path / "store")]
    with ThreadPoolExecutor(len(starts)) as pool:
        failures = list(pool.map(lambda base: serve(*common, "--base", base), starts))
    for failure, told in zip(failures, starts.values(), strict=True):
        assert failure.exit_code == 1
        assert failure.told.startswith("loramux: ") and told in failure.told
