"""Small things that other tests did not notice when they were changed."""

from __future__ import annotations

import errno
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing
from xxhash import xxh3_64_digest

from snapfs import blockmap, changelog, cowportion, shardstate, snapshots, volume
from snapfs.backends import DeviceFile, MemoryDevice
from snapfs.backends.memory import MemoryFile
from snapfs.checksums import SumsMaker
from snapfs.database import Database
from snapfs.errors import DamagedError, NoSpaceError, NotFoundError
from snapfs.formats import COPY_ON_WRITE, shard_file
from snapfs.geometry import BLOCKS_PER_OBJECT, volume_size_bytes_max
from snapfs.making import VolumeWish
from snapfs.notresident import NotResidentError, OldBlocks
from snapfs.pace import Pace
from snapfs.pool import Pool
from snapfs.processor import COMMIT_CHECK_S
from snapfs.reclaimer import RETRY_S
from snapfs.sealedfile import DamagedBlockError

from .cramped import cramped
from .harness import WHERE, Running, World, open_world, read_snapshot, read_volume, without_threads

BLOCK = 4096
OBJECT = 4 << 20


async def put(pool: Pool, name: bytes, offset: int, data: bytes) -> None:
    async with pool.volumes.opened(name) as volume:
        await volume.write(offset, data)


async def test_a_write_that_fails_halfway_leaves_nothing_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    (device,) = world.devices.values()
    assert isinstance(device, MemoryDevice)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"a" * 2 * BLOCK)
        await pool.volumes.sync_all()
        free_bytes = device.space().free_bytes
        write = MemoryFile.write

        def fail_behind(file: MemoryFile, data: bytes, offset: int) -> None:
            write(file, data, offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(MemoryFile, "write", fail_behind)
            with pytest.raises(OSError):
                # One block is there and is written over, three are new.
                await put(pool, b"v", BLOCK, b"b" * 4 * BLOCK)
        assert device.space().free_bytes == free_bytes
        assert (await read_volume(pool, b"v"))[:BLOCK] == b"a" * BLOCK
        await put(pool, b"v", BLOCK, b"c" * 4 * BLOCK)
        assert await read_volume(pool, b"v") == b"a" * BLOCK + b"c" * 4 * BLOCK
    world.check_clean()


async def test_what_was_begun_for_a_volume_that_was_never_made_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=2)
    async with open_world(world) as pool:

        async def end(*args: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(pool.catalog, "save", end)
            # Nor is what was begun taken back.
            patch.setattr(pool.processors[0], "drop_source", end)
            patch.setattr(pool.processors[1], "drop_source", end)
            with pytest.raises(OSError):
                await pool.maker.create(VolumeWish(b"c", OBJECT, COPY_ON_WRITE))
        assert [len(one.sources) for one in pool.processors] == [1, 1]
    async with open_world(world) as pool:
        for processor in pool.processors:
            assert not processor.sources
            assert not processor.access.store.sources()
            assert not world.devices["0"].names(f"logs/{processor.index}")
    world.check_clean()


async def test_a_volume_that_is_to_be_taken_apart_does_not_count_after_opening() -> None:
    world = World(processor_count=1)
    async with trio.open_nursery() as nursery:
        running = Running(world)
        await running.start(nursery)
        pool = running.pool
        for name, count in ((b"v", 8), (b"w", 4)):
            await pool.volumes.create(name)
            await put(pool, name, 0, b"x" * count * BLOCK)
        await pool.volumes.sync_all()
        async with pool.reclaimer._turn:
            await pool.volumes.remove(b"v")
            assert pool.processors[0].tally.total == 4
            await running.close()
    pool = Pool.open(world.home, WHERE, world.open_device, "test", world.open_image)
    assert pool.processors[0].tally.total == 4 and len(pool.volumes.removed) == 1
    await pool.close()
    world.home.close()
    world.check()


async def test_a_change_log_of_which_nothing_is_left_is_forgotten() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        volume_id = (await pool.volumes.create(b"v")).volume_id
        await put(pool, b"v", 0, b"a" * 4 * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"b" * 4 * BLOCK)
        await pool.volumes.sync_all()
        store = pool.processors[0].access.store
        old, new = store.logs_of(volume_id)
        assert (old.block_count, new.block_count) == (4, 4)
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert [row.log_id for row in store.logs_of(volume_id)] == [new.log_id]
        # Without a snapshot too: what is written over as a hole.
        await pool.snapshots.create(b"t")
        await pool.snapshots.delete(b"t")
        await pool.reclaimer.reclaim_all()
        await put(pool, b"v", 0, bytes(4 * BLOCK))
        await pool.volumes.sync_all()
        # The one that writes go to now.
        (current,) = store.logs_of(volume_id)
        assert current.log_id > new.log_id and not current.block_count
    world.check_clean()


async def test_blocks_behind_the_first_are_given_back_by_whoever_named_them_last() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, bytes([1]) * 9 * BLOCK)
        await pool.snapshots.create(b"s")
        await pool.clones.clone(b"s", b"v", b"c")
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        # The origin lets go of some in the middle, which the clone still names; then so does the clone.
        for name in (b"v", b"c"):
            await put(pool, name, 3 * BLOCK, bytes([2]) * 4 * BLOCK)
            await pool.volumes.sync_all()
            await pool.reclaimer.reclaim_all()
        assert await read_volume(pool, b"c") == b"\1" * 3 * BLOCK + b"\2" * 4 * BLOCK + b"\1" * 2 * BLOCK
    world.check_clean()


