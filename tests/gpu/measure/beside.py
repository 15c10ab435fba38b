"""Decode steps of ours beside those of bitsandbytes' layers, of transformers, and of transformers with peft, in turn.

All compute on the same random weights in NF4. The sides:

- `ours`: a graph of a whole step.
- `bitsandbytes' layers`: nothing but the linear layers of the same model, in a graph: no step on them can be faster.
- `transformers`: its own code on these layers, with a cache that grows, as `generate` runs it.
- `transformers + peft`: the same with peft's layers, each row with its adapter by name.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import Device
from measure.ours import STRENGTH, OurSteps
from measure.part import Part
from measure.shapes import Shape, random_base
from measure.timing import interleaved

# in order of worth; with adapters only as far as time reaches
BASE_CASES = ((32, 0), (1, 0), (128, 0))
ADAPTER_CASES = ((32, 16), (1, 1), (128, 64))


def main() -> int:
    with torch.no_grad():  # no inference mode: peft says of parameters that they are trained, until it says otherwise
        return measure(Part(__doc__))


def measure(part: Part) -> int:
    device, shape = part.device, part.shape
    base_cases, adapter_cases = (((1, 0),), ((2, 2),)) if part.dry else (BASE_CASES, ADAPTER_CASES)
    free = device.memory().free
    # keys and values of the other side are copied whenever they grow
    base_cases, adapter_cases = (
        [case for case in cases if part.dry or shape.fits(*case, free, bases=3)]
        for cases in (base_cases, adapter_cases)
    )
    if not base_cases or not adapter_cases:
        print(f"{device.report()}: there is no room for two bases of this shape")
        return 1
    place = CpuDevice() if part.dry else device  # where libraries run that know nothing of an emulated device
    theirs = random_base(shape, place)
    with device.used():
        ours = OurSteps(
            random_base(shape, device),
            shape,
            device,
            rows=max(rows for rows, _ in (*base_cases, *adapter_cases)),
            adapters=max(count for _, count in adapter_cases),
        )
    if ours.decoder is None:
        print(f"there is no whole step on this device: {ours.why}")
        return 1
    lines: list[dict[str, Any]] = []

    def compare(case: tuple[int, int], sides: dict[str, Callable[[], Callable[[], None]]]) -> None:
        found = interleaved(
            device,
            {"ours": partial(ours.ready, *case), **sides},
            rounds=min(part.rounds, 5),
            times=1 if part.dry else 4,
        )
        lines.append(
            {"rows": case[0], "adapters": case[1], "ms": {side: asdict(times) for side, times in found.items()}}
        )
        part.write(cases=lines)
        part.say(f"{case}: " + ", ".join(f"{side} {times.median:.2f} ms" for side, times in found.items()))

    part.write(difference=difference(ours, theirs, device, place))
    for case in base_cases:
        compare(case, sides_without_adapters(theirs, shape, place, case[0]))
        gc.collect()
    adapted = WithPeft(theirs, shape, place)
    for case in adapter_cases:
        if not adapted.add_up_to(case[1], part.left):
            part.say(f"{case}: left out, there is no time to add {case[1]} adapters with peft")
            continue
        compare(case, {"transformers + peft": adapted.step(*case)})
        gc.collect()
    return 0


def difference(ours: OurSteps, theirs: Any, device: Device, place: Device) -> float:
    """Of logits of one row at its sequence's first position, ours from transformers', as a share of their spread."""
    tokens, heads, step, lora, head = ours.inputs(1, 0)
    first = replace(step, position=torch.zeros_like(step.position), runs=((0, 0, 1, 0),))
    with device.used():
        got = device.take(ours.decoder.forward(tokens, heads, first, lora, head)).float()
    expected = place.take(theirs(input_ids=place.put(torch.tensor([tokens])), use_cache=False).logits[0]).float()
    return float((got - expected).square().mean().sqrt() / expected.std())


def sides_without_adapters(
    model: Any, shape: Shape, device: Device, rows: int
) -> dict[str, Callable[[], Callable[[], None]]]:
    transformers = Stepping(model, shape, device, rows, {}).ready
    return {"transformers": transformers, "bitsandbytes' layers": layers_alone(model, device, rows)}


def layers_alone(model: Any, device: Device, rows: int) -> Callable[[], Callable[[], None]]:
    """All linear layers: a graph, or their calls where bitsandbytes does what a graph cannot hold."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    widths = {layer.in_features for layer in layers}
    x = {width: device.put(torch.randn(rows, width, dtype=torch.bfloat16, device=device.place)) for width in widths}

    def run() -> None:
        for layer in layers:
            layer(x[layer.in_features])

    try:
        replay, _ = device.capture(run)
    except Exception as error:  # of a library that is only compared with
        print(f"bitsandbytes' layers cannot be captured: {error}")
        return lambda: run

    def ready(_held: dict[int, torch.Tensor] = x) -> Callable[[], None]:
        return replay  # it reads them where they lie

    return ready


