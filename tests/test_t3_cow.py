"""Copy-on-write volumes, volumes over images and change log volumes, on pools in memory."""

from __future__ import annotations

import errno
import os
import random
import sys
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from snapfs import changelog, cowportion
from snapfs.backends import Buffer, CrashPlan, DeviceFile, MemoryDevice
from snapfs.backends.stacked import StackedFile
from snapfs.cowportion import CowPortion
from snapfs.errors import BadCommandError, BusyVolumeError, ExistsError, InUseError, NoSpaceError, NotFoundError
from snapfs.formats import COPY_ON_WRITE, REDIRECT
from snapfs.making import VolumeWish
from snapfs.tasks import Wakeup

from .harness import Running, World, open_world, read_snapshot, read_volume, without_threads
from .test_t3_clones import BLOCK, OBJECT, allocated_blocks, put


def image(world: World, path: str) -> bytes:
    file = world.outside.open(path.lstrip("/"))
    contents = bytearray(file.size())
    file.read_into(contents, 0)
    file.close()
    return bytes(contents)


async def test_the_source_is_overwritten_in_place_and_snapshots_keep_what_it_held() -> None:
    world = World()
    world.make_image("/image", b"0" * 3 * OBJECT)
    async with open_world(world) as pool:
        volume = await pool.maker.create(VolumeWish(b"v", None, COPY_ON_WRITE, "/image"))
        assert volume.size_bytes == 3 * OBJECT
        assert await read_volume(pool, b"v") == b"0" * 3 * OBJECT
        await put(pool, b"v", 100, b"1" * 5000)
        await pool.snapshots.create(b"first")
        await put(pool, b"v", BLOCK, b"2" * BLOCK)
        await put(pool, b"v", 2 * OBJECT, b"2" * BLOCK)
        await pool.snapshots.create(b"second")
        await put(pool, b"v", 2 * OBJECT, b"3" * 2 * BLOCK)
        await put(pool, b"v", 2 * OBJECT, b"4" * BLOCK)
        first = bytearray(b"0" * 3 * OBJECT)
        first[100:5100] = b"1" * 5000
        second = bytearray(first)
        second[BLOCK : 2 * BLOCK] = b"2" * BLOCK
        second[2 * OBJECT : 2 * OBJECT + BLOCK] = b"2" * BLOCK
        now = bytearray(second)
        now[2 * OBJECT : 2 * OBJECT + BLOCK] = b"4" * BLOCK
        now[2 * OBJECT + BLOCK : 2 * OBJECT + 2 * BLOCK] = b"3" * BLOCK
        assert await read_snapshot(pool, pool.snapshots.get(b"first"), b"v") == first
        assert await read_snapshot(pool, pool.snapshots.get(b"second"), b"v") == second
        assert await read_volume(pool, b"v") == now
    assert image(world, "/image") == now
    # Preserved: two blocks after the first snapshot, two after the second.
    assert allocated_blocks(world) == 4
    world.check_clean()
    async with open_world(world) as pool:
        await pool.snapshots.delete(b"second")
        await pool.reclaimer.reclaim_all()
        assert await read_snapshot(pool, pool.snapshots.get(b"first"), b"v") == first
        # What the second had of 2 * OBJECT is needed by none; the block behind it still is by the first.
        assert allocated_blocks(world) == 3
        await pool.snapshots.delete(b"first")
        await pool.reclaimer.reclaim_all()
        assert allocated_blocks(world) == 0
        assert await read_volume(pool, b"v") == now
    world.check_clean()


