"""Drives a ModelRunner by hand, a sequence or a batch at a time, where a test wants no scheduler in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.device import Device
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.lora_linear import AdapterSlots, head_path
from loramux_adapters.lora.ops import AddLora
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_server.engine.build import limits_of
from loramux_server.engine.model_runner import ModelRunner
from loramux_server.engine.sampler import Sampler
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.sequence import Batch, SamplingParams, ScheduledSequence, SlotLoad, TokenLogprob
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from loramux_server.kernels.attention.kv_cache import BLOCK_SIZE, KVCache
from loramux_server.kernels.attention.paged_attention import Attend, probe_kv_shape
from loramux_server.kernels.choice import choose_kernels

CPU = CpuDevice()
STEPS = SchedulerConfig(max_num_seqs=32, max_batch_tokens=512)
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, logprobs=0)


def told(logits: torch.Tensor, token: int, top: int = 0) -> TokenLogprob:
    """What a sampler alone with these logits [vocabulary] reports of a token and of the `top` likeliest."""
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=top, forced=(token,))
    row = ScheduledSequence(EngineSequence("told", [0], params), 1, samples=True)
    found = Sampler(choose_kernels(CPU).sampling).results(logits[None], [row])[0].logprob
    assert found is not None
    return found


class Stepper:
    """A runner with blocks to give away. `host` maps versions to adapters, as the host cache would."""

    def __init__(
        self,
        model: nn.Module,
        *,
        rows: int = 256,
        blocks: int = 256,
        attend: Attend | None = None,
        add_lora: AddLora | None = None,
        device: Device = CPU,
        kernels: str | None = None,
        graph_bytes: int = 0,
        config: SchedulerConfig = STEPS,
        module_of: Callable[[str], str | None] = lambda path: path,
        affine: bool | None = None,
    ) -> None:
        """`kernels`: another set than the device's own; `attend`, `add_lora`: other parts than the set's.

        The cache holds floats where `attend` is given. `graph_bytes`: that graphs of steps may take; 0 captures none.
        `config`: the largest step follows from it. `module_of`: as a base has it.
        `affine`: slots have room for gain and shift; None: on the CPU alone.
        """
        whole_numbers = attend is None and choose_kernels(device, kernels).whole_numbers
        shape = probe_kv_shape(model, device, whole_numbers=whole_numbers)
        chosen = choose_kernels(device, kernels, shape)
        if attend is not None or add_lora is not None:
            chosen = replace(
                chosen,
                attend=attend or chosen.attend,
                add_lora=add_lora or chosen.add_lora,
                compile_step=None,
            )
        self.kernels, self.device = chosen, device
        self.host: dict[str, HostAdapter] = {}
        self.slots = AdapterSlots(
            model,
            rows,
            chosen.add_lora,
            chosen.copy_slot,
            head=head_path(model),
            device=device,
            module_of=module_of,
            affine=device.is_host if affine is None else affine,
        )
        self.runner = ModelRunner(
            model,
            slots=self.slots,
            cache=KVCache(shape, blocks, device, spare=graph_bytes > 0 and chosen.spare_block),
            kernels=self.kernels,
            host_adapter=self.host.get,
            device=device,
            limits=limits_of(config, blocks, graph_bytes),
        )
        self._free = list(range(blocks))

    def load(self, slot: Slot, adapter: HostAdapter) -> None:
        self.slots.load(slot, adapter)

    def sequence(
        self,
        name: str,
        prompt: Sequence[int],
        slot: Slot | tuple[ScaledSlot, ...] | None = None,
        params: SamplingParams = GREEDY,
    ) -> EngineSequence:
        """`slot`: None for the base, an adapter's slot, or those of several with their factors."""
        sequence = EngineSequence(name, list(prompt), params)
        sequence.slots = (ScaledSlot(slot),) if isinstance(slot, Slot) else slot or ()
        sequence.blocks = [self._free.pop() for _ in range(-(-sequence.max_total // BLOCK_SIZE))]
        return sequence

    def release(self, sequence: EngineSequence) -> None:
        self._free += sequence.blocks

    def logits(self, rows: Sequence[tuple[EngineSequence, int]], loads: Sequence[SlotLoad] = ()) -> torch.Tensor:
        """One forward of (sequence, tokens to feed): logits of every row, whose tokens then count as computed."""
        scheduled = [ScheduledSequence(sequence, count, samples=True) for sequence, count in rows]
        scheduled.sort(key=lambda row: row.sequence.slots)
        order = {id(row.sequence): index for index, row in enumerate(scheduled)}
        logits = self.runner.forward(Batch(scheduled, list(loads)))
        for sequence, count in rows:
            sequence.num_computed += count
        return logits[[order[id(sequence)] for sequence, _ in rows]]

    def prefill(self, sequence: EngineSequence, chunk: int) -> torch.Tensor:
        """Logits [vocabulary] after the prompt, fed in chunks."""
        logits = torch.empty(0)
        while sequence.num_computed < len(sequence.prompt):
            count = min(chunk, len(sequence.prompt) - sequence.num_computed)
            logits = self.logits([(sequence, count)])[0]
        return logits

    def greedy(self, sequence: EngineSequence, count: int, chunk: int = 1000) -> list[torch.Tensor]:
        """Feeds the prompt, then `count` - 1 chosen tokens one by one; the logits of each choice."""
        seen = [self.prefill(sequence, chunk)]
        sequence.output.append(int(seen[0].argmax()))
        while len(sequence.output) < count:
            seen.append(self.logits([(sequence, 1)])[0])
            sequence.output.append(int(seen[-1].argmax()))
        return seen


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Root mean square difference as a share of the standard deviation of `theirs`."""
    ours, theirs = ours.float(), theirs.float()
    return float((ours - theirs).square().mean().sqrt() / theirs.std())
