"""Reads what an adapter's file holds of embeddings and output heads into `TokenRows`, and checks it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from loramux_adapters.artifact.config import AdapterConfig, rank_of, scale_of, trained_tokens_of
from loramux_adapters.artifact.format import (
    WEIGHTS_FILE,
    TensorSpec,
    Vector,
    VersionDigest,
    Vocabulary,
    VocabularyKind,
    tokens_in_order,
)
from loramux_adapters.artifact.reading.strict_json import quoted
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.token_rows import SIDES, BaseTokens, OwnRows, Side, TokenRows

NO_TOKENS = (
    "the adapter changes the embedding or the output head (modules_to_save, trainable_token_indices, LoRA on an "
    "embedding), and nothing is known here of the base's: a server of this base has to check it"
)
MAX_BYTES = 2**30  # of one adapter's rows
_MIB = 2**20
_PIECE_BYTES = 4 * _MIB
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ReadTokens(NamedTuple):
    """`rows`: None if nothing is changed; `not_finite`: modules that have a number that is not finite in bf16."""

    rows: TokenRows | None
    not_finite: set[str]


def side_of(base: BaseInfo, module: str) -> Side | None:
    """Which one a module of an adapter is; None: neither."""
    tokens = None if base.weights is None else base.weights.tokens
    if tokens is None:
        return None
    path = tokens.path_of(module)
    return next((side for side in SIDES if tokens.paths.get(side) == path), None)


def token_reasons(vocabulary: Vocabulary, config: AdapterConfig, base: BaseInfo, max_rank: int) -> list[str]:
    """What can be said of names and shapes without reading data.

    Matrices of other modules are not looked at: they may be copies of the base's.
    """
    tokens = None if base.weights is None else base.weights.tokens
    kinds: dict[str, set[VocabularyKind]] = {module: {*parts} for module, parts in vocabulary.items()}
    if tokens is None:
        changes = any(parts != {"whole"} for parts in kinds.values())
        return [NO_TOKENS] if changes else []
    reasons: list[str] = []
    sizes = _sizes(vocabulary, base, tokens)
    for module, parts in vocabulary.items():
        side = side_of(base, module)
        if side is None:
            if kinds[module] != {"whole"}:
                reasons.append(f"module {quoted(module)} is no embedding and no output head of the base")
            continue
        whole = parts.get("whole")
        if whole is not None and (whole.spec.shape[1] != tokens.hidden or whole.spec.shape[0] < tokens.size(side)):
            reasons.append(
                f"tensor {quoted(whole.name)} is of shape {[*whole.spec.shape]}, the base has "
                f"{[tokens.size(side), tokens.hidden]} there, and only more tokens can be added"
            )
        if "tokens" in parts:
            reasons += _trained_reasons(module, parts["tokens"], config, sizes[side], tokens.hidden)
        if kinds[module] & {"embedding_A", "embedding_B"}:
            reasons += _lora_reasons(module, parts, config, sizes[side], tokens, max_rank)
            if side == "head" or (tokens.tied and config.ties_weights):
                reasons.append(
                    f"module {quoted(module)} has LoRA on an embedding that holds for the output head too: not served"
                )
    absent = [
        name
        for name in config.trained_tokens
        if name and not any(m == name or m.endswith(f".{name}") for m in _having(vocabulary, "tokens"))
    ]
    if config.trained_tokens and not _having(vocabulary, "tokens"):
        reasons.append("trainable_token_indices names tokens, but the file holds no rows for them")
    elif absent and not (tokens.tied and len(set(config.trained_tokens.values())) == 1):
        reasons.append(f"trainable_token_indices names {quoted(absent[0], 60)}, but the file holds no rows for it")
    return reasons


def _having(vocabulary: Vocabulary, kind: VocabularyKind) -> list[str]:
    return [module for module, parts in vocabulary.items() if kind in parts]


def _sizes(vocabulary: Vocabulary, base: BaseInfo, tokens: BaseTokens) -> dict[Side, int]:
    """Tokens that have a row of each side, with what the adapter adds."""
    sizes = {side: tokens.size(side) for side in SIDES}
    for module, parts in vocabulary.items():
        side = side_of(base, module)
        if side is not None and "whole" in parts:
            sizes[side] = max(sizes[side], parts["whole"].spec.shape[0])
    return sizes


def _trained_reasons(module: str, given: Vector, config: AdapterConfig, size: int, hidden: int) -> list[str]:
    tokens = trained_tokens_of(config, module)
    if not tokens:
        return [f"module {quoted(module)} has trained tokens, but trainable_token_indices does not say which"]
    if given.spec.shape != (len(tokens), hidden):
        return [
            f"tensor {quoted(given.name)} is of shape {[*given.spec.shape]}, and trainable_token_indices and the base "
            f"give {[len(tokens), hidden]}"
        ]
    if max(tokens) >= size:
        return [f"trainable_token_indices names token {max(tokens)} of {quoted(module)}, which has {size}"]
    return []


def _lora_reasons(
    module: str,
    parts: Mapping[VocabularyKind, Vector],
    config: AdapterConfig,
    size: int,
    tokens: BaseTokens,
    max_rank: int,
) -> list[str]:
    if not {"embedding_A", "embedding_B"} <= parts.keys():
        return [f"module {quoted(module)} has only one of lora_embedding_A and lora_embedding_B"]
    a, b, rank = parts["embedding_A"].spec.shape, parts["embedding_B"].spec.shape, rank_of(config, module)
    if rank > max_rank:
        return [f"module {quoted(module)} has rank {rank}, this server takes at most {max_rank}"]
    if a not in ((rank, size), (rank, tokens.size("embedding"))) or b != (tokens.hidden, rank):
        return [
            f"module {quoted(module)} has LoRA of shapes {[*a]} and {[*b]}, and config and base give "
            f"{[rank, size]} and {[tokens.hidden, rank]}"
        ]
    return (
        []
        if config.rule.matches(module)
        else [f"module {quoted(module)} has weights but is no target of the config (target_modules and its companions)"]
    )


def read_tokens(
    file: int,
    vocabulary: Vocabulary,
    config: AdapterConfig,
    base: BaseTokens | None,
    sides: Mapping[str, Side],
    digest: VersionDigest,
) -> ReadTokens:
    """Digests all of it, and gives what is changed of the modules that `sides` names.

    Takes memory for what is changed, and for pieces of some MiB.

    Raises:
        AdapterRejected: there are no `base` tokens; the file ends early; the rows take more than `MAX_BYTES`.
    """
    if base is None and any(set(parts) != {"whole"} for parts in vocabulary.values()):
        raise AdapterRejected([NO_TOKENS])
    not_finite: set[str] = set()
    lora: dict[str, torch.Tensor] = {}
    whole: dict[Side, OwnRows] = {}
    sizes: dict[Side, int] = {} if base is None else {side: base.size(side) for side in SIDES}
    trained: dict[Side, OwnRows] = {}
    of_head = {module for module, side in sides.items() if side == "head"}
    for module, kind, matrix in tokens_in_order(vocabulary):
        digest.of_tokens(config, module, kind, matrix.spec)
        side = sides.get(module)
        if base is None or side is None:
            for _ in _pieces(file, matrix.spec, digest):
                pass
            continue
        shared = base.tied and side == "embedding"
        if kind == "whole":
            has_own = any("whole" in vocabulary[other] for other in of_head if other in vocabulary)
            for_sides: list[Side] = [side, "head"] if shared and config.ties_weights and not has_own else [side]
            found = _changed(file, matrix.spec, digest, base, for_sides)
            if found is None:
                not_finite.add(module)
                continue
            whole |= found
            for each in for_sides:
                sizes[each] = max(sizes[each], matrix.spec.shape[0])
            continue
        part = torch.cat([piece for _, piece in _pieces(file, matrix.spec, digest)]).to(
            torch.bfloat16 if kind != "embedding_B" else torch.float32
        )
        if kind == "embedding_B":
            part = (part * scale_of(config, module, matrix.spec.shape[1])).to(torch.bfloat16)
        if not bool(part.isfinite().all()):
            not_finite.add(module)
        if kind == "tokens":
            tokens = torch.tensor(trained_tokens_of(config, module))
            order = tokens.argsort()
            own = OwnRows(tokens[order].numpy().astype(np.int32), part[order])
            trained[side] = own
            if shared and not any("tokens" in vocabulary[other] for other in of_head if other in vocabulary):
                trained["head"] = own
        else:
            lora[kind] = part.t().contiguous()
    if base is None:
        return ReadTokens(None, not_finite)
    both = {side: _overlaid(whole.get(side), trained.get(side), base, side) for side in SIDES}
    base_sizes = {side: base.size(side) for side in SIDES}
    rows = TokenRows(
        both["embedding"], both["head"], lora.get("embedding_A"), lora.get("embedding_B"), sizes, base_sizes
    )
    _bound(rows.nbytes)
    return ReadTokens(rows if rows.nbytes or sizes != base_sizes else None, not_finite)


def _pieces(file: int, spec: TensorSpec, digest: VersionDigest) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows as they are in the file) of a matrix, some MiB at a time, all of which is digested."""
    rows, columns = (*spec.shape, 1)[:2] if spec.shape else (1, 1)
    row_bytes = max(1, spec.nbytes // max(1, rows))
    together = max(1, _PIECE_BYTES // row_bytes)
    for first in range(0, rows, together):
        count = min(together, rows - first)
        data = bytearray(os.pread(file, count * row_bytes, spec.offset + first * row_bytes))
        if len(data) < count * row_bytes:
            raise AdapterRejected([f"{WEIGHTS_FILE} ended while it was read"])
        digest.update(memoryview(data))
        if len(spec.shape) == 2:
            yield first, torch.frombuffer(data, dtype=_DTYPES[spec.dtype]).view(count, columns)


def _changed(
    file: int, spec: TensorSpec, digest: VersionDigest, base: BaseTokens, sides: list[Side]
) -> dict[Side, OwnRows] | None:
    """Rows of a saved matrix that are not the base's; None: a number is not finite."""
    tokens: dict[Side, list[torch.Tensor]] = {side: [] for side in sides}
    rows: dict[Side, list[torch.Tensor]] = {side: [] for side in sides}
    finite, nbytes = True, 0
    for first, piece in _pieces(file, spec, digest):
        own = piece.to(torch.bfloat16)
        finite = finite and bool(own.isfinite().all())
        if not finite:
            continue
        for side in sides:
            ids = torch.arange(first, first + len(own))
            known = max(0, min(len(own), base.size(side) - first))
            more = own.float()
            changed = torch.ones(len(own), dtype=torch.bool)
            if known:
                here = base.rows(side, ids[:known])
                changed[:known] = (base.served(side, own[:known]) != here).any(1)
                more[:known] -= here
            tokens[side].append(ids[changed])
            rows[side].append(more[changed].to(torch.bfloat16))
            nbytes += rows[side][-1].nbytes
        _bound(nbytes)
    if not finite:
        return None
    return {
        side: OwnRows(torch.cat(tokens[side]).numpy().astype(np.int32), torch.cat(rows[side]))
        for side in sides
        if rows[side]
    }


def _overlaid(whole: OwnRows | None, trained: OwnRows | None, base: BaseTokens, side: Side) -> OwnRows | None:
    """Rows of a saved matrix, with trained ones in their places; None: there are none."""
    if trained is not None:
        ids = torch.from_numpy(trained.tokens).long()
        more, known = trained.rows.float(), ids < base.size(side)
        more[known] -= base.rows(side, ids[known])
        tokens, rows = trained.tokens, more.to(torch.bfloat16)
        if whole is not None:
            kept = ~np.isin(whole.tokens, tokens)
            tokens = np.concatenate([whole.tokens[kept], tokens])
            rows = torch.cat([whole.rows[torch.from_numpy(kept)], rows])
            order = np.argsort(tokens)
            tokens, rows = tokens[order], rows[torch.from_numpy(order)]
        whole = OwnRows(tokens, rows)
    return whole if whole is not None and len(whole.tokens) else None


def _bound(nbytes: int) -> None:
    if nbytes > MAX_BYTES:
        raise AdapterRejected(
            [
                f"its own rows of embedding and output head take {nbytes / _MIB:.0f} MiB or more, and one adapter may "
                f"have {MAX_BYTES // _MIB} MiB: train fewer tokens (trainable_token_indices), or LoRA on the layers"
            ]
        )
