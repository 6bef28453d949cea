"""The pool on devices in memory: one test a promise, and one for each bug that was found."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio
import trio.testing

import snapfs
from snapfs.backends import CrashPlan, Device, DirectoryDevice, FailNth, FaultyDevice, MemoryDevice
from snapfs.check import check_pool, repair
from snapfs.errors import (
    DamagedError,
    DeviceMissingError,
    ExistsError,
    InUseError,
    NoSpaceError,
    NotAPoolError,
    NotFoundError,
    SnapfsError,
    SyncFailedError,
    TooLargeError,
)
from snapfs.manifest import manifest_of
from snapfs.notresident import NotResidentError
from snapfs.pool import Pool, create_pool
from snapfs.snapshots import _Wish
from snapfs.status import pool_status, processor_status

from .harness import WHERE, Running, World, in_memory, open_world, read_snapshot, read_volume

MIB = 1 << 20
OBJECT = 4 * MIB


async def put(pool: Pool, name: bytes, offset: int, data: bytes) -> None:
    async with pool.volumes.opened(name) as volume:
        await volume.write(offset, data)


def log_bytes(world: World) -> int:
    """What all change logs take on the devices."""
    total = 0
    for device in world.devices.values():
        for index in range(8):
            for name in device.names(f"logs/{index}"):
                total += device.open(f"logs/{index}/{name}").allocated()
    return total


async def test_objects_are_spread_over_processors_and_devices() -> None:
    world = World(processor_count=4, device_count=2)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"x" * (8 * OBJECT))
        assert [one.tally.total for one in pool.processors] == [2048] * 4
        for device in world.devices.values():
            assert sum(len(device.names(f"logs/{index}")) for index in range(4)) == 2


async def test_a_snapshot_holds_and_the_volume_goes_on() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 4000, b"first" * 100)
        snapshot = await pool.snapshots.create(b"one")
        await put(pool, b"v", 4090, b"second")
        assert await read_snapshot(pool, snapshot, b"v") == bytes(4000) + b"first" * 100
        assert (await read_volume(pool, b"v"))[4090:4096] == b"second"
        assert snapshot.stall_ns > 0
        members = await pool.snapshots.members(snapshot)
        assert members.by_id[members.by_name[b"v"]].size_bytes == 4500


async def test_a_named_snapshot_leaves_other_volumes_alone() -> None:
    world = World()
    async with open_world(world) as pool:
        for name in (b"a", b"b"):
            await pool.volumes.create(name)
            await put(pool, name, 0, b"1" * 4096)
        snapshot = await pool.snapshots.create(b"only-a", [b"a"])
        for name in (b"a", b"b"):
            await put(pool, name, 0, b"2" * 4096)
        await pool.sync()
        assert await read_snapshot(pool, snapshot, b"a") == b"1" * 4096
        with pytest.raises(NotFoundError):
            await read_snapshot(pool, snapshot, b"b")
        store = pool.processors[0].access.store
        b_logs = store.logs_of(pool.volumes.get(b"b").volume_id)
        assert len(b_logs) == 1, "b went on in its log"
        assert not store.copies_in(pool.volumes.get(b"b").volume_id, 0, 1 << 40)


async def test_two_volumes_are_cut_at_one_instant() -> None:
    """Writers that alternate between two volumes while snapshots are made: none holds b ahead of a."""
    world = World()
    async with open_world(world) as pool:
        for name in (b"a", b"b"):
            await pool.volumes.create(name)

        async def write(stop: trio.Event) -> None:
            number = 0
            async with pool.volumes.opened(b"a") as first, pool.volumes.opened(b"b") as second:
                while not stop.is_set():
                    number += 1
                    await first.write(number % 3 * OBJECT, number.to_bytes(8, "big"))
                    await trio.lowlevel.checkpoint()
                    await second.write(number % 3 * OBJECT, number.to_bytes(8, "big"))
                    await trio.lowlevel.checkpoint()

        def counter(data: bytes) -> int:
            return max(int.from_bytes(data[place : place + 8], "big") for place in range(0, len(data) or 1, OBJECT))

        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, stop)
            last = 0
            for _ in range(20):
                snapshot = await pool.snapshots.create()
                a = counter(await read_snapshot(pool, snapshot, b"a"))
                b = counter(await read_snapshot(pool, snapshot, b"b"))
                assert b <= a <= b + 1
                assert a >= last
                last = a
            stop.set()


async def test_what_was_removed_stays_in_its_snapshots_and_its_space_comes_back() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, os.urandom(MIB))
        contents = await read_volume(pool, b"v")
        snapshot = await pool.snapshots.create(b"one")
        await put(pool, b"v", 0, os.urandom(MIB // 2))
        await pool.volumes.remove(b"v")
        await pool.reclaimer.reclaim_all()
        assert await read_snapshot(pool, snapshot, b"v") == contents
        assert b"v" not in pool.volumes.by_name
        members = await pool.snapshots.members(snapshot)
        assert members.block_counts[members.by_name[b"v"]] == 256
        await pool.snapshots.delete(b"one")
        await pool.reclaimer.reclaim_all()
        assert log_bytes(world) == 0
    world.check_clean()


async def test_a_volume_removed_while_open_works_until_closed() -> None:
    world = World()
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        pool.volumes.open(volume)
        await volume.write(0, b"before")
        await pool.volumes.remove(b"v")
        await pool.volumes.create(b"v")
        await pool.snapshots.create(b"after")
        await volume.write(3, b"after")
        assert await volume.read(0, 100) == b"befafter"
        await pool.reclaimer.reclaim_all()
        assert await volume.read(0, 100) == b"befafter"
        pool.volumes.close(volume)
        await pool.reclaimer.reclaim_all()
        assert log_bytes(world) == 0
        assert await read_snapshot(pool, pool.snapshots.get(b"after"), b"v") == b""
    world.check_clean()


async def test_a_deleted_snapshot_stays_readable_while_open() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * OBJECT)
        snapshot = await pool.snapshots.create(b"one")
        members = await pool.snapshots.members(snapshot)
        view = await pool.snapshots.open_volume(snapshot, members.by_name[b"v"])
        await pool.snapshots.delete(b"one")
        await put(pool, b"v", 0, b"2" * OBJECT)
        await pool.reclaimer.reclaim_all()
        assert await view.read(0, OBJECT) == b"1" * OBJECT
        pool.snapshots.close_volume(view)
        await pool.reclaimer.reclaim_all()
        assert log_bytes(world) == OBJECT
    world.check_clean()


async def test_exclusive_space_is_what_deleting_frees() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"0" * 8 * MIB)
        for number in range(6):
            await pool.snapshots.create(b"s%d" % number)
            await put(pool, b"v", number * 100_000, b"%d" % number * 300_000)
        for number in (3, 0, 5, 1, 2, 4):
            name = b"s%d" % number
            account = await pool.snapshots.account()
            exclusive = account.exclusive_blocks().get(pool.snapshots.get(name).instant, 0) * 4096
            await pool.sync()
            before = log_bytes(world)
            await pool.snapshots.delete(name)
            await pool.reclaimer.reclaim_all()
            assert before - log_bytes(world) == exclusive, name
        assert log_bytes(world) == 8 * MIB
    world.check_clean()


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
async def test_a_snapshot_that_returned_survives_a_power_cut(keep: float) -> None:
    world = World()
    async with trio.open_nursery() as nursery:
        running = Running(world)
        await running.start(nursery)
        await running.pool.volumes.create(b"v")
        await put(running.pool, b"v", 0, b"old" * 5000)
        await running.pool.snapshots.create(b"one")
        await put(running.pool, b"v", 0, b"new" * 5000)
        await running.crash(CrashPlan(7, keep))
        running = Running(world)
        await running.start(nursery)
        pool = running.pool
        assert await read_snapshot(pool, pool.snapshots.get(b"one"), b"v") == b"old" * 5000
        await running.stop()


async def test_a_snapshot_cut_off_before_its_publication_leaves_nothing() -> None:
    """Power goes when every processor has prepared and the catalog has not committed."""
    world = World()
    async with trio.open_nursery() as nursery:
        running = Running(world)
        await running.start(nursery)
        pool = running.pool
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 4096)
        await pool.snapshots.create(b"kept")
        await put(pool, b"v", 0, b"2" * 4096)
        cut = pool.snapshots._cut(_Wish(b"lost", "", frozenset(), ""), None)
        for processor, part in zip(pool.processors, cut.parts, strict=True):
            await processor.prepare(part, None, pool.catalog.generation)
        await put(pool, b"v", 0, b"3" * 4096)
        await pool.volumes.get(b"v").sync()
        await running.crash(CrashPlan(3, 1.0))
        assert any("prepared" in finding.what for finding in world.check().findings)
        running = Running(world)
        await running.start(nursery)
        pool = running.pool
        assert set(pool.snapshots.by_name) == {b"kept"}
        assert await read_volume(pool, b"v") == b"3" * 4096
        assert await read_snapshot(pool, pool.snapshots.get(b"kept"), b"v") == b"1" * 4096
        again = await pool.snapshots.create(b"lost")
        assert again.instant > cut.row.instant
        await pool.reclaimer.reclaim_all()
        await running.stop()
    world.check_clean()


async def test_a_failed_data_sync_stops_the_volume_and_no_other() -> None:
    world = World(processor_count=1)
    hook = FailNth("sync", 1, errno.EIO, only="logs/0/00000001")
    world.devices["0"] = FaultyDevice(world.devices["0"])
    async with trio.open_nursery() as nursery:
        running = Running(world)
        await running.start(nursery)
        pool = running.pool
        world.devices["0"].hook = hook  # type: ignore[attr-defined]
        for name in (b"bad", b"good"):
            await pool.volumes.create(name)
        await put(pool, b"bad", 0, b"x" * 4096)
        await put(pool, b"good", 0, b"y" * 4096)
        with pytest.raises(SyncFailedError):
            await pool.volumes.get(b"bad").sync()
        # The device would say that all is well now; what it kept is not known all the same.
        with pytest.raises(SyncFailedError):
            await pool.volumes.get(b"bad").sync()
        with pytest.raises(SyncFailedError):
            await put(pool, b"bad", 0, b"z" * 4096)
        assert await read_volume(pool, b"bad") == b"x" * 4096, "reads go on"
        await pool.volumes.get(b"good").sync()
        await pool.snapshots.create(b"of-good", [b"good"])
        with pytest.raises(SyncFailedError):
            await pool.snapshots.create(b"of-all")
        assert b"of-all" not in pool.snapshots.by_name
        status = await pool_status(pool)
        assert status["health"] == "failed"
        with pytest.raises(SyncFailedError):
            await running.stop()
        world.home.close()
        running = Running(world)
        await running.start(nursery)
        await put(running.pool, b"bad", 0, b"again")
        await running.stop()


async def test_a_full_device_fails_the_writer_and_harms_nothing() -> None:
    world = World(capacity_bytes=4 * MIB)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 2 * MIB)
        snapshot = await pool.snapshots.create(b"one")
        await put(pool, b"v", 0, b"2" * MIB)
        with pytest.raises(OSError) as caught:
            await put(pool, b"v", MIB, b"3" * 2 * MIB)
        assert caught.value.errno == errno.ENOSPC
        await pool.sync()
        assert await read_snapshot(pool, snapshot, b"v") == b"1" * 2 * MIB
        assert await read_volume(pool, b"v") == b"2" * MIB + b"1" * MIB
        assert log_bytes(world) == 3 * MIB, "what the failed write left was given back"
        await pool.snapshots.delete(b"one")
        await pool.reclaimer.reclaim_all()
        await put(pool, b"v", MIB, b"3" * MIB)
    world.check_clean()


async def test_a_snapshot_without_room_for_its_rows_does_not_exist() -> None:
    world = World(processor_count=2)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 4096)
        home = in_memory(world.home)
        used = home._used_pages
        home.capacity_bytes = used * 4096
        with pytest.raises(NoSpaceError):
            for number in range(2000):
                await pool.snapshots.create(b"s%d" % number)
        home.capacity_bytes = None
        await put(pool, b"v", 0, b"2" * 4096)
        await pool.sync()
        await pool.snapshots.create(b"later")
        for snapshot in list(pool.snapshots.by_name.values()):
            expected = b"2" if snapshot.name == b"later" else b"1"
            assert await read_snapshot(pool, snapshot, b"v") == expected * 4096
        await pool.reclaimer.reclaim_all()
    world.check_clean()


async def test_deleting_works_when_the_pools_own_device_is_full() -> None:
    world = World(processor_count=2)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for number in range(30):
            await put(pool, b"v", 0, b"%d" % number * 9000)
            await pool.snapshots.create(b"s%d" % number)
        home = in_memory(world.home)
        home.capacity_bytes = home._used_pages * 4096
        for number in range(30):
            await pool.snapshots.delete(b"s%d" % number)
            await pool.reclaimer.reclaim_all()
        assert not pool.snapshots.by_name and not pool.snapshots.deleted
        home.capacity_bytes = None
    world.check_clean()


async def test_truncate_frees_and_what_is_regained_reads_as_zeros() -> None:
    world = World()
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"x" * (3 * OBJECT))
        await pool.volumes.truncate(volume, 5000)
        assert volume.block_count == 2
        await pool.volumes.truncate(volume, 3 * OBJECT)
        assert await read_volume(pool, b"v") == b"x" * 5000 + bytes(3 * OBJECT - 5000)
        await pool.sync()
        await pool.reclaimer.reclaim_all()
        assert log_bytes(world) == 8192
        with pytest.raises(TooLargeError):
            await pool.volumes.truncate(volume, 1 << 60)
        with pytest.raises(TooLargeError):
            await put(pool, b"v", (1 << 62) - 5, b"far out")
        await pool.volumes.truncate(volume, 16 << 40)
        await put(pool, b"v", (16 << 40) - 3, b"end")
        assert volume.size_bytes == 16 << 40
    world.check_clean()


async def test_unsynced_appends_do_not_show_after_a_power_cut_and_growth() -> None:
    """What was written behind the durable size must not be seen when the volume grows again."""
    world = World(processor_count=1)
    async with trio.open_nursery() as nursery:
        running = Running(world)
        await running.start(nursery)
        await running.pool.volumes.create(b"v")
        await put(running.pool, b"v", 0, b"a" * 100)
        await running.pool.sync()
        await put(running.pool, b"v", 100, b"b" * 9000)
        await running.pool.processors[0].commit()
        await running.crash(CrashPlan(1, 1.0, torn=0.0))
        running = Running(world)
        await running.start(nursery)
        volume = running.pool.volumes.get(b"v")
        assert volume.size_bytes == 100
        await running.pool.volumes.truncate(volume, 9100)
        assert await read_volume(running.pool, b"v") == b"a" * 100 + bytes(9000)
        await running.pool.reclaimer.reclaim_all()
        await running.stop()
    world.check_clean()


async def test_growth_during_a_background_sync_is_not_forgotten() -> None:
    """A volume written and closed again while its sync was under way was taken for clean."""
    world = World(processor_count=1)
    hook_calls = 0
    gate = trio.Event()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1")
        volume = pool.volumes.get(b"v")
        original = volume.sync

        async def slow_sync(*, data_only: bool = False) -> None:
            nonlocal hook_calls
            hook_calls += 1
            await original(data_only=data_only)
            await gate.wait()

        volume.sync = slow_sync  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.volumes.sync_all)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await put(pool, b"v", 1, b"23")
            gate.set()
        volume.sync = original  # type: ignore[method-assign]
    assert hook_calls == 1
    async with open_world(world) as pool:
        assert await read_volume(pool, b"v") == b"123"


async def test_a_sync_during_a_replacing_rename_saves_no_half_of_it() -> None:
    """A periodic sync saved the new name while the volume that had it was still there."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        for name in (b"a", b"b"):
            await pool.volumes.create(name)
            await put(pool, name, 0, name)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(pool.volumes.sync_all)
            nursery.start_soon(pool.volumes.rename, b"a", b"b")
            for _ in range(5):
                nursery.start_soon(pool.volumes.sync_all)
        assert set(pool.volumes.by_name) == {b"b"}
        assert await read_volume(pool, b"b") == b"a"


