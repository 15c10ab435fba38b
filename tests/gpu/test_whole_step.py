"""A whole step of ours on a device, as the engine runs it: near transformers in fp32, equal bits, graphs, uploads.

On a CUDA device by `make test-gpu`; tests/test_gpu_tests.py runs it on the emulated one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_places import EMULATED, device_here

from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.lora_linear import linears
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_adapters.lora.weights import load_host_adapter
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.sequence import Batch, SamplingParams, ScheduledSequence, SlotLoad
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from loramux_server.kernels.choice import choose_kernels
from support.adapter_files import write_adapter
from support.decoders import random_model, slow_twin
from support.stepping import Stepper, relative_difference

FAMILIES = ["Llama 3"] if EMULATED else ["Llama 3", "Qwen3", "Gemma 2", "Gemma 3", "Phi-4", "Granite", "OLMo 2"]
SMALL = {  # the interpreter is slow
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 300,
}
NEAR = 0.03  # of the logits' spread: bf16 between kernels, the residual stream in fp32
GRAPH_BYTES = 1 << 30
STEPS = SchedulerConfig(max_num_seqs=3, max_batch_tokens=64, max_background_tokens=1, max_scored_tokens=24)
LENGTHS = (37, 3, 18)
SLOTS: tuple[tuple[ScaledSlot, ...], ...] = (
    (),
    (ScaledSlot(Slot(0, 8)),),
    (ScaledSlot(Slot(0, 8), 0.5), ScaledSlot(Slot(16, 16), -0.7)),
)
RANKS = {Slot(0, 8): 8, Slot(16, 16): 12}
SAMPLED = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, max_tokens=12, seed=7)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(300, (length,), generator=generator).tolist() for length in LENGTHS]


class Served:
    """A random model on the device, with its adapters in host memory and in their slots."""

    def __init__(self, family: str, directory: Path) -> None:
        self.device = device_here()
        model = random_model(family, **(SMALL if EMULATED else {}))
        self.twin = slow_twin(model)
        wide = {path: (layer.in_features, layer.out_features) for path, layer in linears(model)}
        with self.device.used():
            kernels = choose_kernels(self.device)
            kernels.lay_out(model)
            kernels.use_ops(model)
            self.stepper = Stepper(model, device=self.device, blocks=64, rows=64, graph_bytes=GRAPH_BYTES, config=STEPS)
        self.runner: Any = self.stepper.runner
        self.adapters: dict[Slot, HostAdapter] = {}
        for slot, rank in RANKS.items():
            files = write_adapter(directory / f"rank-{rank}", wide, rank=rank, seed=rank, std_b=0.2)
            self.adapters[slot] = load_host_adapter(files)
            self.stepper.host[f"rank-{rank}"] = self.adapters[slot]
            self.load(slot)

    def load(self, slot: Slot) -> None:
        with self.device.used():
            self.stepper.load(slot, self.adapters[slot])

    def sequence(self, index: int, params: SamplingParams = GREEDY) -> EngineSequence:
        return self.stepper.sequence(f"s{index}", prompts()[index], SLOTS[index], params)

    def logits(self, which: list[int], decoded: int) -> list[torch.Tensor]:
        """[1 + decoded, vocabulary] of each sequence: of the prompts' last tokens, and of tokens fed one by one."""
        sequences = [self.sequence(index) for index in which]
        found: list[list[torch.Tensor]] = [[] for _ in which]
        with self.device.used(), torch.inference_mode():
            for step in range(1 + decoded):
                counts = [1 if step else len(sequence.prompt) for sequence in sequences]
                logits = self.device.take(self.stepper.logits(list(zip(sequences, counts, strict=True))))
                for rows, row, sequence in zip(found, logits, sequences, strict=True):
                    rows.append(row.clone())
                    sequence.output.append(5 + step)
        for sequence in sequences:
            self.stepper.release(sequence)
        return [torch.stack(rows) for rows in found]

    def replies(
        self, which: list[int], params: SamplingParams, tokens: int, loads: list[SlotLoad] | None = None
    ) -> Any:
        """Tokens of each reply; each step is started before the answers of the one before are read, as an engine does.

        loads: of the second step.
        """
        sequences = [self.sequence(index, params) for index in which]
        before: Any = None
        for step in range(tokens):
            rows = [
                ScheduledSequence(sequence, 1 if step else len(sequence.prompt), samples=True, follows=step > 0)
                for sequence in sequences
            ]
            rows.sort(key=lambda row: row.sequence.slots)
            running = self.runner.start(Batch(rows, list(loads or ()) if step == 1 else []))
            assert running.ahead
            for row in rows:
                row.sequence.num_computed += row.num_tokens
            if before is not None:
                _read(before)
            before = rows, running
        _read(before)
        for sequence in sequences:
            self.stepper.release(sequence)
        return [sequence.output for sequence in sequences]


def _read(started: Any) -> None:
    rows, running = started
    for row, result in zip(rows, running.results(), strict=True):
        row.sequence.output.append(result.token_id)


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield Served(request.param, tmp_path_factory.mktemp("adapters"))


def test_a_step_is_one_of_ours_and_a_graph(served: Served) -> None:
    assert served.runner.why_by_modules == ""
    assert served.runner.decoder.graphs is not None, "decode steps are graphs"
    assert served.runner.decoder.graphs.equal_bits


def test_logits_are_near_those_of_transformers_in_fp32_on_the_same_weights(served: Served) -> None:
    (got,) = served.logits([0], decoded=4)
    ids = torch.tensor([[*prompts()[0], 5, 6, 7, 8]])
    with torch.no_grad():
        expected = served.twin(input_ids=ids, use_cache=False).logits[0, LENGTHS[0] - 1 :]
    assert relative_difference(got, expected) < NEAR


def test_rows_have_their_bits_alone_and_in_company(served: Served) -> None:
    together = served.logits([0, 1, 2], decoded=3)
    for index in range(3):
        (alone,) = served.logits([index], decoded=3)
        assert torch.equal(alone, together[index])
    assert not torch.equal(together[1], together[0])


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_replies_of_steps_started_ahead_are_those_of_steps_waited_for(served: Served, params: SamplingParams) -> None:
    ahead = served.replies([0, 1, 2], params, tokens=4)
    graphs, served.runner.decoder.graphs = served.runner.decoder.graphs, None
    try:
        launched = served.replies([2, 0], params, tokens=4)
    finally:
        served.runner.decoder.graphs = graphs
    assert all(len(reply) == 4 for reply in ahead)
    assert launched == [ahead[2], ahead[0]]


def test_an_adapter_that_is_copied_while_steps_run_changes_no_other_reply(served: Served) -> None:
    expected = served.replies([0, 1], GREEDY, tokens=5)
    elsewhere = SlotLoad(Slot(32, 16), "rank-12")
    assert served.replies([0, 1], GREEDY, tokens=5, loads=[elsewhere]) == expected
    again = served.replies([0, 1], GREEDY, tokens=5)
    assert again == expected
