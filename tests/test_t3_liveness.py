"""Devices that may hang are asked whether they answer before anything waits for them in the event loop."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from snapfs import liveness
from snapfs.backends import DirectoryDevice, FaultyDevice, MemoryDevice
from snapfs.events import EventLog
from snapfs.liveness import ANSWERS, HANGS_S, IDLE, IDLE_S, LOOK_S, SILENT, DeviceWatch
from snapfs.notresident import NotResidentError
from snapfs.pace import Demand
from snapfs.pending import PendingCalls
from snapfs.status import pool_status

from .harness import Running, World, read_snapshot, read_volume

BLOCK = 4096


class Slow(FaultyDevice):
    """A device that may hang, and whose answers wait until they are let go."""

    may_hang = True

    def __init__(self) -> None:
        super().__init__(MemoryDevice(), self._be_asked)
        self.answers = threading.Event()
        self.answers.set()
        self.code = 0
        self.asked_count = 0
        self.waits = threading.Event()

    def _be_asked(self, kind: str, name: str) -> None:
        if kind == "probe":
            self.asked_count += 1
            self.waits.set()
            self.answers.wait()
            if self.code:
                raise OSError(self.code, os.strerror(self.code))
        elif kind in ("open", "create", "write"):
            assert self.answers.is_set(), "a device that hangs is not waited for in the loop"

    def hang(self) -> None:
        self.waits.clear()
        self.answers.clear()


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def demand() -> Demand:
    return Demand()


@pytest.fixture
def watch(slow: Slow, demand: Demand) -> DeviceWatch:
    return DeviceWatch({7: slow, 8: MemoryDevice()}, PendingCalls(EventLog()), demand)


async def until(clock: trio.testing.MockClock, seconds: float) -> None:
    """So much time passes in small steps, in each of which all that can be done is."""
    end = trio.current_time() + seconds
    while trio.current_time() < end:
        clock.jump(LOOK_S / 2)
        await settled()


async def settled() -> None:
    """Threads that do not wait have ended."""
    for _ in range(3):
        await trio.to_thread.run_sync(lambda: None)
        for _ in range(10):
            await trio.lowlevel.checkpoint()


async def test_what_never_hangs_is_never_asked(watch: DeviceWatch) -> None:
    for device_id in (8, 9, None):
        one = watch.of(device_id)
        one.check_now()
        await one.renew()
        assert one.state == ANSWERS


async def test_the_first_to_come_asks_and_the_others_wait_with_it(slow: Slow, watch: DeviceWatch) -> None:
    one = watch.of(7)
    assert one is watch.of(7) and one.state == IDLE
    slow.hang()
    ended = 0

    async def need() -> None:
        nonlocal ended
        with pytest.raises(NotResidentError) as missing:
            one.check_now()
        await missing.value.fetch({})
        one.check_now()
        ended += 1

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(need)
        await trio.to_thread.run_sync(slow.waits.wait)
        await settled()
        assert one.state == SILENT and ended == 0 and slow.asked_count == 1
        slow.answers.set()
    assert ended == 5 and one.state == ANSWERS


@pytest.mark.parametrize("code", [0, errno.EIO, errno.ENOSPC])
async def test_an_error_is_an_answer(code: int, slow: Slow, watch: DeviceWatch) -> None:
    slow.code = code
    await watch.of(7).renew()
    assert watch.of(7).state == ANSWERS


async def test_a_question_that_is_given_up_is_asked_by_the_next(slow: Slow, watch: DeviceWatch) -> None:
    one = watch.of(7)
    slow.hang()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.renew)
        await trio.to_thread.run_sync(slow.waits.wait)
        nursery.cancel_scope.cancel()
    assert one.state == IDLE
    slow.answers.set()
    await one.renew()
    assert one.state == ANSWERS and slow.asked_count == 2


async def test_it_is_asked_while_it_is_used_and_no_longer(
    slow: Slow, watch: DeviceWatch, demand: Demand, mock_clock: trio.testing.MockClock
) -> None:
    one = watch.of(7)
    requests = 0
    demand.count = lambda: requests
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await one.renew()
        for _ in range(20):
            requests += 1
            await until(mock_clock, LOOK_S)
            assert one.state == ANSWERS
        asked_count = slow.asked_count
        assert asked_count >= 10
        await until(mock_clock, IDLE_S + 4 * LOOK_S)
        assert one.state == IDLE
        asked_count = slow.asked_count
        await until(mock_clock, 10.0)
        assert slow.asked_count == asked_count
        # And from the beginning.
        await one.renew()
        requests += 1
        await until(mock_clock, LOOK_S)
        assert one.state == ANSWERS
        nursery.cancel_scope.cancel()


async def test_it_is_silent_when_it_does_not_answer_for_long(
    slow: Slow, watch: DeviceWatch, demand: Demand, mock_clock: trio.testing.MockClock
) -> None:
    one = watch.of(7)
    requests = 0

    def count() -> int:
        nonlocal requests
        requests += 1
        return requests

    demand.count = count
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await one.renew()
        slow.hang()
        while not slow.waits.is_set():
            await until(mock_clock, LOOK_S)
        await until(mock_clock, HANGS_S - 3 * LOOK_S)
        assert one.state == ANSWERS, "a disk at its limit takes some tenths of a second"
        await until(mock_clock, 4 * LOOK_S)
        assert one.state == SILENT
        slow.answers.set()
        await one.renew()
        assert one.state == ANSWERS
        nursery.cancel_scope.cancel()


async def test_what_does_not_need_a_silent_device_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices and as many volumes, each with its first object on one of them; one device hangs."""
    monkeypatch.setattr(liveness, "IDLE_S", 0.0)
    world = World(processor_count=1, device_count=2)
    hanging = Slow()
    memory = hanging.inner = world.devices["0"]
    world.devices["0"] = hanging  # type: ignore[assignment]
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        where = {}
        for name in (b"a", b"b"):
            volume = await pool.volumes.create(name)
            async with pool.volumes.opened(name):
                await volume.write(0, name * BLOCK)
            where[pool.placement.device_for(volume.volume_id, 0, is_change=False)] = name
        first, second = where[0], where[1]
        snapshot = await pool.snapshots.create(b"s")
        hanging.hang()
        pool.watch.of(0).expire()
        ended = trio.Event()

        async def write() -> None:
            async with pool.volumes.opened(first) as volume:
                await volume.write(0, b"new" * BLOCK)
                ended.set()

        nursery.start_soon(write)
        await trio.to_thread.run_sync(hanging.waits.wait)
        assert pool.watch.of(0).state == SILENT
        pool.pending.now_s = lambda now_s=pool.pending.now_s: now_s() + 60  # type: ignore[misc]
        status = await pool_status(pool)
        assert status["health"] == "stuck"
        assert [one["state"] for one in status["devices"]] == [SILENT, ANSWERS]  # type: ignore[attr-defined]
        calls = [(one["where"], one["what"]) for one in status["stuck_calls"]]  # type: ignore[attr-defined]
        assert ("device 0", "probe") in calls
        assert await read_volume(pool, second) == second * BLOCK
        # Its file is open.
        assert await read_snapshot(pool, snapshot, first) == first * BLOCK
        async with pool.volumes.opened(second) as other:
            await other.write(10, b"B")
            await other.sync()
        assert not ended.is_set()
        hanging.answers.set()
        await ended.wait()
        assert (await read_volume(pool, first))[:BLOCK] == (b"new" * BLOCK)[:BLOCK]
        await running.stop()
    world.devices["0"] = memory
    world.check_clean()


def test_a_directory_answers(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    device = DirectoryDevice(tmp_path)
    assert device.may_hang and not DirectoryDevice(tmp_path, writable=False).may_hang
    for _ in range(3):
        device.probe()
    assert os.listdir(tmp_path) == []
    device.close()
    device.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
