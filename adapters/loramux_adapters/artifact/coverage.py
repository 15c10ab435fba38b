"""How much of a base an adapter's weights reach, and what its config asks for that the file does not hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from loramux_adapters.artifact.config import AdapterConfig
from loramux_adapters.errors import AdapterRejected

_SHOWN_RANGES = 8
_SHOWN_MODULES = 8


class LayerCount(NamedTuple):
    """Of the base's `of` layers, `adapted` carry weights of an adapter."""

    adapted: int
    of: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """`layers`: None for a base without numbered layers."""

    layers: LayerCount | None
    notes: list[str]


class _Place(NamedTuple):
    """A linear layer's place: in which decoder layer, of which list, and under which name in it."""

    list: str
    layer: int
    name: str


def coverage_of(modules: Collection[str], config: AdapterConfig, linears: Iterable[str]) -> Coverage:
    """What there is to say of an adapter with weights for `modules`, all of them among the base's `linears`."""
    places = {module: place for module in linears if (place := _place_of(module)) is not None}
    if not places:
        return Coverage(None, [])
    layers = {place[:2] for place in places.values()}
    reached = {places[module][:2] for module in modules if module in places}
    missing = [places[module] for module in _wanted(modules, config, places) if module not in modules]
    count = LayerCount(len(reached), len(layers))
    notes = []
    if count.adapted < count.of:
        forgotten = {place.layer for place in missing if place[:2] not in reached}
        carry = f"{count.adapted} of {count.of} layers carry weights"
        if forgotten:
            notes.append(f"{carry}: the config leaves none out, but there are none for {in_words(forgotten)}")
        elif reached:
            notes.append(f"{carry}, as the config says: {in_words({layer for _, layer in reached})}")
        else:
            notes.append(f"{carry}, as the config says")
    by_name: dict[str, set[int]] = {}
    for place in missing:
        if place[:2] in reached:
            by_name.setdefault(place.name, set()).add(place.layer)
    names = sorted(by_name)
    notes += [f"{name} has no weights in {in_words(by_name[name])}" for name in names[:_SHOWN_MODULES]]
    if len(names) > _SHOWN_MODULES:
        notes.append(f"{len(names) - _SHOWN_MODULES} more modules have no weights in some layers")
    return Coverage(count, notes)


def _wanted(modules: Collection[str], config: AdapterConfig, places: Mapping[str, _Place]) -> list[str]:
    """The modules in layers that the config asks for; where it says nothing, those named as the ones that are there."""
    if config.rule.targets is None:
        names = {places[module].name for module in modules if module in places}
        return [module for module, place in places.items() if place.name in names]
    try:
        return [module for module in places if config.rule.matches(module)]
    except AdapterRejected:  # its regular expressions take too long: they were matched for what is there already
        return []


def _place_of(module: str) -> _Place | None:
    parts = module.split(".")
    at = next((at for at, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    if at is None:
        return None
    return _Place(".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))


def in_words(numbers: Collection[int]) -> str:
    """0, 1, 2, 5 -> "layers 0 to 2, 5"."""
    ranges = []
    for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        ranges.append(f"{members[0]} to {members[-1]}" if len(members) > 1 else f"{members[0]}")
    more = " and more" if len(ranges) > _SHOWN_RANGES else ""
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(ranges[:_SHOWN_RANGES])}{more}"
