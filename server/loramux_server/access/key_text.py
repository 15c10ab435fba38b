"""A key as its holder has it, and what is kept of it: `lmx_ID_SECRET`, of which only a keyed hash is stored.

Whoever reads the file of keys learns no key, and without the secret beside it cannot even try guesses. The id is no
secret: it finds the one row to compare with, in lists and logs too.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass, field

PREFIX = "lmx"
_ID_BYTES, _SECRET_BYTES = 5, 32
_TEXT = re.compile(r"lmx_([0-9a-f]{10})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True)
class KeyText:
    """The parts of a key.

    Attributes:
        id: 10 hex digits, shown in lists.
        secret: 32 random bytes in base64url.
    """

    id: str
    secret: str = field(repr=False)

    @classmethod
    def new(cls) -> KeyText:
        return cls(secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(_SECRET_BYTES))

    @classmethod
    def parse(cls, text: bytes) -> KeyText | None:
        """None for what was never made here."""
        try:
            match = _TEXT.fullmatch(text.decode("ascii"))
        except UnicodeDecodeError:
            return None
        return None if match is None else cls(match[1], match[2])

    def hashed(self, pepper: bytes) -> bytes:
        """What is stored: HMAC-SHA256 with this machine's secret, 32 bytes."""
        return hmac.digest(pepper, f"{self.id}.{self.secret}".encode(), "sha256")

    def __str__(self) -> str:
        return f"{PREFIX}_{self.id}_{self.secret}"
