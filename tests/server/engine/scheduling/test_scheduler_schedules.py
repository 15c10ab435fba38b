"""The scheduler under arbitrary schedules: no leak, no starvation, no wrong adapter, whatever comes and goes."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from loramux_adapters.lora.slots import bucket_of
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.sequence import AdapterUse, Sequence, composed
from support.fakes_engine import sequence, solo_reply, solo_scores
from support.fakes_scheduler import Bench

RANKS = {"a": 1, "b": 8, "c": 6, "d": 12, "e": 16, "f": 32, "g": 8, "h": 9, "i": 24, "j": 3}
LONGEST_PROMPT, MOST_TOKENS = 12, 8
ROWS, BLOCKS, BLOCK_SIZE = 40, 10, 2  # the longest sequence takes all blocks, the widest adapter most rows
CROWD = 12  # sequences that wait at any time, or more

configs = st.builds(
    SchedulerConfig,
    max_num_seqs=st.integers(1, 6),
    max_batch_tokens=st.integers(1, 16),
    max_passed_over=st.integers(0, 5),
    max_wait_seconds=st.sampled_from([0.0, 3.0, 1e9]),
    max_scored_tokens=st.integers(0, 4),
    max_prefetch=st.integers(1, 4),
    max_prefetch_bytes=st.integers(1, 60),  # an adapter takes a byte for each rank
    max_background_tokens=st.integers(1, 4),
    max_background_wait_seconds=st.sampled_from([0.0, 5.0, 1e9]),
)


TEXTS = (None, "x", "y")  # what a prompt says: something of its own, or what many others say too


class Kind(NamedTuple):
    text: str | None
    prompt: int  # its length
    max_tokens: int
    uses: list[tuple[str, float]]  # (version, factor) of each adapter
    scored_from: int | None  # the first prompt token that is scored
    continuations: list[tuple[int, ...]]


def fits(uses: list[tuple[str, float]]) -> bool:
    return sum(bucket_of(RANKS[version]) for version in {version for version, _ in uses}) <= ROWS


@st.composite
def kinds(draw: st.DrawFn) -> Kind:
    """What an idle server can run: the base, one adapter, or several of them, maybe one of them twice."""
    one = st.tuples(st.sampled_from(sorted(RANKS)), st.sampled_from([1.0, 0.5, -2.0]))
    uses = draw(st.one_of(st.just([]), st.lists(one, min_size=1, max_size=1), st.lists(one, max_size=5).filter(fits)))
    tail = st.lists(st.integers(0, 2), min_size=1, max_size=MOST_TOKENS).map(tuple)
    scored_from = draw(st.one_of(st.none(), st.integers(1, LONGEST_PROMPT)))
    continuations = draw(st.one_of(st.just([]), st.lists(tail, max_size=4)))
    return Kind(
        text=draw(st.sampled_from(TEXTS)),
        prompt=draw(st.integers(1, LONGEST_PROMPT)),
        max_tokens=draw(st.integers(1 if scored_from is None and not continuations else 0, MOST_TOKENS)),
        uses=uses,
        scored_from=scored_from,
        continuations=continuations,
    )


def build(id: str, kind: Kind, *, background: bool = False, arrived: float = 0.0, first: str | None = None) -> Sequence:
    """`first`: whose prompt it shares."""
    uses = [AdapterUse(version, RANKS[version], RANKS[version], scale) for version, scale in kind.uses]
    return sequence(
        id,
        text=kind.text,
        prompt=kind.prompt,
        max_tokens=kind.max_tokens,
        uses=composed(uses),
        background=background,
        arrived=arrived,
        scored_from=kind.scored_from,
        continuations=kind.continuations,
        shares_prompt_with=first,
    )


def most_steps(kind: Kind) -> int:
    """That it can take, at a token a step."""
    return kind.prompt + kind.max_tokens + sum(map(len, kind.continuations))


class Loads:
    """Loads that take a number of ticks, many at a time."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._left: dict[str, int] = {}
        self.latency: dict[str, int] = {}

    def tick(self) -> None:
        for version in self._bench.host.loading:
            left = self._left.setdefault(version, self.latency.get(version, 0))
            if left == 0:
                del self._left[version]
                self._bench.host.end_load(version)
            else:
                self._left[version] = left - 1


