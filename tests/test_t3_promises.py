"""What was acknowledged stays, and what a snapshot holds: whatever fails, waits or runs beside it."""

from __future__ import annotations

import errno
import os
import signal
import threading
from typing import Any

import pytest
import trio
import trio.testing

from snapfs import changelog, cowportion, reclaim
from snapfs.backends import CrashPlan, Device, DeviceFile, FailNth, FaultyDevice, LockHolder, MemoryDevice
from snapfs.backends.memory import MemoryFile
from snapfs.errors import DamagedError, InUseError, NoMemoryError, NoSpaceError, NotFoundError, SyncFailedError
from snapfs.formats import COPY_ON_WRITE, DEVICE_FILE, REDIRECT, DeviceDescriptor
from snapfs.fuse.command import CommandContext
from snapfs.fuse.control import run_line
from snapfs.fuse.helperprocess import HelperProcess
from snapfs.making import VolumeWish
from snapfs.pool import Pool
from snapfs.portion import Portion, PortionChanges
from snapfs.snapshot import Snapshot
from snapfs.streamhead import parse_volume
from snapfs.volume import Volume

from .harness import (
    WHERE,
    Running,
    World,
    open_until_power_is_lost,
    open_world,
    read_snapshot,
    read_volume,
    without_threads,
)

BLOCK = 4096
OBJECT = 4 << 20
MIB = 1 << 20


async def settled() -> None:
    """Whatever can go on has done so."""
    for _ in range(30):
        await trio.to_thread.run_sync(lambda: None)


def no_sync(file: MemoryFile) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


async def copy_on_write(pool: Pool, contents: bytes) -> Volume:
    volume = await pool.maker.create(VolumeWish(b"v", MIB, COPY_ON_WRITE))
    async with pool.volumes.opened(b"v"):
        await volume.write(0, contents)
        await volume.sync()
    return volume


async def block_of(pool: Pool, snapshot: Snapshot, block: int) -> bytes:
    return (await read_snapshot(pool, snapshot, b"v"))[block * BLOCK : (block + 1) * BLOCK]


async def test_what_was_preserved_stays_when_the_next_round_finds_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1)
    async with open_world(world) as pool:
        volume = await copy_on_write(pool, b"A" * 2 * BLOCK)
        async with pool.volumes.opened(b"v"):
            snapshot = await pool.snapshots.create(b"s")

            def full(*arguments: object) -> None:
                raise NoSpaceError("no room for the copy")

            with monkeypatch.context() as patch:
                patch.setattr(pool.processors[0].access.store, "commit", full)
                with pytest.raises(NoSpaceError):
                    await volume.write(0, b"B" * BLOCK)

            def no_room(*arguments: object) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            with monkeypatch.context() as patch:
                patch.setattr(cowportion, "_write_runs", no_room)
                with pytest.raises(OSError):
                    await volume.write(0, b"B" * 2 * BLOCK)
            await volume.write(0, b"C" * BLOCK)
            await volume.sync()
            await pool.processors[0].punch_freed()
            assert [await block_of(pool, snapshot, block) for block in (0, 1)] == [b"A" * BLOCK] * 2
    world.check()