@pytest.mark.parametrize("seed", range(12))
async def test_power_cuts_during_overwrites_harm_no_snapshot(seed: int) -> None:
    world = World(processor_count=2)
    world.make_image("/image", bytes(index // BLOCK % 251 + 1 for index in range(64 * BLOCK)))
    before = image(world, "/image")
    async with trio.open_nursery() as nursery:
        running = Running(world)
        await running.start(nursery)
        pool = running.pool
        await pool.maker.create(VolumeWish(b"v", None, COPY_ON_WRITE, "/image"))
        await pool.snapshots.create(b"s")
        for number in range(seed * 3 + 1):
            await put(pool, b"v", (number * 7 % 60) * BLOCK + number % 3 * 100, b"x" * (BLOCK + number))
        await running.crash(CrashPlan(seed, (seed % 3) / 2))
        world.check()
        running = Running(world)
        await running.start(nursery)
        assert await read_snapshot(running.pool, running.pool.snapshots.get(b"s"), b"v") == before
        await running.pool.reclaimer.reclaim_all()
        await running.stop()
    world.check_clean()


@pytest.fixture
def soon_handed_over() -> Iterator[None]:
    """A loop that a test keeps busy hands the interpreter to the pool's threads soon: with the 5 ms of the default
    each of a commit's many short calls waits as long, and a test of a tenth of a second takes a minute."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    yield
    sys.setswitchinterval(before)


async def test_a_reader_of_a_snapshot_never_sees_the_overwritten_source(soon_handed_over: None) -> None:
    async with open_world(World(processor_count=2)) as pool:
        await pool.maker.create(VolumeWish(b"v", 2 * OBJECT, COPY_ON_WRITE))
        await put(pool, b"v", 0, b"a" * 2 * OBJECT)
        snapshot = await pool.snapshots.create(b"s")
        members = await pool.snapshots.members(snapshot)
        view = await pool.snapshots.open_volume(snapshot, members.get(b"v")[0])
        done = trio.Event()

        async def write() -> None:
            for number in range(80):
                await put(pool, b"v", number * 37 % 500 * BLOCK, b"b" * BLOCK)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            while not done.is_set():
                assert bytes(await view.read(0, 512 * BLOCK)) == b"a" * 512 * BLOCK
                await trio.sleep(0)
        pool.snapshots.close_volume(view)


async def test_writers_side_by_side_share_a_commit_and_lose_nothing() -> None:
    async with open_world(World(processor_count=2)) as pool:
        await pool.maker.create(VolumeWish(b"v", 2 * OBJECT, COPY_ON_WRITE))
        await put(pool, b"v", 0, b"a" * 2 * OBJECT)
        snapshot = await pool.snapshots.create(b"s")
        commits = sum(one.commit_count for one in pool.processors)
        async with pool.volumes.opened(b"v") as volume, trio.open_nursery() as nursery:
            for number in range(64):
                # Two halves of each block, and four snapshots in between.
                nursery.start_soon(volume.write, number * 2048, bytes([number + 1]) * 2048)
                if number % 16 == 8:
                    nursery.start_soon(pool.snapshots.create)
        expected = b"".join(bytes([number + 1]) * 2048 for number in range(64)) + b"a" * (2 * OBJECT - 64 * 2048)
        assert await read_volume(pool, b"v") == expected
        assert await read_snapshot(pool, snapshot, b"v") == b"a" * 2 * OBJECT
        assert sum(one.commit_count for one in pool.processors) - commits < 64


async def test_a_clone_of_a_copy_on_write_volume_keeps_what_it_shows() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"v", 3 * OBJECT, COPY_ON_WRITE))
        await put(pool, b"v", 0, b"a" * 3 * OBJECT)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"b" * BLOCK)
        await pool.clones.clone(b"s", b"v", b"c")
        await put(pool, b"c", BLOCK, b"c" * BLOCK)
        await put(pool, b"v", 0, b"d" * 3 * OBJECT)
        expected = b"a" * BLOCK + b"c" * BLOCK + b"a" * (3 * OBJECT - 2 * BLOCK)
        assert await read_volume(pool, b"c") == expected
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert await read_volume(pool, b"c") == expected
        await put(pool, b"v", 0, b"e" * 3 * OBJECT)
        assert await read_volume(pool, b"c") == expected
        await pool.volumes.truncate(pool.volumes.get(b"c"), 100)
        await pool.volumes.truncate(pool.volumes.get(b"c"), OBJECT)
        assert await read_volume(pool, b"c") == b"a" * 100 + bytes(OBJECT - 100)
        await pool.volumes.remove(b"c")
        await pool.reclaimer.reclaim_all()
    world.check_clean()


async def test_shrinking_preserves_and_fits_the_image() -> None:
    world = World()
    world.make_image("/image", b"0" * (2 * OBJECT + 5000))
    async with open_world(world) as pool:
        volume = await pool.maker.create(VolumeWish(b"v", None, COPY_ON_WRITE, "/image"))
        await pool.snapshots.create(b"s")
        await pool.volumes.truncate(volume, 5000)
        assert len(image(world, "/image")) == 5000
        await pool.volumes.truncate(volume, OBJECT + 1)
        assert await read_volume(pool, b"v") == b"0" * 5000 + bytes(OBJECT - 4999)
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == b"0" * (2 * OBJECT + 5000)
        assert len(image(world, "/image")) == OBJECT + 1
    world.check_clean()


async def test_a_removed_copy_on_write_volume_leaves_nothing_and_its_image_where_it_was() -> None:
    world = World()
    world.make_image("/image", b"0" * OBJECT)
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"v", None, COPY_ON_WRITE, "/image"))
        await pool.maker.create(VolumeWish(b"w", 1 << 20, COPY_ON_WRITE))
        await put(pool, b"v", 0, b"1" * BLOCK)
        await put(pool, b"w", 0, b"1" * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"2" * BLOCK)
        await put(pool, b"w", 0, b"2" * BLOCK)
        await pool.volumes.remove(b"v")
        await pool.volumes.remove(b"w")
        await pool.reclaimer.reclaim_all()
        assert (await read_snapshot(pool, pool.snapshots.get(b"s"), b"v"))[: 2 * BLOCK] == b"1" * BLOCK + b"0" * BLOCK
        assert (await read_snapshot(pool, pool.snapshots.get(b"s"), b"w"))[:BLOCK] == b"1" * BLOCK
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert not pool.volumes.traits.rows
        assert allocated_blocks(world) == 0
    assert image(world, "/image") == b"2" * BLOCK + b"0" * (OBJECT - BLOCK)
    world.check_clean()


async def test_a_redirecting_volume_leaves_its_image_untouched() -> None:
    world = World()
    contents = bytes(index % 251 for index in range(OBJECT + 6000))
    world.make_image("/image", contents)
    async with open_world(world) as pool:
        volume = await pool.maker.create(VolumeWish(b"v", None, REDIRECT, "/image"))
        assert await read_volume(pool, b"v") == contents
        assert volume.block_count == 1024 + 2
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 50, b"x" * 5000)
        await put(pool, b"v", 2 * OBJECT, b"y" * 10)
        expected = bytearray(2 * OBJECT + 10)
        expected[: len(contents)] = contents
        expected[50:5050] = b"x" * 5000
        expected[2 * OBJECT :] = b"y" * 10
        assert await read_volume(pool, b"v") == expected
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == contents
        await pool.clones.clone(b"s", b"v", b"c")
        assert await read_volume(pool, b"c") == contents
        await pool.volumes.truncate(volume, 100)
        await pool.volumes.truncate(volume, OBJECT)
        assert await read_volume(pool, b"v") == expected[:100] + bytes(OBJECT - 100)
        await pool.clones.rollback(b"s")
        assert await read_volume(pool, b"v") == contents
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert await read_volume(pool, b"c") == contents
        assert await pool.clones.flatten(b"c") == 1026 * BLOCK
        await pool.reclaimer.reclaim_all()
        assert await read_volume(pool, b"c") == contents
    assert image(world, "/image") == contents
    world.check_clean()


async def test_bad_sources_are_refused() -> None:
    world = World()
    world.make_image("/image", b"0" * BLOCK)
    async with open_world(world) as pool:
        for path, error in (("/none", NotFoundError), ("image", BadCommandError)):
            with pytest.raises(error):
                await pool.maker.create(VolumeWish(b"v", None, COPY_ON_WRITE, path))
        await pool.maker.create(VolumeWish(b"v", None, COPY_ON_WRITE, "/image"))
        with pytest.raises(InUseError):
            await pool.maker.create(VolumeWish(b"w", None, REDIRECT, "/image"))
        with pytest.raises(ExistsError):
            await pool.maker.create(VolumeWish(b"v", 5, COPY_ON_WRITE))
        with pytest.raises(NotFoundError):
            await pool.maker.create(VolumeWish(b"w", 5, changelog_name=b"none"))
        assert set(pool.volumes.by_name) == {b"v"}
    world.check_clean()


# -- change log volumes ----------------------------------------------------------------------


def changelog_world() -> World:
    world = World()
    for path in ("/logs-a", "/logs-b"):
        world.devices[path] = MemoryDevice()
    return world


def device_blocks(world: World, *paths: str) -> int:
    inner = World.__new__(World)
    inner.devices = {path: world.devices[path] for path in paths}
    return allocated_blocks(inner)


@pytest.mark.parametrize("change_mode", [REDIRECT, COPY_ON_WRITE])
async def test_change_logs_lie_in_their_volume_on_all_processors_and_fill_it(change_mode: int) -> None:
    world = changelog_world()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"logs", ["/logs-a", "/logs-b"], 100 * BLOCK)
        await pool.maker.create(VolumeWish(b"v", 8 * OBJECT, change_mode, changelog_name=b"logs"))
        for number in range(8):
            await put(pool, b"v", number * OBJECT, b"1" * 20 * BLOCK)
        assert device_blocks(world, "/logs-a", "/logs-b") == 0
        snapshot = await pool.snapshots.create(b"s")
        before = await read_volume(pool, b"v")
        for number in range(8):
            await put(pool, b"v", number * OBJECT, b"2" * 10 * BLOCK)
        assert device_blocks(world, "/logs-a") == device_blocks(world, "/logs-b") == 40
        names = [world.devices[path].names(f"logs/{index}") for path in ("/logs-a", "/logs-b") for index in range(4)]
        assert sum(len(one) > 0 for one in names) == 4
        events = pool.events.contents.decode()
        assert "change-log-filling" in events and '"percent": 80' in events
        with pytest.raises(NoSpaceError):
            for number in range(8):
                await put(pool, b"v", number * OBJECT + 10 * BLOCK, b"3" * 10 * BLOCK)
        assert await read_snapshot(pool, snapshot, b"v") == before
        assert "change-log-full" in pool.events.contents.decode()
    world.check()
    async with open_world(world) as pool:
        assert pool.changelogs.get(b"logs").used_blocks == 100
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == before
        await pool.changelogs.resize(b"logs", 200 * BLOCK)
        for number in range(8):
            await put(pool, b"v", number * OBJECT + 10 * BLOCK, b"3" * 10 * BLOCK)
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == before
        with pytest.raises(BusyVolumeError):
            await pool.changelogs.remove(b"logs")
        await pool.volumes.remove(b"v")
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert pool.changelogs.get(b"logs").used_blocks == 0
        await pool.changelogs.remove(b"logs")
        assert not pool.changelogs.entries()
        assert not world.devices["/logs-a"].names("")
    world.check_clean()


async def test_a_full_one_may_free_the_oldest_snapshots_that_nothing_holds() -> None:
    world = changelog_world()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"logs", ["/logs-a"], 100 * BLOCK, frees_oldest=True)
        await pool.maker.create(VolumeWish(b"v", OBJECT, COPY_ON_WRITE, changelog_name=b"logs"))
        await pool.volumes.create(b"other")
        await put(pool, b"v", 0, b"1" * 500 * BLOCK)
        await pool.snapshots.create(b"held", hold_tags=["keep"])
        await pool.snapshots.create(b"unrelated", [b"other"])
        for number in range(12):
            await pool.snapshots.create(b"s%d" % number)
            for _ in range(100):
                try:
                    await put(pool, b"v", number * 20 * BLOCK, bytes([number + 1]) * 20 * BLOCK)
                    break
                except NoSpaceError:
                    await trio.sleep(0.01)
            if number == 3:
                await pool.snapshots.release(b"held", "keep")
        assert b"held" not in pool.snapshots.by_name
        assert b"unrelated" in pool.snapshots.by_name
        assert b"s11" in pool.snapshots.by_name
        assert "snapshot-freed" in pool.events.contents.decode()
    world.check()


async def test_bad_change_log_volumes_are_refused() -> None:
    world = changelog_world()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"logs", ["/logs-a"], 100 * BLOCK)
        with pytest.raises(ExistsError):
            await pool.changelogs.create(b"logs", ["/logs-b"], 100 * BLOCK)
        with pytest.raises(ExistsError):
            await pool.changelogs.create(b"more", ["/logs-a"], 100 * BLOCK)
        assert not world.devices["/logs-b"].names("")
        with pytest.raises(NotFoundError):
            await pool.changelogs.resize(b"none", 5)
    world.check_clean()


async def test_a_truncate_during_the_clearing_after_a_crash_loses_nothing_that_a_snapshot_holds() -> None:
    world = World(processor_count=2)
    contents = b"1" * (OBJECT + 9000)
    world.make_image("/image", contents)
    async with open_world(world) as pool:
        volume = await pool.maker.create(VolumeWish(b"v", None, COPY_ON_WRITE, "/image"))
        await pool.snapshots.create(b"s")
        portion = pool.processors[0].portion(volume.volume_id)
        fit, truncating = portion.fit_source, trio.Event()

        async def late_fit(size_bytes: int, *, may_cut: bool) -> None:
            # The volume does not shrink before the clearing, which is to the old size, is done.
            if not truncating.is_set():
                truncating.set()
                while not volume._trim_turn.statistics().tasks_waiting:
                    await trio.lowlevel.checkpoint()
                assert volume.size_bytes == len(contents)
            await fit(size_bytes, may_cut=may_cut)

        portion.fit_source = late_fit  # type: ignore[method-assign]
        pool.volumes.open(volume)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(volume.fit)
            await truncating.wait()
            await pool.volumes.truncate(volume, 100)
        pool.volumes.close(volume)
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == contents
        assert image(world, "/image") == b"1" * 100
    world.check_clean()


async def test_the_source_stays_open_while_what_it_holds_is_preserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log that is begun for that is one file too many, and the source the one that was unused for longest."""
    monkeypatch.setattr(changelog, "OPEN_FILES_MAX", 4)
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"c", 3 * BLOCK, COPY_ON_WRITE))
        await put(pool, b"c", 0, b"old" * BLOCK)
        await pool.volumes.sync_all()
        for name in (b"x", b"y", b"z"):
            await pool.volumes.create(name)
            await put(pool, name, 0, b"other")
        await pool.snapshots.create(b"s")
        await put(pool, b"c", 0, b"new")
        assert (await read_volume(pool, b"c"))[:3] == b"new"
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"c") == b"old" * BLOCK


