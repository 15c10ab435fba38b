"""Labelled texts: cleaned, deduplicated, split and written as chat examples. Shared by spam.py and sentiment.py."""

from __future__ import annotations

import html
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from loramux_adapters.training.data.conversation import Example, Message
from loramux_adapters.training.data.overlap import deduplicate

Messages: TypeAlias = Callable[[str], list[dict[str, str]]]  # a text -> the conversation that asks for its label

# Where a text held the bytes 0x80-0x9f of Windows, some files hold the control characters of the same numbers.
_WINDOWS = {code: bytes([code]).decode("cp1252", errors="ignore") for code in range(0x80, 0xA0)}


@dataclass(frozen=True, slots=True)
class Labelled:
    """One text with its right answer.

    Attributes:
        group: texts of one group come from one source (the sentences of one review) and stay on one side of the split.
    """

    text: str
    label: str
    group: str = ""


def clean(text: str) -> str:
    """The text as a person would have sent it: HTML entities and mistaken Windows characters undone, spaces single."""
    for _ in range(2):  # some files were escaped twice: &amp;amp;
        text = html.unescape(text)
    return " ".join(text.translate(_WINDOWS).split())


def without_copies(items: Iterable[Labelled], messages: Messages) -> list[Labelled]:
    """The first of each set of copies and near copies, so that no copy of a held-out text can be trained on.

    Texts that differ in case, punctuation, spaces or digits alone are copies: a campaign with another number to call is
    the same text. Where such copies have several labels all are left out, since nobody knows which is right. What is
    left is put through the check that `loramux train` makes.
    """
    found: dict[str, list[Labelled]] = defaultdict(list)
    for item in items:
        found[_key(item.text)].append(item)
    kept = [copies[0] for copies in found.values() if len({copy.label for copy in copies}) == 1]
    examples = [
        Example((*(Message(**message) for message in messages(item.text)), Message("assistant", item.label)), line)
        for line, item in enumerate(kept)
    ]
    return [kept[example.line] for example in deduplicate(examples)]


def _key(text: str) -> str:
    folded = "".join("0" if c.isdigit() else c for c in text.casefold() if c.isalnum())
    return folded or text


def split(items: Sequence[Labelled], *, held_share: float, seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """(train, held): `held_share` of each class is held out; with groups, whole groups until that share is reached."""
    rng = random.Random(f"split:{seed}")
    strata: dict[str, list[list[Labelled]]] = defaultdict(list)
    groups: dict[str, list[Labelled]] = defaultdict(list)
    for position, item in enumerate(items):
        groups[item.group or f"\0{position}"].append(item)
    for members in groups.values():  # a group of several classes belongs to none, and is drawn with its like
        labels = {item.label for item in members}
        strata[labels.pop() if len(labels) == 1 else ""].append(members)
    train: list[Labelled] = []
    held: list[Labelled] = []
    for _, stratum in sorted(strata.items()):
        rng.shuffle(stratum)
        wanted = round(held_share * sum(map(len, stratum)))
        taken = 0
        for members in stratum:
            (held if taken < wanted else train).extend(members)
            taken += len(members)
    rng.shuffle(train)
    rng.shuffle(held)
    return train, held


def mix(items: Sequence[Labelled], *, label: str, share: float, size: int, seed: int) -> list[Labelled]:
    """`size` examples of which `share` have this label (0: as it is), shuffled; size 0: as many as there are.

    Where a class has fewer texts than wanted, all of them are repeated equally often (one more for some); where it has
    more, some are left out. So no text is repeated before all of its class are in.
    """
    rng = random.Random(f"mix:{seed}")
    with_label = [item for item in items if item.label == label]
    others = [item for item in items if item.label != label]
    size = size or len(items)
    wanted = round(size * (share or len(with_label) / len(items)))
    mixed = [*_drawn(with_label, wanted, rng), *_drawn(others, size - wanted, rng)]
    rng.shuffle(mixed)
    return mixed


def _drawn(items: Sequence[Labelled], wanted: int, rng: random.Random) -> list[Labelled]:
    if not items:
        return []
    whole, rest = divmod(wanted, len(items))
    return [*(list(items) * whole), *rng.sample(list(items), rest)]


def write_jsonl(path: Path, items: Iterable[Labelled], messages: Messages) -> None:
    """One {"messages": [...]} a line: `messages` makes the question of the text, the assistant answers the label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for item in items:
            answered = [*messages(item.text), {"role": "assistant", "content": item.label}]
            file.write(json.dumps({"messages": answered}, ensure_ascii=False) + "\n")


def shares(items: Sequence[Labelled]) -> str:
    """Counts in words: `1000 (ham 870, 87.0 %; spam 130, 13.0 %)`."""
    counts = sorted(Counter(item.label for item in items).items())
    parts = "; ".join(f"{label} {count:,}, {100 * count / len(items):.1f} %" for label, count in counts)
    return f"{len(items):,} ({parts})"
