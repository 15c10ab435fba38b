"""What a training will take of memory, from the base's config alone: no weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from loramux_adapters.device.device import ON_CARD, DeviceLayout
from loramux_adapters.nf4 import BLOCK
from loramux_adapters.training.model.lora_layers import target_names
from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run.plan_on_card import CONTEXT, plan_step

SCALE_BLOCK = 256  # scales that share one scale of their own
_TABLES = 4 * (16 + 256)  # the values of NF4 codes and of scale codes, kept beside each layer
_OFFSET = 4
_HEAD_TILE = 32  # tokens; compiled kernels have a vocabulary padded to whole ones
_SMALL = 4096  # bitsandbytes' 8-bit AdamW keeps tensors smaller than this in fp32
_MOMENT_BLOCK = 256  # values of an 8-bit moment that share one fp32 scale
_KEPT_KEYS = 256  # attention weights over up to so many keys are kept for the backward pass
FULL_BYTES = 16  # bf16 weight and gradient, fp32 master weight and two fp32 moments (Rajbhandari et al. 2020)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of each part, and what follows from them.

    Attributes:
        base: the weights as they are held: NF4 codes, scales and tables, and what stays in 16 bit.
        adapter: A and B in fp32.
        gradients: of A and B.
        optimizer: AdamW's moments: fp32 on the CPU, 8 bit on CUDA.
        context: what a graphics processor's libraries take for themselves.
        activations: what the forward pass keeps for the backward pass.
        work: the largest of what lives for a moment: logits and their gradients, or a layer's unpacked weight.
        saved: the adapter on disk.
        parameters, trainable: counts of weights.
        full: the textbook figure for training every weight with Adam in mixed precision, without activations.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    work: int
    context: int
    saved: int
    parameters: int
    trainable: int
    full: int

    @property
    def total(self) -> int:
        """Everything that is there at the same time at the worst moment."""
        step = self.adapter + self.gradients + self.optimizer + self.activations + self.work
        return self.base + step + self.context


def plan_memory(
    skeleton: Any, recipe: Recipe, *, sequence: int, learned: int, layout: DeviceLayout, fp16: bool = False
) -> MemoryPlan:
    """The plan of one recipe. `quantize` nf4 is QLoRA, none is LoRA.

    QLoRA on a graphics processor is planned for the NF4 kernels (plan_on_card.py). What runs on bitsandbytes' layers
    instead takes a tenth less for the base and more for the attention of long examples.

    Args:
        skeleton: transformers' causal language model, made from the config on the meta device.
        sequence: tokens of each example. What examples share at their beginning is computed once and makes it cheaper.
        learned: tokens of each example that a loss is taken on; logits are computed for these alone.
        layout: of the device it is to run on.
        fp16: the device computes in fp16, and not in bf16.
    Raises:
        RecipeError: the recipe names layers that the base does not have.
    """
    shapes = _adapter_shapes(skeleton, recipe)
    trainable = sum(rows * columns for rows, columns in shapes)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    rows = -(-recipe.batch_size // recipe.accumulation)
    if recipe.quantize == "nf4" and not layout.packed:
        step = plan_step(
            skeleton,
            recipe,
            dict(_linears(skeleton)),
            _adapted(skeleton, recipe),
            rows=rows,
            sequence=sequence,
            learned=learned,
            attention=4 if fp16 else 2,
        )
        activations, work = step.activations, step.work
    else:
        activations = _activations(skeleton, recipe, rows, sequence, width=layout.activation_bytes)
        activations += rows * learned * _vocabulary(skeleton) * 4
        work = _work(skeleton, recipe, rows, sequence, learned)
    return MemoryPlan(
        base=base_bytes(skeleton, recipe.quantize, layout),
        adapter=4 * trainable,
        gradients=4 * trainable,
        optimizer=sum(_optimizer_bytes(rows * columns, layout) for rows, columns in shapes),
        activations=activations,
        work=work,
        context=0 if layout.packed else CONTEXT,
        saved=trainable * (2 if recipe.save_dtype == "bfloat16" else 4),
        parameters=parameters,
        trainable=trainable,
        full=FULL_BYTES * parameters,
    )


def base_bytes(skeleton: Any, quantize: str, layout: DeviceLayout) -> int:
    """Bytes of the base as it is held; every linear layer but the head is quantized.

    Scales are fp32, as our kernels read them. On the CPU the head is kept as whole numbers of 12 bits, which an
    embedding of the same weight reads too.
    """
    total = 0
    quantized = {id(module.weight): module for _, module in _linears(skeleton)} if quantize == "nf4" else {}
    head = skeleton.get_output_embeddings()
    packed_head = head.weight if quantized and layout.packed and _head_fits(head) else None
    for parameter in skeleton.parameters():  # tied ones come once
        if parameter is packed_head:
            total += _packed_head_bytes(head)
        else:
            layer = quantized.get(id(parameter))
            total += 2 * parameter.numel() if layer is None else _nf4_bytes(layer, layout)
    return int(total + sum(buffer.numel() * buffer.element_size() for buffer in skeleton.buffers()))


def kv_bytes(config: Any, layout: DeviceLayout) -> int:
    """Bytes that one token takes in the server's cache: 16 bits a number, and on the CPU 32 a head for its scale."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * text.num_hidden_layers * kv_heads * (2 * dim + (4 if layout.packed else 0)))


