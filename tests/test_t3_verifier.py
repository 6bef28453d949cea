"""What the verifier, its repair and the scrub do about what they cannot read, and what they take for damage."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, NoReturn, cast

import pytest
import trio

from snapfs import namedblocks
from snapfs.backends.memory import MemoryFile
from snapfs.blockmasks import named_masks
from snapfs.check import check_pool, repair
from snapfs.damage import DamagedBlock, DamageLedger
from snapfs.database import Database
from snapfs.errors import DamagedError, NoSpaceError
from snapfs.formats import CATALOG_FILE, CHANGE_LOG, COPY_ON_WRITE, log_file, shard_file
from snapfs.geometry import VolumeId
from snapfs.making import VolumeWish
from snapfs.namedblocks import NamedBlocks
from snapfs.scrub import scrub
from snapfs.shardstore import ShardStore
from snapfs.snapshot import Snapshot
from snapfs.volume import Volume
from snapfs.volumes import VolumeTable

from .harness import Running, World, in_memory, open_until_power_is_lost, open_world, read_snapshot
from .test_t3_between import noise, put


async def test_a_scrub_keeps_what_a_reader_met_meanwhile() -> None:
    ledger = DamageLedger()
    old, met, found = (DamagedBlock(0, 1, 0, block) for block in range(3))
    ledger.note(*old)
    before = frozenset(ledger.known)
    ledger.note(*met)
    ledger.replace([found], before)
    assert list(ledger.known) == [found, met]


@pytest.mark.parametrize("call", ["data_extents", "names"])
async def test_what_cannot_be_read_keeps_nothing_else_from_being_looked_at(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error of a device ended the verifier, and the scrub, with all that they had found."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        for name in (b"a", b"b"):
            await pool.volumes.create(name)
            async with pool.volumes.opened(name) as volume:
                await volume.write(0, bytes(range(256)) * 64)
                await volume.sync()
        await pool.snapshots.create(b"s")
        assert await pool.sealer.seal_all()
    first = min(world.devices["0"].names("logs/0"))
    with monkeypatch.context() as patch:

        def fail(*args: object) -> NoReturn:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        if call == "names":
            patch.setattr(in_memory(world.devices["0"]), "names", fail)
        else:
            data_extents = MemoryFile.data_extents

            bad = in_memory(world.devices["0"])._files[f"logs/0/{first}"]

            def extents(file: MemoryFile) -> list[tuple[int, int]]:
                return fail() if file._node is bad else data_extents(file)

            patch.setattr(MemoryFile, "data_extents", extents)
        report = check_pool(world.home, "memory", world.open_device)
        world.home.close()
        assert report.is_damaged and len([one for one in report.findings if one.severity == "damage"]) == 1
        if call == "data_extents":
            running = Running(world)
            async with trio.open_nursery() as nursery:
                await running.start(nursery)
                found = await scrub(running.pool)
                await running.close()
            # It asks for what maps name, not for what is there.
            assert not found.unreadable_logs and found.checked_bytes == 2 * 4 * 4096


async def test_holes_where_zeros_were_are_no_damage() -> None:
    """Blocks of zeros that were written over others stay named; a copy may have made holes of them."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"x" * 4 * 4096)
            await volume.sync()
            await volume.write(4096, bytes(2 * 4096))
            await volume.sync()
        await pool.snapshots.create(b"s")
        assert await pool.sealer.seal_all()
    (name,) = world.devices["0"].names("logs/0")
    file = world.devices["0"].open(f"logs/0/{name}")
    file.punch(4096, 2 * 4096)
    world.check_clean()
    file.punch(0, 4096)
    report = check_pool(world.home, "memory", world.open_device)
    world.home.close()
    assert [one.what for one in report.findings if "4.0 KiB that maps name" in one.what]


async def test_fewer_counted_than_named_is_damage() -> None:
    """A repair that gave back what nobody counted would give back what is named."""
    world = World(processor_count=1)
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        await running.pool.volumes.create(b"v")
        async with running.pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"x" * 10 * 4096)
            await volume.sync()
        store = running.pool.processors[0].access.store
        (log,) = store.all_logs()
        with store.database.transaction():
            store.set_log_count(log.log_id, 4)
        await running.close()
    report = check_pool(world.home, "memory", world.open_device)
    world.home.close()
    assert report.is_damaged


