"""What a machine with a GPU is asked: time is spent on what is worth most, and one part that fails loses no other."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from loadtests.errors import LoadTestError
from loadtests.gpu.parts import ROOT, Outcome, Part, run_all, shares
from loadtests.gpu.report import figures, show
from loadtests.gpu.run import PARTS, add_arguments, environment, last_line, main
from loadtests.gpu.wheels import keep_one_cuda, needed, pins

from support import triton_interpreter


def part(name: str, worth: int, seconds: float, **more: object) -> Part:
    return Part(name, f"part_{name}", worth, seconds, most=3 * seconds, **more)  # type: ignore[arg-type]


def test_all_parts_fit_into_eight_minutes() -> None:
    assert sum(it.seconds for it in PARTS) <= 470
    assert all(given == it.seconds for it, given in zip(PARTS, shares(PARTS, 470).values(), strict=True))
    worth = {it.name: it.worth for it in PARTS}
    assert all(worth[name] > it.worth for it in PARTS for name in it.needs)


def test_time_goes_to_what_is_worth_most_and_too_little_of_it_to_nobody() -> None:
    parts = [part("a", 3, 50), part("b", 1, 50), part("c", 2, 50, needs=("a",))]
    assert shares(parts, 120) == {"a": 50, "b": 20, "c": 50}
    assert shares(parts[1:], 200) == {"b": 50, "c": 50}, "what it needs is over"
    assert shares(parts, 5) == {"a": 0.0, "b": 0.0, "c": 0.0}
    assert shares([part("a", 1, 50), part("b", 3, 50)], 55) == {"a": 0.0, "b": 50}
    assert shares([part("a", 1, 50), part("b", 3, 50)], 70) == {"a": 20, "b": 50}


PROGRAM = """
import argparse, json, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--out"); parser.add_argument("--seconds", type=float)
args = parser.parse_args()
print("a line of {name}")
open(args.out, "w").write(json.dumps({{"seconds": args.seconds, "name": "{name}"}}))
{does}
"""


def run(tmp_path: Path, does: dict[str, str], parts: list[Part], budget: float = 60.0) -> dict[str, Outcome]:
    for name, what in does.items():
        (tmp_path / f"part_{name}.py").write_text(PROGRAM.format(name=name, does=what), encoding="utf-8")
    told: list[str] = []
    found = run_all(
        parts,
        budget=budget,
        out=tmp_path,
        arguments=[],
        environ={**os.environ, "PYTHONPATH": str(tmp_path)},
        told=lambda name, outcome: told.append(name),
        say=lambda line: None,
    )
    assert told == [it.name for it in parts]
    return found


def test_a_part_that_fails_or_hangs_keeps_what_it_found_and_the_others_run(tmp_path: Path) -> None:
    parts = [part("good", 3, 20), part("bad", 2, 15), Part("slow", "part_slow", 1, 12, most=2), part("after", 4, 10)]
    parts += [part("needy", 1, 10, needs=("bad",)), part("dead", 1, 10)]
    does = {"good": "", "bad": "sys.exit('it is broken')", "slow": "time.sleep(60)", "after": "", "needy": ""}
    found = run(tmp_path, does | {"dead": "import os; os.abort()"}, parts, budget=300)
    assert [found[it.name].state for it in parts] == ["passed", "failed", "out of time", "passed", "left out", "failed"]
    assert found["bad"].why == "it is broken" and "a line of bad" in found["bad"].tail
    assert all(found[name].found["name"] == name for name in ("good", "bad", "slow", "after", "dead"))
    assert found["needy"].why == "it needs what did not pass: bad"
    assert found["good"].found["seconds"] > 20, "what nobody needs is the first one's too"
    assert last_line(found) == "passed: good, after; failed: bad, dead; out of time: slow; left out: needy"


def test_what_there_is_no_time_for_is_left_out_and_said(tmp_path: Path) -> None:
    found = run(tmp_path, {"a": "", "b": ""}, [part("a", 1, 50), part("b", 2, 12)], budget=14)
    assert (found["a"].state, found["b"].state) == ("left out", "passed")
    assert "worth more" in found["a"].why


def test_figures_follow_from_several_parts_and_are_shown() -> None:
    def case(rows: int, adapters: int, ms: float) -> dict[str, object]:
        return {"rows": rows, "adapters": adapters, "ms": ms, "lowest": ms, "highest": ms, "bytes": 5e9}

    outcomes = {
        "bandwidth": Outcome("passed", found={"gb_per_s": 2500.0}),
        "steps": Outcome(
            "passed",
            found={
                "cases": [case(32, 0, 3.0), case(32, 16, 3.6), case(64, 16, 5.0)],
                "kernels": [{"kernel": "nf4 [8]", "launches": 3, "ms": 1.0}],
            },
        ),
        "http": Outcome("failed", found={"adapters": {"tokens_per_second": 11520.0}}),
        "beside": Outcome(
            "passed",
            found={
                "cases": [
                    {
                        "rows": 32,
                        "adapters": 16,
                        "ms": {"ours": {"median": 4.0}, "transformers + peft": {"median": 100.0}},
                    }
                ]
            },
        ),
    }
    found = figures(outcomes)
    assert [round(it["floor_ms"], 2) for it in found["steps"]] == [2.0, 2.0, 2.0]
    assert found["steps"][1]["target_ms"] == 4.2 and "target_ms" not in found["steps"][2]
    assert found["lora_tax"] == pytest.approx(0.2)
    assert found["http_over_steps"] == pytest.approx(0.9)
    assert found["over_peft"] == 25.0
    assert set(found["targets"]) <= set(found), "each beside what it is for"
    text = show({"parts": {name: {"found": it.found} for name, it in outcomes.items()}, "figures": found})
    assert all(word in text for word in ("32, 16", "1.80", "nf4 [8]", "transformers + peft", "0.90", ">= 0.85"))
    assert show({"parts": {}, "figures": figures({})}) == "", "nothing was found"


def test_wheels_for_a_machine_without_network_leave_its_pytorch_alone(tmp_path: Path) -> None:
    ours = tmp_path / "loramux-1-py3-none-any.whl"
    with zipfile.ZipFile(ours, "w") as archive:
        lines = ["Requires-Dist: torch>=2.11", "Requires-Dist: numpy>=2.0", "Requires-Dist: typer>=0.28,<1"]
        archive.writestr("loramux-1.dist-info/METADATA", "\n".join([*lines, 'Requires-Dist: peft; extra == "train"']))
    found = needed(ours, pins((ROOT / "constraints.txt").read_text(encoding="utf-8")))
    names = {line.partition("==")[0] for line in found}
    assert {"typer", "click", "peft", "transformers", "pytest"} <= names, "what they need, too"
    assert not names & {"torch", "triton", "numpy", "sympy"}


def test_a_wheel_of_bitsandbytes_can_be_cut_to_one_version_of_cuda(tmp_path: Path) -> None:
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    libraries = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cuda129", "cuda130", "rocm64", "cpu")]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*libraries, "bitsandbytes/__init__.py"):
            archive.writestr(name, "x")
    keep_one_cuda(wheel, "130")
    assert zipfile.ZipFile(wheel).namelist() == [libraries[1], libraries[3], "bitsandbytes/__init__.py"]
    with pytest.raises(LoadTestError, match="no library for CUDA 118, only for 130"):
        keep_one_cuda(wheel, "118")


def test_without_a_driver_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    monkeypatch.setattr("loadtests.gpu.run.DRIVER", "libnothing.so.1")
    with pytest.raises(LoadTestError, match=r"driver is not on this machine \(there is no libnothing.so.1\); --dry"):
        main(parser.parse_args(["--out", str(tmp_path)]))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not triton_interpreter.INSTALLED, reason=triton_interpreter.WHY_NOT)
def test_the_whole_script_runs_on_a_tiny_shape_without_a_device(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtests", "gpu", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1800, env=environment(None, dry=False)
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    document = json.loads((tmp_path / "gpu-dry.json.tmp").read_text(encoding="utf-8"))
    assert {part["state"] for part in document["parts"].values()} == {"passed"}
    assert len(document["figures"]["steps"]) > 1 and document["parts"]["http"]["found"]["adapters"]["tokens"] > 0