async def test_names_swap_and_are_refused() -> None:
    world = World()
    async with open_world(world) as pool:
        for name in (b"a", b"b"):
            await pool.volumes.create(name)
            await put(pool, name, 0, name)
        snapshot = await pool.snapshots.create(b"before")
        await pool.volumes.rename(b"a", b"b", exchange=True)
        assert await read_volume(pool, b"a") == b"b"
        assert await read_snapshot(pool, snapshot, b"a") == b"a"
        with pytest.raises(ExistsError):
            await pool.volumes.rename(b"a", b"b", replace=False)
        with pytest.raises(NotFoundError):
            await pool.volumes.rename(b"nothing", b"c")
        with pytest.raises(ExistsError):
            await pool.volumes.create(b"a")
        with pytest.raises(ExistsError):
            await pool.snapshots.create(b"before")
        with pytest.raises(NotFoundError):
            await pool.snapshots.create(b"x", [b"nothing"])
        with pytest.raises(NotFoundError):
            await pool.snapshots.create(b"x", [])
        with pytest.raises(NotFoundError):
            await pool.snapshots.delete(b"nothing")
        await pool.snapshots.rename(b"before", b"earlier")
        assert await read_snapshot(pool, pool.snapshots.get(b"earlier"), b"b") == b"b"
    world.check_clean()


