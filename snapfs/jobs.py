"""Work that takes a while, with how far it has come, for status and progress bars, and by what name it is stopped."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from .errors import BadNameError, BusyVolumeError, ExistsError, NotFoundError, StoppedError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Job:
    """One piece of work. ``done`` and ``total`` are bytes, or whatever its kind counts."""

    def __init__(self, name: str, kind: str, what: str, total: int, scope: trio.CancelScope | None) -> None:
        self.name = name
        self.kind = kind
        self.what = what
        self.total = total
        self.done = 0
        self.started_ns = time.time_ns()
        self._scope = scope

    @property
    def is_stoppable(self) -> bool:
        """Whether it need not be finished."""
        return self._scope is not None

    def stop(self) -> None:
        """Have it end soon, if it need not be finished."""
        if self._scope is not None:
            self._scope.cancel()


class Jobs:
    """What is under way."""

    def __init__(self) -> None:
        self.now: list[Job] = []
        self._count = 0

    @contextmanager
    def running(
        self, kind: str, what: str, total: int, name: str = "", scope: trio.CancelScope | None = None
    ) -> Iterator[Job]:
        """A job that is under way until the block ends; without a name it is given one of its kind and a number.

        Raises BadNameError, and ExistsError for a name that another has.
        """
        job = Job(self._checked(name) if name else self._next_name(kind), kind, what, total, scope)
        self.now.append(job)
        try:
            yield job
        finally:
            self.now.remove(job)

    def _next_name(self, kind: str) -> str:
        while True:
            self._count += 1
            name = f"{kind}-{self._count}"
            if all(job.name != name for job in self.now):
                return name

    def _checked(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise BadNameError(f"{name[:64]!r} is no name of a job", "Use up to 64 letters, digits, and _ . -")
        if any(job.name == name for job in self.now):
            raise ExistsError(f"there is a job {name!r} already", "Choose another name")
        return name

    @contextmanager
    def stoppable(self, kind: str, what: str, total: int, name: str = "") -> Iterator[Job]:
        """The same, of one that need not be finished. Raises StoppedError when it was stopped meanwhile."""
        with trio.CancelScope() as scope, self.running(kind, what, total, name, scope) as job:
            yield job
        if scope.cancelled_caught:
            raise StoppedError(f"{kind} was stopped", "Run it again")

    def stop(self) -> None:
        """Stop all that need not be finished."""
        for job in self.now:
            job.stop()

    def stop_named(self, name: str) -> Job:
        """Stop one. Raises NotFoundError, BusyVolumeError for one that has to be finished."""
        for job in self.now:
            if job.name == name:
                if not job.is_stoppable:
                    raise BusyVolumeError(f"{job.kind} has to be finished", "Wait for it; status tells how far it is")
                job.stop()
                return job
        raise NotFoundError(f"there is no job {name[:64]!r}", "See those that are under way with snapfs status")
