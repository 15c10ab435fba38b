"""The process that fetches: `python -m loramux_server.hub.fetch`, with an order on stdin and news on stdout.

The order is one JSON object: repository, revision (or null), files (that are wanted where they are), weights (of which
one is needed), pickles (that are never read), limit (bytes in all). News are lines of JSON: {"done", "total"} in bytes,
and at the end {"directory", "commit", "files", "cached"} or {"failure", "message"}.

Why a process: huggingface_hub can wait on a slow hub for as long as it likes, and a process can be ended; it reads its
endpoint, token and cache from the environment when it is imported; and what it imports stays out of a server.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramux_server.plain_text import shortened

CONFIG_BYTES = 2**20
_TOLD_SECONDS = 0.2
_COMMIT_DIGITS = frozenset("0123456789abcdef")


class Failure(Exception):
    """Why there is no adapter. `kind`: missing, unreachable, rejected or too_large."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class Counter:
    """The bytes that came, told now and then, and never more than there may be."""

    def __init__(self, limit: int) -> None:
        self.done = 0
        self.total = 0
        self._limit = limit
        self._told_at = 0.0

    def add(self, count: int) -> None:
        """Raises Failure."""
        self.done += count
        if self.done > self._limit:
            raise Failure("too_large", "")
        now = time.monotonic()
        if now - self._told_at >= _TOLD_SECONDS:
            self._told_at = now
            self.tell()

    def tell(self) -> None:
        if self.total:
            _say({"done": min(self.done, self.total), "total": self.total})


def main() -> int:
    order = json.loads(sys.stdin.buffer.read())
    try:
        _say(fetched(order))
    except Failure as failure:
        _say({"failure": failure.kind, "message": str(failure)})
    return 0


def fetched(order: Mapping[str, Any]) -> dict[str, Any]:
    """The last line of news. Raises Failure."""
    from huggingface_hub import HfApi, constants, errors, hf_hub_download
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

    disable_progress_bars()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    repository, revision = order["repository"], order["revision"]
    counter = Counter(order["limit"])

    class Bar(hub_tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            counter.add(int(n or 0))
            shown: bool | None = super().update(n)
            return shown

    def download(name: str, at: str | None) -> Path:
        try:
            return Path(hf_hub_download(repository, name, revision=at, tqdm_class=Bar))
        except errors.LocalEntryNotFoundError as error:
            if constants.HF_HUB_OFFLINE:
                raise Failure(
                    "unreachable", "HF_HUB_OFFLINE is set, and the hub's cache on this machine does not hold it"
                ) from error
            raise Failure("unreachable", _in_short(error.__cause__ or error)) from error

    def info(at: str | None) -> Any:
        return HfApi().model_info(repository, revision=at, files_metadata=True)

    try:
        try:
            config = download(order["files"][0], revision)
        except errors.RemoteEntryNotFoundError:
            names = {one.rfilename for one in info(revision).siblings or ()}
            raise Failure("rejected", _no_config(names, order["files"][0])) from None
        commit = config.parent.name
        if len(commit) != 40 or not set(commit) <= _COMMIT_DIGITS:
            raise Failure("unreachable", "it names no commit")
        try:
            sizes = {one.rfilename: one.size or 0 for one in info(commit).siblings or ()}
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except (OSError, RuntimeError, errors.HfHubHTTPError) as error:  # it is away, or offline is asked for
            return _of_cache(order, config.parent, error)
        except Exception as error:  # of the library below, whichever it is
            if not _is_network(error):
                raise
            return _of_cache(order, config.parent, error)
        wanted = [name for name in order["files"] if name in sizes]
        _require_weights(order, sizes)
        counter.total = sum(sizes[name] for name in wanted)
        if counter.total > order["limit"]:
            raise Failure("too_large", "")
        counter.done = 0
        counter.tell()
        for name in wanted:
            before = counter.done
            download(name, commit)
            counter.done = max(counter.done, before + sizes[name])  # one that was in the cache
            counter.tell()
    except errors.GatedRepoError as error:
        raise Failure(
            "missing",
            "it is gated: accept its terms on the hub, and set HF_TOKEN to a token of the account that did",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise Failure("missing", "there is no such repository, or it is private and HF_TOKEN does not open it") from (
            error
        )
    except errors.RevisionNotFoundError as error:
        raise Failure("missing", f"it has no revision {revision}") from error
    except errors.HFValidationError as error:
        raise Failure("missing", _in_short(error)) from error
    except errors.EntryNotFoundError as error:
        raise Failure("unreachable", f"it lists a file that it does not have: {_in_short(error)}") from error
    except OSError as error:
        raise Failure("unreachable", _in_short(error)) from error
    return {"directory": str(config.parent), "commit": commit, "files": wanted, "cached": False}


def _of_cache(order: Mapping[str, Any], snapshot: Path, error: Exception) -> dict[str, Any]:
    """What an earlier fetch of this commit left, if it is whole. Raises Failure."""
    names = {path.name for path in snapshot.iterdir() if path.exists()}
    if not names & {*order["weights"]}:
        raise Failure("unreachable", _in_short(error)) from error
    files = [name for name in order["files"] if name in names]
    return {"directory": str(snapshot), "commit": snapshot.name, "files": files, "cached": True}


def _require_weights(order: Mapping[str, Any], names: Mapping[str, int]) -> None:
    if any(name in names for name in order["weights"]):
        return
    for name, reason in order["pickles"].items():
        if name in names:
            raise Failure("rejected", reason)
    raise Failure("rejected", f"it holds no {order['weights'][0]}{_instead(names)}")


def _no_config(names: set[str], config: str) -> str:
    if "config.json" in names:
        return f"it is a whole model and no adapter: it holds no {config}. `loramux serve --base` takes models"
    return f"it holds no {config}{_instead(names)}"


def _instead(names: Mapping[str, int] | set[str]) -> str:
    """What is there instead, and what helps."""
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if gguf:
        return f", but {gguf[0]}: download it, and bring it into PEFT's form with `loramux adapters convert`"
    below = sorted(name for name in names if name.endswith("/adapter_config.json"))
    if below:
        return f" at its top, but in {below[0].rpartition('/')[0]}/: download that directory, and push it"
    return ""


def _is_network(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")


def _in_short(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines() or [""]
    return shortened(f"{type(error).__name__}: {lines[0]}", 300)


def _say(news: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(news) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
