"""How much memory a whole step works in: exactly what `GpuDecoder` takes, of a decoder's sizes alone.

No device and no Triton is needed, so that memory can be shared out before any of it is taken, and planned on any
machine. tests/server/kernels/gpu/step/test_workspace.py compares it with what is taken.
"""

from __future__ import annotations

from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE
from loramux_server.kernels.gpu.attention_tables import AttentionSizes
from loramux_server.kernels.gpu.cuts import (
    ANSWER_WORDS,
    ASK_WORDS,
    LARGEST_VOCABULARY,
    ChangeSizes,
    SamplingSizes,
    scratch_numbers,
)
from loramux_server.kernels.gpu.lora_tables import LoraSizes
from loramux_server.kernels.gpu.step.form import DecoderForm, Product, StepSizes

PRODUCT_ROWS = 256  # rows of one product's launches: its scratch grows with them
WEIGHTS_AT_ONCE = 1 << 23  # that a reference of the check at start writes out
CHECKED_ROWS = 40  # of its trials
SPLIT_ROWS = 256  # up to so many rows, parts of a LoRA sum meet in scratch
_ACT, _FP32, _INT32 = 2, 4, 4  # bytes of a number
_SMALL = 1 << 20  # tables and caches of trials


def workspace_bytes(form: DecoderForm, sizes: StepSizes) -> int:
    """Bytes of all that a decoder of these sizes takes beside its weights, the cache and the adapters."""
    rows, samples = sizes.rows, sizes.samples
    attention = attention_sizes(form, sizes)
    lora, head_lora = lora_sizes(sizes)
    together = min(rows, PRODUCT_ROWS)
    all_products = [*form.products, form.head]
    sums = max(scratch_numbers(together, product.inputs, product.outputs) for product in all_products)
    deltas = max(_deltas(lora, form.products), _deltas(head_lora, all_products), 1)
    fp32 = (
        2 * rows * form.hidden  # the residual stream, and what is added to it
        + samples * form.hidden
        + samples * form.vocabulary  # the logits
        + max(sums, 1)
        + deltas
        + sum(a * b * c for a, b, c in attention.scratch(form.heads))
        + 2 * sizes.blocks * BLOCK_SIZE * form.pairs * form.angle_tables
    )
    wide = max(rows * form.widest, _changes(samples, form.vocabulary).rows * form.vocabulary * 2)
    act = wide + rows * (form.hidden + form.inner + 2 * form.queries) + samples * form.queries
    biases = sum(product.outputs for product in form.products if product.bias)
    tables = 2 * rows + samples + attention.numbers + lora.numbers + head_lora.numbers
    return _FP32 * fp32 + _ACT * (act + biases) + _INT32 * tables + _sampling(samples, form.vocabulary)


def check_bytes(form: DecoderForm) -> int:
    """Bytes that the check at start works in for a moment (check/), at most: a test holds it.

    A reference writes out WEIGHTS_AT_ONCE of a weight, in several forms; results and what is expected are there for
    CHECKED_ROWS rows and their parts.
    """
    widest = max(form.vocabulary, *(product.outputs for product in form.products))
    largest = max(product.inputs * product.outputs for product in [*form.products, form.head])
    return 32 * min(largest, WEIGHTS_AT_ONCE) + 48 * CHECKED_ROWS * widest + 16 * CHECKED_ROWS * form.inner + _SMALL


def attention_sizes(form: DecoderForm, sizes: StepSizes) -> AttentionSizes:
    return AttentionSizes(
        rows=sizes.rows,
        sequences=sizes.sequences,
        blocks=sizes.blocks,
        group=form.heads // form.kv_heads,
        head_dim=form.head_dim,
    )


def lora_sizes(sizes: StepSizes) -> tuple[LoraSizes, LoraSizes]:
    """Of all rows, and of the sampled ones."""
    of_rows, of_samples = (
        LoraSizes(rows=rows, runs=sizes.sequences, entries=sizes.entries, ranks=sizes.ranks)
        for rows in (sizes.rows, sizes.samples)
    )
    return of_rows, of_samples


def _deltas(sizes: LoraSizes, products: list[Product] | tuple[Product, ...]) -> int:
    return max(
        (
            sizes.scratch(product.inputs, product.targets, is_split=sizes.rows <= SPLIT_ROWS)
            for product in products
            if product.targets
        ),
        default=0,
    )


def _sampling(samples: int, vocabulary: int) -> int:
    """Bytes of what is asked of logits, of what answers it and of what changes them, if the device does."""
    asks = 8 * samples * ASK_WORDS
    if vocabulary > LARGEST_VOCABULARY:
        return asks
    scratch = sum(count * dtype.itemsize for count, dtype in SamplingSizes(samples, vocabulary).scratch().values())
    changes = _changes(samples, vocabulary)
    answers = 8 * (samples + changes.rows) * ANSWER_WORDS
    return asks + answers + scratch + _INT32 * changes.numbers


def _changes(samples: int, vocabulary: int) -> ChangeSizes:
    return ChangeSizes.of(0 if vocabulary > LARGEST_VOCABULARY else samples, vocabulary)