async def test_holes_are_counted_also_after_opening() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"a" * 8 * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 2 * BLOCK, bytes(3 * BLOCK))
        assert pool.processors[0].tally.total == 5
        await pool.volumes.sync_all()
    async with open_world(world) as pool:
        assert pool.processors[0].tally.total == 5
    world.check_clean()


async def test_an_intermediate_snapshot_of_some_volumes_counts_those() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        for name, count in ((b"v", 3), (b"w", 5), (b"empty", 0)):
            await pool.volumes.create(name)
            await put(pool, name, 0, b"a" * count * BLOCK)
        (processor,) = pool.processors
        for names, found in (([b"v"], (3, 1)), ([b"v", b"empty"], (3, 1)), ([b"v", b"w"], (8, 2)), (None, (8, 2))):
            snapshot = await pool.snapshots.create(b"s", names)
            row = processor.access.store.intermediate(snapshot.snapshot_id)
            assert row is not None and (row.block_count, row.portion_count) == found
            assert await pool.snapshots.referenced_bytes(snapshot) == found[0] * BLOCK
            await pool.snapshots.delete(b"s")


async def test_what_did_not_change_has_not_changed_since_any_snapshot() -> None:
    async with open_world(World(processor_count=1)) as pool:
        await pool.volumes.create(b"v")
        await pool.volumes.create(b"other")
        await put(pool, b"v", 0, b"a" * BLOCK)
        for number in range(4):
            await pool.snapshots.create(b"v%d" % number, [b"v"])
            await pool.snapshots.create(b"all%d" % number)
            await put(pool, b"other", 0, b"%d" % number)
        for number in range(4):
            snapshot = pool.snapshots.get(b"v%d" % number)
            assert not await pool.snapshots.has_changed_since(snapshot, [b"v"])
            # Others than it holds.
            assert await pool.snapshots.has_changed_since(snapshot, [b"v", b"other"])
            assert await pool.snapshots.has_changed_since(pool.snapshots.get(b"all%d" % number))


async def test_a_change_log_whose_file_is_gone_is_told_by_its_reader() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"a" * BLOCK)
        await pool.volumes.sync_all()
    (device,) = world.devices.values()
    (name,) = device.names("logs/0")
    device.remove(f"logs/0/{name}")
    device.sync_names("logs/0")
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        with pytest.raises(DamagedError, match="change log"):
            await read_volume(running.pool, b"v")
        await running.close()


async def test_a_removed_volume_gives_the_room_of_its_change_log_volume_back_also_after_opening() -> None:
    world = World(processor_count=1)
    world.devices["/logs"] = MemoryDevice()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"logs", ["/logs"], 100 * BLOCK)
        await pool.maker.create(VolumeWish(b"v", OBJECT, changelog_name=b"logs"))
        # Into the pool's own logs before the first snapshot, and into those of the change log volume behind it.
        await put(pool, b"v", 0, b"a" * 3 * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"b" * 7 * BLOCK)
        await pool.volumes.sync_all()
        assert pool.changelogs.get(b"logs").used_blocks == 7
    async with open_world(world) as pool:
        assert pool.changelogs.get(b"logs").used_blocks == 7
        await pool.snapshots.delete(b"s")
        await pool.volumes.remove(b"v")
        await pool.reclaimer.reclaim_all()
        assert pool.changelogs.get(b"logs").used_blocks == 0
    world.check_clean()


