"""Changed logits on the device: those of the host's reference, by the kernels and by PyTorch's operations."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.cuda import CudaDevice
from loramux_adapters.device.device import Device
from loramux_server.kernels.compiled.logit_changes import EDIT, RowChange, bits_of, changed_reference
from loramux_server.kernels.compiled.sampling import Draw
from loramux_server.kernels.decoder.asks import ANSWER, NOTHING_LEFT, Ask, ChangedAsk
from loramux_server.kernels.gpu import changes as ours
from loramux_server.kernels.gpu.cuts import ASK_WORDS, ChangeSizes, SamplingError, SamplingSizes
from loramux_server.kernels.gpu.sampling import SamplingTables, answers_of, fill
from loramux_server.kernels.gpu.step import plain
from loramux_server.kernels.gpu.step.changes import StepChanges
from loramux_server.kernels.gpu.step.operations import PLAIN, TRITON

NUMPY_TELLS = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of infinities, in the interpreter
NO_EDITS, NOTHING = np.empty(0, dtype=EDIT), np.empty(0, dtype=np.int32)
BOTH = pytest.mark.parametrize("operation", [ours.change, plain.change])


def device_of(place: torch.device) -> Device:
    return CudaDevice(place) if place.type == "cuda" else CpuDevice()


def changes_of(width: int, edits: list[int], rows: int, seed: int) -> list[RowChange]:
    """One for each number of edits."""
    random = np.random.default_rng(seed)
    found = []
    for at, count in enumerate(edits):
        its = np.zeros(min(count, width), dtype=EDIT)
        its["token"] = random.choice(width, len(its), replace=False)
        its["repeated"] = random.integers(0, 2, len(its))
        its["add"], its["less"] = random.normal(0, 5, (2, len(its)))
        its["add"][::9] = random.choice([np.inf, -np.inf, np.nan, 3e38, 0.0], len(its[::9]))
        allowed = None if at % 3 == 2 else bits_of(np.flatnonzero(random.random(width) < at / 4).tolist(), width)
        forbidden = random.integers(0, width, 3 * at).astype(np.int32)
        found.append(RowChange(int(random.integers(rows)), its, forbidden, allowed, float(random.uniform(0.5, 2))))
    return found


@NUMPY_TELLS
@BOTH
@pytest.mark.parametrize("width", [1, 33, 1024, 1500])
def test_changed_rows_are_those_of_the_host(device: torch.device, operation: object, width: int) -> None:
    """Also where there are more edits than one launch takes, and rows of logits that are padded."""
    padded = torch.randn(4, width + 7, generator=torch.Generator().manual_seed(width)) * 4
    padded[1, ::3] = -torch.inf
    logits = padded.to(device)[:, :width]
    assert callable(operation)
    step = StepChanges(device_of(device), ChangeSizes(5, width), torch.empty(5, width, device=device))
    for edits in ([0], [3, 0, 40, 200, 17], [1500, 1, 1500, 1500, 1500], []):
        changes = changes_of(width, edits, 4, width)
        found = step.run(operation, logits, changes).cpu()
        expected = changed_reference(logits, changes).cpu()
        assert torch.equal(found.isfinite(), expected.isfinite())
        assert not found.isnan().any() and not (found == torch.inf).any()
        exact = device.type == "cpu"
        assert torch.equal(found, expected) or (not exact and torch.allclose(found, expected, rtol=2e-7, atol=1e-6))
        for at, change in enumerate(changes):
            assert torch.equal(step.run(operation, logits, [change]).cpu()[0], found[at]), "alone as in company"


def test_more_rows_than_there_is_room_for_are_refused(device: torch.device) -> None:
    step = StepChanges(device_of(device), ChangeSizes(1, 40), torch.empty(1, 40, device=device))
    logits = torch.zeros(2, 40, device=device)
    with pytest.raises(SamplingError, match="2 rows are changed, and there is room for 1"):
        step.run(ours.change, logits, [RowChange(row, NO_EDITS, NOTHING) for row in range(2)])
    with pytest.raises(SamplingError, match="logits of 39 tokens"):
        step.run(ours.change, logits[:, :39], [RowChange(0, NO_EDITS, NOTHING)])


@NUMPY_TELLS
@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_chosen_tokens_come_into_the_steps_answers(device: torch.device, bad: float) -> None:
    """By the kernel as by PyTorch's operations; rows that are not finite stay as they are, and nothing may be left."""
    width, rows = 300, 5
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(device) * 3
    logits[1, 17] += bad
    changes = changes_of(width, [3, 40, 0, 200, 7], rows, 1)
    changes = [one._replace(row=rows - 1 - at, allowed=None) for at, one in enumerate(changes)]
    changes[2] = changes[2]._replace(allowed=bits_of([], width))
    asked = [
        ChangedAsk(1 + at, None if at % 2 else Draw(0, 0.3 + at / 10), change) for at, change in enumerate(changes)
    ]
    asks = [Ask(0), *(Ask(one.change.row, top=at if at % 3 else None) for at, one in enumerate(asked))]
    answers = []
    for operations in (TRITON, replace(TRITON, adopt=PLAIN.adopt)):
        place = device_of(device)
        step = SamplingTables.on(SamplingSizes(len(asks), width), device)
        written = np.zeros((len(asks), ASK_WORDS), dtype=np.int64)
        fill(written, asks, width)
        step.asks.copy_(torch.from_numpy(written))
        step.answers.zero_()
        operations.sample(place.launch, step, logits, len(asks))
        before = answers_of(step.answers.cpu().numpy().copy())
        changed = StepChanges(place, ChangeSizes(3, width), torch.empty(3, width, device=device))
        sizes = SamplingSizes(3, width)
        own = SamplingTables(sizes, changed.tables.asks, torch.zeros_like(step.answers[:3]), step.scratch)
        changed.choose(operations, own, step, logits, asked)
        answers.append(answers_of(step.answers.cpu().numpy().copy()))
    assert answers[0].tobytes() == answers[1].tobytes()
    found, rest = answers[0], list(ANSWER.names or ())[3:]
    assert found[0] == before[0], "what nobody changes"
    expected = changed_reference(logits, changes).cpu()
    for at, one in enumerate(asked):
        answer, was, row = found[1 + at], before[1 + at], one.change.row
        if bad and row == 1:
            assert answer == was and answer["finite"] == 0
        elif at == 2:
            assert answer["finite"] == NOTHING_LEFT
            assert [answer[name].tobytes() for name in ("chosen", *rest)] == [
                was[name].tobytes() for name in ("chosen", *rest)
            ]
        else:
            assert answer["finite"] == 1 and expected[at, int(answer["chosen"])] > -np.inf
            assert answer["greedy"] == was["greedy"], "the model's own"
            if one.draw is None:
                assert answer["chosen"] == int(expected[at].argmax())
            if at % 3:
                own_logprob = logits[row].double().log_softmax(0)[int(answer["chosen"])]
                assert answer["logprob"] == pytest.approx(float(own_logprob), abs=1e-5)
    assert {int(found[1 + at]["chosen"]) for at in (0, 1, 3, 4)} != {
        int(before[1 + at]["chosen"]) for at in (0, 1, 3, 4)
    }
