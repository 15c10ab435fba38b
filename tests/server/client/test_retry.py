from __future__ import annotations

import pytest

from loramux_server.client.retry import Patience
from loramux_server.errors import CommandFailed, ConnectionLost, ServerRefused


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


AWAY = ConnectionLost("no server answers", reached=False)
BROKE = ConnectionLost("it broke", reached=True)


def busy(after: float | None = None) -> ServerRefused:
    return ServerRefused(503, "busy", after=after)


def test_a_reason_that_is_a_sentence_goes_on() -> None:
    scene = Scene(ServerRefused(503, "The server is still starting.", after=5))
    assert scene.call() == "done"
    assert scene.told == ["The server is still starting; trying again in 5 s, for at most 100 s"]


def test_the_servers_own_pause_is_kept_and_said() -> None:
    scene = Scene(busy(5), busy(20))
    assert scene.call() == "done" and scene.slept == [5, 20]
    assert scene.told == [
        "busy; trying again in 5 s, for at most 100 s",
        "busy; trying again in 20 s, for at most 95 s",
    ]


def test_without_one_pauses_grow_to_a_bound() -> None:
    scene = Scene(*[busy()] * 8, seconds=1000)
    assert scene.call() == "done" and scene.slept == [1, 2, 4, 8, 16, 30, 30, 30]


def test_it_ends_with_the_time_that_was_given() -> None:
    scene = Scene(*[busy(30)] * 9)
    with pytest.raises(CommandFailed, match="busy"):
        scene.call()
    assert sum(scene.slept) == 90
    for scene in (
        Scene(busy(), seconds=0),
        Scene(busy(101)),
        Scene(busy(9e9)),
    ):
        with pytest.raises(CommandFailed):
            scene.call()
        assert scene.slept == []


def test_a_server_that_was_never_there_is_not_waited_for_and_one_that_goes_is() -> None:
    scene = Scene(AWAY)
    with pytest.raises(CommandFailed):
        scene.call()
    assert scene.slept == []
    scene = Scene(busy(1), AWAY, AWAY, AWAY, AWAY, AWAY)
    assert scene.call() == "done"


def test_a_connection_that_breaks_every_time_is_given_up_soon() -> None:
    scene = Scene(*[BROKE] * 3)
    assert scene.call() == "done"
    scene = Scene(*[BROKE] * 9)
    with pytest.raises(CommandFailed):
        scene.call()
    assert len(scene.slept) == 3


def test_what_cannot_succeed_later_is_not_tried_again() -> None:
    for error in (CommandFailed("no"), ServerRefused(422, "no"), ServerRefused(413, "no", after=1)):
        scene = Scene(error)
        with pytest.raises(CommandFailed, match="no"):
            scene.call()
        assert scene.slept == []