async def test_a_volume_that_cannot_be_cleared_keeps_no_other_from_being_repaired(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        for name in (b"a", b"b"):
            await pool.volumes.create(name)
        async with pool.volumes.opened(b"b") as volume:
            await volume.write(0, b"x" * 4096)
            await volume.sync()
        store = pool.processors[0].access.store
        with store.database.transaction():
            store.set_block_count(pool.volumes.get(b"b").volume_id, 7)
    monkeypatch.setattr(VolumeTable, "to_trim", lambda volumes: [volumes.by_name[b"a"]])

    async def fail(volume: Volume) -> None:
        raise NoSpaceError("the change log volume is full", "")

    monkeypatch.setattr(Volume, "trim", fail)
    done = await repair(world.home, "memory", world.open_device)
    assert any(one.startswith("could not clear") for one in done)
    assert any("counted 1 blocks of volume" in one for one in done)
    monkeypatch.undo()
    world.check_clean()


async def test_what_is_written_to_a_removed_volume_since_a_snapshot_is_no_damage() -> None:
    """Who had it open wrote on after the snapshot that did not hold it any more, and then power was lost."""
    world = World(processor_count=1)
    async with open_until_power_is_lost(world) as pool:
        await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"x" * 4096)
            await volume.sync()
            await pool.snapshots.create(b"s")
            await pool.volumes.remove(b"v")
            await pool.snapshots.create(b"t")
            await volume.write(0, b"y" * 4096)
            await pool.processors[0].commit()
        await trio.lowlevel.checkpoint()
    world.check()
    async with open_world(world) as pool:
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == b"x" * 4096
        await pool.reclaimer.reclaim_all()
    world.check_clean()


async def test_holes_of_a_source_behind_the_size_of_a_clone_are_no_leak() -> None:
    """A clone's map may name what it stands on for all of an object, of which nothing was ever written."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"v", 4096, COPY_ON_WRITE))
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"x" * 4096)
            await volume.sync()
        await pool.snapshots.create(b"s")
        await pool.volumes.remove(b"v")
        await pool.reclaimer.reclaim_all()
        clone = await pool.clones.clone(b"s", b"v", b"c")
        await pool.volumes.truncate(clone, 0)
        async with pool.volumes.opened(b"c"):
            await clone.write(3 * 4096, b"y" * 4096)
            assert bytes(await clone.read(0, 4 * 4096)) == bytes(3 * 4096) + b"y" * 4096
            await clone.write((8 << 20) + 4096, b"z" * 4096)
            await clone.sync()
            assert bytes(await clone.read(8 << 20, 8192)) == bytes(4096) + b"z" * 4096
    world.check_clean()


async def _edited(world: World, edit: Callable[[Database, Database], None]) -> list[str]:
    """What the verifier calls damage once a pool's catalog and its store were edited."""
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"x" * 4 * 4096)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, b"y" * 4096)
        await running.close()
    home = world.home
    databases = [Database(home, CATALOG_FILE, "the catalog"), Database(home, shard_file(0), "the store")]
    with databases[0].transaction(), databases[1].transaction():
        edit(*databases)
    for database in databases:
        database.close()
    report = check_pool(home, "memory", world.open_device)
    home.close()
    return [f"{one.where}: {one.what}" for one in report.findings if one.severity == "damage"]


@pytest.mark.parametrize(
    ("sql", "where"),
    [
        ("UPDATE meta SET value = 1 WHERE key = 'next_log_id'", "the next change log"),
        ("UPDATE meta SET value = 256 WHERE key = 'next_volume_id'", "next_volume_id"),
        ("UPDATE meta SET value = 1 WHERE key = 'next_snapshot_id'", "next_snapshot_id"),
        ("INSERT INTO freed (log_id, offset, length) VALUES (1, 4096, 4096)", "1 blocks that are named"),
        ("UPDATE snapshots SET unsealed = '256,x'", "not sealed"),
    ],
)
async def test_what_would_harm_what_is_named_is_damage(sql: str, where: str) -> None:
    """Ids that are given twice, ranges of blocks that are in use, and what no version writes."""

    def edit(catalog: Database, store: Database) -> None:
        of_store = "log_id" in sql
        (store if of_store else catalog).execute(sql)

    (found,) = await _edited(World(processor_count=1), edit)
    assert where in found