class Schedules(RuleBasedStateMachine):
    """Arrivals, aborts, loads of any length that may fail, failing steps, evictions from host memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bench: Bench
        self.begun = False
        self.sequences: dict[str, Sequence] = {}

    @precondition(lambda self: not self.begun)
    @rule(
        config=configs,
        broken=st.sets(st.sampled_from(sorted(RANKS)), max_size=2),
        kept=st.sampled_from([0, 1, 4, BLOCKS]),
        ahead=st.booleans(),
    )
    def begin(self, config: SchedulerConfig, broken: set[str], kept: int, ahead: bool) -> None:
        self.begun = True
        self.bench = Bench(
            config, rows=ROWS, num_blocks=BLOCKS, block_size=BLOCK_SIZE, max_kept=kept, instant=False, ahead=ahead
        )
        self.bench.host.broken = broken
        self.loads = Loads(self.bench)

    @precondition(lambda self: self.begun)
    @rule(
        arrivals=st.lists(
            st.tuples(kinds(), st.sampled_from([False, False, True]), st.sampled_from([0, 0, 1, 3])),
            min_size=1,
            max_size=4,
        )
    )
    def arrive(self, arrivals: list[tuple[Kind, bool, int]]) -> None:
        """Some with others that share their prompt."""
        for kind, background, others in arrivals:
            now, first = self.bench.clock.now, str(len(self.sequences))
            for index in range(1 + others):
                one = build(
                    str(len(self.sequences)), kind, background=background, arrived=now, first=first if index else None
                )
                self.sequences[one.id] = one
                self.bench.add(one)

    @precondition(lambda self: self.begun)
    @rule(version=st.sampled_from(sorted(RANKS)), latency=st.integers(0, 6))
    def change_latency(self, version: str, latency: int) -> None:
        self.loads.latency[version] = latency

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.bench.abort(data.draw(st.sets(st.sampled_from(sorted(self.sequences)), min_size=1, max_size=3)))

    @precondition(lambda self: self.begun)
    @rule(steps=st.integers(1, 5), seconds=st.sampled_from([0.0, 1.0]))
    def run_steps(self, steps: int, seconds: float) -> None:
        for _ in range(steps):
            self.bench.clock.advance(seconds)
            self.bench.step()
            self.loads.tick()

    @precondition(lambda self: self.begun)
    @rule()
    def break_a_step(self) -> None:
        self.bench.step(fails=True)

    @precondition(lambda self: self.begun)
    @rule()
    def evict_from_host_memory(self) -> None:
        self.bench.host.evict_unpinned()

    def teardown(self) -> None:
        """Once arrivals stop, all end: a step does at least one token of work unless everybody waits for a load."""
        if not self.begun:
            return
        work = sum(
            len(one.prompt) + one.params.max_tokens + sum(map(len, one.params.continuations))
            for one in self.sequences.values()
        )
        idle = sum(
            1 + sum(self.loads.latency.get(use.version, 0) for use in one.adapters) for one in self.sequences.values()
        )
        for _ in range(2 * (work + idle + 1)):  # a step may find that all wait for the one under way
            if not self.bench.has_work:
                break
            self.bench.step()
            self.loads.tick()
        self.bench.check_empty()
        assert self.bench.ended.keys() == self.sequences.keys()
        for id, outcome in self.bench.ended.items():
            one = self.sequences[id]
            broken = self.bench.host.broken & {use.version for use in one.adapters}
            assert (outcome == "failed") <= (len(broken) > 0)
            reply = solo_reply(one)
            assert one.output == reply if outcome == "done" else one.output == reply[: len(one.output)]
            if outcome == "done":
                assert (one.prompt_logprobs, one.continuation_logprobs) == solo_scores(one)


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


@given(
    config=configs,
    hot=st.lists(kinds(), min_size=1, max_size=3),
    own=st.lists(kinds(), min_size=1, max_size=4),
    latency=st.integers(0, 5),
    ahead=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_servers_own_work_ends_although_a_hot_crowd_keeps_arriving(
    config: SchedulerConfig, hot: list[Kind], own: list[Kind], latency: int, ahead: bool
) -> None:
    """It gives way for a while, and is then served like all others."""
    patient = replace(config, max_background_wait_seconds=10.0)
    bench = Bench(
        patient, rows=ROWS, num_blocks=BLOCKS, block_size=BLOCK_SIZE, max_kept=BLOCKS, instant=False, ahead=ahead
    )
    loads = Loads(bench)
    loads.latency = dict.fromkeys(RANKS, latency)
    for i, kind in enumerate(own):
        bench.add(build(f"own {i}", kind, background=True))
    others = config.max_num_seqs + config.max_passed_over + 1
    longest = (1 + ahead) * max(map(most_steps, own + hot))
    bound = 10 + (len(own) + config.max_num_seqs + CROWD) * (others * longest + latency + 2)
    expected = {f"own {i}" for i in range(len(own))}
    for number in range(bound):
        while len(bench.waiting) < CROWD:
            bench.add(build(f"hot {number} {len(bench.waiting)}", hot[number % len(hot)], arrived=bench.clock.now))
        bench.clock.advance(1.0)
        bench.step()
        loads.tick()
        if expected <= bench.ended.keys():
            break
    assert expected <= bench.ended.keys()


@given(
    config=configs,
    cold=st.lists(kinds(), min_size=1, max_size=8),
    hot=st.lists(kinds(), min_size=1, max_size=3),
    latency=st.integers(0, 5),
    evicting=st.booleans(),
    ahead=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_nothing_starves_while_a_hot_crowd_keeps_arriving(
    config: SchedulerConfig,
    cold: list[Kind],
    hot: list[Kind],
    latency: int,
    evicting: bool,
    ahead: bool,
) -> None:
    """Everyone who is blocked sees at most `max_passed_over` start before him, and waits for those that run.

    So a sequence that is blocked starts within the time of that many whole sequences; and only those in the queue at
    the same time can hold the host memory that it needs to begin its load.
    """
    bench = Bench(
        config, rows=ROWS, num_blocks=BLOCKS, block_size=BLOCK_SIZE, max_kept=BLOCKS, instant=False, ahead=ahead
    )
    loads = Loads(bench)
    loads.latency = dict.fromkeys(RANKS, latency)
    for i in range(config.max_num_seqs):
        bench.add(build(f"before {i}", hot[i % len(hot)]))
    for i, kind in enumerate(cold):
        bench.add(build(f"cold {i}", kind))
    longest = (1 + ahead) * max(map(most_steps, cold + hot))
    others = config.max_num_seqs + config.max_passed_over + 1
    bound = (len(cold) + config.max_num_seqs + CROWD) * (others * longest + latency + 2)
    expected = {f"cold {i}" for i in range(len(cold))}
    for number in range(bound):
        while len(bench.waiting) < CROWD:
            bench.add(build(f"hot {number} {len(bench.waiting)}", hot[number % len(hot)]))
        if evicting:
            bench.host.evict_unpinned()
        bench.step()
        loads.tick()
        if expected <= bench.ended.keys():
            break
    assert expected <= bench.ended.keys()
