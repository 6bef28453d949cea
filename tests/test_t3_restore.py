"""Rolling copy-on-write volumes back in place: nobody sees a mix, whatever happens in between."""

from __future__ import annotations

import os
from functools import partial

import pytest
import trio
import trio.testing

from snapfs import restoring
from snapfs.backends import CrashPlan, DeviceFile
from snapfs.backends.memory import MemoryFile
from snapfs.errors import HeldError, NoSpaceError, SnapfsError, UnfinishedError, UnsupportedError
from snapfs.formats import COPY_ON_WRITE
from snapfs.making import VolumeWish
from snapfs.pool import Pool
from snapfs.portion import Portion, Segment
from snapfs.processor import Processor
from snapfs.volume import Volume

from .harness import Running, World, open_world, read_snapshot, read_volume
from .test_t3_cow import changelog_world

OBJECT = 4 << 20
BLOCK = 4096


class PowerCutError(Exception):
    """Stands for the moment at which all stops."""


async def put(pool: Pool, name: bytes, offset: int, data: bytes) -> None:
    async with pool.volumes.opened(name) as volume:
        await volume.write(offset, data)


def image_bytes(world: World, path: str) -> bytes:
    file: DeviceFile = world.outside.open(path.lstrip("/"))
    contents = bytearray(file.size())
    file.read_into(contents, 0)
    file.close()
    return bytes(contents)


async def prepare(pool: Pool, world: World) -> tuple[bytes, bytes]:
    """Volume v over an image, with a snapshot old and other contents now; both contents."""
    old = os.urandom(3 * OBJECT) + bytes(2 * BLOCK) + b"tail"
    world.make_image("/image", old)
    await pool.maker.create(VolumeWish(b"v", None, COPY_ON_WRITE, "/image"))
    await pool.snapshots.create(b"old")
    await put(pool, b"v", 100, b"new" * 5000)
    await put(pool, b"v", 2 * OBJECT, os.urandom(300 * BLOCK))
    await put(pool, b"v", 3 * OBJECT, b"data where zeros were")
    await put(pool, b"v", 3 * OBJECT + 3 * BLOCK, b"longer")
    await pool.snapshots.create(b"between")
    await put(pool, b"v", BLOCK, b"newer" * 3000)
    await pool.volumes.sync_all()
    return old, await read_volume(pool, b"v")


async def test_back_and_forth() -> None:
    world = World()
    async with open_world(world) as pool:
        old, new = await prepare(pool, world)
        between = await read_snapshot(pool, pool.snapshots.get(b"between"), b"v")
        undo = (await pool.clones.rollback(b"old")).undo
        assert await read_volume(pool, b"v") == old
        await pool.reclaimer.reclaim_all()
        assert image_bytes(world, "/image") == old
        assert await read_snapshot(pool, undo, b"v") == new
        assert await read_snapshot(pool, pool.snapshots.get(b"between"), b"v") == between
        await pool.clones.rollback(undo.name or b"")
        assert await read_volume(pool, b"v") == new
        await pool.clones.rollback(b"between")
        assert await read_volume(pool, b"v") == between
        await pool.volumes.remove(b"v")
        with pytest.raises(UnsupportedError):
            await pool.clones.rollback(b"old")
    world.check_clean()


async def test_readers_and_writers_wait_and_see_one_or_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    async with open_world(world) as pool:
        old, new = await prepare(pool, world)
        volume = pool.volumes.get(b"v")
        pool.volumes.open(volume)
        halfway, go_on, seen = trio.Event(), trio.Event(), []
        copy_run = restoring._Copying._copy_run

        async def slow(self: restoring._Copying, *words: int) -> None:
            halfway.set()
            await go_on.wait()
            await copy_run(self, *words)

        monkeypatch.setattr(restoring._Copying, "_copy_run", slow)

        async def read() -> None:
            seen.append(bytes(await volume.read(0, len(new))))

        async def write() -> None:
            await volume.write(0, b"after")
            seen.append(b"written")

        async with trio.open_nursery() as nursery:

            async def roll_back() -> None:
                await pool.clones.rollback(b"old", force=True)

            nursery.start_soon(roll_back)
            await halfway.wait()
            nursery.start_soon(read)
            nursery.start_soon(write)
            # Snapshots are read meanwhile.
            assert await read_snapshot(pool, pool.snapshots.get(b"old"), b"v") == old
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            assert not seen
            go_on.set()
        assert sorted(len(one) for one in seen) == [7, len(old)]
        (found,) = [one for one in seen if one != b"written"]
        assert found in (old, b"after" + old[5:])
        assert await read_volume(pool, b"v") == b"after" + old[5:]
        pool.volumes.close(volume)
    world.check_clean()