async def test_content_hashes_of_volumes_that_are_not_there_are_told_and_go() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"a" * BLOCK)
        store = pool.processors[0].access.store
        assert store.stray_contents_count() == 0
        with store.database.transaction():
            store.database.execute("INSERT INTO contents VALUES (4711, 1, x'00')")
        assert store.stray_contents_count() == 1
        store.drop_stray_contents()
        assert store.stray_contents_count() == 0
    world.check_clean()


def test_a_damaged_block_is_told_by_its_offset_in_the_volume() -> None:
    error = DamagedBlockError(7, 9, 5)
    assert f"offset {9 * OBJECT + 5 * BLOCK} " in str(error) and "change log 7)" in str(error)


@pytest.mark.parametrize("seed", range(8))
def test_sums_of_an_object_with_gaps_match_all_of_it_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    contents = bytearray(BLOCKS_PER_OBJECT * BLOCK)
    maker = SumsMaker()
    block = rng.choice((0, 1, 31, 32, 33, 200))
    present = []
    while block < BLOCKS_PER_OBJECT:
        for _ in range(rng.choice((1, 31, 32, 33, 64, 90))):
            if block < BLOCKS_PER_OBJECT:
                contents[block * BLOCK : (block + 1) * BLOCK] = rng.randbytes(BLOCK)
                present.append(block)
                block += 1
        block += rng.choice((1, 31, 32, 33, 64, 100))
    for block in present:
        maker.add(block, memoryview(contents)[block * BLOCK : (block + 1) * BLOCK])
    sums = maker.made()
    # A checksum for each 128 KiB, as it reads with its holes.
    assert sums.ranges == b"".join(
        xxh3_64_digest(bytes(contents[at : at + 32 * BLOCK])) for at in range(0, len(contents), 32 * BLOCK)
    )
    assert sums.matches(0, memoryview(contents)) and sums.first_wrong(0, memoryview(contents)) is None
    for wrong in rng.sample(range(BLOCKS_PER_OBJECT), 5):
        contents[wrong * BLOCK + 17] ^= 1
        assert not sums.matches(0, memoryview(contents))
        assert sums.first_wrong(0, memoryview(contents)) == wrong
        contents[wrong * BLOCK + 17] ^= 1


async def twelve_logs_of_a_block(pool: Pool) -> bytes:
    """What the volume ``v`` then has: each of its blocks in a change log of its own. There is a snapshot of each."""
    for number in range(12):
        await put(pool, b"v", number * BLOCK, bytes([number]) * BLOCK)
        await pool.snapshots.create(b"%d" % number)
    return b"".join(bytes([number]) * BLOCK for number in range(12))


async def test_old_contents_in_a_change_log_that_has_gone_are_looked_for_again() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"a" * BLOCK)
        (log,) = pool.processors[0].logs.known.values()
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"b" * BLOCK)
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert log.log_id not in pool.processors[0].logs.known
        old_blocks: OldBlocks = {}
        await pool.processors[0].portion(volume.volume_id)._fetch_block(log, 0, old_blocks)
        assert old_blocks == {}
    world.check_clean()


async def test_a_long_read_of_very_many_change_logs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changelog, "OPEN_FILES_MAX", 8)
    monkeypatch.setattr(volume, "READ_BYTES_MAX", 4 * BLOCK)
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        expected = await twelve_logs_of_a_block(pool)
        assert await read_volume(pool, b"v") == expected
        assert await read_snapshot(pool, pool.snapshots.get(b"11"), b"v") == expected
        async with pool.volumes.opened(b"v") as one:
            assert await one.read(BLOCK - 1, 1 << 30) == expected[BLOCK - 1 :]
            assert await one.read(12 * BLOCK, 1 << 30) == b""


