"""Devices that may hang are asked whether they answer before anything waits for them in the event loop."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio
import trio.testing

from snapfs import liveness
from snapfs.backends import Device, DirectoryDevice, FaultyDevice, MemoryDevice
from snapfs.backends.base import Space
from snapfs.events import EventLog
from snapfs.formats import AttributeChange
from snapfs.liveness import ANSWERS, HANGS_S, IDLE, IDLE_S, LOOK_S, SILENT, DeviceWatch, Room
from snapfs.notresident import NotResidentError
from snapfs.pace import Demand
from snapfs.pending import PendingCalls
from snapfs.pool import Pool
from snapfs.snapshot import Snapshot
from snapfs.status import pool_status
from snapfs.volume import Volume

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
            is_in_loop = threading.current_thread() is threading.main_thread()
            assert self.answers.is_set() or not is_in_loop, "a device that hangs is not waited for in the loop"
            self.answers.wait()

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


async def test_a_slow_answer_counts_though_all_else_is_idle(
    slow: Slow, watch: DeviceWatch, mock_clock: trio.testing.MockClock
) -> None:
    """What looks after the devices takes those that nobody uses for idle: not the one that somebody waits for."""
    one = watch.of(7)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await one.renew()
        one.expire()
        slow.hang()
        ended = trio.Event()

        async def need() -> None:
            await one.renew()
            ended.set()

        nursery.start_soon(need)
        await until(mock_clock, IDLE_S + 4 * LOOK_S)
        assert one.state == SILENT
        asked_count = slow.asked_count
        slow.answers.set()
        await ended.wait()
        assert slow.asked_count == asked_count
        nursery.cancel_scope.cancel()


async def test_one_that_was_slow_once_is_asked_again_soon(
    slow: Slow, watch: DeviceWatch, demand: Demand, mock_clock: trio.testing.MockClock
) -> None:
    one = watch.of(7)
    requests = itertools.count()
    demand.count = lambda: next(requests)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        slow.hang()
        nursery.start_soon(one.renew)
        await trio.to_thread.run_sync(slow.waits.wait)
        await until(mock_clock, 100.0)
        slow.answers.set()
        await one.renew()
        asked_count = slow.asked_count
        await until(mock_clock, 2.0)
        assert slow.asked_count > asked_count
        nursery.cancel_scope.cancel()


async def test_many_that_hang_keep_nobody_from_being_asked(slow: Slow) -> None:
    """More than there are threads in trio's own limit."""
    devices = {number: Slow() for number in range(60)}
    for one in devices.values():
        one.hang()
    watch = DeviceWatch({**devices, 60: slow}, PendingCalls(EventLog()), Demand())
    async with trio.open_nursery() as nursery:
        for number in devices:
            nursery.start_soon(watch.of(number).renew)
        for one in devices.values():
            await trio.to_thread.run_sync(one.waits.wait)
        await watch.of(60).renew()
        assert watch.of(60).state == ANSWERS
        for one in devices.values():
            one.answers.set()


