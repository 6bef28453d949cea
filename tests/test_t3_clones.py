"""Clones, rollbacks and holds on pools in memory: contents, space to the block, crashes in between."""

from __future__ import annotations

import json

import pytest
import trio

from snapfs.backends import CrashPlan
from snapfs.errors import BusyVolumeError, DamagedError, ExistsError, HeldError, NotFoundError
from snapfs.notresident import when_resident
from snapfs.pool import Pool
from snapfs.portion import Portion, Segment

from .harness import Running, World, damage_blocks, open_world, read_snapshot, read_volume

OBJECT = 4 << 20
BLOCK = 4096


async def put(pool: Pool, name: bytes, offset: int, data: bytes) -> None:
    async with pool.volumes.opened(name) as volume:
        await volume.write(offset, data)


def allocated_blocks(world: World) -> int:
    """Blocks that all change logs together take on the devices."""
    total = 0
    for device in world.devices.values():
        for folder in (f"logs/{index}" for index in range(4)):
            for name in device.names(folder):
                file = device.open(f"{folder}/{name}")
                total += sum(end - start for start, end in file.data_extents())
                file.close()
    return total // BLOCK


async def test_a_clone_starts_as_the_snapshot_and_goes_its_own_way() -> None:
    async with open_world(World()) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 3 * OBJECT)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"2" * BLOCK)
        clone = await pool.clones.clone(b"s", b"v", b"c")
        assert clone.block_count == 3 * 1024
        assert await read_volume(pool, b"c") == b"1" * 3 * OBJECT
        await put(pool, b"c", OBJECT + 10, b"3" * 20)
        expected = bytearray(b"1" * 3 * OBJECT)
        expected[OBJECT + 10 : OBJECT + 30] = b"3" * 20
        assert await read_volume(pool, b"c") == expected
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == b"1" * 3 * OBJECT
        assert (await read_volume(pool, b"v"))[:BLOCK] == b"2" * BLOCK


async def test_a_clone_of_a_clone_of_a_clone() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v0")
        expected = bytearray(20 * BLOCK)
        for depth in range(12):
            data = bytes([depth + 1]) * BLOCK
            await put(pool, b"v%d" % depth, depth * BLOCK, data)
            expected[depth * BLOCK : (depth + 1) * BLOCK] = data
            await pool.snapshots.create(b"s%d" % depth)
            await pool.clones.clone(b"s%d" % depth, b"v%d" % depth, b"v%d" % (depth + 1))
        assert await read_volume(pool, b"v12") == expected[: 12 * BLOCK]
        for depth in range(12):
            await pool.snapshots.delete(b"s%d" % depth)
            await pool.volumes.remove(b"v%d" % depth)
        await pool.reclaimer.reclaim_all()
        assert await read_volume(pool, b"v12") == expected[: 12 * BLOCK]
        assert pool.reclaimer.waiting_count == 0
        assert allocated_blocks(world) == 12
    world.check_clean()
    async with open_world(world) as pool:
        assert await read_volume(pool, b"v12") == expected[: 12 * BLOCK]
    world.check_clean()


async def test_the_space_of_a_deleted_origin_comes_back_to_the_block() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 100 * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"2" * 100 * BLOCK)
        await pool.clones.clone(b"s", b"v", b"c")
        await put(pool, b"c", 0, b"3" * 40 * BLOCK)
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert b"s" not in pool.snapshots.by_name
        # Live v, what c has written, and the 60 old blocks that c still shows.
        assert allocated_blocks(world) == 100 + 40 + 60
        assert await read_volume(pool, b"c") == b"3" * 40 * BLOCK + b"1" * 60 * BLOCK
        await put(pool, b"c", 40 * BLOCK, b"4" * 10 * BLOCK)
        await pool.volumes.get(b"c").sync()
        await pool.reclaimer.reclaim_all()
        assert allocated_blocks(world) == 100 + 50 + 50
        await pool.volumes.remove(b"c")
        await pool.reclaimer.reclaim_all()
        assert allocated_blocks(world) == 100
        assert not pool.volumes.traits.rows
    world.check_clean()


async def test_a_removed_source_lives_on_in_its_clone_only_as_far_as_needed() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 10 * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 20 * BLOCK, b"2" * 10 * BLOCK)
        await pool.clones.clone(b"s", b"v", b"c")
        await pool.volumes.remove(b"v")
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert allocated_blocks(world) == 10
        assert await read_volume(pool, b"c") == b"1" * 10 * BLOCK
    world.check_clean()