@pytest.mark.parametrize("stop_at", [1, 2, 4, 6])
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
async def test_a_power_cut_in_between_is_finished_at_the_next_opening(
    monkeypatch: pytest.MonkeyPatch, stop_at: int, keep: float
) -> None:
    world = World()
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        old, new = await prepare(running.pool, world)
        count = 0
        copy_run = restoring._Copying._copy_run

        async def cut(self: restoring._Copying, *words: int) -> None:
            nonlocal count
            count += 1
            if count >= stop_at:
                raise PowerCutError
            await copy_run(self, *words)

        with monkeypatch.context() as patch:
            patch.setattr(restoring._Copying, "_copy_run", cut)
            with pytest.raises(PowerCutError):
                await running.pool.clones.rollback(b"old")
        await running.crash(CrashPlan(stop_at, keep))
        report = world.check()
        assert any("still to be finished" in finding.what for finding in report.findings)
        running = Running(world)
        await running.start(nursery)
        pool = running.pool
        assert await read_volume(pool, b"v") == old
        (undo,) = [one for name, one in pool.snapshots.by_name.items() if name.endswith(b"-before-rollback")]
        assert await read_snapshot(pool, undo, b"v") == new
        assert pool.volumes.get(b"v").size_bytes == len(old)
        await pool.reclaimer.reclaim_all()
        await running.stop()
        assert image_bytes(world, "/image") == old
    world.check_clean()


async def test_without_room_for_what_is_overwritten_the_present_stays() -> None:
    world = changelog_world()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"logs", ["/logs-a"], 150 * BLOCK)
        await pool.maker.create(VolumeWish(b"v", OBJECT, COPY_ON_WRITE, changelog_name=b"logs"))
        await pool.maker.create(VolumeWish(b"w", OBJECT, COPY_ON_WRITE))
        await put(pool, b"v", 0, os.urandom(100 * BLOCK))
        await put(pool, b"w", 0, b"w" * BLOCK)
        old = await read_volume(pool, b"v")
        await pool.snapshots.create(b"old")
        await put(pool, b"v", 0, os.urandom(100 * BLOCK))
        await put(pool, b"w", 0, b"x" * BLOCK)
        new = await read_volume(pool, b"v")
        with pytest.raises(NoSpaceError):
            await pool.clones.rollback(b"old")
        assert await read_volume(pool, b"v") == new
        assert (await read_volume(pool, b"w"))[:BLOCK] == b"x" * BLOCK
        assert await read_snapshot(pool, pool.snapshots.get(b"old"), b"v") == old
        await pool.changelogs.resize(b"logs", 400 * BLOCK)
        await pool.clones.rollback(b"old")
        assert await read_volume(pool, b"v") == old
        assert (await read_volume(pool, b"w"))[:BLOCK] == b"w" * BLOCK
    world.check_clean()


async def test_one_that_can_go_neither_way_stays_closed_until_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    async with open_world(world) as pool:
        old, _ = await prepare(pool, world)
        copy_run = restoring._Copying._copy_run
        count = 0

        async def fail(self: restoring._Copying, *words: int) -> None:
            nonlocal count
            count += 1
            if count > 2:
                raise OSError(5, "the device is gone")
            await copy_run(self, *words)

        with monkeypatch.context() as patch:
            patch.setattr(restoring._Copying, "_copy_run", fail)
            with pytest.raises(OSError, match="the device is gone"):
                await pool.clones.rollback(b"old")
        assert b"rollback-unfinished" in pool.events.contents
        volume = pool.volumes.get(b"v")
        size_bytes = volume.size_bytes
        for refused in (
            partial(read_volume, pool, b"v"),
            partial(put, pool, b"v", 0, b"1"),
            partial(pool.volumes.truncate, volume, 4096),
            partial(pool.volumes.truncate, volume, 9 * OBJECT),
            partial(pool.volumes.discard, volume, 0, 4096),
        ):
            with pytest.raises(SnapfsError, match="could not be finished"):
                await refused()
        # What it holds is a mix: nothing is to become of it.
        with pytest.raises(UnfinishedError):
            await pool.snapshots.create(b"later")
        with pytest.raises(UnfinishedError):
            await pool.clones.rollback(b"old", force=True)
        await pool.volumes.create(b"other")
        await pool.snapshots.create(b"of-another", [b"other"])
        await pool.reclaimer.reclaim_all()
        assert volume.size_bytes == size_bytes
        assert await read_snapshot(pool, pool.snapshots.get(b"old"), b"v") == old
        (undo,) = [name for name in pool.snapshots.by_name if name.endswith(b"-before-rollback")]
        with pytest.raises(HeldError):
            await pool.snapshots.delete(undo)
        new = await read_snapshot(pool, pool.snapshots.get(undo), b"v")
    async with open_world(world) as pool:
        assert await read_volume(pool, b"v") == new
    world.check_clean()