async def test_the_log_stays_open_into_which_something_is_preserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot is cut meanwhile, and other files are opened: the log takes no more writes but that one."""
    monkeypatch.setattr(changelog, "OPEN_FILES_MAX", 4)
    read_runs = cowportion._read_runs
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"c", 3 * BLOCK, COPY_ON_WRITE))
        await put(pool, b"c", 0, b"old" * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"c", 0, b"new")
        await pool.volumes.sync_all()
        for name in (b"u", b"w", b"x", b"y", b"z"):
            await pool.volumes.create(name)

        async def cut_and_open_others() -> None:
            await pool.snapshots.create(b"t", [b"c"])
            for name in (b"u", b"w", b"x", b"y", b"z"):
                await put(pool, name, 0, b"other")

        def read_and_cut(*args: object) -> None:
            monkeypatch.setattr(cowportion, "_read_runs", read_runs)
            read_runs(*args)  # type: ignore[arg-type]
            trio.from_thread.run(cut_and_open_others)

        monkeypatch.setattr(cowportion, "_read_runs", read_and_cut)
        await put(pool, b"c", 2 * BLOCK, b"newer")
        second = bytearray(b"old" * BLOCK)
        second[:3] = b"new"
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"c") == b"old" * BLOCK
        assert await read_snapshot(pool, pool.snapshots.get(b"t"), b"c") == second
        second[2 * BLOCK : 2 * BLOCK + 5] = b"newer"
        assert await read_volume(pool, b"c") == second


@pytest.mark.parametrize("deleted", [b"s1", b"s2"])
async def test_a_cut_between_the_planning_of_two_objects_leaves_each_snapshot_its_own_blocks(
    deleted: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was planned before it went to the log of after it, so two copies had one place, which freeing one freed."""
    world = World(processor_count=1)
    held, loading = (trio.Event(), trio.Event()), (trio.Event(), trio.Event())
    with_logs, load = CowPortion._with_logs, CowPortion._load

    async def with_logs_later(portion: CowPortion, *args: object) -> None:
        if not held[0].is_set():
            held[0].set()
            await held[1].wait()
        await with_logs(portion, *args)  # type: ignore[arg-type]

    async def load_later(portion: CowPortion, object_index: int, old_blocks: object) -> None:
        if object_index == 1 and held[1].is_set() and not loading[0].is_set():
            loading[0].set()
            await loading[1].wait()
        await load(portion, object_index, old_blocks)  # type: ignore[arg-type]

    contents = [random.Random(number).randbytes(4 * BLOCK) for number in range(3)]
    with without_threads(1):
        async with open_world(world) as pool:
            await pool.maker.create(VolumeWish(b"v", 3 * OBJECT, COPY_ON_WRITE))
            async with pool.volumes.opened(b"v") as volume:
                for number, data in enumerate(contents):
                    await volume.write(number * OBJECT, data)
                await volume.sync()
                await pool.snapshots.create(b"s1")
                with monkeypatch.context() as patch:
                    patch.setattr(CowPortion, "_with_logs", with_logs_later)
                    patch.setattr(CowPortion, "_load", load_later)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(volume.write, 2 * OBJECT, b"2" * BLOCK)
                        await held[0].wait()
                        for number in range(2):
                            nursery.start_soon(volume.write, number * OBJECT, b"01"[number : number + 1] * BLOCK)
                        await trio.testing.wait_all_tasks_blocked()
                        # As the cache of maps does when it is full.
                        assert volume.portions[0].let_go(1)
                        held[1].set()
                        await loading[0].wait()
                        await pool.snapshots.create(b"s2")
                        loading[1].set()
                await volume.sync()
            await pool.snapshots.delete(deleted)
            await pool.reclaimer.reclaim_all()
            (left,) = pool.snapshots.by_name.values()
            found = await read_snapshot(pool, left, b"v")
            for number, data in enumerate(contents[:2]):
                assert found[number * OBJECT : number * OBJECT + 4 * BLOCK] == data
    world.check_clean()


