"""The five kernels of sampling.py, which says what they compute.

Each is started for all asks, and leaves those at once that have no part in it.

    search     a tile of a row: its first largest, whether it holds NaN, its KEEP first tokens where an ask needs them
    weigh      a tile of a row: what its tokens weigh together
    finish     an ask: the greedy token, log sum and likeliest tokens; the draw, where it lies among what search kept
    count      a tile of a row: by intervals of the distance to the largest, what tokens weigh and how many there are
    settle     an ask: the draw, by up to three searches of the row, each in the interval where its threshold lies

The last two do something only where a draw has many candidates. What search kept holds at least the KEEP first tokens
of a row, and about 1,000 of a large vocabulary, since a tile's tokens are spread over the row.

Weights are whole numbers, so sums of them are exact in any order: tiles, intervals and prefixes of an order fit
together, and sums by atomics are the same each time. For that a token must weigh the same in each kernel: a product
that is added to something is fused by name, and not as the compiler likes. No kernel reads what it wrote itself, but
for the list in settle, which has barriers: threads do not see each other's writes without.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loramux_server.kernels.decoder.asks import MOST_LIKELY
from loramux_server.kernels.gpu.cuts import BINS, KEEP, LISTED

FARTHEST = -30.0  # what is less likely than exp(-30) beside the largest has no weight
UNIT_BITS = 44  # a weight is in units of 2^-44: the largest token's; 2^18 of them fit into 63 bits
CHUNK = 64  # tokens side by side that search gives to one tile
ASK, ANSWER = 10, 46  # numbers of 32 bits of one

_FARTHEST = tl.constexpr(FARTHEST)
_UNIT_BITS = tl.constexpr(UNIT_BITS)
_UNIT = tl.constexpr(2.0**-UNIT_BITS)
_CHUNK = tl.constexpr(CHUNK)
_KEEP = tl.constexpr(KEEP)
_LOG_KEEP = tl.constexpr(KEEP.bit_length() - 1)
_BINS = tl.constexpr(BINS)
_BINS_OF_ONE = tl.constexpr(BINS / FARTHEST)
_LISTED = tl.constexpr(LISTED)
_MOST = tl.constexpr(MOST_LIKELY)
_ASK = tl.constexpr(ASK)
_ANSWER = tl.constexpr(ANSWER)
_NONE = tl.constexpr(-(1 << 63))  # a key below those of all tokens
_ENDLESS = tl.constexpr((1 << 63) - 1)
_LAST = tl.constexpr(0x7FFFFFFF)


# --- the order of tokens: the larger logit first, of equal ones the lower token


@triton.jit
def _order_of(x):
    """int32 in the order of x; both zeros are one."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -(1 << 31), 0, bits)
    return bits ^ ((bits >> 31) & _LAST)


@triton.jit
def _logit_of(order):
    return (order ^ ((order >> 31) & _LAST)).to(tl.float32, bitcast=True)


@triton.jit
def _key_of(x, token):
    """int64 in the order of tokens."""
    return (_order_of(x).to(tl.int64) << 32) | (token ^ _LAST).to(tl.int64)


@triton.jit
def _token_of(key):
    return (key & _LAST).to(tl.int32) ^ _LAST


@triton.jit
def _logit_of_key(key):
    return _logit_of((key >> 32).to(tl.int32))


@triton.jit
def _merged(h, FLIPPED: tl.constexpr, STAGE: tl.constexpr, DIMS: tl.constexpr):
    """STAGE rounds of compare and exchange in a hypercube h [2] * DIMS.

    Its runs become sorted downwards where bit FLIPPED of their place is set, all of them where there is no such bit.
    """
    if FLIPPED < DIMS:
        down = tl.reshape(tl.arange(0, 2), [1] * (DIMS - FLIPPED - 1) + [2] + [1] * FLIPPED)
    else:
        down = tl.full([1] * DIMS, 1, tl.int32)
    for i in tl.static_range(STAGE):
        other = tl.sum(h, DIMS - STAGE + i, keep_dims=True) - h
        right = tl.reshape(tl.arange(0, 2), [1] * (DIMS - STAGE + i) + [2] + [1] * (STAGE - 1 - i))
        h = tl.where((h > other) != (down ^ right).to(tl.int1), other, h)
    return h


