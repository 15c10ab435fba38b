"""Digests of files and of what goes into JSON, by SHA-256, in hex."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def sha256_of_file(path: Path) -> str:
    """Of all its bytes, read piece by piece. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(content: object) -> str:
    """The same whatever the order of an object's names."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
