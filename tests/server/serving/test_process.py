"""The serving process as a supervisor sees it: a real process and real signals, with a server that has no model."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

from loramux_adapters.store.store import AdapterStore
from loramux_server.longrun.interrupt import SAME_SECONDS
from support import fakes_serving

SCRIPT = Path(fakes_serving.__file__)
ROOT = SCRIPT.parents[2]
SECONDS = 20  # longest wait for anything


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def serving(
    *flags: str, build_seconds: float = 0.0, failure: str = "", files: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The process, which may open so many files; killed in the end if it still runs."""
    limited = [] if files is None else ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh"]
    process = subprocess.Popen(
        [*limited, sys.executable, str(SCRIPT), str(build_seconds), failure, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "server"), str(ROOT / "adapters")])},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Reads lines up to one that matches, and returns them all."""
    assert process.stdout is not None
    text = ""
    while not re.search(pattern, text):
        line = process.stdout.readline()
        assert line, f"ended before {pattern!r}: {text}"
        text += line
    return text


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    stdout, stderr = process.communicate(timeout=SECONDS)
    return process.returncode, stdout, stderr


@contextmanager
def getting(port: int, path: str) -> Iterator[http.client.HTTPResponse]:
    """A reply whose body is still to be read."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)) as connection:
        connection.request("GET", path)
        with connection.getresponse() as response:
            yield response


def status_of(port: int, path: str) -> int:
    with getting(port, path) as response:
        return response.status


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=SECONDS).close()
            return
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_start_shows_its_stages_its_url_its_models_and_a_command_to_paste() -> None:
    port = free_port()
    with serving("--port", str(port)) as process:
        text = read_until(process, "curl .*\n")

        assert re.search(r"load the base \.\.\. \d+\.\d s\n", text)
        assert "memory: none\n" in text
        assert f"loramux is ready on http://127.0.0.1:{port} after " in text
        assert "models: base, pirate\n" in text
        assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in text
        assert '"model": "pirate"' in text
        assert status_of(port, "/health") == 200


def test_while_the_base_loads_the_process_is_alive_and_not_ready() -> None:
    port = free_port()
    with serving("--port", str(port), build_seconds=30) as process:
        wait_for_port(port)
        assert status_of(port, "/health") == 200
        with getting(port, "/ready") as ready:
            assert (ready.status, ready.headers["retry-after"]) == (503, "5")
            assert b'"code": "loading"' in ready.read()

        process.send_signal(signal.SIGTERM)
        code, stdout, _ = finished(process)
        assert code == 0
        assert stdout.endswith("stopped while loading\n")


def test_a_signal_lets_running_replies_end_refuses_new_ones_and_exits_with_0() -> None:
    port = free_port()
    with serving("--port", str(port)) as process:
        read_until(process, "curl ")
        with getting(port, "/stream") as stream:
            first = stream.readline()
            process.send_signal(signal.SIGTERM)
            said = read_until(process, "finishing")
            assert said.splitlines()[-1] == (
                "finishing 1 reply in at most 30 s, new requests are refused; press Ctrl-C again to stop now"
            )
            assert [status_of(port, path) for path in ("/stream", "/ready", "/health")] == [503, 503, 200]
            assert (first + stream.read()).split() == [str(n).encode() for n in range(fakes_serving.LINES)]

        code, stdout, stderr = finished(process)
        assert (code, stderr) == (0, "")
        assert stdout.splitlines()[-2:] == ["fake stopped", "stopped"]


def test_replies_that_outlast_the_shutdown_timeout_do_not_keep_the_process() -> None:
    port = free_port()
    with serving("--port", str(port), "--shutdown-timeout", "0") as process:
        read_until(process, "curl ")
        with getting(port, "/stream") as stream:
            stream.readline()
            process.send_signal(signal.SIGINT)

            code, stdout, _ = finished(process)
            assert code == 0 and stdout.endswith("stopped; 1 reply cut off\n")


def test_a_server_without_replies_to_finish_says_so() -> None:
    with serving("--port", "0") as process:
        read_until(process, "curl ")
        process.send_signal(signal.SIGINT)
        assert finished(process)[:2] == (0, "stopping; no reply is running\nfake stopped\nstopped\n")


