"""AdamW over A and B with its state as named tensors, so that a checkpoint needs no pickle; learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loramux_adapters.device.choice import device_at
from loramux_adapters.device.device import Device
from loramux_adapters.errors import CheckpointError
from loramux_adapters.training.recipe import Recipe

BETAS = (0.9, 0.999)
EPSILON = 1e-8
PREFIX = "optimizer"
SMALLEST_8_BIT, BLOCK = 4096, 256  # of bitsandbytes: weights of a tensor, weights that share a scale
_TRIAL_RATE, _TRIAL_NEAR = 1e-3, 0.1


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], recipe: Recipe, device: Device | None = None
) -> torch.optim.Optimizer:
    """AdamW in fp32, or bitsandbytes' AdamW with moments in 8 bits where the device's layout has them and it runs.

    `device`: where the parameters lie; None: by their tensors.
    """
    values = list(parameters.values())
    options: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": BETAS,
        "eps": EPSILON,
        "weight_decay": recipe.weight_decay,
    }
    device = device or device_at(values[0].device)
    if not device.layout.moments_8_bit or why_not_8_bit(device):
        return torch.optim.AdamW(values, fused=True, **options)
    return _adamw_8_bit(values, options)


def state_bytes(parameters: Mapping[str, nn.Parameter], device: Device) -> int:
    """Bytes that the optimizer will keep: two moments of each weight, in fp32, or in 8 bits in tensors not small."""
    total, in_8_bit = 0, device.layout.moments_8_bit and not why_not_8_bit(device)
    for parameter in parameters.values():
        count = parameter.numel()
        total += 2 * (count + 4 * -(-count // BLOCK) if in_8_bit and count >= SMALLEST_8_BIT else 4 * count)
    return total


def why_not_8_bit(device: Device) -> str:
    """Why the moments are kept in fp32 on a device whose layout has 8 bits, found by a trial; empty where they are not.

    The trial: two steps of some numbers, beside PyTorch's AdamW in fp32.
    """
    options: dict[str, Any] = {"lr": _TRIAL_RATE, "betas": BETAS, "eps": EPSILON, "weight_decay": 0.0}
    random = torch.Generator().manual_seed(0)
    ours, theirs = (nn.Parameter(device.put(torch.zeros(SMALLEST_8_BIT))) for _ in range(2))
    gradients = [device.put(torch.randn(SMALLEST_8_BIT, generator=random)) for _ in range(2)]
    try:
        both = ((ours, _adamw_8_bit([ours], options)), (theirs, torch.optim.AdamW([theirs], **options)))
        for parameter, optimizer in both:
            for gradient in gradients:
                parameter.grad = gradient
                optimizer.step()
    except (ImportError, RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
        return f"bitsandbytes' 8-bit AdamW does not run on it: {(str(error).splitlines() or [type(error).__name__])[0]}"
    off = float((ours - theirs).detach().norm() / theirs.detach().norm())
    return "" if off < _TRIAL_NEAR else f"bitsandbytes' 8-bit AdamW is off by {off:.0%} there"


def _adamw_8_bit(values: list[nn.Parameter], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """In the device's own memory: the moments of an adapter are small, and paged memory is slow once it moves."""
    from bitsandbytes.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(values, **options)
    return made


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def read_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, int | float]]:
    """The state as tensors and as numbers, both under `optimizer/<what>/<parameter>`; empty before the first step."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, int | float] = {}
    for name, parameter in parameters.items():
        for what, value in optimizer.state[parameter].items():
            key = f"{PREFIX}/{what}/{name}"
            if isinstance(value, torch.Tensor):
                tensors[key] = value.detach().cpu().contiguous().clone()  # bitsandbytes shares its tables
            else:
                numbers[key] = value
    return tensors, numbers


def write_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, int | float],
) -> None:
    """The inverse of `read_state`. Raises CheckpointError if the state is not one of these parameters."""
    if not any(key.startswith(PREFIX + "/") for key in [*tensors, *numbers]):
        return
    for index, (name, parameter) in enumerate(parameters.items()):
        state = _fresh_state(optimizer, parameter, index)
        for what, value in state.items():
            key = f"{PREFIX}/{what}/{name}"
            found = tensors.get(key) if isinstance(value, torch.Tensor) else numbers.get(key)
            if found is None or (isinstance(found, torch.Tensor) and found.shape != value.shape):
                raise CheckpointError(
                    f"the checkpoint holds no {what} of {name} as this optimizer keeps it; was it written on another "
                    "kind of device?"
                )
            if isinstance(found, torch.Tensor):
                value.copy_(found)
            else:
                state[what] = found
        optimizer.state[parameter] = state


def _fresh_state(optimizer: Any, parameter: nn.Parameter, index: int) -> dict[str, Any]:
    """What the optimizer keeps of a parameter, as it is before the first step: the buffers to copy into."""
    if hasattr(optimizer, "init_state"):  # bitsandbytes, whose buffers may be paged and must be its own
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
        state: dict[str, Any] = dict(optimizer.state[parameter])
        # Its tables of values are shared by all parameters and the same in every run.
        return state
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def total_steps(steps_per_epoch: int, recipe: Recipe) -> int:
    """Optimizer steps of the whole training: `max_steps`, or else what `epochs` takes, at least one."""
    return recipe.max_steps or max(1, math.ceil(recipe.epochs * steps_per_epoch - 1e-9))


def warmup_steps(steps: int, recipe: Recipe) -> int:
    """Steps in which the rate rises; the last of them has the recipe's peak."""
    return min(steps, math.ceil(recipe.warmup * steps - 1e-9))


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """The rate of a step, counted from 0, of `steps`. None has the rate 0, which would be a step for nothing."""
    rising = warmup_steps(steps, recipe)
    if step < rising:
        return recipe.learning_rate * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)  # from 0 to just below 1
    if recipe.schedule == "constant":
        return recipe.learning_rate
    if recipe.schedule == "linear":
        return recipe.learning_rate * (1 - done)
    return recipe.learning_rate * (1 + math.cos(math.pi * done)) / 2
