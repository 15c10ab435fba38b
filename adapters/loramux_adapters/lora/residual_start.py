"""Adapters that peft trained beside a base without their first A and B -> LoRA on the base itself.

Before training, with s the adapter's scale, such an init takes s B0 A0 out of the weight W [out, in] of each layer:

    PiSSA (arXiv 2404.02948)    s B0 A0 = the product of that rank which is closest to W
    OLoRA (arXiv 2406.01775)    B0 = the first columns of Q, A0 = the first rows of R, of W = Q R

so what it learnt is the difference s (B A - B0 A0), of twice the rank. That is written as the product of its own
singular vectors: what is rounded to bf16 then is the difference, not the two products, which are nearly the same.

peft starts PiSSA at the weights in 16 bits, OLoRA at these or at what NF4 makes of them. A and B are still near where
they began, so they tell which it was, and whether it was this base at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from loramux_adapters import nf4
from loramux_adapters.artifact.config import (
    CONFIG_FILE,
    CONVERTED_KEY,
    HOW_TO_CONVERT,
    MAX_CONFIG_BYTES,
    AdapterConfig,
    parse_config,
    rank_of,
    scale_of,
)
from loramux_adapters.artifact.format import WEIGHTS_FILE, Layout, pair_up
from loramux_adapters.artifact.reading.own_files import open_regular
from loramux_adapters.artifact.reading.strict_json import StrictJSONError, parse_object, quoted
from loramux_adapters.artifact.safetensors_header import read_header
from loramux_adapters.base_info import BaseInfo
from loramux_adapters.errors import AdapterRejected
from loramux_adapters.lora.closest_pair import closest_pair
from loramux_adapters.lora.weights import read_tensor

_PART = ".converting-start"  # no file of an upload has this name
_NEAR = 0.5  # of what A and B span, how much must lie in what they spanned at first; unrelated ones share rank / size
_NAMES = {"pissa": "PiSSA", "olora": "OLoRA"}


class Start(NamedTuple):
    """Where the training of one layer began: A0 [rank, in] and B0 [out, rank], fp32."""

    a: torch.Tensor
    b: torch.Tensor


def convert_residual(directory: Path, base: BaseInfo, original: Callable[[str], torch.Tensor], max_rank: int) -> None:
    """Rewrite the files of such an adapter in place, as LoRA on this base; any other stays as it is.

    To be called for a directory of our own, with regular files alone, in a thread that may take long: PiSSA needs the
    singular vectors of every layer's weight. One layer's weight is in memory at a time, and the converted adapter.

    Args:
        original: module path in the base -> its weight [out, in] in 16 bits; raises `AdapterRejected`: there is none.
    Raises:
        AdapterRejected: it cannot be converted, with what to do; OSError.
    """
    fields = _fields(directory)
    kind = _kind_of(fields)
    if kind is None:
        return
    config = parse_config(json.dumps(fields | {"init_lora_weights": True}).encode())
    layout = pair_up(read_header(directory / WEIGHTS_FILE))
    reasons = [*layout.reasons, *_reasons(layout, config, base, _NAMES[kind])]
    ranks = [pair.rank for pair in layout.pairs.values()]
    rank = 2 * max(ranks, default=0)
    if rank > max_rank:
        reasons.append(
            f"a {_NAMES[kind]} adapter of rank {rank // 2} becomes LoRA of rank {rank} on the base itself, and this "
            f"server takes at most {max_rank}: start it with --max-rank {rank}"
        )
    if reasons:
        raise AdapterRejected(reasons)
    tensors, where = _converted(directory, kind, config, layout, base, original, rank)
    written = {name for pair in layout.pairs.values() for name in (pair.a_name, pair.b_name)}
    tensors |= {
        name: read_tensor(directory, name) for name in read_header(directory / WEIGHTS_FILE) if name not in written
    }
    save_file(tensors, directory / _PART, metadata={"format": "pt"})
    os.replace(directory / _PART, directory / WEIGHTS_FILE)
    own: dict[str, Any] = {"init_lora_weights": True, "r": rank, "lora_alpha": rank, "use_rslora": False}
    own |= {"rank_pattern": {}, "alpha_pattern": {}, CONVERTED_KEY: f"{_NAMES[kind]} of peft, begun at {where}"}
    (directory / CONFIG_FILE).unlink()
    (directory / CONFIG_FILE).write_text(json.dumps(fields | own, indent=2))


def is_residual(directory: Path) -> bool:
    """Whether `convert_residual` has something to do, which takes long, or something to refuse."""
    return _kind_of(_fields(directory)) is not None


def _kind_of(fields: dict[str, Any]) -> str | None:
    """A key of _NAMES; None for any other adapter."""
    kind = str(fields.get("init_lora_weights")).lower()
    return kind if fields.get("peft_type") == "LORA" and kind in _NAMES else None


def _fields(directory: Path) -> dict[str, Any]:
    """Of the config; none where there is no adapter, or none that can be read: the check says why."""
    path = directory / CONFIG_FILE
    if not path.exists() or not (directory / WEIGHTS_FILE).exists():
        return {}
    with open_regular(path) as file:
        try:
            return parse_object(file.read(MAX_CONFIG_BYTES + 1), limit=MAX_CONFIG_BYTES)
        except StrictJSONError:
            return {}


def _reasons(layout: Layout, config: AdapterConfig, base: BaseInfo, kind: str) -> Iterator[str]:
    """What can be said without reading data."""
    if not layout.pairs and not layout.reasons:
        yield f"{WEIGHTS_FILE} holds no LoRA weights"
    for module, kinds in layout.of_tokens.items():
        if "embedding_A" in kinds:
            yield f"module {quoted(module)} is an embedding, not converted of {kind} adapters: {HOW_TO_CONVERT}"
    for module, pair in layout.pairs.items():
        place = base.module_of(module)
        if place is None or place not in base.linears:
            yield f"module {quoted(module)} is no linear layer of the base"
        elif (pair.a.shape[1], pair.b.shape[0]) != base.linears[place]:
            yield f"module {quoted(module)} has weights of other sizes than the base's {[*base.linears[place]]}"
        elif pair.rank != rank_of(config, module) or pair.rank > min(base.linears[place]):
            yield f"module {quoted(module)} has rank {pair.rank}, which is not the config's, or more than the layer has"


def _converted(
    directory: Path,
    kind: str,
    config: AdapterConfig,
    layout: Layout,
    base: BaseInfo,
    original: Callable[[str], torch.Tensor],
    rank: int,
) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of all pairs, of this rank and in bf16, by their names; and which weights training began at.

    Raises `AdapterRejected`: it did not begin at this base's.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    near: dict[str, float] = {}
    for module, pair in layout.pairs.items():
        place = base.module_of(module)
        assert place is not None
        weight = original(place).float()
        if weight.shape != base.linears[place][::-1]:
            raise AdapterRejected([f"the base's checkpoint has {place} in another shape: {HOW_TO_CONVERT}"])
        trained = Start(*(read_tensor(directory, name).float() for name in (pair.a_name, pair.b_name)))
        if not all(bool(part.isfinite().all()) for part in trained):
            raise AdapterRejected([f"module {quoted(module)} has values that are not finite"])
        scale = scale_of(config, module, pair.rank)
        if not bool(weight.isfinite().all()):
            raise AdapterRejected([f"the base's checkpoint has values of {place} that are not finite"])
        for where, start in _starts(kind, weight, pair.rank, scale):
            if not all(bool(part.isfinite().all()) for part in start):
                raise AdapterRejected(
                    [f"module {quoted(module)} cannot have begun with {_NAMES[kind]}: its scale is {scale:.3g}"]
                )
            near[where] = near.get(where, 0.0) + _shared(trained, start) / len(layout.pairs)
            a, b = difference(trained, start, scale, rank)
            found.setdefault(where, {}).update({pair.a_name: a.bfloat16(), pair.b_name: b.bfloat16()})
    nearest = max(near, key=near.__getitem__)
    if near[nearest] < _NEAR:
        raise AdapterRejected(
            [
                f"its A and B share {near[nearest]:.0%} of what {_NAMES[kind]} begins with on this base: it was "
                f"trained on another base, or far from where it began; {HOW_TO_CONVERT}"
            ]
        )
    return found[nearest], nearest


def _starts(kind: str, weight: torch.Tensor, rank: int, scale: float) -> Iterator[tuple[str, Start]]:
    """Where peft may have begun; weight [out, in] fp32."""
    whole, in_nf4 = "the base's 16-bit weights", "the base in NF4"
    if kind == "pissa":
        yield whole, Start(*closest_pair(weight, rank, scale))
        return
    yield whole, first_columns(weight, rank)
    if weight.shape[1] % nf4.BLOCK == 0:
        yield in_nf4, first_columns(nf4.dequantize(*nf4.quantize(weight)), rank)


def first_columns(weight: torch.Tensor, rank: int) -> Start:
    """OLoRA's: of weight [out, in] = Q R, `rank` columns of Q and rows of R.

    The first columns of Q depend on the first columns of the weight alone.
    """
    q = torch.linalg.qr(weight[:, :rank].double()).Q
    return Start((q.t() @ weight.double()).float(), q.float())


def difference(trained: Start, start: Start, scale: float, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank], fp32, with B A = scale (B A of `trained` - B A of `start`); see the module."""
    left = torch.cat([trained.b, -start.b], dim=1).double() * scale  # [out, 2r]
    right = torch.cat([trained.a, start.a]).double()  # [2r, in]
    left_basis, left_part = torch.linalg.qr(left)
    right_basis, right_part = torch.linalg.qr(right.t())
    u, singular, vt = torch.linalg.svd(left_part @ right_part.t(), full_matrices=False)
    split = singular.sqrt()
    a, b = split[:, None] * (vt @ right_basis.t()), left_basis @ u * split
    missing = rank - len(split)
    return nn.functional.pad(a, (0, 0, 0, missing)).float(), nn.functional.pad(b, (0, missing)).float()


def _shared(trained: Start, start: Start) -> float:
    """How much of what A and B span lies in what they spanned at first: 1 all of it, rank / size by chance."""
    shares: list[float] = []
    for now, then in ((trained.a.t(), start.a.t()), (trained.b, start.b)):
        bases = [torch.linalg.qr(part.double()).Q for part in (now, then)]
        shares.append(float((bases[0].t() @ bases[1]).square().sum()) / bases[0].shape[1])
    return sum(shares) / 2
