"""What fails, or finds no room or no memory, in the middle of something: done or not, and nothing waits for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from snapfs.backends import FaultyDevice, MemoryDevice
from snapfs.beneath import files_beneath
from snapfs.errors import NoSpaceError, SnapfsError, SyncFailedError
from snapfs.formats import COPY_ON_WRITE
from snapfs.fuse.handles import VolumeHandle
from snapfs.geometry import VolumeId
from snapfs.making import VolumeWish
from snapfs.placement import Quota
from snapfs.pool import Pool
from snapfs.portion import Portion
from snapfs.processor import Processor
from snapfs.volume import Volume
from snapfs.volumes import VolumeTable

from .harness import WHERE, Running, World, in_memory, open_world, read_snapshot, read_volume
from .test_t3_clones import BLOCK, OBJECT, put


async def with_change_logs(pool: Pool, world: World, block_count: int, size_bytes: int) -> Quota:
    """A volume ``v`` whose change logs have room for so many blocks."""
    await pool.changelogs.create(b"logs", ["logs"], block_count * BLOCK)
    await pool.maker.create(VolumeWish(b"v", size_bytes, changelog_name=b"logs"))
    (quota,) = pool.placement.quotas.values()
    return quota


def world_with_logs(hook: Callable[[str, str], None] | None = None) -> World:
    world = World(processor_count=1)
    world.devices["logs"] = FaultyDevice(MemoryDevice(), hook)
    return world


# -- sizes --------------------------------------------------------------------------------------


async def test_a_cut_that_is_durable_is_done_also_without_room_for_its_tail() -> None:
    world = world_with_logs()
    async with open_world(world) as pool:
        await with_change_logs(pool, world, 4, 8 * BLOCK)
        await put(pool, b"v", 0, b"a" * 8 * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"a" * 4 * BLOCK)
        await pool.snapshots.create(b"t")
        volume = pool.volumes.get(b"v")
        size_bytes = 2 * BLOCK + 100
        # The rest of its last block is to be cleared, for which there is no room.
        await pool.volumes.truncate(volume, size_bytes)
        assert volume.size_bytes == size_bytes and volume.needs_trim
        assert await read_volume(pool, b"v") == b"a" * size_bytes
        with pytest.raises(NoSpaceError):
            await put(pool, b"v", size_bytes, b"b")
        await pool.changelogs.resize(b"logs", 8 * BLOCK)
        await pool.reclaimer.reclaim_all()
        assert not volume.needs_trim
        await pool.volumes.truncate(volume, 4 * BLOCK)
        assert await read_volume(pool, b"v") == (b"a" * size_bytes).ljust(4 * BLOCK, b"\0")
    async with open_world(world) as pool:
        assert pool.volumes.get(b"v").size_bytes == 4 * BLOCK


async def test_zeros_need_no_room_wherever_they_lie() -> None:
    world = world_with_logs()
    async with open_world(world) as pool:
        quota = await with_change_logs(pool, world, 16, 2 * OBJECT)
        await put(pool, b"v", OBJECT - 32 * BLOCK, b"1" * 64 * BLOCK)
        await pool.volumes.get(b"v").sync()
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"2" * 15 * BLOCK)
        assert quota.used_blocks == 15
        await put(pool, b"v", OBJECT - 12 * BLOCK, bytes(20 * BLOCK))
        await put(pool, b"v", OBJECT + 9 * BLOCK, b"3" * BLOCK + bytes(7 * BLOCK))
        with pytest.raises(NoSpaceError):
            await put(pool, b"v", OBJECT - 20 * BLOCK, b"4" * BLOCK)
        found = await read_volume(pool, b"v")
        assert found[OBJECT - 12 * BLOCK : OBJECT + 8 * BLOCK] == bytes(20 * BLOCK)
        assert found[OBJECT + 9 * BLOCK : OBJECT + 17 * BLOCK] == b"3" * BLOCK + bytes(7 * BLOCK)


async def test_a_write_over_a_border_that_ends_in_zeros_is_in_a_snapshot_whole_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", OBJECT - BLOCK, b"o" * 2 * BLOCK)
        await pool.snapshots.create(b"first")
    async with open_world(world) as pool, pool.volumes.opened(b"v") as volume:
        await volume.write(100 * BLOCK, b"x" * BLOCK)
        await volume.sync()
        await pool.snapshots.create(b"second")
        await volume.read(0, BLOCK)
        await volume.read(OBJECT + 9 * BLOCK, BLOCK)
        look = Portion._look_at_log

        async def looked(portion: Portion, log_id: int, old_blocks: object) -> None:
            # Another task's, while this one waits to know a log.
            if b"cut" not in pool.snapshots.by_name:
                await pool.snapshots.create(b"cut")
            await look(portion, log_id, old_blocks)  # type: ignore[arg-type]

        monkeypatch.setattr(Portion, "_look_at_log", looked)
        await volume.write(OBJECT - BLOCK, b"n" * BLOCK + bytes(BLOCK))
        found = await read_snapshot(pool, pool.snapshots.get(b"cut"), b"v")
        assert found[OBJECT - BLOCK :: BLOCK] in (b"oo", b"n\0")


# -- no memory ----------------------------------------------------------------------------------


def no_memory_for(patch: pytest.MonkeyPatch, is_meant: Callable[[VolumeId], bool]) -> list[VolumeId]:
    """Have the first portion of such a volume find no memory; what it was, once it has happened."""
    portion = Processor.portion
    struck: list[VolumeId] = []

    def none(processor: Processor, volume_id: VolumeId) -> Portion:
        if not struck and is_meant(volume_id):
            struck.append(volume_id)
            raise MemoryError
        return portion(processor, volume_id)

    patch.setattr(Processor, "portion", none)
    return struck


async def test_trimming_that_finds_no_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(World(processor_count=1)) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"o" * 4 * BLOCK)
        await pool.snapshots.create(b"s")
        clone = await pool.clones.clone(b"s", b"v", b"c")
        assert clone.needs_trim
        with monkeypatch.context() as patch:
            no_memory_for(patch, lambda volume_id: True)
            with pytest.raises(MemoryError):
                await clone.trim()
        with trio.fail_after(30):
            await put(pool, b"c", 4 * BLOCK, b"n" * BLOCK)
            await pool.volumes.truncate(clone, 100 * BLOCK)
        assert (await read_volume(pool, b"c"))[: 5 * BLOCK : BLOCK] == b"oooon"


async def test_a_truncate_that_finds_no_memory_holds_up_no_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(World(processor_count=1)) as pool:
        volume = await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"o" * 4 * BLOCK)
        await pool.sync()
        with monkeypatch.context() as patch:
            no_memory_for(patch, lambda volume_id: True)
            with pytest.raises(MemoryError):
                await volume.truncate(BLOCK)
        with trio.fail_after(30):
            await put(pool, b"v", 0, b"n" * BLOCK)
        assert (await read_volume(pool, b"v"))[::BLOCK] == b"nooo"


@pytest.mark.parametrize("closes", [False, True])
async def test_a_rollback_that_finds_no_memory_is_waited_for(monkeypatch: pytest.MonkeyPatch, closes: bool) -> None:
    """Whoever reads meanwhile waits; whoever closes the volume has it closed."""
    async with open_world(World(processor_count=1)) as pool:
        volume = await pool.volumes.create(b"v")
        pool.volumes.open(volume)
        await volume.write(0, b"o" * BLOCK)
        await pool.snapshots.create(b"s")
        await volume.write(0, b"n" * BLOCK)
        was = volume.volume_id
        read: list[bytes] = []

        async def roll_back() -> None:
            await pool.clones.rollback(b"s", [b"v"], force=True)

        async def read_meanwhile() -> None:
            read.append(bytes(await volume.read(0, 1)))

        struck = no_memory_for(monkeypatch, lambda volume_id: volume_id != was)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(roll_back)
            while not struck:
                await trio.to_thread.run_sync(lambda: None)
            assert volume.failure is None
            if closes:
                pool.volumes.close(volume)
            else:
                nursery.start_soon(read_meanwhile)
        assert volume.opens == (0 if closes else 1)
        assert read == ([] if closes else [b"o"])
        assert (await read_volume(pool, b"v"))[:1] == b"o"
        if not closes:
            pool.volumes.close(volume)
        await pool.clones.rollback(b"s", [b"v"])


async def test_a_rollback_goes_on_where_letting_go_found_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(World(processor_count=2)) as pool:
        volume = await pool.volumes.create(b"v")
        pool.volumes.open(volume)
        await volume.write(0, b"o" * BLOCK)
        await pool.snapshots.create(b"s")
        await volume.write(0, b"n" * BLOCK)
        let_go = Processor.let_go
        struck: list[bool] = []

        def none(processor: Processor, portion: Portion) -> None:
            if not struck and not portion.users:
                struck.append(True)
                raise MemoryError
            let_go(processor, portion)

        with monkeypatch.context() as patch:
            patch.setattr(Processor, "let_go", none)
            with trio.fail_after(60):
                await pool.clones.rollback(b"s", [b"v"], force=True)
        assert struck and bytes(await volume.read(0, 1)) == b"o"
        pool.volumes.close(volume)
        assert not volume.opens


@pytest.mark.parametrize("how", ["no memory", "its record is lost"])
async def test_a_rollback_in_place_fails_before_it_is_durable_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await pool.maker.create(VolumeWish(b"c", 16 * BLOCK, COPY_ON_WRITE))
        for name in (b"v", b"c"):
            await put(pool, name, 0, b"1" * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"2" * BLOCK)
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        in_place = pool.volumes.get(b"c").volume_id
        with monkeypatch.context() as patch:
            if how == "no memory":
                no_memory_for(patch, lambda volume_id: volume_id == in_place)
            else:
                patch.delitem(pool.processors[0].sources, in_place)
            with pytest.raises((MemoryError, SnapfsError)):
                await pool.clones.rollback(b"s")
        # All is as it was, and what is written from here on is kept.
        assert set(pool.snapshots.by_name) == {b"s"}
        assert (await read_volume(pool, b"v"))[:1] == b"2"
        await put(pool, b"v", 0, b"3" * BLOCK)
        await pool.volumes.get(b"v").sync()
        await running.stop()
    async with open_world(world) as pool:
        assert (await read_volume(pool, b"v"))[:1] == b"3"


async def test_writers_go_on_when_not_all_could_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(World(processor_count=1)) as pool:
        for name in (b"v", b"w"):
            await pool.volumes.create(name)
            await put(pool, name, 0, b"1" * BLOCK)
        await pool.snapshots.create(b"s")
        hold = type(pool.volumes.get(b"v")).hold_writers
        count = 0

        def held(volume: object) -> object:
            nonlocal count
            count += 1
            if count == 2:
                raise MemoryError
            return hold(volume)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(type(pool.volumes.get(b"v")), "hold_writers", held)
            with pytest.raises(MemoryError):
                await pool.clones.rollback(b"s")
        with trio.fail_after(30):
            await put(pool, b"v", 0, b"2" * BLOCK)
            await put(pool, b"w", 0, b"2" * BLOCK)


async def test_a_mark_of_a_rollback_that_cannot_be_true_closes_its_volume_alone() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.snapshots.create(b"before")
        await pool.maker.create(VolumeWish(b"c", 16 * BLOCK, COPY_ON_WRITE))
        await pool.volumes.create(b"v")
        for name in (b"v", b"c"):
            await put(pool, name, 0, b"1" * BLOCK)
        await pool.sync()
        instant = pool.snapshots.get(b"before").instant
        pool.catalog.catalog.database.execute("UPDATE traits SET restore_instant = ?", (instant,))
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        assert (await read_volume(running.pool, b"v"))[:1] == b"1"
        with pytest.raises(SnapfsError, match="could not be finished"):
            await read_volume(running.pool, b"c")
        await running.close()


async def test_what_cannot_be_made_as_wished_takes_no_others_volume_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a volume is cut to its size somebody removes it, and makes another one of its name."""
    world = World(processor_count=1)
    world.make_image("/image", b"i" * 4 * BLOCK)
    async with open_world(world) as pool:

        async def fit(table: VolumeTable, volume: Volume) -> None:
            await table.remove(volume.name)
            await table.create(b"v")
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(VolumeTable, "fit", fit)
        with pytest.raises(OSError, match="Input/output"):
            await pool.maker.create(VolumeWish(b"v", 8 * BLOCK, COPY_ON_WRITE, "/image"))
        assert set(pool.volumes.by_name) == {b"v"} and not pool.volumes.get(b"v").size_bytes