async def test_unnamed_snapshots_of_one_second_differ() -> None:
    world = World()
    async with open_world(world) as pool:
        made = [await pool.snapshots.create() for _ in range(5)]
        assert len({one.name for one in made}) == 5


async def test_ten_thousand_objects_more_than_memory_holds_read_back() -> None:
    """The maps in memory are bounded; what was let go of is loaded again."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        residency = pool.processors[0]._neighbours.residency
        residency._object_count_max = 64
        await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v") as volume:
            for number in range(300):
                await volume.write(number * OBJECT, number.to_bytes(4, "big"))
            await volume.truncate(600 * OBJECT)
            await volume.sync()
            # All are clean now, and each that is loaded has others go.
            for number in range(300, 600):
                assert not any(await volume.read(number * OBJECT, 4))
            assert len(volume.portions[0].objects) <= 64 + 64
            for number in reversed(range(300)):
                assert int.from_bytes(await volume.read(number * OBJECT, 4), "big") == number
            assert len(volume.portions[0].objects) <= 64 + 64
    world.check_clean()


async def test_the_manifest_tells_each_reference() -> None:
    import json

    world = World(processor_count=2)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * (2 * OBJECT))
        snapshot = await pool.snapshots.create(b"one", note="a note")
        await put(pool, b"v", 0, b"2" * 4096)
        told = json.loads(await manifest_of(pool, snapshot))
        assert told["snapshot"]["note"] == "a note"
        first, second = told["intermediate_snapshots"]
        assert first["volumes"][0]["objects"][0]["point_in_time_copy"] == {"instant": snapshot.instant}
        assert first["volumes"][0]["change_log"]["epoch"] == snapshot.instant + 1
        assert second["volumes"][0]["objects"][0]["point_in_time_copy"] == "live map, unchanged since"
        assert second["volumes"][0]["change_log"] is None
        assert first["state"]["mapped_bytes"] == second["state"]["mapped_bytes"] == OBJECT
        assert (await processor_status(pool.processors[0]))["intermediate_snapshot_count"] == 1


# -- opening ------------------------------------------------------------------------------------


def test_a_second_opener_is_told_who_has_it() -> None:
    world = World()
    pool = Pool.open(world.home, WHERE, world.open_device, "the first")
    with pytest.raises(InUseError, match=f"process {os.getpid()} on .*the first"):
        Pool.open(world.home, WHERE, world.open_device)
    assert pool.descriptor.processor_count == 4


def test_what_is_not_a_pool_is_refused() -> None:
    with pytest.raises(NotAPoolError):
        Pool.open(MemoryDevice(), WHERE, lambda path: MemoryDevice())


@pytest.mark.parametrize("name", ["catalog.sqlite", "shards/2.sqlite"])
@pytest.mark.parametrize("how", ["missing", "garbage"])
def test_damage_is_named(name: str, how: str) -> None:
    world = World()
    world.home.remove(name)
    if how == "garbage":
        world.home.create(name).write(b"garbage" * 4000, 0)
    with pytest.raises(DamagedError):
        Pool.open(world.home, WHERE, world.open_device)
    world.home.close()
    report = check_pool(world.home, WHERE, world.open_device)
    assert report.is_damaged


async def test_an_old_copy_of_one_database_is_refused() -> None:
    for name in ("catalog.sqlite", "shards/1.sqlite"):
        world = World()
        old = world.home.read_file(name)
        async with open_world(world) as pool:
            await pool.volumes.create(b"v")
            await put(pool, b"v", OBJECT, b"x")
            await pool.snapshots.create(b"one")
        world.home.write_file(name, old)
        with pytest.raises(DamagedError, match="old copy"):
            Pool.open(world.home, WHERE, world.open_device)
        world.home.close()


def test_a_missing_device_is_named() -> None:
    world = World(device_count=2)

    def gone(path: str) -> Device:
        if path == "1":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return world.devices[path]

    with pytest.raises(DeviceMissingError, match="device 1 "):
        Pool.open(world.home, WHERE, gone)
    world.home.close()
    with pytest.raises(DeviceMissingError, match="is device 0"):
        Pool.open(world.home, WHERE, lambda path: world.devices["0"])


# -- the verifier --------------------------------------------------------------------------------


async def test_the_verifier_finds_what_is_lost_and_what_leaks() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 40960)
        await pool.snapshots.create(b"one")
        await put(pool, b"v", 0, b"2" * 40960)
    log = world.devices["0"].open("logs/0/00000001")
    log.punch(0, 8192)
    report = check_pool(world.home, WHERE, world.open_device)
    world.home.close()
    assert report.is_damaged and any("8.0 KiB that maps name" in one.what for one in report.findings)
    log.write(b"1" * 8192, 0)
    log.write(b"leak" * 1024, 1 << 20)
    report = check_pool(world.home, WHERE, world.open_device)
    world.home.close()
    assert not report.is_damaged and not report.is_clean
    done = await repair(world.home, WHERE, world.open_device)
    assert any("no map named" in sentence for sentence in done)
    world.check_clean()
    async with open_world(world) as pool:
        assert await read_snapshot(pool, pool.snapshots.get(b"one"), b"v") == b"1" * 40960, "repair keeps snapshots"


async def test_repair_corrects_counts() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 40960)
        await pool.sync()
        store = pool.processors[0].access.store
        with store.database.transaction():
            store.database.execute("UPDATE portions SET block_count = 77")
            store.database.execute("UPDATE logs SET block_count = 99")
    report = world.check()
    assert not report.is_clean
    await repair(world.home, WHERE, world.open_device)
    world.check_clean()
    async with open_world(world) as pool:
        assert await read_volume(pool, b"v") == b"1" * 40960


# -- on a real directory -------------------------------------------------------------------------


async def test_a_script_uses_the_same_pool(tmp_path: Path) -> None:
    (tmp_path / "pool" / "device").mkdir(parents=True)
    home, device = DirectoryDevice(tmp_path / "pool"), DirectoryDevice(tmp_path / "pool" / "device")
    create_pool(home, {"": device}, 2)
    home.close()
    device.close()
    async with snapfs.open_pool(tmp_path / "pool") as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 9 * MIB)
        snapshot = await pool.snapshots.create(b"one")
        await put(pool, b"v", 5 * MIB, b"2" * MIB)
        with pytest.raises(InUseError):
            async with snapfs.open_pool(tmp_path / "pool"):
                pass
    async with snapfs.open_pool(tmp_path / "pool") as pool:
        snapshot = pool.snapshots.get(b"one")
        assert await read_snapshot(pool, snapshot, b"v") == b"1" * 9 * MIB
        assert (await read_volume(pool, b"v"))[5 * MIB : 6 * MIB] == b"2" * MIB
    with pytest.raises(RuntimeError, match="of the script"):
        async with snapfs.open_pool(tmp_path / "pool"):
            raise RuntimeError("an error of the script")
    with pytest.raises(NotAPoolError):
        async with snapfs.open_pool(tmp_path / "nothing"):
            pass
    assert issubclass(SnapfsError, Exception)


# -- found by review, each with the sequence that failed -----------------------------------------


async def test_a_publication_does_not_take_back_a_synced_size() -> None:
    """An append that was synced while a snapshot was being prepared lost its size to the snapshot's."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 4096)
        mark = volume.size_mark()
        await put(pool, b"v", 4096, b"2" * 4096)
        await volume.sync()
        volume.data_synced(mark)
        assert volume.row().attributes.size_bytes == 8192
        mark = volume.size_mark()
        await pool.volumes.truncate(volume, 100)
        await pool.volumes.truncate(volume, 8192)
        volume.data_synced(mark)
        assert volume.row().attributes.size_bytes == 100


