"""Deleted snapshots are taken apart together, with rests while volumes are used."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
import trio.testing

from snapfs import changelog, reclaim, reclaimer
from snapfs.blockmasks import named_masks
from snapfs.changelog import ChangeLog
from snapfs.errors import DamagedError
from snapfs.formats import COPY_ON_WRITE, REDIRECT, ShardBatch
from snapfs.geometry import SnapshotId, VolumeId
from snapfs.making import VolumeWish
from snapfs.pool import Pool
from snapfs.processor import Processor
from snapfs.reclaim import Deleted, unheld_spans
from snapfs.snapshotindex import NEVER, SnapshotIndex

from .harness import Running, World, everything_is_proven, open_world, read_snapshot, read_volume

BLOCK = 4096
OBJECT = 4 << 20
VOLUMES = {b"r": REDIRECT, b"c": COPY_ON_WRITE}


async def make_history(pool: Pool, count: int, rng: random.Random) -> dict[bytes, dict[bytes, bytes]]:
    """Snapshots with a few writes between each and the next; what they hold."""
    held: dict[bytes, dict[bytes, bytes]] = {}
    for volume, mode in VOLUMES.items():
        await pool.maker.create(VolumeWish(volume, OBJECT + 8 * BLOCK, mode))
    for number in range(count):
        name = b"s%d" % number
        for volume in VOLUMES:
            async with pool.volumes.opened(volume) as opened:
                for _ in range(rng.randrange(4)):
                    place = rng.choice((0, OBJECT)) + rng.randrange(6) * BLOCK
                    await opened.write(place, rng.randbytes(rng.choice((100, BLOCK, 2 * BLOCK))))
        # Some hold one volume alone.
        of = rng.choice([None, None, [b"r"], [b"c"]])
        await pool.snapshots.create(name, of)
        held[name] = {volume: await read_volume(pool, volume) for volume in of or VOLUMES}
    return held


@pytest.mark.parametrize("seed", range(6))
async def test_what_is_deleted_together_goes_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    world = World(processor_count=2)
    async with open_world(world) as pool:
        held = await make_history(pool, 60, rng)
        names = list(held)
        while names:
            doomed = rng.sample(names, rng.randrange(1, len(names) + 1))
            # The pool's own task would take one apart while the next is still there.
            async with pool.reclaimer._turn:
                for name in doomed:
                    await pool.snapshots.delete(name)
                    names.remove(name)
            await pool.reclaimer.reclaim_all()
            assert pool.reclaimer.waiting_count == 0
            for name in names:
                for volume, contents in held[name].items():
                    assert await read_snapshot(pool, pool.snapshots.get(name), volume) == contents
    world.check_clean()


def test_spans_of_deleted_snapshots_do_not_overlap() -> None:
    index = SnapshotIndex()
    for instant in (30, 70):
        index.add(instant, None)

    def spans(*deleted: tuple[int, list[int] | None]) -> list[tuple[int, int]]:
        volumes = [(at, None if ids is None else [VolumeId(one) for one in ids]) for at, ids in deleted]
        return unheld_spans(index, [Deleted(SnapshotId(at), at, ids) for at, ids in volumes])

    assert spans((80, None), (10, None), (20, None), (40, None), (90, None)) == [(10, 30), (40, 70), (80, NEVER)]
    assert spans() == []
    # Of some volumes: up to the next of all, or of each of them.
    index.add(45, [VolumeId(1)])
    index.add(50, [VolumeId(1), VolumeId(2)])
    assert spans((40, [1])) == [(40, 45)] and spans((40, [1, 2])) == [(40, 50)] and spans((40, [1, 3])) == [(40, 70)]
    assert spans((60, [2])) == [(60, 70)] and spans((80, [1])) == [(80, NEVER)] and spans((40, [])) == [(40, 41)]
    assert spans((40, [1]), (42, [3]), (60, [1])) == [(40, 70)]
    assert spans((40, [2]), (41, [1]), (51, [1])) == [(40, 50), (51, 70)]


@pytest.mark.parametrize("is_short", [False, True])
async def test_it_rests_between_its_steps_and_less_when_room_is_short(
    is_short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[bool] = []

    async def rest(*, is_pressed: bool = False) -> None:
        rests.append(is_pressed)
        await trio.lowlevel.checkpoint()

    async def used_percent(pool: Pool) -> int:
        return 95 if is_short else 50

    monkeypatch.setattr(Pool, "used_percent", used_percent)
    world = World(processor_count=2)
    async with open_world(world) as pool:
        await make_history(pool, 100, random.Random(1))
        monkeypatch.setattr(pool.reclaimer._pace, "rest", rest)
        async with pool.reclaimer._turn:
            for number in range(80):
                await pool.snapshots.delete(b"s%d" % number)
        await pool.reclaimer.reclaim_all(gently=True)
        # Some steps of two processors, for each of two lots of 64.
        assert len(rests) >= 4 and set(rests) == {is_short}
    world.check_clean()


@pytest.mark.parametrize("behind, far_behind, seconds", [(40, 200, 40), (40, 200, 20), (40, 41, 40), (200, 201, 40)])
async def test_it_rests_less_when_much_waits_for_long(
    behind: int, far_behind: int, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[tuple[int, bool]] = []
    monkeypatch.setattr(reclaimer, "_BEHIND", behind)
    monkeypatch.setattr(reclaimer, "_FAR_BEHIND", far_behind)
    world = World(processor_count=2)
    async with open_world(world) as pool:
        await make_history(pool, 100, random.Random(1))

        async def rest(*, is_pressed: bool = False) -> None:
            if pool.reclaimer.waiting_count:
                rests.append((pool.reclaimer.waiting_count, is_pressed))
            await trio.lowlevel.checkpoint()

        monkeypatch.setattr(pool.reclaimer._pace, "rest", rest)
        async with pool.reclaimer._turn:
            for number in range(80):
                await pool.snapshots.delete(b"s%d" % number)
        pool.reclaimer._kept_up_s -= seconds
        await pool.reclaimer.reclaim_all(gently=True)
        # Two lots, of 64 and of what is left.
        assert {count for count, _ in rests} == {one for one in (80, 16) if one < far_behind}
        assert all(is_pressed == (count >= behind and seconds >= 30) for count, is_pressed in rests)
    world.check_clean()


async def test_a_burst_after_a_long_time_is_not_behind(
    mock_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[tuple[int, bool]] = []

    async def rest(*, is_pressed: bool = False) -> None:
        rests.append((pool.reclaimer.waiting_count, is_pressed))
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(reclaimer, "_BEHIND", 20)
    world = World(processor_count=2)
    async with open_world(world) as pool:
        await make_history(pool, 100, random.Random(1))
        monkeypatch.setattr(pool.reclaimer._pace, "rest", rest)
        mock_clock.jump(3600)
        async with pool.reclaimer._turn:
            for number in range(80):
                await pool.snapshots.delete(b"s%d" % number)
        while pool.reclaimer.waiting_count:
            await trio.lowlevel.checkpoint()
        assert max(count for count, _ in rests) >= 20 and not any(is_pressed for _, is_pressed in rests)
    world.check_clean()


async def test_what_cannot_go_yet_is_not_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[bool] = []

    async def rest(*, is_pressed: bool = False) -> None:
        rests.append(is_pressed)
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(reclaimer, "_BEHIND", 20)
    monkeypatch.setattr(reclaimer, "_FAR_BEHIND", 21)
    world = World(processor_count=2)
    async with open_world(world) as pool:
        await make_history(pool, 60, random.Random(1))
        held = [pool.snapshots.get(b"s%d" % number) for number in range(40)]
        for one in held:
            one.opens += 1
        async with pool.reclaimer._turn:
            for number in range(50):
                await pool.snapshots.delete(b"s%d" % number)
        pool.reclaimer._kept_up_s -= 3600
        monkeypatch.setattr(pool.reclaimer._pace, "rest", rest)
        await pool.reclaimer.reclaim_all(gently=True)
        assert pool.reclaimer.waiting_count == 40
        assert rests and not any(rests)
        for one in held:
            one.opens -= 1
    world.check_clean()


@pytest.mark.parametrize("held_s", [-1.0, 3600.0])
async def test_whose_blocks_they_are_is_looked_up_once_an_object(
    held_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once a change log, of which hundreds may hold a block of it; and others commit in between."""
    monkeypatch.setattr(reclaim, "_HELD_S", held_s)
    steps: list[list[tuple[int, int]]] = []
    step, look = reclaim._free_some_candidates, named_masks

    async def noted_step(processor: Processor) -> int | None:
        steps.append([])
        return await step(processor)

    def noted_look(store: Any, family: Any, object_index: int, log_ids: set[int]) -> dict[int, int]:
        steps[-1].append((object_index, len(log_ids)))
        return look(store, family, object_index, log_ids)

    monkeypatch.setattr(reclaim, "_free_some_candidates", noted_step)
    monkeypatch.setattr(reclaim, "named_masks", noted_look)
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v") as volume:
            for number in range(30):
                for place in (0, OBJECT):
                    await volume.write(place + number * BLOCK, bytes([number + 1]) * BLOCK)
                await pool.snapshots.create(b"s%d" % number)
            await pool.clones.clone(b"s29", b"v", b"c")
            await volume.write(0, b"x" * 30 * BLOCK)
            await volume.write(OBJECT, b"x" * 30 * BLOCK)
        async with pool.reclaimer._turn:
            await pool.volumes.remove(b"c")
            for number in range(30):
                await pool.snapshots.delete(b"s%d" % number)
        steps.clear()
        await pool.reclaimer.reclaim_all()
        looks = [one for one in steps if one]
        assert all(len({index for index, _ in one}) == len(one) for one in looks), "each object once a step"
        assert max(count for one in looks for _, count in one) >= 30
        assert max(len(one) for one in looks) == (1 if held_s < 0 else 2)
        assert (await read_volume(pool, b"v"))[: 30 * BLOCK] == b"x" * 30 * BLOCK
    world.check_clean()