async def test_nobody_writes_over_what_is_preserved_but_not_durable_though_its_copy_is_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two writers of one block, of an object of which the latest copy is not in memory."""
    world = World(1)
    async with open_world(world) as pool:
        volume = await copy_on_write(pool, b"A" * 2 * BLOCK)
        async with pool.volumes.opened(b"v"):
            await pool.snapshots.create(b"before")
            await volume.write(BLOCK, b"X" * BLOCK)
            await volume.sync()
            snapshot = await pool.snapshots.create(b"s")
            volume.portions[0].objects.clear()
            access = pool.processors[0].access
            ask, gate, count = access.ask, trio.Event(), 0

            async def slowly(call: Any, *arguments: Any) -> Any:
                nonlocal count
                found = await ask(call, *arguments)
                if call.__name__ == "latest_copy":
                    count += 1
                    if count == 2:
                        await gate.wait()
                return found

            await volume.read(0, 1)
            monkeypatch.setattr(access, "ask", slowly)
            async with access.commit_lock:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(volume.write, 0, b"1" * 512)
                    nursery.start_soon(volume.write, 512, b"2" * 512)
                    await settled()
                    gate.set()
                    await settled()
                    before_commit = await source_of(pool, volume, 1024)
                    access.commit_lock.release()
                await access.commit_lock.acquire()
            assert before_commit == b"A" * 1024
            assert await block_of(pool, snapshot, 0) == b"A" * BLOCK


async def source_of(pool: Pool, volume: Volume, length: int) -> bytes:
    """How what a copy-on-write volume is written over begins."""
    (row,) = [one.sources[volume.volume_id] for one in pool.processors]
    file = pool.processors[0].logs.known[row.log_id].file
    assert file is not None
    contents = bytearray(length)
    file.read_into(contents, 0)
    return bytes(contents)


async def test_nobody_writes_over_what_a_dropped_copy_hands_on_before_that_is_durable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(1)
    async with open_world(world) as pool:
        volume = await copy_on_write(pool, b"A" * 4 * BLOCK)
        async with pool.volumes.opened(b"v"):
            first = await pool.snapshots.create(b"s0")
            await volume.write(BLOCK, b"X" * BLOCK)
            await pool.snapshots.create(b"s1")
            await volume.write(2 * BLOCK, b"Y" * BLOCK)
            found, go_on, dropped, go_on_dropping = (trio.Event() for _ in range(4))
            find, drop = reclaim._find, reclaim._drop

            async def slow_find(*arguments: Any) -> Any:
                step = await find(*arguments)
                if step.unneeded:
                    found.set()
                    await go_on.wait()
                return step

            async def slow_drop(*arguments: Any) -> None:
                await drop(*arguments)
                dropped.set()
                await go_on_dropping.wait()

            monkeypatch.setattr(reclaim, "_find", slow_find)
            monkeypatch.setattr(reclaim, "_drop", slow_drop)
            async with trio.open_nursery() as nursery:
                await pool.snapshots.delete(b"s1")
                await found.wait()
                nursery.start_soon(volume.write, 0, b"1" * 512)
                await settled()
                go_on.set()
                await dropped.wait()
                nursery.start_soon(volume.write, 512, b"2" * 512)
                await settled()
                before_commit = await source_of(pool, volume, 1024)
                go_on_dropping.set()
            assert before_commit == b"A" * 1024
            assert await block_of(pool, first, 0) == b"A" * BLOCK
    world.check()


async def test_a_commit_for_which_there_is_no_memory_loses_no_volumes_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1)
    async with open_until_power_is_lost(world) as pool:
        for name in (b"a", b"b"):
            await pool.volumes.create(name)
        async with pool.volumes.opened(b"a") as a, pool.volumes.opened(b"b") as b:
            for volume in (a, b):
                await volume.write(0, volume.name * BLOCK)
            changes, count = Portion.changes, 0

            def no_memory(portion: Portion) -> PortionChanges:
                nonlocal count
                count += 1
                if count == 2:
                    raise MemoryError
                return changes(portion)

            with monkeypatch.context() as patch:
                patch.setattr(Portion, "changes", no_memory)
                with pytest.raises(MemoryError):
                    await pool.snapshots.create(b"s")
            for volume in (a, b):
                await volume.sync()
    async with open_world(world) as pool:
        assert [await read_volume(pool, name) for name in (b"a", b"b")] == [b"a" * BLOCK, b"b" * BLOCK]


async def test_two_logs_never_get_one_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is made in the event loop while a thread makes the file of a copy-on-write volume."""
    world = World(1)
    (device,) = world.devices.values()
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        create, begin_source = device.create, changelog.ChangeLogs.begin_source
        in_create, is_made = threading.Event(), threading.Event()

        def slow_create(name: str) -> DeviceFile:
            if threading.current_thread() is threading.main_thread():
                in_create.set()
                is_made.wait(60)
            return create(name)

        def late_source(*arguments: Any) -> Any:
            in_create.wait(60)
            try:
                return begin_source(*arguments)
            finally:
                is_made.set()

        monkeypatch.setattr(device, "create", slow_create)
        monkeypatch.setattr(changelog.ChangeLogs, "begin_source", late_source)
        async with pool.volumes.opened(b"v"), trio.open_nursery() as nursery:
            nursery.start_soon(pool.maker.create, VolumeWish(b"w", MIB, COPY_ON_WRITE))
            await trio.testing.wait_all_tasks_blocked()
            await volume.write(0, b"V" * BLOCK)
        async with pool.volumes.opened(b"w") as other:
            await other.write(0, b"W" * BLOCK)
        assert await read_volume(pool, b"v") == b"V" * BLOCK
        assert (await read_volume(pool, b"w"))[: 2 * BLOCK] == (b"W" * BLOCK).ljust(2 * BLOCK, b"\0")
    world.check_clean()