@triton.jit
def _first(x, LOG: tl.constexpr, LOG_WANTED: tl.constexpr):
    """The first 2^LOG_WANTED of x [2^LOG] int64, the largest first.

    A bitonic top-k (https://www.doc.ic.ac.uk/~hlgr/pdfs/MassivelyParallelTopK.pdf), as `tl.topk` has it, but partners
    are found by a sum instead of an exclusive or: the interpreter goes through the latter number by number.
    """
    h = tl.reshape(x, [2] * LOG)
    for i in tl.static_range(1, LOG_WANTED + 1):
        h = _merged(h, i, i, LOG)
    for i in tl.static_range(LOG_WANTED + 1, LOG + 1):
        h = _merged(tl.max(h, LOG - i), LOG_WANTED, LOG_WANTED, LOG + LOG_WANTED - i)
    return tl.reshape(h, [2**LOG_WANTED])


# --- what tokens weigh


@triton.jit
def _weight_of(a):
    """exp(a) in whole units; a <= 0. What is not above FARTHEST, or not a number, weighs nothing."""
    near = a > _FARTHEST
    a = tl.where(near, a, _FARTHEST)
    n = tl.floor(tl.fma(a, 1.4426950408889634, 0.5))
    r = tl.fma(n, -0.693359375, a)
    r = tl.fma(n, 2.12194440e-4, r)
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    p = tl.fma(p * r, r, r) + 1.0
    power = ((n.to(tl.int32) + (127 + _UNIT_BITS)) << 23).to(tl.float32, bitcast=True)
    return tl.where(near, (p * power).to(tl.int64), 0)


@triton.jit
def _interval_of(a):
    """Of the distance of a token above FARTHEST to the largest; 0 is the nearest."""
    a = tl.where(a > _FARTHEST, a, 0.0)
    return tl.minimum((a * _BINS_OF_ONE).to(tl.int32), _BINS - 1)


@triton.jit
def _up(x):
    """The least whole number that is not below x, fp64 >= 0."""
    whole = x.to(tl.int64)
    return whole + (whole.to(tl.float64) < x).to(tl.int64)


# --- what an ask says


@triton.jit
def _row_of(ints, ask):
    return tl.load(ints + ask * _ASK + 6)


@triton.jit
def _most_of(tops, ask, tiles, TILES: tl.constexpr):
    t = tl.arange(0, TILES)
    return tl.max(tl.load(tops + ask * TILES + t, mask=t < tiles, other=_NONE), 0)


@triton.jit
def _is_drawn(ints, floats, ask):
    return (tl.load(ints + ask * _ASK + 8) < 0) & (tl.load(floats + ask * _ASK + 4) > 0)


@triton.jit
def _top_k_of(ints, ask, vocabulary):
    """0 where it leaves nothing out."""
    k = tl.load(ints + ask * _ASK + 7)
    return tl.where(k < vocabulary, k, 0)


