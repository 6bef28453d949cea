"""The kernel is told of names that go, and never after its session has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import trio
import trio.testing

from snapfs.fuse.kernelnames import KernelNames


async def test_it_tells_of_a_name() -> None:
    told: list[bytes] = []
    names = KernelNames(told.append)
    await names.forget(b"a")
    assert told == [b"a"]


async def test_none_is_told_once_it_is_closed() -> None:
    told: list[bytes] = []
    names = KernelNames(told.append)
    assert await names.close()
    await names.forget(b"a")
    assert told == []


async def test_closing_waits_for_one_under_way() -> None:
    has_begun, may_end = threading.Event(), threading.Event()

    def forget(name: bytes) -> None:
        has_begun.set()
        may_end.wait()

    names = KernelNames(forget)
    closed: list[bool] = []

    async def close() -> None:
        closed.append(await names.close())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(names.forget, b"a")
        await trio.to_thread.run_sync(has_begun.wait)
        nursery.start_soon(close)
        await trio.testing.wait_all_tasks_blocked()
        assert closed == []
        may_end.set()
    assert closed == [True]


async def test_neither_a_deletion_nor_closing_waits_for_one_that_hangs(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = trio.Event()

    async def run_sync(call: Callable[[], None], **options: object) -> None:
        await may_end.wait()

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    names = KernelNames(lambda name: None)
    await names.forget(b"a")
    assert trio.current_time() >= 1
    assert not await names.close()
    assert trio.current_time() >= 11
    may_end.set()
    assert await names.close()


async def test_a_name_is_told_when_there_is_memory_again(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bytes] = []
    names = KernelNames(told.append)
    refusals = iter([RuntimeError("can't start new thread")] * 3)

    async def run_sync(call: Callable[[], None], **options: object) -> None:
        # Not in a thread, for which the clock of tests would not wait.
        for refusal in refusals:
            raise refusal
        call()

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    await names.forget(b"a")
    assert told == []
    await trio.sleep(5)
    assert await names.close()
    assert told == [b"a"]


async def test_what_waited_for_requests_is_told_after_them() -> None:
    told: list[bytes] = []
    names = KernelNames(told.append)
    async with trio.open_nursery() as nursery:
        with names.request():
            nursery.start_soon(names.forget, b"a")
            nursery.start_soon(names.forget, b"b")
            await trio.testing.wait_all_tasks_blocked()
            assert told == []
    assert sorted(told) == [b"a", b"b"]


async def test_closing_does_not_wait_for_requests() -> None:
    told: list[bytes] = []
    names = KernelNames(told.append)
    async with trio.open_nursery() as nursery:
        with names.request():
            nursery.start_soon(names.forget, b"a")
            await trio.testing.wait_all_tasks_blocked()
            assert await names.close()
    assert told == []


async def test_one_that_hangs_takes_one_thread_and_holds_up_one_deletion(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = trio.Event()
    told: list[bytes] = []
    under_way: list[int] = [0, 0]

    async def run_sync(call: Callable[[], None], *, limiter: trio.CapacityLimiter, **options: object) -> None:
        assert limiter is not trio.to_thread.current_default_thread_limiter()
        async with limiter:
            under_way[0] += 1
            under_way[1] = max(under_way)
            await may_end.wait()
            call()
            under_way[0] -= 1

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    names = KernelNames(told.append)
    wanted = [b"%d" % number for number in range(50)]
    for name in wanted:
        await names.forget(name)
    assert 1 <= trio.current_time() < 2 and under_way == [1, 1]
    may_end.set()
    await trio.sleep(1)
    await names.forget(b"last")
    assert told == [*wanted, b"last"]
    assert await names.close()