async def test_an_instant_is_not_used_twice_after_a_failed_snapshot() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 4096)
        home = in_memory(world.home)
        used = home._used_pages
        with pytest.raises(NoSpaceError):
            home.capacity_bytes = used * 4096
            for number in range(2000):
                await pool.snapshots.create(b"s%d" % number, [b"v"])
        home.capacity_bytes = None
        for name in list(pool.snapshots.by_name):
            await pool.snapshots.delete(name)
        await pool.reclaimer.reclaim_all()
        await pool.volumes.create(b"w")
    async with open_world(world) as pool:
        await put(pool, b"v", 0, b"2" * 4096)
        snapshot = await pool.snapshots.create(b"all")
        await put(pool, b"v", 0, b"3" * 4096)
        assert await read_snapshot(pool, snapshot, b"v") == b"2" * 4096
        assert await read_snapshot(pool, snapshot, b"w") == b""
    world.check_clean()


async def test_what_is_removed_while_open_does_not_haunt_later_snapshots() -> None:
    """As a log is rotated: the removed file showed in a later snapshot under the name of the new one."""
    world = World()
    async with open_world(world) as pool:
        old = await pool.volumes.create(b"log")
        pool.volumes.open(old)
        await old.write(0, b"old")
        await pool.volumes.remove(b"log")
        await pool.volumes.create(b"log")
        await put(pool, b"log", 0, b"new")
        snapshot = await pool.snapshots.create(b"s")
        await put(pool, b"log", 0, b"NEW")
        await pool.snapshots.create(b"s2")
        await old.write(0, b"older")
        await old.sync()
        assert await read_snapshot(pool, snapshot, b"log") == b"new"
        pool.volumes.close(old)
    async with open_world(world) as pool:
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"log") == b"new"
    world.check_clean()