@triton.jit
def _is_filtered(ints, floats, doubles, ask, vocabulary):
    few = (_top_k_of(ints, ask, vocabulary) > 0) | (tl.load(doubles + ask * (_ASK // 2) + 1) < 1)
    return few & _is_drawn(ints, floats, ask)


@triton.jit
def tell(answer_ints, answer_floats, ask, numbers, chosen, told, log_sum):
    """The chosen token, and its log probability where it is asked for."""
    tl.store(answer_ints + ask * _ANSWER + 2, chosen)
    if told:
        logprob = tl.load(numbers + chosen).to(tl.float64) - log_sum
        tl.store(answer_floats + ask * _ANSWER + 3, logprob.to(tl.float32))


# --- the kernels


@triton.jit
def search(
    ints, floats, doubles, logits, tops, sick, keys, vocabulary, stride, tiles, TILE: tl.constexpr,
    LOG_TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    ask, tile = tl.program_id(0), tl.program_id(1)
    row = _row_of(ints, ask)
    if row < 0:
        return
    i = tl.arange(0, TILE)
    token = (i // _CHUNK * tiles + tile) * _CHUNK + i % _CHUNK
    x = tl.load(logits + row.to(tl.int64) * stride + token, mask=token < vocabulary, other=0)
    key = tl.where(token < vocabulary, _key_of(x, token), _NONE)
    tl.store(tops + ask * TILES + tile, tl.max(key, 0))
    tl.store(sick + ask * TILES + tile, tl.max((x != x).to(tl.int32), 0))
    if (tl.load(ints + ask * _ASK + 9) > 0) | _is_filtered(ints, floats, doubles, ask, vocabulary):
        first = _first(key, LOG_TILE, _LOG_KEEP)
        tl.store(keys + (ask * TILES + tile) * _KEEP + tl.arange(0, _KEEP), first)


@triton.jit
def weigh(
    ints, floats, logits, tops, masses, vocabulary, stride, tiles, TILE: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Of tokens side by side: masses [3]: by temperature, those of them that min-p keeps, and as the model has it."""
    ask, tile = tl.program_id(0), tl.program_id(1)
    row = _row_of(ints, ask)
    if row < 0:
        return
    drawn, told = _is_drawn(ints, floats, ask), tl.load(ints + ask * _ASK + 9) >= 0
    if drawn | told:
        most = _logit_of_key(_most_of(tops, ask, tiles, TILES))
        token = tile * TILE + tl.arange(0, TILE)
        inside = token < vocabulary
        x = tl.load(logits + row.to(tl.int64) * stride + token, mask=inside, other=-float("inf")) - most
        its = masses + ask * 3 * TILES + tile
        if drawn:
            a = x * tl.load(floats + ask * _ASK + 4)
            weight = _weight_of(a)
            tl.store(its, tl.sum(weight, 0))
            tl.store(its + TILES, tl.sum(tl.where(a >= tl.load(floats + ask * _ASK + 5), weight, 0), 0))
        if told:
            tl.store(its + 2 * TILES, tl.sum(_weight_of(x), 0))


@triton.jit
def finish(
    ints, floats, doubles, answer_ints, answer_floats, answer_doubles, logits, tops, sick, keys, masses, states,
    counts, vocabulary, stride, tiles, TILE: tl.constexpr, TILES: tl.constexpr, LOG_HEAD: tl.constexpr,
):  # fmt: skip
    ask = tl.program_id(0)
    tl.store(states + ask, 0)
    row = _row_of(ints, ask)
    if row < 0:
        return
    numbers = logits + row.to(tl.int64) * stride
    t = tl.arange(0, TILES)
    best = _most_of(tops, ask, tiles, TILES)
    most = _logit_of_key(best)
    nan = tl.max(tl.load(sick + ask * TILES + t, mask=t < tiles, other=0), 0) > 0
    finite = ((most.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000) & (nan == 0)
    chosen = tl.minimum(_token_of(best), vocabulary - 1)
    tl.store(answer_ints + ask * _ANSWER, chosen)
    tl.store(answer_ints + ask * _ANSWER + 1, finite.to(tl.int32))
    tl.store(answer_ints + ask * _ANSWER + 2, chosen)
    if finite == 0:
        return
    its = masses + ask * 3 * TILES + t
    top = tl.load(ints + ask * _ASK + 9)
    told = top >= 0
    log_sum = most.to(tl.float64)
    if told:
        total = tl.sum(tl.load(its + 2 * TILES, mask=t < tiles, other=0), 0)
        log_sum += tl.log(total.to(tl.float64) * _UNIT)
        tl.store(answer_doubles + ask * (_ANSWER // 2) + 2, log_sum)
    forced = tl.load(ints + ask * _ASK + 8)
    chosen = tl.where(forced >= 0, forced, chosen)
    drawn, filtered = _is_drawn(ints, floats, ask), _is_filtered(ints, floats, doubles, ask, vocabulary)
    factor, cut = tl.load(floats + ask * _ASK + 4), tl.load(floats + ask * _ASK + 5)
    uniform = tl.load(doubles + ask * (_ASK // 2))
    if (top > 0) | filtered:
        i = tl.arange(0, 1 << LOG_HEAD)
        kept = tl.load(keys + ask * TILES * _KEEP + i, mask=i < tiles * _KEEP, other=_NONE)
        last = tl.load(keys + (ask * TILES + t) * _KEEP + _KEEP - 1, mask=t < tiles, other=_NONE)
        head = _first(kept, LOG_HEAD, LOG_HEAD)
        # what a tile left out is below the last that it kept
        certain = (head >= tl.max(last, 0)) & (head > _NONE)
        x = tl.where(certain, _logit_of_key(head), -float("inf"))
        if top > 0:
            at = ask * _ANSWER + 6 + i
            tl.store(answer_ints + at, tl.where(certain, _token_of(head), -1), mask=i < tl.minimum(top, _MOST))
            logprob = (x.to(tl.float64) - log_sum).to(tl.float32)
            tl.store(answer_floats + at + _MOST, logprob, mask=i < tl.minimum(top, _MOST))
        if filtered:
            sure = tl.sum(certain.to(tl.int32), 0)
            a = (x - most) * factor
            weight = _weight_of(a)
            mass = tl.cumsum(weight, 0)
            ended = (sure == vocabulary) | (tl.sum((a > _FARTHEST).to(tl.int32), 0) < sure)
            k = _top_k_of(ints, ask, vocabulary)
            enough = ended | (k <= sure)
            limit = tl.sum(tl.load(its, mask=t < tiles, other=0), 0)
            if k > 0:
                limit = tl.sum(tl.where(i < k, weight, 0), 0)
            top_p = tl.load(doubles + ask * (_ASK // 2) + 1)
            if top_p < 1:
                needed = tl.minimum(_up(top_p * limit.to(tl.float64)), limit)
                enough = enough & (ended | (tl.sum(weight, 0) >= needed))
                limit = tl.min(tl.where(certain & (mass >= needed), mass, _ENDLESS), 0)
            limit = tl.minimum(limit, tl.sum(tl.load(its + TILES, mask=t < tiles, other=0), 0))
            threshold = tl.minimum((uniform * limit.to(tl.float64)).to(tl.int64), limit - 1)
            passed = tl.sum((mass <= threshold).to(tl.int32), 0)
            if enough:
                chosen = _token_of(tl.max(tl.where(i == passed, head, _NONE), 0))
            else:
                tl.store(states + ask, 1)
                b = tl.arange(0, _BINS)
                tl.store(counts + ask * 2 * _BINS + b, tl.zeros((_BINS,), tl.int64))
                tl.store(counts + (ask * 2 + 1) * _BINS + b, tl.zeros((_BINS,), tl.int64))
    if drawn & (filtered == 0):
        mass = tl.load(its + TILES, mask=t < tiles, other=0)
        limit, until = tl.sum(mass, 0), tl.cumsum(mass, 0)
        threshold = tl.minimum((uniform * limit.to(tl.float64)).to(tl.int64), limit - 1)
        tile = tl.sum((until <= threshold).to(tl.int32), 0)
        token = tile * TILE + tl.arange(0, TILE)
        x = tl.load(numbers + token, mask=token < vocabulary, other=-float("inf"))
        a = (x - most) * factor
        until = tl.cumsum(tl.where(a >= cut, _weight_of(a), 0), 0) + tl.sum(tl.where(t < tile, mass, 0), 0)
        chosen = tl.minimum(tile * TILE + tl.sum((until <= threshold).to(tl.int32), 0), vocabulary - 1)
    tell(answer_ints, answer_floats, ask, numbers, tl.minimum(chosen, vocabulary - 1), told, log_sum)


@triton.jit
def count(
    ints, floats, logits, tops, states, counts, vocabulary, stride, tiles, TILE: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """counts [2, BINS]: what the tokens of an interval weigh, and how many there are."""
    ask, tile = tl.program_id(0), tl.program_id(1)
    if tl.load(states + ask) == 0:
        return
    row = _row_of(ints, ask)
    token = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits + row.to(tl.int64) * stride + token, mask=token < vocabulary, other=-float("inf"))
    a = (x - _logit_of_key(_most_of(tops, ask, tiles, TILES))) * tl.load(floats + ask * _ASK + 4)
    near = a > _FARTHEST
    its = counts + ask * 2 * _BINS + _interval_of(a)
    tl.atomic_add(its, _weight_of(a), mask=near, sem="relaxed")
    tl.atomic_add(its + _BINS, tl.full((TILE,), 1, tl.int64), mask=near, sem="relaxed")


@triton.jit
def _part(numbers, listed, place, size, whole, most, factor, interval, BLOCK: tl.constexpr):
    """Tokens [BLOCK] from `place` on, of an interval's list or of the whole row.

    Gives the tokens, whether they lie in the interval, their orders, their distances.
    """
    i = place + tl.arange(0, BLOCK)
    token = i
    if whole == 0:
        token = tl.load(listed + i, mask=i < size, other=0)
    x = tl.load(numbers + token, mask=i < size, other=-float("inf"))
    a = (x - most) * factor
    return token, (a > _FARTHEST) & (_interval_of(a) == interval), _order_of(x), a


@triton.jit
def _from(numbers, listed, size, whole, most, factor, interval, order, BLOCK: tl.constexpr):
    """What the tokens of an interval weigh that are not below this order, and how many there are."""
    mass, number = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    for place in range(0, size, BLOCK):
        _, its, orders, a = _part(numbers, listed, place, size, whole, most, factor, interval, BLOCK)
        its = its & (orders.to(tl.int64) >= order)
        mass += tl.sum(tl.where(its, _weight_of(a), 0), 0)
        number += tl.sum(its.to(tl.int64), 0)
    return mass, number


@triton.jit
def _reach(numbers, listed, counts, vocabulary, most, factor, by_number, wanted, BLOCK: tl.constexpr):
    """Where the first tokens of a row reach `wanted`, by their number or by what they weigh together.

    Gives the order of the token that does, what those before it and its equals weigh, how many they are, what it
    weighs, and where its equals are found (interval, size, whether that is the whole row).
    """
    b = tl.arange(0, _BINS)
    weights, numbers_of = tl.load(counts + b), tl.load(counts + _BINS + b)
    reached = tl.cumsum(tl.where(by_number, numbers_of, weights), 0)
    interval = tl.minimum(tl.sum((reached < wanted).to(tl.int32), 0), _BINS - 1)
    mass, number = tl.sum(tl.where(b < interval, weights, 0), 0), tl.sum(tl.where(b < interval, numbers_of, 0), 0)
    size = tl.full((), 0, tl.int32)
    low, high = tl.full((), _LAST, tl.int64), tl.full((), -(1 << 31), tl.int64)
    for place in range(0, vocabulary, BLOCK):
        token, its, orders, _ = _part(numbers, listed, place, vocabulary, True, most, factor, interval, BLOCK)
        at = size + tl.cumsum(its.to(tl.int64), 0).to(tl.int32) - 1
        tl.store(listed + at, token, mask=its & (at < _LISTED))
        size += tl.sum(its.to(tl.int32), 0)
        low = tl.minimum(low, tl.min(tl.where(its, orders, _LAST), 0).to(tl.int64))
        high = tl.maximum(high, tl.max(tl.where(its, orders, -(1 << 31)), 0).to(tl.int64))
    tl.debug_barrier()  # what some threads listed, others read
    whole = size > _LISTED
    size = tl.where(whole, vocabulary, size)
    while low < high:
        middle = (low + high + 1) >> 1
        more_mass, more = _from(numbers, listed, size, whole, most, factor, interval, middle, BLOCK)
        if tl.where(by_number, number + more, mass + more_mass) >= wanted:
            low = middle
        else:
            high = middle - 1
    more_mass, more = _from(numbers, listed, size, whole, most, factor, interval, low + 1, BLOCK)
    weight = _weight_of((_logit_of(low.to(tl.int32)) - most) * factor)
    return low.to(tl.int32), mass + more_mass, number + more, weight, interval, size, whole


@triton.jit
def settle(
    ints, floats, doubles, answer_ints, answer_floats, answer_doubles, logits, tops, masses, states, counts, lists,
    vocabulary, stride, tiles, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ask = tl.program_id(0)
    if tl.load(states + ask) == 0:
        return
    row = _row_of(ints, ask)
    numbers, counts, listed = logits + row.to(tl.int64) * stride, counts + ask * 2 * _BINS, lists + ask * _LISTED
    t = tl.arange(0, TILES)
    sums = masses + ask * 3 * TILES + t
    most, factor = _logit_of_key(_most_of(tops, ask, tiles, TILES)), tl.load(floats + ask * _ASK + 4)
    limit = tl.sum(tl.load(sums, mask=t < tiles, other=0), 0)
    k = _top_k_of(ints, ask, vocabulary).to(tl.int64)
    b = tl.arange(0, _BINS)
    if (k > 0) & (k < tl.sum(tl.load(counts + _BINS + b), 0)):
        _, mass, number, weight, _, _, _ = _reach(numbers, listed, counts, vocabulary, most, factor, True, k, BLOCK)
        limit = mass + (k - number) * weight
        tl.debug_barrier()  # the list is written again
    top_p = tl.load(doubles + ask * (_ASK // 2) + 1)
    if top_p < 1:
        needed = tl.maximum(tl.minimum(_up(top_p * limit.to(tl.float64)), limit), 1)
        _, mass, _, weight, _, _, _ = _reach(numbers, listed, counts, vocabulary, most, factor, False, needed, BLOCK)
        limit = mass + (needed - mass + weight - 1) // weight * weight
        tl.debug_barrier()
    limit = tl.minimum(limit, tl.sum(tl.load(sums + TILES, mask=t < tiles, other=0), 0))
    uniform = tl.load(doubles + ask * (_ASK // 2))
    threshold = tl.minimum((uniform * limit.to(tl.float64)).to(tl.int64), limit - 1)
    order, mass, _, weight, interval, size, whole = _reach(
        numbers, listed, counts, vocabulary, most, factor, False, threshold + 1, BLOCK
    )
    rank = (threshold - mass) // weight  # among its equals, which stand in the order of their numbers
    chosen, passed = tl.full((), 0, tl.int32), tl.full((), 0, tl.int64)
    for place in range(0, size, BLOCK):
        token, its, orders, a = _part(numbers, listed, place, size, whole, most, factor, interval, BLOCK)
        equal = its & (orders == order)
        at = passed + tl.cumsum(equal.to(tl.int64), 0) - 1
        chosen += tl.sum(tl.where(equal & (at == rank), token, 0), 0)
        passed += tl.sum(equal.to(tl.int64), 0)
    told = tl.load(ints + ask * _ASK + 9) >= 0
    log_sum = tl.load(answer_doubles + ask * (_ANSWER // 2) + 2)
    tell(answer_ints, answer_floats, ask, numbers, chosen, told, log_sum)