async def test_a_snapshot_of_a_clone_survives_the_clone_and_the_origin() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 2 * OBJECT)
        await pool.snapshots.create(b"s")
        await pool.clones.clone(b"s", b"v", b"c")
        await put(pool, b"c", 0, b"2" * BLOCK)
        await pool.snapshots.create(b"t", [b"c"])
        await put(pool, b"c", BLOCK, b"3" * BLOCK)
        await pool.volumes.remove(b"c")
        await pool.volumes.remove(b"v")
        await pool.reclaimer.reclaim_all()
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert await read_snapshot(pool, pool.snapshots.get(b"t"), b"c") == b"2" * BLOCK + b"1" * (2 * OBJECT - BLOCK)
    world.check_clean()
    async with open_world(world) as pool:
        assert await read_snapshot(pool, pool.snapshots.get(b"t"), b"c") == b"2" * BLOCK + b"1" * (2 * OBJECT - BLOCK)
        await pool.snapshots.delete(b"t")
        await pool.reclaimer.reclaim_all()
        assert allocated_blocks(world) == 0
    world.check_clean()


async def test_flatten_makes_a_clone_independent() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * OBJECT)
        await pool.snapshots.create(b"s")
        await pool.clones.clone(b"s", b"v", b"c")
        await put(pool, b"c", 5 * BLOCK, b"2" * BLOCK)
        assert await pool.clones.flatten(b"c") == OBJECT - BLOCK
        expected = b"1" * 5 * BLOCK + b"2" * BLOCK + b"1" * (OBJECT - 6 * BLOCK)
        assert await read_volume(pool, b"c") == expected
        assert not pool.volumes.traits.get(pool.volumes.get(b"c").volume_id).inherits
        await pool.volumes.remove(b"v")
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert allocated_blocks(world) == 1024
        assert await read_volume(pool, b"c") == expected
        assert await pool.clones.flatten(b"c") == 0
    world.check_clean()


async def test_what_lies_behind_a_clones_size_never_shows() -> None:
    async with open_world(World()) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 3 * OBJECT)
        await pool.snapshots.create(b"s")
        await pool.clones.clone(b"s", b"v", b"c")
        volume = pool.volumes.get(b"c")
        await pool.volumes.truncate(volume, 100)
        await pool.volumes.truncate(volume, 3 * OBJECT)
        assert await read_volume(pool, b"c") == b"1" * 100 + bytes(3 * OBJECT - 100)
        assert volume.block_count == 1


async def test_a_rollback_can_be_undone_and_newer_snapshots_stay() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v", mode=0o640)
        await put(pool, b"v", 0, b"1" * 10 * BLOCK)
        await pool.snapshots.create(b"first")
        await put(pool, b"v", 0, b"2" * 20 * BLOCK)
        await pool.snapshots.create(b"second")
        await put(pool, b"v", 0, b"3" * BLOCK)
        file_id = pool.volumes.get(b"v").file_id
        undo = (await pool.clones.rollback(b"first")).undo
        assert await read_volume(pool, b"v") == b"1" * 10 * BLOCK
        assert pool.volumes.get(b"v").file_id == file_id
        assert pool.volumes.get(b"v").mode == 0o640
        assert await read_snapshot(pool, pool.snapshots.get(b"second"), b"v") == b"2" * 20 * BLOCK
        assert undo.name is not None and undo.name.endswith(b"-before-rollback")
        await put(pool, b"v", 9 * BLOCK, b"4" * BLOCK)
        again = (await pool.clones.rollback(undo.name)).undo
        assert await read_volume(pool, b"v") == b"3" * BLOCK + b"2" * 19 * BLOCK
        assert await read_snapshot(pool, again, b"v") == b"1" * 9 * BLOCK + b"4" * BLOCK
        await pool.clones.rollback(b"second")
        assert await read_volume(pool, b"v") == b"2" * 20 * BLOCK
    world.check_clean()
    async with open_world(world) as pool:
        assert await read_volume(pool, b"v") == b"2" * 20 * BLOCK
        assert pool.volumes.get(b"v").file_id == file_id
        for name in list(pool.snapshots.by_name):
            await pool.snapshots.delete(name)
        await pool.reclaimer.reclaim_all()
        assert await read_volume(pool, b"v") == b"2" * 20 * BLOCK
        assert allocated_blocks(world) == 20
    world.check_clean()


async def test_a_rollback_brings_back_what_was_removed() -> None:
    async with open_world(World()) as pool:
        await pool.volumes.create(b"v")
        await pool.volumes.create(b"w")
        await put(pool, b"v", 0, b"v" * BLOCK)
        await put(pool, b"w", 0, b"w" * BLOCK)
        await pool.snapshots.create(b"s")
        await pool.volumes.remove(b"w")
        await pool.volumes.create(b"later")
        await put(pool, b"v", 0, b"x" * BLOCK)
        await pool.reclaimer.reclaim_all()
        await pool.clones.rollback(b"s")
        assert set(pool.volumes.by_name) == {b"v", b"w", b"later"}
        assert await read_volume(pool, b"v") == b"v" * BLOCK
        assert await read_volume(pool, b"w") == b"w" * BLOCK
        await pool.clones.rollback(b"s")
        assert await read_volume(pool, b"w") == b"w" * BLOCK


