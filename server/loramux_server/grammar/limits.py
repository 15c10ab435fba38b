"""Bounds on what a client's grammar may cost, before the first token and with each one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """
    What llguidance counts as fuel is work: about 50,000 a millisecond while a grammar is compiled, 14,000 in a step.

    Attributes:
        max_bytes: of a schema as JSON, of a pattern, of a grammar, of all choices together.
        max_depth: of objects and lists within each other in a schema, of groups in a pattern.
        max_nodes: schemas within a schema.
        max_references: `$ref`s in a schema.
        max_choices: texts to choose from, and values of one `enum`.
        max_properties: of one object.
        max_count: a repeat count of a pattern, `maxLength`, `minItems` and the like.
        compile_fuel: for the automaton of all patterns of a grammar.
        grammar_size: symbols in the rules of a grammar.
        mask_fuel: for one token's automaton states; bounds the time for a mask.
        mask_items: parser items for one token.
        row_items: parser items at one place of a reply.
        states: of one sequence's automaton, each one or two kilobytes.
        compile_seconds: until a grammar is compiled, once it is begun.
        queue_seconds: until it is begun.
        mask_seconds: that one mask may take, from when it is begun,
        mask_queue_seconds: and until it is begun, while others' are made.
        spent_seconds: of a processor's time, that one reply's masks may take,
        spent_seconds_per_token: and for each of its tokens.
        kept_bytes: of the sources of grammars that are kept compiled.
        kept_copies: of one grammar, for sequences that run at once.
        kept_matchers: of all grammars; one that has been used has some hundred kilobytes.
        kept_spent_seconds: of a processor, that a kept one's masks have taken in all: its automaton, some 60 MB for
            a second of it, never shrinks.
    """

    max_bytes: int = 256 * 1024
    max_depth: int = 48
    max_nodes: int = 10_000
    max_references: int = 1_000
    max_choices: int = 4_000
    max_properties: int = 1_000
    max_count: int = 100_000
    compile_fuel: int = 3_000_000
    grammar_size: int = 200_000
    mask_fuel: int = 200_000
    mask_items: int = 20_000
    row_items: int = 2_500
    states: int = 25_000
    compile_seconds: float = 5.0
    queue_seconds: float = 20.0
    mask_seconds: float = 2.0
    mask_queue_seconds: float = 20.0
    spent_seconds: float = 0.5
    spent_seconds_per_token: float = 0.02
    kept_bytes: int = 2 * 1024 * 1024
    kept_copies: int = 32
    kept_matchers: int = 64
    kept_spent_seconds: float = 0.1