async def test_an_append_beside_a_discard_up_to_the_end_stays() -> None:
    world = World(1)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v"):
            await volume.write(0, b"A" * 4196)
            await volume.sync()
            volume.portions[0].objects.clear()
            store_lock = pool.processors[0].access.store_lock
            async with trio.open_nursery() as nursery:
                await store_lock.acquire()
                nursery.start_soon(pool.volumes.discard, volume, 0, 4196)
                await settled()
                nursery.start_soon(volume.write, 4196, b"APPENDED")
                await settled()
                store_lock.release()
            assert bytes(await volume.read(4190, 20)) == bytes(6) + b"APPENDED"
    world.check_clean()


async def test_partial_blocks_at_both_ends_are_each_completed_from_their_own_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def not_cached(file: MemoryFile, buffer: Any, offset: int) -> None:
        raise BlockingIOError

    world = World(2)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v"):
            await volume.write(0, b"A" * BLOCK)
            await volume.write(OBJECT, b"B" * BLOCK)
            await volume.sync()
            await pool.snapshots.create(b"s")
            monkeypatch.setattr(MemoryFile, "try_read_into", not_cached)
            await volume.write(100, b"w" * OBJECT)
            assert bytes(await volume.read(0, 200)) == b"A" * 100 + b"w" * 100
            assert bytes(await volume.read(OBJECT, BLOCK)) == b"w" * 100 + b"B" * (BLOCK - 100)


@pytest.mark.parametrize("mode", ["redirect", "cow"])
async def test_a_failed_append_is_not_seen_when_the_volume_grows(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = MemoryFile.write

    def take_8_kib(file: MemoryFile, data: Any, offset: int) -> None:
        write(file, memoryview(data)[: 2 * BLOCK], offset)
        if len(data) > 2 * BLOCK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    world = World(1)
    async with open_world(world) as pool:
        if mode == "cow":
            volume = await pool.maker.create(VolumeWish(b"v", 0, COPY_ON_WRITE))
        else:
            volume = await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v"):
            await volume.write(0, b"A" * 100)
            await volume.sync()
            with monkeypatch.context() as patch:
                patch.setattr(MemoryFile, "write", take_8_kib)
                with pytest.raises(OSError):
                    await volume.write(100, b"J" * 20_000)
            assert volume.size_bytes == 100
            await pool.volumes.truncate(volume, 12_000)
            assert bytes(await volume.read(0, 12_000)) == (b"A" * 100).ljust(12_000, b"\0")


async def test_cutting_a_volume_that_holds_nothing_is_durable() -> None:
    world = World(1)
    async with open_until_power_is_lost(world) as pool:
        volume = await pool.volumes.create(b"v")
        await pool.volumes.truncate(volume, 10 << 30)
        await pool.volumes.sync_all()
        await pool.volumes.truncate(volume, 5)
    async with open_world(world) as pool:
        assert pool.volumes.get(b"v").size_bytes == 5


class OddDevice:
    """An image like a block device that ends within a block: nothing is written behind its end."""

    def __init__(self, inner: DeviceFile, size_bytes: int) -> None:
        self.inner = inner
        self.size_bytes = size_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def size(self) -> int:
        return self.size_bytes

    def write(self, data: Any, offset: int) -> None:
        fitting = max(0, min(len(data), self.size_bytes - offset))
        self.inner.write(memoryview(data)[:fitting], offset)
        if fitting < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def truncate(self, size_bytes: int) -> None:
        if size_bytes > self.size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("is_hole", [False, True])
async def test_a_block_device_that_ends_within_a_block_is_rolled_back(*, is_hole: bool) -> None:
    size_bytes = 2 * BLOCK + 512
    world = World(1)
    contents = b"A" * 2 * BLOCK + (bytes(512) if is_hole else b"A" * 512)
    world.make_image("/device", contents)
    open_image = world.open_image
    world.open_image = lambda path, writable: OddDevice(open_image(path, writable), size_bytes)  # type: ignore[assignment,method-assign,return-value]
    async with open_world(world) as pool:
        volume = await pool.maker.create(VolumeWish(b"v", None, COPY_ON_WRITE, "/device"))
        await pool.snapshots.create(b"s")
        async with pool.volumes.opened(b"v"):
            await volume.write(BLOCK, b"B" * (BLOCK + 512))
        await pool.clones.rollback(b"s")
        assert await read_volume(pool, b"v") == contents


async def test_a_log_that_cannot_be_removed_for_want_of_memory_fails_no_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"A" * BLOCK)
            await pool.snapshots.create(b"s")
            await volume.write(0, b"B" * BLOCK)
        await pool.snapshots.delete(b"s")
        access, logs = pool.processors[0].access, pool.processors[0].logs
        in_thread = access.in_thread

        async def refuse(call: Any, *arguments: Any) -> Any:
            if call == logs.remove_file:
                raise NoMemoryError("no more threads")
            return await in_thread(call, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(access, "in_thread", refuse)
            await pool.reclaimer.reclaim_all()
        assert await read_volume(pool, b"v") == b"B" * BLOCK
    async with open_world(world):
        pass
    world.check_clean()


async def test_an_old_copy_of_the_pools_directory_takes_nothing_from_its_devices() -> None:
    """Files of logs that a home does not know are what a crash has left, and go; those of an old copy are newer."""
    world = World(1, 2)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
    assert isinstance(world.home, MemoryDevice)
    copy = World.found(
        {"home": world.home.crash(CrashPlan(0, 1.0, 0.0)), "outside": MemoryDevice(), **in_memory(world)}
    )
    async with open_world(world) as pool:
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"new" * BLOCK)
        with pytest.raises(InUseError, match="the device 0 is in use by another process"):
            Pool.open(copy.home, WHERE, copy.open_device)
    copy.home.close()
    for look in (lambda: Pool.open(copy.home, WHERE, copy.open_device), copy.check):
        with pytest.raises(DamagedError, match="the pool's directory is an old copy"):
            look()
        copy.home.close()
    async with open_world(world) as pool:
        assert await read_volume(pool, b"v") == b"new" * BLOCK
    world.check_clean()


