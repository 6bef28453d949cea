"""The session loop's way of waiting for a request."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from snapfs.events import EventLog
from snapfs.fuse.loop import REQUESTS_A_TURN, SessionLoop
from snapfs.pending import PendingCalls


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("is_awaited", [True, False])
async def test_a_request_that_comes_later_is_waited_for(pipe: tuple[int, int], is_awaited: bool) -> None:
    loop = SessionLoop([], [1] if is_awaited else [])
    has_come = trio.Event()

    async def wait() -> None:
        await loop.lowlevel.wait_readable(pipe[0])
        has_come.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not has_come.is_set()
        os.write(pipe[1], b"x")


@pytest.mark.parametrize("answered_after", [0, 1, 3])
async def test_nobody_waits_awake_any_longer_when_a_thread_has_an_answer(
    pipe: tuple[int, int], answered_after: int
) -> None:
    count = 0
    answered = [] if answered_after else [1]
    loop = SessionLoop([], answered)
    with trio.move_on_after(0):
        await loop.lowlevel.wait_readable(pipe[0])
    count = 0

    def poll(timeout_ms: int) -> list[tuple[int, int]]:
        nonlocal count
        count += 1
        assert count <= answered_after
        if count == answered_after:
            answered.append(1)
        return []

    assert not loop.lowlevel._comes_soon(poll)
    has_processors = len(os.sched_getaffinity(0)) > 1
    assert count == (answered_after if has_processors else 0)


async def test_requests_are_waited_for_awake_while_no_thread_has_an_answer(pipe: tuple[int, int]) -> None:
    loop = SessionLoop([], [])
    polls = iter([[], [], [(0, 1)]])
    assert loop.lowlevel._comes_soon(lambda _: next(polls)) == (len(os.sched_getaffinity(0)) > 1)


async def test_how_waiting_awake_goes_while_threads_are_at_work_is_another_matter(pipe: tuple[int, int]) -> None:
    """Who has sent a sync sends nothing more until it is answered: that must not keep others from being waited for."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("nobody waits awake on one processor")
    pending: list[int] = []
    loop = SessionLoop(pending, [])
    count = 0

    def never(timeout_ms: int) -> list[tuple[int, int]]:
        nonlocal count
        count += 1
        return []

    for _ in range(20):
        # A sync, for which nothing comes; then it is answered, and the next request is there at the second look.
        pending.append(1)
        count = 0
        loop.lowlevel._comes_soon(never)
        pending.clear()
        polls = iter([[], [(0, 1)]])
        assert loop.lowlevel._comes_soon(lambda _, polls=polls: next(polls))  # type: ignore[misc]
    assert count == 0


@pytest.mark.parametrize("is_awaited", [True, False])
async def test_when_a_thread_has_an_answer_others_have_a_turn_at_each_request(
    pipe: tuple[int, int], is_awaited: bool
) -> None:
    loop = SessionLoop([], [1] if is_awaited else [])
    os.write(pipe[1], b"x")
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(REQUESTS_A_TURN - 1):
            await loop.lowlevel.wait_readable(pipe[0])
        assert turns >= REQUESTS_A_TURN - 2 if is_awaited else not turns
        nursery.cancel_scope.cancel()


def test_an_answer_is_waited_for_from_when_the_thread_is_done_until_who_asked_goes_on() -> None:
    calls = PendingCalls(EventLog())

    def fail() -> None:
        assert not calls.answered
        raise OSError

    for call in (lambda: 7, fail):
        with calls.running("catalog", call) as one:
            assert not calls.answered
            with contextlib.suppress(OSError):
                assert one.run(call) == 7
            assert len(calls.answered) == 1
        assert not calls.answered
    # One that was left to itself says nothing when it comes to its end.
    one.run(lambda: None)
    assert not calls.answered


async def test_others_get_their_turn_while_requests_come_without_end(pipe: tuple[int, int]) -> None:
    loop = SessionLoop([], [])
    os.write(pipe[1], b"x")
    turns = 0
    done = False

    async def other() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(10 * REQUESTS_A_TURN):
            await loop.lowlevel.wait_readable(pipe[0])
        done = True
    assert turns >= 8


async def test_waiting_for_a_request_can_be_cancelled(pipe: tuple[int, int]) -> None:
    loop = SessionLoop([], [])
    with trio.CancelScope() as scope:
        scope.cancel()
        await loop.lowlevel.wait_readable(pipe[0])
    assert scope.cancelled_caught


async def test_a_worker_that_comes_again_at_once_has_the_lock_again_and_one_that_waits_gets_it_when_it_is_free() -> (
    None
):
    lock = SessionLoop.Lock()
    order: list[str] = []

    async def greedy() -> None:
        for number in range(4):
            async with lock:
                order.append(f"greedy {number}")
        await trio.lowlevel.checkpoint()
        async with lock:
            # Held while it waits: the other one finds it so, and waits on.
            await trio.lowlevel.checkpoint()
            order.append("greedy waited")

    async def other() -> None:
        async with lock:
            order.append("other")

    async with trio.open_nursery() as nursery:
        async with lock:
            nursery.start_soon(other)
            await trio.testing.wait_all_tasks_blocked()
        await greedy()
    assert order[:4] == [f"greedy {number}" for number in range(4)]
    assert sorted(order[4:]) == ["greedy waited", "other"]


async def test_of_many_that_wait_for_the_lock_each_gets_it_once_also_when_others_are_cancelled() -> None:
    lock = SessionLoop.Lock()
    inside = 0
    done: list[int] = []

    async def worker(number: int, scope: trio.CancelScope) -> None:
        nonlocal inside
        with scope:
            async with lock:
                assert not inside
                inside += 1
                await trio.lowlevel.cancel_shielded_checkpoint()
                inside -= 1
                done.append(number)

    scopes = [trio.CancelScope() for _ in range(20)]
    async with trio.open_nursery() as nursery:
        async with lock:
            for number, scope in enumerate(scopes):
                nursery.start_soon(worker, number, scope)
            await trio.testing.wait_all_tasks_blocked()
        for scope in scopes[1::3]:
            scope.cancel()
    cancelled = {number for number, scope in enumerate(scopes) if scope.cancelled_caught}
    assert cancelled <= set(range(1, 20, 3)) and sorted([*done, *cancelled]) == list(range(20))
