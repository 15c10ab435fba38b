from __future__ import annotations

from loramux_server.wire.pace import Pace


def after(pace: Pace, *moves: tuple[float, int]) -> float:
    credit = pace.seconds
    for waited, moved in moves:
        credit = pace.credit(credit, waited, moved)
    return credit


def test_what_keeps_up_loses_nothing_and_what_lags_has_its_seconds() -> None:
    pace = Pace(30.0, 1000.0)
    assert after(pace, *[(1.0, 1000)] * 500) == 30.0
    assert after(pace, *[(1.0, 500)] * 50) == 5.0
    assert after(pace, *[(1.0, 500)] * 70) < 0
    assert after(pace, (29.0, 0)) == 1.0


def test_a_fast_beginning_buys_no_long_rest() -> None:
    assert after(Pace(30.0, 1000.0), (1.0, 10**9), (31.0, 0)) < 0
