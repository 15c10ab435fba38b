"""The operations that a whole step is made of, each by a kernel or by PyTorch's own operations.

A kernel that turns out to be wrong on somebody's card, or that does not compile for it, is replaced alone (check/).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from loramux_server.kernels.gpu import rows
from loramux_server.kernels.gpu.attention import attend
from loramux_server.kernels.gpu.changes import adopt, change
from loramux_server.kernels.gpu.dense import dense_product
from loramux_server.kernels.gpu.lora import add_lora
from loramux_server.kernels.gpu.nf4 import nf4_product
from loramux_server.kernels.gpu.rotary import rotate_and_write
from loramux_server.kernels.gpu.sampling import sample
from loramux_server.kernels.gpu.step import plain, plain_sampling

Operation = Callable[..., None]

# What a graph cannot hold: the host reads the step's tables to know what to start.
_READ_BY_THE_HOST: tuple[Operation, ...] = (plain.add_lora, plain.attend)


@dataclass(frozen=True, slots=True)
class Operations:
    """Each has the signature and the semantics of the kernel's function of its name. The defaults are the kernels."""

    resolve_tokens: Operation = rows.resolve_tokens
    embed: Operation = rows.embed
    own_embeddings: Operation = rows.own_embeddings
    add_norm: Operation = rows.add_norm
    nf4_product: Operation = nf4_product
    dense_product: Operation = dense_product
    add_lora: Operation = add_lora
    rotate_and_write: Operation = rotate_and_write
    attend: Operation = attend
    gather_rows: Operation = rows.gather_rows
    gate: Operation = rows.gate
    own_logits: Operation = rows.own_logits
    finish_logits: Operation = rows.finish_logits
    sample: Operation = sample
    change: Operation = change
    adopt: Operation = adopt

    @property
    def captures(self) -> bool:
        """A graph can hold a step that is made of them."""
        return not any(getattr(self, name) in _READ_BY_THE_HOST for name in NAMES)

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of those that are not the kernels."""
        return tuple(name for name in NAMES if getattr(self, name) is not getattr(TRITON, name))

    def with_plain(self, name: str) -> Operations:
        """These, but for the one of this name, which PyTorch computes."""
        return replace(self, **{name: getattr(PLAIN, name)})


NAMES = tuple(field.name for field in fields(Operations))
TRITON = Operations()
PLAIN = Operations(
    resolve_tokens=plain.resolve_tokens,
    embed=plain.embed,
    own_embeddings=plain.own_embeddings,
    add_norm=plain.add_norm,
    nf4_product=plain.nf4_product,
    dense_product=plain.dense_product,
    add_lora=plain.add_lora,
    rotate_and_write=plain.rotate_and_write,
    attend=plain.attend,
    gather_rows=plain.gather_rows,
    gate=plain.gate,
    own_logits=plain.own_logits,
    finish_logits=plain.finish_logits,
    sample=plain_sampling.sample,
    change=plain.change,
    adopt=plain.adopt,
)
