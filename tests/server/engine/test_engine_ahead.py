"""The next step is started before the results of this one are read: nobody notices, whatever comes and goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_adapters.lora.slots import bucket_of
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.sequence import AdapterUse, FinishReason, Sequence, TokenOutput, composed
from support.fakes_engine import FakeStep, sequence, solo_reply, solo_scores
from support.fakes_rig import Rig, eventually

ERROR, LENGTH, STOP, ABORT = FinishReason.ERROR, FinishReason.LENGTH, FinishReason.STOP, FinishReason.ABORT

RANKS = {"a": 1, "b": 8, "c": 12, "d": 16, "e": 32, "f": 3}
LONGEST_PROMPT, MOST_TOKENS = 9, 7
ROWS, BLOCKS, BLOCK_SIZE = 40, 8, 2  # the longest sequence takes all blocks, the widest adapter most rows

configs = st.builds(
    SchedulerConfig,
    max_num_seqs=st.integers(1, 5),
    max_batch_tokens=st.integers(1, 12),
    max_passed_over=st.integers(0, 5),
    max_scored_tokens=st.integers(0, 3),
    max_prefetch=st.integers(1, 3),
    max_background_tokens=st.integers(1, 3),
)


@dataclass(frozen=True)
class Client:
    """What one client asks for, and how it behaves.

    Attributes:
        comes: before so many steps.
        text: what the prompt says; None: something of its own.
        stop: which token of the reply is a stop token, if there is one.
        leaves: after so many tokens, if it does.
        fails: with which token of the reply its row fails, if it does.
    """

    comes: int
    text: str | None
    prompt: int
    max_tokens: int
    uses: tuple[tuple[str, float], ...]
    background: bool
    scored_from: int | None
    continuations: tuple[tuple[int, ...], ...]
    stop: int | None
    leaves: int | None
    fails: int | None

    def sequence(self, name: str) -> Sequence:
        uses = [AdapterUse(version, RANKS[version], RANKS[version], scale) for version, scale in self.uses]
        made = sequence(
            name,
            text=self.text,
            prompt=self.prompt,
            max_tokens=self.max_tokens,
            uses=composed(uses),
            background=self.background,
            scored_from=self.scored_from,
            continuations=self.continuations,
        )
        reply = solo_reply(made)
        if self.stop is not None and self.stop < len(reply):
            made.params = replace(made.params, stop_token_ids=frozenset({reply[self.stop]}))
        return made


def _fits(uses: list[tuple[str, float]]) -> bool:
    return sum(bucket_of(RANKS[version]) for version in {version for version, _ in uses}) <= ROWS


@st.composite
def clients(draw: st.DrawFn) -> Client:
    one = st.tuples(st.sampled_from(sorted(RANKS)), st.sampled_from([1.0, -2.0]))
    uses = draw(st.one_of(st.just([]), st.lists(one, min_size=1, max_size=1), st.lists(one, max_size=3).filter(_fits)))
    rarely = st.one_of(st.none(), st.none(), st.integers(0, MOST_TOKENS))
    tail = st.lists(st.integers(0, 2), min_size=1, max_size=MOST_TOKENS).map(tuple)
    scored_from = draw(st.one_of(st.none(), st.none(), st.none(), st.integers(1, LONGEST_PROMPT)))
    continuations = draw(st.one_of(st.just([]), st.just([]), st.lists(tail, max_size=3)))
    return Client(
        comes=draw(st.integers(0, 12)),
        text=draw(st.sampled_from([None, "x", "y"])),
        prompt=draw(st.integers(1, LONGEST_PROMPT)),
        max_tokens=draw(st.integers(1 if scored_from is None and not continuations else 0, MOST_TOKENS)),
        uses=tuple(uses),
        background=draw(st.sampled_from([False, False, True])),
        scored_from=scored_from,
        continuations=tuple(continuations),
        stop=draw(rarely),
        leaves=draw(rarely),
        fails=draw(rarely),
    )


@dataclass(frozen=True)
class World:
    """What happens around the clients. Steps are counted from 0."""

    config: SchedulerConfig
    kept_blocks: int
    load_steps: int  # how long a load takes
    broken: frozenset[str]  # versions whose load fails
    retired: dict[int, str]  # step -> a version that nobody will ask for again, but for those who do
    preferred: dict[int, frozenset[str]]  # step -> versions to keep on the device
    scores_ahead: bool


worlds = st.builds(
    World,
    config=configs,
    kept_blocks=st.sampled_from([0, 2, BLOCKS]),
    load_steps=st.integers(0, 4),
    broken=st.frozensets(st.sampled_from(sorted(RANKS)), max_size=1),
    retired=st.dictionaries(st.integers(0, 25), st.sampled_from(sorted(RANKS)), max_size=3),
    preferred=st.dictionaries(
        st.integers(0, 25), st.frozensets(st.sampled_from(sorted(RANKS)), max_size=2), max_size=2
    ),
    scores_ahead=st.booleans(),
)
crowds = st.lists(clients(), min_size=1, max_size=8)


class Service:
    """An engine driven step by step, with every invariant checked after each call of its scheduler."""

    def __init__(self, world: World, crowd: list[Client], *, ahead: bool) -> None:
        self.rig = Rig(
            config=world.config,
            rows=ROWS,
            num_blocks=BLOCKS,
            block_size=BLOCK_SIZE,
            max_kept=world.kept_blocks,
            instant=False,
            ahead=ahead,
        )
        self.rig.host.broken = set(world.broken)
        self.rig.runner.scores_ahead = world.scores_ahead
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.sequences: dict[str, Sequence] = {}
        self.steps = 0
        self._world = world
        self._crowd = {str(number): client for number, client in enumerate(crowd)}
        self._loads: dict[str, int] = {}
        self.rig.engine._deliver = self._deliver
        for name in ("abort", "prefetch", "schedule", "commit", "roll_back"):
            self._check_after(name)

    @property
    def is_over(self) -> bool:
        return len(self.sequences) == len(self._crowd) and not self.rig.inbox._live

    def run(self, before_step: Callable[[Service], None] = lambda service: None) -> None:
        """Until all have ended, and the engine has nothing more to do."""
        while not self.is_over:
            assert self.steps < 2000, "somebody does not end"
            before_step(self)
            self.step()
        while self.rig.engine._step():
            pass
        assert all(told[-1].finish_reason is not None for told in self.outputs.values())
        assert self.rig.blocks.used == 0 and not self.rig.slots.pinned and not self.rig.host.pinned
        assert not self.rig.scheduler.under_way and not self.rig.scheduler.has_work

    def step(self) -> None:
        rig, world = self.rig, self._world
        for name, client in self._crowd.items():
            if client.comes <= self.steps and name not in self.sequences:
                self._arrive(name, client)
        if self.steps in world.retired:
            rig.inbox.retire(world.retired[self.steps])
        if self.steps in world.preferred:
            rig.inbox.keep(world.preferred[self.steps])
        rig.host.evict_unpinned()
        for version in rig.host.loading:
            self._loads[version] = self._loads.get(version, world.load_steps) - 1
            if self._loads[version] < 0:
                del self._loads[version]
                rig.host.end_load(version)
        rig.engine._step()
        self.steps += 1

    def _arrive(self, name: str, client: Client) -> None:
        self.sequences[name] = made = client.sequence(name)
        self.outputs[name] = []
        if client.fails is not None:
            self.rig.runner.row_errors[name, client.fails] = "its row failed"
        self.rig.engine.submit(made)
        if client.leaves == 0:
            self.rig.engine.abort(name)

    def _deliver(self, outputs: list[tuple[str, TokenOutput]]) -> None:
        for name, output in outputs:
            told = self.outputs[name]
            assert not told or told[-1].finish_reason is None, "something comes after the end"
            told.append(output)
            if len(told) == self._crowd[name].leaves:
                self.rig.engine.abort(name)

    def _check_after(self, name: str) -> None:
        scheduler = self.rig.scheduler
        call: Callable[..., object] = getattr(scheduler, name)

        def checked(*arguments: object) -> object:
            found = call(*arguments)
            scheduler.check_integrity()
            return found

        setattr(scheduler, name, checked)


def heard(service: Service) -> dict[str, list[TokenOutput]]:
    """All that clients get, but for times and what was found in the cache."""
    return {
        name: [replace(one, queue_seconds=None, first_token_seconds=None, cached_tokens=0) for one in outputs]
        for name, outputs in service.outputs.items()
    }


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [output.token_id for output in outputs if output.token_id is not None]


@given(world=worlds, crowd=crowds)
@settings(max_examples=150, deadline=None)
def test_clients_hear_the_same_as_from_an_engine_that_waits_for_every_step(world: World, crowd: list[Client]) -> None:
    """Tokens, scores, reasons and their order: with stop tokens, rows that fail, clients that leave, shared prompts."""
    ahead, waiting = Service(world, crowd, ahead=True), Service(world, crowd, ahead=False)
    ahead.run()
    waiting.run()
    assert heard(ahead) == heard(waiting)
    assert waiting.rig.runner.started_ahead == 0
    for name, outputs in ahead.outputs.items():
        one, client = ahead.sequences[name], crowd[int(name)]
        assert tokens(outputs) == solo_reply(one)[: len(tokens(outputs))]
        if outputs[-1].finish_reason in (LENGTH, STOP):
            assert tokens(outputs) == solo_reply(one)
            assert list(map(list, outputs[-1].continuations)) == solo_scores(one)[1]
        if client.leaves is not None:
            assert len(outputs) <= client.leaves + 1, "something was heard after leaving"


@given(
    world=worlds,
    crowd=crowds,
    failures=st.dictionaries(st.integers(0, 6), st.sampled_from(["start", "results"]), min_size=1),
    aborts=st.dictionaries(st.integers(0, 30), st.integers(0, 7), max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_steps_that_fail_and_aborts_at_any_time_leave_nothing_behind(
    world: World, crowd: list[Client], failures: dict[int, str], aborts: dict[int, int]
) -> None:
    """Whoever is not hit has its whole reply, all others the beginning of it and one reason."""
    service = Service(world, crowd, ahead=True)

    def disturb(service: Service) -> None:
        runner = service.rig.runner
        runner.failures, runner.start_failures = [], []
        kind = failures.get(service.steps // 5) if service.steps % 5 == 4 else None
        if kind is not None:
            (runner.failures if kind == "results" else runner.start_failures).append(RuntimeError(kind))
        if service.steps in aborts:
            service.rig.engine.abort(str(aborts[service.steps]))

    service.run(disturb)
    for name, outputs in service.outputs.items():
        reply, reason = solo_reply(service.sequences[name]), outputs[-1].finish_reason
        assert tokens(outputs) == (reply if reason in (LENGTH, STOP) else reply[: len(tokens(outputs))])


def follows(rig: Rig) -> list[list[tuple[str, bool]]]:
    return [[(row.sequence.id, row.follows) for row in batch.rows] for batch in rig.runner.batches]


def test_a_step_feeds_what_the_one_before_chooses_and_none_is_started_behind_the_last_token() -> None:
    rig = Rig(ahead=True)
    rig.engine.submit(sequence("one", max_tokens=4))
    rig.engine.work_off(rig.deliveries)
    assert rig.deliveries.tokens("one") == solo_reply(sequence("one", max_tokens=4))
    assert follows(rig) == [[("one", False)], *[[("one", True)]] * 3]
    assert rig.runner.started_ahead == 3


def test_a_runner_that_waits_is_read_before_the_next_step_is_scheduled() -> None:
    rig = Rig(ahead=False)
    rig.engine.submit(sequence("one", max_tokens=4))
    rig.engine.work_off(rig.deliveries)
    assert follows(rig) == [[("one", False)]] * 4
    assert len(rig.deliveries.calls) == 4


def test_behind_a_stop_token_there_is_one_row_that_nobody_hears_of() -> None:
    free = solo_reply(sequence("one", max_tokens=9))
    rig = Rig(ahead=True)
    rig.engine.submit(sequence("one", max_tokens=9, stop=[free[3]]))
    rig.engine.work_off(rig.deliveries)
    assert rig.deliveries.tokens("one") == free[:3] and rig.deliveries.reason("one") is STOP
    assert len(rig.runner.batches) == 5
    assert [counts[2] for counts in rig.metrics.of("tokens")] == [1, 1, 1], "what is dropped is not counted"
    assert len(rig.metrics.of("step_done")) == 5, "but the device did it"


def test_a_drain_waits_for_the_step_under_way_although_nobody_does() -> None:
    free = solo_reply(sequence("one", max_tokens=9))
    rig = Rig(ahead=True).start()
    rig.engine.submit(sequence("one", max_tokens=9, stop=[free[2]]))
    rig.stop()
    assert rig.deliveries.reason("one") is STOP
    assert rig.runner._last is not None and rig.runner._last.is_read and not rig.scheduler.under_way


def test_an_abort_drops_what_is_under_way_and_gives_its_place_to_the_next() -> None:
    rig = Rig(config=SchedulerConfig(max_num_seqs=1), num_blocks=4, ahead=True).start()
    rig.hold_step("leaver")
    rig.engine.submit(sequence("next", prompt=8, max_tokens=9))  # it takes all blocks
    rig.engine.abort("leaver")
    rig.runner.gate.set()
    assert rig.deliveries.reason("leaver") is ABORT
    assert rig.deliveries.reason("next") is LENGTH
    assert rig.deliveries.tokens("next") == solo_reply(sequence("next", prompt=8, max_tokens=9))
    assert len(rig.deliveries.of("leaver")) <= 2
    assert sum(row.sequence.id == "leaver" for batch in rig.runner.batches for row in batch.rows) <= 2
    rig.stop()


def test_where_a_step_cannot_be_started_the_one_under_way_ends_first() -> None:
    rig = Rig(ahead=True)
    rig.engine._deliver = rig.deliveries
    rig.engine.submit(sequence("ends", max_tokens=1, version="v"))
    rig.engine.submit(sequence("goes on", max_tokens=5))
    rig.engine._step()
    rig.engine.submit(sequence("comes", max_tokens=5, version="w"))
    rig.runner.start_failures = [RuntimeError("no memory")]
    rig.engine._step()
    assert rig.deliveries.reason("ends") is LENGTH
    assert rig.deliveries.tokens("goes on") == solo_reply(sequence("goes on", max_tokens=1))
    assert not rig.deliveries.of("comes")
    rig.engine._step()
    assert rig.deliveries.reason("goes on") is rig.deliveries.reason("comes") is ERROR
    assert rig.slots.resident == ["v"], "what the step under way loaded is there, the other's load is not believed"
    assert not rig.scheduler.under_way and rig.blocks.used == 0


def test_a_step_that_fails_fails_the_one_that_was_started_on_top_of_it() -> None:
    rig = Rig(ahead=True)
    rig.engine._deliver = rig.deliveries
    rig.engine.submit(sequence("first", version="v", max_tokens=5))
    rig.engine._step()
    rig.engine.submit(sequence("on top", version="v", max_tokens=5))
    rig.runner.failures = [RuntimeError("device lost")]
    rig.engine._step()
    assert rig.deliveries.reason("first") is rig.deliveries.reason("on top") is ERROR
    assert rig.slots.resident == [] and rig.blocks.used == 0 and not rig.host.pinned
    assert rig.runner._last is not None and rig.runner._last.is_read, "the device is done with what was dropped"
    rig.engine.submit(sequence("after", version="v", max_tokens=5))
    rig.engine.work_off(rig.deliveries)
    assert rig.deliveries.tokens("after") == solo_reply(sequence("after", version="v", max_tokens=5))


def test_what_is_scored_is_read_before_its_sequence_goes_on_and_others_do_not_wait() -> None:
    rig = Rig(ahead=True)
    rig.runner.scores_ahead = True
    scored = sequence("scored", prompt=6, max_tokens=2, scored_from=2, continuations=[(1, 2), (3, 4)])
    rig.engine.submit(scored)
    rig.engine.submit(sequence("other", max_tokens=9))
    rig.engine.work_off(rig.deliveries)
    batches = follows(rig)
    assert sum(("other", True) in batch for batch in batches) == 8
    assert not any(
        "scored" in dict(one) and "scored" in dict(other) for one, other in zip(batches[:3], batches[1:4], strict=True)
    )
    assert rig.deliveries.tokens("scored") == solo_reply(scored)
    final = rig.deliveries.final("scored")
    assert list(map(list, final.continuations)) == solo_scores(scored)[1]


def test_whose_text_is_scored_keeps_its_part_of_the_next_steps() -> None:
    """While it waits nobody else gets the token that it needs when it goes on."""
    rig = Rig(config=SchedulerConfig(max_num_seqs=3, max_batch_tokens=2), ahead=True)
    rig.runner.scores_ahead = True
    rig.engine.submit(sequence("scored", prompt=1, max_tokens=5, continuations=[(1, 2, 3)]))
    rig.engine.submit(sequence("other", prompt=1, max_tokens=9))
    rig.engine.submit(sequence("third", prompt=1, max_tokens=5))
    rig.engine.work_off(rig.deliveries)
    assert all(batch.num_tokens <= 2 for batch in rig.runner.batches)
    assert [rig.deliveries.reason(name) for name in ("scored", "other", "third")] == [LENGTH] * 3


@pytest.mark.parametrize("ahead", [False, True])
def test_what_a_reply_left_in_the_cache_is_found_by_who_goes_on_from_it(ahead: bool) -> None:
    rig = Rig(max_kept=16, ahead=ahead)
    first = sequence("one", prompt=4, max_tokens=9)
    reply = solo_reply(first)
    again = sequence("two", prompt=1, max_tokens=2)
    again.prompt = [*first.prompt, *reply]
    for one in (first, again):
        rig.engine.submit(one)
        rig.engine.work_off(rig.deliveries)
    assert rig.deliveries.of("two")[0].cached_tokens == 12
    assert rig.deliveries.tokens("two") == solo_reply(again)


def test_steps_take_no_more_seconds_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is counted from the end of the one before, where it was started earlier."""
    rig = Rig(ahead=True)
    results = FakeStep.results

    def late(step: FakeStep) -> list[object]:
        rig.clock.advance(2.0)
        return list(results(step))

    monkeypatch.setattr(FakeStep, "results", late)
    rig.engine.submit(sequence("one", max_tokens=4))
    rig.engine.work_off(rig.deliveries)
    assert [seconds for _, _, seconds in rig.metrics.of("step_done")] == [2.0] * 4


def test_the_watchdog_sees_a_step_that_hangs_although_the_next_was_started() -> None:
    rig = Rig(ahead=True).start()
    rig.runner.gate.clear()
    rig.engine.submit(sequence("one", max_tokens=9))
    eventually(lambda: len(rig.runner.batches) == 2)
    assert rig.engine.alive
    rig.clock.advance(61)
    assert not rig.engine.alive
    rig.runner.gate.set()
    eventually(lambda: rig.engine.alive)
    assert rig.deliveries.reason("one") is LENGTH
    rig.stop()
