"""The sizes of a decoder that the memory of its whole step follows from: of a model, or of its config alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from loramux_adapters.lora.lora_linear import PicksRows

if TYPE_CHECKING:
    from loramux_server.kernels.decoder.description import Description, Layer, Linear

# names of projections that read the same rows and are one product of a step; as decoder/description.py has them
_OUT, _DOWN = ("o_proj",), ("down_proj",)
_BACK = (_OUT, _DOWN)  # what leads back to the residual stream
_STACKS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",), ("gate_proj", "up_proj"), ("gate_up_proj",), *_BACK)


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The largest step.

    Attributes:
        rows: token rows.
        samples: of them, whose logits are wanted; and what may be asked of these.
        sequences: that they belong to.
        blocks: of one sequence.
        entries, ranks: adapters of one row, and their ranks together, each rounded up to 16.
        programs: of the kernels that share out what the tables list: a few for each multiprocessor.
    """

    rows: int
    samples: int
    sequences: int
    blocks: int
    entries: int
    ranks: int
    programs: int


@dataclass(frozen=True, slots=True, order=True)
class Product:
    """Linear layers that read the same rows, side by side.

    Attributes:
        targets: how many of them adapters can change.
        bias: one of them has a bias.
    """

    inputs: int
    outputs: int
    targets: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class DecoderForm:
    """What of a decoder decides how much a step works in.

    Attributes:
        products: of all layers, in any order.
        widest: outputs of the widest of those that read a layer's normed rows.
        inner: the most numbers of a row inside of an MLP.
        head: the output head; its outputs are the vocabulary.
        queries: numbers of a row's queries.
        pairs: of a head's numbers, that a table of angles turns.
        angle_tables: how many there are.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    products: tuple[Product, ...]
    widest: int
    inner: int
    head: Product
    pairs: int
    angle_tables: int

    @property
    def vocabulary(self) -> int:
        return self.head.outputs

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @classmethod
    def of(cls, description: Description) -> DecoderForm:
        """Of a model that is loaded."""
        layers = description.layers
        return cls(
            hidden=description.hidden,
            heads=description.heads,
            kv_heads=description.kv_heads,
            head_dim=description.head_dim,
            products=tuple(product for layer in layers for product in _products(layer)),
            widest=max(max(_outputs(each.q, each.k, each.v), _outputs(each.gate, each.up)) for each in layers),
            inner=max(each.linear("down").inputs for each in layers),
            head=_product([description.head]),
            pairs=description.pairs,
            angle_tables=len(description.angles),
        )

    @classmethod
    def of_skeleton(cls, model: Any) -> DecoderForm | None:
        """Of transformers' causal language model on the meta device, every linear layer of which adapters can change.

        None: it is not made of the parts that a whole step knows, and runs module by module.
        """
        body, head = getattr(model, getattr(model, "base_model_prefix", ""), None), model.get_output_embeddings()
        rotary = getattr(body, "rotary_emb", None)
        if not isinstance(head, nn.Linear) or not isinstance(rotary, nn.Module):
            return None
        if any(isinstance(module, PicksRows) for module in model.modules()):
            return None
        tables = [
            buffer for name, buffer in rotary.named_buffers() if name.endswith("inv_freq") and "original" not in name
        ]
        stacks = list(_stacks(model))
        products = [product for _, product in stacks]
        together = sum(isinstance(module, nn.Linear) for module in model.modules()) - 1
        if (
            not tables
            or {names for names, _ in stacks}.isdisjoint({_DOWN})
            or sum(product.targets for product in products) != together
        ):
            return None
        text = model.config.get_text_config()
        heads = int(text.num_attention_heads)
        return cls(
            hidden=head.in_features,
            heads=heads,
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            products=tuple(products),
            widest=max(product.outputs for names, product in stacks if names not in _BACK),
            inner=max(product.inputs for names, product in stacks if names == _DOWN),
            head=Product(head.in_features, head.out_features, 1, head.bias is not None),
            pairs=tables[0].numel(),
            angle_tables=len(tables),
        )


def _stacks(model: nn.Module) -> Iterator[tuple[tuple[str, ...], Product]]:
    """Names of layers, and the product that is made of them."""
    for module in model.modules():
        children = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        for names in _STACKS:
            if all(name in children for name in names):
                layers = [children[name] for name in names]
                has_bias = any(layer.bias is not None for layer in layers)
                outputs = sum(layer.out_features for layer in layers)
                yield names, Product(layers[0].in_features, outputs, len(layers), has_bias)


def _products(layer: Layer) -> Iterator[Product]:
    for group in ((layer.q, layer.k, layer.v), (layer.o,), (layer.gate, layer.up), (layer.down,)):
        yield _product([linear for linear in group if linear is not None])


def _outputs(*linears: Linear | None) -> int:
    return sum(linear.outputs for linear in linears if linear is not None)


def _product(linears: list[Linear]) -> Product:
    return Product(
        linears[0].inputs,
        sum(linear.outputs for linear in linears),
        sum(linear.arena is not None for linear in linears),
        any(linear.layer.bias is not None for linear in linears),
    )