@pytest.mark.parametrize("is_sealed", [False, True])
async def test_reads_of_more_change_logs_than_may_be_open_end(*, is_sealed: bool) -> None:
    with cramped():
        world = World(processor_count=1)
        async with open_world(world) as pool:
            await pool.volumes.create(b"v")
            expected = await twelve_logs_of_a_block(pool)
            if is_sealed:
                await pool.sealer.seal_all()
            async with pool.volumes.opened(b"v") as one, trio.open_nursery() as nursery:
                tries, read_now = 0, one.read_now

                def counted(offset: int, buffer: memoryview) -> memoryview:
                    nonlocal tries
                    tries += 1
                    assert tries < 2000, "reads have each other begin again"
                    return read_now(offset, buffer)

                one.read_now = counted  # type: ignore[method-assign]

                async def read(offset: int, length: int) -> None:
                    for _ in range(5):
                        assert await one.read(offset, length) == expected[offset : offset + length]

                # One that begins within a block lies in a log more; the others are at it at the same time.
                nursery.start_soon(read, BLOCK // 2, 4 * BLOCK)
                for start in range(0, 12, 4):
                    nursery.start_soon(read, start * BLOCK, 4 * BLOCK)
        world.check_clean()


async def test_a_long_read_begins_again_when_the_volume_is_cut_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume, "READ_BYTES_MAX", BLOCK)
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"a" * 4 * BLOCK)
        async with pool.volumes.opened(b"v") as one:
            read = one.read_now

            def cut_before_the_third(offset: int, buffer: memoryview) -> memoryview:
                if offset == 2 * BLOCK and one.size_bytes == 4 * BLOCK:
                    monkeypatch.setattr(one, "read_now", read)
                    raise NotResidentError(cut_and_write)
                return read(offset, buffer)

            async def cut_and_write(old_blocks: OldBlocks) -> None:
                await one.truncate(0)
                await one.write(0, b"b" * 3 * BLOCK)

            monkeypatch.setattr(one, "read_now", cut_before_the_third)
            assert await one.read(0, 1 << 30) == b"b" * 3 * BLOCK


def test_processors_share_the_files_that_the_process_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, processor_count, share in ((1024, 4, 128), (1024, 64, 16), (65536, 4, 16256), (-1, 4, 2048)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, soft=soft: (soft, -1))
        assert changelog.files_share(processor_count) == share


async def test_files_beyond_the_bound_are_closed_and_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changelog, "OPEN_FILES_MAX", 8)
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for number in range(24):
            await put(pool, b"v", number * BLOCK, bytes([number + 1]) * BLOCK)
            await pool.snapshots.create(b"%d" % number)
        logs = list(pool.processors[0].logs.known.values())
        assert len(logs) == 24 and sum(log.file is not None for log in logs) <= 8
        async with pool.volumes.opened(b"v") as opened:
            for number in range(24):
                assert await opened.read(number * BLOCK, 1) == bytes([number + 1])
        assert sum(log.file is not None for log in logs) <= 8
        # No commit is under way.
        async with pool.processors[0].access.commit_lock:
            assert not any(log.users or log.pins for log in logs)


async def test_a_reader_is_done_with_the_files_of_a_copy_on_write_volume() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"c", 4 * BLOCK, COPY_ON_WRITE))
        await put(pool, b"c", 0, b"old" * BLOCK)
        await pool.snapshots.create(b"s")
        commit_count = pool.processors[0].commit_count
        await put(pool, b"c", 0, b"new")
        assert pool.processors[0].commit_count > commit_count
        async with pool.processors[0].access.commit_lock:
            assert not any(log.users or log.pins for log in pool.processors[0].logs.known.values())


def test_ranges_to_be_preserved_are_joined_where_they_meet() -> None:
    wanted = [(2, 0, 1), (1, 5, 6), (1, 0, 2), (1, 1, 5), (1, 8, 9), (2, 3, 4), (2, 3, 9), (2, 4, 5)]
    assert cowportion._joined(wanted) == [(1, 0, 6), (1, 8, 9), (2, 0, 1), (2, 3, 9)]
    assert cowportion._joined([]) == []


async def test_snapshots_tell_how_much_each_held_also_the_latest() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        for number in range(3):
            await put(pool, b"v", number * BLOCK, b"x" * BLOCK)
            await pool.snapshots.create(b"%d" % number)
        for number in range(3):
            members = await pool.snapshots.members(pool.snapshots.get(b"%d" % number))
            assert members.block_counts[volume.volume_id] == number + 1


