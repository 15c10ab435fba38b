"""Captured steps: whatever differs between two steps reaches a replay, and who cannot be captured runs as before.

tests/gpu tries CUDA graphs on a device. Here the emulated device captures: it writes down every tensor operation, and a
replay does them again on the same tensors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loramux_adapters.device.cuda import CudaDevice
from loramux_adapters.lora.host_cache import HostAdapter
from loramux_adapters.lora.slots import ScaledSlot, Slot
from loramux_server.engine import step_graphs
from loramux_server.engine.scheduling.sequence import Batch, ScheduledSequence
from loramux_server.engine.scheduling.sequence import Sequence as EngineSequence
from loramux_server.engine.step_graphs import Capture, Shape, StepGraphs, shape_of
from loramux_server.kernels import choice
from loramux_server.kernels.attention.kv_cache import KVShape
from loramux_server.kernels.attention.varlen_attention import VarlenAttend
from loramux_server.kernels.choice import GraphKernels
from loramux_server.kernels.grouped_lora import GroupedAddLora
from support.emulated import EmulatedDevice
from support.slow_varlen import slow_varlen
from support.stepping import CPU, Stepper, relative_difference
from support.tiny_models import tiny_config

SLOTS = [Slot(0, 8), Slot(8, 8), Slot(16, 16), Slot(32, 16)]


@torch.library.custom_op("loramux_tests::varlen", mutates_args=())
def varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: Sequence[int],
    gqa: bool,
    used: torch.Tensor,
    tables: torch.Tensor,
) -> torch.Tensor:
    """One operation, as the library's kernel is: what it reads of its tensors, it reads when it runs."""
    return slow_varlen(
        q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=(window[0], window[1]), enable_gqa=gqa,
        seqused_k=used, block_table=tables, num_splits=1,
    )  # fmt: skip


def kernel(q: torch.Tensor, *args: Any, window_size: Any, enable_gqa: bool, num_splits: int, **more: Any) -> Any:
    return varlen(q, *args, more["scale"], list(window_size), enable_gqa, more["seqused_k"], more["block_table"])


def stepper_of(architecture: str) -> Stepper:
    """On the paths of CUDA devices; the same model each time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=torch.bfloat16).eval()
    attend = VarlenAttend(kernel, paged=True)
    return Stepper(model, rows=64, blocks=256, attend=attend, add_lora=GroupedAddLora(), device=EmulatedDevice())


Wrap = Callable[[Capture], Capture]


class Case:
    """A runner that captures steps, beside one with a cache of its own that does not."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, wrap: Wrap = lambda capture: capture, architecture: str = "llama"
    ) -> None:
        """`wrap` changes how the device captures."""
        monkeypatch.setattr(step_graphs, "OFTEN", 2)
        self.stepper, self.plain = stepper_of(architecture), stepper_of(architecture)
        runner, device = self.stepper.runner, self.stepper.device
        attend, add_lora = runner._attend, self.stepper.kernels.add_lora
        assert isinstance(attend, VarlenAttend) and isinstance(add_lora, GroupedAddLora)
        kernels = GraphKernels(attend, add_lora)
        self.graphs = runner.graphs = StepGraphs(
            runner._call, runner._cache, kernels, self.stepper.slots.rows, wrap(device.capture)
        )
        self.twins: dict[int, EngineSequence] = {}
        for seed, slot in enumerate(SLOTS):
            self.load(slot, seed)

    def load(self, slot: Slot, seed: int, rank: int | None = None) -> None:
        for stepper in (self.stepper, self.plain):
            generator = torch.Generator().manual_seed(seed)
            modules = {
                path: tuple(
                    (torch.randn(rank or slot.rank, size, generator=generator) / 4).bfloat16()
                    for size in (layer.base_layer.in_features, layer.base_layer.out_features)
                )
                for path, layer in stepper.slots.layers.items()
                if seed % 2 or "down_proj" not in path
            }
            stepper.load(slot, HostAdapter(f"v{seed}", rank or slot.rank, 0, modules))  # type: ignore[arg-type]

    def start(self, name: str, slots: tuple[ScaledSlot, ...], length: int) -> EngineSequence:
        prompt = [7 * i % 256 for i in range(length)]
        sequence = self.stepper.sequence(name, prompt, slots)
        self.twins[id(sequence)] = self.plain.sequence(name, prompt, slots)
        self.feed([(sequence, length)])
        return sequence

    def feed(self, rows: list[tuple[EngineSequence, int]]) -> None:
        """One step of both: they give the same logits, and go on with the same tokens."""
        twins = [(self.twins[id(sequence)], count) for sequence, count in rows]
        for ours, theirs, (sequence, _), (twin, _) in zip(
            self.stepper.logits(rows), self.plain.logits(twins), rows, twins, strict=True
        ):
            assert relative_difference(ours, theirs) < 0.03
            sequence.output.append(int(theirs.argmax()))
            twin.output.append(int(theirs.argmax()))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_replays_give_the_logits_of_plain_steps(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch, architecture=architecture)
    choose = random.Random(0)
    uses: list[tuple[ScaledSlot, ...]] = [(), *((ScaledSlot(slot, choose.choice((1.0, 0.5))),) for slot in SLOTS)]
    live = [case.start(str(i), uses[i % len(uses)], choose.randint(1, 40)) for i in range(9)]
    for step in range(40):
        if step == 25:  # another adapter in a slot that captured steps read
            case.load(SLOTS[2], 10, rank=9)
        chosen = sorted(choose.sample(live, choose.choice((1, 2, 3, 4, 9))), key=lambda s: s.slots)
        case.feed([(sequence, 1) for sequence in chosen])
    assert case.graphs.replays > 15


