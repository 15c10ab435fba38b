"""One of the two checkouts: how its `loramux` is called, its revision, and whose compiled code its server runs."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ..errors import LoadTestError
from ..process import KEYS, Program, environment_without

NAMES = ("before", "after")


@dataclass(frozen=True, slots=True)
class Checkout:
    """`name` is one of NAMES."""

    name: str
    directory: Path
    program: Program

    @classmethod
    def of(cls, name: str, directory: Path, command: str | None) -> Checkout:
        """`command`: words of a shell that call `loramux`; None is the one in the checkout's own `.venv`.

        Raises LoadTestError where there is no such file.
        """
        own = directory.resolve() / ".venv" / "bin" / "loramux"
        if command is None and not own.exists():
            raise LoadTestError(f"{directory} has no .venv/bin/loramux: `make install` there, or --{name}-command")
        words = (str(own),) if command is None else tuple(shlex.split(command))
        # With PYTHONPATH, both would run the code of whoever set it.
        return cls(name, directory.resolve(), Program(words, environment_without(*KEYS, "PYTHONPATH")))

    def revision(self) -> str:
        """The commit, with "+changes" where tracked files differ from it; "unknown" without git."""

        def git(*words: str) -> str:
            line = ["git", "-C", str(self.directory), *words]
            return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

        try:
            changes = git("status", "--porcelain", "--untracked-files=no")
            return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    def compiled_code(self, maps: str) -> list[str]:
        """The shared libraries of our packages in a server's memory maps, relative to the checkout.

        Args:
            maps: as /proc lists them.

        Raises LoadTestError for a library that is not this checkout's: other code would be compared.
        """
        paths = {Path(line.split(maxsplit=5)[5]) for line in maps.splitlines() if line.endswith(".so")}
        ours = sorted(path for path in paths if any(part.startswith("loramux_") for part in path.parts))
        for path in ours:
            if not path.is_relative_to(self.directory):
                raise LoadTestError(f"the server of `{self.name}` runs {path}, which is not in {self.directory}")
        return [str(path.relative_to(self.directory)) for path in ours]
