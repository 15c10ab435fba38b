"""The model that is trained: a frozen base with LoRA layers, one call per part of a step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loramux_adapters.device.choice import device_at
from loramux_adapters.device.device import Device
from loramux_adapters.errors import RecipeError
from loramux_adapters.training.data.batches import TokenBatch
from loramux_adapters.training.model.adapter_directory import write_adapter
from loramux_adapters.training.model.compact_batch import CompactBatch
from loramux_adapters.training.model.exact_modules import use_exact_modules, use_fp32
from loramux_adapters.training.model.frozen_base import base_bytes, base_digest, base_elements
from loramux_adapters.training.model.fused_linear import fuse_lora_layers
from loramux_adapters.training.model.head_loss import HeadLoss, head_loss
from loramux_adapters.training.model.loftq import start_at_quantization_loss
from loramux_adapters.training.model.lora_layers import add_lora
from loramux_adapters.training.model.ops import TrainingOps
from loramux_adapters.training.model.packed_attention import use_packed_attention
from loramux_adapters.training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class StepLoss:
    """What a batch cost.

    Attributes:
        loss_sum: sum of the negative log-likelihoods of the learned tokens, in nats.
        tokens: learned tokens.
        correct: those of them that the model would have said.
    """

    loss_sum: float
    tokens: int
    correct: int


@dataclass(frozen=True, slots=True)
class Counts:
    """Sizes of what is in memory.

    Attributes:
        total: weights of base and adapter; a quantized one counts as the weight that it stands for.
        trainable: weights of the adapter.
        base_bytes_16bit: what the base would take in 16 bit.
        base_bytes: what it takes.
        adapter_bytes: of A and B as they are trained, in fp32.
    """

    total: int
    trainable: int
    base_bytes_16bit: int
    base_bytes: int
    adapter_bytes: int


class LoraModel:
    """The base with LoRA layers, in training. Build it with `build`; owned by the thread that trains.

    Everything between the layers is fp32 on a CPU, and with ops of its own; else it has the base's dtype.

    Attributes:
        trainable: A and B of every adapted layer under peft's names, in the model's order; fp32.
    """

    def __init__(
        self,
        peft_model: Any,
        recipe: Recipe,
        device: Device,
        ops: TrainingOps | None = None,
        head: HeadLoss | None = None,
    ) -> None:
        self._peft, self._device = peft_model, device
        self._ops, self._head = ops, head
        self._model: Any = peft_model.get_base_model()
        self._recipe = recipe
        self.trainable: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad
        }
        assert all("lora_" in name and p.dtype == torch.float32 for name, p in self.trainable.items())

    @classmethod
    def build(
        cls,
        base: nn.Module,
        recipe: Recipe,
        *,
        originals: Callable[[str], torch.Tensor] | None = None,
        ops: TrainingOps | None = None,
        device: Device | None = None,
    ) -> LoraModel:
        """Adds LoRA layers to a loaded base, which is changed in place and must have been loaded to be trained.

        Args:
            base: transformers' causal language model; its weights stay as they are.
            originals: module path -> 16-bit weight [out, in]; needed for init loftq.
            ops: what computes the rest beside the layers' own products; None leaves it to PyTorch.
            device: where the base lies; None: by its tensors.
        Raises:
            MemoryShort: the device has no room for the adapter.
            RecipeError: the recipe asks for layers that the base does not have, or for weights that are not at hand.
        """
        # A layer that may repack itself gives silently wrong gradients after the first forward in eval mode.
        assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in base.modules())
        if recipe.init == "loftq" and originals is None:
            raise RecipeError("init loftq needs the base's 16-bit weights, and they are not at hand; use init default")
        peft_model = add_lora(base, recipe)
        model: Any = peft_model.get_base_model()
        device = device or device_at(model.device)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data = device.put(parameter.data)
        if recipe.init == "loftq" and originals is not None:
            start_at_quantization_loss(model, originals)
        fuse_lora_layers(model, ops)
        use_packed_attention(model)
        if device.is_host or ops is not None:
            use_fp32(model)
        if ops is not None:
            use_exact_modules(model, ops, device)
        if recipe.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        return cls(peft_model, recipe, device, ops, None if ops is None else head_loss(model, ops, device))

    def loss(self, batch: TokenBatch, *, grad_scale: float) -> StepLoss:
        """Forward and backward: the gradients of (sum of token losses) * grad_scale are added to `.grad`."""
        if not batch.learned:
            return StepLoss(0.0, 0, 0)
        with self._training():
            # With dropout each row has zeros of its own, also in what it shares with others.
            total, outcome = self._forward(batch, share=not self._recipe.dropout)
            torch.autograd.backward(total * grad_scale)
        return outcome

    def evaluate(self, batch: TokenBatch) -> StepLoss:
        """The loss without gradients and without dropout; later steps are not changed by it."""
        if not batch.learned:
            return StepLoss(0.0, 0, 0)
        self._peft.eval()
        with torch.no_grad():
            return self._forward(batch, share=True)[1]

    def save(self, directory: Path, *, base_name: str, base_id: str, dtype: str) -> None:
        """Writes a directory that peft loads; `dtype` ("bfloat16" or "float32") is that of the tensors on disk."""
        write_adapter(
            directory,
            self._peft.peft_config["default"],
            self.trainable,
            base_name=base_name,
            base_id=base_id,
            dtype={"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype],
        )

    def counts(self) -> Counts:
        trainable = sum(parameter.numel() for parameter in self.trainable.values())
        elements = base_elements(self._peft)
        return Counts(
            total=elements + trainable,
            trainable=trainable,
            base_bytes_16bit=2 * elements,
            base_bytes=base_bytes(self._peft),
            adapter_bytes=sum(p.numel() * p.element_size() for p in self.trainable.values()),
        )

    def base_digest(self) -> str:
        """sha256 over raw codes, scales and every other frozen weight, as they lie in memory."""
        return base_digest(self._peft)

    def _forward(self, batch: TokenBatch, *, share: bool) -> tuple[torch.Tensor, StepLoss]:
        """The summed loss with its graph, and as numbers."""
        device = self._device
        compact = CompactBatch.of(batch, share=share)
        labels, learned = device.put(compact.labels), device.put(compact.learned)
        inputs = {
            "input_ids": device.put(compact.ids[None]),
            "position_ids": device.put(compact.positions[None]),
            "use_cache": False,
            "loramux_rows": compact.rows,
            "loramux_ops": self._ops,
        }
        if self._head is not None:
            states = getattr(self._model, self._model.base_model_prefix)(**inputs).last_hidden_state[0]
            total, loss, correct = self._head.of(states.index_select(0, learned), labels)
            return total, StepLoss(loss, len(labels), correct)
        logits = self._model(**inputs, logits_to_keep=learned).logits[0].float()
        total = nn.functional.cross_entropy(logits, labels, reduction="sum")
        correct = int((logits.detach().argmax(-1) == labels).sum())
        return total, StepLoss(float(total.detach()), len(labels), correct)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Training mode, but of the dropouts only the adapters' own; the garbage collector rests.

        A step makes and drops thousands of objects that all go with their last reference. Searched again and again,
        with the model's own, they took a twentieth of its time.
        """
        self._peft.train()
        for name, module in self._peft.named_modules():
            if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
                module.eval()
        rests = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if rests:
                gc.enable()
