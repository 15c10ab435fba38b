"""lm-eval over HTTP: what it reports of each example is what the engine says in process."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clients.environments import ADAPTER, Ask
from loramux_adapters.device.cpu import CpuDevice
from loramux_server.base.loader import load_base_model
from loramux_server.base.source import EMBEDDED_NAME
from loramux_server.engine.local_engine import LocalAdapter, LocalEngine
from support.real_server import RealServer

TASKS = Path(__file__).parent / "tasks"
TASK_NAMES = ("loramux_words", "loramux_lines")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    cache = Path("~/.cache").expanduser() / "loramux"
    base = load_base_model(EMBEDDED_NAME, device=CpuDevice(), cache_dir=cache, report=print)
    yield LocalEngine.open(base, rows=8, tokens=4096, max_rank=16)


@pytest.fixture(scope="module")
def adapter(engine: LocalEngine, server: RealServer, tmp_path_factory: pytest.TempPathFactory) -> LocalAdapter:
    """The one that the server has, from the server."""
    archive = tmp_path_factory.mktemp("archive")
    with server.client() as client:
        (archive / "adapter.tar.gz").write_bytes(client.get(f"/v1/adapters/{ADAPTER}/archive").content)
    with tarfile.open(archive / "adapter.tar.gz") as packed:
        packed.extractall(archive, filter="data")
    return engine.load(next(archive.rglob("adapter_config.json")).parent)


def run(ask: Ask, server: RealServer, base_directory: Path, out: Path, model: str) -> dict[str, list[dict[str, Any]]]:
    """Runs both tasks; what was logged of each example, in their order."""
    ask(
        "lm_eval",
        *("run", "--model", "local-completions", "--tasks", ",".join(TASK_NAMES), "--include_path", str(TASKS)),
        "--model_args",
        f"model={model},base_url={server.url}/v1/completions,tokenizer={base_directory},num_concurrent=2,max_retries=1",
        *("--log_samples", "--output_path", str(out), "--batch_size", "4"),
        program="lm_eval",
        parse=False,
    )
    logged = {}
    for task in TASK_NAMES:
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        logged[task] = sorted(rows, key=lambda row: int(row["doc_id"]))
    return logged


def test_log_likelihoods_and_replies_are_those_of_the_engine(
    ask: Ask,
    server: RealServer,
    base_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: LocalEngine,
    adapter: LocalAdapter,
) -> None:
    monkeypatch.chdir(TASKS)  # the tasks name the files beside them
    logged = run(ask, server, base_directory, tmp_path, ADAPTER)
    tokenizer = engine.base.tokenizer
    for row in logged["loramux_words"]:
        for word, told in zip(row["doc"]["words"], row["filtered_resps"], strict=True):
            prompt = tokenizer(row["doc"]["text"]).input_ids
            whole = tokenizer(row["doc"]["text"] + word).input_ids
            (scores,) = engine.ask([(prompt, whole[len(prompt) :])], adapter).scores
            assert float(told[0]) == pytest.approx(sum(score.logprob for score in scores), abs=1e-4)
            assert str(told[1]) == str(all(score.is_best for score in scores))
    for row in logged["loramux_lines"]:
        prompt = tokenizer(row["doc"]["text"]).input_ids
        (reply,) = engine.generate([prompt], adapter, max_tokens=16, stop_ids=frozenset(tokenizer.all_special_ids))
        text = tokenizer.decode(reply.tokens, skip_special_tokens=True).split("\n\n")[0]
        assert row["filtered_resps"][0] == text