# -- giving back --------------------------------------------------------------------------------


async def test_a_log_that_cannot_be_punched_keeps_no_others_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapfs.processor._PUNCH_BATCH", 3)
    bad_names: list[str] = []

    def fail(kind: str, name: str) -> None:
        if kind == "punch" and name in bad_names:
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    # The last object is another processor's, which comes later.
    world = World(processor_count=2)
    ((path, device),) = world.devices.items()
    memory = in_memory(device)
    world.devices = {path: FaultyDevice(memory, fail)}
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        for name in (b"bad", b"good"):
            await pool.volumes.create(name)
            for number in range(4):
                await put(pool, name, number * OBJECT, b"1" * 101 * BLOCK)
            await pool.volumes.get(name).sync()
        store = pool.processors[0].access.store
        (log,) = store.logs_of(pool.volumes.get(b"bad").volume_id)
        bad_names.append(f"logs/0/{log.log_id:08x}")
        before = memory.space().free_bytes
        for number in range(4):
            for name in (b"bad", b"good"):
                await pool.volumes.discard(pool.volumes.get(name), number * OBJECT, 100 * BLOCK)
        await pool.sync()
        with pytest.raises(OSError, match="Input/output error"):
            await pool.reclaimer.reclaim_all()
        assert memory.space().free_bytes >= before + 600 * BLOCK
        assert {row.log_id for _, row in store.freed(100)} == {log.log_id}
        assert not pool.processors[1].access.store.freed(100)
        bad_names.clear()
        await pool.reclaimer.reclaim_all()
        assert memory.space().free_bytes >= before + 800 * BLOCK and not store.freed(100)
        await running.stop()