async def test_a_removed_volume_leaves_a_log_of_its_own_number_that_tells_how_much_it_held() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        await pool.volumes.create(b"empty")
        await put(pool, b"v", 0, b"x" * 3 * BLOCK)
        await pool.snapshots.create(b"s")
        await pool.volumes.remove(b"v")
        await pool.volumes.remove(b"empty")
        await pool.reclaimer.reclaim_all()
        assert pool.reclaimer.waiting_count == 0
        store = pool.processors[0].access.store
        # Of one that held nothing there is nothing to be told.
        assert [log.volume_id for log in store.all_logs()] == [volume.volume_id] * 2
        await pool.volumes.create(b"w")
        await put(pool, b"w", 0, b"y" * BLOCK)
        await pool.snapshots.create(b"t")
        members = await pool.snapshots.members(pool.snapshots.get(b"s"))
        assert members.block_counts[volume.volume_id] == 3
        assert len({log.log_id for log in store.all_logs()}) == 3
    async with open_world(world) as pool:
        members = await pool.snapshots.members(pool.snapshots.get(b"s"))
        assert members.block_counts[volume.volume_id] == 3


async def test_maps_at_an_instant_are_told_by_object() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        for index in (7, 2):
            await put(pool, b"v", index * OBJECT, b"x" * BLOCK)
        snapshot = await pool.snapshots.create(b"s")
        await put(pool, b"v", 7 * OBJECT, b"y" * BLOCK)
        await pool.volumes.sync_all()
        found = pool.processors[0].access.store.maps_at(volume.volume_id, snapshot.instant)
        assert [row.object_index for row in found] == [2, 7]


async def test_snapshots_of_one_second_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "utc_name", lambda _: "now")
    world = World(processor_count=1)
    async with open_world(world) as pool:
        names = [(await pool.snapshots.create()).name for _ in range(3)]
        assert names == [b"now", b"now-2", b"now-3"]


async def test_a_source_that_is_not_there_takes_no_blocks_and_is_no_debt() -> None:
    world = World(processor_count=2)
    world.make_image("/image", b"x" * 2 * BLOCK)
    async with open_world(world) as pool:
        volume = await pool.maker.create(VolumeWish(b"v", None, COPY_ON_WRITE, "/image"))
    world.outside.rename("image", "away")
    async with open_world(world) as pool:
        assert [one.source_block_count(volume.volume_id) for one in pool.processors] == [0, 0]
        world.outside.rename("away", "image")


async def test_nothing_is_suspect_after_space_was_given_back() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"x" * 4 * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"y" * 2 * BLOCK)
        await pool.clones.clone(b"s", b"v", b"clone")
        await pool.snapshots.delete(b"s")
        await pool.volumes.remove(b"clone")
        await pool.reclaimer.reclaim_all()
        rows = pool.processors[0].access.store.all_logs()
        assert rows and all(row.sealed in (0, 1) for row in rows)
        assert pool.reclaimer.waiting_count == 0


class Borrower:
    """Keeps objects, and lets go of those that are clean."""

    def __init__(self) -> None:
        self.kept: set[int] = set()
        self.dirty: set[int] = set()

    def let_go(self, object_index: int) -> bool:
        if object_index in self.dirty:
            return False
        self.kept.discard(object_index)
        return True


def test_no_more_objects_are_in_memory_than_may_be_once_they_are_clean() -> None:
    residency, borrower = shardstate.Residency(8), Borrower()

    def admit(object_index: int) -> None:
        borrower.kept.add(object_index)
        residency.admit(borrower, object_index)

    for object_index in range(20):
        admit(object_index)
    assert borrower.kept == set(range(12, 20)), "those loaded first go first"
    borrower.dirty = set(range(12, 20))
    for object_index in range(20, 40):
        borrower.dirty.add(object_index)
        admit(object_index)
    assert len(borrower.kept) == 28, "nothing that is dirty goes"
    borrower.dirty.clear()
    for object_index in range(40, 50):
        admit(object_index)
    assert len(borrower.kept) == 8 and set(range(40, 50)) >= borrower.kept >= {49}, "up to four for each that comes"


async def test_reclaiming_that_failed_is_still_to_be_done(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: None
) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        failed = trio.Event()

        async def fail(**options: bool) -> None:
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(pool.reclaimer, "reclaim_all", fail)
            pool.reclaimer.wake()
            await failed.wait()
            for _ in range(10):
                await trio.lowlevel.checkpoint()
            assert pool.reclaimer.is_at_work
        while pool.reclaimer.is_at_work:
            await trio.sleep(RETRY_S)


def test_a_volume_goes_up_to_8_tib_for_each_processor() -> None:
    assert [volume_size_bytes_max(count) for count in (1, 4)] == [8 << 40, 32 << 40]