async def test_room_is_asked_for_once_at_a_time(
    slow: Slow, watch: DeviceWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request for it would leave a thread behind."""
    monkeypatch.setattr(liveness, "_ROOM_WAIT_S", 0.0)
    begun, go_on, count = threading.Event(), threading.Event(), 0
    space = slow.inner.space()

    def wait() -> Space:
        nonlocal count
        count += 1
        begun.set()
        go_on.wait()
        return space

    slow.space = wait  # type: ignore[method-assign]
    await watch.of(7).renew()
    assert (await watch.rooms())[7] is None
    await trio.to_thread.run_sync(begun.wait)
    for _ in range(50):
        rooms = await watch.rooms()
        assert rooms[7] is None and isinstance(rooms[8], Room)
    assert count == 1
    go_on.set()
    while (found := (await watch.rooms())[7]) is None:
        await trio.lowlevel.checkpoint()
    assert found == Room(None, space)

    def fail() -> Space:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    slow.space = fail  # type: ignore[method-assign]
    while not isinstance(found := (await watch.rooms())[7], OSError):
        await trio.lowlevel.checkpoint()
    assert found.errno == errno.EIO
    slow.space = _no_memory  # type: ignore[method-assign]
    while (await watch.rooms())[7] is not None:
        await trio.lowlevel.checkpoint()
    assert await DeviceWatch({}, PendingCalls(EventLog()), Demand()).of(7).room() is None


def _no_memory() -> Space:
    raise MemoryError


async def test_many_may_ask_for_room_at_the_same_time(slow: Slow, watch: DeviceWatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    space = slow.inner.space()
    code = 0

    def wait() -> Space:
        begun.set()
        go_on.wait()
        if code:
            raise OSError(code, os.strerror(code))
        return space

    slow.space = wait  # type: ignore[method-assign]
    await watch.of(7).renew()
    for code in (0, errno.EIO):
        begun.clear()
        go_on.clear()
        found: list[object] = []

        async def ask(found: list[object] = found) -> None:
            found.append((await watch.rooms())[7])

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask)
            await trio.to_thread.run_sync(begun.wait)
            await settled()
            go_on.set()
        assert len(found) == 5
        assert all(isinstance(one, OSError) for one in found) if code else found == [Room(None, space)] * 5


async def test_a_device_that_is_gone_is_not_asked(
    slow: Slow, demand: Demand, mock_clock: trio.testing.MockClock
) -> None:
    devices: dict[int, Device] = {7: slow}
    watch = DeviceWatch(devices, PendingCalls(EventLog()), demand)
    requests = itertools.count()
    demand.count = lambda: next(requests)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        one = watch.of(7)
        await one.renew()
        await until(mock_clock, 1.0)
        del devices[7]
        await until(mock_clock, 1.0)
        while one._answered is not None:
            # Asked before, by a thread that is late.
            await settled()
        asked_count = slow.asked_count
        await until(mock_clock, 3.0)
        assert slow.asked_count == asked_count
        # Another one in its place.
        devices[7] = Slow()
        assert watch.of(7).state == IDLE
        nursery.cancel_scope.cancel()


class TwoDevices(NamedTuple):
    """A pool of two devices, the first of which hangs, and the volume with data on each."""

    pool: Pool
    hanging: Slow
    volumes: tuple[Volume, Volume]
    snapshot: Snapshot


@contextlib.asynccontextmanager
async def two_devices() -> AsyncIterator[TwoDevices]:
    """Whoever uses it has the first device answer again before the end; the pool is checked there."""
    world = World(processor_count=1, device_count=2)
    hanging = Slow()
    memory = hanging.inner = world.devices["0"]
    world.devices["0"] = hanging
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        volumes = {}
        for name in (b"a", b"b"):
            volume = await pool.volumes.create(name)
            async with pool.volumes.opened(name):
                await volume.write(0, name * BLOCK)
            volumes[pool.placement.device_for(volume.volume_id, 0, is_change=False)] = volume
        snapshot = await pool.snapshots.create(b"s")
        hanging.hang()
        pool.watch.of(0).expire()
        yield TwoDevices(pool, hanging, (volumes[0], volumes[1]), snapshot)
        await running.stop()
    world.devices["0"] = memory
    world.check_clean()


async def test_cutting_a_volume_on_a_silent_device_keeps_no_other_from_changing() -> None:
    async with two_devices() as (pool, hanging, (first, second), _), trio.open_nursery() as nursery:
        nursery.start_soon(pool.volumes.truncate, first, 0)
        await trio.to_thread.run_sync(hanging.waits.wait)
        await pool.volumes.change(second, AttributeChange(mode=0o600))
        await pool.volumes.truncate(second, 0)
        assert second.size_bytes == 0 < first.size_bytes
        hanging.answers.set()
    assert first.size_bytes == 0


async def test_what_does_not_need_a_silent_device_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "IDLE_S", 0.0)
    async with two_devices() as (pool, hanging, (first, second), snapshot):
        async with trio.open_nursery() as nursery:
            ended = trio.Event()

            async def write() -> None:
                async with pool.volumes.opened(first.name) as volume:
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
            assert await read_volume(pool, second.name) == second.name * BLOCK
            # Its file is open.
            assert await read_snapshot(pool, snapshot, first.name) == first.name * BLOCK
            async with pool.volumes.opened(second.name) as other:
                await other.write(10, b"B")
                await other.sync()
            assert not ended.is_set()
            hanging.answers.set()
        assert (await read_volume(pool, first.name))[:BLOCK] == (b"new" * BLOCK)[:BLOCK]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_directory_answers(tmp_path: Path) -> None:
    reader = DirectoryDevice(tmp_path, writable=False)
    assert not reader.may_hang
    reader.close()
    before = open_files()
    device = DirectoryDevice(tmp_path)
    assert device.may_hang
    for _ in range(3):
        device.probe()
    assert os.listdir(tmp_path) == []
    device.close()
    device.close()
    assert open_files() == before
    for call in (device.probe, device.space):
        with pytest.raises(OSError):
            call()
    assert open_files() == before


def test_a_directory_that_is_closed_while_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files()
    device = DirectoryDevice(tmp_path)
    read = os.preadv

    def close_first(*arguments: Any) -> int:
        device.close()
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", close_first)
    device.probe()
    assert open_files() == before


def test_a_directory_that_is_closed_just_after_it_was_asked(tmp_path: Path) -> None:
    before = open_files()
    device = DirectoryDevice(tmp_path)
    inner = device._probe._lock

    class Lock:
        """Whoever closes comes when all is done but to let go of the lock."""

        acquire, release = inner.acquire, inner.release

        def __enter__(self) -> None:
            inner.acquire()

        def __exit__(self, *args: object) -> None:
            device.close()
            inner.release()

    device._probe._lock = Lock()  # type: ignore[assignment]
    device.probe()
    assert open_files() == before


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EMFILE])
def test_a_filesystem_without_files_that_have_no_name_is_asked_for_its_room(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = DirectoryDevice(tmp_path)
    asked: list[int] = []
    opened, statvfs = os.open, os.fstatvfs

    def refuse(path: str, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(code, os.strerror(code))
        return opened(path, flags, *arguments, **options)

    def note(fd: int) -> os.statvfs_result:
        asked.append(fd)
        return statvfs(fd)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "fstatvfs", note)
    if code == errno.EMFILE:
        with pytest.raises(OSError):
            device.probe()
    else:
        device.probe()
    assert len(asked) == (code != errno.EMFILE)
    device.close()
