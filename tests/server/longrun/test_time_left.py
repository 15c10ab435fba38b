from __future__ import annotations

from loramux_server.longrun.time_left import TimeLeft, duration


def test_the_time_left_is_that_of_the_piece_of_work_that_is_going_on() -> None:
    now = 0.0
    pace = TimeLeft(lambda: now)

    assert pace.left("a", 0, 100) == ""
    now = 0.5
    assert pace.left("a", 10, 100) == ""  # too soon to tell
    now = 10.0
    assert pace.left("a", 20, 100) == ", 0:40 left"
    assert pace.left("b", 50, 100) == ""
    now = 20.0
    assert pace.left("b", 75, 100) == ", 0:10 left"  # 25 in 10 s: what was done before it began does not count
    assert pace.left("b", 100, 100) == ""


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(seconds) for seconds in (7, 750.4, 11100)] == ["0:07", "12:30", "3:05:00"]
