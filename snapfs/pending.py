"""Calls that block in a thread, and since when: of a device that hangs, status tells what waits for it."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from .events import EventLog

T = TypeVar("T")

STUCK_S = 5.0


@dataclass(slots=True)
class PendingCall:
    """A call under way. ``where`` is a processor or the catalog. ``answered``: see :class:`PendingCalls`."""

    where: str
    call: Callable[..., object]
    started_s: float
    number: int
    answered: set[int]
    is_over: bool = False

    def run(self, call: Callable[..., T], *args: object) -> T:
        """Run it in its thread."""
        try:
            return call(*args)
        finally:
            self.answered.add(self.number)
            if self.is_over:
                # It was left to itself, and perhaps just now: nobody waits for it.
                self.answered.discard(self.number)

    def told_at(self, now_s: float) -> dict[str, object]:
        """In words, with its age."""
        what = getattr(self.call, "__name__", "call").strip("_").replace("_", " ")
        return {"where": self.where, "what": what, "age_s": round(now_s - self.started_s, 1)}


class PendingCalls:
    """What is under way. ``now_s`` is a clock that never goes back.

    ``calls`` are those under way, ``answered`` those of them whose threads are done, but who waits for them has not had
    a turn since.
    """

    def __init__(self, events: EventLog, now_s: Callable[[], float] = time.monotonic) -> None:
        self._events = events
        self.now_s = now_s
        self.calls: dict[int, PendingCall] = {}
        self._numbers = itertools.count()
        self.answered: set[int] = set()

    @contextmanager
    def running(self, where: str, call: Callable[..., object]) -> Iterator[PendingCall]:
        """A call is under way until the block ends; one that took long is told then.

        What the thread is given is the :meth:`PendingCall.run` of what this gives, with the call.
        """
        number = next(self._numbers)
        one = self.calls[number] = PendingCall(where, call, self.now_s(), number, self.answered)
        try:
            yield one
        finally:
            one.is_over = True
            self.answered.discard(number)
            del self.calls[number]
            now_s = self.now_s()
            if now_s - one.started_s >= STUCK_S:
                self._events.note("was-stuck", logging.WARNING, **one.told_at(now_s))

    def stuck(self) -> list[dict[str, object]]:
        """Those that have been under way for STUCK_S or longer, the oldest first."""
        now_s = self.now_s()
        return [one.told_at(now_s) for one in self.calls.values() if now_s - one.started_s >= STUCK_S]

    def is_stuck(self, where: str) -> bool:
        """Whether a call there is."""
        return any(one["where"] == where for one in self.stuck())
