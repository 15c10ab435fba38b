"""Judges the replay of a fingerprint: what an adapter said when it was made against what it says here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loramux_server.fingerprint.file import Fingerprint, Witness

# Twice and more of what arithmetic in bf16, as on GPUs, was seen to differ by from the CPU's on the same weights: 0.03
# on average, 0.36 at most, and flips at gaps up to 0.24.
MEAN_TOLERANCE = 0.1
MAX_TOLERANCE = 0.75
FLIP_TOLERANCE = 0.5

# How a fingerprint replayed: stored with a version and shown to clients; "skipped": the upload asked not to replay it;
# "none": there was none, or it came in another way.
ReplayOutcome = Literal["exact", "within_tolerance", "mismatch", "skipped", "none"]


@dataclass(frozen=True, slots=True)
class Scored:
    """One token of a fingerprint here, after the fingerprint's own tokens before it.

    Attributes:
        logprob: of that token.
        best: of the token that is likeliest here.
    """

    logprob: float
    best: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason`: what is not as it must be; empty unless it is a mismatch."""

    outcome: ReplayOutcome
    reason: str = ""


def foreign(fingerprint: Fingerprint, *, base_id: str, version: str) -> Verdict | None:
    """A mismatch that shows without asking the model; None if there is none."""
    if fingerprint.base_id != base_id:
        return Verdict("mismatch", "it was made on another base")
    if fingerprint.version != version:
        return Verdict("mismatch", "it was made for another adapter or version")
    return None


def judge(witnesses: Sequence[Witness], found: Sequence[Sequence[Scored]], *, same_numerics: bool) -> Verdict:
    """`found` has one entry for each token of each witness. With the same numerics only equal bits will do."""
    pairs = [
        (said, here)
        for witness, scores in zip(witnesses, found, strict=True)
        for said, here in zip(witness.logprobs, scores, strict=True)
    ]
    differences = [abs(here.logprob - said) for said, here in pairs]
    gaps = [here.best - here.logprob for _, here in pairs]
    if not any(differences) and not any(gaps):
        return Verdict("exact")
    mean, largest, gap = sum(differences) / len(pairs), max(differences), max(gaps)
    words = f"log probabilities differ by {mean:.4f} on average and {largest:.4f} at most"
    if any(gaps):
        words += f", {sum(one > 0 for one in gaps)} of {len(pairs)} greedy tokens differ at gaps up to {gap:.4f}"
    if same_numerics:
        return Verdict("mismatch", f"{words}; the numerics id is the same, so they should be equal")
    if mean <= MEAN_TOLERANCE and largest <= MAX_TOLERANCE and gap <= FLIP_TOLERANCE:
        return Verdict("within_tolerance")
    limits = f"{MEAN_TOLERANCE}, {MAX_TOLERANCE} and {FLIP_TOLERANCE}"
    return Verdict("mismatch", f"{words}; allowed are {limits}")