async def test_a_removed_open_volume_keeps_objects_that_memory_lets_go_of() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        pool.volumes.open(volume)
        await volume.write(0, b"1")
        await pool.volumes.remove(b"v")
        await volume.write(500 * OBJECT, b"2")
        await volume.sync()
        portion = volume.portions[0]
        for index in list(portion.objects):
            assert portion.let_go(index)
        assert await volume.read(500 * OBJECT, 1) == b"2"
        pool.volumes.close(volume)
        await pool.reclaimer.reclaim_all()
        assert log_bytes(world) == 0
    world.check_clean()


async def test_a_stop_soon_after_a_crash_forgets_nothing_of_its_recovery() -> None:
    world = World(processor_count=1)
    async with trio.open_nursery() as nursery:
        running = Running(world)
        await running.start(nursery)
        await running.pool.volumes.create(b"v")
        await put(running.pool, b"v", 0, b"a" * 100)
        await running.pool.sync()
        await put(running.pool, b"v", 100, b"b" * 9000)
        await running.pool.processors[0].commit()
        await running.crash(CrashPlan(1, 1.0, torn=0.0))
        pool = Pool.open(world.home, WHERE, world.open_device)
        await pool.recover()
        await pool.close()
        world.home.close()
        running = Running(world)
        await running.start(nursery)
        volume = running.pool.volumes.get(b"v")
        await running.pool.volumes.truncate(volume, 9100)
        assert await read_volume(running.pool, b"v") == b"a" * 100 + bytes(9000)
        await running.stop()


