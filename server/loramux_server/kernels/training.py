"""What training computes besides the products with the base's weights: on the compiled CPU kernels, or on Triton's.

On the CPU (csrc/exact/) all of it is fp32, with the same bits on every instruction set and for every number of threads.
gpu/training/ has what a graphics processor does.
"""

from __future__ import annotations

import ctypes

import torch
from torch import nn

from loramux_adapters.device.device import Device
from loramux_adapters.training.model.ops import TrainingOps
from loramux_server.kernels.compiled.abi import FloatMatrix, TrainingHeads, TrainingRows
from loramux_server.kernels.compiled.library import Compiled
from loramux_server.kernels.layers.nf4_linear import NF4Linear


class CompiledTraining:
    """`loramux_adapters.training.model.ops.TrainingOps`, compiled; each method is described there."""

    kept = adapters = torch.float32

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled

    def matmul(self, a: torch.Tensor, b: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.empty(a.shape[0], b.shape[1]) if add_to is None else add_to
        assert out.stride(1) == 1 and {a.dtype, b.dtype, out.dtype} == {torch.float32}
        left, right = (FloatMatrix(x.data_ptr(), *x.stride()) for x in (a, b))
        self._call(
            "matmul",
            *(out.data_ptr(), out.stride(0), ctypes.addressof(left), ctypes.addressof(right)),
            *(a.shape[0], b.shape[1], a.shape[1], int(add_to is not None)),
        )
        return out

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x, dim = x.contiguous(), weight.shape[0]
        y = torch.empty_like(x)
        self._call("rms_norm", *(t.data_ptr() for t in (y, x, weight)), x.numel() // dim, dim, eps)
        return y

    def norm_gradient(self, dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        dy, x, dim = dy.contiguous(), x.contiguous(), weight.shape[0]
        dx = torch.empty_like(x)
        self._call("norm_gradient", *(t.data_ptr() for t in (dx, dy, x, weight)), x.numel() // dim, dim, eps)
        return dx

    def activation(self, x: torch.Tensor, *, gelu: bool) -> torch.Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        self._call("activation", y.data_ptr(), x.data_ptr(), None, x.numel(), int(gelu))
        return y

    def activation_gradient(self, dy: torch.Tensor, x: torch.Tensor, *, gelu: bool) -> torch.Tensor:
        dy, x = dy.contiguous(), x.contiguous()
        dx = torch.empty_like(x)
        self._call("activation", dx.data_ptr(), x.data_ptr(), dy.data_ptr(), x.numel(), int(gelu))
        return dx

    def gated(self, gate: torch.Tensor, up: torch.Tensor, *, gelu: bool) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        size = (gate.numel() // gate.shape[-1], gate.shape[-1], gate.shape[-1])
        self._call("gate", *(t.data_ptr() for t in (y, gate, up)), *size, int(gelu))
        return y

    def gated_gradient(
        self, dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, *, gelu: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        tensors = (d_gate, d_up, dy, gate, up)
        self._call("gate_gradient", *(t.data_ptr() for t in tensors), dy.numel(), int(gelu))
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
        rows, padded = logits.shape
        losses, correct = torch.empty(rows, dtype=torch.float64), torch.empty(rows, dtype=torch.bool)
        assert logits.is_contiguous() and labels.dtype == torch.int64 and bool((labels < vocabulary).all())
        self._call(
            "loss",
            *(tensor.data_ptr() for tensor in (logits, losses, correct, labels.contiguous())),
            *(rows, vocabulary, padded, factor, softcap, int(gradient)),
        )
        return losses, correct

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: torch.Tensor,
        *,
        scaling: float,
        softcap: float,
        window: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, stats = torch.empty_like(q), torch.empty(*q.shape[:2], 2)
        places, heads = _described(q, k, rows, scaling, softcap, window)
        self._call("attend", *(t.data_ptr() for t in (out, stats, q, k, v)), *map(ctypes.addressof, (places, heads)))
        return out, stats

    def attend_gradient(
        self,
        d_out: torch.Tensor,
        saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        rows: torch.Tensor,
        *,
        scaling: float,
        softcap: float,
        window: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v, out, stats = saved
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        places, heads = _described(q, k, rows, scaling, softcap, window)
        given = torch.empty(places.count * places.shared * 2 * k[0].numel())
        tensors = (d_q, d_k, d_v, given, d_out.contiguous(), out, stats, q, k, v)
        self._call("attend_gradient", *(t.data_ptr() for t in tensors), *map(ctypes.addressof, (places, heads)))
        return d_q, d_k, d_v

    def _call(self, name: str, *arguments: object) -> None:
        function = self._compiled.function(f"loramux_exact_{name}")
        function(*arguments, self._compiled.isa, torch.get_num_threads())


def _described(
    q: torch.Tensor, k: torch.Tensor, rows: torch.Tensor, scaling: float, softcap: float, window: int
) -> tuple[TrainingRows, TrainingHeads]:
    """The structures point into `rows`."""
    assert rows.is_contiguous() and rows.dtype == torch.int64
    starts, lengths, firsts = (rows[place].data_ptr() for place in range(3))
    places = TrainingRows(starts, lengths, firsts, rows.shape[1], int(rows[2].max()))
    return places, TrainingHeads(q.shape[1], k.shape[1], q.shape[2], window, scaling, softcap)


def training_kernels(model: nn.Module, device: Device) -> TrainingOps | None:
    """For a base whose layers run on kernels of ours, those that train it; None for another, which PyTorch trains.

    Layers in Triton's form are changed in place: they get gradients for their inputs.
    """
    for module in model.modules():
        if isinstance(module, NF4Linear):
            return CompiledTraining(module.compiled)
        if hasattr(module, "nf4"):  # such a layer was made by Triton's kernels, so these can be imported
            from loramux_server.kernels.gpu.training.operations import train_on_triton

            return train_on_triton(model, device)
    return None
