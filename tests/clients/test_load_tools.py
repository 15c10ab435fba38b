"""Load generators of others get their figures from this server: every request served, no error among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clients.environments import ADAPTER, Ask
from support.real_server import RealServer


def test_guidellm_measures_it(ask: Ask, server: RealServer, base_directory: Path, tmp_path: Path) -> None:
    ask(
        "guidellm",
        *("run", "--backend", f"kind=openai_http,target={server.url},model={ADAPTER}"),
        *("--tokenizer", f"kind=hf_auto,model={base_directory}"),
        *("--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=4"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
        *("--output", f"kind=json,path={tmp_path / 'report.json'}", "--disable-console"),
        program="guidellm",
        parse=False,
    )
    (report,) = tmp_path.rglob("*.json")
    requests = json.loads(report.read_text())["benchmarks"][0]["requests"]
    assert len(requests["successful"]) == 4 and not requests["errored"]


def test_aiperf_measures_it(
    ask: Ask, server: RealServer, base_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # set, it looks for a tokenizer in the hub's cache alone
    ask(
        "aiperf",
        *("profile", "--model", ADAPTER, "--url", server.url, "--tokenizer", str(base_directory)),
        *("--endpoint-type", "chat", "--streaming", "--request-count", "4", "--concurrency", "2", "--ui", "none"),
        *("--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "8", "--artifact-dir", str(tmp_path)),
        program="aiperf",
        parse=False,
    )
    (report,) = tmp_path.rglob("profile_export_aiperf.json")
    figures = json.loads(report.read_text())
    assert figures["request_count"]["avg"] == 4 and not figures.get("error_summary")
