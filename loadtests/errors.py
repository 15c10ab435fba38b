"""The one error of the load tests."""

from __future__ import annotations


class LoadTestError(Exception):
    """The test cannot go on: a server or worker that does not answer, a wrong address or directory. Says which."""
