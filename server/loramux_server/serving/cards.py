"""Cards that can be planned for: by name, or by the memory they are sold with."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loramux_server.did_you_mean import suggest
from loramux_server.errors import ConfigError

GIB = 2**30
KEPT_BY_THE_DRIVER = 0.03  # of what a card is sold with, where its name says nothing better: 1 to 3 % were seen
# CUDA's context, PyTorch's and Triton's kernels and cuBLAS's workspace. Processes were seen with 470 to 800 MiB before
# their first tensor: 3DTopia/Phidias-Diffusion issue 8; discuss.pytorch.org threads 73021 and 81330.
LIBRARIES = 600 * 2**20

# GiB as CUDA tells them to PyTorch ("GPU 0 has a total capacity of ..."), the least that was seen in public messages.
# What is missing against the name is the driver's, and error correction's where a card has it in the same memory.
_CAPACITY = {
    "RTX 3060": 11.6,
    "RTX 3080": 9.78,
    "RTX 3090": 23.6,
    "RTX 4060 Ti 16GB": 15.5,
    "RTX 4080": 15.5,
    "RTX 4090": 23.64,
    "RTX 5090": 31.36,
    "RTX A4000": 15.6,
    "T4": 14.56,
    "L4": 22.03,
    "A10": 22.03,
    "A10G": 22.03,
    "A30": 23.5,
    "L40S": 44.4,
    "A100 40GB": 39.39,
    "A100 80GB": 79.14,
    "H100": 79.1,
    "H200": 139.72,
}
_WITHOUT_BF16 = ("T4",)  # sm_75, for which Triton compiles no products on tensor cores
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(GiB|GB|G|MiB|MB|M)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Card:
    """A card that nobody has rented yet.

    Attributes:
        name: as it was named.
        total: bytes that CUDA will tell.
        libraries: of these, what CUDA and libraries take before a base is loaded; an estimate.
        is_slow: its products run without tensor cores.
    """

    name: str
    total: int
    libraries: int = LIBRARIES
    is_slow: bool = False

    @property
    def free(self) -> int:
        return max(0, self.total - self.libraries)


def cards_of(text: str) -> list[Card]:
    """Of "8GiB,RTX 4090". Raises ConfigError: one is neither a size nor the name of a card that is known."""
    cards = [card_of(part.strip()) for part in text.split(",") if part.strip()]
    if not cards:
        raise ConfigError("--card names no card; give sizes or names, such as --card 24GiB,'RTX 4090'")
    return cards


def card_of(text: str) -> Card:
    """Raises ConfigError."""
    if size := _SIZE.fullmatch(text):
        # vendors write GB and mean 2^30
        sold = float(size[1]) * (GIB if size[2].lower().startswith("g") else GIB / 1024)
        if sold < GIB:
            raise ConfigError(f"--card {text}: no card that is sold has so little memory; give some, such as 24GiB")
        unit = "GiB" if size[2].lower().startswith("g") else "MiB"
        return Card(f"{size[1]} {unit}", int(sold * (1 - KEPT_BY_THE_DRIVER)))
    by_name = {_plain(name): name for name in _CAPACITY}
    if name := by_name.get(_plain(text)):
        return Card(name, int(_CAPACITY[name] * GIB), is_slow=name in _WITHOUT_BF16)
    raise ConfigError(f"--card knows no {text!r}{_meant(text)}")


def _meant(text: str) -> str:
    """What to give instead."""
    if re.fullmatch(r"\d{1,3}", text):
        return f"; did you mean {text}GiB?"
    asked = _plain(text)
    longer = [name for name in _CAPACITY if len(asked) > 1 and asked in _plain(name)]
    meant = f"; did you mean {' or '.join(longer[:3])}?" if longer else suggest(text, _CAPACITY)
    if meant:
        return f"{meant} The memory it is sold with will do too, such as 24GiB"
    return f"; give the memory it is sold with, such as 24GiB, or one of {', '.join(_CAPACITY)}"


def _plain(name: str) -> str:
    """Without what some write and others leave out."""
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
