"""What stands between a decoder's products, a row at a time: embedding, sums, norms, activations, factors of logits.

Semantics, all in fp32, results rounded once to the dtype of the tensor that takes them:

    resolve_tokens  to[t] = token[t] where it is not negative, else chosen[-1 - token[t]]
    embed           x[t] = embedding[token[t]] * factor
    add_norm        x[t] += factor * after(part[t]);  n[t] = norm(x[t])
                    norm(x) = weight * x / sqrt(mean(x^2) + eps), x itself where there is no norm
    gather_rows     to[s] = x[row[s]]
    gate            out[t] = activation(first half of gate_up[t]) * second half
    add_bias        y[t] += bias
    own_embeddings  x[row[i]] = (embedding[token[row[i]]] or 0 + more[i]) * factor
    own_logits      logits[row[i], token[j]] += factor[i] * product[i, j]
    finish_logits   logits = tanh(logits / divisor / softcap) * softcap

These are the steps of csrc/exact/decoder.h and elementwise.h. A row is the work of programs of its own, with the same
tiles and the same order of its sums however many rows there are; a row that holds NaN or infinity gives such a row.
Rows are dense (the last dimension's stride is 1, and a row begins where the last one ends) unless it says otherwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from loramux_server.kernels.gpu.launch import Launch
from loramux_server.kernels.layers.recognition import RMSNorm

LARGEST_HIDDEN = 16384  # numbers of a row that a block of 1,024 threads holds in its registers
_PIECE = 1024  # numbers of a row for one program where nothing is summed
_TOKENS = 128  # of one program


class RowTooWide(ValueError):
    """A norm over more numbers than a block of threads holds."""


def resolve_tokens(launch: Launch, to: torch.Tensor, tokens: torch.Tensor, chosen: torch.Tensor) -> None:
    """to [rows] int32 = tokens [rows] int32, where -(1 + i) stands for chosen[i].

    chosen: [asks] int32 with any stride, the tokens that an earlier step chose, so that a step can be started before
    anybody knows them; a negative one becomes 0. Who fills tokens sees to it that i is one of them.
    """
    grid = (triton.cdiv(len(to), _TOKENS),)
    launch(_resolve_tokens, grid, to, tokens, chosen, len(to), chosen.stride(0), PIECE=_TOKENS)


def resolve_tokens_reference(to: torch.Tensor, tokens: torch.Tensor, chosen: torch.Tensor) -> None:
    for row, token in enumerate(tokens.tolist()):
        to[row] = token if token >= 0 else chosen[-1 - token].clamp(min=0)


def embed(launch: Launch, x: torch.Tensor, tokens: torch.Tensor, embedding: torch.Tensor, factor: float = 1.0) -> None:
    """x [rows, hidden] = the rows of `embedding` [vocabulary, hidden] act that `tokens` [rows] int32 or int64 name.

    Tokens that are no row of the embedding are read from elsewhere in memory: whoever fills them sees to that.
    """
    rows, hidden = x.shape
    grid = (rows, triton.cdiv(hidden, _PIECE))
    launch(_embed, grid, x, tokens, embedding, hidden, float(factor), PIECE=_PIECE)


def embed_reference(x: torch.Tensor, tokens: torch.Tensor, embedding: torch.Tensor, factor: float = 1.0) -> None:
    x.copy_(embedding[tokens.long()].float() * factor)


def own_embeddings(
    launch: Launch,
    x: torch.Tensor,
    at: torch.Tensor,
    known: torch.Tensor,
    more: torch.Tensor,
    tokens: torch.Tensor,
    embedding: torch.Tensor,
    factor: float = 1.0,
) -> None:
    """Rows `at` [n] int32 of x [rows, hidden] fp32, each once, in place of what `embed` made of them.

    known: [n] int32, 0 where the base has no such token and nothing of the base counts. more: [n, hidden] fp32.
    tokens, embedding, factor: as for `embed`.
    """
    hidden = x.shape[1]
    grid = (len(at), triton.cdiv(hidden, _PIECE))
    launch(_own_embeddings, grid, x, at, known, more, tokens, embedding, hidden, float(factor), PIECE=_PIECE)


def own_embeddings_reference(
    x: torch.Tensor,
    at: torch.Tensor,
    known: torch.Tensor,
    more: torch.Tensor,
    tokens: torch.Tensor,
    embedding: torch.Tensor,
    factor: float = 1.0,
) -> None:
    rows = at.long()
    base = embedding[tokens[rows].long()].float()
    x[rows] = (torch.where(known[:, None] != 0, base, torch.zeros_like(base)) + more) * factor


def own_logits(
    launch: Launch,
    logits: torch.Tensor,
    wide: torch.Tensor,
    products: torch.Tensor,
    tokens: torch.Tensor,
    at: torch.Tensor,
    factors: torch.Tensor,
) -> None:
    """logits [rows, vocabulary] and wide [rows, more] fp32 += factors [n] fp32 * products [n, tokens] fp32.

    at: [n] int32, rows, each once. tokens: [tokens] int32, each once; those behind the vocabulary are columns of
    `wide`, where minus infinity is no logit yet. Rows of logits and wide may be apart, those of products are not.
    """
    uses, count = products.shape
    sizes = count, logits.shape[1], logits.stride(0), wide.stride(0)
    grid = (uses, triton.cdiv(count, _PIECE))
    launch(_own_logits, grid, logits, wide, products, tokens, at, factors, *sizes, PIECE=_PIECE)


def own_logits_reference(
    logits: torch.Tensor,
    wide: torch.Tensor,
    products: torch.Tensor,
    tokens: torch.Tensor,
    at: torch.Tensor,
    factors: torch.Tensor,
) -> None:
    both = torch.cat([logits, wide], 1)
    place = at.long()[:, None], tokens.long()[None, :]
    before = both[place]
    both[place] = torch.where(before == -torch.inf, torch.zeros_like(before), before) + products * factors[:, None]
    logits.copy_(both[:, : logits.shape[1]])
    wide.copy_(both[:, logits.shape[1] :])


def add_norm(
    launch: Launch,
    n: torch.Tensor,
    x: torch.Tensor,
    part: torch.Tensor | None = None,
    *,
    norm: RMSNorm | None = None,
    after: RMSNorm | None = None,
    factor: float = 1.0,
) -> None:
    """Adds what a block gives to the residual stream, and makes of it what the next product reads, in one pass.

    n: [rows, hidden] act, overwritten. x: [rows, hidden] fp32, changed in place where there is a part.
    part: [rows, hidden] fp32 or act; None adds nothing. norm: None hands x on as it is, as OLMo 2 does.
    after: of the part, before it is added (Gemma, OLMo 2). factor: of the part (Granite).

    Raises:
        RowTooWide: rows of more than LARGEST_HIDDEN numbers.
    """
    rows, hidden = x.shape
    constants = add_norm_constants(hidden, part is not None, norm is not None, after is not None)
    unread = x  # a kernel takes a tensor for each name; it reads none that its constants leave out
    launch(
        _add_norm,
        (rows,),
        *(n, x, unread if part is None else part),
        *(norm.weight if norm else unread, after.weight if after else unread, hidden),
        *(norm.eps if norm else 0.0, after.eps if after else 0.0, float(factor)),
        **constants,
    )


def add_norm_constants(hidden: int, add: bool, norm: bool, after: bool) -> dict[str, int | bool]:
    """What the kernel is compiled with for rows of `hidden` numbers: 16 of a row for each thread, or fewer."""
    if hidden > LARGEST_HIDDEN:
        raise RowTooWide(f"rows of {hidden} numbers; norms are of at most {LARGEST_HIDDEN}")
    width = triton.next_power_of_2(hidden)
    warps = min(32, max(1, width // 512))
    return {"ADD": add, "NORM": norm, "AFTER": add and after, "WIDTH": width, "num_warps": warps}


def add_norm_reference(
    n: torch.Tensor,
    x: torch.Tensor,
    part: torch.Tensor | None = None,
    *,
    norm: RMSNorm | None = None,
    after: RMSNorm | None = None,
    factor: float = 1.0,
) -> None:
    if part is not None:
        x += (_normed(part.float(), after) if after else part.float()) * factor
    n.copy_(_normed(x, norm) if norm else x)


def _normed(x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    return norm.weight * (x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt())


def gather_rows(launch: Launch, to: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
    """to [samples, width] = the rows of x [any, width] that `rows` [samples] int32 or int64 name; it lies elsewhere."""
    samples, width = to.shape
    launch(_gather_rows, (samples, triton.cdiv(width, _PIECE)), to, x, rows, width, PIECE=_PIECE)


def gather_rows_reference(to: torch.Tensor, x: torch.Tensor, rows: torch.Tensor) -> None:
    to.copy_(x[rows.long()])


def gate(launch: Launch, out: torch.Tensor, gate_up: torch.Tensor, *, gelu: bool) -> None:
    """out [rows, inner] act of gate_up [rows, 2 * inner] fp32 or act, the gate first; GELU by tanh, else SiLU."""
    rows, inner = out.shape
    grid = (rows, triton.cdiv(inner, _PIECE))
    launch(_gate, grid, out, gate_up, inner, GELU=gelu, PIECE=_PIECE)


def gate_reference(out: torch.Tensor, gate_up: torch.Tensor, *, gelu: bool) -> None:
    first, second = gate_up.double().chunk(2, dim=-1)  # PyTorch's GELU loses small numbers in fp32
    activated = torch.nn.functional.gelu(first, approximate="tanh") if gelu else torch.nn.functional.silu(first)
    out.copy_(activated * second)


def add_bias(launch: Launch, y: torch.Tensor, bias: torch.Tensor) -> None:
    """y [rows, outputs] += bias [outputs], each of fp32 or act."""
    rows, outputs = y.shape
    launch(_add_bias, (rows, triton.cdiv(outputs, _PIECE)), y, bias, outputs, PIECE=_PIECE)


def add_bias_reference(y: torch.Tensor, bias: torch.Tensor) -> None:
    y.copy_(y.float() + bias.float())


def finish_logits(launch: Launch, logits: torch.Tensor, *, divisor: float = 1.0, softcap: float = 0.0) -> None:
    """In place, logits [rows, vocabulary] fp32 with any stride between rows. softcap 0: none; starts nothing where
    neither changes a number."""
    if divisor == 1.0 and softcap == 0.0:
        return
    rows, vocabulary = logits.shape
    grid = (rows, triton.cdiv(vocabulary, _PIECE))
    arguments = (logits, vocabulary, logits.stride(0), float(divisor), float(softcap))
    launch(_finish_logits, grid, *arguments, CAPPED=softcap != 0.0, PIECE=_PIECE)


def finish_logits_reference(logits: torch.Tensor, *, divisor: float = 1.0, softcap: float = 0.0) -> None:
    logits /= divisor
    if softcap:
        logits.copy_((logits / softcap).tanh() * softcap)


@triton.jit
def _resolve_tokens(to, tokens, chosen, rows, stride, PIECE: tl.constexpr):
    i = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    token = tl.load(tokens + i, mask=i < rows, other=0)
    unknown = token < 0
    # what was chosen where logits are not finite means nothing, but it must be a token: its row is fed, and dropped
    token = tl.where(unknown, tl.maximum(tl.load(chosen + (-1 - token) * stride, mask=unknown, other=0), 0), token)
    tl.store(to + i, token, mask=i < rows)


@triton.jit
def _own_embeddings(x, at, known, more, tokens, embedding, hidden, factor, PIECE: tl.constexpr):
    which = tl.program_id(0)
    i = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    row = tl.load(at + which).to(tl.int64)
    is_known = tl.load(known + which) != 0
    token = tl.load(tokens + row).to(tl.int64)
    value = tl.load(embedding + token * hidden + i, mask=is_known & (i < hidden), other=0).to(tl.float32)
    value += tl.load(more + which.to(tl.int64) * hidden + i, mask=i < hidden, other=0)
    tl.store(x + row * hidden + i, value * factor, mask=i < hidden)


@triton.jit
def _own_logits(
    logits, wide, products, tokens, at, factors, count, vocabulary, stride, wide_stride, PIECE: tl.constexpr
):
    use = tl.program_id(0)
    i = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    row = tl.load(at + use).to(tl.int64)
    token = tl.load(tokens + i, mask=i < count, other=0)
    value = tl.load(products + use.to(tl.int64) * count + i, mask=i < count, other=0) * tl.load(factors + use)
    known = (i < count) & (token < vocabulary)
    here = logits + row * stride + token
    tl.store(here, tl.load(here, mask=known, other=0) + value, mask=known)
    beyond = (i < count) & (token >= vocabulary)
    there = wide + row * wide_stride + token - vocabulary
    before = tl.load(there, mask=beyond, other=0)
    tl.store(there, tl.where(before == -float("inf"), 0.0, before) + value, mask=beyond)


@triton.jit
def _embed(x, tokens, embedding, hidden, factor, PIECE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    token = tl.load(tokens + row).to(tl.int64)
    value = tl.load(embedding + token * hidden + i, mask=i < hidden, other=0)
    tl.store(x + row * hidden + i, value.to(tl.float32) * factor, mask=i < hidden)


@triton.jit
def _normalized(x, weight, eps, i, hidden):
    """x [WIDTH], with nothing behind the `hidden` numbers that count."""
    mean = tl.sum(x * x, 0) / hidden
    scale = 1.0 / tl.sqrt_rn(mean + eps)
    return x * scale * tl.load(weight + i, mask=i < hidden, other=0)


@triton.jit
def _add_norm(
    n,
    x,
    part,
    weight,
    after,
    hidden,
    eps,
    after_eps,
    factor,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    AFTER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i = tl.arange(0, WIDTH)
    at = tl.program_id(0).to(tl.int64) * hidden + i
    value = tl.load(x + at, mask=i < hidden, other=0)
    if ADD:
        added = tl.load(part + at, mask=i < hidden, other=0).to(tl.float32)
        if AFTER:
            added = _normalized(added, after, after_eps, i, hidden)
        value += added * factor
        tl.store(x + at, value, mask=i < hidden)
    if NORM:
        value = _normalized(value, weight, eps, i, hidden)
    tl.store(n + at, value.to(n.dtype.element_ty), mask=i < hidden)


@triton.jit
def _gather_rows(to, x, rows, width, PIECE: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    row = tl.load(rows + sample).to(tl.int64)
    tl.store(to + sample * width + i, tl.load(x + row * width + i, mask=i < width), mask=i < width)


@triton.jit
def _tanh(x):
    x = tl.where(x > 20.0, 20.0, x)  # where it is 1; NaN stays NaN
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _gate(out, gate_up, inner, GELU: tl.constexpr, PIECE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    first = gate_up + row * 2 * inner + i
    x = tl.load(first, mask=i < inner, other=0).to(tl.float32)
    up = tl.load(first + inner, mask=i < inner, other=0).to(tl.float32)
    if GELU:
        steep = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # (1 + tanh(a)) / 2 = 1 / (1 + exp(-2a))
    else:
        steep = x
    activated = x / (1.0 + tl.exp(tl.where(steep < -87.0, 87.0, -steep)))  # beyond, exp would be infinite
    tl.store(out + row * inner + i, (activated * up).to(out.dtype.element_ty), mask=i < inner)


@triton.jit
def _add_bias(y, bias, outputs, PIECE: tl.constexpr):
    i = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    at = y + tl.program_id(0).to(tl.int64) * outputs + i
    value = tl.load(at, mask=i < outputs, other=0).to(tl.float32)
    value += tl.load(bias + i, mask=i < outputs, other=0).to(tl.float32)
    tl.store(at, value.to(y.dtype.element_ty), mask=i < outputs)


@triton.jit
def _finish_logits(logits, vocabulary, stride, divisor, softcap, CAPPED: tl.constexpr, PIECE: tl.constexpr):
    i = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    at = logits + tl.program_id(0).to(tl.int64) * stride + i
    value = tl.load(at, mask=i < vocabulary, other=0)
    value = tl.div_rn(value, tl.full(value.shape, 0.0, tl.float32) + divisor)
    if CAPPED:
        value = _tanh(value / softcap) * softcap
    tl.store(at, value, mask=i < vocabulary)
