from __future__ import annotations

import pytest

from loramux_server.client.retry import Patience
from loramux_server.errors import CommandFailed, TryLater


class Scene:
    """Calls that fail one after the other as they are told to, and a clock that only pauses move."""

    def __init__(self, *failures: CommandFailed, seconds: float = 100.0) -> None:
        self.failures, self.now = list(failures), 0.0
        self.told: list[str] = []
        self.slept: list[float] = []
        self.patience = Patience(seconds, self.told.append, self.sleep, lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def call(self) -> str:
        def work() -> str:
            if self.failures:
                raise self.failures.pop(0)
            return "done"

        return self.patience.call(work)


AWAY = TryLater("no server answers", reached=False)
BROKE = TryLater("it broke", broke=True)


def test_the_servers_own_pause_is_kept_and_said() -> None:
    scene = Scene(TryLater("busy", after=5), TryLater("busy", after=20))
    assert scene.call() == "done" and scene.slept == [5, 20]
    assert scene.told == [
        "busy; trying again in 5 s, for at most 100 s",
        "busy; trying again in 20 s, for at most 95 s",
    ]


def test_without_one_pauses_grow_to_a_bound() -> None:
    scene = Scene(*[TryLater("busy")] * 8, seconds=1000)
    assert scene.call() == "done" and scene.slept == [1, 2, 4, 8, 16, 30, 30, 30]


def test_it_ends_with_the_time_that_was_given() -> None:
    scene = Scene(*[TryLater("busy", after=30)] * 9)
    with pytest.raises(TryLater, match="busy"):
        scene.call()
    assert sum(scene.slept) == 90
    for scene in (
        Scene(TryLater("busy"), seconds=0),
        Scene(TryLater("busy", after=101)),
        Scene(TryLater("x", after=9e9)),
    ):
        with pytest.raises(TryLater):
            scene.call()
        assert scene.slept == []


def test_a_server_that_was_never_there_is_not_waited_for_and_one_that_goes_is() -> None:
    scene = Scene(AWAY)
    with pytest.raises(TryLater):
        scene.call()
    assert scene.slept == []
    scene = Scene(TryLater("draining", after=1), AWAY, AWAY, AWAY, AWAY, AWAY)
    assert scene.call() == "done"


def test_a_connection_that_breaks_every_time_is_given_up_soon() -> None:
    scene = Scene(*[BROKE] * 3)
    assert scene.call() == "done"
    scene = Scene(*[BROKE] * 9)
    with pytest.raises(TryLater):
        scene.call()
    assert len(scene.slept) == 3


def test_what_cannot_succeed_later_is_not_tried_again() -> None:
    scene = Scene(CommandFailed("no"), seconds=float("nan"))
    with pytest.raises(CommandFailed):
        scene.call()
    assert scene.slept == []