@pytest.mark.parametrize("mode", [COPY_ON_WRITE, REDIRECT])
async def test_an_image_is_free_when_the_clone_of_what_stood_on_it_is_independent(mode: int) -> None:
    """It stayed the source of a volume of which nothing was left, for as long as the clone lived."""
    world = World(processor_count=2)
    world.make_image("/image", b"0" * 2 * OBJECT)
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"v", None, mode, "/image"))
        await put(pool, b"v", 100, b"1" * 5000)
        await pool.snapshots.create(b"s")
        await pool.clones.clone(b"s", b"v", b"c")
        await put(pool, b"c", OBJECT, b"2" * BLOCK)
        contents = await read_volume(pool, b"c")
        await pool.volumes.remove(b"v")
        await pool.snapshots.delete(b"s")
        for _ in range(2):
            await pool.reclaimer.reclaim_all()
            assert await read_volume(pool, b"c") == contents
            if mode == REDIRECT:
                # The clone reads it yet.
                with pytest.raises(InUseError):
                    await pool.maker.create(VolumeWish(b"w", None, COPY_ON_WRITE, "/image"))
        await pool.clones.flatten(b"c")
        await pool.reclaimer.reclaim_all()
        assert not any(row.source_path for row in pool.volumes.traits.rows.values())
        assert not any(processor.sources for processor in pool.processors)
        await pool.maker.create(VolumeWish(b"w", None, COPY_ON_WRITE, "/image"))
        await put(pool, b"w", 0, b"w" * 2 * OBJECT)
        assert await read_volume(pool, b"c") == contents
    async with open_world(world) as pool:
        assert await read_volume(pool, b"c") == contents
    world.check_clean()


