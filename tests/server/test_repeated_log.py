from __future__ import annotations

import io
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator

import pytest

from loramux_server.repeated_log import OneLineASecond

SECONDS = 0.5


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def logger(stream: io.StringIO) -> Iterator[logging.Logger]:
    logger = logging.getLogger("tests.repeated")
    handler = OneLineASecond(stream, seconds=SECONDS)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield logger
    logger.removeHandler(handler)
    logger.propagate = True


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def counted(stream: io.StringIO) -> int:
    """Complaints that the lines stand for: one, or as many as each says were left out."""
    lines = stream.getvalue().splitlines()
    return sum(int(found[1]) if (found := re.match(r"(\d+) more like this", line)) else 1 for line in lines)


def complain(logger: logging.Logger, number: int) -> None:
    logger.warning("request %d is bad", number)


def test_a_complaint_is_written_once_and_the_rest_of_its_second_is_counted(
    logger: logging.Logger, stream: io.StringIO
) -> None:
    for number in range(1000):
        complain(logger, number)
    eventually(lambda: counted(stream) == 1000)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "request 0 is bad"
    assert lines[-1].endswith("more like this, the last: request 999 is bad")
    assert len(lines) <= 3  # two, unless the machine took more than a moment for the loop


def test_without_end_it_is_one_line_a_second(logger: logging.Logger, stream: io.StringIO) -> None:
    began = time.monotonic()
    count = 0
    while time.monotonic() < began + 3 * SECONDS:
        complain(logger, count)
        count += 1
        time.sleep(0.002)
    seconds = time.monotonic() - began
    eventually(lambda: counted(stream) == count)
    assert len(stream.getvalue().splitlines()) <= seconds / SECONDS + 2


def test_other_places_and_lesser_lines_are_written(logger: logging.Logger, stream: io.StringIO) -> None:
    for _ in range(3):
        logger.info("an upload")
    complain(logger, 1)
    logger.error("something else")
    assert stream.getvalue().splitlines() == ["an upload"] * 3 + ["request 1 is bad", "something else"]


def test_tracebacks_are_left_out_with_their_lines(logger: logging.Logger, stream: io.StringIO) -> None:
    for _ in range(50):
        try:
            raise OSError("too many files")
        except OSError:
            logger.exception("accept failed")
    eventually(lambda: "more like this, the last: accept failed" in stream.getvalue())
    assert stream.getvalue().count("Traceback") == 1


def test_each_of_the_operators_files_is_named(stream: io.StringIO) -> None:
    handler = OneLineASecond(stream, seconds=SECONDS)
    for number in range(20):
        handler.handle(
            logging.LogRecord("loramux_adapters.store.files", logging.WARNING, "f", 1, "%d is odd", (number,), None)
        )
    assert len(stream.getvalue().splitlines()) == 20


def test_different_warnings_of_libraries_are_all_written(stream: io.StringIO) -> None:
    handler = OneLineASecond(stream, seconds=SECONDS)
    logging.getLogger("py.warnings").addHandler(handler)
    logging.captureWarnings(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            for number in range(3):
                logging.getLogger("py.warnings").warning("%s", f"warning {number}")
    finally:
        logging.captureWarnings(False)
        logging.getLogger("py.warnings").removeHandler(handler)
    assert len(stream.getvalue().splitlines()) == 3
