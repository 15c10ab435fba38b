"""Shares of what the engine does: counters by flow, and how far the scheduler lets two flows come apart."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from itertools import combinations
from typing import NamedTuple

from hypothesis import given, settings, target
from hypothesis import strategies as st

from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.fair_share import PROMPT_WEIGHT, REPLY_WEIGHT, FairShare
from loramux_server.engine.scheduling.sequence import AdapterUse, Flow, Sequence
from support.fakes_engine import sequence
from support.fakes_scheduler import Bench

A, B, C = ("a",), ("b",), ("c",)


def share_of(*flows: Flow) -> FairShare:
    """All of them active."""
    share = FairShare()
    for flow in flows:
        share.enter(flow)
        share.activate(flow)
    return share


def test_who_got_least_is_next() -> None:
    share = share_of(A, B, C)
    share.charge(A, 5)
    share.charge(B, 3)
    assert sorted([A, B, C], key=share.turn) == [C, B, A]


def test_who_comes_back_brings_no_credit_and_loses_no_debt() -> None:
    share = share_of(A, B)
    share.charge(A, 10)
    share.charge(B, 8)
    share.enter(C)
    assert share.turn(C) == (8,), "as if it became active now"
    share.activate(C)
    assert share.turn(C) == (8,)
    share.deactivate(A)
    share.charge(B, 1)
    share.activate(A)
    assert share.turn(A) == (10,)


def test_when_nobody_waits_the_last_who_did_is_the_measure() -> None:
    share = share_of(A, B)
    share.charge(A, 10)
    share.deactivate(A)
    share.deactivate(B)
    share.charge(B, 4)  # what runs goes on
    share.enter(C)
    share.activate(C)
    assert share.turn(C) == (4,)


def test_each_level_of_a_path_is_shared_for_itself() -> None:
    flows = [("one", "a"), ("one", "b"), ("two", "a")]
    share = share_of(*flows)
    served: Counter[Flow] = Counter()
    for _ in range(400):
        flow = min(flows, key=lambda flow: (share.turn(flow), flow))
        share.charge(flow, 1)
        served[flow] += 1
    assert [served[flow] for flow in flows] == [100, 100, 200]
    share.deactivate(("one", "a"))
    share.deactivate(("one", "b"))
    share.charge(("two", "a"), 50)
    share.activate(("one", "b"))
    assert share.turn(("one", "b")) == (250, 100), "lifted where it had left, and only there"


def test_flows_that_are_gone_are_forgotten_unless_they_got_more_than_others() -> None:
    share = share_of(A)
    for number in range(1000):
        flow = (f"once-{number}",)
        share.enter(flow)
        share.activate(flow)
        share.charge(flow, 1)
        share.charge(A, 1)
        share.deactivate(flow)
        share.leave(flow)
    assert len(share) < 200
    share.enter(B)
    share.activate(B)
    share.charge(B, 500)
    share.deactivate(B)
    share.leave(B)
    for number in range(1000):
        share.enter((f"again-{number}",))
        share.leave((f"again-{number}",))
    share.enter(B)
    share.activate(B)
    assert share.turn(B) == (1500,)


def test_one_request_beside_two_hundred_of_another_adapter_takes_the_next_seat() -> None:
    bench = Bench(SchedulerConfig(max_num_seqs=4), num_blocks=256)
    bench.add(*(sequence(f"hot {number}", version="hot", max_tokens=4) for number in range(200)))
    bench.run(2)
    bench.add(sequence("one", version="other", max_tokens=4))
    while "one" in bench.waiting:
        bench.step()
    assert len(bench.ended) == 4, "those that ran"


def test_whoever_asks_for_many_sums_of_adapters_gets_no_more_than_their_adapters_would() -> None:
    bench = Bench(SchedulerConfig(max_num_seqs=2), num_blocks=256, rows=256)
    sums = [names for size in range(1, 5) for names in combinations("abcd", size)]
    for number in range(20):
        for names in sums:
            uses = [AdapterUse(name, 8, 1) for name in names]
            bench.add(sequence(f"sum {number} {names}", uses=uses, max_tokens=4))
    bench.add(*(sequence(f"one {number}", version="other", max_tokens=4) for number in range(100)))
    bench.run(400)
    ended = Counter(name.split()[0] for name in bench.ended)
    assert ended["one"] >= ended["sum"] / 4 - 2 > 10, "of five adapters that all wait, one"


def test_a_flow_whose_adapter_was_loading_has_no_credit_for_that_time() -> None:
    bench = Bench(SchedulerConfig(max_num_seqs=2), instant=False)
    bench.add(*(sequence(f"late {number}", version="v", max_tokens=4) for number in range(40)))
    for number in range(40):
        bench.add(sequence(f"base {number}", max_tokens=4))
    bench.run(40)
    bench.host.end_load("v")
    done = len(bench.ended)
    bench.run(40)
    ended = Counter(name.split()[0] for name in list(bench.ended)[done:])
    assert abs(ended["late"] - ended["base"]) <= 3, "they take turns from then on"


def test_tokens_found_in_the_prefix_cache_cost_nothing() -> None:
    bench = Bench(SchedulerConfig(max_num_seqs=1), num_blocks=64, block_size=4, max_kept=64)
    bench.add(sequence("first", text="x", prompt=16, max_tokens=1, version="v"))
    bench.step()
    before = bench.scheduler._share.turn(("", "v", "v"))
    bench.add(sequence("second", text="x", prompt=16, max_tokens=1, version="v"))
    bench.step()
    assert bench.ended.keys() == {"first", "second"}
    cost, _, _ = (
        after - first for after, first in zip(bench.scheduler._share.turn(("", "v", "v")), before, strict=True)
    )
    assert cost == PROMPT_WEIGHT * 4 + REPLY_WEIGHT, "one block had to be computed"


def ended_of(bench: Bench) -> Counter[str]:
    """How many have ended, by the first word of their names."""
    return Counter(name.split()[0] for name in bench.ended)


def test_a_tenant_of_many_adapters_gets_no_more_than_one_of_one() -> None:
    bench = Bench(SchedulerConfig(max_num_seqs=2), num_blocks=256, rows=256)
    for number in range(100):
        for adapter in "abcd":
            bench.add(sequence(f"many {adapter} {number}", version=adapter, tenant="many", max_tokens=4))
        bench.add(sequence(f"one {number}", version="e", tenant="one", max_tokens=4))
    bench.run(200)
    ended = ended_of(bench)
    assert abs(ended["many"] - ended["one"]) <= 3 and ended["one"] > 40
    by_adapter = Counter(name.split()[1] for name in bench.ended if name.startswith("many"))
    assert max(by_adapter.values()) - min(by_adapter.values()) <= 1, "and its adapters share that"


def test_a_tenant_gets_as_much_as_it_weighs_and_the_operator_weighs_one() -> None:
    bench = Bench(SchedulerConfig(max_num_seqs=2), num_blocks=256, rows=256)
    for number in range(200):
        bench.add(sequence(f"heavy {number}", tenant="heavy", weight=3, max_tokens=4))
        bench.add(sequence(f"light {number}", tenant="light", max_tokens=4))
        bench.add(sequence(f"operator {number}", max_tokens=4))
    bench.run(300)
    ended = ended_of(bench)
    assert ended["light"] >= 30 and abs(ended["light"] - ended["operator"]) <= 3
    assert abs(ended["heavy"] - 3 * ended["light"]) <= 6


def test_a_higher_priority_starts_before_all_others_and_stops_no_reply() -> None:
    bench = Bench(SchedulerConfig(max_num_seqs=2), num_blocks=256, rows=256)
    bench.add(*(sequence(f"low {number}", tenant="low", max_tokens=8) for number in range(40)))
    bench.run(2)
    bench.add(*(sequence(f"high {number}", tenant="high", priority=1, max_tokens=8) for number in range(6)))
    while len(bench.ended) < 8:
        bench.step()
    assert ended_of(bench) == {"low": 2, "high": 6}, "the two that ran, then all of the higher"


class FlowKind(NamedTuple):
    """What the sequences of one flow look like, and from which step on there are some that wait."""

    version: str | None
    rank: int
    prompts: tuple[int, int]  # shortest and longest
    replies: tuple[int, int]
    shares_prompts: bool
    begins: int


class Course(NamedTuple):
    config: SchedulerConfig
    rows: int
    blocks: int
    block_size: int
    kinds: list[FlowKind]
    steps: int
    seed: int
    ahead: bool


@st.composite
def courses(draw: st.DrawFn, passed_over: int, *, all_fit: bool) -> Course:
    """`all_fit`: the device holds the adapters of all flows at once, so that none is ever loaded anew."""
    block_size, blocks = draw(st.sampled_from([1, 2, 4])), draw(st.integers(4, 24))
    room = block_size * blocks

    def lengths(most: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(1, most), st.integers(1, most)).map(lambda both: (min(both), max(both)))

    kinds = []
    for number in range(draw(st.integers(2, 5))):
        prompts = draw(lengths(room // 2))
        kinds.append(
            FlowKind(
                draw(st.sampled_from([None, f"v{number}"])) if number == 0 else f"v{number}",
                draw(st.sampled_from([8, 8, 16, 32])),
                prompts,
                draw(lengths(room - prompts[1])),
                draw(st.booleans()),
                draw(st.sampled_from([0, 0, 0, 7, 30])),
            )
        )
    seats = draw(st.integers(1, 6))
    config = SchedulerConfig(
        max_num_seqs=seats,
        max_batch_tokens=draw(st.integers(seats, 64)),
        max_passed_over=passed_over,
        max_wait_seconds=1e9,
    )
    rows = 32 * len(kinds) if all_fit else draw(st.sampled_from([32, 40, 64]))
    steps, seed = draw(st.integers(20, 100)), draw(st.integers(0, 1 << 20))
    return Course(config, rows, blocks, block_size, kinds, steps, seed, draw(st.booleans()))


def apart(course: Course) -> int:
    """How far apart any two flows come, in any stretch of time in which both have somebody waiting all along.

    In the weights of the fair share, as the paper counts.
    """
    bench = Bench(
        course.config,
        rows=course.rows,
        num_blocks=course.blocks,
        block_size=course.block_size,
        max_kept=course.blocks // 2,
        ahead=course.ahead,
    )
    chance = random.Random(course.seed)
    here: dict[int, list[Sequence]] = {}  # flow -> those that have not ended
    got_by_ended: Counter[int] = Counter()
    got: dict[int, int] = {}
    differences: dict[tuple[int, int], list[int]] = defaultdict(list)  # of two flows that both wait all along
    for step in range(course.steps):
        for flow, kind in enumerate(course.kinds):
            if step < kind.begins:
                continue
            waiting = sum(one.scheduled_at is None for one in here.setdefault(flow, []))
            for number in range(waiting, course.config.max_num_seqs + 1):  # no step can start them all
                one = sequence(
                    f"{flow}/{step}/{number}",
                    prompt=chance.randint(*kind.prompts),
                    max_tokens=chance.randint(*kind.replies),
                    version=kind.version,
                    rank=kind.rank,
                    text=f"text {flow}" if kind.shares_prompts else None,
                )
                bench.add(one)
                here[flow].append(one)
        if step == 0 or len(here) > len(got):
            note(differences, {flow: got.get(flow, 0) for flow in here})
        bench.step()
        for flow in here:
            got_by_ended[flow] += sum(served(one) for one in here[flow] if one.id in bench.ended)
            here[flow] = [one for one in here[flow] if one.id not in bench.ended]
            got[flow] = got_by_ended[flow] + sum(map(served, here[flow]))
        note(differences, got)
    return max((max(each) - min(each) for each in differences.values()), default=0)


def served(one: Sequence) -> int:
    """As the paper counts: its prompt when it starts, but for what was found; its reply as it comes."""
    if one.scheduled_at is None:
        return 0
    return PROMPT_WEIGHT * (len(one.prompt) - one.num_cached) + REPLY_WEIGHT * len(one.output)


def note(differences: dict[tuple[int, int], list[int]], got: dict[int, int]) -> None:
    for one, other in combinations(sorted(got), 2):
        differences[one, other].append(got[one] - got[other])


def proven(course: Course) -> int:
    """The paper's bound for two flows. A sequence's last token is chosen and needs no place in the cache."""
    longest = max(kind.prompts[1] for kind in course.kinds)
    tokens = course.blocks * course.block_size + course.config.max_num_seqs
    return 2 * max(PROMPT_WEIGHT * longest, REPLY_WEIGHT * tokens)


@given(course=courses(passed_over=0, all_fit=True))
@settings(max_examples=60, deadline=None)
def test_two_flows_that_always_wait_never_come_further_apart_than_is_proven(course: Course) -> None:
    """In strict order of turns, as the paper has it: who does not fit lets nobody pass."""
    worst = apart(course)
    target(worst / proven(course))
    assert worst <= proven(course)


@given(course=courses(passed_over=4, all_fit=False))
@settings(max_examples=30, deadline=None)
def test_who_is_passed_over_adds_no_more_than_those_who_pass(course: Course) -> None:
    """While somebody lacks blocks or a slot, so many sequences of others may start: so much more, twice.

    And while an adapter is loaded anew, a step long, others may fill the cache.
    """
    dearest = max(PROMPT_WEIGHT * kind.prompts[1] + REPLY_WEIGHT * kind.replies[1] for kind in course.kinds)
    bound = 2 * proven(course) + 2 * course.config.max_passed_over * dearest
    worst = apart(course)
    target(worst / bound)
    assert worst <= bound
