"""The pool of threads behind the compiled kernels: every piece once, whoever calls and however many at a time."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import Counter

import pytest

from loramux_server.kernels.compiled.library import native_library

LIBRARY = native_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no compiler was there at installation")
RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


def run(pieces: int, threads: int) -> Counter[int]:
    """How often each piece was run. The pieces are Python's, so they run one at a time, on whichever thread."""
    assert LIBRARY is not None
    seen: list[int] = []
    body = RUN(lambda context, piece: seen.append(piece))
    LIBRARY.function("loramux_run_pieces")(body, None, pieces, threads)
    return Counter(seen)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("pieces", [0, 1, 2, 7, 1000])
def test_each_piece_is_run_once(pieces: int, threads: int) -> None:
    for _ in range(20):
        assert run(pieces, threads) == Counter(range(pieces))


def test_each_thread_begins_with_a_part_of_its_own() -> None:
    assert LIBRARY is not None
    for _ in range(5):  # a loop runs on one thread if somebody else has the pool
        seen: dict[int, list[int]] = {}
        both = threading.Barrier(2, timeout=2)

        def body(
            context: object, piece: int, seen: dict[int, list[int]] = seen, both: threading.Barrier = both
        ) -> None:
            mine = seen.setdefault(threading.get_ident(), [])
            mine.append(piece)
            if len(mine) == 1:
                with contextlib.suppress(threading.BrokenBarrierError):
                    both.wait()  # nobody goes on before the other has begun

        LIBRARY.function("loramux_run_pieces")(RUN(body), None, 100, 2)
        if len(seen) == 2:
            break
    caller = seen.pop(threading.get_ident())
    (other,) = seen.values()
    assert (caller[0], other[0]) == (0, 50)
    assert sorted(caller + other) == list(range(100))


def test_loops_of_many_callers_at_once_are_all_run_whole() -> None:
    failed: list[int] = []

    def call(number: int) -> None:
        for _ in range(50):
            if run(20 + number, 3) != Counter(range(20 + number)):
                failed.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failed