async def test_room_is_told_by_the_fullest_device() -> None:
    world = World(device_count=2, capacity_bytes=64 << 20)
    async with open_world(world) as pool:
        assert await pool.used_percent() < 5
        async with pool.volumes.opened((await pool.volumes.create(b"v")).name) as volume:
            await volume.write(0, bytes([1]) * (2 * OBJECT))
            await volume.write(4 * OBJECT, bytes([1]) * (2 * OBJECT))
            await volume.sync()
        assert 10 <= await pool.used_percent() < 60


async def test_logs_of_which_blocks_go_stay_known_until_that_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever needs one meanwhile has another of the same row, and each counts for itself."""
    monkeypatch.setattr(changelog, "KNOWN_LOGS_MAX", 4)
    commit_freed = reclaim._commit_freed
    counts = []

    async def look_and_commit(processor: Processor, batch: ShardBatch, changed: reclaim._Freed) -> list[ChangeLog]:
        for log, _ in changed.values():
            assert processor.logs.known[log.log_id] is log
        counts.append(len(changed))
        return await commit_freed(processor, batch, changed)

    monkeypatch.setattr(reclaim, "_commit_freed", look_and_commit)
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for number in range(9):
            async with pool.volumes.opened(b"v") as volume:
                await volume.write(number * BLOCK, b"x" * BLOCK)
            await pool.snapshots.create(b"%d" % number)
        # The first holds the volume, so that it is taken apart object by object.
        for number in range(1, 9):
            await pool.snapshots.delete(b"%d" % number)
        await pool.reclaimer.reclaim_all()
    async with open_world(world) as pool:
        await pool.volumes.remove(b"v")
        await pool.reclaimer.reclaim_all()
        async with pool.processors[0].access.commit_lock:
            assert not any(log.held for log in pool.processors[0].logs.known.values())
    assert max(counts) == 8
    world.check_clean()


@pytest.mark.parametrize("way", ["cut", "discarded", "cut and removed"])
async def test_logs_that_were_begun_for_what_takes_no_blocks_go(way: str) -> None:
    """A cut or a discard that is the first change after a snapshot begins one."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        counts = []
        for _ in range(3):
            for number in range(10):
                if b"v" not in pool.volumes.by_name:
                    await pool.volumes.create(b"v")
                async with pool.volumes.opened(b"v") as volume:
                    await volume.write(0, bytes([number + 1]) * 9000)
                await pool.snapshots.create(b"a")
                if way == "discarded":
                    await pool.volumes.discard(volume, 0, 9000)
                else:
                    await pool.volumes.truncate(volume, 0)
                await pool.snapshots.create(b"b")
                if way == "cut and removed":
                    await pool.volumes.remove(b"v")
                for name in (b"a", b"b"):
                    await pool.snapshots.delete(name)
                await pool.sync()
                await pool.reclaimer.reclaim_all()
            (processor,) = pool.processors
            rows = await processor.access.ask(processor.access.store.all_logs)
            files = [name for device in world.devices.values() for name in device.names("logs/0")]
            counts.append((len(rows), len(files), len(processor.logs.known)))
        assert counts[0] == counts[1] == counts[2] and max(counts[0]) <= 2, counts


