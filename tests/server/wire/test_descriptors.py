from __future__ import annotations

import resource

import pytest

from loramux_server.errors import ConfigError
from loramux_server.wire.connections import RESERVE
from loramux_server.wire.descriptors import MOST, OWN_FILES, connection_cap

OTHERS = RESERVE + OWN_FILES


class FakeLimits:
    """The limits of a process that may raise its soft limit to the hard one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, *, refuses: bool = False) -> None:
        self.soft, self.hard, self.refuses = soft, hard, refuses
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (self.soft, self.hard))
        monkeypatch.setattr(resource, "setrlimit", self.set)

    def set(self, kind: int, limits: tuple[int, int]) -> None:
        if self.refuses:
            raise ValueError("not allowed")
        assert limits[1] == self.hard
        self.soft = limits[0]


@pytest.mark.parametrize(
    ("soft", "hard", "cap", "soft_after"),
    [
        (1024, 1_048_576, MOST, MOST + OTHERS),
        (1024, 4096, 4096 - OTHERS, 4096),
        (128, 128, 128 - OTHERS, 128),
        (100_000, 100_000, MOST, 100_000),
        (1024, resource.RLIM_INFINITY, MOST, MOST + OTHERS),
    ],
)
def test_the_cap_is_what_the_system_leaves_when_the_limit_is_raised(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, cap: int, soft_after: int
) -> None:
    limits = FakeLimits(monkeypatch, soft, hard)
    assert connection_cap(None) == cap
    assert limits.soft == soft_after


def test_a_limit_that_cannot_be_raised_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLimits(monkeypatch, 256, resource.RLIM_INFINITY, refuses=True)
    assert connection_cap(None) == 256 - OTHERS


def test_a_cap_is_kept_or_refused_with_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLimits(monkeypatch, 1024, 1024)
    assert connection_cap(100) == 100
    with pytest.raises(ConfigError, match=r"--max-connections 2000 needs 2080 open files, and the system allows 1024"):
        connection_cap(2000)


def test_next_to_no_descriptors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLimits(monkeypatch, 64, 64)
    with pytest.raises(ConfigError, match=r"allows this process 64 open files.*ulimit -n\) to 88"):
        connection_cap(None)
