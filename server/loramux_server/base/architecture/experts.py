"""A mixture of experts as it is served: each expert with linear layers of its own, under the names of checkpoints.

transformers 5 has the experts of a layer in two tensors, "experts.gate_up_proj" and "experts.down_proj". Checkpoints
have them so (gpt-oss, Llama 4; Granite-MoE under other names), or expert by expert (Qwen3-MoE, OLMoE; Mixtral under
other names). All are read piece by piece.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from loramux_server.base.architecture.mxfp4 import BLOCKS, SCALES, dequantized_mxfp4
from loramux_server.errors import BaseModelError
from loramux_server.kernels.layers.experts import ExpertForm, Experts
from loramux_server.kernels.layers.mixture import put_mixture
from loramux_server.kernels.layers.routing import CORRECTIONS, routers_of

FUSED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_NAME = re.compile(r"(?P<before>.*\.experts)\.(?P<number>\d+)\.(?P<layer>gate_proj|up_proj|down_proj)\.(?P<what>\w+)")
# parts of names of routers' tensors -> what checkpoints have for them
_ROUTERS = {
    ".mlp.gate.": ".block_sparse_moe.gate.",  # Mixtral
    ".block_sparse_moe.router.": ".block_sparse_moe.router.layer.",  # Granite-MoE
    f".mlp.gate.moe_statics.{CORRECTIONS}": f".mlp.moe_statics.{CORRECTIONS}",  # Ernie 4.5
    f".mlp.gate.{CORRECTIONS}": f".mlp.{CORRECTIONS}",  # EXAONE
}
_GRANITE = {"gate_up_proj": "input_linear", "down_proj": "output_linear"}
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_MIXTRAL_PATH = re.compile(r"(?P<before>.*)\.block_sparse_moe\.experts\.(?P<number>\d+)\.(?P<layer>w[123])")
_SILU, _GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)


class TensorPiece(NamedTuple):
    """A part of a checkpoint's tensor that holds all experts of a layer.

    Attributes:
        tensor: its name.
        number: of the expert.
        part: 0 or 1, of a tensor that holds two layers; None: it holds one.
        interleaved: their outputs alternate; else one layer's lie behind the other's.
        turned: a weight lies as [inputs, outputs].
        outputs: of what the tensor holds of an expert; 0: they are not known. Where they are, `turned` is only of a
            weight that is not of that many rows.
        mxfp4: it lies in two tensors, as mxfp4.py has it, and is not turned.
    """

    tensor: str
    number: int
    part: int | None
    interleaved: bool
    turned: bool
    mxfp4: bool = False
    outputs: int = 0

    @property
    def stored(self) -> str:
        """The tensor that a checkpoint has if it holds this."""
        return self.tensor + (BLOCKS if self.mxfp4 else "")

    def read(self, held: Callable[[str], Any]) -> torch.Tensor:
        """[outputs, inputs], or [outputs] of a bias. `held`: name of a tensor -> it, or its slice of a safetensors
        file."""
        if not self.mxfp4:
            return self.of(held(self.tensor))
        blocks, scales = (held(self.tensor + part)[self.number : self.number + 1][0] for part in (BLOCKS, SCALES))
        return self._part(dequantized_mxfp4(blocks, scales))

    def of(self, all_of_it: Any) -> torch.Tensor:
        """From the tensor that it is a part of."""
        own: torch.Tensor = all_of_it[self.number : self.number + 1][0]
        turned = self.turned and own.dim() == 2 and own.shape[0] != self.outputs
        return self._part(own.t() if turned else own)

    def _part(self, own: torch.Tensor) -> torch.Tensor:
        if self.part is None:
            return own
        return own[self.part :: 2] if self.interleaved else own.chunk(2)[self.part]


def expert_names(name: str, form: ExpertForm, *, by_shape: bool = False) -> Iterator[str | TensorPiece]:
    """What a checkpoint may call a parameter of a mixture of experts, or which piece of what it holds it is.

    Args:
        form: of the experts.
        by_shape: of weights of all experts in one tensor their shape says whether they lie as [inputs, outputs].
    """
    yield name
    for ours, theirs in _ROUTERS.items():
        if ours in name:
            yield name.replace(ours, theirs)
    found = _NAME.fullmatch(name)
    if found is None:
        return
    before, number, layer, what = found.group("before", "number", "layer", "what")
    part = None if layer == "down_proj" else int(layer == "up_proj")
    fused = FUSED[layer] + ("" if what == "weight" else f"_{what}")
    outputs = form.outer if part is None else 2 * form.inner
    piece = TensorPiece(
        f"{before}.{fused}",
        int(number),
        part,
        form.interleaved,
        form.turned or by_shape,
        outputs=outputs if by_shape else 0,
    )
    if before.endswith(".mlp.experts"):
        block = before.removesuffix(".mlp.experts")
        yield f"{block}.block_sparse_moe.experts.{number}.{_MIXTRAL[layer]}.{what}"
    if before.endswith(".block_sparse_moe.experts") and what == "weight":
        yield piece._replace(tensor=f"{before.removesuffix('experts')}{_GRANITE[FUSED[layer]]}.weight")
    yield piece
    if what == "weight":
        yield piece._replace(mxfp4=True)


def expert_module(path: str) -> str:
    """The module of the model that an adapter calls `path`, which may be Mixtral's name for it."""
    found = _MIXTRAL_PATH.fullmatch(path)
    if found is None:
        return path
    layer = next(name for name, its in _MIXTRAL.items() if its == found["layer"])
    return f"{found['before']}.mlp.experts.{found['number']}.{layer}"