async def test_logs_are_counted_once_where_few_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies go in one step; what both name would be forgotten amid the first, and read from its row anew."""
    few = 16
    monkeypatch.setattr(changelog, "KNOWN_LOGS_MAX", few)
    world = World(processor_count=1)
    others = [b"other-%d" % number for number in range(few + 4)]
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        pool.volumes.open(volume)
        await volume.write(0, b"1" * BLOCK)
        await volume.write(OBJECT, b"2" * BLOCK)
        await pool.snapshots.create(b"1", [b"v"])
        await volume.write(BLOCK, b"3" * BLOCK)
        await pool.snapshots.create(b"2", [b"v"])
        await volume.write(0, b"4" * 2 * BLOCK)
        await volume.write(OBJECT, b"5" * BLOCK)
        await pool.snapshots.delete(b"1")
        await pool.reclaimer.reclaim_all()
        pool.volumes.close(volume)
        for name in others:
            await pool.volumes.create(name)
            async with pool.volumes.opened(name) as other:
                await other.write(0, b"o")
    world.check_clean()
    async with open_world(world) as pool:
        # The first of all that are known, and as many others as may be.
        snapshot = pool.snapshots.get(b"2")
        view = await pool.snapshots.open_volume(snapshot, (await pool.snapshots.members(snapshot)).get(b"v")[0])
        await view.read(OBJECT, 1)
        pool.snapshots.close_volume(view)
        known = pool.processors[0].logs.known
        for name in others:
            if len(known) < few:
                await read_volume(pool, name)
        assert len(known) == few
        await pool.snapshots.delete(b"2")
        await pool.reclaimer.reclaim_all()
    world.check_clean()


async def test_a_copy_that_names_a_lost_log_is_not_dropped_unseen() -> None:
    """Nothing would tell of the damage any more, and what lies in the log be taken for a stray."""
    world = World(processor_count=1)
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        await pool.volumes.create(b"v")
        for letter, name in ((b"1", b"a"), (b"2", b"b")):
            async with pool.volumes.opened(b"v") as volume:
                await volume.write(0, letter * BLOCK)
            await pool.snapshots.create(name)
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"3" * BLOCK)
        await pool.sync()
        (processor,) = pool.processors
        store = processor.access.store
        await processor.access.ask(store.database.execute, "DELETE FROM logs WHERE log_id = 1")
        await pool.snapshots.delete(b"a")
        with pytest.raises(DamagedError, match="names change log 1, which does not exist"):
            await pool.reclaimer.reclaim_all()
        assert len(await processor.access.ask(store.database.rows, "SELECT * FROM copies")) == 2
        await running.close()
    with pytest.raises(AssertionError, match="change log 1"):
        world.check()


async def test_change_logs_of_files_that_come_and_go_do_not_stay_for_an_older_snapshot() -> None:
    world = World(2)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await pool.snapshots.create(b"old")
        for number in range(20):
            await pool.volumes.create(b"short")
            async with pool.volumes.opened(b"short") as volume:
                await volume.write(0, b"x" * 5000)
                await volume.write(OBJECT, b"y" * 5000)
                await volume.sync()
            if number == 10:
                await pool.snapshots.create(b"meanwhile")
            await pool.volumes.remove(b"short")
        await pool.reclaimer.reclaim_all()
        snapshot = pool.snapshots.get(b"meanwhile")
        assert (await read_snapshot(pool, snapshot, b"short"))[OBJECT:] == b"y" * 5000
        counts = [await one.access.ask(one.access.store.log_count) for one in pool.processors]
        # Of the one that a snapshot holds: its data, and how much there was when it went.
        assert max(counts) <= 2
        members = await pool.snapshots.members(snapshot)
        volume_id, _ = members.get(b"short")
        assert members.block_counts[volume_id] == 4
    world.check_clean()


async def test_empty_change_logs_do_not_pile_up_under_an_old_snapshot() -> None:
    """Snapshots come and go, and what each of them held alone is given back; the oldest stays."""
    world = World(1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"0" * 3 * BLOCK)
            await pool.snapshots.create(b"old")
            for number in range(30):
                await volume.write(0, bytes([number + 1]) * BLOCK)
                await pool.snapshots.create(b"s%d" % number)
                if number == 20:
                    await pool.volumes.truncate(pool.volumes.get(b"v"), 2 * BLOCK)
                if number >= 3:
                    await pool.snapshots.delete(b"s%d" % (number - 3))
                    await pool.reclaimer.reclaim_all()
            store = pool.processors[0].access.store
            assert await pool.processors[0].access.ask(store.log_count) < 10
            counts = {}
            for name in (b"old", b"s27", b"s28", b"s29"):
                snapshot = pool.snapshots.get(name)
                members = await pool.snapshots.members(snapshot)
                volume_id, _ = members.get(b"v")
                counts[name] = members.block_counts[volume_id]
            assert counts == {b"old": 3, b"s27": 2, b"s28": 2, b"s29": 2}
            await everything_is_proven(pool)
    world.check_clean()