async def test_a_pool_on_a_full_device_opens_and_its_reserve_is_known() -> None:
    world = World(processor_count=2)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for number in range(10):
            await put(pool, b"v", 0, b"%d" % number * 9000)
            await pool.snapshots.create(b"s%d" % number)
    home = in_memory(world.home)
    home.capacity_bytes = home._used_pages * 4096
    async with open_world(world) as pool:
        assert pool.reserve.is_spent
        for number in range(10):
            await pool.snapshots.delete(b"s%d" % number)
        await pool.reclaimer.reclaim_all()
        assert not pool.snapshots.deleted
    home.capacity_bytes = None
    async with open_world(world) as pool:
        assert pool.reserve.is_spent
        await pool.reclaimer.reclaim_all()
        assert not pool.reserve.is_spent
    world.check_clean()


async def test_dismantling_under_a_snapshots_reader_frees_everything() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 409600)
        first = await pool.snapshots.create(b"s1")
        await put(pool, b"v", 0, b"2" * 409600)
        await pool.snapshots.create(b"s2")
        members = await pool.snapshots.members(first)
        view = await pool.snapshots.open_volume(first, members.by_name[b"v"])
        assert await view.read(0, 10) == b"1" * 10
        await pool.volumes.remove(b"v")
        await pool.reclaimer.reclaim_all()
        await pool.snapshots.delete(b"s2")
        await pool.reclaimer.reclaim_all()
        assert await view.read(0, 409600) == b"1" * 409600
        pool.snapshots.close_volume(view)
        assert log_bytes(world) == 409600
        await pool.snapshots.delete(b"s1")
        await pool.reclaimer.reclaim_all()
        assert log_bytes(world) == 0
    world.check_clean()


