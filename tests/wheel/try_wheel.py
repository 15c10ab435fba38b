"""Makes a wheel, installs it in an empty environment, and asks a server that runs from there one thing.

    python tests/wheel/try_wheel.py

Needs `build` in the environment that runs it. Everything is made in a temporary directory: neither the checkout nor an
installed package can stand in for what the wheel lacks.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_SECONDS = 300.0  # a first start fetches and converts the embedded base
QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}


def make_wheel(directory: Path) -> Path:
    """The wheel of this checkout. Exits where it holds no compiled library."""
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(directory), str(ROOT)]
    built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if built.returncode:
        sys.exit(f"{built.stdout}\nno wheel could be made")
    (wheel,) = directory.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    libraries = [name for name in names if name.endswith(".so")]
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, {len(names)} files, {', '.join(libraries)}")
    if not libraries:
        sys.exit("the wheel holds no compiled kernels")
    return wheel


def install(wheel: Path, directory: Path) -> Path:
    """The `loramux` command of a new environment that holds the wheel and its dependencies as tested."""
    venv.create(directory, with_pip=True)
    pip = [str(directory / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    return directory / "bin" / "loramux"


def ask_a_server(command: Path, directory: Path) -> None:
    """Starts a server there, asks it one question, and ends it. Exits where it does not answer."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAMUX_")}
    serve = [str(command), "serve", "--port", "0", "--adapter-dir", str(directory / "store")]
    process = subprocess.Popen(
        serve, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        url, model = _when_ready(process)
        body = json.dumps(QUESTION | {"model": model}).encode()
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)["choices"][0]["message"]["content"]
        print(f"{model}: {answer}")
        if "Paris" not in answer:
            sys.exit("that is not the answer")
    finally:
        process.terminate()
        process.wait(60)


def _when_ready(process: subprocess.Popen[str]) -> tuple[str, str]:
    """URL and base name, from what the server prints."""
    lines: list[str] = []
    output = process.stdout
    assert output is not None
    threading.Thread(target=lambda: lines.extend(output), daemon=True).start()
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        printed = "".join(lines)
        if (url := re.search(r"ready on (http://\S+)", printed)) and (
            model := re.search(r"models: ([^,\s]+)", printed)
        ):
            return url[1], model[1]
        time.sleep(0.1)
    sys.exit("the server is not ready:\n" + "".join(lines))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        command = install(make_wheel(directory), directory / "environment")
        subprocess.run([str(command), "--version"], cwd=directory, check=True)
        ask_a_server(command, directory)


if __name__ == "__main__":
    main()
