"""The base as bitsandbytes quantized it once: kept in the cache directory, so that later starts read it instead.

For compiled CPU kernels base/packed.py keeps it in their own form.

What is kept is transformers' own form of a model that bitsandbytes has quantized. It counts only if the model that is
read has the digest of the one that was quantized, whatever happened to the file or to its format in between.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loramux_adapters.device.device import Device
from loramux_server.base.cache_directory import partial_directory
from loramux_server.base.source import Report
from loramux_server.kernels.layers.nf4_linear import four_bit_layers

_DIGEST = "digest"
_LIBRARIES = ("bitsandbytes", "transformers")  # what the numbers and their form depend on


def quantized_once(
    cache_dir: Path,
    base_id: str,
    device: Device,
    report: Report,
    *,
    read: Callable[[Path], Any],
    quantize: Callable[[], Any],
) -> Any:
    """The quantized model: read from the cache if it is there and right, else quantized and kept there.

    Args:
        read: loads a model from such a directory; whatever it raises, the model is quantized again.
        quantize: makes it from the 16-bit weights.
    """
    kind = f"{base_id[:16]}-{device}"
    versions = "-".join(f"{name}-{metadata.version(name)}" for name in _LIBRARIES)
    place = cache_dir / "quantized" / f"{kind}-{versions}"
    if place.is_dir():
        report("reading the quantized base that was kept")
        try:
            model = read(place)
            if state_digest(model) == (place / _DIGEST).read_text():
                return model
            problem = "its weights are not those that were kept"
        except Exception as error:  # of many libraries; the 16-bit weights are the truth, and are there
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        report(f"what was kept in {place} cannot be used ({problem})")
        shutil.rmtree(place, ignore_errors=True)
    report("loading and quantizing the base to NF4")
    model = quantize()
    try:
        _keep(model, place, kind)
    except Exception as error:  # the server runs without it
        report(f"the quantized base could not be kept for the next start: {error}")
    return model


def _keep(model: Any, place: Path, kind: str) -> None:
    """Writes it, and removes what other versions of the libraries left of the same base."""
    with partial_directory(place) as partial:
        if place.exists():  # another process was faster
            return
        model.save_pretrained(partial)
        (partial / _DIGEST).write_text(state_digest(model))
        for other in place.parent.glob(f"{kind}-*"):
            shutil.rmtree(other, ignore_errors=True)
        partial.rename(place)


def state_digest(model: Any) -> str:
    """sha256, hex, over every weight, scale and buffer with its name, type and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted((dict(model.named_buffers()) | model.state_dict()).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def quantization_constants(model: nn.Module) -> Iterator[tuple[Any, str, torch.Tensor]]:
    """(object, attribute, tensor) for the scales and levels of every NF4 layer."""
    for _, layer in four_bit_layers(model):
        state = getattr(layer.weight, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            for name in ("absmax", "code", "offset"):
                if isinstance(constant := getattr(part, name, None), torch.Tensor):
                    yield part, name, constant
