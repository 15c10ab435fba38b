"""NF4 layers laid out for the kernels in Triton as a base is loaded: no layer lies on the device in 16 bits as a whole.

Layers that a step reads as one lie side by side from the start (stacks.py finds them so), because memory of one size
that is freed has no room for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from loramux_adapters.device.device import Device
from loramux_adapters.device.upload import Upload
from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.gpu.loading.nf4_pack import quantize, repack
from loramux_server.kernels.gpu.nf4 import BLOCK, HALF, Nf4Weights
from loramux_server.kernels.gpu.step.nf4_linear import TritonNF4Linear
from loramux_server.kernels.layers.nf4_layout import SCALES, WEIGHT, Nf4Numbers, Shapes
from loramux_server.kernels.layers.nf4_quantizer import twice_quantized

_SIDE_BY_SIDE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class TritonLayout:
    """`Nf4Layout` of Nf4Weights: WEIGHT [in / 64, out of all, 32] uint8, SCALES [in / 64, out of all] fp32."""

    folder = "packed-triton"
    form = 1
    compiled: Compiled | None = None

    def __init__(self, device: Device) -> None:
        self._device = device

    def fits(self, layer: nn.Linear) -> bool:
        return layer.in_features % BLOCK == 0

    def together(self, layers: Mapping[str, nn.Linear]) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = []
        seen: set[str] = set()
        for path in layers:
            if path in seen:
                continue
            parent, _, name = path.rpartition(".")
            names = next((names for names in _SIDE_BY_SIDE if name in names), (name,))
            paths = tuple(each for each in (f"{parent}.{name}" if parent else name for name in names) if each in layers)
            same = len({layers[each].in_features for each in paths}) == 1
            found += [paths] if same else [(each,) for each in paths]
            seen.update(paths)
        return found

    def shapes(self, layers: Sequence[nn.Linear]) -> Shapes:
        blocks, outputs = layers[0].in_features // BLOCK, sum(layer.out_features for layer in layers)
        return {
            WEIGHT: (torch.uint8, (blocks, outputs, HALF)),
            SCALES: (torch.float32, (blocks, outputs)),
        }

    def fill(
        self,
        held: Mapping[str, torch.Tensor],
        first: int,
        source: torch.Tensor | Nf4Numbers,
        upload: Upload,
    ) -> None:
        outputs, inputs = source.shape
        to = Nf4Weights(held[WEIGHT], held[SCALES]).part(first, first + outputs)
        numbers = source.pairs if isinstance(source, Nf4Numbers) else source
        dtype = torch.uint8 if isinstance(source, Nf4Numbers) else torch.bfloat16
        width = numbers.shape[1]
        landing = upload.landing().view(dtype)
        each = len(landing) // width  # some outputs at a time
        for begin in range(0, outputs, each):
            some = numbers[begin : begin + each]
            part, rows = to.part(begin, begin + len(some)), landing[: some.numel()].view(some.shape)
            upload.copy(rows, some)
            if isinstance(source, Nf4Numbers):
                repack(self._device.launch, part, rows)
            else:
                quantize(self._device.launch, part, rows)
        if isinstance(source, Nf4Numbers):
            scales = source.scales
        else:  # of which the largest numbers of all blocks lie in `to` by now
            scales = twice_quantized(self._device.take(to.scales).t().contiguous())
        upload.copy(to.scales, scales.t())

    def layer(
        self, held: Mapping[str, torch.Tensor], first: int, layer: nn.Linear, bias: torch.Tensor | None
    ) -> nn.Linear:
        whole = Nf4Weights(held[WEIGHT], held[SCALES])
        return TritonNF4Linear(whole.part(first, first + layer.out_features), bias, self._device)