async def test_a_rollback_of_one_that_was_renamed_is_told_by_its_name_of_now() -> None:
    """What had another name by then went back silently when the old name was given."""
    async with open_world(World()) as pool:
        for name in (b"v", b"w"):
            await pool.volumes.create(name)
            await put(pool, name, 0, name * BLOCK)
        await pool.snapshots.create(b"s")
        for name in (b"v", b"w"):
            await put(pool, name, 0, b"x" * BLOCK)
        await pool.volumes.rename(b"v", b"archive")
        with pytest.raises(NotFoundError, match="is 'archive' now"):
            await pool.clones.rollback(b"s", [b"w", b"v"])
        for name in (b"archive", b"w"):
            assert await read_volume(pool, name) == b"x" * BLOCK
        await pool.volumes.rename(b"w", b"v")
        # What has the name now is something else.
        with pytest.raises(NotFoundError, match="is 'archive' now"):
            await pool.clones.rollback(b"s", [b"v"])
        done = await pool.clones.rollback(b"s")
        assert sorted(done.names) == [b"archive", b"v"]
        assert await read_volume(pool, b"archive") == b"v" * BLOCK
        assert await read_volume(pool, b"v") == b"w" * BLOCK
        events = [json.loads(line) for line in pool.events.contents.splitlines()]
        (told,) = [one["volumes"] for one in events if one["event"] == "rolled-back"]
        assert sorted(told) == ["archive", "v"]


async def test_a_rollback_refuses_open_volumes_and_taken_names_and_changes_nothing() -> None:
    async with open_world(World()) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"2" * BLOCK)
        async with pool.volumes.opened(b"v") as volume:
            with pytest.raises(BusyVolumeError):
                await pool.clones.rollback(b"s")
            assert set(pool.snapshots.by_name) == {b"s"}
            await pool.clones.rollback(b"s", force=True)
            assert bytes(await volume.read(0, BLOCK)) == b"1" * BLOCK
            await volume.write(0, b"3" * BLOCK)
        assert await read_volume(pool, b"v") == b"3" * BLOCK
        await pool.volumes.remove(b"v")
        await pool.volumes.create(b"v")
        with pytest.raises(ExistsError):
            await pool.clones.rollback(b"s")
        with pytest.raises(NotFoundError):
            await pool.clones.rollback(b"s", [b"none"])
        with pytest.raises(NotFoundError):
            await pool.clones.rollback(b"none")


async def test_readers_during_a_forced_rollback_see_one_side_or_the_other() -> None:
    span, at = 64 * BLOCK, OBJECT - 32 * BLOCK
    async with open_world(World()) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", at, b"a" * span)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", at, b"b" * span)
        done = trio.Event()
        seen = set()

        async def read() -> None:
            async with pool.volumes.opened(b"v") as volume:
                while not done.is_set():
                    found = bytes(await volume.read(at, span))
                    assert found in (b"a" * span, b"b" * span), "a mix was read"
                    seen.add(found[:1])
                    await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for _ in range(4):
                undo = (await pool.clones.rollback(b"s", force=True)).undo
                await trio.sleep(0.005)
                assert undo.name is not None
                await pool.clones.rollback(undo.name, force=True)
            done.set()
        assert seen == {b"a", b"b"}


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
async def test_a_rollback_that_returned_survives_a_power_cut(keep: float) -> None:
    world = World()
    async with trio.open_nursery() as nursery:
        running = Running(world)
        await running.start(nursery)
        pool = running.pool
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 10 * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"2" * 10 * BLOCK)
        undo = (await pool.clones.rollback(b"s")).undo
        await pool.clones.clone(b"s", b"v", b"c")
        await running.crash(CrashPlan(5, keep))
        world.check()
        running = Running(world)
        await running.start(nursery)
        pool = running.pool
        assert await read_volume(pool, b"v") == b"1" * 10 * BLOCK
        assert await read_volume(pool, b"c") == b"1" * 10 * BLOCK
        assert undo.name is not None
        assert await read_snapshot(pool, pool.snapshots.get(undo.name), b"v") == b"2" * 10 * BLOCK
        await pool.reclaimer.reclaim_all()
        await running.stop()
    world.check_clean()