async def test_snapshots_of_some_and_of_all_volumes_in_turn() -> None:
    world = World(processor_count=2)
    async with open_world(world) as pool:
        for name in (b"v", b"w"):
            await pool.volumes.create(name)
        expected = {}
        # Open all the time: an epoch that was begun in memory counts.
        async with pool.volumes.opened(b"v"), pool.volumes.opened(b"w"):
            for number in range(8):
                contents = b"%d" % number * BLOCK
                for name in (b"v", b"w"):
                    await put(pool, name, 0, contents)
                await pool.snapshots.create(b"%d" % number, ([b"v"], None, None, [b"w"])[number % 4])
                expected[b"%d" % number] = contents
        for name, contents in expected.items():
            snapshot = pool.snapshots.get(name)
            for one in (await pool.snapshots.members(snapshot)).by_name:
                assert await read_snapshot(pool, snapshot, one) == contents, (name, one)
    world.check_clean()


def test_digests_of_a_run_are_those_of_its_blocks() -> None:
    for mask in (0b10, 0b1, 0b110, 0b101, 0b1110, 0b110110, (1 << 64) - 1):
        maker = SumsMaker()
        for block in range(64):
            if mask >> block & 1:
                maker.add(block, memoryview(bytes([block + 1]) * BLOCK))
        sums = maker.made()
        for first in range(8):
            for count in range(1, 8):
                run = b"".join(sums.digest_at(block) for block in range(first, first + count))
                assert sums.digests_of(first, count) == run, (mask, first, count)


async def test_a_removed_volume_has_no_later_contents_in_a_snapshot() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        await pool.volumes.truncate(volume, 2 * OBJECT)
        await put(pool, b"v", 0, b"a" * BLOCK)
        before = await pool.snapshots.create(b"before")
        await put(pool, b"v", OBJECT, b"b" * BLOCK)
        await pool.snapshots.create(b"after")
        await pool.volumes.remove(b"v")
        assert await read_snapshot(pool, before, b"v") == (b"a" * BLOCK).ljust(2 * OBJECT, b"\0")
        await pool.snapshots.delete(b"after")
        await pool.reclaimer.reclaim_all()
        assert await read_snapshot(pool, before, b"v") == (b"a" * BLOCK).ljust(2 * OBJECT, b"\0")
    world.check_clean()


async def test_nothing_of_a_deleted_snapshot_is_opened_though_it_is_there_still() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"a" * BLOCK)
        snapshot = await pool.snapshots.create(b"s")
        opened = await pool.snapshots.open_volume(snapshot, volume.volume_id)
        await pool.snapshots.delete(b"s")
        with pytest.raises(NotFoundError):
            await pool.snapshots.open_volume(snapshot, volume.volume_id)
        assert bytes(await opened.read(0, BLOCK)) == b"a" * BLOCK
        pool.snapshots.close_volume(opened)


async def test_devices_and_change_log_volumes_are_numbered_apart() -> None:
    async with open_world(World(processor_count=1, device_count=3)) as pool:
        assert pool.catalog.catalog.next_changelog_ids() == (3, 1)


def test_runs_that_differ_are_as_long_as_can_be() -> None:
    old = blockmap.with_range(blockmap.with_range(blockmap.HOLE, 10, 20, 1), 20, 30, 2)
    new = blockmap.with_range(old, 12, 28, 3)
    assert list(blockmap.changed_runs(old, new)) == [(12, 16, 3)]
    assert list(blockmap.changed_runs(new, old)) == [(12, 8, 1), (20, 8, 2)]


async def test_ids_of_logs_go_on_where_they_were() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for number in range(3):
            await put(pool, b"v", 0, b"%d" % number * BLOCK)
            await pool.snapshots.create(b"%d" % number)
        next_log_id = pool.processors[0].logs.next_log_id
    async with open_world(world) as pool:
        assert pool.processors[0].logs.next_log_id == next_log_id == 4


async def test_zeros_amid_blocks_are_written_and_nothing_beside_them() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"A" * 3 * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 100, bytes(BLOCK))
        assert await read_volume(pool, b"v") == b"A" * 100 + bytes(BLOCK) + b"A" * (2 * BLOCK - 100)


@pytest.mark.parametrize("change", ["DELETE FROM meta WHERE key = ?", "UPDATE meta SET value = 'x' WHERE key = ?"])
def test_a_shard_store_without_a_number_is_damaged(change: str) -> None:
    world = World(processor_count=1)
    database = Database(world.home, shard_file(0), "a store")
    database.execute(change, ("next_log_id",))
    database.close()
    with pytest.raises(DamagedError, match="lacks its next_log_id"):
        Pool.open(world.home, WHERE, world.open_device)


