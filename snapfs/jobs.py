"""Work that takes a while, with how far it has come, for status and progress bars."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Job:
    """One piece of work. ``done`` and ``total`` are bytes, or whatever its kind counts."""

    def __init__(self, kind: str, what: str, total: int) -> None:
        self.kind = kind
        self.what = what
        self.total = total
        self.done = 0
        self.started_ns = time.time_ns()


class Jobs:
    """What is under way."""

    def __init__(self) -> None:
        self.now: list[Job] = []

    @contextmanager
    def running(self, kind: str, what: str, total: int) -> Iterator[Job]:
        """A job that is under way until the block ends."""
        job = Job(kind, what, total)
        self.now.append(job)
        try:
            yield job
        finally:
            self.now.remove(job)
