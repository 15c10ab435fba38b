"""What training on a graphics processor computes beside the products with the base's weights, in PyTorch's operations.

Between layers everything is fp32, forward and backward, as the server's residual stream is. What products read is
rounded to the device's activations and kept in them, and so are the gate and what it is multiplied with: where a whole
step of the server rounds (kernels/gpu/step/), training does. LoRA's own products are fp32, of A and B as a
slot holds them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from loramux_adapters.device.device import Device
from loramux_adapters.training.model.row_layout import LayerAttention, PackedRows
from loramux_server.kernels.gpu.training.attention import attend_rounded
from loramux_server.kernels.gpu.training.layers import MOST_BYTES, trained
from loramux_server.kernels.layers.packed_embedding import put


class TritonTraining:
    """`loramux_adapters.training.model.ops.TrainingOps` and its `AttendsRows`; each method is described there."""

    adapters = torch.bfloat16  # of a slot (loramux_adapters/lora/slots.py)

    def __init__(self, device: Device) -> None:
        self.kept = device.activations

    def matmul(self, a: torch.Tensor, b: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor:
        out = a.new_zeros(a.shape[0], b.shape[1], dtype=torch.float32) if add_to is None else add_to
        if a.dtype != torch.float32:  # in parts, as it is lifted to fp32
            for rows in _parts(a.shape[0], a.shape[1]):
                out[rows].addmm_(a[rows].float(), b)
        else:
            for columns in _parts(b.shape[1], b.shape[0]) if b.dtype != torch.float32 else [slice(None)]:
                out[:, columns].addmm_(a, b[:, columns].float())
        return out

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    def norm_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rate = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        scaled = dy * weight
        along = (scaled * x).mean(-1, keepdim=True) * rate.square()
        return scaled.addcmul_(x, along, value=-1).mul_(rate)

    def activation(self, x: torch.Tensor, *, gelu: bool) -> torch.Tensor:
        return functional.gelu(x, approximate="tanh") if gelu else functional.silu(x)

    def activation_gradient(self, dy: torch.Tensor, x: torch.Tensor, *, gelu: bool) -> torch.Tensor:
        aten = torch.ops.aten
        dx: torch.Tensor = aten.gelu_backward(dy, x, approximate="tanh") if gelu else aten.silu_backward(dy, x)
        return dx

    def gated(self, gate: torch.Tensor, up: torch.Tensor, *, gelu: bool) -> torch.Tensor:
        y = gate.new_empty(gate.shape, dtype=torch.float32)
        flat = y.view(-1, y.shape[-1]), gate.reshape(-1, y.shape[-1]), up.reshape(-1, y.shape[-1])
        for rows in _parts(*flat[0].shape):  # what is lifted to fp32 meanwhile stays small
            to, gates, ups = (x[rows] for x in flat)
            torch.mul(self.activation(gates.float(), gelu=gelu), ups, out=to)
        return y

    def gated_gradient(
        self, dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, gelu: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dy = dy.contiguous()
        d_gate, d_up = torch.empty_like(dy), torch.empty_like(dy)
        flat = [x.reshape(-1, dy.shape[-1]) for x in (dy, gate, up)]
        for rows in _parts(*flat[0].shape):
            slopes, gates, ups = (x[rows].float() for x in flat)
            torch.mul(self.activation(gates, gelu=gelu), slopes, out=d_up.view(-1, dy.shape[-1])[rows])
            d_gate.view(-1, dy.shape[-1])[rows] = self.activation_gradient(slopes * ups, gates, gelu=gelu)
        return d_gate, d_up

    def token_losses(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocabulary: int,
        *,
        factor: float,
        softcap: float,
        gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        padding = logits[:, vocabulary:]
        z = logits[:, :vocabulary].mul_(factor)
        bent = z.div_(softcap).tanh_() if softcap else None  # what is left of z, to the factor softcap
        if bent is not None:
            z = bent * softcap
        at = labels[:, None]
        sums = z.logsumexp(1, keepdim=True)
        losses = (sums - z.gather(1, at))[:, 0]
        correct = z.argmax(1) == labels
        if gradient:
            slopes = (z.sub_(sums) if bent is None else z - sums).exp_()
            slopes.scatter_add_(1, at, slopes.new_full((1, 1), -1.0).expand_as(at))
            if bent is not None:
                slopes.mul_(1 - bent.square())
            logits[:, :vocabulary] = slopes.mul_(factor)
            padding.zero_()
        return losses.double(), correct

    def attend_rows(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: PackedRows, params: LayerAttention
    ) -> torch.Tensor:
        return attend_rounded(q, k, v, rows, params, self.kept)


def _parts(count: int, width: int) -> list[slice]:
    """Of `count` rows of `width` numbers, as many at a time as fit MOST_BYTES in fp32."""
    together = max(1, MOST_BYTES // (4 * max(1, width)))
    return [slice(first, first + together) for first in range(0, count, together)]


@torch.no_grad()
def train_on_triton(model: nn.Module, device: Device) -> TritonTraining:
    """Gives every linear layer of a base that lies on the NF4 kernels a gradient for its input, in place."""
    for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        put(model, layer, trained(layer, device))
    return TritonTraining(device)
