"""Want of memory: threads that cannot be started, tasks that begin again."""

from __future__ import annotations

import errno

import pytest
import trio

from snapfs.errors import NoMemoryError
from snapfs.tasks import in_thread, kept_up


async def test_a_thread_that_cannot_be_started_is_told_as_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    async def refuse(*args: object, **options: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(trio.to_thread, "run_sync", refuse)
        with pytest.raises(NoMemoryError) as caught:
            await in_thread(begun.append, 1)
    assert caught.value.errno == errno.ENOMEM and not begun


async def test_an_error_of_the_call_itself_is_its_own() -> None:
    def fail() -> None:
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        await in_thread(fail)


async def test_a_task_without_memory_begins_again(autojump_clock: None) -> None:
    begun, told = [], []

    async def task() -> None:
        begun.append(trio.current_time())
        if len(begun) < 3:
            raise MemoryError

    await kept_up(task, lambda: told.append(1))
    assert len(begun) == 3 and len(told) == 2 and begun[2] > begun[1] > begun[0]
