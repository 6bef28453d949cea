"""A faster session loop for pyfuse3.

pyfuse3 takes one request per turn of trio's scheduler: a lock, an ``epoll_ctl`` and a reschedule,
each of which costs as much as a small read. It looks up the event loop in its own module's ``trio``,
which is how its asyncio support is switched on (``pyfuse3.asyncio.enable``). What stands there
after :func:`enable` has trio's own names, polls the descriptor first without waiting, and yields
to the scheduler only every 16th time in a row that a request was there already.
"""

from __future__ import annotations

import select
from types import TracebackType

import pyfuse3
import trio

REQUESTS_A_TURN = 16


class _Lock:
    """A lock that does not go through the scheduler while it is free."""

    def __init__(self) -> None:
        self._is_held = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        if not self._is_held:
            self._is_held = True
            return
        # Handed over by whoever releases it, so it is held when this returns.
        await self._waiting.park()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._waiting:
            self._waiting.unpark()
        else:
            self._is_held = False


class _LowLevel:
    """Stands for ``trio.lowlevel``."""

    current_task = staticmethod(trio.lowlevel.current_task)
    current_trio_token = staticmethod(trio.lowlevel.current_trio_token)
    notify_closing = staticmethod(trio.lowlevel.notify_closing)

    def __init__(self) -> None:
        self._poll: select.poll | None = None
        self._in_a_row = 0

    async def wait_readable(self, fd: int) -> None:
        """Wait until a request is there."""
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
        if not self._poll.poll(0):
            self._in_a_row = 0
            await trio.lowlevel.wait_readable(fd)
            return
        self._in_a_row += 1
        if self._in_a_row >= REQUESTS_A_TURN:
            self._in_a_row = 0
            await trio.lowlevel.checkpoint()


class _Trio:
    """Stands for ``trio`` in pyfuse3's eyes."""

    Lock = _Lock
    ClosedResourceError = trio.ClosedResourceError
    open_nursery = staticmethod(trio.open_nursery)
    from_thread = trio.from_thread

    def __init__(self) -> None:
        self.lowlevel = _LowLevel()


def enable() -> None:
    """Have pyfuse3 use this loop. To be called before ``pyfuse3.init``."""
    pyfuse3.trio = _Trio()  # type: ignore[attr-defined]


def disable() -> None:
    """Have pyfuse3 use trio as it is."""
    pyfuse3.trio = trio  # type: ignore[attr-defined]