async def test_a_failed_write_over_two_objects_shows_nothing_behind_the_end() -> None:
    world = World(processor_count=2, capacity_bytes=3 * MIB)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        await pool.volumes.truncate(volume, OBJECT - MIB)
        with pytest.raises(OSError) as caught:
            await put(pool, b"v", OBJECT - MIB, b"X" * 4 * MIB)
        assert caught.value.errno == errno.ENOSPC
        assert volume.size_bytes == OBJECT - MIB
        await pool.volumes.truncate(volume, OBJECT)
        assert not any(await read_volume(pool, b"v"))
    world.check_clean()


async def test_a_log_that_dies_under_a_reader_is_closed_and_read_around() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        pool.volumes.open(volume)
        await volume.write(0, b"1" * 8192)
        portion = volume.portions[0]
        old = portion.segments(portion.map_now(0), 0, 0, 8192, 0)
        log = old[0][0]
        assert log is not None
        log.users += 1
        await pool.snapshots.create(b"s")
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        await volume.write(0, b"2" * 8192)
        await volume.sync()
        assert log.is_discarded and log.file is not None, "its reader still has it"
        log.users -= 1
        log.close_if_discarded()
        assert log.file is None
        with pytest.raises(NotResidentError):
            await portion.read_segments(old, memoryview(bytearray(8192)))
        assert await volume.read(0, 8192) == b"2" * 8192
        pool.volumes.close(volume)
    world.check_clean()


