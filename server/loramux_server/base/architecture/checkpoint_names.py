"""Where a checkpoint has the parameters of the model that is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from loramux_server.base.architecture.experts import TensorPiece, expert_module, expert_names
from loramux_server.base.architecture.language_part import LanguagePart
from loramux_server.kernels.layers.experts import ExpertForm, Experts


@dataclass(frozen=True, slots=True)
class CheckpointNames:
    """Of one architecture.

    Attributes:
        part: of a checkpoint that takes more than text; None: it is all of it.
        experts: of a mixture of experts; None: it is none.
    """

    part: LanguagePart | None = None
    experts: ExpertForm | None = None

    @classmethod
    def of(cls, part: LanguagePart | None, model: nn.Module) -> CheckpointNames:
        """`model`: with its `Experts`, on whatever device."""
        forms = (module.form for module in model.modules() if isinstance(module, Experts))
        return cls(part, next(forms, None))

    def names(self, name: str) -> Iterator[str | TensorPiece]:
        """What a checkpoint may call a parameter of the model, or of which of its tensors it may be a piece."""
        by_shape = self.part is not None and bool(self.part.converted_as)
        for own in (name,) if self.experts is None else expert_names(name, self.experts, by_shape=by_shape):
            if self.part is None:
                yield own
            elif isinstance(own, TensorPiece):
                yield from (own._replace(tensor=tensor) for tensor in self.part.names(own.tensor))
            else:
                yield from self.part.names(own)

    def module_of(self, path: str) -> str | None:
        """The module of the model that an adapter calls `path`; None where that is of a part which is not loaded."""
        place = path if self.part is None else self.part.module_of(path)
        return place if place is None or self.experts is None else expert_module(place)

    def whole_tensors(self, name: str) -> Iterator[str]:
        """Of `names`, those that are tensors of their own."""
        return (each for each in self.names(name) if isinstance(each, str))