@pytest.mark.parametrize("object_count", [1, 6])
async def test_every_version_of_an_object_is_looked_at_a_few_times(
    object_count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scrub, and a repair, looked for each change log at all versions: at snapshots times snapshots."""
    world = World(processor_count=1)
    looked_at = 0

    some_versions = ShardStore.some_versions

    def counted(store: ShardStore, *args: Any) -> tuple[list[tuple[int, int | bytes]], int]:
        nonlocal looked_at
        found = some_versions(store, *args)
        looked_at += len(found[0])
        return found

    monkeypatch.setattr(ShardStore, "some_versions", counted)
    snapshot_count = 40
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for number in range(snapshot_count):
            for object_index in range(object_count):
                await put(pool, b"v", (object_index << 22) + 4096 * number, noise(1, number + 1))
            await pool.snapshots.create(f"s{number}".encode())
        assert await pool.sealer.seal_all()
        looked_at = 0
        found = await scrub(pool)
        assert found.checked_bytes == snapshot_count * object_count * 4096
        assert looked_at <= 2 * object_count * (snapshot_count + 1)
        looked_at = 0
    await repair(world.home, "memory", world.open_device)
    assert 0 < looked_at <= 3 * object_count * (snapshot_count + 1)


async def test_a_damaged_block_is_told_by_the_names_that_its_volume_had() -> None:
    """Names of before and after a renaming, and of a clone, which has the block from its origin."""
    world = World(processor_count=1)
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        await pool.volumes.create(b"old")
        await put(pool, b"old", 0, noise(2, 1))
        await pool.snapshots.create(b"first")
        await pool.volumes.rename(b"old", b"new")
        await pool.snapshots.create(b"second")
        await pool.clones.clone(b"first", b"old", b"clone")
        await put(pool, b"clone", 4096, noise(1, 2))
        await put(pool, b"new", 0, noise(1, 3))
        await pool.snapshots.create(b"third")
        assert await pool.sealer.seal_all()
        (log_name, *_) = world.devices["0"].names("logs/0")
        file = world.devices["0"].open(f"logs/0/{log_name}")
        file.write(b"?", 0)
        file.sync()
        file.close()
        await scrub(pool)
        (told,) = pool.damage.entries()
        named = {
            (one["volume"], one["is_live"]): one["snapshots"] for one in cast("list[dict[str, Any]]", told["volumes"])
        }
        assert named == {
            ("old", False): ["first"],
            ("new", False): ["second"],
            ("clone", True): ["third"],
        }
        await running.close()


async def test_what_fails_to_close_keeps_nothing_else_open(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=2)
    running = Running(world)
    closed: list[str] = []
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool

        async def fail() -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(pool.processors[0], "close", fail)
        catalog_close = pool.catalog.close

        async def close() -> None:
            closed.append("catalog")
            await catalog_close()

        monkeypatch.setattr(pool.catalog, "close", close)
        for device in pool.devices.values():
            monkeypatch.setattr(in_memory(device), "close", lambda: closed.append("device"))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            await running.close()
        pool.processors[0].access.store.database.abandon()
    assert closed == ["catalog", "device"]


async def test_a_log_that_fails_to_close_keeps_neither_another_nor_the_store_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(processor_count=1)
    running = Running(world)
    closed: list[str] = []
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        for name in (b"v", b"w"):
            await pool.volumes.create(name)
            await put(pool, name, 0, noise(1, 1))
        files = [log.file for log in pool.processors[0].logs.known.values() if log.file is not None]
        assert len(files) == 2

        def fail() -> None:
            closed.append("failed")
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        # The last that was begun is closed first.
        monkeypatch.setattr(files[-1], "close", fail)
        monkeypatch.setattr(files[0], "close", lambda: closed.append("log"))
        store = pool.processors[0].access.store
        store_close = store.close

        def close() -> None:
            closed.append("store")
            store_close()

        monkeypatch.setattr(store, "close", close)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            await running.close()
    assert closed == ["failed", "log", "store"]


async def test_a_clone_that_is_made_amid_a_scrub_names_what_its_origin_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its origin, and the snapshot, went while the scrub ran: the damage was no longer known, and the clone has it."""
    world = World(processor_count=1)
    object_count = 20
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for object_index in range(object_count):
            await put(pool, b"v", object_index << 22, noise(2, object_index + 1))
        await pool.snapshots.create(b"s")
        assert await pool.sealer.seal_all()
        (name,) = world.devices["0"].names("logs/0")
        file = world.devices["0"].open(f"logs/0/{name}")
        file.write(b"?", 18 << 22)
        file.close()
        monkeypatch.setattr(namedblocks, "_ROWS_A_STEP", 8)
        assert len((await scrub(pool)).damaged) == 1
        step, steps = NamedBlocks.step, 0

        async def clone_amid(walk: NamedBlocks) -> dict[int, dict[int, int]] | None:
            nonlocal steps
            steps += 1
            if steps == 2:
                await pool.clones.clone(b"s", b"v", b"c")
                await pool.volumes.remove(b"v")
                await pool.snapshots.delete(b"s")
                await pool.reclaimer.reclaim_all()
            return await step(walk)

        monkeypatch.setattr(NamedBlocks, "step", clone_amid)
        report = await scrub(pool)
        assert steps > 3
        assert len(report.damaged) == 1 and len(pool.damage.known) == 1
        monkeypatch.undo()


@pytest.mark.parametrize("listed", [True, False])
async def test_a_step_of_a_walk_takes_a_bounded_number_of_versions(
    listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After quiet objects a step took hundreds of busy ones, with all their versions, and held the store for them."""
    world = World(processor_count=1)
    rows_max = 40
    monkeypatch.setattr(namedblocks, "_ROWS_A_STEP", rows_max)
    quiet_count, busy_count, version_count = 100, 12, 30
    objects = range(quiet_count + busy_count)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for object_index in objects:
            await put(pool, b"v", object_index << 22, noise(1, object_index + 1))
        for number in range(version_count):
            await pool.snapshots.create(b"s%d" % number)
            for object_index in objects[quiet_count:]:
                await put(pool, b"v", object_index << 22, noise(1, 1000 + number))
        await pool.snapshots.create(b"last")
        await pool.clones.clone(b"last", b"v", b"c")
        await put(pool, b"c", quiet_count << 22, noise(1, 5))
        volume_id = pool.volumes.get(b"v").volume_id
        (processor,) = pool.processors
        family = processor.traits.family_of(volume_id)
        assert len(family) == 2
        some_versions, steps = ShardStore.some_versions, []

        def counted(store: ShardStore, *args: Any) -> tuple[list[tuple[int, int | bytes]], int]:
            found = some_versions(store, *args)
            steps.append(len(found[0]))
            return found

        with monkeypatch.context() as patch:
            patch.setattr(ShardStore, "some_versions", counted)
            walk = NamedBlocks(processor.access, lambda: family, objects=objects if listed else None)
            found: dict[int, dict[int, int]] = {}
            while (named := await walk.step()) is not None:
                assert not found.keys() & named.keys()
                found.update(named)
        store = processor.access.store
        assert found == {one: named_masks(store, family, one) for one in objects}
        assert max(steps) <= rows_max and sum(steps) >= quiet_count + busy_count * version_count


async def test_one_object_has_more_versions_than_a_step_takes() -> None:
    """It is taken alone, and whole."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for number in range(12):
            for object_index in (0, 1, 2):
                await put(pool, b"v", object_index << 22, noise(1, number + object_index))
            await pool.snapshots.create(b"s%d" % number)
        volume_id = pool.volumes.get(b"v").volume_id
        store = pool.processors[0].access.store
        ranges = [(0, 100)]
        for object_index in (0, 1, 2):
            ranges[0] = (object_index, 100)
            rows, last = store.some_versions([volume_id], ranges, 5)
            assert last == object_index and sorted(rows) == sorted(store.versions_of([volume_id], [(last, last)]))
            assert len(rows) == 12


async def test_a_check_takes_a_bounded_number_of_versions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took two thousand objects with all their versions behind as many that had one each."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        for object_index in range(30):
            await put(pool, b"v", object_index << 22, noise(1, object_index + 1))
        for number in range(15):
            await pool.snapshots.create(b"s%d" % number)
            for object_index in range(20, 30):
                await put(pool, b"v", object_index << 22, noise(1, 100 + number))
    monkeypatch.setattr("snapfs.check._MAPS_A_STEP", 16)
    taken = []
    rows = Database.rows

    def counted(database: Database, sql: str, *args: Any) -> list[tuple[object, ...]]:
        found = rows(database, sql, *args)
        if "map" in sql:
            taken.append(len(found))
        return found

    monkeypatch.setattr(Database, "rows", counted)
    report = check_pool(world.home, "memory", world.open_device)
    world.home.close()
    assert report.object_count == 30 and report.copy_count == 150 and not report.is_damaged
    assert max(taken) <= 17


async def test_all_snapshots_of_a_volume_written_in_place_that_have_a_damaged_block_are_told() -> None:
    """An older copy that names the source means what the next newer one says; only the newest was told."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"v", 4 * 4096, change_mode=COPY_ON_WRITE))
        await put(pool, b"v", 0, noise(4, 1))
        snapshots = []
        for number in range(3):
            snapshots.append(await pool.snapshots.create(b"s%d" % (number + 1)))
            await put(pool, b"v", number * 4096, noise(1, 10 + number))
        assert await pool.sealer.seal_all()
        store = pool.processors[0].access.store
        logs = [row for row in store.all_logs() if row.kind == CHANGE_LOG]
        (log,) = [row for row in logs if row.epoch == snapshots[1].instant + 1]
        file = world.devices["0"].open(log_file(0, log.log_id))
        preserved = bytearray(4096)
        file.read_into(preserved, 4096)
        assert preserved == noise(4, 1)[4096:8192]
        file.write(b"?", 4096)
        file.close()
        with pytest.raises(DamagedError):
            await read_snapshot(pool, snapshots[0], b"v")
        await pool.damage_teller.tell_all()
        (told,) = pool.damage.entries()
        (named,) = cast("list[dict[str, Any]]", told["volumes"])
        assert (named["volume"], named["is_live"], named["snapshots"]) == ("v", False, ["s2", "s1"])


async def test_who_has_many_damaged_blocks_is_looked_for_once_a_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    """All snapshots were looked at for each block, while everything else stood still."""
    world = World(processor_count=1)
    snapshot_count, block_count = 30, 64
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, noise(block_count))
        for number in range(snapshot_count):
            await pool.snapshots.create(b"s%d" % number)
        # The second half is left of the snapshots alone.
        await put(pool, b"v", block_count // 2 * 4096, noise(block_count // 2, 2))
        looks = 0
        holds = Snapshot.holds

        def counted(snapshot: Snapshot, volume_id: VolumeId) -> bool:
            nonlocal looks
            looks += 1
            return holds(snapshot, volume_id)

        with monkeypatch.context() as patch:
            patch.setattr(Snapshot, "holds", counted)
            for block in range(block_count):
                pool.damage.note(0, 1, 0, block)
            await pool.damage_teller.tell_all()
        assert looks <= 2 * snapshot_count
        entries = pool.damage.entries()
        assert len(entries) == block_count
        newest_first = [f"s{number}" for number in reversed(range(snapshot_count))]
        for entry in entries:
            is_live = cast("int", entry["offset"]) < block_count // 2 * 4096
            assert entry["volumes"] == [
                {"volume": "v", "is_live": is_live, "snapshots": newest_first, "snapshot_count": snapshot_count}
            ]
        pool.damage.known.clear()
