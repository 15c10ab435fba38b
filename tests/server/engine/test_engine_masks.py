"""Sequences whose grammars take long to say what may come: they sit steps out, and nobody waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from loramux_server.engine.scheduling.admission import SchedulerConfig
from loramux_server.engine.scheduling.sequence import FinishReason, Sequence
from support.fakes_engine import VOCABULARY, sequence, solo_reply
from support.fakes_rig import Rig, eventually
from support.grammars import LateGrammar


@pytest.fixture(params=[False, True], ids=["one by one", "ahead"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Twice a step's blocks are kept, so that what is read again would be found to be written over."""
    made = Rig(ahead=request.param, max_kept=32, config=SchedulerConfig(max_num_seqs=4, max_batch_tokens=8)).start()
    yield made
    made.stop()


def held(name: str, grammar: LateGrammar, *, max_tokens: int = 5, prompt: int = 8) -> Sequence:
    one = sequence(name, prompt=prompt, max_tokens=max_tokens)
    one.params = replace(one.params, grammar=grammar)
    return one


@pytest.mark.parametrize("slow", [False, True])
def test_others_go_on_while_a_mask_is_made_and_the_reply_is_the_same(rig: Rig, slow: bool) -> None:
    grammar = LateGrammar(VOCABULARY, slow=slow)
    late, other = held("late", grammar), sequence("other", max_tokens=20)
    rig.engine.submit(late)
    rig.engine.submit(other)
    assert rig.deliveries.reason("other") is FinishReason.LENGTH
    assert rig.deliveries.tokens("other") == solo_reply(sequence("other", max_tokens=20))
    assert rig.deliveries.of("late") == [] and rig.engine.stats.running == 1 and rig.blocks.used
    grammar.open()
    assert rig.deliveries.reason("late") is FinishReason.LENGTH
    assert rig.deliveries.tokens("late") == grammar.heard == solo_reply(held("late", grammar))
    assert grammar.late == 1, "a step was wasted more than once"
    assert sum(count for (count,) in rig.metrics.of("sat_out")) >= 5
    assert len(rig.metrics.of("mask_made")) == 5
    prompts = [int(str(prompt)) for _, prompt, _ in rig.metrics.of("tokens")]
    assert sum(prompts) == len(late.prompt) + len(other.prompt), "what is read again counts once"
    assert len(rig.metrics.of("queued")) == 2


def test_an_engine_with_nothing_else_to_do_sleeps_until_a_mask_is_there(rig: Rig) -> None:
    grammar = LateGrammar(VOCABULARY)
    rig.engine.submit(held("late", grammar))
    eventually(lambda: grammar.late == 1)
    begun = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - begun < 0.1
    steps = len(rig.runner.batches)
    assert grammar.late == 1 and steps <= 2
    grammar.open()
    assert rig.deliveries.reason("late") is FinishReason.LENGTH


def test_who_sits_out_can_be_aborted_and_new_ones_start_meanwhile(rig: Rig) -> None:
    grammars = [LateGrammar(VOCABULARY) for _ in range(3)]
    for place, grammar in enumerate(grammars):
        rig.engine.submit(held(f"late {place}", grammar, prompt=5 + place))
    eventually(lambda: all(grammar.late for grammar in grammars))
    rig.engine.submit(sequence("other", version="v", max_tokens=9))
    assert rig.deliveries.reason("other") is FinishReason.LENGTH
    rig.engine.abort("late 1")
    assert rig.deliveries.reason("late 1") is FinishReason.ABORT
    for grammar in grammars:
        grammar.open()
    for name in ("late 0", "late 2"):
        assert rig.deliveries.reason(name) is FinishReason.LENGTH


def test_a_drain_waits_for_who_sits_out_and_then_aborts_it() -> None:
    rig, grammar = Rig().start(), LateGrammar(VOCABULARY)
    rig.engine.submit(held("late", grammar))
    eventually(lambda: grammar.late == 1)
    rig.engine.drain(0.05)
    assert rig.deliveries.reason("late") is FinishReason.ABORT
    assert rig.blocks.used == 0 and not rig.engine.alive


def test_a_failed_step_spares_who_sits_out(rig: Rig) -> None:
    grammar = LateGrammar(VOCABULARY)
    rig.engine.submit(held("late", grammar))
    eventually(lambda: grammar.late == 1)
    rig.runner.failures.append(RuntimeError("broken"))
    rig.engine.submit(sequence("other", max_tokens=9))
    assert rig.deliveries.reason("other") is FinishReason.ERROR
    grammar.open()
    assert rig.deliveries.reason("late") is FinishReason.LENGTH
    assert rig.deliveries.tokens("late") == solo_reply(held("late", grammar))


def test_a_local_engine_works_off_who_sits_out() -> None:
    rig, grammar = Rig(), LateGrammar(VOCABULARY)
    rig.engine.submit(held("late", grammar))
    import threading

    opening = threading.Timer(0.1, grammar.open)
    opening.start()
    rig.engine.work_off(rig.deliveries)
    assert rig.deliveries.reason("late") is FinishReason.LENGTH
