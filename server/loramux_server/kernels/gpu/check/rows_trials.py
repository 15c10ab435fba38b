"""Trials of what stands between products: embedding, norms, activations, rows that are gathered, factors of logits.

Near enough: each number is computed in fp32 and rounded once. Sums are of a row's squares: thousands of roundings of
2^-24, which in any order stay far below 2^-14 of the sum. Exponentials are within some last places.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loramux_server.kernels.gpu import rows as elementwise
from loramux_server.kernels.gpu.check.bench import Bench
from loramux_server.kernels.gpu.check.trial import ROWS, KernelTrial, Near, Results
from loramux_server.kernels.gpu.step.operations import Operation
from loramux_server.kernels.layers.recognition import RMSNorm

_EXACT = Near(0.0, 0.0)
_SINGLE = Near(2.0**-22, 2.0**-22)
_SUMS = 2.0**-14
_CAPPED = Near(2.0**-19, 2.0**-18)  # a soft cap is a difference of numbers near 1, times the cap


def resolve_tokens(bench: Bench) -> Iterator[KernelTrial]:
    chosen = bench.whole(1 << 17, ROWS, 3)[:, 1]  # as a column of answers
    tokens = torch.arange(ROWS, dtype=torch.int32) * 7919
    tokens[::2] = -1 - torch.from_numpy(bench.permutation(ROWS))[::2]
    given = bench.device.put(tokens)

    def run(operation: Operation, first: int, count: int) -> Results:
        to = bench.untouched(count, dtype=torch.int32)
        operation(bench.launch, to, given[first : first + count], chosen)
        return [to[:, None].double()]

    def expected() -> Results:
        to = bench.untouched(ROWS, dtype=torch.int32)
        elementwise.resolve_tokens_reference(to, given, chosen)
        return [to[:, None]]

    yield KernelTrial("resolve_tokens", f"{ROWS} of them", run, expected, [_EXACT])


def embed(bench: Bench) -> Iterator[KernelTrial]:
    of = bench.decoder.description
    if of.embedding is None:
        return
    embedding, factor = of.embedding, of.embedding_factor
    tokens = bench.whole(of.vocabulary, ROWS)
    tokens[0], tokens[3] = of.vocabulary - 1, 0

    def run(operation: Operation, first: int, count: int) -> Results:
        x = bench.untouched(count, of.hidden, dtype=torch.float32)
        operation(bench.launch, x, tokens[first : first + count], embedding, factor)
        return [x]

    def expected() -> Results:
        x = bench.untouched(ROWS, of.hidden, dtype=torch.float32)
        elementwise.embed_reference(x, tokens, embedding, factor)
        return [x]

    yield KernelTrial("embed", f"rows of {of.hidden}", run, expected, [_SINGLE])


def own_embeddings(bench: Bench) -> Iterator[KernelTrial]:
    of = bench.decoder.description
    if of.embedding is None:
        return
    embedding, factor = of.embedding, of.embedding_factor
    tokens = bench.whole(of.vocabulary, ROWS)
    more = bench.rows(of.hidden, torch.float32)
    known = bench.device.put((torch.arange(ROWS, dtype=torch.int32) % 3 != 1).int())
    at = bench.device.put(torch.from_numpy(bench.permutation(ROWS)).int())

    def run(operation: Operation, first: int, count: int) -> Results:
        x = bench.untouched(ROWS, of.hidden, dtype=torch.float32)
        some = slice(first, first + count)
        operation(bench.launch, x, at[some], known[some], more[some], tokens, embedding, factor)
        return [x.index_select(0, at[some].long())]

    def expected() -> Results:
        x = bench.untouched(ROWS, of.hidden, dtype=torch.float32)
        elementwise.own_embeddings_reference(x, at, known, more, tokens, embedding, factor)
        return [x.index_select(0, at.long())]

    yield KernelTrial("own_embeddings", f"rows of {of.hidden}", run, expected, [_SINGLE])


def own_logits(bench: Bench) -> Iterator[KernelTrial]:
    """Of every seventh token and of some that the base does not know, a few of which have a logit."""
    vocabulary = bench.decoder.description.vocabulary
    tokens = torch.cat([torch.arange(0, vocabulary, 7), torch.arange(vocabulary, vocabulary + 6, 2)]).int()
    logits, products = (bench.normal(ROWS, width, dtype=torch.float32) for width in (vocabulary, len(tokens)))
    wide = bench.device.put(torch.tensor([-torch.inf, 1.0, 2.0, -torch.inf, -1.0, -torch.inf]).repeat(ROWS, 1))
    at = bench.device.put(torch.from_numpy(bench.permutation(ROWS)).int())
    factors, its = bench.normal(ROWS, dtype=torch.float32), bench.device.put(tokens)

    def run(operation: Operation, first: int, count: int) -> Results:
        some = slice(first, first + count)
        found, more = logits.clone(), wide.clone()
        operation(bench.launch, found, more, products[some], its, at[some], factors[some])
        rows = at[some].long()
        return [found.index_select(0, rows), more.index_select(0, rows).clamp(min=-9.0)]

    def expected() -> Results:
        found, more = logits.clone(), wide.clone()
        elementwise.own_logits_reference(found, more, products, its, at, factors)
        return [found.index_select(0, at.long()), more.index_select(0, at.long()).clamp(min=-9.0)]

    yield KernelTrial("own_logits", f"{len(tokens)} tokens", run, expected, [_SINGLE, _SINGLE])


def add_norm(bench: Bench) -> Iterator[KernelTrial]:
    seen: set[tuple[bool, bool, bool]] = set()
    for is_first, after, norm in _norms(bench):
        kind = is_first, after is not None, norm is not None
        if kind not in seen:
            seen.add(kind)
            yield _add_norm(bench, is_first, after, norm)


def _add_norm(bench: Bench, is_first: bool, after: RMSNorm | None, norm: RMSNorm | None) -> KernelTrial:
    of = bench.decoder.description
    x = bench.rows(of.hidden, torch.float32)
    part = None if is_first else bench.rows(of.hidden, torch.float32).roll(1, 0)
    options = {"norm": norm, "after": after, "factor": of.residual_factor}

    def run(operation: Operation, first: int, count: int) -> Results:
        some = slice(first, first + count)
        n, sums = bench.untouched(count, of.hidden), x[some].clone()
        operation(bench.launch, n, sums, None if part is None else part[some], **options)
        return [n, sums]

    def expected() -> Results:
        n, sums = x.clone(), x.clone()
        elementwise.add_norm_reference(n, sums, part, norm=norm, after=after, factor=of.residual_factor)
        return [n, sums]

    what = f"rows of {of.hidden}" + (" after the embedding" if is_first else "")
    return KernelTrial("add_norm", what, run, expected, [Near(bench.rounding, _SUMS), Near(2.0**-22, _SUMS)])


def _norms(bench: Bench) -> Iterator[tuple[bool, RMSNorm | None, RMSNorm | None]]:
    """(nothing is added, the norm of what is added, the norm of the sum) of all of a step's."""
    of = bench.decoder.description
    after = None
    for index, layer in enumerate(of.layers):
        yield index == 0, after, layer.before_attention
        yield False, layer.after_attention, layer.before_mlp
        after = layer.after_mlp
    yield False, after, of.norm


