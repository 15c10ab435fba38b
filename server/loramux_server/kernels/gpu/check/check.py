"""Every kernel of a step against its reference on the card that will run it; what is wrong there is replaced.

Kernels run on the base's own weights and shapes, with the few sizes of tiles that steps have, and each distinct shape
once. Nothing of a step is touched: inputs, caches, adapters and tables are made for the trials.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch

from loramux_adapters.device.device import Device
from loramux_adapters.errors import DeviceFull
from loramux_server.kernels.gpu.check import attention_trials, product_trials, rows_trials, sampling_trials
from loramux_server.kernels.gpu.check.bench import Bench
from loramux_server.kernels.gpu.check.trial import KernelTrial, KernelVerdict, judge
from loramux_server.kernels.gpu.check.usable import first_line
from loramux_server.kernels.gpu.step.decoder import GpuDecoder
from loramux_server.kernels.gpu.step.operations import NAMES, PLAIN, Operations

Progress = Callable[[str], None]

_TRIALS: dict[str, Callable[[Bench], Iterator[KernelTrial]]] = {
    "resolve_tokens": rows_trials.resolve_tokens,
    "embed": rows_trials.embed,
    "own_embeddings": rows_trials.own_embeddings,
    "add_norm": rows_trials.add_norm,
    "nf4_product": product_trials.nf4_product,
    "dense_product": product_trials.dense_product,
    "add_lora": product_trials.add_lora,
    "rotate_and_write": attention_trials.rotate_and_write,
    "attend": attention_trials.attend,
    "gather_rows": rows_trials.gather_rows,
    "gate": rows_trials.gate,
    "own_logits": rows_trials.own_logits,
    "finish_logits": rows_trials.finish_logits,
    "sample": sampling_trials.sample,
    "change": sampling_trials.change,
    "adopt": sampling_trials.adopt,
}
_FEW = "which costs each step a few small operations more"
_COSTS = {
    "resolve_tokens": _FEW,
    "embed": _FEW,
    "own_embeddings": _FEW,
    "add_norm": "which costs each layer some ten small operations more",
    "nf4_product": "so each step writes the base's weights out in fp32 first, and moves some 28 bytes for a weight "
    "instead of half a byte",
    "dense_product": "so each step widens the output head to fp32, and moves 10 bytes for a weight of it instead of 2",
    "add_lora": "so the host reads each layer's adapters and waits for the device, in steps with adapters",
    "rotate_and_write": "which costs each layer some thirty small operations more",
    "attend": "so each layer gathers keys and values, and the host waits for the device in each",
    "gather_rows": _FEW,
    "gate": "which costs each layer a few small operations in fp64 more",
    "own_logits": "which copies all logits of steps with adapters of the vocabulary",
    "finish_logits": _FEW,
    "sample": "so each row of logits is sorted to choose its token",
    "change": "which costs steps with penalties, biases or grammars some ten small operations for each row more",
    "adopt": _FEW,
}


@dataclass(frozen=True, slots=True)
class CheckedOperations:
    """
    Attributes:
        operations: what steps can be made of here.
        same_bits: each kernel gave a row the same bits alone and in company. Of what PyTorch computes instead it is not
            known.
        lines: for the start report; empty where every kernel agrees.
        seconds: that it took.
    """

    operations: Operations
    same_bits: bool
    lines: tuple[str, ...]
    seconds: float


def check_operations(
    device: Device, decoder: GpuDecoder, *, progress: Progress | None = None, only: Collection[str] = NAMES
) -> CheckedOperations:
    """Tries the operations that `decoder` has, and says what it should have instead.

    Args:
        progress: is told what is tried next. At the first start on a machine it takes the time of compiling kernels.
        only: names of the operations that are tried.
    Raises:
        DeviceFull: there is no room to try them. Nothing else, whatever a kernel does.
    """
    started = time.perf_counter()
    findings = _Findings(decoder.operations)
    with device.used(), torch.inference_mode():
        bench = Bench(device, decoder)
        for name in (name for name in NAMES if name in only):
            if not findings.device_answers:
                break
            _try(bench, name, findings, progress)
    return CheckedOperations(
        findings.operations, findings.same_bits, tuple(findings.report()), time.perf_counter() - started
    )


def _try(bench: Bench, name: str, findings: _Findings, progress: Progress | None) -> None:
    """All shapes of one operation, up to the first that is wrong."""
    what = ""
    try:
        for trial in _TRIALS[name](bench):
            what = trial.what
            if progress is not None:
                progress(f"trying {name}: {what}")
            verdict = judge(trial, getattr(findings.operations, name))
            if not verdict.agrees:
                findings.replace(name, f"{_differs(verdict)} ({what})")
                return
            if not verdict.same_bits:
                findings.uneven(name, what)
    except (DeviceFull, torch.OutOfMemoryError) as error:  # says nothing of the kernel
        raise DeviceFull(f"there is no room on {bench.device} to try {name} ({what}): {first_line(error)}") from error
    except Exception as error:  # whatever a compiler, a driver or a card says
        findings.replace(name, f"{first_line(error)}" + (f" ({what})" if what else ""))
        try:
            bench.device.synchronize()
        except Exception as lost:
            findings.lose(name, lost)


def _differs(verdict: KernelVerdict) -> str:
    if verdict.difference == float("inf"):
        return "it gives numbers that are not finite, or misses some that are not"
    return f"it differs from its reference by {verdict.difference:.2g} of a result's size"


class _Findings:
    """What is known so far.

    Attributes:
        device_answers: False after an error that makes the device refuse everything.
    """

    def __init__(self, operations: Operations) -> None:
        self.operations = operations
        self.same_bits = self.device_answers = True
        self._lines: list[str] = []

    def replace(self, name: str, why: str) -> None:
        self.operations = self.operations.with_plain(name)
        self.same_bits = False
        self._lines.append(f"{name} runs on PyTorch's operations: {why}; {_COSTS[name]}")

    def uneven(self, name: str, what: str) -> None:
        self.same_bits = False
        self._lines.append(f"{name} rounds by the rows beside a row ({what}): replies may differ alone and in company")

    def lose(self, name: str, error: Exception) -> None:
        self.operations, self.device_answers = PLAIN, False
        self._lines.append(
            f"the device answers nothing after {name} ({first_line(error)}): start again, with LORAMUX_KERNELS=cuda"
        )

    def report(self) -> list[str]:
        off = [] if self.operations.captures else ["steps are launched one by one, as no graph can hold them"]
        return [*self._lines, *off]
