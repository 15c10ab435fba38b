"""Changed logits on the device: those of the host's reference, by the kernels and by PyTorch's operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loramux_adapters.device.cpu import CpuDevice
from loramux_adapters.device.cuda import CudaDevice
from loramux_adapters.device.device import Device
from loramux_server.kernels.compiled.logit_changes import EDIT, RowChange, bits_of, changed_reference
from loramux_server.kernels.gpu import changes as ours
from loramux_server.kernels.gpu.cuts import ChangeSizes, SamplingError
from loramux_server.kernels.gpu.step import plain
from loramux_server.kernels.gpu.step.changes import StepChanges

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
