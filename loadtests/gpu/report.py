"""Figures that follow from several parts of a run on a GPU, and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..report import table

# (rows, adapters) -> milliseconds of a step that are aimed at on one H100
TARGETS = {(1, 1): 2.6, (32, 0): 3.2, (32, 16): 4.2, (128, 64): 10.0}
HTTP_CASE = (64, 16)  # rows and adapters of the step that 64 clients are compared with
HTTP_TARGET, PEFT_TARGET, TAX_TARGET = 0.85, 20.0, 0.30


class Found(Protocol):
    """Of a part: what it wrote."""

    @property
    def found(self) -> dict[str, Any]: ...


def figures(outcomes: Mapping[str, Found]) -> dict[str, Any]:
    """As far as the parts they follow from found something.

    `steps`: each case with its floor, the bytes that it must read over the bandwidth measured there, and how many times
    the floor it takes. `http_over_steps`: tokens a second of 64 clients over those of steps of 64 rows.
    `over_peft`: transformers' with peft over ours. `lora_tax`: of 16 adapters at 32 rows. `targets`: of the last three,
    the first two at least, the third at most.
    """
    found = {name: outcome.found for name, outcome in outcomes.items()}
    aims = {"http_over_steps": HTTP_TARGET, "over_peft": PEFT_TARGET, "lora_tax": TAX_TARGET}
    figures: dict[str, Any] = {"targets": aims}
    bandwidth = found.get("bandwidth", {}).get("gb_per_s")
    cases = found.get("steps", {}).get("cases", [])
    figures["steps"] = [_with_floor(case, bandwidth) for case in cases]
    by_case = {(case["rows"], case["adapters"]): case for case in figures["steps"]}
    if {(32, 0), (32, 16)} <= by_case.keys():
        figures["lora_tax"] = by_case[32, 16]["ms"] / by_case[32, 0]["ms"] - 1
    rate = found.get("http", {}).get("adapters", {}).get("tokens_per_second")
    if rate and HTTP_CASE in by_case:
        figures["http_over_steps"] = rate / by_case[HTTP_CASE]["tokens_per_second"]
    for case in found.get("beside", {}).get("cases", []):
        if (case["rows"], case["adapters"]) == (32, 16) and "transformers + peft" in case["ms"]:
            figures["over_peft"] = case["ms"]["transformers + peft"]["median"] / case["ms"]["ours"]["median"]
    return figures


def _with_floor(case: Mapping[str, Any], bandwidth: float | None) -> dict[str, Any]:
    more: dict[str, Any] = {"tokens_per_second": case["rows"] / case["ms"] * 1e3}
    if bandwidth:
        more["floor_ms"] = case["bytes"] / bandwidth / 1e6
        more["over_floor"] = case["ms"] / more["floor_ms"]
    if target := TARGETS.get((case["rows"], case["adapters"])):
        more["target_ms"] = target
    return {**case, **more}


def show(document: Mapping[str, Any]) -> str:
    """Its tables: steps beside floors and targets, kernels of one step, other sides, HTTP, tests."""
    found = {name: part["found"] for name, part in document["parts"].items()}
    figures = document["figures"]
    parts = [
        _steps(figures["steps"]),
        _kernels(found.get("steps", {}).get("kernels", [])),
        _beside(found.get("beside", {}).get("cases", [])),
        _ratios(figures),
    ]
    return "\n\n".join(part for part in parts if part)


def _steps(cases: Sequence[Mapping[str, Any]]) -> str:
    if not cases:
        return ""
    head = ["rows, adapters", "step ms", "lowest .. highest", "tokens/s", "floor ms", "over floor", "target ms"]
    return table(
        [
            head,
            *(
                [
                    f"{case['rows']}, {case['adapters']}",
                    f"{case['ms']:.3f}",
                    f"{case['lowest']:.3f} .. {case['highest']:.3f}",
                    f"{case['tokens_per_second']:,.0f}",
                    _number(case.get("floor_ms"), 3),
                    _number(case.get("over_floor"), 2),
                    _number(case.get("target_ms"), 1),
                ]
                for case in cases
            ),
        ]
    )


def _kernels(kernels: Sequence[Mapping[str, Any]]) -> str:
    if not kernels:
        return ""
    total = sum(one["ms"] for one in kernels)
    rows = [
        [
            one["kernel"],
            str(one["launches"]),
            f"{one['ms']:.3f}",
            f"{one['ms'] / total:.0%}",
            _number(one.get("gb_per_s"), 0),
        ]
        for one in kernels
    ]
    return table([["kernel, of a step of 32 rows and 16 adapters", "launches", "ms", "share", "GB/s"], *rows])


def _beside(cases: Sequence[Mapping[str, Any]]) -> str:
    if not cases:
        return ""
    sides = list(dict.fromkeys(side for case in cases for side in case["ms"]))
    rows = [
        [
            f"{case['rows']}, {case['adapters']}",
            *(_number(case["ms"].get(side, {}).get("median"), 2) for side in sides),
        ]
        for case in cases
    ]
    return table([["rows, adapters: ms", *sides], *rows])


def _ratios(figures: Mapping[str, Any]) -> str:
    lines = [
        ("64 clients over HTTP, of the rate of steps", "http_over_steps", f">= {HTTP_TARGET}"),
        ("faster than transformers + peft, 32 rows, 16 adapters", "over_peft", f">= {PEFT_TARGET:.0f}"),
        ("what 16 adapters add at 32 rows", "lora_tax", f"<= {TAX_TARGET}"),
    ]
    rows = [[what, f"{figures[name]:.2f}", aim] for what, name, aim in lines if name in figures]
    return table([["", "measured", "target"], *rows]) if rows else ""


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
