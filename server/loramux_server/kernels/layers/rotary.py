"""Angles of rotary positions on the CPU: computed once by our own code, the same bits on every machine.

Semantics: cos(position * inv_freq) * factor, and sin, in double precision and rounded once to fp32; PyTorch's own are
fp32 products whose cosines differ from one instruction set to the next. The compiled step and the model's modules read
one table, so neither has angles of its own.

Some bases (longrope, Phi-3's long contexts) turn by other frequencies in a text that is longer than those they were
first trained on. Which of the two a sequence has depends on its own length alone, prompt and longest reply together: it
has them from its first token on, whatever else is in a batch. Rows of long sequences are told from others by their
positions, which are given to the model with `LONG` added. (Frequencies of the kind "dynamic" change only beyond the
longest text that a base is served with.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loramux_server.errors import BaseModelError
from loramux_server.kernels.compiled.library import NativeLibrary

_LARGEST = 2.0**20 * math.pi / 2  # of an angle that csrc/exact/angles.h reduces
_FEW = 8  # positions
_POWER_ERROR = 1e-6  # relative, of PyTorch's powers in fp32
_TABLES = "loramux_angles"  # attribute of a module whose forward is ours: its tables, by kind of layer
_BY_LENGTH = "loramux_angles_by_length"  # attribute of one that has two tables
_LONGROPE = "longrope"  # kind of rotary position with other frequencies for long texts
LONG = 1 << 24  # beyond any position: added to those of a row whose sequence is long

Forward = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class Angles:
    """A table of one kind of layer. Owner: the thread that runs the model.

    Attributes:
        pairs: how many pairs of a head's dimensions it turns.
        cos, sin: [positions, pairs] fp32, of the positions that were asked for so far.
    """

    def __init__(self, library: NativeLibrary, inv_freq: torch.Tensor, factor: float) -> None:
        """`inv_freq`: [pairs], of the model; `factor`: what it multiplies cosines and sines by."""
        self._call = library.function("loramux_exact_angles")
        self._inv_freq = inv_freq.detach().float().cpu().contiguous().clone()
        self._factor = float(factor)
        self.pairs = self._inv_freq.numel()
        self._most = int(_LARGEST / max(float(self._inv_freq.abs().max()), 1e-9))
        self.cos = self.sin = torch.empty(0, self.pairs)

    def know(self, count: int) -> None:
        """Makes the table hold all positions below `count`.

        Raises:
            BaseModelError: positions so far out have no exact angle.
        """
        known = len(self.cos)
        if count <= known:
            return
        self._check(count)
        cos, sin = self._of(known, min(1 << (count - 1).bit_length(), self._most) - known)
        self.cos, self.sin = torch.cat([self.cos, cos]), torch.cat([self.sin, sin])

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [..., pairs] of positions [...]. A table does not grow for a few of them."""
        count = int(positions.max()) + 1
        if positions.numel() > _FEW or count <= len(self.cos):
            self.know(count)
            return self.cos[positions], self.sin[positions]
        self._check(count)
        cos, sin = zip(*(self._of(position, 1) for position in positions.flatten().tolist()), strict=True)
        shape = (*positions.shape, self.pairs)
        return torch.cat(cos).view(shape), torch.cat(sin).view(shape)

    def _of(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = torch.empty(count, self.pairs), torch.empty(count, self.pairs)
        places = (cos.data_ptr(), sin.data_ptr(), self._inv_freq.data_ptr())
        self._call(*places, first, count, self.pairs, self._factor)
        return cos, sin

    def _check(self, count: int) -> None:
        if count > self._most:
            raise BaseModelError(f"position {count - 1} is beyond the {self._most} that have exact angles here")


@dataclass(frozen=True, slots=True)
class AnglesByLength:
    """Two tables.

    Attributes:
        original: sequences of more tokens have the long one.
        twice: their module gives each angle twice.
    """

    short: Angles
    long: Angles
    original: int
    twice: bool

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [..., pairs] of positions [...], those of long sequences with `LONG` added."""
        is_long = positions >= LONG
        if not bool(is_long.any()):
            return self.short.at(positions)
        places = positions - LONG * is_long
        if bool(is_long.all()):
            return self.long.at(places)
        pairs = zip(self.long.at(places), self.short.at(places), strict=True)
        cos, sin = (torch.where(is_long[..., None], long, short) for long, short in pairs)
        return cos, sin


def use_angles(model: nn.Module, library: NativeLibrary) -> None:
    """Gives a model's rotary modules a forward that reads our tables, in place; those that have one keep it."""
    for module in model.modules():
        if _TABLES in module.__dict__ or _BY_LENGTH in module.__dict__:
            continue
        if (both := _by_length(module, library)) is not None:
            module.__dict__.update({_BY_LENGTH: both, "forward": _forward({None: both}, twice=both.twice)})
        elif tables := _tables_of(module, library):
            forward = _forward(tables, twice=_gives_twice(module, tables))
            module.__dict__.update({_TABLES: tables, "forward": forward})  # beside nn.Module's own registers


def settle_angles(model: nn.Module, longest: int) -> int:
    """Makes a base ready for sequences of up to `longest` tokens.

    Where none of them is long, its rotary modules have one table from now on, as others do.

    Returns:
        Sequences of more tokens are long; 0: none is.
    Raises:
        BaseModelError: some could be, and the modules are transformers' own, which look at the longest row of a batch.
    """
    found = 0
    for module in model.modules():
        both: AnglesByLength | None = module.__dict__.get(_BY_LENGTH)
        original = _original_length(module) if both is None else both.original
        if both is not None and longest <= both.original:
            tables: dict[str | None, Angles] = {None: both.short}
            module.__dict__.update({_TABLES: tables, "forward": _forward(tables, twice=both.twice)})
        elif both is None and 0 < original < longest and _TABLES not in module.__dict__:
            raise BaseModelError(
                f"the base's positions turn otherwise in texts of more than {original} tokens, which needs kernels of "
                f"our own: give --max-model-len {original}, or less"
            )
        elif both is not None:
            found = original
    return found


def tables_of(module: nn.Module) -> dict[str | None, Angles] | None:
    """Its tables by kind of layer, or under None the one for all; None if its forward is its own."""
    tables: dict[str | None, Angles] | None = module.__dict__.get(_TABLES)
    return tables


def _tables_of(module: Any, library: NativeLibrary) -> dict[str | None, Angles]:
    """Empty for what is no rotary module, and for one whose frequencies follow a sequence's length."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        kinds = {None: kinds}
    if not isinstance(kinds, dict) or _LONGROPE in kinds.values():
        return {}
    tables = {}
    for layer_type in kinds:
        prefix = "" if layer_type is None else f"{layer_type}_"
        inv_freq = _frequencies(module, prefix, layer_type)
        factor = getattr(module, f"{prefix}attention_scaling", None)
        if inv_freq is None or not isinstance(factor, int | float):
            return {}
        tables[layer_type] = Angles(library, inv_freq, factor)
    return tables


def _original_length(module: Any) -> int:
    """Of a rotary module of the kind longrope: texts of more tokens turn by its other frequencies; 0: it has none."""
    if getattr(module, "rope_type", None) != _LONGROPE:
        return 0
    return int(module.config.rope_parameters["original_max_position_embeddings"])


@torch.no_grad()
def _by_length(module: Any, library: NativeLibrary) -> AnglesByLength | None:
    original, factor = _original_length(module), getattr(module, "attention_scaling", None)
    if not original or not isinstance(factor, int | float):
        return None
    with _SamePowers():
        short, long = (
            ROPE_INIT_FUNCTIONS[_LONGROPE](module.config, device="cpu", seq_len=length)[0]
            for length in (original, original + 1)
        )
    tables = Angles(library, short, factor), Angles(library, long, factor)
    return AnglesByLength(*tables, original, _gives_twice(module, {None: tables[0]}))


def _frequencies(module: Any, prefix: str, layer_type: str | None) -> torch.Tensor | None:
    """The inverse frequencies [pairs] of a rotary module, or of one kind of its layers.

    Those that lie in it were powers of PyTorch's, whose last bit depends on the processor. They are computed once more
    by the function that they came from; where that gives others, which a checkpoint may bring, its own are taken.
    """
    own = getattr(module, f"{prefix}inv_freq", None)
    if not isinstance(own, torch.Tensor) or own.dim() != 1:
        return None
    kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
    function = ROPE_INIT_FUNCTIONS.get(kind, getattr(module, "compute_default_rope_parameters", None))
    if function is None:
        return own
    with torch.no_grad(), _SamePowers():
        found, _ = function(module.config, **({} if layer_type is None else {"layer_type": layer_type}))
    same = found.shape == own.shape and torch.allclose(found, own.float().cpu(), rtol=_POWER_ERROR, atol=0.0)
    return found if same else own


class _SamePowers(TorchFunctionMode):
    """Powers by the C library in double precision, rounded once: the same on every machine."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.Tensor.__rpow__):
            base, exponent = reversed(args) if func is torch.Tensor.__rpow__ else args
            if isinstance(exponent, torch.Tensor):
                powers = [math.pow(float(base), e) for e in exponent.flatten().tolist()]
            else:
                powers = [math.pow(b, exponent) for b in base.flatten().tolist()]
            shape = exponent.shape if isinstance(exponent, torch.Tensor) else base.shape
            return torch.tensor(powers, dtype=torch.float32).view(shape)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _gives_twice(module: Any, tables: dict[str | None, Angles]) -> bool:
    """Whether a rotary module gives each angle twice, as most do; gpt-oss's gives it once."""
    layer_type, table = next(iter(tables.items()))
    own = getattr(module, "inv_freq", None) if layer_type is None else getattr(module, f"{layer_type}_inv_freq", None)
    assert own is not None
    position = torch.zeros(1, 1, dtype=torch.long, device=own.device)
    kind = {} if layer_type is None else {"layer_type": layer_type}
    cos, _ = module.forward(torch.zeros(1, device=own.device), position, **kind)
    return bool(cos.shape[-1] == 2 * table.pairs)


def _forward(tables: Mapping[str | None, Angles | AnglesByLength], *, twice: bool) -> Forward:
    @torch.no_grad()
    def forward(
        x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [..., 2 * pairs] of x's dtype for positions [...], each angle twice, or [..., pairs], as
        transformers has them."""
        found = tables[layer_type].at(position_ids.cpu())  # the tables lie in host memory, whatever the device
        cos, sin = (part.to(x.device, x.dtype) for part in found)
        if not twice:
            return cos, sin
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)

    return forward
