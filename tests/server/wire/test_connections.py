from __future__ import annotations

from loramux_server.wire.connections import PARTS, RESERVE, Connections, Cut, Purpose


class FakeConnection:
    def __init__(self, connections: Connections) -> None:
        self.connections = connections
        self.closed = False
        connections.entered(self)
        connections.is_idle(self)

    def make_room(self) -> None:
        self.closed = True

    def check(self, now: float) -> None:
        raise AssertionError


def busy(connections: Connections, count: int) -> None:
    for _ in range(count):
        connections.is_busy(FakeConnection(connections))


def test_a_full_server_still_serves_management_and_a_fuller_one_health() -> None:
    connections = Connections(cap=2)
    busy(connections, 2)
    assert all(connections.admit(purpose) for purpose in Purpose)
    busy(connections, 1)
    assert [connections.admit(purpose) for purpose in Purpose] == [False, True, True]
    busy(connections, RESERVE)
    assert [connections.admit(purpose) for purpose in Purpose] == [False, False, True]
    assert connections.readings().cuts[Cut.FULL] == 3


def test_connections_without_requests_take_nobody_s_place() -> None:
    connections = Connections(cap=2)
    idle = [FakeConnection(connections) for _ in range(50)]
    assert connections.admit(Purpose.USE)
    assert connections.can_accept
    connections.make_room()
    assert [one.closed for one in idle[:2]] == [True, False]


def test_the_longest_idle_goes_first() -> None:
    connections = Connections(cap=0)
    first, second = FakeConnection(connections), FakeConnection(connections)
    connections.is_busy(first)
    connections.is_idle(first)
    connections.close_one()
    assert (first.closed, second.closed) == (False, True)


def test_where_all_are_busy_none_is_accepted_until_one_leaves() -> None:
    connections = Connections(cap=1)
    told = []
    connections.when_room = lambda: told.append(1)
    busy(connections, 1 + RESERVE)
    last = next(iter(connections._busy))
    assert not connections.can_accept
    connections.left(last)
    assert connections.can_accept
    assert told == [1]
    assert connections.readings().busy == connections.readings().open == RESERVE


def test_where_all_are_busy_the_one_that_lags_longest_makes_room() -> None:
    connections = Connections(cap=1)
    told = []
    ones = [FakeConnection(connections) for _ in range(1 + RESERVE)]
    for one in ones:
        connections.is_busy(one)
    connections.when_room = lambda: told.append(1)
    for one in (ones[3], ones[2], ones[1], ones[3]):
        connections.lags(one)
    connections.keeps_up(ones[3])
    assert connections.can_accept
    assert told == [1, 1, 1]

    FakeConnection(connections)
    connections.is_busy(list(connections._idle)[0])
    connections.make_room()
    assert [one.closed for one in ones[:4]] == [False, False, True, False]
    assert connections.readings().cuts[Cut.LAGGING] == 1


def test_in_each_round_every_connection_is_looked_at_once_and_few_at_a_time() -> None:
    connections, seen = Connections(), []

    class Looked(FakeConnection):
        def check(self, now: float) -> None:
            seen.append(self)

    everyone = [Looked(connections) for _ in range(1000)]
    most = 0
    for turn in range(PARTS):
        before = len(seen)
        connections.check(1.0, turn)
        most = max(most, len(seen) - before)
    assert len(seen) == 1000 and set(seen) == set(everyone)
    assert most < 200
