"""The load tests against a fake server: what they count must be what happened."""

from __future__ import annotations

import ast
import io
import json
from dataclasses import replace
from email import message_from_bytes
from pathlib import Path

import numpy as np
import pytest
from loadtests.baselines import READY, Baselines, serve
from loadtests.client import Outcome, Run, Target, run_clients
from loadtests.compare import Comparison, Rounds, comparison_table, measure
from loadtests.make_adapters import SMOLLM2_135M, Shapes, make_adapters
from loadtests.memory import Memory, memory_table, pools
from loadtests.process import multipart
from loadtests.reply import split_reply
from loadtests.report import jain, percentile, summarize, summary_table, write_report
from loadtests.workload import POPULARITIES, Workload, choose_adapters
from safetensors.numpy import load_file

from support.fakes_loadtests import FakeCompletions

NAMES = tuple(f"a{number}" for number in range(8))


# workload


def test_the_same_seed_gives_the_same_requests_and_a_longer_list_begins_with_a_shorter_one() -> None:
    workload = Workload(adapters=NAMES, popularity="zipf", base_share=0.3, prompt_words=(5, 30))
    assert workload.requests(40)[:10] == workload.requests(10)
    assert workload.requests(10) != replace(workload, seed=1).requests(10)


def test_prompts_have_the_asked_length_and_no_common_beginning() -> None:
    prompts = [request.prompt.split() for request in Workload(prompt_words=(5, 60)).requests(50)]
    assert {5 <= len(words) <= 60 for words in prompts} == {True}
    assert len({words[0] for words in prompts}) == 50


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_a_popularity_names_only_known_adapters_and_works_with_a_single_one(popularity: str) -> None:
    assert set(choose_adapters(popularity, NAMES, 400, seed=3)) <= set(NAMES)
    assert set(choose_adapters(popularity, NAMES[:1], 9, seed=3)) == {"a0"}
    assert choose_adapters(popularity, (), 2, seed=3) == [None, None]


def test_popularities_are_as_skewed_as_they_say() -> None:
    def share_of_first(popularity: str) -> float:
        return choose_adapters(popularity, NAMES, 800, seed=1).count("a0") / 800

    assert share_of_first("identical") == 1.0
    assert share_of_first("skewed") == 0.5
    assert share_of_first("distinct") == 1 / 8
    assert share_of_first("uniform") == pytest.approx(1 / 8, abs=0.04)
    assert share_of_first("zipf") == pytest.approx(1 / 2.718, abs=0.06)  # 1 + 1/2 + ... + 1/8 = 2.718


def test_a_wrong_recipe_is_refused() -> None:
    for wrong in ({"popularity": "random"}, {"base_share": 1.5}, {"prompt_words": (9, 3)}):
        with pytest.raises(ValueError):
            Workload(**wrong)


# client


@pytest.mark.anyio
@pytest.mark.parametrize("chunked", [True, False])
async def test_clients_send_every_request_once_and_time_each_token(chunked: bool) -> None:
    async with FakeCompletions(gap=0.005, chunked=chunked).running() as fake:
        requests = Workload(adapters=("a", "b"), max_tokens=4).requests(9)
        target = Target(fake.url, "the-base", extra={"ignore_eos": True})
        run = await run_clients(target, requests, clients=3, seconds=10)
    assert sorted(body["prompt"] for body in fake.bodies) == sorted(request.prompt for request in requests)
    assert {(body["temperature"], body["stream"], body["ignore_eos"]) for body in fake.bodies} == {(0, True, True)}
    assert fake.most_open == 3
    for outcome in run.outcomes:
        assert (outcome.error, outcome.finish, outcome.tokens, outcome.prompt_tokens) == (None, "length", 4, 7)
        assert len(outcome.stamps) == 4
        assert 0.004 < (outcome.first_token_seconds or 0) < 1
        assert all(gap > 0 for gap in outcome.inter_token_seconds)
    assert run.cut == 0


@pytest.mark.anyio
async def test_each_way_to_fail_is_an_error_of_that_request_alone() -> None:
    names = ("missing", "silent", "broken", "failing", "good")
    async with FakeCompletions().running() as fake:
        requests = Workload(adapters=names, max_tokens=2).requests(5)
        run = await run_clients(Target(fake.url, "b"), requests, clients=5, seconds=10)
    assert {outcome.adapter: outcome.error for outcome in run.outcomes} == {
        "missing": "status 404",
        "silent": "the connection closed before the reply began",
        "broken": "the stream ended without [DONE]",
        "failing": "error event: the step failed",
        "good": None,
    }