def test_where_replies_have_the_same_bits_in_any_batch_replays_must_have_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nearly(capture: Capture) -> Capture:
        def nearly_captured(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
            replay, logits = capture(run)

            def replay_nearly() -> None:
                replay()
                logits[0, 0] = logits[0, 0].float() * 1.01

            return replay_nearly, logits

        return nearly_captured

    for exact in (False, True):
        case = Case(monkeypatch, wrap=nearly)
        case.graphs.exact = exact
        sequence = case.start("one", (), 5)
        for _ in range(5):
            case.feed([(sequence, 1)])
        assert ("other logits" in caplog.text) == exact


def test_only_steps_that_follow_from_their_shape_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    both = tuple(ScaledSlot(slot) for slot in SLOTS[:2])
    base, composed = case.start("base", (), 5), case.start("composed", both, 5)
    for _ in range(4):
        case.feed([(composed, 1)])
        case.feed([(base, 1), (composed, 1)])
    assert case.graphs.replays == 0
    for _ in range(4):
        case.feed([(base, 1)])
    assert case.graphs.replays > 0


def test_shapes_are_rounded_up_and_say_which_ranks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    seen: list[Shape | None] = []
    monkeypatch.setattr(step_graphs, "shape_of", lambda *args: seen.append(shape_of(*args)) or seen[-1])
    rows = [case.start(str(i), (ScaledSlot(slot),), 3) for i, slot in enumerate((SLOTS[0], SLOTS[2], SLOTS[3]))]
    seen.clear()
    case.feed([(row, 1) for row in rows])
    case.feed([(rows[0], 1)])
    assert seen == [Shape(4, (8, 16)), Shape(1, (8,))]


def test_no_more_shapes_are_captured_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graphs, "MOST", 1)
    case = Case(monkeypatch)
    rows = [(case.start(str(i), (), 5), 1) for i in range(3)]
    for _ in range(3):
        case.feed(rows[:1])
    before = case.graphs.replays
    for _ in range(3):
        case.feed(rows)
    assert case.graphs.replays == before > 0
    case.feed(rows[:1])
    assert case.graphs.replays == before + 1


def test_a_row_that_is_not_finite_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    case.graphs.exact = True
    modules = {
        path: (torch.full((8, 64), 1e30).bfloat16(), torch.full((8, layer.base_layer.out_features), 1e30).bfloat16())
        for path, layer in case.stepper.slots.layers.items()
        if "q_proj" in path or "v_proj" in path
    }
    case.stepper.load(SLOTS[1], HostAdapter("huge", 8, 0, modules))
    runner, rows = case.stepper.runner, []
    for index, slots in enumerate(((), (ScaledSlot(SLOTS[1]),))):
        sequence = case.stepper.sequence(str(index), [5], slots)
        rows.append(ScheduledSequence(sequence, 1, samples=True))
    for _ in range(6):
        logits = runner.forward(Batch(rows))
    assert logits[0].isfinite().all() and not logits[1].isfinite().all()
    assert case.graphs.replays > 3


def test_a_model_with_a_soft_cap_runs_as_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(monkeypatch, architecture="gemma2")
    sequence = case.start("one", (), 5)
    for _ in range(5):
        case.feed([(sequence, 1)])
    assert case.graphs.replays == 0
    assert "soft cap" in caplog.text


def test_a_step_that_cannot_be_captured_runs_as_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(capture: Capture) -> Capture:
        def refuse_captured(run: Callable[[], torch.Tensor]) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

        return refuse_captured

    case = Case(monkeypatch, wrap=refuse)
    sequence = case.start("one", (), 5)
    for _ in range(5):
        case.feed([(sequence, 1)])
    assert case.graphs.replays == 0
    assert caplog.text.count("without graphs") == 1
    assert "not permitted" in caplog.text


@pytest.mark.parametrize("right", [0, 1, 2])
def test_replays_that_give_other_logits_are_not_used(
    right: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if a value had stayed in the graph: its first replays may be right, and no client sees the wrong ones."""

    def forgetful(capture: Capture) -> Capture:
        def forgetful_captured(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
            replay, logits = capture(run)
            count = 0

            def wrong() -> None:
                nonlocal count
                replay()
                count += 1
                if count > right:
                    logits.copy_(logits.flip(-1))

            return wrong, logits

        return forgetful_captured

    case = Case(monkeypatch, wrap=forgetful)
    sequence = case.start("one", (), 5)
    for _ in range(8):
        case.feed([(sequence, 1)])
    assert "other logits" in caplog.text
    assert case.graphs.replays == right + 1


def test_there_are_none_where_they_are_not_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device's kernels, chosen here on the CPU: only attention that reads block tables is captured."""
    chosen = {}
    for paged in (True, False, None):
        attend = None if paged is None else VarlenAttend(kernel, paged=paged)
        monkeypatch.setattr(choice, "varlen_attend", lambda *args, attend=attend: attend)
        monkeypatch.setattr(choice, "grouped_add_lora", lambda device: GroupedAddLora())
        chosen[paged] = choice.choose_kernels(CudaDevice(torch.device("cuda")), shape=KVShape(2, 3, 64))
    assert [kernels.graphs is not None for kernels in chosen.values()] == [True, False, False]
    assert [kernels.attention for kernels in chosen.values()] == ["varlen paged", "varlen gathered", "tensor"]
    assert {kernels.lora for kernels in chosen.values()} == {"grouped"}
    assert (
        choice.choose_kernels(CudaDevice(torch.device("cuda")), shape=KVShape(2, 3, 64, torch.float32)).lora == "tensor"
    )
    assert choice.choose_kernels(CPU, shape=KVShape(2, 3, 64)).graphs is None
