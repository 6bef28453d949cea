"""Numbers in a pool's databases that nobody can have put there: errors in words, and never a traceback."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import trio

from snapfs.check import check_pool
from snapfs.database import Database
from snapfs.errors import DamagedError, NoSpaceError, SnapfsError
from snapfs.formats import CATALOG_FILE, COPY_ON_WRITE, AttributeChange, shard_file
from snapfs.making import VolumeWish
from snapfs.pool import Pool

from .harness import WHERE, Running, World, open_world, read_snapshot, read_volume

BLOCK = 4096
LARGEST = (1 << 63) - 1
COLUMNS = [
    (CATALOG_FILE, "devices", "changelog_id"),
    (CATALOG_FILE, "meta", "value"),
    (CATALOG_FILE, "removed", "epoch"),
    (CATALOG_FILE, "snapshots", "instant"),
    (CATALOG_FILE, "traits", "changelog_id"),
    (CATALOG_FILE, "volumes", "birth_epoch"),
    (CATALOG_FILE, "volumes", "epoch"),
    (CATALOG_FILE, "volumes", "named_epoch"),
    (shard_file(0), "copies", "object_index"),
    (shard_file(0), "logs", "device_id"),
    (shard_file(0), "logs", "epoch"),
    (shard_file(0), "maps", "object_index"),
    (shard_file(0), "meta", "value"),
    (shard_file(0), "portions", "block_count"),
]


async def fill(world: World) -> None:
    """A pool with something of each kind."""
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await pool.volumes.create(b"gone")
        await pool.maker.create(VolumeWish(b"c", 1 << 22, COPY_ON_WRITE))
        for number in range(3):
            for name in (b"v", b"c"):
                async with pool.volumes.opened(name) as volume:
                    await volume.write(number * BLOCK, bytes([number + 1]) * 2 * BLOCK)
            await pool.snapshots.create(b"s%d" % number)
        await pool.clones.clone(b"s1", b"v", b"k")
        await pool.volumes.remove(b"gone")
        await pool.sealer.seal_all()


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """What is asked for may fail, in words."""
    try:
        yield
    except (SnapfsError, OSError):
        pass
    except BaseExceptionGroup as group:
        # Of a task of the pool that met it.
        if group.split((SnapfsError, OSError))[1] is not None:
            raise


async def use(pool: Pool) -> None:
    """Some of everything."""
    for name in list(pool.volumes.by_name):
        with in_words():
            await read_volume(pool, name)
        with in_words():
            async with pool.volumes.opened(name) as volume:
                await volume.write(0, b"z" * BLOCK)
    for snapshot in list(pool.snapshots.by_name.values()):
        for name in (b"v", b"c"):
            with in_words():
                await read_snapshot(pool, snapshot, name)
    with in_words():
        await pool.snapshots.create(b"new")
    for name in list(pool.snapshots.by_name):
        with in_words():
            await pool.snapshots.delete(name)
    with in_words():
        await pool.reclaimer.reclaim_all()
    with in_words():
        await pool.sealer.seal_all()


@pytest.mark.parametrize("value", [LARGEST, -1])
@pytest.mark.parametrize(("file", "table", "column"), COLUMNS)
async def test_a_number_that_cannot_be(file: str, table: str, column: str, value: int) -> None:
    world = World(processor_count=1)
    await fill(world)
    database = Database(world.home, file, "it")
    which = "typeof(value) = 'integer' AND key LIKE 'next%'" if table == "meta" else "1"
    with database.transaction():
        database.execute(f"UPDATE OR IGNORE {table} SET {column} = ? WHERE {which}", (value,))
    database.close()
    with in_words():
        check_pool(world.home, WHERE, world.open_device, world.has_image)
    world.home.close()
    with in_words():
        running = Running(world)
        async with trio.open_nursery() as nursery:
            with in_words():
                await running.start(nursery)
                await use(running.pool)
                await running.pool.close()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("file", "key"),
    [(CATALOG_FILE, "next_volume_id"), (CATALOG_FILE, "next_snapshot_id"), (shard_file(0), "next_log_id")],
)
async def test_nothing_new_takes_the_place_of_what_is_there(file: str, key: str) -> None:
    world = World(processor_count=1)
    await fill(world)
    database = Database(world.home, file, "it")
    with database.transaction():
        database.execute("UPDATE meta SET value = 1 WHERE key = ?", (key,))
    database.close()
    with pytest.raises(DamagedError, match="which is taken"):
        Pool.open(world.home, WHERE, world.open_device)


@pytest.mark.parametrize(
    ("key", "value"), [("folder_mode", 9215), ("folder_uid", -5), ("folder_gid", 1 << 40), ("folder_mtime_ns", "x")]
)
async def test_a_folder_that_cannot_be_keeps_nobody_from_its_volumes(key: str, value: int | str) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.change_folder(AttributeChange(mode=0o1755, uid=0, gid=0))
    database = Database(world.home, CATALOG_FILE, "it")
    with database.transaction():
        database.execute("UPDATE meta SET value = ? WHERE key = ?", (value, key))
    database.close()
    report = check_pool(world.home, WHERE, world.open_device, world.has_image)
    world.home.close()
    assert [one.what for one in report.findings if one.severity == "damage"] == [f"its {key} cannot be"]
    async with open_world(world) as pool:
        folder = pool.volumes.folder
        assert (folder.mode, folder.uid, folder.gid) == (0o700 if key == "folder_mode" else 0o1755, 0, 0)
        await pool.volumes.change_folder(AttributeChange(mode=0o755))


async def test_a_change_of_the_folder_that_fails_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(World(processor_count=1)) as pool:
        before = pool.volumes.folder.now()

        async def refuse(*_: object) -> None:
            raise NoSpaceError("no room")

        for user in (0, 1000):
            with monkeypatch.context() as patch:
                patch.setattr(os, "getuid", lambda user=user: user)
                patch.setattr(pool.volumes.catalog, "save", refuse)
                with pytest.raises(NoSpaceError):
                    await pool.volumes.change_folder(AttributeChange(mode=0o700, gid=4321))
            assert pool.volumes.folder.now() == before
