"""The engine when things end: failures at three levels, the warm-up, the watchdog, draining."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from loramux_adapters.errors import DeviceFull
from loramux_server.engine.engine import MAX_FAILED_STEPS
from loramux_server.engine.inbox import EngineState
from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.sequence import Batch, FinishReason, Sequence
from loramux_server.errors import EngineDead, ServerDraining
from support.fakes_engine import VOCABULARY, FakeStep, sequence, solo_reply
from support.fakes_rig import Rig, eventually
from support.grammars import FakeGrammar

ERROR, LENGTH, STOP, ABORT = FinishReason.ERROR, FinishReason.LENGTH, FinishReason.STOP, FinishReason.ABORT


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig().start()
    yield rig
    rig.stop()


def health(rig: Rig) -> tuple[bool, bool]:
    return rig.engine.alive, rig.engine.ready


def test_an_error_of_one_row_ends_that_sequence_alone(rig: Rig) -> None:
    rig.runner.row_errors["bad"] = "the logits are not finite"
    rig.engine.submit(sequence("bad"))
    rig.engine.submit(sequence("good"))
    final = rig.deliveries.final("bad")
    assert (final.token_id, final.finish_reason, final.error) == (None, ERROR, "the logits are not finite")
    assert rig.deliveries.reason("good") is LENGTH


def test_a_failed_step_ends_its_batch_frees_everything_and_the_engine_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(config=SchedulerConfig(max_num_seqs=2))
    rig.runner.failures = [RuntimeError("secret detail at /some/path")]
    for name in "abc":
        rig.engine.submit(sequence(name, version="v"))
    rig.start()
    for name in "ab":
        final = rig.deliveries.final(name)
        assert final.finish_reason is ERROR and final.error is not None
        assert final.error.startswith("the step failed") and "secret" not in final.error
    assert rig.deliveries.reason("c") is LENGTH
    assert rig.deliveries.tokens("c") == solo_reply(sequence("c", version="v"))
    assert len([load for batch in rig.runner.batches for load in batch.slot_loads]) == 2, "the load was not believed"
    assert "secret detail" in caplog.text
    rig.stop()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_runner_that_gives_too_few_tokens_fails_the_step(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(ahead=ahead)
    results = FakeStep.results
    answers = iter([lambda step: results(step)[1:]])
    monkeypatch.setattr(FakeStep, "results", lambda step: next(answers, results)(step))
    rig.start().engine.submit(sequence("one"))
    assert rig.deliveries.reason("one") is ERROR
    rig.engine.submit(sequence("two"))
    assert rig.deliveries.reason("two") is LENGTH
    rig.stop()


def test_steps_that_fail_in_a_row_end_the_engine_and_everything_it_has() -> None:
    rig = Rig(config=SchedulerConfig(max_num_seqs=1))
    rig.runner.failures = [RuntimeError("device lost")] * MAX_FAILED_STEPS
    for name in "abcde":
        rig.engine.submit(sequence(name))
    rig.engine.start(rig.deliveries)
    assert [rig.deliveries.reason(name) for name in "abcde"] == [ERROR] * 5
    assert all(len(rig.deliveries.of(name)) == 1 for name in "abcde")
    eventually(lambda: not rig.engine.alive)
    assert rig.engine.state is EngineState.DEAD and not rig.engine.ready
    with pytest.raises(EngineDead):
        rig.engine.submit(sequence("late"))
    rig.engine.drain(1)


def test_failed_steps_with_a_good_one_between_do_not_end_the_engine(rig: Rig) -> None:
    for i in range(2 * MAX_FAILED_STEPS):
        rig.runner.failures = [RuntimeError("once")] * (i % 2)
        rig.engine.submit(sequence(str(i)))
        rig.deliveries.final(str(i))
    assert rig.engine.alive


def test_an_adapter_for_which_the_device_has_no_room_ends_nobody_but_its_own_step(rig: Rig) -> None:
    for i in range(2 * MAX_FAILED_STEPS):
        rig.runner.start_failures = [DeviceFull("no room")]
        rig.engine.submit(sequence(str(i), version="large"))
        final = rig.deliveries.final(str(i))
        assert final.finish_reason is ERROR and "no room for an adapter" in str(final.error)
    assert rig.engine.alive
    rig.engine.submit(sequence("base"))
    assert rig.deliveries.reason("base") is LENGTH
    for i in range(MAX_FAILED_STEPS):  # nothing is to be copied: the engine cannot work there
        rig.runner.start_failures = [DeviceFull("no room")]
        rig.engine.submit(sequence(f"of the base {i}"))
        assert rig.deliveries.reason(f"of the base {i}") is ERROR
    eventually(lambda: not rig.engine.alive)


def test_a_bug_outside_the_step_ends_the_engine_and_every_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()

    def broken() -> Batch:
        raise ValueError("a bug")

    monkeypatch.setattr(rig.scheduler, "schedule", broken)
    rig.engine.submit(sequence("one"))
    rig.engine.start(rig.deliveries)
    final = rig.deliveries.final("one")
    assert final.finish_reason is ERROR and "bug" not in str(final.error)
    eventually(lambda: rig.engine.state is EngineState.DEAD)


def test_a_failing_warm_up_is_reported_to_who_starts_the_engine() -> None:
    def fails() -> None:
        raise MemoryError

    rig = Rig(warm_up=fails)
    with pytest.raises(EngineDead):
        rig.start()
    assert not rig.engine.alive


def test_an_engine_is_ready_only_after_its_warm_up() -> None:
    gate = threading.Event()
    rig = Rig(warm_up=lambda: None if gate.wait(10) else None)
    assert health(rig) == (False, False)
    rig.engine.start(rig.deliveries)
    assert health(rig) == (True, False)
    gate.set()
    rig.engine.wait_until_warm()
    assert health(rig) == (True, True)
    rig.stop()


def test_the_watchdog_sees_a_step_that_hangs_and_sees_it_end(rig: Rig) -> None:
    rig.hold_step("one")
    rig.clock.advance(59)
    assert health(rig) == (True, True)
    rig.clock.advance(2)
    assert health(rig) == (False, False)
    with pytest.raises(EngineDead):
        rig.engine.submit(sequence("two"))
    rig.runner.gate.set()
    eventually(lambda: rig.engine.alive)
    rig.deliveries.final("one")
    rig.clock.advance(1000)
    assert health(rig) == (True, True), "an idle engine does not hang"


def test_a_drain_finishes_what_runs_and_what_waits_and_refuses_the_rest() -> None:
    rig = Rig(config=SchedulerConfig(max_num_seqs=1)).start()
    rig.hold_step("runs", "waits")
    drain = threading.Thread(target=rig.engine.drain, args=(10,))
    drain.start()
    eventually(lambda: rig.engine.state is EngineState.DRAINING)
    assert health(rig) == (True, False)
    with pytest.raises(ServerDraining):
        rig.engine.submit(sequence("late"))
    rig.runner.gate.set()
    drain.join(10)
    assert [rig.deliveries.reason(name) for name in ("runs", "waits")] == [LENGTH, LENGTH]
    assert rig.engine.state is EngineState.STOPPED and not rig.engine.alive


def test_a_drain_that_takes_too_long_aborts_what_is_left() -> None:
    rig = Rig(instant=False).start()
    rig.engine.submit(sequence("one", version="v"))
    rig.engine.drain(0.01)
    assert rig.deliveries.reason("one") is ABORT
    assert rig.engine.state is EngineState.STOPPED


def test_an_idle_or_unstarted_engine_drains_at_once() -> None:
    idle, unstarted = Rig().start(), Rig()
    for rig in (idle, unstarted):
        rig.engine.drain(10)
        assert rig.engine.state is EngineState.STOPPED


def free_tokens(max_tokens: int) -> list[int]:
    return solo_reply(sequence("one", max_tokens=max_tokens))


def grammatical(grammar: FakeGrammar, max_tokens: int, stop: list[int] | None = None, **params: Any) -> Sequence:
    one = sequence("one", max_tokens=max_tokens, stop=stop or ())
    one.params = replace(one.params, grammar=grammar, **params)
    return one


def test_a_reply_ends_with_the_token_behind_which_its_grammar_ends(rig: Rig) -> None:
    free = free_tokens(5)
    grammar = FakeGrammar(VOCABULARY, {}, ends_with=[free[2]])
    rig.engine.submit(grammatical(grammar, 5))
    final = rig.deliveries.final("one")
    assert (final.token_id, final.finish_reason) == (free[2], STOP)
    assert rig.deliveries.tokens("one") == grammar.heard == free[:3]


def test_a_grammar_that_ends_with_the_last_token_is_a_stop_and_one_that_does_not_a_length(rig: Rig) -> None:
    free = free_tokens(3)
    rig.engine.submit(grammatical(FakeGrammar(VOCABULARY, {}, ends_with=[free[2]]), 3))
    assert rig.deliveries.reason("one") is STOP
    rig.deliveries.calls.clear()
    rig.engine.submit(grammatical(FakeGrammar(VOCABULARY, {}), 3))
    assert rig.deliveries.reason("one") is LENGTH


def test_a_grammar_that_fails_ends_its_sequence_alone_and_hides_the_token(rig: Rig) -> None:
    free = free_tokens(5)
    other = sequence("other", max_tokens=9)
    rig.engine.submit(other)
    rig.engine.submit(grammatical(FakeGrammar(VOCABULARY, {}, refuses=[free[2]]), 5))
    final = rig.deliveries.final("one")
    assert (final.finish_reason, final.error) == (ERROR, f"the grammar refuses {free[2]}")
    assert final.token_id is None and rig.deliveries.tokens("one") == free[:2]
    assert rig.deliveries.reason("other") is LENGTH


def test_a_grammar_does_not_hear_of_a_stop_token_nor_of_a_forced_reply(rig: Rig) -> None:
    free = free_tokens(5)
    grammar = FakeGrammar(VOCABULARY, {}, ends_with=[free[0]])
    rig.engine.submit(grammatical(grammar, 5, stop=[free[0]]))
    assert rig.deliveries.final("one").token_id is None and grammar.heard == []
    rig.deliveries.calls.clear()
    rig.engine.submit(grammatical(grammar, 2, forced=tuple(free[:2])))
    assert rig.deliveries.reason("one") is LENGTH and grammar.heard == []