def _nf4_bytes(layer: nn.Linear, layout: DeviceLayout) -> int:
    weights = layer.weight.numel()
    scales = -(-weights // BLOCK)
    if layout.packed or layer.in_features % BLOCK == 0:
        return -(-weights // 2) + 4 * scales
    return -(-weights // 2) + scales + 4 * -(-scales // SCALE_BLOCK) + _OFFSET + _TABLES  # bitsandbytes' form


def _head_fits(head: Any) -> bool:
    return head is not None and head.bias is None and head.in_features % BLOCK == 0


def _packed_head_bytes(head: Any) -> int:
    weights = -(-head.out_features // _HEAD_TILE) * _HEAD_TILE * head.in_features
    return int(weights * 3 // 2 + 4 * weights // BLOCK)


def _optimizer_bytes(weights: int, layout: DeviceLayout) -> int:
    if not layout.moments_8_bit:
        return 2 * 4 * weights + 4  # and the count of steps
    if weights < _SMALL:
        return 2 * 4 * weights
    return 2 * (weights + 4 * -(-weights // _MOMENT_BLOCK))


def _linears(skeleton: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Every linear layer but the output head."""
    head = skeleton.get_output_embeddings()
    for path, module in skeleton.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield path, module


def _adapted(skeleton: Any, recipe: Recipe) -> set[str]:
    """Paths of the layers that get an adapter."""
    names = set(target_names(skeleton, recipe))
    return {path for path, _ in _linears(skeleton) if path.rpartition(".")[2] in names}


def _adapter_shapes(skeleton: Any, recipe: Recipe) -> list[tuple[int, int]]:
    adapted, shapes = _adapted(skeleton, recipe), []
    for path, module in _linears(skeleton):
        if path in adapted:
            shapes += [(recipe.rank, module.in_features), (module.out_features, recipe.rank)]
    return shapes


def _activations(skeleton: Any, recipe: Recipe, rows: int, sequence: int, *, width: int) -> int:
    """Bytes kept between forward and backward, but for the head; see `_token_bytes` for what they are."""
    config = skeleton.config.get_text_config()
    layers, tokens = config.num_hidden_layers, rows * sequence
    of_all_layers = tokens * _token_bytes(skeleton, recipe, width) + 2 * sum(
        r * c for r, c in _adapter_shapes(skeleton, recipe)
    )
    if sequence <= _KEPT_KEYS:
        of_all_layers += layers * rows * config.num_attention_heads * sequence**2 * width
    if recipe.gradient_checkpointing:
        return int(layers * tokens * config.hidden_size * width + of_all_layers // layers)
    return int(of_all_layers)


def _token_bytes(skeleton: Any, recipe: Recipe, width: int) -> int:
    """Bytes that one token leaves behind in all layers, a number of the base's dtype being so wide: 4 on a CPU.

    In that dtype the input of each linear layer (once where several share it), x A^T, queries, keys and values, and in
    the MLP the gate before and after its activation and what it is multiplied with; in fp32 the input of each norm;
    with dropout a byte for each input element of each adapted layer.
    """
    config = skeleton.config.get_text_config()
    names = set(target_names(skeleton, recipe))
    blocks: dict[str, list[nn.Linear]] = {}
    total = 0
    for path, module in _linears(skeleton):
        parent, _, name = path.rpartition(".")
        blocks.setdefault(parent, []).append(module)
        if name in names:
            total += width * recipe.rank + (module.in_features if recipe.dropout else 0)
    for members in blocks.values():
        # the first ones read the block's input, the last one reads what they led to
        total += width * members[0].in_features + (width * members[-1].in_features if len(members) > 1 else 0)
    total += kv_bytes(skeleton.config, ON_CARD) * width // 2
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    norms = sum("norm" in type(module).__name__.lower() for module in skeleton.modules()) - 1
    return int(
        total
        + config.num_hidden_layers * width * (heads * dim + 3 * config.intermediate_size)
        + 4 * norms * config.hidden_size
    )


def _work(skeleton: Any, recipe: Recipe, rows: int, sequence: int, learned: int) -> int:
    """The larger of two moments.

    The loss: logits in bf16 and fp32, and the gradients of both. The backward pass of the largest layer: its weight,
    unpacked, and the gradients of its input and output.
    """
    largest = max(module.weight.numel() for _, module in _linears(skeleton))
    widest = max(module.in_features + module.out_features for _, module in _linears(skeleton))
    loss = rows * learned * _vocabulary(skeleton) * (2 + 4 + 4 + 2)
    layer = rows * sequence * widest * 2 + (2 * largest if recipe.quantize == "nf4" else 0)
    return int(max(loss, layer))


def _vocabulary(skeleton: Any) -> int:
    return int(skeleton.get_input_embeddings().num_embeddings)
