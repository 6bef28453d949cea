"""A volume whose sync failed: what it means to snapshots and to others, also when it is removed."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from snapfs import pool as pool_module
from snapfs import processor as processor_module
from snapfs import reserve
from snapfs.backends import Device, FailNth, FaultyDevice, MemoryDevice
from snapfs.errors import SyncFailedError
from snapfs.formats import COPY_ON_WRITE
from snapfs.making import VolumeWish
from snapfs.pool import Pool
from snapfs.portion import Portion
from snapfs.volume import Volume

from .harness import Running, World, open_world, read_snapshot, read_volume
from .test_t3_between import noise
from .test_t3_reserve import fill, scatter

OBJECT = 4 << 20
BLOCK = 4096


def faulty_world(devices: dict[str, FaultyDevice], home_bytes: int | None = None, processor_count: int = 1) -> World:
    """A pool whose devices, but for its home, can be made to fail."""

    def make(where: str, capacity_bytes: int | None) -> Device:
        if where == "home":
            return MemoryDevice(home_bytes)
        device = devices[where] = FaultyDevice(MemoryDevice(capacity_bytes))
        return device

    return World(processor_count, make_device=make)


async def fail_sync(volume: Volume, device: FaultyDevice) -> None:
    """A sync of its data fails, so that it takes no more writes."""
    device.hook = FailNth("sync", 1, errno.EIO, only="logs/")
    with pytest.raises(SyncFailedError):
        await volume.sync()
    device.hook = lambda kind, name: None


@asynccontextmanager
async def open_and_failing(world: World, match: str = "a sync") -> AsyncIterator[Pool]:
    """An open pool whose end tells of what could not be synced."""
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        yield running.pool
        with pytest.raises(SyncFailedError, match=match):
            await running.stop()
    world.home.close()


async def until_settled(pool: Pool, volume: Volume) -> None:
    """Reclaim until nothing is left of a failed volume: who seals a snapshot of it may be looking into it just now."""
    processor = pool.processors[0]
    with trio.fail_after(30):
        await pool.reclaimer.reclaim_all()
        while volume.volume_id in processor.portions or processor.unsettled_ids:
            await trio.sleep(0.01)
            await pool.reclaimer.reclaim_all()


class DyingDisk:
    """The first sync of a change log waits, and fails in the end."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, kind: str, name: str) -> None:
        if kind == "sync" and name.startswith("logs/") and not self.entered.is_set():
            self.entered.set()
            self.go_on.wait()
            raise OSError(errno.EIO, "dying disk", name)


@pytest.mark.parametrize("is_dismantled_first", [False, True])
@pytest.mark.parametrize("how", ["remove", "replace"])
async def test_a_snapshot_that_lost_what_a_removed_volume_had_is_none(how: str, is_dismantled_first: bool) -> None:
    """It was cut, and waits for a sync that fails; the volume is removed meanwhile, and perhaps taken apart."""
    devices: dict[str, FaultyDevice] = {}
    world = faulty_world(devices)
    running = Running(world)
    disk = DyingDisk()
    errors: list[str] = []
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        volume = await pool.volumes.create(b"v")
        await pool.volumes.create(b"other")
        pool.volumes.open(volume)
        await volume.write(0, noise(1, 1))
        await volume.sync()
        await pool.snapshots.create(b"before")
        await volume.write(0, noise(1, 2))
        devices["0"].hook = disk

        async def failing(call: Callable[[], object]) -> None:
            with pytest.raises(SyncFailedError):
                await call()  # type: ignore[misc]
            errors.append(getattr(call, "__name__", ""))

        async def snapshot() -> None:
            await pool.snapshots.create(b"after")

        async with trio.open_nursery() as clients:
            clients.start_soon(failing, volume.sync)
            await trio.to_thread.run_sync(disk.entered.wait)
            clients.start_soon(failing, snapshot)
            processor = pool.processors[0]
            while processor.clock.epoch <= pool.snapshots.get(b"before").instant + 1:
                await trio.lowlevel.checkpoint()
            if how == "remove":
                await pool.volumes.remove(b"v")
            else:
                await pool.volumes.rename(b"other", b"v")
            if is_dismantled_first:
                # Whoever had it open lets go of it before the snapshot has its turn.
                begin_commit = processor._begin_commit

                def begin(portions: Iterable[Portion] | None, *args: object) -> object:
                    if volume.opens:
                        pool.volumes.close(volume)
                        assert volume.volume_id not in processor.portions
                    return begin_commit([] if portions is None else list(processor.portions.values()), *args)  # type: ignore[arg-type]

                processor._begin_commit = begin  # type: ignore[assignment, method-assign]
            disk.go_on.set()
        assert sorted(errors) == ["snapshot", "sync"]
        assert b"after" not in pool.snapshots.by_name
        devices["0"].hook = lambda kind, name: None
        if volume.opens:
            pool.volumes.close(volume)
        await pool.reclaimer.reclaim_all()
        # What is made from now on has nothing to do with it.
        await pool.snapshots.create(b"next")
        await running.stop()


