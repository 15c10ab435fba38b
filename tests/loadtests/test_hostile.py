from __future__ import annotations

from loadtests.hostile import Condition, over_rounds, show
from loadtests.hostile_bodies import MIB, corpus


def test_a_body_is_small_enough_to_be_read_and_stands_once() -> None:
    bodies = corpus("m")
    assert all(len(body.raw) <= 2 * MIB for body in bodies)
    assert len({body.name for body in bodies}) == len(bodies) > 40


def test_of_several_rounds_the_pause_that_came_in_all_of_them_counts() -> None:
    bodies = corpus("m")[:1]
    rounds = [
        Condition(bodies[0].name, 400, f"too many {bodies[0].reason}", 3, 0.01, events, health, pause)
        for events, health, pause in [(10.0, 0.2, 0.25), (30.0, 0.03, 0.04), (20.0, 0.05, 0.05)]
    ]
    merged = over_rounds(rounds)
    assert (merged.answers, merged.events, merged.health, merged.pause) == (9, 20.0, 0.03, 0.04)
    assert merged.as_wanted(bodies[0])
    text = show([Condition("nothing", 0, "", 0, 0.0, 25.0, 0.01, None), merged], bodies)
    assert "longest /health 30 ms" in text and "25.0 beside nothing" in text
