"""Has the kernel know how long the file of events is: with the write-back cache it does not ask for sizes."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Awaitable, Callable

from ..errors import NoMemoryError
from ..events import EventLog
from ..tasks import Wakeup


class KernelEvents:
    """``store`` gives the kernel bytes at an offset, ``cut`` a size that is less; ``run`` is the task that does so.

    Not as the events come: the kernel waits for its own lock of a page that somebody reads, and whoever reads waits
    for the event loop.
    """

    def __init__(
        self, events: EventLog, store: Callable[[int, bytes], Awaitable[None]], cut: Callable[[int], Awaitable[None]]
    ) -> None:
        self._events = events
        self._store = store
        self._cut = cut
        self._lines: deque[tuple[int, bytes]] = deque()
        self._is_cut = False
        self._wakeup = Wakeup()

    def note_line(self, offset: int, line: bytes) -> None:
        """There is a new line."""
        self._lines.append((offset, line))
        self._wakeup.set()

    def note_cut(self) -> None:
        """The older half is gone; what was to be told lies elsewhere now."""
        self._lines.clear()
        self._is_cut = True
        self._wakeup.set()

    async def run(self) -> None:
        """Tell, one after the other; until cancelled."""
        while True:
            await self._wakeup.wait()
            if self._is_cut:
                self._is_cut = False
                with contextlib.suppress(OSError, NoMemoryError):
                    await self._cut(len(self._events.contents))
            while self._lines and not self._is_cut:
                with contextlib.suppress(OSError, NoMemoryError):
                    await self._store(*self._next_lines())

    def _next_lines(self) -> tuple[int, bytes]:
        """All that wait, for each follows the one before."""
        offset = self._lines[0][0]
        told = b"".join(line for _, line in self._lines)
        self._lines.clear()
        return offset, told