async def test_what_others_wrote_is_durable_beside_one_that_failed_on_a_full_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reserve, "_SHARE", 6)
    devices: dict[str, FaultyDevice] = {}
    world = faulty_world(devices, 12 << 20)
    async with open_and_failing(world) as pool:
        failed, sound = [await pool.volumes.create(name) for name in (b"a", b"v")]
        for volume in (failed, sound):
            pool.volumes.open(volume)
        await scatter(sound, 1)
        await sound.sync()
        await pool.snapshots.create(b"s")
        await failed.write(0, noise(1))
        await fail_sync(failed, devices["0"])
        fill(world)
        await scatter(sound, 2)
        written = bytes(await sound.read(0, 2 * OBJECT))
        with pytest.raises(SyncFailedError):
            await pool.sync()
        assert pool.reserve.is_spent and sound.is_clean
        for volume in (failed, sound):
            pool.volumes.close(volume)
    async with open_world(world) as pool:
        assert (await read_volume(pool, b"v"))[: 2 * OBJECT] == written


async def test_an_orderly_end_goes_on_with_what_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """With each processor, also behind one that fails; and with what no volume has that is there."""
    devices: dict[str, FaultyDevice] = {}
    world = faulty_world(devices, processor_count=3)
    async with open_and_failing(world, "a sync failed") as pool:
        failed, sound, removed = [await pool.volumes.create(name) for name in (b"a", b"b", b"c")]
        for volume in (failed, sound, removed):
            pool.volumes.open(volume)
        await failed.write(OBJECT, noise(1))
        await fail_sync(failed, devices["0"])
        for index in range(3):
            await sound.write(index * OBJECT, noise(1, 2))
            await removed.write(index * OBJECT, noise(1, 3))
        await pool.volumes.remove(b"c")

        async def no_sync() -> None:
            raise SyncFailedError("a sync failed")

        # Nothing but what the processors themselves commit is left to make it durable.
        monkeypatch.setattr(pool, "sync", no_sync)
        commits = [processor.commit for processor in pool.processors]

        async def failing(portions: object = None, *args: object) -> int:
            await commits[0](portions, *args)  # type: ignore[arg-type]
            raise SyncFailedError("of the first processor")

        monkeypatch.setattr(pool.processors[0], "commit", failing)
    for volume in (sound, removed):
        assert not any(portion.is_dirty for portion in volume.portions)
    world.check()


async def test_a_processor_commits_for_the_others_when_one_volume_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor_module, "DIRTY_OBJECTS_MAX", 4)
    monkeypatch.setattr(pool_module, "SYNC_PERIOD_S", 1e6)
    devices: dict[str, FaultyDevice] = {}
    world = faulty_world(devices)
    async with open_and_failing(world) as pool:
        failed, sound = [await pool.volumes.create(name) for name in (b"a", b"b")]
        for volume in (failed, sound):
            pool.volumes.open(volume)
        await failed.write(0, noise(1))
        await fail_sync(failed, devices["0"])
        for index in range(8):
            await sound.write(index * OBJECT, noise(1))
        pool.processors[0].wake()
        with trio.fail_after(30):
            while sound.portions[0].dirty_object_count:
                await trio.sleep(0.01)
        for volume in (failed, sound):
            pool.volumes.close(volume)
    world.check()


