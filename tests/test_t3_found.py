"""One test for each bug that attacks on clones, rollbacks, copy-on-write volumes and quotas found."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio

from snapfs import cowportion
from snapfs.backends import CrashPlan, MemoryDevice
from snapfs.check import repair
from snapfs.errors import BusyVolumeError, ExistsError, NoSpaceError
from snapfs.formats import COPY_ON_WRITE, REDIRECT
from snapfs.making import VolumeWish
from snapfs.pool import Pool

from .harness import WHERE, Running, World, open_world, read_snapshot, read_volume
from .test_t3_clones import BLOCK, OBJECT, allocated_blocks, put


class Gate:
    """Stalls a blocking call in its thread, once, until it is let go."""

    def __init__(self) -> None:
        self._is_armed = False
        self._entered = threading.Event()
        self._go = threading.Event()

    def arm(self) -> None:
        self._is_armed = True

    def pass_through(self) -> None:
        if self._is_armed:
            self._is_armed = False
            self._entered.set()
            assert self._go.wait(30)

    async def wait_until_entered(self) -> None:
        assert await trio.to_thread.run_sync(self._entered.wait, 30)

    def open(self) -> None:
        self._go.set()


@contextmanager
def stalled_preservation() -> Iterator[Gate]:
    """The writing of preserved blocks can be stalled."""
    gate = Gate()
    before = cowportion._write_runs

    def stalled(*arguments: Any) -> None:
        gate.pass_through()
        before(*arguments)

    cowportion._write_runs = stalled  # type: ignore[assignment]
    try:
        yield gate
    finally:
        cowportion._write_runs = before


async def cow_volume(pool: Pool, object_count: int = 2) -> bytes:
    await pool.maker.create(VolumeWish(b"v", object_count * OBJECT, COPY_ON_WRITE))
    await put(pool, b"v", 0, b"a" * object_count * OBJECT)
    return b"a" * object_count * OBJECT


# -- copy-on-write ---------------------------------------------------------------------------


async def test_a_sync_while_blocks_are_preserved_does_not_let_the_map_go_first() -> None:
    world = World(processor_count=1)
    with stalled_preservation() as gate:
        async with trio.open_nursery() as nursery:
            running = Running(world)
            await running.start(nursery)
            pool = running.pool
            before = await cow_volume(pool)
            await pool.snapshots.create(b"s")
            async with pool.volumes.opened(b"v") as volume:
                gate.arm()
                async with trio.open_nursery() as writers:
                    writers.start_soon(volume.write, 0, b"b" * BLOCK)
                    await gate.wait_until_entered()
                    await volume.sync()
                    gate.open()
                await volume.sync()
            await running.crash(CrashPlan(1, 0.0))
            running = Running(world)
            await running.start(nursery)
            assert await read_snapshot(running.pool, running.pool.snapshots.get(b"s"), b"v") == before
            await running.stop()


@pytest.mark.parametrize("offset", [OBJECT, 0])
async def test_a_change_log_does_not_die_while_blocks_are_preserved_into_it(offset: int) -> None:
    world = World(processor_count=1)
    with stalled_preservation() as gate:
        async with open_world(world) as pool:
            before = await cow_volume(pool)
            await pool.snapshots.create(b"s0")
            await put(pool, b"v", 0, b"b" * BLOCK)
            await pool.snapshots.create(b"s1")
            async with pool.volumes.opened(b"v") as volume:
                if offset:
                    await volume.write(0, b"c" * BLOCK)
                gate.arm()
                async with trio.open_nursery() as writers:
                    writers.start_soon(volume.write, offset, b"d" * 2 * BLOCK)
                    await gate.wait_until_entered()
                    await pool.snapshots.delete(b"s1")
                    await pool.reclaimer.reclaim_all()
                    gate.open()
            assert await read_snapshot(pool, pool.snapshots.get(b"s0"), b"v") == before
            await pool.reclaimer.reclaim_all()
    world.check_clean()


async def test_the_origin_of_a_clone_leaves_a_log_that_had_blocks_freed() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        before = await cow_volume(pool)
        await pool.snapshots.create(b"s0")
        await pool.clones.clone(b"s0", b"v", b"c")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"b" * BLOCK)
            await pool.snapshots.create(b"s1")
            await volume.write(0, b"c" * BLOCK)
            await pool.snapshots.delete(b"s1")
            await pool.reclaimer.reclaim_all()
            await volume.write(BLOCK, b"d" * BLOCK)
        assert await read_snapshot(pool, pool.snapshots.get(b"s0"), b"v") == before
        assert await read_volume(pool, b"c") == before
        await pool.reclaimer.reclaim_all()
    world.check_clean()


async def test_the_origin_of_a_clone_of_a_copy_on_write_volume_can_be_deleted() -> None:
    world = World()
    async with open_world(world) as pool:
        before = await cow_volume(pool)
        await pool.snapshots.create(b"s")
        await pool.clones.clone(b"s", b"v", b"c")
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert pool.reclaimer.waiting_count == 0
        await put(pool, b"v", 0, b"z" * 2 * OBJECT)
        assert await read_volume(pool, b"c") == before
    world.check_clean()


async def test_a_volume_truncated_to_nothing_is_there_after_reopening() -> None:
    world = World()
    world.make_image("/image", b"x" * OBJECT)
    async with open_world(world) as pool:
        volume = await pool.maker.create(VolumeWish(b"v", None, COPY_ON_WRITE, "/image"))
        await pool.volumes.truncate(volume, 0)
    async with open_world(world) as pool:
        assert "image" not in pool.events.contents.decode()
        await put(pool, b"v", 0, b"y" * 100)
        assert await read_volume(pool, b"v") == b"y" * 100
    world.check_clean()


# -- quotas ----------------------------------------------------------------------------------


def changelog_world(processor_count: int = 4) -> World:
    world = World(processor_count=processor_count)
    world.devices["/logs"] = MemoryDevice()
    return world


async def test_a_write_refused_halfway_leaves_nothing_behind_the_size() -> None:
    world = changelog_world()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"logs", ["/logs"], 100 * BLOCK)
        wish = VolumeWish(b"v", OBJECT - 10 * BLOCK, REDIRECT, changelog_name=b"logs")
        volume = await pool.maker.create(wish)
        await put(pool, b"v", 0, b"1" * BLOCK)
        await pool.snapshots.create(b"s")
        with pytest.raises(NoSpaceError):
            await put(pool, b"v", OBJECT - 10 * BLOCK, b"S" * 150 * BLOCK)
        await pool.volumes.truncate(volume, 2 * OBJECT)
        assert (await read_volume(pool, b"v"))[OBJECT - 10 * BLOCK :] == bytes(OBJECT + 10 * BLOCK)
    world.check_clean()


async def test_what_recovery_frees_is_counted_once() -> None:
    world = changelog_world(2)
    async with trio.open_nursery() as nursery:
        running = Running(world)
        await running.start(nursery)
        pool = running.pool
        await pool.changelogs.create(b"logs", ["/logs"], 100 * BLOCK)
        await pool.maker.create(VolumeWish(b"v", OBJECT, REDIRECT, changelog_name=b"logs"))
        await put(pool, b"v", 0, b"1" * 20 * BLOCK)
        await pool.snapshots.create(b"s0")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"2" * 20 * BLOCK)

            async def cut_off(cut: object) -> None:
                await volume.write(0, b"3" * 20 * BLOCK)
                for processor in pool.processors:
                    await processor.commit()
                world.lose_power(CrashPlan(1, 1.0, 0.0))
                raise NoSpaceError("the power is gone")

            pool.snapshots._publish = cut_off  # type: ignore[method-assign]
            with pytest.raises(NoSpaceError):
                await pool.snapshots.create(b"s1")
        await running.crash(CrashPlan(1, 1.0, 0.0))
        running = Running(world)
        await running.start(nursery)
        assert running.pool.changelogs.get(b"logs").used_blocks == 20
        await running.stop()
    async with open_world(world) as pool:
        assert pool.changelogs.get(b"logs").used_blocks == 20


async def test_writers_on_several_processors_do_not_overdraw_a_quota() -> None:
    world = changelog_world()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"logs", ["/logs"], 20 * BLOCK)
        wish = VolumeWish(b"v", 4 * OBJECT, COPY_ON_WRITE, changelog_name=b"logs")
        await pool.maker.create(wish)
        await put(pool, b"v", 0, b"a" * 4 * OBJECT)
        await pool.snapshots.create(b"s")
        refused = []

        async def write(offset: int) -> None:
            try:
                await put(pool, b"v", offset, b"b" * 20 * BLOCK)
            except NoSpaceError:
                refused.append(offset)

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(write, number * OBJECT)
        assert len(refused) == 3
        assert pool.changelogs.get(b"logs").used_blocks == 20
        # What is zero needs no room.
        await pool.changelogs.resize(b"logs", 40 * BLOCK)
        await pool.volumes.truncate(pool.volumes.get(b"v"), 6 * OBJECT)
        await pool.snapshots.create(b"t")
        await put(pool, b"v", 5 * OBJECT, b"c" * 100 * BLOCK)
        assert pool.changelogs.get(b"logs").used_blocks == 20


# -- clones and rollbacks --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["remove", "rollback"])
async def test_a_clone_that_goes_while_it_is_settled_loses_nothing(how: str) -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 2 * OBJECT)
        await pool.snapshots.create(b"s")
        await pool.clones.clone(b"s", b"v", b"c")
        await pool.snapshots.create(b"t", [b"c"])
        reached, go = trio.Event(), trio.Event()
        for processor in pool.processors:
            before = processor.mapped_objects

            async def late(*arguments: Any, before: Any = before, **options: Any) -> list[int]:
                found: list[int] = await before(*arguments, **options)
                if options.get("own") is False and not go.is_set():
                    reached.set()
                    await go.wait()
                return found

            processor.mapped_objects = late  # type: ignore[method-assign]
        await pool.snapshots.delete(b"s")
        await reached.wait()
        if how == "remove":
            await pool.volumes.remove(b"c")
        else:
            await pool.clones.rollback(b"t")
        go.set()
        for _ in range(2):
            await pool.reclaimer.reclaim_all()
        assert await read_snapshot(pool, pool.snapshots.get(b"t"), b"c") == b"1" * 2 * OBJECT
        if how == "rollback":
            assert await read_volume(pool, b"c") == b"1" * 2 * OBJECT
    world.check_clean()


@pytest.mark.parametrize("kind", ["cow", "clone", "image"])
async def test_a_repair_leaves_whole_what_is_whole(kind: str) -> None:
    world = World()
    contents = b"a" * 2 * OBJECT
    async with open_world(world) as pool:
        if kind == "cow":
            await cow_volume(pool)
            await pool.snapshots.create(b"s")
            await put(pool, b"v", 0, b"a" * BLOCK)
        elif kind == "image":
            world.make_image("/image", contents)
            await pool.maker.create(VolumeWish(b"v", None, REDIRECT, "/image"))
        else:
            await pool.volumes.create(b"w")
            await put(pool, b"w", 0, contents)
            await pool.snapshots.create(b"s")
            await pool.clones.clone(b"s", b"w", b"v")
    if kind != "image":
        await repair(world.home, WHERE, world.open_device)
        world.home.close()
    world.check_clean()
    async with open_world(world) as pool:
        assert await read_volume(pool, b"v") == contents


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_a_volume_removed_while_a_rollback_waits_for_it(is_replaced: bool) -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * BLOCK)
        await pool.snapshots.create(b"s")
        volume = pool.volumes.get(b"v")
        pool.volumes.open(volume)
        async with trio.open_nursery() as nursery:

            async def roll_back() -> None:
                if is_replaced:
                    with pytest.raises(ExistsError):
                        await pool.clones.rollback(b"s")
                else:
                    await pool.clones.rollback(b"s")

            nursery.start_soon(roll_back)
            await trio.sleep(0.05)
            await pool.volumes.remove(b"v")
            if is_replaced:
                await pool.volumes.create(b"v")
            pool.volumes.close(volume)
        names = [row.attributes.name for row in pool.catalog.catalog.volumes()]
        assert names == list(pool.volumes.by_name) == [b"v"]
        assert await read_volume(pool, b"v") == (b"" if is_replaced else b"1" * BLOCK)
    world.check_clean()


async def test_flatten_stops_when_its_volume_is_rolled_back() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 4 * OBJECT)
        await pool.snapshots.create(b"s")
        await pool.clones.clone(b"s", b"v", b"c")
        await pool.snapshots.create(b"t", [b"c"])
        reached, go = trio.Event(), trio.Event()
        with pool.processors[0].borrowed(pool.volumes.get(b"c").volume_id) as portion:
            before = portion.read_segments

            async def late(*arguments: Any) -> None:
                await before(*arguments)
                reached.set()
                await go.wait()

            portion.read_segments = late  # type: ignore[method-assign,assignment]
            async with trio.open_nursery() as nursery:

                async def flatten() -> None:
                    with pytest.raises(BusyVolumeError):
                        await pool.clones.flatten(b"c")

                nursery.start_soon(flatten)
                await reached.wait()
                await pool.clones.rollback(b"t", [b"c"], force=True)
                await pool.reclaimer.reclaim_all()
                go.set()
        assert await read_volume(pool, b"c") == b"1" * 4 * OBJECT
        for name in list(pool.snapshots.by_name):
            await pool.snapshots.delete(name)
        for _ in range(2):
            await pool.reclaimer.reclaim_all()
        assert allocated_blocks(world) == 4 * 1024
    world.check_clean()


@pytest.mark.parametrize("where", ["catalog", "processor"])
async def test_a_clone_or_rollback_that_fails_counts_nothing(where: str) -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 4 * OBJECT)
        await pool.snapshots.create(b"s")
        totals = [processor.tally.total for processor in pool.processors]
        store: Any = pool.catalog.catalog if where == "catalog" else pool.processors[2].access.store
        before = store.commit

        def full(*arguments: object) -> None:
            raise NoSpaceError("full")

        store.commit = full
        with pytest.raises(NoSpaceError):
            await pool.clones.clone(b"s", b"v", b"c")
        with pytest.raises(NoSpaceError):
            await pool.clones.rollback(b"s")
        store.commit = before
        assert [processor.tally.total for processor in pool.processors] == totals
        await pool.volumes.create(b"x")
        await pool.reclaimer.reclaim_all()
        assert await read_volume(pool, b"v") == b"1" * 4 * OBJECT
    # What could not be taken back is dropped when the pool is opened again.
    async with open_world(world):
        pass
    world.check_clean()


async def test_attributes_kept_for_a_snapshot_that_failed_are_dropped() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * BLOCK)
        await pool.sync()
        processor = pool.processors[2]
        before = processor.prepare

        async def failing(*arguments: Any) -> None:
            await pool.volumes.remove(b"v")
            raise NoSpaceError("full")

        processor.prepare = failing  # type: ignore[method-assign,assignment]
        with pytest.raises(NoSpaceError):
            await pool.snapshots.create(b"s")
        processor.prepare = before  # type: ignore[method-assign]
        await pool.volumes.create(b"x")
        await pool.snapshots.create(b"t")
        await pool.reclaimer.reclaim_all()
    world.check_clean()


async def test_a_copy_on_write_volume_cut_within_the_last_block_of_an_object() -> None:
    """Clearing what lies behind had nothing to clear in that object, and went on preserving it for ever."""
    world = World(processor_count=2)
    async with open_world(world) as pool:
        volume = await pool.maker.create(VolumeWish(b"v", 2 * OBJECT, COPY_ON_WRITE))
        await put(pool, b"v", 0, b"1" * BLOCK)
        await pool.snapshots.create(b"s")
        with trio.fail_after(20):
            await pool.volumes.truncate(volume, OBJECT - 1)
        assert await read_volume(pool, b"v") == b"1" * BLOCK + bytes(OBJECT - 1 - BLOCK)
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == b"1" * BLOCK + bytes(2 * OBJECT - BLOCK)
    world.check_clean()


async def test_files_of_logs_that_nothing_knows_go_when_a_pool_is_opened_after_a_crash() -> None:
    world = World(processor_count=2)
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        await running.pool.volumes.create(b"v")
        async with running.pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"x" * 4096)
            await volume.sync()
        await running.crash(CrashPlan(1, keep=1.0))
        device = world.devices["0"]
        stray, other = "logs/1/00000000deadbeef", "logs/1/notes"
        for name in (stray, other):
            device.create(name).write(b"left over", 0)
        await running.start(nursery)
        names = device.names("logs/1")
        # What is not named like a log is somebody else's.
        assert "00000000deadbeef" not in names and "notes" in names
        assert await read_volume(running.pool, b"v") == b"x" * 4096
        device.remove(other)
        await running.stop()


async def test_the_space_of_a_deleted_snapshot_comes_back_when_its_last_file_is_closed() -> None:
    async with open_world(World()) as pool:
        await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"x" * 4096)
        snapshot = await pool.snapshots.create(b"s")
        members = await pool.snapshots.members(snapshot)
        view = await pool.snapshots.open_volume(snapshot, members.by_name[b"v"])
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert pool.reclaimer.waiting_count == 1
        pool.snapshots.close_volume(view)
        with trio.fail_after(60):
            while pool.reclaimer.waiting_count:
                await trio.lowlevel.checkpoint()