async def test_an_image_is_free_when_all_that_stood_on_it_is_gone() -> None:
    """Of an origin and its clone that went together the origin was forgotten the next time something was freed."""
    world = World(processor_count=2)
    world.make_image("/image", b"0" * OBJECT)
    async with open_world(world) as pool:
        pool.snapshots._reclaim_wakeup = pool.volumes._reclaim_wakeup = Wakeup()
        await pool.maker.create(VolumeWish(b"v", None, COPY_ON_WRITE, "/image"))
        await pool.snapshots.create(b"s")
        await pool.clones.clone(b"s", b"v", b"c")
        await pool.snapshots.create(b"t")
        await pool.clones.clone(b"t", b"c", b"d")
        for name in (b"v", b"c", b"d"):
            await pool.volumes.remove(name)
        for name in (b"s", b"t"):
            await pool.snapshots.delete(name)
        await pool.reclaimer.reclaim_all()
        assert not pool.volumes.traits.rows
        await pool.maker.create(VolumeWish(b"w", None, COPY_ON_WRITE, "/image"))
    world.check_clean()


async def test_an_image_is_free_as_soon_as_the_volume_is_removed() -> None:
    """Until the reclaimer had forgotten it the image was another volume's: also after a command that failed."""
    world = World()
    world.make_image("/image", b"0" * OBJECT)
    async with open_world(world) as pool:
        pool.snapshots._reclaim_wakeup = pool.volumes._reclaim_wakeup = Wakeup()
        for name in (b"v", b"w"):
            await pool.maker.create(VolumeWish(name, None, COPY_ON_WRITE, "/image"))
            await put(pool, name, 0, name * BLOCK)
            with pytest.raises(InUseError, match="of another volume"):
                await pool.maker.create(VolumeWish(b"x", None, COPY_ON_WRITE, "/image"))
            await pool.volumes.remove(name)
        await pool.maker.create(VolumeWish(b"x", None, COPY_ON_WRITE, "/image"))
        await pool.snapshots.create(b"s")
        await pool.volumes.remove(b"x")
        with pytest.raises(InUseError, match="that was removed"):
            await pool.maker.create(VolumeWish(b"y", None, COPY_ON_WRITE, "/image"))
        await pool.snapshots.delete(b"s")
        await pool.maker.create(VolumeWish(b"y", None, COPY_ON_WRITE, "/image"))
    assert image(world, "/image")[:BLOCK] == b"w" * BLOCK
    world.check_clean()