def in_memory(world: World) -> dict[str, MemoryDevice]:
    return {path: device for path, device in world.devices.items() if isinstance(device, MemoryDevice)}


async def test_after_a_failed_sync_no_processor_takes_writes_of_that_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(2)
    async with open_until_power_is_lost(world) as pool:
        volume, other = [await pool.volumes.create(name) for name in (b"v", b"other")]
        async with pool.volumes.opened(b"v"):
            for place in (0, OBJECT):
                await volume.write(place, b"A" * BLOCK)
            await volume.sync()
            await volume.write(0, b"B" * BLOCK)
            with monkeypatch.context() as patch:
                patch.setattr(MemoryFile, "sync", no_sync)
                with pytest.raises(SyncFailedError):
                    await volume.sync()
            for place in (0, OBJECT):
                with pytest.raises(SyncFailedError):
                    await volume.write(place, b"C" * BLOCK)
        async with pool.volumes.opened(b"v"):
            for place in (0, OBJECT):
                with pytest.raises(SyncFailedError):
                    await volume.write(place, b"C" * BLOCK)
        async with pool.volumes.opened(b"other"):
            await other.write(0, b"D" * BLOCK)
            await other.sync()
    async with open_world(world) as pool:
        assert (await read_volume(pool, b"v"))[OBJECT:] == b"A" * BLOCK
        assert await read_volume(pool, b"other") == b"D" * BLOCK