async def test_what_is_freed_while_all_is_given_back_is_given_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that say so are numbered anew once there were none."""
    monkeypatch.setattr("snapfs.processor._PUNCH_BATCH", 2)
    world = World(processor_count=1)
    # Without the pool's tasks, which would come first now and then.
    pool = Pool.open(world.home, WHERE, world.open_device, "test", world.open_image)
    await pool.recover()
    (processor,) = pool.processors
    store = processor.access.store
    await pool.volumes.create(b"v")
    await put(pool, b"v", 0, b"1" * 8 * BLOCK)
    await pool.sync()
    (log,) = store.logs_of(pool.volumes.get(b"v").volume_id)
    add = "INSERT INTO freed VALUES (?, ?, ?)"
    for block in (100, 102):
        store.database.execute(add, (log.log_id, block * BLOCK, BLOCK))
    punch = processor._punch_some
    added: list[bool] = []

    def punched(after_row: int) -> object:
        found = punch(after_row)
        if not added:
            added.append(True)
            store.database.execute(add, (log.log_id, 104 * BLOCK, BLOCK))
        return found

    monkeypatch.setattr(processor, "_punch_some", punched)
    assert await processor.punch_freed() == 3 and not store.freed(9)
    await pool.close()
    world.home.close()


async def test_a_change_log_volume_is_empty_when_a_failed_volume_is_gone() -> None:
    failing: list[int] = []

    def fail(kind: str, name: str) -> None:
        if kind == "sync" and failing:
            failing.pop()
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    world = world_with_logs(fail)
    async with open_world(world) as pool:
        quota = await with_change_logs(pool, world, 64, 1 << 20)
        await put(pool, b"v", 0, b"1" * 32 * BLOCK)
        await pool.volumes.get(b"v").sync()
        await pool.snapshots.create(b"s")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"2" * 20 * BLOCK)
            failing.append(1)
            with pytest.raises(SyncFailedError):
                await volume.sync()
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        await pool.volumes.remove(b"v")
        await pool.reclaimer.reclaim_all()
        assert quota.used_blocks == 0
        await pool.changelogs.remove(b"logs")


async def test_what_changed_since_the_last_snapshot() -> None:
    async with open_world(World(processor_count=1)) as pool:
        await pool.volumes.create(b"v")
        (processor,) = pool.processors
        volume = pool.volumes.get(b"v")

        async def changed() -> int:
            epoch = max(processor.clock.epoch, volume.named_epoch)
            return (await processor.changed_block_counts({volume.volume_id: epoch}))[volume.volume_id]

        await put(pool, b"v", 0, b"1" * 10 * BLOCK)
        assert await changed() == 10
        await pool.snapshots.create(b"s")
        assert await changed() == 0
        await put(pool, b"v", 0, b"1" * 10 * BLOCK)
        await volume.sync()
        await pool.volumes.discard(volume, 0, BLOCK)
        await put(pool, b"v", 20 * BLOCK, b"2" * BLOCK)
        assert await changed() == 10


# -- what lies on what --------------------------------------------------------------------------


def test_files_beneath_a_device_are_found_through_loops_partitions_and_stacks(tmp_path: Path) -> None:
    device = os.stat(tmp_path).st_dev
    image, deeper = tmp_path / "image", tmp_path / "deeper"
    image.write_bytes(b"")
    deeper.write_bytes(b"")
    devices, sys_folder = tmp_path / "devices", tmp_path / "dev"
    partition = devices / "loop7" / "loop7p1"
    for folder in (partition, devices / "loop7" / "loop", devices / "loop8" / "loop", devices / "dm-0" / "slaves"):
        folder.mkdir(parents=True)
    (partition / "partition").write_text("1\n")
    (devices / "loop7" / "loop" / "backing_file").write_text(f"{image} (deleted)\n")
    (devices / "loop8" / "loop" / "backing_file").write_text(f"{deeper}\n")
    (devices / "dm-0" / "slaves" / "a").symlink_to(partition)
    (devices / "dm-0" / "slaves" / "b").symlink_to(devices / "loop8")
    (devices / "dm-0" / "slaves" / "c").symlink_to(devices / "dm-0")
    sys_folder.mkdir()
    (sys_folder / f"{os.major(device)}:{os.minor(device)}").symlink_to(devices / "dm-0")
    assert files_beneath(str(image), str(sys_folder)) == {str(image), str(deeper)}
    assert files_beneath(str(tmp_path / "not there"), str(sys_folder)) == set()
    assert files_beneath("/dev/null", str(sys_folder)) == set()


# -- synced files -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["done", "failed", "cancelled"])
async def test_requests_to_a_synced_file_share_a_sync_and_what_becomes_of_it(how: str) -> None:
    async with open_world(World(processor_count=1)) as pool:
        volume = await pool.volumes.create(b"v")
        pool.volumes.open(volume)
        handle = VolumeHandle(volume, is_writer=True, is_flusher=False, is_synced=True)
        goes_on, began = trio.Event(), trio.Event()
        sync_count = 0

        async def sync(*, data_only: bool) -> None:
            nonlocal sync_count
            sync_count += 1
            if sync_count == 1:
                began.set()
                await goes_on.wait()
            elif how == "failed":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            elif how == "cancelled":
                await trio.sleep_forever()

        patch = pytest.MonkeyPatch()
        patch.setattr(volume, "sync", sync)
        told: list[str] = []
        leader = trio.CancelScope()

        async def write(block: int) -> None:
            try:
                await handle.write(block * BLOCK, b"x" * BLOCK)
                told.append("done")
            except OSError as error:
                told.append(os.strerror(error.errno or 0))

        async def write_first_of_the_next() -> None:
            with leader:
                await write(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, 0)
            await began.wait()
            # These come while the first is synced, which misses them.
            nursery.start_soon(write_first_of_the_next)
            await trio.testing.wait_all_tasks_blocked()
            for block in range(2, 6):
                nursery.start_soon(write, block)
            await trio.testing.wait_all_tasks_blocked()
            goes_on.set()
            if how == "cancelled":
                await trio.testing.wait_all_tasks_blocked()
                leader.cancel()
        patch.undo()
        assert sync_count == 2 and told[0] == "done"
        words = {"done": "done", "failed": "Input/output error", "cancelled": "Interrupted system call"}[how]
        assert told[1:] == [words] * (4 if how == "cancelled" else 5)
        pool.volumes.close(volume)