async def test_a_power_cut_while_presents_are_put_back_leaves_all_of_them_at_the_present(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(processor_count=1)
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        for name in (b"a", b"b"):
            await pool.maker.create(VolumeWish(name, 4 * BLOCK, COPY_ON_WRITE))
            await put(pool, name, 0, b"o" * 4 * BLOCK)
        await pool.snapshots.create(b"old")
        for name in (b"a", b"b"):
            await put(pool, name, 0, b"n" * 4 * BLOCK)
        ids = [pool.volumes.get(name).volume_id for name in (b"a", b"b")]
        copy_run, seen = restoring._Copying._copy_run, []

        async def fail(self: restoring._Copying, *words: int) -> None:
            seen.append(self._portion.volume_id)
            if seen == ids:
                raise OSError(5, "the device is tired")
            if len(seen) == 3:
                raise PowerCutError
            await copy_run(self, *words)

        with monkeypatch.context() as patch:
            patch.setattr(restoring._Copying, "_copy_run", fail)
            with pytest.raises(PowerCutError):
                await pool.clones.rollback(b"old")
        assert len(seen) == 3
        await running.crash(CrashPlan(3, 0.5))
        running = Running(world)
        await running.start(nursery)
        for name in (b"a", b"b"):
            assert await read_volume(running.pool, name) == b"n" * 4 * BLOCK
        await running.stop()
    world.check_clean()


async def test_one_that_could_not_be_restored_may_be_removed_and_lets_its_snapshots_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    async with open_world(world) as pool:
        await prepare(pool, world)

        async def fail(self: restoring._Copying, *words: int) -> None:
            raise OSError(5, "the device is gone")

        with monkeypatch.context() as patch:
            patch.setattr(restoring._Copying, "_copy_run", fail)
            with pytest.raises(OSError, match="the device is gone"):
                await pool.clones.rollback(b"old")
        await pool.volumes.remove(b"v")
        for name in list(pool.snapshots.by_name):
            await pool.snapshots.delete(name)
    async with open_world(world) as pool:
        await pool.reclaimer.reclaim_all()
        assert not pool.volumes.traits.rows
    world.check_clean()


async def test_a_reader_that_waited_gets_the_size_and_the_contents_of_one_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"v", 2 * BLOCK, COPY_ON_WRITE))
        await put(pool, b"v", 0, b"o" * 2 * BLOCK)
        await pool.snapshots.create(b"old")
        await put(pool, b"v", 0, b"n" * 8 * BLOCK)
        volume = pool.volumes.get(b"v")
        pool.volumes.open(volume)
        read_segments, waiting, go_on = Portion.read_segments, trio.Event(), trio.Event()

        async def slow(self: Portion, segments: list[Segment], view: memoryview) -> None:
            await read_segments(self, segments, view)
            if not waiting.is_set():
                waiting.set()
                await go_on.wait()

        def never(self: MemoryFile, buffer: bytearray | memoryview, offset: int) -> int:
            raise BlockingIOError(11, "it would have to wait")

        found = []

        async def read() -> None:
            found.append(bytes(await volume.read(0, 8 * BLOCK)))

        with monkeypatch.context() as patch:
            patch.setattr(Portion, "read_segments", slow)
            patch.setattr(MemoryFile, "try_read_into", never)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await waiting.wait()
                await pool.clones.rollback(b"old", force=True)
                go_on.set()
        assert found == [b"o" * 2 * BLOCK]
        pool.volumes.close(volume)
    world.check_clean()


async def test_a_rollback_goes_on_when_a_trim_that_has_the_volume_open_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapfs.volumes._CLOSING_CHECK_S", float("inf"))
    world = World()
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"v", None))
        await put(pool, b"v", 0, b"x" * 3 * BLOCK)
        volume = pool.volumes.get(b"v")
        halfway, go_on = trio.Event(), trio.Event()
        trim_portion = Volume._trim_portion

        async def slow(self: Volume, processor: Processor, portion: Portion) -> None:
            halfway.set()
            await go_on.wait()
            await trim_portion(self, processor, portion)

        monkeypatch.setattr(Volume, "_trim_portion", slow)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.volumes.truncate, volume, BLOCK)
                await halfway.wait()
                nursery.start_soon(pool.volumes.wait_until_closed, volume)
                await trio.testing.wait_all_tasks_blocked()
                go_on.set()
    world.check_clean()
