"""Held-out examples that the training data holds too, word for word or nearly: they would make scores a lie."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loramux_adapters.artifact.reading.strict_json import quoted
from loramux_adapters.errors import DataError
from loramux_adapters.training.data.examples import Example, ExampleSet

NEAR = 0.8  # Jaccard similarity of the texts' shingles from which one counts as a copy of the other
SHINGLE = 5  # characters
SHOWN = 5  # overlaps that an error names
MEAN_SHINGLES = 300  # of a text; of longer texts a sample is compared, whose similarity is within some 0.03
_PRIME = np.uint64(0x100000001B3)


@dataclass(frozen=True, slots=True)
class Overlap:
    """A held-out example and the training example that is most like it.

    Attributes:
        train: line in the training file.
        held: line in the held-out file.
        similarity: from NEAR to 1; 1 is a copy but for case, spaces and punctuation.
        text: how the held-out prompt begins.
    """

    train: int
    held: int
    similarity: float
    text: str


class OverlapError(DataError):
    """Training and held-out data share examples. `overlaps` lists them all."""

    def __init__(self, message: str, overlaps: Sequence[Overlap]) -> None:
        self.overlaps = tuple(overlaps)
        super().__init__(message)


def refuse_overlaps(train: ExampleSet, held: ExampleSet, *, allow: bool = False) -> list[Overlap]:
    """Makes sure that the held-out examples were not trained on.

    Args:
        allow: return the overlaps, to be reported, instead of refusing them.
    Raises:
        OverlapError: some held-out examples are copies or near copies of training examples.
    """
    found = find_overlaps(train.examples, held.examples)
    if not found or allow:
        return found
    exact = sum(overlap.similarity == 1 for overlap in found)
    lines = [
        f"{len(found)} of the {len(held.examples)} held-out examples in {held.path} are in the training data "
        f"{train.path} too ({exact} word for word, {len(found) - exact} nearly); scores on them would be too good:"
    ]
    for overlap in found[:SHOWN]:
        lines.append(
            f"  held-out line {overlap.held}, training line {overlap.train}, "
            f"{math.floor(100 * overlap.similarity)} % alike: {quoted(overlap.text, 60)}"
        )
    if len(found) > SHOWN:
        lines.append(f"  and {len(found) - SHOWN} more")
    lines.append("Take them out of one of the two files, or allow the overlap with --allow-overlap.")
    raise OverlapError("\n".join(lines), found)


def find_overlaps(train: Sequence[Example], held: Sequence[Example], *, near: float = NEAR) -> list[Overlap]:
    """For each held-out example that is like a training example: the one it is most like, in held-out order.

    Prompts are compared: the same question with another answer is a copy too. Parts that many prompts share, as an
    instruction around each text, count for nothing; where the whole prompt is such a part, the answers are compared.
    """
    texts = _Texts([*train, *held], near)
    best: dict[int, tuple[float, int]] = {}
    for first, second, similarity in texts.pairs(len(train)):
        if similarity > best.get(second, (0.0, 0))[0]:
            best[second] = (similarity, first)
    return [
        Overlap(train[first].line, held[second - len(train)].line, similarity, _asked(held[second - len(train)])[:80])
        for second, (similarity, first) in sorted(best.items())
    ]


def deduplicate(examples: Sequence[Example], *, near: float = NEAR) -> list[Example]:
    """The examples without those that are like an earlier one, by the measure of `find_overlaps`.

    However the result is parted into two, `find_overlaps` finds nothing between them.
    """
    kept = list(examples)
    while True:
        dropped: set[int] = set()
        for first, second, _ in _Texts(kept, near).pairs():
            if first not in dropped:
                dropped.add(second)
        if not dropped:
            return kept
        # what many texts share was counted with the copies: look again without them
        kept = [example for index, example in enumerate(kept) if index not in dropped]


class _Texts:
    """The compared texts of examples: normalised, and as sets of shingles from rare to frequent."""

    def __init__(self, examples: Sequence[Example], near: float) -> None:
        self._near = near
        prompts = [_normalised(_asked(example)) for example in examples]
        # a part is common if more texts share it than could well be copies of one another
        self._common = max(4, min(10, len(examples) // 2), len(examples) // 20)
        frequent = {text for text, count in Counter(prompts).items() if count > self._common}
        self._texts = [
            f"{prompt}\n{_normalised(example.answer)}" if prompt in frequent else prompt
            for prompt, example in zip(prompts, examples, strict=True)
        ]
        self._ranks, self._all = self._rank([_shingles(text) for text in self._texts])

    def pairs(self, border: int | None = None) -> Iterator[tuple[int, int, float]]:
        """(first, second, similarity) for all that are alike: second ascending, first < second.

        With a border, first lies before it and second does not; without, pairs come from the whole. Of several word for
        word copies before `second`, the first one alone is told.

        Two sets of similarity t share an element among the first |x| - ceil(t |x|) + 1 of each, in any common order.
        The order from rare to frequent leaves few to compare (Chaudhuri 2006, Bayardo 2007); none is missed.
        """
        seen: dict[str, int] = {}
        starts: dict[int, list[int]] = defaultdict(list)  # shingle -> texts that begin with it, in the order above
        for index, text in enumerate(self._texts):
            ranks = self._ranks[index]
            begin = ranks[: len(ranks) - math.ceil(self._near * len(ranks) - 1e-9) + 1]
            copy = seen.get(text)
            if border is None or index >= border:
                if copy is not None:
                    yield copy, index, 1.0
                yield from self._alike(index, {other for rank in begin for other in starts[rank]})
            if copy is None and (border is None or index < border):
                seen[text] = index
                for rank in begin:
                    starts[rank].append(index)

    def _alike(self, index: int, candidates: set[int]) -> Iterator[tuple[int, int, float]]:
        """Those that are alike both without what is common and with it: two short texts of common words are not."""
        ranks, shingles = set(self._ranks[index]), set(self._all[index])
        for other in sorted(candidates):
            if self._texts[other] == self._texts[index]:
                continue
            similarity = min(_jaccard(ranks, self._ranks[other]), _jaccard(shingles, self._all[other]))
            if similarity >= self._near:
                yield other, index, min(similarity, 1 - 1e-6)  # alike in shingles is not yet word for word

    def _rank(self, hashes: list[npt.NDArray[np.uint64]]) -> tuple[list[list[int]], list[list[int]]]:
        """Each text's shingles as ranks, 0 the rarest of all: those that are not common, ascending, and all of them."""
        mean = sum(len(each) for each in hashes) // max(1, len(hashes))
        if mean > MEAN_SHINGLES:  # the same sample of all possible shingles for every text keeps the similarity
            every = np.uint64(-(-mean // MEAN_SHINGLES))
            hashes = [each[(each >> np.uint64(20)) % every == 0] for each in hashes]
        if not hashes:
            return [], []
        _, which, counts = np.unique(np.concatenate(hashes), return_inverse=True, return_counts=True)
        rank = np.empty(len(counts), dtype=np.int64)
        rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
        rare = int((counts <= self._common).sum())  # ranks from here on are common
        borders = np.cumsum([len(each) for each in hashes])[:-1]
        shingles = [np.sort(ranks) for ranks in np.split(rank[which], borders)]
        return [ranks[ranks < rare].tolist() for ranks in shingles], [ranks.tolist() for ranks in shingles]


def _jaccard(first: set[int], second: Sequence[int]) -> float:
    shared = len(first.intersection(second))
    return shared / (len(first) + len(second) - shared)


def _asked(example: Example) -> str:
    """What is compared of an example: all but system messages and the last answer."""
    return "\n".join(message.content for message in example.prompt if message.role != "system")


class _Plain(dict[int, str]):
    """Character -> what is left of it: letters, marks and numbers as they are, everything else a space."""

    def __missing__(self, code: int) -> str:
        self[code] = chr(code) if unicodedata.category(chr(code))[0] in "LMN" else " "
        return self[code]


def _normalised(text: str) -> str:
    """Without case, punctuation and wide spaces; a text of nothing but signs stays as it is."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.translate(_Plain()).split()) or " ".join(folded.split())


def _shingles(text: str) -> npt.NDArray[np.uint64]:
    """Hashes of all runs of SHINGLE characters, each once."""
    codes = np.frombuffer(text.ljust(SHINGLE).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    hashes = np.zeros(len(codes) - SHINGLE + 1, dtype=np.uint64)
    for offset in range(SHINGLE):
        hashes = (hashes ^ codes[offset : offset + len(hashes)]) * _PRIME
    return np.unique(hashes)