@pytest.mark.anyio
async def test_a_server_that_is_not_there_is_an_error_and_no_hang() -> None:
    run = await run_clients(Target("http://127.0.0.1:1", "b"), Workload().requests(2), clients=1, seconds=5)
    assert [outcome.error for outcome in run.outcomes] == ["connection: ConnectionRefusedError"] * 2


@pytest.mark.anyio
async def test_time_is_bounded_and_what_is_cut_counts_its_tokens_but_no_error() -> None:
    async with FakeCompletions(gap=0.02).running() as fake:
        requests = Workload(max_tokens=1000).requests(20)
        run = await run_clients(Target(fake.url, "b"), requests, clients=2, seconds=0.2)
    assert run.seconds < 1
    assert run.cut == len(run.outcomes) == 2
    assert [outcome.error for outcome in run.outcomes] == [None, None]
    assert all(0 < outcome.tokens < 20 and outcome.finish is None for outcome in run.outcomes)


def test_an_event_is_timed_by_its_last_byte_however_the_network_cuts_it() -> None:
    body = b"".join(b"%x\r\n%s\r\n" % (len(it), it) for it in (b"data: one\n", b"\ndata: two\n\ndata: 3\n\n"))
    reply = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"
    taken = split_reply([(float(place), reply[place : place + 1]) for place in range(len(reply))])
    end = float(reply.index(b"data: 3\n\n") + len(b"data: 3\n\n") - 1)
    assert (taken.status, taken.headers) == (200, {"transfer-encoding": "chunked"})
    assert taken.events == [(end, b"one"), (end, b"two"), (end, b"3")]


# report