async def test_a_failed_volume_that_is_removed_holds_nobody_up() -> None:
    world = World(processor_count=1)
    faulty = FaultyDevice(world.devices["0"])
    world.devices["0"] = faulty
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 4096)
        await pool.snapshots.create(b"old")
        await put(pool, b"v", 0, b"2" * 4096)
        faulty.hook = FailNth("sync", 1, errno.EIO)
        with pytest.raises(SyncFailedError):
            await pool.volumes.get(b"v").sync()
        await pool.volumes.remove(b"v")
        await pool.reclaimer.reclaim_all()
        await pool.snapshots.create(b"new")
        assert await read_snapshot(pool, pool.snapshots.get(b"old"), b"v") == b"1" * 4096


async def test_a_volume_removed_during_its_trim_is_taken_apart() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 40960)
        volume.open()
        await pool.volumes.remove(b"v")
        volume.close()
        await pool.reclaimer.reclaim_all()
        assert log_bytes(world) == 0 and not pool.volumes.removed
    world.check_clean()


async def test_what_was_given_back_stays_given_back_after_a_power_cut() -> None:
    """A punch that was not synced came back, and nothing remembered it."""
    world = World()
    async with trio.open_nursery() as nursery:
        running = Running(world)
        await running.start(nursery)
        pool = running.pool
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 8 * 4096)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"2" * 4 * 4096)
        await pool.volumes.get(b"v").sync()
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        await pool.snapshots.create(b"t")
        await put(pool, b"v", 0, b"3" * 4096)
        await pool.volumes.get(b"v").sync()
        await running.crash(CrashPlan(1, 0.0))
        running = Running(world)
        await running.start(nursery)
        await running.pool.reclaimer.reclaim_all()
        await running.stop()
    world.check_clean()


async def test_blocks_of_zeros_in_a_write_take_no_space() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        data = b"x" * 10000 + bytes(40000) + b"y" * 5000 + bytes(8192)
        await put(pool, b"v", 100, data)
        assert await read_volume(pool, b"v") == bytes(100) + data
        volume = pool.volumes.get(b"v")
        assert volume.block_count == 3 + 3
        snapshot = await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"n" * 4096 + bytes(3 * 4096) + b"m" * 4096)
        assert volume.block_count == 5
        expected = b"n" * 4096 + bytes(3 * 4096) + b"m" * 4096 + (bytes(100) + data)[5 * 4096 :]
        assert await read_volume(pool, b"v") == expected
        assert await read_snapshot(pool, snapshot, b"v") == bytes(100) + data
        # Zeros over what the current log has: it is written, and the log stays open.
        await put(pool, b"v", 0, bytes(4096) + b"k" * 4096)
        assert await read_volume(pool, b"v") == bytes(4096) + b"k" * 4096 + expected[8192:]
        await pool.sync()
    world.check_clean()
