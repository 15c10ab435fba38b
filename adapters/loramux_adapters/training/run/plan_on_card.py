"""What a training step takes on a graphics processor whose base lies on the NF4 kernels; see `plan_memory`.

Between layers everything is fp32; what products read is kept in 16 bits (training/model/ops.py, `TrainingOps.kept`).
PyTorch's allocator keeps some memory beside what is counted here: between its blocks, and for cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from loramux_adapters.training.recipe import Recipe

MIB = 2**20
CONTEXT = 600 * MIB  # the driver's, the compiled kernels' and cuBLAS' own; an estimate (the server's serving/cards.py)
_PART = 64 * MIB  # what works on some rows at a time takes at most so much, or two of them
_FEWEST = 16  # rows of logits at once, whatever they take


@dataclass(frozen=True, slots=True)
class CardStep:
    """Bytes.

    Attributes:
        activations: kept from the forward pass for the backward pass; of one whole layer and of the others' inputs with
            gradient checkpointing.
        work: the largest of what lives for a moment.
    """

    activations: int
    work: int


def plan_step(
    skeleton: Any,
    recipe: Recipe,
    linears: dict[str, nn.Linear],
    adapted: set[str],
    *,
    rows: int,
    sequence: int,
    learned: int,
    attention: int,
) -> CardStep:
    """One part of a step: `rows` examples of `sequence` tokens that have nothing in common, `learned` of them to learn.

    Args:
        linears: by path, all but the output head.
        adapted: those of them with an adapter.
        attention: bytes of a number in it: 2, or 4 where the device computes in fp16.
    """
    config = skeleton.config.get_text_config()
    layers, hidden, tokens = config.num_hidden_layers, config.hidden_size, rows * sequence
    vocabulary = skeleton.get_input_embeddings().num_embeddings
    of_all = tokens * _token_bytes(skeleton, recipe, linears, adapted, attention) + _copies_of_b(
        recipe, linears, adapted
    )
    if recipe.gradient_checkpointing:
        kept = layers * tokens * hidden * 4 + of_all // layers
    else:
        kept = of_all
    # the last norm's input, the learned rows and their gradient, in fp32
    kept += 4 * hidden * (tokens + 3 * rows * learned)
    return CardStep(kept, max(_loss(rows * learned, vocabulary), _layer(linears, tokens, hidden)))


def _token_bytes(
    skeleton: Any, recipe: Recipe, linears: dict[str, nn.Linear], adapted: set[str], attention: int
) -> int:
    """Bytes that one token leaves behind in all layers.

    In 16 bits what each linear layer reads (once where several read the same), and in the MLP the gate and what it is
    multiplied with; in fp32 the input of each norm and x A^T; in the attention's dtype queries, results, and keys and
    values as often as queries read them; with dropout a byte for each input of each adapted layer.
    """
    config = skeleton.config.get_text_config()
    blocks: dict[str, list[nn.Linear]] = {}
    total = 0
    for path, module in linears.items():
        blocks.setdefault(path.rpartition(".")[0], []).append(module)
        if path in adapted:
            total += 4 * recipe.rank + (module.in_features if recipe.dropout else 0)
    for members in blocks.values():
        # the first ones read the block's input, the last one reads what they led to
        total += 2 * members[0].in_features + (2 * members[-1].in_features if len(members) > 1 else 0)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    norms = 0
    for module in skeleton.modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and weight is not None:
            norms += config.hidden_size if weight.numel() == config.hidden_size else width  # of each head
    norms -= config.hidden_size  # the last one's, which is counted apart
    layers = config.num_hidden_layers
    return int(total + 4 * norms + layers * (4 * attention * width + 4 * heads + 4 * config.intermediate_size))


def _copies_of_b(recipe: Recipe, linears: dict[str, nn.Linear], adapted: set[str]) -> int:
    """B with its factor, in fp32, of all layers."""
    return sum(4 * recipe.rank * linears[path].out_features for path in adapted)


def _loss(learned: int, vocabulary: int) -> int:
    """Some rows of logits, and two more of their size: for their sum, and rounded for the gradient."""
    at_once = min(learned, max(_FEWEST, _PART // (4 * vocabulary)))
    return 3 * 4 * at_once * vocabulary


def _layer(linears: dict[str, nn.Linear], tokens: int, hidden: int) -> int:
    """The backward pass of the largest MLP: three of its widest tensors and four of its narrowest in fp32, a weight in
    16 bits, and what is worked on some rows at a time.
    """
    widest = max(max(module.in_features, module.out_features) for module in linears.values())
    largest = max(module.weight.numel() for module in linears.values())
    rounded = min(_PART, 2 * tokens * (widest + hidden)) + min(_PART, 4 * tokens * widest)
    return int(4 * tokens * (3 * widest + 4 * hidden) + 2 * largest + rounded)