@pytest.mark.parametrize("is_closed_first", [False, True])
async def test_what_a_failed_volume_wrote_is_given_back_when_it_is_removed_though_a_snapshot_holds_it(
    is_closed_first: bool,
) -> None:
    devices: dict[str, FaultyDevice] = {}
    world = faulty_world(devices)
    world.devices["log"] = devices["log"] = FaultyDevice(MemoryDevice())
    async with open_world(world) as pool:
        await pool.changelogs.create(b"logs", ["log"], 1 << 20)
        volume = await pool.maker.create(VolumeWish(b"v", None, 0, "", b"logs"))
        pool.volumes.open(volume)
        data = noise(4)
        await volume.write(0, data)
        await volume.sync()
        snapshot = await pool.snapshots.create(b"s")
        # One log that is stored and written to further, and one that is not stored.
        await volume.write(0, noise(2, 2))
        await volume.sync()
        used_blocks = pool.changelogs.get(b"logs").used_blocks
        await volume.write(16 * BLOCK, noise(100, 3))
        await fail_sync(volume, devices["log"])
        if is_closed_first:
            pool.volumes.close(volume)
        await pool.volumes.remove(b"v")
        if not is_closed_first:
            pool.volumes.close(volume)
        await until_settled(pool, volume)
        quota = pool.changelogs.get(b"logs")
        assert quota.used_blocks <= used_blocks
        held = await held_bytes(pool, devices["log"])
        assert held <= used_blocks * BLOCK
        members = await pool.snapshots.members(snapshot)
        view = await pool.snapshots.open_volume(snapshot, members.get(b"v")[0])
        assert bytes(await view.read(0, len(data))) == data
        pool.snapshots.close_volume(view)
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert not quota.used_blocks and not await held_bytes(pool, devices["log"])
        await pool.changelogs.remove(b"logs")
    world.check_clean()


async def held_bytes(pool: Pool, device: Device) -> int:
    """What the files of change logs take on a device."""
    total = 0
    for name in device.names("logs/0"):
        with contextlib.closing(device.open(f"logs/0/{name}")) as file:
            total += file.allocated()
    return total


async def test_a_device_that_has_no_room_for_what_it_had_taken_is_told_as_full() -> None:
    """A thin one, or a quota: the allocation comes with the sync."""
    devices: dict[str, FaultyDevice] = {}
    world = faulty_world(devices)
    async with open_and_failing(world) as pool:
        volume = await pool.volumes.create(b"v")
        pool.volumes.open(volume)
        await volume.write(0, noise(1))
        devices["0"].hook = FailNth("sync", 1, errno.ENOSPC, only="logs/")
        for _ in range(2):
            with pytest.raises(SyncFailedError) as caught:
                await volume.sync()
            assert caught.value.errno == errno.ENOSPC
        with pytest.raises(SyncFailedError) as caught:
            await volume.write(0, noise(1, 2))
        assert caught.value.errno == errno.ENOSPC
        pool.volumes.close(volume)
    world.check()


@pytest.mark.parametrize("has_clone", [False, True])
async def test_what_a_failed_volume_was_written_over_stays_for_its_snapshots(has_clone: bool) -> None:
    """Its file counts no blocks: it is not one of its change logs, of which the empty ones go."""
    devices: dict[str, FaultyDevice] = {}
    world = faulty_world(devices)
    data = noise(8)
    async with open_world(world) as pool:
        volume = await pool.maker.create(VolumeWish(b"v", 8 * BLOCK, COPY_ON_WRITE))
        pool.volumes.open(volume)
        await volume.write(0, data)
        await volume.sync()
        snapshot = await pool.snapshots.create(b"s")
        if has_clone:
            await pool.clones.clone(b"s", b"v", b"c")
        await volume.write(0, noise(2, 2))
        await fail_sync(volume, devices["0"])
        pool.volumes.close(volume)
        await pool.volumes.remove(b"v")
        await pool.reclaimer.reclaim_all()
        assert await read_snapshot(pool, snapshot, b"v") == data
        if has_clone:
            assert await read_volume(pool, b"c") == data
    async with open_world(world) as pool:
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == data
    world.check()


async def test_what_a_failed_volume_wrote_is_given_back_when_who_reads_it_in_a_snapshot_is_done() -> None:
    devices: dict[str, FaultyDevice] = {}
    world = faulty_world(devices)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        pool.volumes.open(volume)
        data = noise(4)
        await volume.write(0, data)
        await volume.sync()
        snapshot = await pool.snapshots.create(b"s")
        members = await pool.snapshots.members(snapshot)
        view = await pool.snapshots.open_volume(snapshot, members.get(b"v")[0])
        await volume.write(16 * BLOCK, noise(100, 3))
        await fail_sync(volume, devices["0"])
        pool.volumes.close(volume)
        await pool.volumes.remove(b"v")
        await pool.reclaimer.reclaim_all()
        assert bytes(await view.read(0, len(data))) == data
        pool.snapshots.close_volume(view)
        # By then it is taken apart; what comes next finds it.
        await until_settled(pool, volume)
        assert await held_bytes(pool, devices["0"]) == len(data)
        assert not pool.processors[0].unsettled_ids
    world.check_clean()