async def test_the_file_that_was_written_over_goes_when_no_clone_needs_it() -> None:
    """It took the size of the whole volume for as long as a clone of it lived."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"v", 4 * OBJECT, COPY_ON_WRITE))
        await put(pool, b"v", 0, b"1" * 4 * OBJECT)
        await pool.snapshots.create(b"s")
        await pool.clones.clone(b"s", b"v", b"c")
        await pool.clones.flatten(b"c")
        await pool.volumes.remove(b"v")
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert not pool.processors[0].sources
        assert await read_volume(pool, b"c") == b"1" * 4 * OBJECT
        await pool.snapshots.create(b"t")
        await pool.snapshots.account()
    async with open_world(world) as pool:
        assert await read_volume(pool, b"c") == b"1" * 4 * OBJECT
        await pool.volumes.remove(b"c")
        await pool.snapshots.delete(b"t")
        await pool.reclaimer.reclaim_all()
        assert not pool.volumes.traits.rows
    world.check_clean()


class BadSector(StackedFile):
    """An image with one block that cannot be read."""

    block = 3

    def __init__(self, inner: DeviceFile) -> None:
        self.inner = inner

    def _check(self, length: int, offset: int) -> None:
        if offset < (self.block + 1) * BLOCK and offset + length > self.block * BLOCK:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        self._check(len(buffer), offset)
        return self.inner.read_into(buffer, offset)

    def try_read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        self._check(len(buffer), offset)
        return self.inner.try_read_into(buffer, offset)

    def write(self, data: Buffer, offset: int) -> None:
        self.inner.write(data, offset)

    def punch(self, offset: int, length: int) -> None:
        self.inner.punch(offset, length)

    def reserve(self, length: int) -> None:
        self.inner.reserve(length)

    def sync(self) -> None:
        self.inner.sync()

    def truncate(self, size_bytes: int) -> None:
        self.inner.truncate(size_bytes)


class WorldOfBadImages(World):
    """Whose images have a block that cannot be read."""

    def open_image(self, path: str, writable: bool) -> DeviceFile:
        return BadSector(super().open_image(path, writable))


async def test_a_block_that_cannot_be_preserved_keeps_no_others_from_being_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = WorldOfBadImages(processor_count=1)
    world.make_image("/image", b"0" * 16 * BLOCK)
    written: list[int] = []
    failed: list[int] = []
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"v", None, COPY_ON_WRITE, "/image"))
        await pool.snapshots.create(b"s")
        preserve_all = CowPortion._preserve_all
        begun, may_go_on = trio.Event(), trio.Event()

        async def slowly(self: CowPortion, wanted: list[tuple[int, int, int]]) -> None:
            if not begun.is_set():
                begun.set()
                await may_go_on.wait()
            await preserve_all(self, wanted)

        monkeypatch.setattr(CowPortion, "_preserve_all", slowly)
        async with pool.volumes.opened(b"v") as volume:

            async def write(block: int) -> None:
                try:
                    await volume.write(block * BLOCK, b"1" * BLOCK)
                except OSError as error:
                    assert error.errno == errno.EIO
                    failed.append(block)
                else:
                    written.append(block)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(write, 9)
                await begun.wait()
                for block in (5, 6, BadSector.block, 7):
                    nursery.start_soon(write, block)
                await trio.testing.wait_all_tasks_blocked(0.01)
                may_go_on.set()
        monkeypatch.undo()
        assert (sorted(written), failed) == ([5, 6, 7, 9], [BadSector.block])
        for block in (5, 6, 7, 9):
            async with pool.volumes.opened(b"v") as volume:
                assert await volume.read(block * BLOCK, BLOCK) == b"1" * BLOCK
