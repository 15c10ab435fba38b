"""Which modules of a base an adapter's config applies to, by PEFT's rules."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from loramux_adapters.artifact.patterns import Pattern

ALL_LINEAR = "all-linear"
_OUTPUT_LAYERS = ("lm_head", "embed_out")  # PEFT leaves the output layer out of "all-linear"


@dataclass(frozen=True, slots=True)
class Names:
    """Modules named by their path or by its end."""

    names: frozenset[str]

    def matches(self, module: str) -> bool:
        ends = (module[i + 1 :] for i, char in enumerate(module) if char == ".")
        return self.is_exact(module) or any(end in self.names for end in ends)

    def is_exact(self, module: str) -> bool:
        return module in self.names


@dataclass(frozen=True, slots=True)
class TargetRule:
    """The modules that PEFT would give LoRA weights; a tensor for any other one would silently have no effect there.

    Attributes:
        targets: names, a pattern for the whole path, `ALL_LINEAR`, or None for whatever the file holds.
        excluded: these are no targets whatever `targets` says.
        layers: with names only, the layer numbers that are targets; None for all.
        layer_lists: names of the module lists those numbers count in; empty for any.
    """

    targets: Names | Pattern | str | None
    excluded: Names | Pattern | None = None
    layers: Collection[int] | None = None
    layer_lists: tuple[str, ...] = ()

    def matches(self, module: str) -> bool:
        """Whether the module at this path in the base is a target."""
        if isinstance(self.excluded, Pattern) and self.excluded.fullmatch(module):
            return False
        if isinstance(self.excluded, Names) and self.excluded.matches(module):
            return False
        if isinstance(self.targets, Pattern):
            return self.targets.fullmatch(module)
        if isinstance(self.targets, Names):
            return self.targets.is_exact(module) or (self.targets.matches(module) and self._layer_matches(module))
        return self.targets is None or module.rpartition(".")[2] not in _OUTPUT_LAYERS

    def _layer_matches(self, module: str) -> bool:
        if self.layers is None:
            return True
        parts = module.split(".")
        if self.layer_lists:
            found = (_layer_after(parts, name) for name in self.layer_lists)
            number = next((number for number in found if number is not None), None)
        else:
            number = next((int(part) for part in parts[2:-1] if _is_number(part)), None)
        return number is not None and number in self.layers


def _layer_after(parts: list[str], name: str) -> int | None:
    for before, part in zip(parts, parts[1:-1], strict=False):
        if before == name and _is_number(part):
            return int(part)
    return None


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()