def test_a_base_that_does_not_exist_is_told_before_anything_is_imported() -> None:
    with serving("--port", "0", "--base", "no-such-base", build_seconds=30) as process:
        code, stdout, stderr = finished(process)
    assert (code, stdout) == (1, "") and stderr.startswith("loramux: base 'no-such-base' is neither")


def test_a_second_signal_ends_the_process_at_once() -> None:
    port = free_port()
    with serving("--port", str(port)) as process:
        read_until(process, "curl ")
        with getting(port, "/stream") as stream:
            stream.readline()
            process.send_signal(signal.SIGTERM)
            read_until(process, "finishing")
            time.sleep(SAME_SECONDS)
            process.send_signal(signal.SIGTERM)

            code, stdout, _ = finished(process)
            assert (code, stdout) == (1, "stopped at once\n")


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    """Service managers send it to the whole group, and `make` hands it on."""
    with serving("--port", "0") as process:
        read_until(process, "curl ")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert finished(process)[:2] == (0, "stopping; no reply is running\nfake stopped\nstopped\n")


def test_a_port_in_use_is_told_in_one_line_before_anything_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with serving("--port", str(port), build_seconds=30) as process:
            code, stdout, stderr = finished(process)

    assert (code, stdout) == (1, "")
    assert (
        stderr
        == f"loramux: port {port} on 127.0.0.1 is in use; stop what listens there, or choose another with --port\n"
    )


def test_a_store_that_cannot_be_opened_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    flags = ("--port", "0", "--adapter-dir", str(tmp_path))
    with closing(AdapterStore(tmp_path)), serving(*flags, build_seconds=30) as process:
        code, stdout, stderr = finished(process)
    assert (code, stdout) == (1, "") and stderr.startswith("loramux: another server uses this store")

    (tmp_path / "index.sqlite").unlink()
    (tmp_path / "versions" / ("0" * 64)).mkdir()
    with serving(*flags, build_seconds=30) as process:
        code, stdout, stderr = finished(process)
    assert (code, stdout) == (1, "") and "loramux adapters rebuild-index" in stderr


def test_a_base_that_cannot_be_loaded_is_told_in_one_line() -> None:
    with serving("--port", "0", failure="the base is not a model") as process:
        code, _, stderr = finished(process)

    assert (code, stderr) == (1, "loramux: the base is not a model\n")


def test_a_wrong_setting_is_a_usage_error() -> None:
    with serving("--port", "70000") as process:
        code, _, stderr = finished(process)

    assert (code, stderr) == (2, "loramux: --port must be from 0 to 65535, not 70000\n")


def test_idle_connections_by_the_hundred_leave_the_server_answering_and_its_log_small() -> None:
    port = free_port()
    with serving("--port", str(port), "--header-timeout", "2", files=128) as process, ExitStack() as stack:
        read_until(process, "curl ")
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=SECONDS)) for _ in range(300)]
        for _ in range(30):
            assert status_of(port, "/health") == 200
        with getting(port, "/stream") as stream:
            assert len(stream.read().split()) == fakes_serving.LINES
        for connection in idle:  # the server closes each of them, soon or when its header is overdue
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""

        process.send_signal(signal.SIGTERM)
        code, _, stderr = finished(process)
        assert code == 0
        assert len(stderr.splitlines()) <= 3, stderr


def test_broken_requests_by_the_thousand_write_few_lines() -> None:
    port = free_port()
    with serving("--port", str(port)) as process:
        read_until(process, "curl ")
        for _ in range(1000):
            with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as connection:
                connection.sendall(b"hello\r\n\r\n")
                assert connection.recv(1000).startswith(b"HTTP/1.1 400")
        time.sleep(1.2)
        process.send_signal(signal.SIGTERM)
        _, _, stderr = finished(process)
        lines = stderr.splitlines()
        assert 2 <= len(lines) <= 30
        counts = [int(found[1]) for line in lines if (found := re.search(r": (\d+) more like this", line))]
        assert sum(counts) + len(lines) - len(counts) == 1000


def test_a_limit_on_open_files_that_leaves_no_room_is_told_before_anything_is_loaded() -> None:
    with serving("--port", "0", files=64) as process:
        code, _, stderr = finished(process)

    assert code == 2
    assert "allows this process 64 open files" in stderr and "ulimit -n" in stderr
