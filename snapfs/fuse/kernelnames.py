"""Snapshots' names that the kernel keeps in mind: it is told of those that go without its having asked for it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import trio

from ..errors import NoMemoryError
from ..tasks import NO_MEMORY_RETRY_S, in_thread, within

_FORGET_WAIT_S = 1.0
_CLOSE_WAIT_S = 10.0
_TELLERS_MAX = 40


class KernelNames:
    """Open as long as the session lives: ``forget_entry``, which blocks, must not be called for one that is closed.

    Nor must anything else that the kernel is told by way of the session: see :meth:`tell`.
    """

    def __init__(self, forget_entry: Callable[[bytes], None]) -> None:
        self._forget_entry = forget_entry
        self._request_count = 0
        self._no_request = trio.Event()
        self._is_open = True
        self._under_way_count = 0
        self._one_ended = trio.Event()
        self._names: deque[tuple[bytes, trio.Event]] = deque()
        self._is_forgetting = False
        self._is_held_up = False
        # Threads of their own: whoever holds a lock in the kernel must not come to hold up all else that needs one.
        self._forgetter = trio.CapacityLimiter(1)
        self._tellers = trio.CapacityLimiter(_TELLERS_MAX)

    @contextmanager
    def request(self) -> Iterator[None]:
        """A request on the folder is under way until the block ends. The kernel locks the folder meanwhile.

        Whoever tells it of a name then waits in the kernel, where nothing ends a process: neither its own end nor
        SIGKILL. So it is told when no request is under way.
        """
        self._request_count += 1
        if self._request_count == 1:
            self._no_request = trio.Event()
        try:
            yield
        finally:
            self._request_count -= 1
            if not self._request_count:
                self._no_request.set()

    async def forget(self, name: bytes) -> None:
        """Have the kernel look a snapshot's name up again. Raises nothing: what the name stood for is gone already.

        In a thread, one name after the other: it waits for requests on that folder. One of those may wait for whoever
        calls this (a snapshot that needs the room of one that is deleted, say), so it is not waited for without end; it
        is then done later. Nor is it waited for at all while one is held up: a program that lists the folder into
        memory that never comes keeps it locked for as long as it likes.
        """
        if not self._is_open:
            return
        is_forgotten = trio.Event()
        self._names.append((name, is_forgotten))
        if not self._is_forgetting:
            trio.lowlevel.spawn_system_task(self._forget_all)
        if not self._is_held_up:
            with trio.move_on_after(_FORGET_WAIT_S) as waiting:
                await is_forgotten.wait()
            self._is_held_up = waiting.cancelled_caught and bool(self._names)

    async def _forget_all(self) -> None:
        if self._is_forgetting:
            return
        self._is_forgetting = True
        self._under_way_count += 1
        try:
            while self._names and self._is_open:
                if self._request_count:
                    await self._no_request.wait()
                    continue
                try:
                    await in_thread(self._forget_entry, self._names[0][0], limiter=self._forgetter)
                except (NoMemoryError, MemoryError):
                    await trio.sleep(NO_MEMORY_RETRY_S)
                    continue
                self._names.popleft()[1].set()
                self._is_held_up = False
        finally:
            self._is_forgetting = False
            self._under_way_count -= 1
            self._one_ended.set()

    async def tell(self, call: Callable[..., None], *args: object) -> None:
        """Tell the kernel something else while the session lives, in a thread: it may wait for pages being read.

        Whoever is cancelled waits no longer; what was begun goes on, and :meth:`close` waits for it.
        """
        await within(math.inf, partial(self._tell, call, *args))

    async def _tell(self, call: Callable[..., None], *args: object) -> None:
        self._under_way_count += 1
        try:
            if self._is_open:
                await in_thread(call, *args, limiter=self._tellers)
        finally:
            self._under_way_count -= 1
            self._one_ended.set()

    async def close(self) -> bool:
        """Begin no more, and wait for those under way; whether they have all ended."""
        self._is_open = False
        self._no_request.set()
        for _, is_forgotten in self._names:
            is_forgotten.set()
        with trio.move_on_after(_CLOSE_WAIT_S, shield=True):
            while self._under_way_count:
                self._one_ended = trio.Event()
                await self._one_ended.wait()
        return not self._under_way_count
