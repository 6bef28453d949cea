"""Calls that block in a thread, and since when: of a device that hangs, status tells what waits for it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .events import EventLog

STUCK_S = 5.0


@dataclass(frozen=True, slots=True)
class PendingCall:
    """A call under way. ``where`` is a processor or the catalog, ``what`` the call's name."""

    where: str
    what: str
    started_s: float


class PendingCalls:
    """What is under way. ``now_s`` is a clock that never goes back."""

    def __init__(self, events: EventLog, now_s: Callable[[], float] = time.monotonic) -> None:
        self._events = events
        self.now_s = now_s
        self._calls: dict[int, PendingCall] = {}
        self._numbers = itertools.count()

    @contextmanager
    def running(self, where: str, call: Callable[..., object]) -> Iterator[None]:
        """A call is under way until the block ends; one that took long is told then."""
        number = next(self._numbers)
        what = getattr(call, "__name__", "call").strip("_").replace("_", " ")
        started_s = self.now_s()
        self._calls[number] = PendingCall(where, what, started_s)
        try:
            yield
        finally:
            del self._calls[number]
            took_s = self.now_s() - started_s
            if took_s >= STUCK_S:
                self._events.note("was-stuck", logging.WARNING, where=where, what=what, age_s=round(took_s, 1))

    def stuck(self) -> list[dict[str, object]]:
        """Those that have been under way for STUCK_S or longer, the oldest first."""
        now_s = self.now_s()
        return [
            {"where": one.where, "what": one.what, "age_s": round(now_s - one.started_s, 1)}
            for one in self._calls.values()
            if now_s - one.started_s >= STUCK_S
        ]

    def is_stuck(self, where: str) -> bool:
        """Whether a call there is."""
        return any(one["where"] == where for one in self.stuck())
