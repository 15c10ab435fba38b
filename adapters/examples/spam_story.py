"""The whole story of one adapter, told while it happens: `make spam`, or `python adapters/examples/spam_story.py`.

Fetches SMS Spam, trains an adapter on it, shows its scores on messages it has never seen, serves it, asks it, stops.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fetch_data import default_cache
from spam import LABELS, ask

NAME = "spam"
START_SECONDS = 300  # a first start fetches and converts the base
REQUEST_SECONDS = 60
STOP_SECONDS = 60
MESSAGES = (
    "Congratulations! You have been chosen for a 500 pound shopping voucher. Call 09061234567 now to claim.",
    "Running ten minutes late, can you order me the soup? x",
)


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # our own server is behind no proxy


class StoryEnds(Exception):
    """A part of the story failed; the message says which."""


def tell(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def command(*words: str) -> list[str]:
    """The command line of loramux in this environment."""
    return [sys.executable, "-m", "loramux_server", *words]


def run(*words: str) -> None:
    """Runs a step to its end, its output on our terminal."""
    if code := subprocess.run(words, check=False).returncode:
        raise StoryEnds(f"`{' '.join(words)}` ended with {code}")


@contextmanager
def server(store: Path) -> Iterator[str]:
    """A running server on a free port of this machine; gives its URL, stops it at the end whatever happens."""
    log = (store / "server.log").open("w+")
    process = subprocess.Popen(
        command("serve", "--port", "0", "--adapter-dir", str(store / "adapters")), stdout=log, stderr=subprocess.STDOUT
    )
    try:
        yield _ready(process, store / "server.log")
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def _ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text(encoding="utf-8")):
            try:
                with _DIRECT.open(f"{found[0]}/ready", timeout=5):
                    return found[0]
            except OSError:  # not yet: it answers 503 while it loads
                pass
        time.sleep(0.5)
    raise StoryEnds(f"the server did not start:\n{log.read_text(encoding='utf-8')}")


def answer(url: str, model: str, text: str) -> str:
    """What a client of OpenAI's API gets for one message."""
    body = {"model": model, "messages": ask(text), "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with _DIRECT.open(request, timeout=REQUEST_SECONDS) as response:
        reply: str = json.load(response)["choices"][0]["message"]["content"]
        return reply


def main() -> int:
    """Tells the story; 1 if a part of it failed."""
    parser = argparse.ArgumentParser(description="Fetch SMS Spam, train an adapter on it, score it, serve it, ask it.")
    parser.add_argument("--out", type=Path, default=Path("adapters-trained") / NAME, help="the run (%(default)s)")
    parser.add_argument("--max-steps", default="200", help="steps of 16 messages (%(default)s)")
    args = parser.parse_args()
    data = default_cache() / "spam"
    adapter = args.out / "adapter"
    try:
        tell("1/4 SMS Spam: fetched once, without copies, some messages held out")
        run(sys.executable, str(Path(__file__).with_name("spam.py")), "--out", str(data))
        if (adapter / "adapter_config.json").is_file():
            tell(f"2/4 {adapter} is there already; `rm -r {args.out}` to train it again")
        else:
            tell(f"2/4 training: {args.max_steps} steps of 16, then scores on the held-out messages")
            files = ("--data", str(data / "train.jsonl"), "--eval-data", str(data / "held.jsonl"))
            options = ("--labels", ",".join(LABELS), "--batching", "shuffle", "--max-steps", args.max_steps)
            run(*command("train", *files, "--name", NAME, "--out", str(args.out), *options))
        with tempfile.TemporaryDirectory(prefix="loramux-spam-") as store:
            tell("3/4 a server with the base alone; the adapter is uploaded while it runs")
            with server(Path(store)) as url:
                run(*command("adapters", "push", str(adapter), "--name", NAME, "--url", url))
                tell(f"4/4 two messages that nobody has labelled, to {url}/v1/chat/completions")
                for text in MESSAGES:
                    print(f"{answer(url, NAME, text):>5}  <-  {text}", flush=True)
            tell("server stopped. Ask again: loramux serve, then loramux adapters push " + str(adapter))
    except (StoryEnds, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
