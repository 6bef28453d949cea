"""Sealing, scrubbing and verifying on pools in memory: what was sealed is proven, and what is damaged is never read."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from typing import cast

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from snapfs import sealer, sealing
from snapfs.backends import CrashPlan, DeviceFile
from snapfs.check import Report, check_pool
from snapfs.checksums import FULL_MASK, ObjectSums, SumsMaker, digest_of
from snapfs.contenthash import PRIME, ContentHash, element_of
from snapfs.errors import DamagedError, NoSpaceError, StallError, StoppedError, UnsealedError
from snapfs.formats import COPY_ON_WRITE, REDIRECT, ShardBatch
from snapfs.geometry import LogId, VolumeId
from snapfs.making import VolumeWish
from snapfs.objectdigests import ObjectDigests
from snapfs.pool import Pool
from snapfs.processor import Processor
from snapfs.scrub import scrub, verify
from snapfs.sealedfile import DamagedBlockError, SealedFile
from snapfs.shardstore import ShardStore
from snapfs.snapshot import Snapshot
from snapfs.volume import Volume

from .harness import (
    WHERE,
    Running,
    World,
    damage_blocks,
    everything_is_proven,
    in_memory,
    open_world,
    read_snapshot,
    read_volume,
)

OBJECT = 4 << 20
BLOCK = 4096


async def put(pool: Pool, name: bytes, offset: int, data: bytes) -> None:
    async with pool.volumes.opened(name) as volume:
        await volume.write(offset, data)


@given(st.binary(min_size=1, max_size=64), st.integers(0, 1023), st.integers(1, 150))
def test_sums_match_what_they_were_made_of_and_nothing_else(seed: bytes, first: int, count: int) -> None:
    count = min(count, 1024 - first)
    rng = random.Random(seed)
    contents = bytearray(b"".join(rng.randbytes(BLOCK) if rng.random() < 0.8 else bytes(BLOCK) for _ in range(count)))
    maker = SumsMaker()
    for index in range(count):
        maker.add(first + index, memoryview(contents)[index * BLOCK : (index + 1) * BLOCK])
    made = maker.made()
    sums = ObjectSums.decode((1, 2), *made.encoded((1, 2)))
    assert sums == made
    assert sums.matches(first, memoryview(contents)) and sums.first_wrong(first, memoryview(contents)) is None
    assert sums.digests_of(first, count) == b"".join(
        digest_of(contents[at : at + BLOCK]) for at in range(0, len(contents), BLOCK)
    )
    wrong = rng.randrange(len(contents))
    contents[wrong] ^= 1 << rng.randrange(8)
    assert not sums.matches(first, memoryview(contents))
    assert sums.first_wrong(first, memoryview(contents)) == first + wrong // BLOCK


@given(st.lists(st.tuples(st.integers(0, 5), st.binary(min_size=16, max_size=16)), max_size=12))
def test_a_content_hash_depends_on_what_is_there_not_on_the_way(changes: list[tuple[int, bytes]]) -> None:
    content = ContentHash()
    now: dict[int, bytes] = {}
    for index, digests in changes:
        old = [element_of(index, now[index])] if index in now else []
        content.replace(old, [element_of(index, digests)])
        now[index] = digests
    direct = ContentHash()
    direct.replace([], [element_of(index, digests) for index, digests in sorted(now.items(), reverse=True)])
    assert content.value == direct.value


def test_the_modulus_is_a_prime() -> None:
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7))


async def test_what_a_snapshot_holds_is_sealed_and_read_back() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, os.urandom(3 * OBJECT) + b"tail")
        before = await read_volume(pool, b"v")
        first = await pool.snapshots.create(b"first")
        await put(pool, b"v", 5000, b"changed")
        second = await pool.snapshots.create(b"second")
        assert await pool.sealer.seal_all()
        assert len({first.root, second.root, ""}) == 3 and second.previous_root == first.root
        assert await read_snapshot(pool, first, b"v") == before
        await everything_is_proven(pool)
        third = await pool.snapshots.create(b"third")
        await everything_is_proven(pool)
        assert third.root == second.root
        for processor in pool.processors:
            log = processor.portions.get(pool.volumes.get(b"v").volume_id)
            assert log is None or log.current_log is None or not log.current_log.summed
    async with open_world(world) as pool:
        assert pool.snapshots.get(b"second").previous_root == first.root
        await everything_is_proven(pool)
        assert await read_snapshot(pool, pool.snapshots.get(b"first"), b"v") == before
    world.check_clean()


async def test_a_damaged_block_is_never_read_and_is_named() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        blocks = [b"block %4d " % index * 372 + b"...." for index in range(64)]
        await put(pool, b"v", 0, b"".join(blocks))
        old = await pool.snapshots.create(b"old")
        await put(pool, b"v", 0, b"new")
        new = await pool.snapshots.create(b"new")
        await pool.clones.clone(b"old", b"v", b"c")
        await pool.sealer.seal_all()
        assert damage_blocks(world, b"block   17 ") == 1
        async with pool.volumes.opened(b"v") as volume:
            with pytest.raises(DamagedBlockError) as failed:
                await volume.read(17 * BLOCK + 100, 10)
            assert (failed.value.errno, failed.value.exit_code) == (errno.EIO, 4)
            with pytest.raises(DamagedBlockError):
                await volume.read(0, 64 * BLOCK)
            # Neighbours are read, and a write of part of it does not hide the damage in a new block.
            assert await volume.read(16 * BLOCK, BLOCK) == blocks[16]
            with pytest.raises(DamagedBlockError):
                await volume.write(17 * BLOCK + 5, b"part")
            assert await volume.read(18 * BLOCK + 1, 5000) == (blocks[18] + blocks[19])[1:5001]
        for snapshot in (old, new):
            with pytest.raises(DamagedBlockError):
                await read_snapshot(pool, snapshot, b"v")
        with pytest.raises(DamagedBlockError):
            await read_volume(pool, b"c")
        await pool.damage_teller.tell_all()
        (entry,) = pool.damage.entries()
        named = {one["volume"]: (one["is_live"], one["snapshots"]) for one in entry["volumes"]}  # type: ignore[attr-defined]
        assert entry["offset"] == 17 * BLOCK
        assert named == {"v": (True, ["new", "old"]), "c": (True, [])}
        assert b'"damaged-block"' in pool.events.contents
        assert not (found := await verify(pool, old)).is_proven and found.damaged == [("v", 17 * BLOCK)]
        report = await scrub(pool)
        assert [(one.object_index, one.block) for one in report.damaged] == [(0, 17)]
        # Written anew it is sound in the live volume; the snapshots stay damaged.
        await put(pool, b"v", 17 * BLOCK, b"x" * BLOCK)
        async with pool.volumes.opened(b"v") as volume:
            assert await volume.read(17 * BLOCK, BLOCK) == b"x" * BLOCK
        await pool.snapshots.delete(b"old")
        await pool.snapshots.delete(b"new")
        await pool.volumes.remove(b"c")
        await pool.reclaimer.reclaim_all()
        assert not (await scrub(pool)).damaged
        assert not pool.damage.known


async def test_zeros_that_were_data_and_data_that_was_zeros_are_damage() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"marker" + bytes(BLOCK - 6) + b"y" * BLOCK)
        # A block of zeros over one that the current log has is kept as data.
        await put(pool, b"v", OBJECT, b"first" + b"x" * 3 * BLOCK + b"last")
        await put(pool, b"v", OBJECT + BLOCK, bytes(BLOCK))
        snapshot = await pool.snapshots.create(b"s")
        await pool.sealer.seal_all()
        assert damage_blocks(world, b"marker", by=bytes(6)) == 1
        with pytest.raises(DamagedBlockError):
            await read_snapshot(pool, snapshot, b"v")
        assert damage_blocks(world, b"first", by=b"!", shift=BLOCK) == 1
        report = await scrub(pool)
        assert {(one.object_index, one.block) for one in report.damaged} == {(0, 0), (1, 1)}
        damage_blocks(world, b"first", by=b"\0", shift=BLOCK)


async def test_a_volume_that_is_open_and_not_written_to_holds_up_no_sealing() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"idle")
        await pool.volumes.create(b"busy")
        async with pool.volumes.opened(b"idle") as idle:
            await idle.write(0, b"A" * 8 * BLOCK)
            for number in range(3):
                await put(pool, b"busy", number * BLOCK, b"b" * BLOCK)
                await pool.snapshots.create(b"s%d" % number)
            await pool.sealer.seal_all()
            assert not pool.sealer.waiting()
            assert not (await scrub(pool)).unsealed_bytes
            await idle.write(BLOCK, b"B" * BLOCK)
            last = await pool.snapshots.create(b"last")
            assert await read_snapshot(pool, pool.snapshots.get(b"s2"), b"idle") == b"A" * 8 * BLOCK
            assert await read_snapshot(pool, last, b"idle") == b"A" * BLOCK + b"B" * BLOCK + b"A" * 6 * BLOCK
            await pool.sealer.seal_all()
            await everything_is_proven(pool)


async def test_what_a_scrub_found_before_it_was_stopped_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(World(processor_count=1)) as pool:
        for name in (b"v", b"w"):
            await pool.volumes.create(name)
            await put(pool, name, 0, name * BLOCK)
        await pool.snapshots.create(b"s")
        await pool.sealer.seal_all()

        async def spend(rate: object, size_bytes: int) -> None:
            pool.jobs.stop_named("mine")
            await trio.sleep_forever()

        with monkeypatch.context() as patch:
            patch.setattr("snapfs.scrub._compare", lambda file, base, mask, sums: [0])
            patch.setattr("snapfs.scrub._Rate.spend", spend)
            with pytest.raises(StoppedError):
                await scrub(pool, job_name="mine")
        assert len(pool.damage.known) == 1
        assert not (await scrub(pool)).damaged and not pool.damage.known


async def test_what_is_known_of_a_log_that_cannot_be_read_stays_known() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"marker" + bytes(BLOCK - 6) + b"y" * BLOCK)
        await pool.snapshots.create(b"s")
        await pool.sealer.seal_all()
        assert damage_blocks(world, b"marker", by=b"?") == 1
        assert [one.block for one in (await scrub(pool)).damaged] == [0]
        database = pool.processors[0].access.store.database
        rows = database.rows("SELECT log_id, guards FROM sums")
        with database.transaction():
            database.execute("UPDATE sums SET guards = zeroblob(16)")
        report = await scrub(pool)
        assert report.unreadable_logs and not report.damaged
        assert [one.block for one in pool.damage.known] == [0]
        with database.transaction():
            database.each("UPDATE sums SET guards = ?2 WHERE log_id = ?1", rows)
        assert damage_blocks(world, b"?arker", by=b"m") == 1
        assert not (await scrub(pool)).damaged and not pool.damage.known


async def test_sealing_goes_on_after_a_crash_and_keeps_no_log_from_dying() -> None:
    world = World()
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        await pool.volumes.create(b"v")
        for number in range(5):
            await put(pool, b"v", number * BLOCK, bytes([number + 1]) * 9 * BLOCK)
            await pool.snapshots.create(b"s%d" % number)
        await running.crash(CrashPlan(1))
        running = Running(world)
        await running.start(nursery)
        pool = running.pool
        await everything_is_proven(pool)
        for number in range(4):
            await pool.snapshots.delete(b"s%d" % number)
            await pool.reclaimer.reclaim_all()
            await everything_is_proven(pool)
        await pool.volumes.remove(b"v")
        await pool.snapshots.delete(b"s4")
        await pool.reclaimer.reclaim_all()
        for processor in pool.processors:
            assert not processor.access.store.database.rows("SELECT 1 FROM sums UNION SELECT 1 FROM logs")
        await running.stop()
    world.check_clean()


async def test_roots_of_clones_rollbacks_truncates_and_base_deleted_meanwhile() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, os.urandom(2 * OBJECT))
        first = await pool.snapshots.create(b"first")
        await pool.sealer.seal_all()
        await pool.clones.clone(b"first", b"v", b"c")
        await put(pool, b"c", OBJECT, b"clone")
        await pool.snapshots.create(b"with-clone")
        await pool.clones.rollback(b"first", [b"v"])
        back = await pool.snapshots.create(b"back", [b"v"])
        await pool.sealer.seal_all()
        assert back.root == first.root
        async with pool.volumes.opened(b"v") as volume:
            await pool.volumes.truncate(volume, 3 * BLOCK + 5)
        await pool.snapshots.create(b"short")
        await pool.volumes.remove(b"v")
        await pool.snapshots.create(b"gone")
        # The bases of what is to be sealed go first.
        for name in (b"first", b"with-clone"):
            await pool.snapshots.delete(name)
        await pool.reclaimer.reclaim_all()
        await everything_is_proven(pool)
    world.check_clean()


async def test_copy_on_write_and_images_are_told_as_not_covered() -> None:
    world = World()
    world.make_image("/image", b"image" * 5000)
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"w", 8 * BLOCK, COPY_ON_WRITE))
        await pool.maker.create(VolumeWish(b"i", None, source_path="/image"))
        await pool.volumes.create(b"v")
        for name in (b"w", b"i", b"v"):
            await put(pool, name, 0, name * BLOCK)
        first = await pool.snapshots.create(b"first")
        await put(pool, b"w", 0, b"2" * BLOCK)
        await pool.snapshots.create(b"second")
        await everything_is_proven(pool)
        assert sorted((await verify(pool, first)).unsealed) == ["i", "w"]
        # What was preserved is sealed all the same.
        assert damage_blocks(world, b"w" * BLOCK) >= 1
        with pytest.raises(DamagedBlockError):
            await read_snapshot(pool, first, b"w")


async def test_an_unsealed_snapshot_cannot_be_verified() -> None:
    async with open_world(World()) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1")
        snapshot = await pool.snapshots.create(b"s")
        snapshot.root = ""
        with pytest.raises(UnsealedError):
            await verify(pool, snapshot)


async def test_a_scrub_keeps_to_its_rate(mock_clock: trio.testing.MockClock) -> None:
    mock_clock.rate = 100
    async with open_world(World()) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * OBJECT)
        await pool.snapshots.create(b"s")
        await pool.sealer.seal_all()
        started = trio.current_time()
        report = await scrub(pool, 1 << 20)
        assert report.checked_bytes == OBJECT
        assert trio.current_time() - started >= 4


async def test_a_block_freed_while_it_is_read_is_not_damage() -> None:
    """A scrub looks again at what names a block that does not match."""
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * BLOCK * 4)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", BLOCK, b"2" * BLOCK)
        await pool.sealer.seal_all()
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        # Freed and punched: its checksum is still there.
        masks: list[int] = []
        for access in (processor.access for processor in pool.processors):
            for log in await access.ask(access.store.summed_logs):
                for object_index in await access.ask(access.store.summed_objects, log.log_id):
                    masks.append((await access.ask(access.store.sums, log.log_id, object_index)).mask)
        assert any(mask >> 1 & 1 for mask in masks)
        assert not (await scrub(pool)).damaged


# -- what attacks found ----------------------------------------------------------------------


@pytest.mark.parametrize("change_mode", [REDIRECT, COPY_ON_WRITE])
async def test_a_volume_removed_while_open_is_not_sealed_while_it_is_written(change_mode: int) -> None:
    async with open_world(World()) as pool:
        await pool.maker.create(VolumeWish(b"v", OBJECT, change_mode))
        await pool.volumes.create(b"w")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"0" * 4 * BLOCK)
            await pool.snapshots.create(b"s")
            await volume.write(0, b"1" * 4 * BLOCK)
            await pool.volumes.remove(b"v")
            await volume.sync()
            await pool.snapshots.create(b"other", [b"w"])

            async def write_meanwhile() -> None:
                await volume.write(0, b"2" * BLOCK)

            for processor in pool.processors:
                await sealing.seal_logs(processor, write_meanwhile)
            await volume.write(0, b"3" * 5 * BLOCK)
            assert await volume.read(0, 5 * BLOCK) == b"3" * 5 * BLOCK
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == b"0" * 4 * BLOCK + bytes(OBJECT - 4 * BLOCK)


@pytest.mark.parametrize("names", [None, [b"v"]])
async def test_an_epoch_entered_again_after_an_aborted_snapshot_has_a_log_of_its_own(names: list[bytes] | None) -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * BLOCK)
        with pytest.raises(StallError):
            await pool.snapshots.create(b"s", names, max_stall_ms=0)
        await pool.reclaimer.reclaim_all()
        await pool.sealer.seal_all()
    async with open_world(world) as pool:
        await put(pool, b"v", 0, b"2" * 10)
        await put(pool, b"v", BLOCK, b"3" * BLOCK)
        expected = b"2" * 10 + b"1" * (BLOCK - 10) + b"3" * BLOCK
        assert await read_volume(pool, b"v") == expected
        snapshot = await pool.snapshots.create(b"s")
        await everything_is_proven(pool)
        assert await read_snapshot(pool, snapshot, b"v") == expected
    world.check_clean()


async def test_a_log_that_dies_while_a_reader_waits_for_its_checksums() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"A" * BLOCK * 4)
        await pool.snapshots.create(b"s0")
        await put(pool, b"v", BLOCK, b"B" * BLOCK)
        await pool.snapshots.create(b"s1")
        await pool.sealer.seal_all()
    async with open_world(world) as pool:
        sums = pool.processors[0].logs.sums
        load, count = sums._load, 0

        async def late(log_id: int, object_index: int) -> ObjectSums:
            nonlocal count
            found = await load(log_id, object_index)
            count += 1
            if count == 2:
                await volume.write(0, b"C" * BLOCK * 4)
                await pool.snapshots.delete(b"s0")
                await pool.snapshots.delete(b"s1")
                await pool.reclaimer.reclaim_all()
            return found

        sums._load = late
        async with pool.volumes.opened(b"v") as volume:
            # Through a thread, as when the device would have to wait.
            segments = volume._segments(0, 4 * BLOCK) if await warm(volume) else []
            sums.known.clear()
            for log in pool.processors[0].logs.known.values():
                if isinstance(log.file, SealedFile):
                    log.file._known.clear()
            buffer = memoryview(bytearray(4 * BLOCK))
            with contextlib.suppress(DamagedBlockError):
                # What was freed meanwhile is looked at again by whoever asked; but no closed file is read.
                await segments[0][0].read_segments(segments[0][1], buffer)
            assert await volume.read(0, 4 * BLOCK) == b"C" * BLOCK * 4


async def warm(volume: Volume) -> bool:
    """Have its maps and logs in memory."""
    await volume.read(0, volume.size_bytes)
    return True


async def test_a_clone_written_while_it_is_flattened_is_not_damaged() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"A" * BLOCK * 4)
        await pool.snapshots.create(b"s0")
        await pool.sealer.seal_all()
        await pool.clones.clone(b"s0", b"v", b"c")
        await pool.volumes.remove(b"v")
        await pool.snapshots.delete(b"s0")
        await pool.reclaimer.reclaim_all()
        sums = pool.processors[0].logs.sums
        load, count = sums._load, 0
        for of_log in sums.known.values():
            of_log.clear()
        async with pool.volumes.opened(b"c") as volume:

            async def late(log_id: int, object_index: int) -> ObjectSums:
                nonlocal count
                found = await load(log_id, object_index)
                count += 1
                if count == 1:
                    await volume.write(BLOCK, b"new!" * 1024)
                    await pool.sync()
                    await pool.reclaimer.reclaim_all()
                return found

            sums._load = late
            await pool.clones.flatten(b"c")
            assert bytes(await volume.read(0, 3 * BLOCK))[::BLOCK] == b"AnA"
        assert not pool.damage.known
    world.check_clean()


async def test_one_log_that_cannot_be_read_keeps_no_other_from_being_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(World(processor_count=1)) as pool:
        await pool.volumes.create(b"a")
        await pool.volumes.create(b"b")
        await put(pool, b"a", 0, b"A" * BLOCK)
        await put(pool, b"b", 0, b"B" * BLOCK)
        real = sealing.read_sums
        failed = 0

        def read(file: DeviceFile, base: int, mask: int) -> ObjectSums:
            nonlocal failed
            sums = real(file, base, mask)
            if sums.digests == digest_of(b"A" * BLOCK):
                failed += 1
                raise OSError(errno.EIO, "I/O error")
            return sums

        with monkeypatch.context() as patch:
            patch.setattr(sealing, "read_sums", read)
            bad = await pool.snapshots.create(b"s-a", [b"a"])
            good = await pool.snapshots.create(b"s-b", [b"b"])
            assert not await pool.sealer.seal_all()
            assert good.root and not bad.root and failed
            assert pool.events.contents.count(b"sealing-failed") == 1
        await everything_is_proven(pool)


async def test_damaged_checksums_are_told_and_a_damaged_content_hash_is_worked_out_anew() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 100 * BLOCK)
        await pool.snapshots.create(b"first")
        await pool.sealer.seal_all()
        database = pool.processors[0].access.store.database
        with database.transaction():
            database.execute("UPDATE contents SET value = zeroblob(392)")
        await put(pool, b"v", 0, b"2" * BLOCK)
        await pool.snapshots.create(b"second")
        await everything_is_proven(pool)
        with database.transaction():
            database.execute("UPDATE contents SET value = zeroblob(500)")
        await put(pool, b"v", 0, b"3" * BLOCK)
        await pool.snapshots.create(b"third")
        await everything_is_proven(pool)
        (checksums,) = database.row("SELECT checksums FROM sums WHERE log_id = 1") or ()
        with database.transaction():
            database.execute("UPDATE sums SET checksums = zeroblob(800) WHERE log_id = 1")
        pool.processors[0].logs.sums.known[1].clear()
        with pytest.raises(DamagedError, match="checksums of object 0"):
            await read_volume(pool, b"v")
        assert (await scrub(pool)).unreadable_logs
        report = check_of(world)
        assert any("checksums of object 0 in change log 1" in finding.what for finding in report.findings)
        with database.transaction():
            database.execute("DELETE FROM sums WHERE log_id = 1 AND ? > 0", (1,))
        report = check_of(world)
        assert any("have no checksum" in finding.what for finding in report.findings)
        assert len(cast("bytes", checksums)) == 800
        await pool.snapshots.delete(b"first")
        await pool.snapshots.delete(b"second")
        await pool.snapshots.delete(b"third")
        await pool.volumes.remove(b"v")
        await pool.reclaimer.reclaim_all()
    world.check_clean()


def check_of(world: World) -> Report:
    """What the verifier says of a pool that is open, of which all is durable."""
    copy = World.__new__(World)
    copy.home = in_memory(world.home).crash(CrashPlan(0, 0.0))
    copy.outside = world.outside
    copy.devices = {path: in_memory(device).crash(CrashPlan(0, 0.0)) for path, device in world.devices.items()}
    return check_pool(copy.home, WHERE, copy.open_device, copy.has_image)


async def test_a_sealed_log_that_was_cut_off_gives_no_zeros() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 8 * BLOCK)
        snapshot = await pool.snapshots.create(b"s")
        await pool.sealer.seal_all()
        (device,) = world.devices.values()
        file = device.open("logs/0/00000001")
        contents = bytearray(8 * BLOCK)
        file.read_into(contents, 0)
        file.truncate(4 * BLOCK + 100)
        with pytest.raises(DamagedBlockError):
            await read_snapshot(pool, snapshot, b"v")
        file.write(contents, 0)
        assert await read_snapshot(pool, snapshot, b"v") == contents
        file.close()


async def test_nothing_is_kept_for_volumes_that_went_before_they_were_sealed() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for number in range(4):
            await put(pool, b"v", 0, os.urandom(BLOCK))
            async with pool.sealer._turn:
                await pool.snapshots.create(b"s%d" % number)
                if number == 3:
                    await pool.volumes.remove(b"v")
                else:
                    await pool.clones.rollback(b"s%d" % number, [b"v"])
                await pool.reclaimer.reclaim_all()
            await pool.sealer.seal_all()
        for name in list(pool.snapshots.by_name):
            await pool.snapshots.delete(name)
        await pool.reclaimer.reclaim_all()
        await pool.reclaimer.reclaim_all()
        for processor in pool.processors:
            assert not processor.access.store.database.rows("SELECT 1 FROM contents UNION SELECT 1 FROM sums")
    world.check_clean()


async def make_versions(pool: Pool, count: int, rng: random.Random) -> list[Snapshot]:
    """Snapshots with a few blocks of two objects written between each and the next, one of them deleted.

    The pool's task seals none meanwhile.
    """
    made = []
    async with pool.sealer._turn:
        for number in range(count):
            for _ in range(3):
                place = rng.choice((0, 4 * OBJECT)) + rng.randrange(40) * BLOCK
                await put(pool, b"v", place, rng.choice((bytes(BLOCK), rng.randbytes(BLOCK))))
            made.append(await pool.snapshots.create(b"s%d" % number))
        # The last of its logs takes no more writes.
        await put(pool, b"v", 0, rng.randbytes(BLOCK))
        await pool.snapshots.delete(made.pop(count // 3).name or b"")
    return made


@pytest.mark.parametrize("seed", range(3))
async def test_many_are_sealed_at_once_with_the_roots_that_each_would_have_alone(seed: int) -> None:
    world = World(processor_count=2)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        made = await make_versions(pool, 40, random.Random(seed))
        assert await pool.sealer.seal_all()
        assert [one.previous_root for one in made] == ["", *(one.root for one in made[:-1])]
        # By a look at all of what each holds.
        await everything_is_proven(pool)
    async with open_world(world) as pool:
        again = [pool.snapshots.get(one.name or b"") for one in made]
        assert [(one.root, one.previous_root) for one in again] == [(one.root, one.previous_root) for one in made]
        # From what was stored of the content, or without.
        await make_more(pool, seed)
        await everything_is_proven(pool)
    world.check_clean()


async def make_more(pool: Pool, seed: int) -> None:
    if seed == 2:
        for name in list(pool.snapshots.by_name)[:-1]:
            await pool.snapshots.delete(name)
        await pool.reclaimer.reclaim_all()
    await put(pool, b"v", 7 * BLOCK, os.urandom(BLOCK))
    await pool.snapshots.create(b"more")


async def test_of_an_object_only_what_changed_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[int] = []
    sums = ShardStore.sums

    def noting(store: ShardStore, log_id: int, object_index: int) -> ObjectSums:
        looked_up.append(log_id)
        return sums(store, log_id, object_index)

    monkeypatch.setattr(ShardStore, "sums", noting)
    async with open_world(World(processor_count=1)) as pool:
        await pool.volumes.create(b"v")
        await make_versions(pool, 60, random.Random(1))
        assert await pool.sealer.seal_all()
        # Three blocks of two objects each time; all the logs before would be some thousands.
        assert len(looked_up) <= 60 * 3 + 10
        ((_, lookups),) = pool.sealer._lookups.items()
        digests = lookups.digests
        small = ObjectDigests(pool.processors[0].access.store, kept_objects_max=1)
        volume_id = pool.volumes.get(b"v").volume_id
        for instant in (20, 10, 30, 10):
            for row in pool.processors[0].access.store.maps_at(volume_id, instant):
                known = digests.of(volume_id, row.object_index, row.block_map)
                assert small.of(volume_id, row.object_index, row.block_map) == known
        assert len(small._kept) == 1


async def test_a_lot_that_cannot_be_noted_is_sealed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        made = await make_versions(pool, 5, random.Random(1))
        with monkeypatch.context() as patch:

            async def fail(*args: object) -> None:
                raise NoSpaceError("the catalog's device is full")

            patch.setattr(pool.sealer, "_note_roots", fail)
            assert not await pool.sealer.seal_all()
        assert not any(one.root for one in made)
        assert b"sealing-failed" in pool.events.contents and b"is full" in pool.events.contents
        assert await pool.sealer.seal_all()
        await everything_is_proven(pool)
    world.check_clean()


async def test_a_log_that_cannot_be_read_keeps_those_read_with_it_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    read_some = sealing._read_some
    async with open_world(world) as pool:
        names = (b"before", b"bad", b"behind")
        async with pool.sealer._turn:
            for name in names:
                await pool.volumes.create(name)
                await put(pool, name, 0, os.urandom(3 * BLOCK))
                await pool.snapshots.create(name, [name])
                await put(pool, name, 0, os.urandom(BLOCK))
        bad_id = pool.volumes.get(b"bad").volume_id
        store = pool.processors[0].access.store
        (bad_log, *_) = store.logs_of(bad_id)

        def fail_for_one(processor: Processor, log_id: LogId, *rest: object) -> object:
            if log_id == bad_log.log_id:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read_some(processor, log_id, *rest)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(sealing, "_read_some", fail_for_one)
            assert not await pool.sealer.seal_all()
            assert [bool(pool.snapshots.get(name).root) for name in names] == [True, False, True]
            before, behind = pool.snapshots.get(b"before"), pool.snapshots.get(b"behind")
            assert behind.previous_root == before.root
            assert b'"event": "snapshot-sealed", "name": "before"' in pool.events.contents
        assert await pool.sealer.seal_all()
        await everything_is_proven(pool)
    world.check_clean()


async def test_a_lot_of_logs_whose_checksums_are_lost_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    monkeypatch.setattr(sealing, "_BATCH", 2)
    async with open_world(world) as pool:
        async with pool.sealer._turn:
            for number in range(3):
                await pool.volumes.create(b"v%d" % number)
                await put(pool, b"v%d" % number, 0, os.urandom(BLOCK))
            await pool.snapshots.create(b"s")
            for number in range(3):
                await put(pool, b"v%d" % number, 0, os.urandom(BLOCK))
        (processor,) = pool.processors
        commit = processor.commit
        failures = iter([NoSpaceError("the device is full")])

        async def fail_once(portions: object = None, batch: ShardBatch | None = None, *rest: object) -> int:
            if batch is not None and batch.sums:
                for failure in failures:
                    raise failure
            return await commit(portions, batch, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(processor, "commit", fail_once)
        # The pool's task may meet it.
        await pool.sealer.seal_all()
        assert await pool.sealer.seal_all()
        assert not list(failures) and b"the device is full" in pool.events.contents
        await everything_is_proven(pool)
    world.check_clean()


async def test_more_content_hashes_than_are_kept_are_stored_before_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealer, "_CONTENTS_MAX", 4)
    whole: list[int] = []
    look = sealing._whole_content

    async def noting(processor: Processor, digests: ObjectDigests, volume_id: VolumeId, instant: int) -> int:
        whole.append(volume_id)
        return await look(processor, digests, volume_id, instant)

    async with open_world(World(processor_count=2)) as pool:
        for number in range(8):
            await pool.volumes.create(b"v%d" % number)
            await put(pool, b"v%d" % number, 0, os.urandom(BLOCK))
        await pool.snapshots.create(b"first")
        await put(pool, b"v0", 0, os.urandom(BLOCK))
        assert await pool.sealer.seal_all() and len(pool.sealer._contents) == 4
        monkeypatch.setattr(sealing, "_whole_content", noting)
        for number in range(3):
            await pool.snapshots.create(b"s%d" % number)
            await put(pool, b"v0", 0, os.urandom(BLOCK))
        assert await pool.sealer.seal_all()
        # Of the half without a block nothing is stored, and a look at it is a look at nothing.
        stored = {one for processor in pool.processors for one in processor.access.store.content_volume_ids()}
        assert len(stored) == 8
        assert all(whole.count(one) <= 3 for one in stored)
        await everything_is_proven(pool)


async def test_what_was_just_sealed_is_read_without_looking_its_checksums_up() -> None:
    world = World(processor_count=2)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        contents = os.urandom(2 * OBJECT)
        await put(pool, b"v", 0, contents)
        snapshot = await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"new")
        assert await pool.sealer.seal_all()
        looked_up = 0

        async def noting(log_id: int, object_index: int) -> ObjectSums:
            nonlocal looked_up
            looked_up += 1
            return await load(log_id, object_index)

        for processor in pool.processors:
            sums = processor.logs.sums
            load, sums._load = sums._load, noting
            for of_log in sums.known.values():
                for one in of_log.values():
                    assert one.mask is FULL_MASK and not one.digests
            assert sums._size_bytes == sum(one.size_bytes for of_log in sums.known.values() for one in of_log.values())
        assert await read_snapshot(pool, snapshot, b"v") == contents
        assert looked_up == 0
    world.check_clean()
