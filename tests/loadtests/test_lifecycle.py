"""The load tests' own judgement: who answered wrongly, how memory grows, how much longer pauses are."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from loadtests.client import Outcome, Run, Target
from loadtests.errors import LoadTestError
from loadtests.independent import Seen
from loadtests.pauses import Condition, slower
from loadtests.peers.run import Measured, show
from loadtests.process import adapter_parts
from loadtests.publishing import Publication, retouched
from loadtests.watch import ProcessWatch, Sample
from loadtests.workload import Request, Workload

from loadtests import cost, independent, replacing, soak
from loramux_adapters.artifact.format import digest_of, read_config
from loramux_adapters.lora.weights import load_host_adapter
from support.adapter_files import TINY_LINEARS, write_adapter


def written(directory: Path, parts: dict[str, bytes]) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_bytes(parts["config"])
    (directory / "adapter_model.safetensors").write_bytes(parts["weights"])
    return directory


def test_a_retouched_adapter_is_another_version_with_the_same_answers(tmp_path: Path) -> None:
    parts = adapter_parts(write_adapter(tmp_path / "plain", TINY_LINEARS))
    made = [written(tmp_path / str(number), retouched(parts, number)) for number in (0, 1, 32767)]
    assert len({digest_of(read_config(directory), directory) for directory in made}) == 3
    first, *others = (load_host_adapter(directory).modules for directory in made)
    for modules in others:
        for path, (a, bt) in modules.items():
            assert torch.equal(a, first[path][0]) and torch.equal(bt, first[path][1])


def test_only_fp32_weights_are_retouched_and_not_without_end(tmp_path: Path) -> None:
    fp32 = adapter_parts(write_adapter(tmp_path / "fp32", TINY_LINEARS))
    for parts, number in (
        (fp32, 32768),
        (adapter_parts(write_adapter(tmp_path / "bf16", TINY_LINEARS, dtype="BF16")), 0),
    ):
        with pytest.raises(LoadTestError, match="retouched"):
            retouched(parts, number)


def reply(version: str | None, text: str, started: float, ended: float, **more: object) -> Outcome:
    fields = {"adapter": "live", "prompt": "p", "finish": "length"} | more
    return Outcome(started=started, ended=ended, version=version, text=text, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (reply("v0", "zero", 0.5, 0.9), None),
        (reply("v0", "zero", 1.9, 2.5), None),  # asked while the second upload was under way
        (reply("v1", "one", 1.5, 9.0), None),
        (reply("v1", "zero", 2.5, 3.0), "says 'one', not 'zero'"),
        (reply("v0", "zero", 2.1, 3.0), "was current from"),  # after the second upload had ended
        (reply("v1", "one", 0.1, 0.9), "was current from"),  # before it had begun
        (reply("v9", "zero", 0.5, 0.9), "was never published"),
        (reply(None, "zero", 0.5, 0.9), "was never published"),
    ],
)
def test_a_reply_is_wrong_if_its_version_was_not_current_or_does_not_say_that(
    outcome: Outcome, fault: str | None
) -> None:
    publications = [Publication(0, "live", "v0", 99.0, 100.0), Publication(1, "live", "v1", 101.0, 102.0)]
    run = Run(1, [outcome], began=100.0, seconds=10.0, client_cpu_seconds=0.0)
    verdicts = replacing.judge(run, publications, {(0, "p"): "zero", (1, "p"): "one"})
    assert verdicts.right == (fault is None) and not verdicts.failed
    assert [fault in found for found in verdicts.wrong if fault] == [True] * (fault is not None)


def test_failed_replies_are_counted_and_open_ones_are_not_judged() -> None:
    outcomes = [reply("v0", "", 0.0, 1.0, error="status 500"), reply("v0", "ze", 0.0, 1.0, finish=None)]
    verdicts = replacing.judge(Run(1, outcomes, 0.0, 1.0, 0.0), [Publication(0, "live", "v0", 0.0, 0.1)], {})
    assert (verdicts.right, verdicts.wrong, verdicts.failed) == (0, [], {"status 500": 1})


def test_growth_is_told_in_megabytes_a_minute_after_the_warm_up() -> None:
    watch = ProcessWatch(1)
    watch.samples = [
        Sample(second, 10**9 + (0 if second < 60 else second * 50_000), threads=12, descriptors=30 + second // 300)
        for second in range(0, 600, 5)
    ]
    assert watch.slope(after=60) == pytest.approx(3.0)
    assert (watch.risen("threads", after=60), watch.risen("descriptors", after=60)) == (0, 1)


def test_a_process_is_watched_as_the_system_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtests.watch.SAMPLE_SECONDS", 0.01)
    watch = ProcessWatch(os.getpid())
    watch.start()
    with open(os.devnull):
        while not watch.samples:
            time.sleep(0.01)
    watch.stop()
    (first, *_) = watch.samples
    assert first.rss > 10**7 and first.threads >= 2 and first.descriptors >= 4


def test_pauses_are_compared_round_by_round() -> None:
    quiet = Condition("quiet", 0.0, lambda number: {}, p99=[1.0, 2.0, 4.0])
    busy = Condition("busy", 1.0, lambda number: {}, p99=[2.0, 2.4, 4.4])
    assert slower(busy, quiet) == pytest.approx(1.2)


def test_peers_are_compared_with_the_better_one_of_each_round() -> None:
    results = {
        "case": {
            "loramux": Measured([100.0, 100.0, 100.0], [1.0, 1.0, 1.0]),
            "one": Measured([10.0, 50.0, 20.0], [8.0, 8.0, 8.0]),
            "two": Measured([20.0, 10.0, 25.0], [4.0, 9.0, 10.0]),
        }
    }
    line = next(line for line in show(results).splitlines() if "loramux" in line)
    assert "4.00 (2.00 .. 5.00)" in line and "8.00 (4.00 .. 8.00)" in line


def test_what_adapters_cost_is_told_by_rates_and_by_replies() -> None:
    comparison = cost.comparisons()[0]
    fast = Run(1, [reply(None, "zero", 0.0, 1.0, tokens=97)], began=0.0, seconds=1.0, client_cpu_seconds=0.0)
    slow = Run(1, [reply(None, "zero", 0.0, 1.0, tokens=100)], began=0.0, seconds=1.0, client_cpu_seconds=0.0)
    cost.compare(comparison, fast, slow)
    assert comparison.ratios == [pytest.approx(0.97)] and comparison.reached
    assert "0.970 (0.970 .. 0.970)" in cost.show([comparison])
    cost.compare(comparison, fast, Run(1, [reply(None, "one", 0.0, 1.0, tokens=97)], 0.0, 1.0, 0.0))
    assert comparison.different == 1 and not comparison.reached


def test_a_soak_fails_for_an_error_for_growth_and_for_what_is_never_closed() -> None:
    def judged(errors: int = 0, growth: int = 0, descriptors: int = 0) -> list[bool]:
        watch = ProcessWatch(1)
        watch.samples = [
            Sample(second, 10**9 + growth * second, threads=12, descriptors=30 + descriptors * second)
            for second in range(0, 600, 5)
        ]
        return [reached for *_, reached in soak.figures(watch, errors, after=150)]

    assert judged() == [True, True, True, True]
    assert judged(errors=1) == [False, True, True, True]
    assert judged(growth=50_000) == [True, False, True, True]
    assert judged(descriptors=1) == [True, True, True, False]


def test_another_client_agrees_if_it_stands_to_the_server_as_ours_does() -> None:
    def found(first_token: float, tokens: float = 64.0) -> dict[str, independent.Rounds]:
        ours = (Seen(500.0, 0.11, 0.022, 64.0), Seen(500.0, 0.10, 0.020, 64.0))
        theirs = (Seen(250.0, first_token, 0.044, tokens), Seen(250.0, 0.20, 0.040, 64.0))
        return {"ours": [ours] * 3, "aiperf": [theirs] * 3}

    assert independent.agrees(found(0.22)) and independent.agrees(found(0.235))
    assert not independent.agrees(found(0.25)) and not independent.agrees(found(0.22, tokens=63.0))
    assert independent.disagreement(found(0.22), "first_token") == pytest.approx(0.0)
    assert "aiperf over ours" in independent.show(found(0.22))


def test_a_server_may_be_asked_for_an_adapter_in_its_own_way() -> None:
    target = Target("http://127.0.0.1:1", "base", choose={"a": {"model": "base", "lora": [{"id": 3}]}})
    bodies = [json.loads(target.encode(Request(0, "p", name, 4)).partition(b"\r\n\r\n")[2]) for name in ("a", None)]
    assert [(body["model"], body.get("lora")) for body in bodies] == [("base", [{"id": 3}]), ("base", None)]


def test_prompts_may_begin_alike() -> None:
    first, second = Workload(shared_words=50).requests(2)
    beginning = first.prompt.partition("\n")[0]
    assert len(beginning.split()) == 50 and second.prompt.startswith(beginning + "\n") and first != second
