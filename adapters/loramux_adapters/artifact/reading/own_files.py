"""The files of an adapter's directory, opened without leaving what belongs to it.

A symbolic link is followed as long as it stays inside the adapter's own root: the directory itself; or, for a
directory of the cache of Hugging Face's hub (`models--<org>--<name>/snapshots/<revision>`), the directory of that one
model, since the files there are links to `../../blobs/<hash>`. So no adapter can have another one's files read, or a
secret's.

The way is walked step by step, links spelled out by hand and each directory opened from the one before: nothing is
looked at by one name and opened by another, so whoever changes a link meanwhile gains nothing.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from loramux_adapters.artifact.reading.strict_json import quoted
from loramux_adapters.errors import AdapterRejected

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAX_STEPS = 256  # of one way, those that its links add among them
_HUB_MODEL, _HUB_SNAPSHOTS = "models--", "snapshots"


class LinkInTheWay(AdapterRejected):
    """A link that leads out of where it has to stay, or a special file where a regular one should be."""


@dataclass(frozen=True, slots=True)
class OwnDirectory:
    """An adapter's directory, open while its context lasts; see `own_directory`."""

    _root: int
    _path: Path  # of the root, without links
    _way: tuple[str, ...]  # from the root to the directory, without links

    def look(self, name: str) -> os.stat_result | None:
        """What the file is, or what its link leads to; None if there is nothing. Raises LinkInTheWay, OSError."""
        try:
            with self._leading_to(name) as (parent, leaf):
                status = os.stat(leaf, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise LinkInTheWay([f"{name} is not a regular file"])
        return status

    def open(self, name: str) -> int:
        """A descriptor of the regular file. Raises LinkInTheWay, OSError."""
        with self._leading_to(name) as (parent, leaf):
            descriptor = os.open(leaf, _FILE, dir_fd=parent)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise LinkInTheWay([f"{name} is not a regular file"])
        return descriptor

    @contextmanager
    def _leading_to(self, name: str) -> Iterator[tuple[int, str]]:
        with _walked(self._root, self._path, self._way, [name], what="the adapter's own directory") as (parent, way):
            if len(way) == 0:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            yield parent, way[-1]


@contextmanager
def own_directory(top: Path, parts: Sequence[str] = ()) -> Iterator[OwnDirectory | None]:
    """The directory at `parts`, from `top` on; None if there is none.

    `top` is trusted, links and all; the way from there on may hold links that stay below `top`.
    Raises LinkInTheWay, OSError.
    """
    top = Path(os.path.realpath(top))
    above = os.open(top, _DIRECTORY)
    root: int | None = None
    try:
        try:
            with _walked(above, top, (), parts, what="the directory that adapters are taken from") as (parent, way):
                if way:
                    os.close(os.open(way[-1], _DIRECTORY, dir_fd=parent))
        except FileNotFoundError:
            yield None
            return
        except NotADirectoryError as error:
            raise LinkInTheWay(["the way to the adapter holds a file"]) from error
        here = top.joinpath(*way)
        path = _root_of(here)
        if path.is_relative_to(top):
            root = _descend(above, path.relative_to(top).parts)
        else:  # `top` is inside of a model of the hub's cache
            root = os.open(path, _DIRECTORY)
        yield OwnDirectory(root, path, here.relative_to(path).parts)
    finally:
        os.close(above)
        if root is not None:
            os.close(root)


def open_regular(path: Path) -> BufferedReader:
    """Open a file of an adapter's directory for reading; a link that leads out of there, a pipe, or a directory raises
    `AdapterRejected`.
    """
    try:
        with own_directory(path.parent) as directory:
            if directory is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            return os.fdopen(directory.open(path.name), "rb")
    except FileNotFoundError as error:
        raise AdapterRejected([f"{path.name} is missing"]) from error
    except OSError as error:
        raise AdapterRejected([f"{path.name} cannot be read as a file"]) from error


def _root_of(directory: Path) -> Path:
    is_snapshot = directory.parent.name == _HUB_SNAPSHOTS and directory.parent.parent.name.startswith(_HUB_MODEL)
    return directory.parent.parent if is_snapshot else directory


def _descend(descriptor: int, way: Sequence[str]) -> int:
    """A descriptor of the directory that a way without links leads to."""
    descriptor = os.dup(descriptor)
    for part in way:
        above = descriptor
        try:
            descriptor = os.open(part, _DIRECTORY, dir_fd=above)
        finally:
            os.close(above)
    return descriptor


@contextmanager
def _walked(
    root: int, path: Path, start: Sequence[str], way: Sequence[str], *, what: str
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Follow `way` from the directory at `start` below `root`, which is at `path`: (parent of its end, way to the end).

    The end itself may be anything but a link, or nothing. The parent is `root` for an empty way.
    Raises LinkInTheWay if it leads out of `root`, `what` for a message.
    """
    name = way[-1] if way else ""
    stack = [os.dup(root)]
    try:
        names: list[str] = []
        todo = [*start, *way][::-1]
        link: str | None = None
        for _ in range(_MAX_STEPS):
            while todo and todo[-1] in ("", "."):
                todo.pop()
            if not todo:
                break
            part = todo.pop()
            if part == "..":
                if not names:
                    raise _leads_out(name, link or part, what)
                names.pop()
                if len(stack) > len(names) + 1:
                    os.close(stack.pop())
                continue
            while len(stack) <= len(names):  # the end so far goes on: it has to be a directory
                stack.append(os.open(names[len(stack) - 1], _DIRECTORY, dir_fd=stack[-1]))
            target = _link_at(stack[-1], part)
            if target is None:
                names.append(part)
                continue
            link = target
            if target.startswith("/"):
                if not Path(target).is_relative_to(path):
                    raise _leads_out(name, target, what)
                for descriptor in stack[1:]:
                    os.close(descriptor)
                del stack[1:], names[:]
                target = str(Path(target).relative_to(path))
            todo += target.split("/")[::-1]
        else:
            raise LinkInTheWay([f"{quoted(name)} is a link that leads round in a circle, or over too many others"])
        yield stack[len(names) - 1 if names else 0], tuple(names)
    finally:
        for descriptor in stack:
            os.close(descriptor)


def _link_at(directory: int, name: str) -> str | None:
    """Where the link of this name leads; None for anything else, and for nothing."""
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            return None
        raise


def _leads_out(name: str, target: str, what: str) -> LinkInTheWay:
    return LinkInTheWay([f"{quoted(name)} is a symbolic link to {quoted(target)}, which leads out of {what}"])
