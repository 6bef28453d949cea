"""Work that takes a while, with how far it has come, for status and progress bars."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from .errors import StoppedError


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
        self._scopes: list[trio.CancelScope] = []

    @contextmanager
    def running(self, kind: str, what: str, total: int) -> Iterator[Job]:
        """A job that is under way until the block ends."""
        job = Job(kind, what, total)
        self.now.append(job)
        try:
            yield job
        finally:
            self.now.remove(job)

    @contextmanager
    def stoppable(self, kind: str, what: str, total: int) -> Iterator[Job]:
        """The same, of one that need not be finished. Raises StoppedError when :meth:`stop` was called meanwhile."""
        scope = trio.CancelScope()
        self._scopes.append(scope)
        try:
            with scope, self.running(kind, what, total) as job:
                yield job
        finally:
            self._scopes.remove(scope)
        if scope.cancelled_caught:
            raise StoppedError(f"{kind} was stopped", "Run it again when the pool is mounted")

    def stop(self) -> None:
        """Stop all that need not be finished."""
        for scope in self._scopes:
            scope.cancel()
