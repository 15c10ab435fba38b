"""The experts of a layer with random numbers, laid out for the compiled kernels, and adapters beside them."""

from __future__ import annotations

from functools import partial

import torch

from loramux_adapters.lora.lora_linear import LoRALinear
from loramux_adapters.lora.ops import HAS_AFFINE, HAS_DELTA, Arena
from loramux_server.kernels.compiled.adapter_kernels import NativeAddLora
from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.layers.experts import PROJECTIONS, ExpertForm, Experts, ExpertsTogether
from loramux_server.kernels.layers.nf4_linear import NF4Linear
from loramux_server.kernels.layers.operations import CompiledOps


def random_experts(form: ExpertForm, compiled: Compiled, *, ranks: int = 0, affine: bool = False) -> Experts:
    """`ranks`: rows of each layer's memory for adapters, where there is some; every third layer has nothing there.
    `affine`: with gain and shift.
    """
    generator = torch.Generator().manual_seed(form.count)
    normal = partial(torch.randn, generator=generator)
    with torch.device("meta"):
        experts = Experts(form)
    add_lora, number = NativeAddLora(compiled), 0
    for expert in experts:
        for name in PROJECTIONS:
            meta, number = getattr(expert, name), number + 1
            inputs, outputs = meta.in_features, meta.out_features
            codes = torch.randint(256, (outputs // 16, inputs // 4, 32), dtype=torch.uint8, generator=generator)
            scales = torch.rand(inputs // 64, outputs, generator=generator) * 0.06 + 0.03
            layer = NF4Linear(codes, scales, normal(outputs).bfloat16() if form.bias else None, compiled)
            if not ranks:
                setattr(expert, name, layer)
                continue
            has = 0 if number % 3 == 0 else HAS_DELTA | (HAS_AFFINE if affine else 0)
            arena = Arena(
                normal(ranks, inputs).mul(0.1).bfloat16(),
                normal(ranks, outputs).mul(0.1).bfloat16(),
                torch.full((ranks // 8,), has, dtype=torch.uint8),
                normal(ranks // 8, 2, outputs).mul(0.2) if affine else None,
            )
            setattr(expert, name, LoRALinear(layer, arena, add_lora))
    experts.gated = partial(CompiledOps(compiled).gated_dense, gelu=form.gelu)
    experts.together = ExpertsTogether(experts, compiled)
    return experts