async def test_the_room_of_a_copy_on_write_volume_is_told_before_it_is_opened() -> None:
    world = World(processor_count=2)
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"v", 2 * OBJECT, COPY_ON_WRITE))
        await put(pool, b"v", OBJECT - BLOCK, b"v" * 2 * BLOCK)
    async with open_world(world) as pool:
        assert pool.volumes.get(b"v").block_count == 2


async def test_a_log_that_goes_as_it_is_opened_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"a" * BLOCK)
    open_file = changelog.ChangeLogs.open_file
    count = 0

    def opened(logs: changelog.ChangeLogs, log: changelog.ChangeLog) -> DeviceFile:
        nonlocal count
        count += 1
        if count == 1:
            raise DamagedError("its file is missing", "")
        return open_file(logs, log)

    async with open_world(world) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(changelog.ChangeLogs, "open_file", opened)
            patch.setattr(changelog.ChangeLogs, "open_apart", lambda logs, wanted: [])
            assert await read_volume(pool, b"v") == b"a" * BLOCK
        assert count > 1


async def test_what_a_commit_frees_is_given_back_without_another_one(mock_clock: trio.testing.MockClock) -> None:
    world = World(processor_count=1)
    (device,) = world.devices.values()
    with without_threads(1):
        async with open_world(world) as pool:
            volume = await pool.volumes.create(b"v")
            await put(pool, b"v", 0, b"a" * 8 * BLOCK)
            await pool.sync()
            mock_clock.jump(COMMIT_CHECK_S)
            await trio.testing.wait_all_tasks_blocked()
            free_bytes = device.space().free_bytes
            await pool.volumes.discard(volume, BLOCK, 4 * BLOCK)
            await pool.sync()
            mock_clock.jump(COMMIT_CHECK_S)
            await trio.testing.wait_all_tasks_blocked()
            assert device.space().free_bytes == free_bytes + 4 * BLOCK


async def test_reclaiming_does_not_rest_while_somebody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hurries: list[bool] = []

    @contextmanager
    def hurried(_: Pace, is_hurried: bool = True) -> Iterator[None]:
        hurries.append(is_hurried)
        yield

    async with open_world(World(processor_count=1)) as pool:
        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(Pace, "hurried", hurried)
        await pool.reclaimer.reclaim_all()
        assert hurries.pop()
        await pool.reclaimer.reclaim_all(gently=True)
        assert not hurries.pop()


async def test_preserving_that_fails_takes_no_room_of_a_change_log_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    world.devices["/logs"] = MemoryDevice()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"logs", ["/logs"], 100 * BLOCK)
        await pool.maker.create(VolumeWish(b"v", 10 * BLOCK, COPY_ON_WRITE, changelog_name=b"logs"))
        await put(pool, b"v", 0, b"1" * 10 * BLOCK)
        await pool.snapshots.create(b"s")

        def fail(*args: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            patch.setattr(cowportion, "_write_runs", fail)
            with pytest.raises(OSError):
                await put(pool, b"v", 0, b"2" * 5 * BLOCK)
        assert pool.changelogs.get(b"logs").used_blocks == 0
        await put(pool, b"v", 0, b"2" * 5 * BLOCK)
        assert pool.changelogs.get(b"logs").used_blocks == 5
    world.check_clean()


async def test_a_write_over_two_objects_that_finds_no_room_changes_nothing() -> None:
    world = World(processor_count=1)
    world.devices["/logs"] = MemoryDevice()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"logs", ["/logs"], 6 * BLOCK)
        await pool.maker.create(VolumeWish(b"v", 2 * OBJECT, changelog_name=b"logs"))
        await put(pool, b"v", OBJECT - 4 * BLOCK, b"1" * 8 * BLOCK)
        await pool.snapshots.create(b"s")
        with pytest.raises(NoSpaceError):
            await put(pool, b"v", OBJECT - 4 * BLOCK, b"2" * 8 * BLOCK)
        assert pool.changelogs.get(b"logs").used_blocks == 0
        assert (await read_volume(pool, b"v"))[OBJECT - 4 * BLOCK : OBJECT + 4 * BLOCK] == b"1" * 8 * BLOCK
    world.check_clean()
