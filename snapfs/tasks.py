"""Small helpers for trio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Generic, TypeVar

import outcome
import trio

from .errors import NoMemoryError

T = TypeVar("T")

NO_MEMORY_RETRY_S = 1.0


class Wakeup:
    """An event that can be set again: :meth:`wait` returns once for any number of :meth:`set` before it."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        """Wake whoever waits, or the next to wait."""
        self._event.set()

    def is_set(self) -> bool:
        """Whether the next to wait goes on at once."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Wait for a :meth:`set`."""
        await self._event.wait()
        self._event = trio.Event()


async def in_thread(
    call: Callable[..., T],
    *args: object,
    limiter: trio.CapacityLimiter | None = None,
    is_abandoned_when_cancelled: bool = False,
) -> T:
    """Run a blocking call in a thread. It is not cancelled halfway; it may be left to itself.

    Raises:
        NoMemoryError: there is no memory for a thread, or no more are allowed; the call was not begun.
    """
    has_begun = False

    def run() -> T:
        nonlocal has_begun
        has_begun = True
        return call(*args)

    try:
        return await trio.to_thread.run_sync(run, limiter=limiter, abandon_on_cancel=is_abandoned_when_cancelled)
    except RuntimeError as error:
        if has_begun:
            raise
        raise NoMemoryError(str(error), "Allow the daemon more memory and threads") from error


async def kept_up(task: Callable[[], Awaitable[None]], on_no_memory: Callable[[], None]) -> None:
    """Run a task; when it ends for want of memory, say so and begin it again a little later."""
    while True:
        try:
            return await task()
        except MemoryError:
            pass
        except BaseExceptionGroup as group:
            # What a nursery makes of it.
            if group.split(MemoryError)[1] is not None:
                raise
        on_no_memory()
        await trio.sleep(NO_MEMORY_RETRY_S)


async def until_memory(call: Callable[[], T]) -> T:
    """What a call gives that must be made, and may be made again after it found no memory."""
    while True:
        try:
            return call()
        except MemoryError:
            await trio.sleep(NO_MEMORY_RETRY_S)


async def side_by_side(calls: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Run all calls at once, wait for all, and raise the first error that one of them met."""
    waiting = list(calls)
    if len(waiting) == 1:
        await waiting[0]()
        return
    errors: list[Exception] = []

    async def run(call: Callable[[], Awaitable[object]]) -> None:
        try:
            await call()
        except Exception as error:  # noqa: BLE001 - it is raised below, when all have ended
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for call in waiting:
            try:
                nursery.start_soon(run, call)
            except MemoryError as error:
                # Those that were begun are to come to their ends.
                errors.append(error)
                break
    if errors:
        raise errors[0]


async def one_by_one(calls: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """Run all calls in turn, and raise the first error that one of them met."""
    errors: list[Exception] = []
    for call in calls:
        try:
            await call()
        except Exception as error:  # noqa: BLE001 - it is raised below, when all have ended
            errors.append(error)
    if errors:
        raise errors[0]


async def within(seconds: float, call: Callable[[], Awaitable[T]]) -> T | None:
    """What a call gives, or None when it takes longer: it goes on alone, for what waits in a thread cannot stop."""
    found: list[outcome.Outcome[T]] = []
    ended = trio.Event()

    async def run() -> None:
        found.append(await outcome.acapture(call))
        ended.set()

    trio.lowlevel.spawn_system_task(run)
    with trio.move_on_after(seconds):
        await ended.wait()
    return found[0].unwrap() if found else None


class Shared(Generic[T]):
    """A blocking call in a thread of its own, one at a time: who comes while it is under way waits for that one."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._limiter = trio.CapacityLimiter(1)
        self._under_way: _UnderWay[T] | None = None

    async def within(self, seconds: float) -> T | None:
        """What it gives, or None when it takes longer. Raises what it raises."""
        if self._under_way is None:
            self._under_way = _UnderWay()
            trio.lowlevel.spawn_system_task(self._run, self._under_way)
        one = self._under_way
        with trio.move_on_after(seconds):
            await one.ended.wait()
        # Not unwrapped: that may be done once, and others wait as well.
        if isinstance(one.result, outcome.Error):
            raise one.result.error
        return None if one.result is None else one.result.value

    async def _run(self, one: _UnderWay[T]) -> None:
        call = partial(in_thread, self._call, limiter=self._limiter, is_abandoned_when_cancelled=True)
        try:
            one.result = await outcome.acapture(call)
        finally:
            self._under_way = None
            one.ended.set()


class _UnderWay(Generic[T]):
    def __init__(self) -> None:
        self.ended = trio.Event()
        self.result: outcome.Value[T] | outcome.Error | None = None