async def test_holds() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await pool.snapshots.create(b"s", hold_tags=["audit"])
        await pool.snapshots.hold(b"s", "backup")
        with pytest.raises(ExistsError):
            await pool.snapshots.hold(b"s", "backup")
    async with open_world(world) as pool:
        with pytest.raises(HeldError, match="audit, backup"):
            await pool.snapshots.delete(b"s")
        await pool.snapshots.release(b"s", "audit")
        with pytest.raises(NotFoundError):
            await pool.snapshots.release(b"s", "audit")
        with pytest.raises(HeldError):
            await pool.snapshots.delete(b"s")
        await pool.snapshots.release(b"s", "backup")
        await pool.snapshots.delete(b"s")


async def test_blocks_of_zeros_become_holes() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        volume = pool.volumes.get(b"v")
        await put(pool, b"v", 0, bytes(3 * OBJECT))
        assert volume.size_bytes == 3 * OBJECT and volume.block_count == 0
        await put(pool, b"v", 0, b"1" * 10 * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 2 * BLOCK, bytes(4 * BLOCK))
        assert volume.block_count == 6
        # One of zeros and other bytes is data, and so is one of this epoch that is written over.
        await put(pool, b"v", 0, b"2" + bytes(BLOCK - 1))
        await put(pool, b"v", 0, bytes(BLOCK))
        assert volume.block_count == 6
        assert await read_volume(pool, b"v") == bytes(BLOCK) + b"1" * BLOCK + bytes(
            4 * BLOCK
        ) + b"1" * 4 * BLOCK + bytes(3 * OBJECT - 10 * BLOCK)
        assert (await read_snapshot(pool, pool.snapshots.get(b"s"), b"v"))[: 10 * BLOCK] == b"1" * 10 * BLOCK
    assert allocated_blocks(world) == 10 + 1
    world.check_clean()


async def test_many_rollbacks_leave_no_long_line() -> None:
    """Each makes the volume a clone of the one before, of which nothing is left in the end."""
    world = World(2, 1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"a")
        for number in range(40):
            async with pool.volumes.opened(b"a") as volume:
                await volume.write(number % 3 * 4096, bytes([number + 1]) * 4096)
            await pool.snapshots.create(b"s")
            async with pool.volumes.opened(b"a") as volume:
                await volume.write(0, b"x" * 9000)
            expected = await read_snapshot(pool, pool.snapshots.get(b"s"), b"a")
            undo = (await pool.clones.rollback(b"s", None)).undo
            assert undo.name is not None
            for name in (undo.name, b"s"):
                await pool.snapshots.delete(name)
            await pool.reclaimer.reclaim_all()
            assert await read_volume(pool, b"a") == expected
        # Those that three blocks lie in at most, and the live one.
        assert len(pool.volumes.traits.rows) <= 4
        await pool.reclaimer.reclaim_all()
    async with open_world(world) as pool:
        assert await read_volume(pool, b"a") == expected
        assert len(pool.volumes.traits.rows) <= 4
    world.check_clean()


async def test_what_lies_in_pieces_is_flattened_some_pieces_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for number in range(40):
            await put(pool, b"v", 2 * number * BLOCK, bytes([number + 1]) * BLOCK)
            if number % 10 == 9:
                await pool.snapshots.create(b"s%d" % number)
        expected = await read_volume(pool, b"v")
        await pool.clones.clone(b"s39", b"v", b"c")
        read_count = 0
        read_segments = Portion.read_segments

        async def counted(self: Portion, segments: list[Segment], view: memoryview) -> None:
            nonlocal read_count
            read_count += 1
            await read_segments(self, segments, view)

        monkeypatch.setattr(Portion, "read_segments", counted)
        assert await pool.clones.flatten(b"c") == 40 * BLOCK
        monkeypatch.undo()
        assert read_count <= 2
        assert await read_volume(pool, b"c") == expected


async def test_one_damaged_piece_keeps_no_other_from_being_flattened() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for number in range(5):
            await put(pool, b"v", 2 * number * BLOCK, b"%05d" % number + bytes(BLOCK - 5))
        await pool.snapshots.create(b"s")
        assert await pool.sealer.seal_all()
        await pool.clones.clone(b"s", b"v", b"c")
        assert damage_blocks(world, b"00002", by=b"?") == 1
        for _ in range(2):
            with pytest.raises(DamagedError):
                await pool.clones.flatten(b"c")
        # Only the damaged one, and what comes after it, can still be others' alone.
        portion = pool.processors[0].portion(pool.volumes.get(b"c").volume_id)
        shared = [block for block, _, _ in await when_resident(lambda _: portion.shared_runs_now(0))]
        assert shared[0] == 4 and 0 not in shared and 2 not in shared
        await put(pool, b"c", 4 * BLOCK, b"anew" + bytes(BLOCK - 4))
        await pool.clones.flatten(b"c")
        assert not await when_resident(lambda _: portion.shared_runs_now(0))
        assert damage_blocks(world, b"?0002", by=b"0") == 1