def gather_rows(bench: Bench) -> Iterator[KernelTrial]:
    of = bench.decoder.description
    yield _gather_rows(bench, bench.rows(of.hidden, torch.float32))
    yield _gather_rows(bench, bench.rows(of.heads * of.head_dim))


def _gather_rows(bench: Bench, x: torch.Tensor) -> KernelTrial:
    which = bench.device.put(torch.from_numpy(bench.permutation(ROWS)))

    def run(operation: Operation, first: int, count: int) -> Results:
        to = bench.untouched(count, x.shape[1], dtype=x.dtype)
        operation(bench.launch, to, x, which[first : first + count])
        return [to]

    def expected() -> Results:
        to = x.clone()
        elementwise.gather_rows_reference(to, x, which)
        return [to]

    return KernelTrial("gather_rows", f"rows of {x.shape[1]}", run, expected, [_EXACT])


def gate(bench: Bench) -> Iterator[KernelTrial]:
    kinds = {(layer.linear("down").inputs, layer.gelu) for layer in bench.decoder.description.layers}
    return (_gate(bench, inner, gelu) for inner, gelu in sorted(kinds))


def _gate(bench: Bench, inner: int, gelu: bool) -> KernelTrial:
    gate_up = bench.rows(2 * inner)

    def run(operation: Operation, first: int, count: int) -> Results:
        out = bench.untouched(count, inner)
        operation(bench.launch, out, gate_up[first : first + count], gelu=gelu)
        return [out]

    def expected() -> Results:
        out = gate_up[:, :inner].float()
        elementwise.gate_reference(out, gate_up, gelu=gelu)
        return [out]

    return KernelTrial("gate", f"{inner} of {'GELU' if gelu else 'SiLU'}", run, expected, [Near(bench.rounding, _SUMS)])


def finish_logits(bench: Bench) -> Iterator[KernelTrial]:
    of = bench.decoder.description
    if of.logit_divisor == 1.0 and of.logit_softcap == 0.0:
        return
    size = of.logit_divisor * (of.logit_softcap or 1.0)  # so that the cap changes numbers
    logits = bench.normal(ROWS, of.vocabulary, size=size, dtype=torch.float32)
    options = {"divisor": of.logit_divisor, "softcap": of.logit_softcap}

    def run(operation: Operation, first: int, count: int) -> Results:
        some = logits[first : first + count].clone()
        operation(bench.launch, some, **options)
        return [some]

    def expected() -> Results:
        whole = logits.clone()
        elementwise.finish_logits_reference(whole, **options)
        return [whole]

    yield KernelTrial("finish_logits", f"rows of {of.vocabulary}", run, expected, [_CAPPED])
