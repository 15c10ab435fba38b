"""From logits to tokens on the device: greedy, log probabilities, likeliest tokens and draws, a small answer a row.

Semantics: those of `loramux_server.kernels.compiled.sampling`, whose order of tokens and candidates these are. What
is asked of a row lies in tensors, and every kernel is started for every ask, so a graph can hold them; a kernel that
an ask has no use for leaves it at once.

A token weighs exp((its logit - the largest) / temperature), computed in fp32 as csrc/exact/vec.h does, rounded down
to a whole number of 2^-44; exp(-30) and less weighs nothing. Sums of whole numbers are exact in any order. So:

- greedy tokens, what is finite, and the likeliest tokens are those of the CPU for the same logits;
- an ask has the same answer alone or in company, and each time;
- a draw is that of the reference below, which adds up the same weights. It is that of TensorSampling and
  NativeSampling unless its number is within a millionth of probability of where one token ends and the next begins,
  the nucleus' end within a millionth of top-p, or a weight within a millionth of min-p;
- log sums are within 5e-7 of double precision.

On a device, where sums and products are fused, a weight may differ from the reference's in its last bit of fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from loramux_server.kernels.decoder.asks import ANSWER, MOST_LIKELY, Ask
from loramux_server.kernels.gpu import sampling_kernels as kernels
from loramux_server.kernels.gpu.cuts import ANSWER_WORDS as ANSWER_WORDS
from loramux_server.kernels.gpu.cuts import ASK as ASK
from loramux_server.kernels.gpu.cuts import ASK_WORDS as ASK_WORDS
from loramux_server.kernels.gpu.cuts import KEEP
from loramux_server.kernels.gpu.cuts import LARGEST_VOCABULARY as LARGEST_VOCABULARY
from loramux_server.kernels.gpu.cuts import SamplingError as SamplingError
from loramux_server.kernels.gpu.cuts import SamplingSizes as SamplingSizes
from loramux_server.kernels.gpu.launch import Launch

_BLOCK = 1024  # numbers that settle reads at a time
_CHOSEN = 2  # word of 32 bits of an answer


class SamplingTables:
    """What is asked, what is answered, and the scratch between: tensors of fixed sizes for `sample`.

    Attributes:
        asks: [sizes.asks, ASK_WORDS] int64 on the device; a step's are copied to its first rows from what `fill` wrote.
        answers: [sizes.asks, ANSWER_WORDS] int64 on the device; on the host, `answers_of` reads a copy.
        chosen: [sizes.asks] int32, the column of them that has the chosen tokens.
    """

    def __init__(
        self, sizes: SamplingSizes, asks: torch.Tensor, answers: torch.Tensor, scratch: dict[str, torch.Tensor]
    ) -> None:
        """`scratch`: a tensor for each name of `sizes.scratch()`, whose numbers need not be set."""
        shapes = (sizes.asks, ASK_WORDS), (sizes.asks, ANSWER_WORDS)
        for tensor, shape in zip((asks, answers), shapes, strict=True):
            if tensor.shape != shape or tensor.dtype != torch.int64:
                raise SamplingError(f"a table of {tuple(tensor.shape)} {tensor.dtype}, and not of {shape} int64")
        for name, (count, dtype) in sizes.scratch().items():
            if scratch[name].numel() < count or scratch[name].dtype != dtype:
                raise SamplingError(f"scratch {name!r} of {scratch[name].numel()}, and not of {count} {dtype}")
        self.sizes, self.asks, self.answers, self.scratch = sizes, asks, answers, scratch
        self.chosen = answers.view(torch.int32)[:, _CHOSEN]

    @classmethod
    def on(cls, sizes: SamplingSizes, device: torch.device) -> SamplingTables:
        asks, answers = (torch.empty(sizes.asks, words, dtype=torch.int64) for words in (ASK_WORDS, ANSWER_WORDS))
        scratch = {name: torch.empty(count, dtype=of, device=device) for name, (count, of) in sizes.scratch().items()}
        return cls(sizes, asks.to(device), answers.to(device), scratch)


def fill(staging: npt.NDArray[np.int64], asks: Sequence[Ask], vocabulary: int) -> None:
    """Writes a step's asks to `staging` [at least as many, ASK_WORDS] on the host, for `SamplingTables.asks`.

    Rows of it that are left over ask nothing, and get no answer: a step may have fewer than its graph.

    Raises:
        SamplingError: more than there is room for, or something that cannot be asked.
    """
    if len(asks) > len(staging):
        raise SamplingError(f"{len(asks)} rows are asked for, and there is room for {len(staging)}")
    written = staging.view(ASK)[:, 0]
    written[: len(asks)] = np.array([_written(ask, vocabulary) for ask in asks], dtype=ASK)
    written["row"][len(asks) :] = -1


def _written(ask: Ask, vocabulary: int) -> tuple[float, float, float, float, int, int, int, int]:
    top = -1 if ask.top is None else ask.top
    token = -1 if ask.token is None else ask.token
    if not -1 <= top <= MOST_LIKELY:
        raise SamplingError(f"the {top} likeliest tokens are asked for; they are 0 to {MOST_LIKELY}")
    if not -1 <= token < vocabulary:
        raise SamplingError(f"token {token} is none of {vocabulary}")
    if ask.draw is None or ask.token is not None:
        return 0.0, 1.0, 0.0, 0.0, ask.row, 0, token, top
    draw = ask.draw
    if not (0.0 <= draw.uniform < 1.0 and draw.temperature > 0.0):
        raise SamplingError(f"drawn by {draw.uniform} at temperature {draw.temperature}: below 1, and above 0")
    # even at the least temperatures a number that times nothing is nothing
    factor = 1.0 / draw.temperature if draw.temperature > 1e-30 else 1e30
    cut = math.log(min(draw.min_p, 1.0)) if draw.min_p > 0.0 else -math.inf
    top_k = draw.top_k if 0 < draw.top_k < vocabulary else 0
    return draw.uniform, max(draw.top_p, 0.0), factor, cut, ask.row, top_k, token, top


def answers_of(copied: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
    """Answers [n] with the fields of ANSWER, of a copy [n, ANSWER_WORDS] on the host."""
    return copied.view(ANSWER)[:, 0]


def sample(launch: Launch, tables: SamplingTables, logits: torch.Tensor, asks: int) -> None:
    """Answers the first `asks` of the tables. logits: [rows, vocabulary] fp32 with any stride between rows.

    Five kernels; an ask for the first largest alone has no part in four of them.
    """
    sizes = tables.sizes
    if logits.shape[1] != sizes.vocabulary or logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise SamplingError(
            f"logits of {logits.shape[1]} tokens, {logits.dtype}, strides {logits.stride()}: a row is "
            f"{sizes.vocabulary} numbers of fp32 side by side"
        )
    doubles, floats, ints = (tables.asks.view(dtype) for dtype in (torch.float64, torch.float32, torch.int32))
    answers = tuple(tables.answers.view(dtype) for dtype in (torch.int32, torch.float32, torch.float64))
    tops, keys, masses, counts, sick, lists, states = (tables.scratch[name] for name in sizes.scratch())
    shape = sizes.vocabulary, logits.stride(0), sizes.tiles
    made = sampling_constants(sizes)
    grid = (asks, sizes.tiles)
    launch(kernels.search, grid, ints, floats, doubles, logits, tops, sick, keys, *shape, **made["search"])
    launch(kernels.weigh, grid, ints, floats, logits, tops, masses, *shape, **made["weigh"])
    launch(
        *(kernels.finish, (asks,), ints, floats, doubles, *answers),
        *(logits, tops, sick, keys, masses, states, counts, *shape),
        **made["finish"],
    )
    launch(kernels.count, grid, ints, floats, logits, tops, states, counts, *shape, **made["count"])
    launch(
        *(kernels.settle, (asks,), ints, floats, doubles, *answers),
        *(logits, tops, masses, states, counts, lists, *shape),
        **made["settle"],
    )


def sampling_constants(sizes: SamplingSizes) -> dict[str, dict[str, int]]:
    """What each kernel is compiled with: its constants and warps."""
    tile, places = {"TILE": sizes.tile}, {"TILES": sizes.places}
    warps = 8 if sizes.tile > 1024 else 4
    logs = {"LOG_TILE": sizes.tile.bit_length() - 1}
    head = {"LOG_HEAD": (sizes.places * KEEP).bit_length() - 1}
    return {
        "search": {**tile, **logs, **places, "num_warps": warps},
        "weigh": {**tile, **places, "num_warps": warps},
        "finish": {**tile, **places, **head, "num_warps": 8},
        "count": {**tile, **places, "num_warps": warps},
        "settle": {**places, "BLOCK": _BLOCK, "num_warps": 8},
    }


def sample_reference(tables: SamplingTables, logits: torch.Tensor, asks: int) -> None:
    """The same answers, ask by ask, by sorting the whole row."""
    answers = np.zeros((asks, ANSWER_WORDS), dtype=np.int64)
    for ask, to in zip(tables.asks[:asks].cpu().numpy().view(ASK)[:, 0], answers.view(ANSWER)[:, 0], strict=True):
        if ask["row"] >= 0:
            _answer(to, ask, logits[int(ask["row"])].cpu())
    tables.answers[:asks] = torch.from_numpy(answers)


def _answer(to: np.void, ask: np.void, logits: torch.Tensor) -> None:
    order = logits.argsort(descending=True, stable=True)  # of equal ones the lower token is the first
    first = int(order[0])
    to["greedy"] = to["chosen"] = first
    to["finite"] = bool(logits[first].isfinite()) and not bool(logits.isnan().any())
    if not to["finite"]:
        return
    distance = logits - logits[first]
    if ask["token"] >= 0:
        to["chosen"] = ask["token"]
    elif ask["factor"] > 0:
        to["chosen"] = _drawn(ask, order, distance * torch.tensor(float(ask["factor"])))
    if ask["top"] < 0:
        return
    total = int(weights_of(distance).sum())
    to["log_sum"] = float(logits[first]) + math.log(total * 2.0**-kernels.UNIT_BITS)
    logprobs = (logits.double() - float(to["log_sum"])).float().numpy()
    to["logprob"] = logprobs[int(to["chosen"])]
    likeliest = order[: int(ask["top"])].numpy()
    to["likeliest"][: int(ask["top"])] = -1
    to["likeliest"][: len(likeliest)] = likeliest
    to["logprobs"][: int(ask["top"])] = -np.inf
    to["logprobs"][: len(likeliest)] = logprobs[likeliest]


def _drawn(ask: np.void, order: torch.Tensor, distance: torch.Tensor) -> int:
    weights, top_k, top_p = weights_of(distance), int(ask["top_k"]), float(ask["top_p"])
    kept = torch.where(distance >= torch.tensor(float(ask["cut"])), weights, 0)
    if not top_k and top_p >= 1.0:
        mass = kept.cumsum(0)
        order = torch.arange(len(mass))
        limit = int(mass[-1])
    else:
        mass = weights[order].cumsum(0)
        limit = int(mass[top_k - 1]) if top_k else int(mass[-1])
        if top_p < 1.0:
            needed = min(math.ceil(top_p * float(limit)), limit)
            limit = int(mass[int((mass < needed).sum())])
        limit = min(limit, int(kept.sum()))
    threshold = min(int(float(ask["uniform"]) * float(limit)), limit - 1)
    return int(order[int((mass <= threshold).sum())])


def weights_of(distance: torch.Tensor) -> torch.Tensor:
    """exp(distance) in whole numbers of 2^-44, distance [n] fp32 at most 0: the arithmetic of the kernels."""
    near = distance > kernels.FARTHEST
    a = torch.where(near, distance, kernels.FARTHEST)
    n = (a * 1.4426950408889634 + 0.5).floor()
    r = n * 2.12194440e-4 + (n * -0.693359375 + a)
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    for term in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + term
    p = (p * r) * r + r + 1.0
    return torch.where(near, torch.ldexp(p, n + kernels.UNIT_BITS).long(), 0)
