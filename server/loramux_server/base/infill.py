"""The tokens with which a base fills in what stands between two texts, as the families that have them write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

BEFORE, AFTER = "{before}", "{after}"

# What a prompt is put together of, and further tokens that end what is filled in. Sources: model cards and tokenizer
# files of each family.
_FAMILIES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    # Qwen2.5-Coder, Granite 3 and 4, CodeGemma
    (
        ("<|fim_prefix|>", BEFORE, "<|fim_suffix|>", AFTER, "<|fim_middle|>"),
        ("<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<|file_separator|>"),
    ),
    # StarCoder and StarCoder 2, Granite Code, Refact
    (("<fim_prefix>", BEFORE, "<fim_suffix>", AFTER, "<fim_middle>"), ("<fim_pad>", "<file_sep>")),
    # SantaCoder
    (("<fim-prefix>", BEFORE, "<fim-suffix>", AFTER, "<fim-middle>"), ("<fim-pad>",)),
    # DeepSeek-Coder
    (("<｜fim▁begin｜>", BEFORE, "<｜fim▁hole｜>", AFTER, "<｜fim▁end｜>"), ()),
    # Code Llama
    (("▁<PRE>", BEFORE, "▁<SUF>", AFTER, "▁<MID>"), ("▁<EOT>",)),
    # Codestral
    (("[SUFFIX]", AFTER, "[PREFIX]", BEFORE), ()),
    # Seed-Coder
    (("<[fim-suffix]>", AFTER, "<[fim-prefix]>", BEFORE, "<[fim-middle]>"), ()),
)


@dataclass(frozen=True, slots=True)
class Infill:
    """How a base is asked to fill in.

    Attributes:
        parts: a prompt in order: ids of tokens, and `BEFORE` and `AFTER` in place of the two texts.
        end_ids: end what is filled in, beside the base's own end tokens.
    """

    parts: tuple[int | str, ...]
    end_ids: frozenset[int]

    def prompt(self, before: Sequence[int], after: Sequence[int]) -> list[int]:
        """The ids of a prompt between whose two texts the reply stands."""
        ids: list[int] = []
        for part in self.parts:
            ids += [part] if isinstance(part, int) else before if part == BEFORE else after
        return ids


def infill_of(id_of: Callable[[str], int | None]) -> Infill | None:
    """How a base with these tokens fills in: `id_of` gives the id of a token's text. None if it has no such tokens."""
    for parts, ends in _FAMILIES:
        ids = [part if part in (BEFORE, AFTER) else id_of(part) for part in parts]
        known = tuple(one for one in ids if one is not None)
        if len(known) == len(parts):
            return Infill(known, frozenset(found for end in ends if (found := id_of(end)) is not None))
    return None
