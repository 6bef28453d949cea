"""Threads for many reads at once."""

from __future__ import annotations

import threading

import pytest
import trio
import trio.testing

from snapfs import threads as threads_module
from snapfs.errors import NoMemoryError
from snapfs.threads import Threads


async def test_each_call_gets_its_own_result_or_error() -> None:
    threads = Threads(3)
    found: dict[int, object] = {}

    def call(number: int) -> int:
        if number % 7 == 0:
            raise KeyError(number)
        return number * number

    async def run(number: int) -> None:
        try:
            found[number] = await threads.run(call, number)
        except KeyError as error:
            found[number] = error.args[0]

    async with trio.open_nursery() as nursery:
        for number in range(500):
            nursery.start_soon(run, number)
    assert found == {number: number if number % 7 == 0 else number * number for number in range(500)}


async def test_no_more_than_so_many_run_at_once_and_the_others_wait_their_turn() -> None:
    threads = Threads(2)
    lock = threading.Lock()
    running = most = 0
    begun = threading.Semaphore(0)
    go_on = threading.Event()

    def call() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        begun.release()
        assert go_on.wait(30)
        with lock:
            running -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(9):
            nursery.start_soon(threads.run, call)
        for _ in range(2):
            await trio.to_thread.run_sync(begun.acquire)
        go_on.set()
    assert most == 2 and running == 0


async def test_one_that_is_cancelled_before_is_not_begun_and_one_that_runs_is_waited_for() -> None:
    threads = Threads(1)
    begun: list[int] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await threads.run(begun.append, 1)
    assert scope.cancelled_caught and not begun
    entered, go_on = threading.Event(), threading.Event()

    def call() -> None:
        entered.set()
        assert go_on.wait(30)
        begun.append(2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(threads.run, call)
        await trio.to_thread.run_sync(entered.wait)
        nursery.cancel_scope.cancel()
        go_on.set()
    assert begun == [2]


async def test_without_memory_for_a_thread_those_that_are_there_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads(4)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(NoMemoryError):
            await threads.run(len, "abc")
    assert await threads.run(len, "abc") == 3
    done: list[int] = []

    async def run() -> None:
        done.append(await threads.run(len, "abc"))

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(run)
    assert done == [3] * 6


async def test_threads_without_work_end_and_others_begin_when_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads_module, "_IDLE_S", 0.0)
    threads = Threads(2)
    seen: list[threading.Thread] = []
    for _ in range(200):
        seen.append(await threads.run(threading.current_thread))
    for one in set(seen):
        await trio.to_thread.run_sync(one.join)
    assert await threads.run(len, "abcd") == 4