async def test_a_failed_copy_on_write_volume_that_was_removed_refuses_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has preserved is never durable: whoever waits for that waits for ever."""

    world = World(1)
    async with open_until_power_is_lost(world) as pool:
        volume = await copy_on_write(pool, b"A" * 2 * BLOCK)
        pool.volumes.open(volume)
        await pool.snapshots.create(b"s")
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFile, "sync", no_sync)
            with pytest.raises(SyncFailedError):
                await volume.write(0, b"B" * BLOCK)
        await pool.volumes.remove(b"v")
        with pytest.raises(SyncFailedError):
            await volume.write(0, b"C" * BLOCK)


async def test_a_pool_with_a_full_device_outside_opens_and_frees_room() -> None:
    world = World(1, 2)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for number in range(20):
            async with pool.volumes.opened(b"v") as volume:
                await volume.write(0, b"%d" % number * 9000)
            await pool.snapshots.create(b"%d" % number)
    for device in in_memory(world).values():
        device.capacity_bytes = device._used_pages * BLOCK
    async with open_world(world) as pool:
        for name in list(pool.snapshots.by_name):
            await pool.snapshots.delete(name)
        await pool.reclaimer.reclaim_all()
    for device in in_memory(world).values():
        device.capacity_bytes = None
    world.check_clean()


async def test_the_device_of_a_new_change_log_volume_is_the_pools_alone() -> None:
    world = World(1)
    async with open_world(world) as pool:
        world.devices["/d"] = MemoryDevice()
        await pool.changelogs.create(b"logs", ["/d"], MIB)
        with pytest.raises(LockHolder):
            world.devices["/d"].claim()
        generation = DeviceDescriptor.from_json(world.devices["/d"].read_file(DEVICE_FILE), "/d").generation
        assert generation == pool.catalog.catalog.generation
    async with open_world(world) as pool:
        await pool.changelogs.remove(b"logs")
        assert not [name for name in world.devices["/d"].names("") if not name.endswith("/")]
        await pool.changelogs.create(b"logs", ["/d"], MIB)
    world.check_clean()


class Hanging(FaultyDevice):
    """A device that takes no new files until it is let go on."""

    may_hang = True

    def __init__(self, inner: Device) -> None:
        super().__init__(inner, self._hold)
        self.go_on = threading.Event()
        self.go_on.set()

    def _hold(self, kind: str, name: str) -> None:
        if kind == "create":
            self.go_on.wait()


async def test_a_device_that_hangs_keeps_no_pool_from_closing(mock_clock: trio.testing.MockClock) -> None:
    world = World(1, 2)
    memory = in_memory(world)["1"]
    hanging = Hanging(memory)
    world.devices["1"] = hanging
    running = Running(world)
    mock_clock.rate = 100.0
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        hanging.go_on.clear()
        await running.close()
    hanging.go_on.set()
    world.devices["1"] = memory.crash(CrashPlan(0, 1.0, 0.0))
    world.check_clean()


async def test_a_helper_that_could_not_be_started_anew_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*arguments: object, **options: object) -> trio.Process:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    pids: list[int] = []
    process = HelperProcess(pids.append, lambda: None, lambda: None)
    await process.start()
    os.kill(pids[-1], signal.SIGKILL)
    with monkeypatch.context() as patch:
        patch.setattr(trio.lowlevel, "open_process", refuse)
        for _ in range(2):
            with pytest.raises(OSError, match="Cannot allocate memory"):
                await process.call("device_of", lambda: ["/"])
    assert await process.call("device_of", lambda: ["/"]) == os.stat("/").st_dev
    await process.stop()
    with pytest.raises(OSError):
        await process.call("device_of", lambda: ["/"])


def test_times_before_1970_are_received() -> None:
    volume = {"name": "v", "base_name": None, "size_bytes": 0, "mode": 0o600, "uid": 0, "gid": 0}
    found = parse_volume({**volume, "atime_ns": -(1 << 63), "mtime_ns": -(10**18)})
    assert (found.atime_ns, found.mtime_ns) == (-(1 << 63), -(10**18))
    with pytest.raises(ValueError, match="is no time"):
        parse_volume({**volume, "atime_ns": 0, "mtime_ns": 1 << 63})


async def test_what_reclaim_has_chosen_is_deleted_by_whatever_name_it_has_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for name in (b"a", b"b"):
            async with pool.volumes.opened(b"v") as volume:
                await volume.write(0, name * 10 * BLOCK)
            await pool.snapshots.create(name)
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"c" * 10 * BLOCK)
        delete_this = pool.snapshots.delete_this

        async def rename_first(snapshot: Snapshot) -> None:
            if not pool.snapshots.deleted:
                await pool.snapshots.rename(b"b", b"other")
                await pool.snapshots.create(b"b")
            await delete_this(snapshot)
            with pytest.raises(NotFoundError):
                await delete_this(snapshot)

        monkeypatch.setattr(pool.snapshots, "delete_this", rename_first)

        async def resize(name: bytes, size_bytes: int) -> None:
            """Nobody asks for it."""

        assert await run_line(CommandContext(pool, resize), b"reclaim need=80K")
        assert list(pool.snapshots.by_name) == [b"b"]


@pytest.mark.parametrize("kind", ["redirect", "cow", "image", "clone"])
async def test_a_discard_of_gibibytes_looks_at_what_is_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=2)
    size_bytes = 2000 * OBJECT
    written = {0: b"a", 5 * OBJECT + BLOCK: b"b", 700 * OBJECT: b"c", 1500 * OBJECT + 7: b"d", size_bytes - BLOCK: b"e"}
    if kind == "image":
        world.make_image("/image", b"i" * 3 * OBJECT)
    async with open_world(world) as pool:
        await pool.maker.create(
            VolumeWish(
                b"v", size_bytes, COPY_ON_WRITE if kind == "cow" else REDIRECT, "/image" if kind == "image" else ""
            )
        )
        async with pool.volumes.opened(b"v") as volume:
            for offset, letter in written.items():
                await volume.write(offset, letter * 100)
                if offset < OBJECT:
                    await volume.sync()
        snapshot = await pool.snapshots.create(b"s")
        name = b"v"
        if kind == "clone":
            name = b"c"
            await pool.clones.clone(b"s", b"v", name)
        async with pool.volumes.opened(name) as volume:
            # Not stored yet.
            await volume.write(900 * OBJECT, b"f" * 100)
            looked = 0
            unmap = Volume._unmap_up_to_now

            def counted(self: Volume, *args: Any) -> int:
                nonlocal looked
                looked += 1
                return unmap(self, *args)

            monkeypatch.setattr(Volume, "_unmap_up_to_now", counted)
            await pool.volumes.discard(volume, 10, size_bytes - BLOCK - 10)
            monkeypatch.undo()
            # With neighbours that were brought into memory together.
            assert looked < 400
            await volume.sync()
            assert await volume.read(0, 10) == b"a" * 10
            assert await volume.read(size_bytes - BLOCK, 100) == b"e" * 100
            for offset in (10, OBJECT + 5, 5 * OBJECT + BLOCK, 700 * OBJECT, 900 * OBJECT, 1500 * OBJECT):
                assert not any(await volume.read(offset, 2 * BLOCK)), offset
            # The blocks at both ends.
            assert volume.block_count <= 2
        shown = await pool.snapshots.open_volume(snapshot, (await pool.snapshots.members(snapshot)).get(b"v")[0])
        for offset, letter in written.items():
            assert await shown.read(offset, 100) == letter * 100
        pool.snapshots.close_volume(shown)


async def test_a_file_that_takes_anothers_place_is_durable_before_that_goes() -> None:
    """Written, renamed, and never synced, as many programs do it: power is lost right after."""
    world = World(2)
    async with open_until_power_is_lost(world) as pool:
        for name, data in ((b"conf", b"old" * 5000), (b"conf.new", b"new" * 5000)):
            await pool.volumes.create(name)
            async with pool.volumes.opened(name) as volume:
                await volume.write(0, data)
                if name == b"conf":
                    await volume.sync()
        await pool.volumes.rename(b"conf.new", b"conf")
    async with open_world(world) as pool:
        assert await read_volume(pool, b"conf") == b"new" * 5000
        assert set(pool.volumes.by_name) == {b"conf"}
    world.check_clean()


async def test_a_file_that_cannot_be_made_durable_takes_no_others_place() -> None:
    device = FaultyDevice(MemoryDevice())
    world = World(1, make_device=lambda where, _: device if where == "0" else MemoryDevice())
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        for name in (b"old", b"new"):
            await pool.volumes.create(name)
            async with pool.volumes.opened(name) as volume:
                await volume.write(0, name)
                if name == b"old":
                    await volume.sync()
        device.hook = FailNth("sync", 1, errno.EIO, only="logs/")
        with pytest.raises(SyncFailedError):
            await pool.volumes.rename(b"new", b"old")
        assert await read_volume(pool, b"old") == b"old"
        assert set(pool.volumes.by_name) == {b"old", b"new"}
        with pytest.raises(SyncFailedError):
            await running.stop()
    world.home.close()
    world.check()


@pytest.mark.parametrize("is_synced_amid", [False, True])
async def test_a_file_that_is_written_anew_is_durable_soon_after_it_was_closed(
    autojump_clock: trio.testing.MockClock, is_synced_amid: bool
) -> None:
    """Cut to nothing, which is durable at once, and closed without a sync."""
    world = World(2)
    with without_threads(1):
        async with open_until_power_is_lost(world) as pool:
            await pool.volumes.create(b"v")
            volume = pool.volumes.get(b"v")
            async with pool.volumes.opened(b"v"):
                await volume.write(0, b"old" * 5000)
                await volume.sync()
                await pool.volumes.truncate(volume, 0)
                if is_synced_amid:
                    await pool.sync()
                await volume.write(0, b"new" * 5000)
            began_s = trio.current_time()
            while not volume.is_clean:
                await trio.sleep(0.01)
            assert trio.current_time() - began_s < 0.5
    async with open_world(world) as pool:
        assert await read_volume(pool, b"v") == b"new" * 5000
    world.check_clean()
