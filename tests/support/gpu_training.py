"""A base on the Triton kernels in training, on any device; the same model in fp32, trained by peft and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.cuda import CudaDevice
from loramux_adapters.device.device import ON_CARD, Device
from loramux_adapters.training.data.batches import IGNORED, Row, TokenBatch
from loramux_adapters.training.model.model import LoraModel
from loramux_adapters.training.recipe import Recipe
from loramux_server.kernels.gpu.launch import Launch
from loramux_server.kernels.gpu.nf4 import BLOCK, Nf4Weights, nf4_dequantize_reference
from loramux_server.kernels.gpu.step.nf4_linear import TritonNF4Linear, pack
from loramux_server.kernels.gpu.training import layers
from loramux_server.kernels.layers.packed_embedding import put
from loramux_server.kernels.training import training_kernels
from support.decoders import random_model, slow_twin
from support.emulated import EmulatedDevice

VOCABULARY = 300  # no more than any tiny model has


class Interpreted(CpuDevice):
    """Triton's interpreter as a card: fp16, and everything is done at once."""

    layout, is_host, kernels = ON_CARD, False, "triton"

    @property
    def activations(self) -> torch.dtype:
        return torch.float16


def devices() -> list[Callable[[], Device]]:
    """What tests run on: a card where there is one; else Triton's interpreter, at once and as late as it may."""
    if torch.cuda.is_available():
        return [_card]
    return [Interpreted, EmulatedDevice]


def _card() -> Device:
    return CudaDevice(torch.device("cuda"))


def rows(count: int = 3, *, shared: int = 4, seed: int = 0) -> list[Row]:
    """Different lengths, one beginning; the last tokens but one are learned."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, VOCABULARY, (count + 1, 40), generator=generator).tolist()
    found = []
    for index in range(count):
        ids = draws[count][:shared] + draws[index][: 7 + 3 * index]
        found.append(Row(tuple(ids), tuple(len(ids) - 5 <= place < len(ids) - 1 for place in range(len(ids)))))
    return found


def base_on(device: Device, family: str, **changes: Any) -> tuple[Any, Any]:
    """A random base that lies on the device as the NF4 kernels read it; its slow twin in fp32 on the host."""
    model = random_model(family, **changes)
    twin = slow_twin(model)
    pack(model, device)
    return model, twin


def trained_on(device: Device, family: str, recipe: Recipe, **changes: Any) -> tuple[LoraModel, Any]:
    """With random A and B; and the slow twin of its base."""
    model, twin = base_on(device, family, **changes)
    made = LoraModel.build(model, recipe, ops=training_kernels(model, device), device=device)
    randomize(made.trainable, device)
    return made, twin


def randomize(trainable: dict[str, nn.Parameter], device: Device, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainable.values():
            drawn = size * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(device.put(drawn.bfloat16().float()))  # numbers that a slot holds as they are


def gradients(model: LoraModel, batch: list[Row], device: Device) -> tuple[float, dict[str, torch.Tensor]]:
    """The summed loss and its gradients, in host memory."""
    for parameter in model.trainable.values():
        parameter.grad = None
    loss = model.loss(TokenBatch.of(batch), grad_scale=1.0).loss_sum
    return loss, {name: device.take(p.grad).clone() for name, p in model.trainable.items() if p.grad is not None}


def by_peft(twin: Any, recipe: Recipe, batch: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    """The same by peft's layers, transformers' attention and plain autograd in fp32, a row at a time."""
    names = {path.rpartition(".")[2] for path, module in twin.named_modules() if isinstance(module, nn.Linear)}
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=int(recipe.alpha),
        target_modules=sorted(names - {"lm_head"}),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(twin, config)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    randomize(trainable, CpuDevice())
    place = next(twin.parameters()).device
    total = torch.zeros((), device=place)
    for row in batch:
        ids = torch.tensor([row.ids], device=place)
        labels = torch.tensor([token if learn else IGNORED for token, learn in zip(row.ids, row.learn, strict=True)])
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        total = total + nn.functional.cross_entropy(logits[:-1], labels[1:].to(place), reduction="sum")
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in trainable.items() if p.grad is not None}


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(left.double().flatten(), right.double().flatten(), dim=0))


class _Plain:
    """A kernel that is a function of the launch's arguments."""

    def __init__(self, compute: Callable[..., object]) -> None:
        self._compute = compute

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return self._compute


def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers' products in PyTorch's operations, for tests of what is around them: the interpreter is slow."""
    known: dict[int, tuple[Nf4Weights, torch.Tensor]] = {}

    def weight_of(w: Nf4Weights) -> torch.Tensor:
        if w.codes.data_ptr() not in known:
            weight = torch.empty(w.outputs, w.inputs)
            nf4_dequantize_reference(weight, Nf4Weights(w.codes.clone(), w.scales.clone()))
            known[w.codes.data_ptr()] = w, weight
        return known[w.codes.data_ptr()][1]

    def nf4_product(
        launch: Launch, y: torch.Tensor, x: torch.Tensor, w: Nf4Weights, sums: torch.Tensor, *, row_tiles: Any
    ) -> None:
        launch(_Plain(lambda y, x: y.copy_(x.float() @ weight_of(w).t())), (1,), y, x)

    def nf4_dequantize(launch: Launch, to: torch.Tensor, w: Nf4Weights) -> None:
        launch(_Plain(lambda to: to.copy_(weight_of(w))), (1,), to)

    def dense_product(
        launch: Launch, y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, sums: torch.Tensor, *, row_tiles: Any
    ) -> None:
        launch(_Plain(lambda y, x, w: y.copy_(x.float() @ w.float().t())), (1,), y, x, w)

    for function in (nf4_product, nf4_dequantize, dense_product):
        monkeypatch.setattr(layers, function.__name__, function)


def random_base(config: Any, device: Device) -> Any:
    """A Llama of this shape with random numbers, made where it lies: no weight is read, none is on the host."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    for layer in [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]:
        blocks, outputs = layer.in_features // BLOCK, layer.out_features
        codes = device.scratch((blocks, outputs, BLOCK // 2), torch.uint8).random_(0, 256)
        scales = device.scratch((blocks, outputs), torch.float32).uniform_(0.01, 0.03)
        put(model, layer, TritonNF4Linear(Nf4Weights(codes, scales), None, device))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                drawn = device.scratch(tuple(parameter.shape), device.activations)
                drawn = drawn.fill_(1) if parameter.dim() == 1 else drawn.normal_(0, 0.02)
                module._parameters[name] = nn.Parameter(drawn, requires_grad=False)
    rotary = type(model.model.rotary_emb)(config)
    model.model.rotary_emb = rotary
    for name, buffer in rotary.named_buffers():
        setattr(rotary, name, device.put(buffer))
    return model.eval()
