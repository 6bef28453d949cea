"""Calls that block in a thread, and since when: of a device that hangs, status tells what waits for it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from .events import EventLog

STUCK_S = 5.0


class PendingCall(NamedTuple):
    """A call under way. ``where`` is a processor or the catalog."""

    where: str
    call: Callable[..., object]
    started_s: float

    def told_at(self, now_s: float) -> dict[str, object]:
        """In words, with its age."""
        what = getattr(self.call, "__name__", "call").strip("_").replace("_", " ")
        return {"where": self.where, "what": what, "age_s": round(now_s - self.started_s, 1)}


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
        one = self._calls[number] = PendingCall(where, call, self.now_s())
        try:
            yield
        finally:
            del self._calls[number]
            now_s = self.now_s()
            if now_s - one.started_s >= STUCK_S:
                self._events.note("was-stuck", logging.WARNING, **one.told_at(now_s))

    def is_quiet(self) -> bool:
        """Whether none is under way."""
        return not self._calls

    def stuck(self) -> list[dict[str, object]]:
        """Those that have been under way for STUCK_S or longer, the oldest first."""
        now_s = self.now_s()
        return [one.told_at(now_s) for one in self._calls.values() if now_s - one.started_s >= STUCK_S]

    def is_stuck(self, where: str) -> bool:
        """Whether a call there is."""
        return any(one["where"] == where for one in self.stuck())