def split_experts(model: nn.Module) -> None:
    """Puts `Experts` in the place of every module of transformers' that holds the experts of a layer, in place.

    Args:
        model: on the meta device.
    Raises:
        BaseModelError: they are of a kind that is not served.
    """
    for path, module in list(model.named_modules()):
        if is_experts(module):
            form = _form_of(path, module)
            with torch.device("meta"):
                model.set_submodule(path, Experts(form, module.down_proj.dtype))
            put_mixture(model, path.rpartition(".")[0])
    for _, router in routers_of(model):
        for holder in router.modules():
            for tensors in (holder._parameters, holder._buffers):
                if (own := tensors.get(CORRECTIONS)) is not None:  # as published: differences of theirs decide
                    own.data = own.data.float()


def has_experts(model: nn.Module) -> bool:
    return any(isinstance(module, Experts) for module in model.modules())


def is_experts(module: Any) -> bool:
    """Whether it is transformers' module of all experts of a layer."""
    own = module._parameters
    return all(own.get(name) is not None and own[name].dim() == 3 for name in ("gate_up_proj", "down_proj"))


def _form_of(path: str, module: Any) -> ExpertForm:
    llama4 = isinstance(module, Llama4TextExperts)
    if getattr(module, "has_post_expert_norm", False) or not (llama4 or getattr(module, "has_gate", False)):
        raise BaseModelError(f"the base's {path} are experts with more or less than gate, up and down projections")
    down, (interleaved, turned) = module.down_proj.shape, _kept_as(module)
    count, inner, outer = down if turned else (down[0], down[2], down[1])
    form: dict[str, Any] = {"count": count, "outer": outer, "inner": inner}
    form |= {"bias": bool(getattr(module, "has_bias", False)), "interleaved": interleaved, "turned": turned}
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if alpha is not None and limit is not None:  # gpt-oss
        return ExpertForm(**form, alpha=float(alpha), limit=float(limit), above=1.0)
    kind = next((name for name in _SILU + _GELU if isinstance(module.act_fn, type(ACT2FN[name]))), None)
    if kind not in _SILU + _GELU or "_apply_gate" in vars(type(module)) and not _is_default_gate(module):
        raise BaseModelError(f"the base's {path} are experts with the activation {kind!r}, which is not served")
    return ExpertForm(**form, gelu=kind in _GELU)


def _kept_as(module: Any) -> tuple[bool, bool]:
    """Whether its outputs of gate and up alternate, and whether its weights are [inputs, outputs]."""
    if isinstance(module, Llama4TextExperts):
        return False, True
    return not module.is_concatenated, bool(module.is_transposed)


def _is_default_gate(module: Any) -> bool:
    """Whether a gate and what it multiplies are the two halves of one product, one behind the other."""
    both = torch.linspace(-3, 3, 16).view(2, 8)
    gate, up = both.chunk(2, dim=-1)
    return torch.allclose(module._apply_gate(both), module.act_fn(gate) * up)


def put_expert(model: nn.Module, path: str, weight: torch.Tensor) -> bool:
    """Writes the weight [outputs, inputs] of one expert's layer into transformers' own module.

    Returns:
        False: `path` is none of an expert's layer.
    """
    found = _NAME.fullmatch(f"{path}.weight")
    if found is None:
        return False
    module: Any = model.get_submodule(found["before"])
    all_of_it = getattr(module, FUSED[found["layer"]])
    if all_of_it.dtype != weight.dtype:
        all_of_it.data = all_of_it.data.to(weight.dtype)
    part = None if found["layer"] == "down_proj" else int(found["layer"] == "up_proj")
    piece = TensorPiece("", int(found["number"]), part, *_kept_as(module))
    piece.of(all_of_it.data).copy_(weight)
    return True
