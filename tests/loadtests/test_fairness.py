"""The load tests of turns and of places on the device, against a fake server and against this checkout."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from loadtests.client import Target
from loadtests.workload import Workload

from loadtests import fairness, slots
from support.fakes_loadtests import FakeCompletions

ROOT = Path(__file__).parents[2]


@pytest.mark.anyio
async def test_the_one_request_comes_when_the_crowd_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "CROWDED_SECONDS", 0.3)
    monkeypatch.setattr(fairness, "QUIET_SECONDS", 0.0)
    requests = Workload(adapters=("hot",), max_tokens=40).requests(12)
    (late,) = Workload(adapters=("other",), max_tokens=2).requests(1)
    async with FakeCompletions(gap=0.02).running() as server:
        crowd, one, retry = await fairness.crowded(Target(server.url, "base"), requests, late, 5.0)
    assert [body["model"] for body in server.bodies] == ["hot"] * 12 + ["other"]
    assert retry is None and len(crowd.outcomes) == 12
    assert one.outcomes[0].first_token_seconds is not None
    assert one.began > crowd.began + 0.29


def test_the_search_for_a_place_is_timed_in_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slots, "ROWS", (1000,))
    assert slots.main(Namespace(before=ROOT, after=ROOT, seconds=60.0, out=tmp_path)) == 0
    assert "1,000" in capsys.readouterr().out and (tmp_path / "slots.json").exists()