def test_percentiles_interpolate_and_jain_tells_equal_from_unequal() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.99) == 3.0
    assert percentile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert jain([5.0]) is None
    assert jain([5.0, 5.0, 5.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def make_run() -> Run:
    """Two adapters, one twice as fast as the other, and one request that failed."""
    asked = {"prompt": "say", "started": 0.0, "prompt_tokens": 5, "tokens": 4}
    fast = Outcome(adapter="fast", ended=1.0, stamps=[0.5, 0.75, 1.0], finish="length", **asked)
    slow = Outcome(adapter="slow", ended=2.0, stamps=[1.0, 2.0], finish="stop", **asked)
    failed = Outcome(adapter=None, prompt="say", started=0.0, ended=0.1, error="status 503")
    return Run(2, [fast, slow, failed], began=0.0, seconds=2.0, client_cpu_seconds=0.1)


def test_a_summary_counts_tokens_latencies_fairness_and_errors() -> None:
    summary = summarize("two", make_run())
    assert summary.tokens_per_second == 4.0
    assert summary.first_token.p50 == 0.75
    assert summary.inter_token.p50 == 0.25
    assert summary.fairness == pytest.approx(0.9)
    assert summary.rate_min_max == pytest.approx(0.5)
    assert summary.client_cpu_share == pytest.approx(0.05)
    assert summary.finish == {"length": 1, "stop": 1}
    assert summary.errors == {"status 503": 1}
    assert summary.adapters["slow"].stream_rate == 2.0


def test_a_report_is_a_table_a_json_file_and_a_picture(tmp_path: Path) -> None:
    summaries = [summarize("two", make_run()), summarize("nothing", Run(1, [], 0.0, 0.0, 0.0))]
    assert "two" in summary_table(summaries)
    data, picture = write_report(tmp_path / "results", "run", summaries, {"seed": 0})
    assert json.loads(data.read_text())["runs"][0]["errors"] == {"status 503": 1}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_comparison_takes_the_median_of_ratios_within_rounds() -> None:
    comparison = Comparison("mixed", "peft", ours=[40.0, 90.0, 50.0], theirs=[10.0, 30.0, 10.0], target=4.0)
    assert comparison.ratios == [4.0, 3.0, 5.0]
    assert comparison.reached
    assert "4.00x" in comparison_table([comparison])


class FakeRounds(Rounds):
    """Rates that rise by one with every call; notes who was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ours(self, scenario: str, number: int) -> float:
        self.asked.append(f"ours {scenario} {number}")
        return 10.0 + len(self.asked)

    def theirs(self, scenario: str, number: int) -> float:
        self.asked.append(f"theirs {scenario} {number}")
        return 10.0


def test_rounds_are_interleaved_the_first_side_changes_and_time_is_bounded() -> None:
    rounds, said = FakeRounds(), list[str]()
    comparisons = measure(rounds, 2, 60.0, said.append)
    assert rounds.asked[:4] == ["ours mixed 0", "theirs mixed 0", "ours base 0", "theirs base 0"]
    assert rounds.asked[4:] == ["theirs mixed 1", "ours mixed 1", "theirs base 1", "ours base 1"]
    assert [len(it.ratios) for it in comparisons] == [2, 2]
    late = measure(FakeRounds(), 5, -1.0, said.append)
    assert [len(it.ratios) for it in late] == [1, 1]
    assert said[-1] == "4 rounds left out, the time is up"


def test_memory_is_read_from_metrics_and_held_against_the_resident_size() -> None:
    page = (
        "# TYPE loramux_pool_bytes gauge\n"
        'loramux_pool_bytes{pool="base"} 1.048576e+08\nloramux_pool_bytes{pool="kv"} 5e+07\n'
        'loramux_other{pool="kv"} 3\n'
    )
    assert pools(page) == {"base": 104857600, "kv": 50000000}
    memory = Memory({"base": 100, "overhead": 100}, process={"rss": 230}, merged=900)
    assert memory.off_by == pytest.approx(0.15)
    assert "NOT within 10%" in memory_table(memory, 16)


# adapters and uploads


def test_made_adapters_are_peft_directories_of_the_right_shapes(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    shapes = Shapes.from_config({**config, "num_key_value_heads": 2})
    made = make_adapters(tmp_path, shapes, [4, 8], targets=["q_proj", "v_proj", "down_proj"])
    assert list(made) == ["load000", "load001"]
    tensors = load_file(made["load001"] / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.0"
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"{layer}.self_attn.q_proj.lora_A.weight": (8, 64),
        f"{layer}.self_attn.q_proj.lora_B.weight": (64, 8),
        f"{layer}.self_attn.v_proj.lora_A.weight": (8, 64),
        f"{layer}.self_attn.v_proj.lora_B.weight": (32, 8),
        f"{layer}.mlp.down_proj.lora_A.weight": (8, 96),
        f"{layer}.mlp.down_proj.lora_B.weight": (64, 8),
    }
    assert json.loads((made["load001"] / "adapter_config.json").read_text())["r"] == 8


def test_the_effect_of_a_made_adapter_has_the_asked_size_whatever_its_rank(tmp_path: Path) -> None:
    shapes = replace(SMOLLM2_135M, layers=1)
    for name, directory in make_adapters(tmp_path, shapes, [4, 64], targets=["up_proj"], strength=0.05).items():
        down, up = load_file(directory / "adapter_model.safetensors").values()
        config = json.loads((directory / "adapter_config.json").read_text())
        inputs = np.random.default_rng(0).standard_normal((200, shapes.hidden))
        delta = inputs @ down.T @ up.T * (config["lora_alpha"] / config["r"])
        assert float(delta.std()) == pytest.approx(0.05, rel=0.25), name


def test_an_upload_is_a_form_with_one_file_per_part() -> None:
    body, content_type = multipart({"config": b"{}", "weights": b"\x00\r\n\xff"})
    form = message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
    parts = {
        part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in form.walk()
    }
    assert parts["config"] == b"{}"
    assert parts["weights"] == b"\x00\r\n\xff"


# the baselines' process


class FakeBaselines(Baselines):
    """Answers without a model."""

    def __init__(self) -> None:
        self.orders: list[tuple[str, int]] = []

    def measure(self, kind: str, prompts: object, adapters: object, new_tokens: int) -> dict[str, float]:
        self.orders.append((kind, new_tokens))
        return {"tokens": 8, "seconds": 2.0}


def test_the_worker_says_when_it_is_ready_and_answers_each_line_with_one_line() -> None:
    order = json.dumps({"kind": "peft", "prompts": ["x"], "adapters": ["a"], "new_tokens": 8})
    replies, fake = io.StringIO(), FakeBaselines()
    serve(fake, io.StringIO(f"{order}\n{order}\n"), replies)
    assert [json.loads(line) for line in replies.getvalue().splitlines()] == [READY] + 2 * [
        {"tokens": 8, "seconds": 2.0}
    ]
    assert fake.orders == [("peft", 8), ("peft", 8)]


def test_load_tests_import_nothing_of_ours() -> None:
    for path in (Path(__file__).parents[2] / "loadtests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module is not None else []
            assert not [name for name in names if name.startswith("loramux")], path.name