class Stepping:
    """transformers' own decode steps, one after the other on a cache that grows."""

    def __init__(self, model: Any, shape: Shape, device: Device, rows: int, more: dict[str, Any]) -> None:
        """`more`: keywords of each forward."""
        from transformers import DynamicCache

        self._model, self._more = model, more
        self._cache = DynamicCache()
        size = (rows, shape.kv_heads, shape.context, shape.head_dim)
        for layer in range(shape.layers):
            k, v = (device.put(torch.randn(size, dtype=torch.bfloat16, device=device.place)) for _ in range(2))
            self._cache.update(k, v, layer)
        self._tokens = device.put(torch.randint(shape.vocabulary, (rows, 1), device=device.place))

    def ready(self) -> Callable[[], None]:
        return self._step

    @torch.inference_mode()
    def _step(self) -> None:
        output = self._model(input_ids=self._tokens, past_key_values=self._cache, use_cache=True, **self._more)
        self._tokens = output.logits[:, -1:].argmax(-1)


class WithPeft:
    """The model under peft, with as many random adapters as were asked for so far."""

    def __init__(self, model: Any, shape: Shape, device: Device) -> None:
        self._base, self._shape, self._device = model, shape, device
        self._model: Any = None
        self._count = 0
        self._seconds = 0.0  # that the last one took

    def add_up_to(self, count: int, left: float) -> bool:
        """False, and none added, where that would take longer than half of the seconds that are left."""
        from peft import LoraConfig, get_peft_model

        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        while self._count < count:
            if (count - self._count) * self._seconds > left / 2:
                return False
            began = time.monotonic()
            config = LoraConfig(
                r=self._shape.rank, lora_alpha=self._shape.rank, target_modules=names, task_type="CAUSAL_LM"
            )
            name = f"a{self._count}"
            if self._model is None:
                self._model = get_peft_model(self._base, config, adapter_name=name, autocast_adapter_dtype=False)
                self._model.eval()
            else:
                self._model.add_adapter(name, config, autocast_adapter_dtype=False)
            self._fill(name)
            self._count += 1
            self._device.synchronize()
            self._seconds = time.monotonic() - began
            left -= self._seconds
        return True

    def _fill(self, adapter: str) -> None:
        """bf16 where the base lies, and not zeros, which would be an adapter that peft has not begun to train."""
        for name, parameter in self._model.named_parameters():
            if f".{adapter}." in name:
                numbers = torch.randn(parameter.shape, dtype=torch.bfloat16, device=self._device.place) * STRENGTH
                parameter.data = self._device.put(numbers)

    def step(self, rows: int, adapters: int) -> Callable[[], Callable[[], None]]:
        names = [f"a{row * adapters // rows}" for row in range(rows)]
        return Stepping(self._model, self._shape, self._device, rows, {"adapter_names": names}).ready


if __name__ == "__main__":
    sys.exit(main())
