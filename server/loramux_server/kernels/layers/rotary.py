"""Angles of rotary positions on the CPU: computed once by our own code, the same bits on every machine.

Semantics: cos(position * inv_freq) * factor, and sin, in double precision and rounded once to fp32; PyTorch's own are
fp32 products whose cosines differ from one instruction set to the next. The compiled step and the model's modules read
one table, so neither has angles of its own.

Some bases (longrope, Phi-3's long contexts) turn by other frequencies in a text that is longer than those they were
first trained on. Which of the two a sequence has depends on its own length alone, prompt and longest reply together: it
has them from its first token on, whatever else is in a batch. Rows of long sequences are told from others by their
positions, which are given to the model with `LONG` added. (Frequencies of the kind "dynamic" change only beyond the
longest text that a base is served with.)

DeepSeek-V2 and Llama 4 turn pairs of neighbours by multiplying complex numbers. PyTorch's product of these may round
otherwise in a tensor's last few numbers than before them, so a row's bits could depend on its place in the batch. In
place of complex angles their code is given a `Turn`, which multiplies by real products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
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
_GIVEN = "loramux_given"  # attribute of both: in which form it gives angles
_LONGROPE = "longrope"  # kind of rotary position with other frequencies for long texts
LONG = 1 << 24  # beyond any position: added to those of a row whose sequence is long


class Given(Enum):
    """In which form a rotary module gives angles."""

    ONCE = "cosines and sines [..., pairs]"
    TWICE = "cosines and sines [..., 2 * pairs], all angles and all of them again"
    NEIGHBOURS = "cosines and sines [..., 2 * pairs], each angle twice in a row"
    COMPLEX = "complex numbers [..., pairs]"


@dataclass(frozen=True, slots=True)
class Turn:
    """What complex numbers are turned by; has as much of a complex tensor's surface as transformers' code uses.

    Semantics: z * turn = (z.re * cos - z.im * sin) + i (z.re * sin + z.im * cos), each operation rounded once to fp32.

    Attributes:
        cos, sin: [..., pairs] fp32.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def to(self, device: torch.device) -> Turn:
        return Turn(self.cos.to(device), self.sin.to(device))

    def unsqueeze(self, dim: int) -> Turn:
        return Turn(self.cos.unsqueeze(dim), self.sin.unsqueeze(dim))

    def __getitem__(self, places: Any) -> Turn:
        return Turn(self.cos[places], self.sin[places])

    def __rmul__(self, numbers: torch.Tensor) -> torch.Tensor:
        """numbers [..., pairs] complex64 -> the same, turned."""
        re, im = torch.view_as_real(numbers).unbind(-1)
        turned = re * self.cos - im * self.sin, re * self.sin + im * self.cos
        return torch.view_as_complex(torch.stack(turned, dim=-1))


Forward = Callable[..., tuple[torch.Tensor, torch.Tensor] | Turn]


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
        given: in which form their module gives angles.
    """

    short: Angles
    long: Angles
    original: int
    given: Given

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
            module.__dict__.update(
                {_BY_LENGTH: both, _GIVEN: both.given, "forward": _forward({None: both}, both.given)}
            )
        elif tables := _tables_of(module, library):
            given = _given_by(module, tables)  # below: beside nn.Module's own registers
            module.__dict__.update({_TABLES: tables, _GIVEN: given, "forward": _forward(tables, given)})


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
            module.__dict__.update({_TABLES: tables, "forward": _forward(tables, both.given)})
        elif both is None and 0 < original < longest and _TABLES not in module.__dict__:
            raise BaseModelError(
                f"the base's positions turn otherwise in texts of more than {original} tokens, which needs kernels of "
                f"our own: give --max-model-len {original}, or less"
            )
        elif both is not None:
            found = original
    return found


def turns_neighbours(model: nn.Module) -> bool:
    """Whether a model's rotary modules give our angles each twice in a row."""
    return any(module.__dict__.get(_GIVEN) is Given.NEIGHBOURS for module in model.modules())


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
    return AnglesByLength(*tables, original, _given_by(module, {None: tables[0]}))


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
def _given_by(module: Any, tables: dict[str | None, Angles]) -> Given:
    """Most rotary modules give all angles twice; Cohere's each twice in a row, gpt-oss's once, DeepSeek-V2's as a
    complex number.

    Raises:
        BaseModelError: it is none of these.
    """
    layer_type, table = next(iter(tables.items()))
    own = getattr(module, "inv_freq", None) if layer_type is None else getattr(module, f"{layer_type}_inv_freq", None)
    assert own is not None
    position = torch.ones(1, 1, dtype=torch.long, device=own.device)
    kind = {} if layer_type is None else {"layer_type": layer_type}
    found = module.forward(torch.zeros(1, device=own.device), position, **kind)
    if isinstance(found, torch.Tensor) and found.is_complex():
        return Given.COMPLEX
    if found[0].shape[-1] == table.pairs:
        return Given.ONCE
    cos, sin = (part.float() for part in found)
    if all(torch.equal(*part.chunk(2, dim=-1)) for part in (cos, sin)):
        return Given.TWICE
    if all(torch.equal(part[..., ::2], part[..., 1::2]) for part in (cos, sin)):
        return Given.NEIGHBOURS
    raise BaseModelError(f"the base's {type(module).__name__} gives angles in an order that is not known here")


def _forward(tables: Mapping[str | None, Angles | AnglesByLength], given: Given) -> Forward:
    @torch.no_grad()
    def forward(
        x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor] | Turn:
        """For positions [...] cos and sin of x's dtype, as transformers has them; complex numbers in fp32."""
        found = tables[layer_type].at(position_ids.cpu())  # the tables lie in host memory, whatever the device
        if given is Given.COMPLEX:
            return Turn(*found).to(x.device)
        cos, sin = (part.to(x.device, x.dtype) for part in found)
        if given is Given.ONCE:
            return cos, sin
        if given is Given.NEIGHBOURS:
            return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)

    return forward
