"""Repairs beside what the pool's own tasks do, and after steps of theirs that failed."""

from __future__ import annotations

import errno
import os
from typing import Any, NoReturn

import pytest
import trio

from snapfs import check, reclaim
from snapfs import repair as repairs
from snapfs.check import check_pool, repair
from snapfs.database import Database
from snapfs.errors import DamagedError
from snapfs.formats import shard_file
from snapfs.pool import Pool
from snapfs.tasks import Wakeup

from .harness import Running, World, open_world, read_volume, without_threads
from .test_t3_between import noise, put

BLOCK = 4096


async def _with_candidates() -> tuple[World, bytes]:
    """A pool, closed with blocks that its clone's family may name no more still to be looked at; what is in v."""
    world = World(processor_count=1)
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        # Its task would free what is left here.
        pool.snapshots._reclaim_wakeup = Wakeup()
        await pool.volumes.create(b"v")
        await pool.volumes.create(b"w")
        await put(pool, b"v", 0, noise(10, 1))
        await put(pool, b"w", 0, noise(1, 9))
        await pool.snapshots.create(b"s1")
        await pool.clones.clone(b"s1", b"v", b"c")
        await put(pool, b"c", 0, noise(5, 2))
        await pool.snapshots.delete(b"s1")
        await pool.reclaimer.reclaim_all()
        running._scope.cancel()
        await running._ended.wait()
        await put(pool, b"v", 0, noise(5, 3))
        contents = await read_volume(pool, b"v")
        await pool.volumes.remove(b"w")
        await running.close()
    store = Database(world.home, shard_file(0), "a store")
    try:
        assert store.row("SELECT sum(block_count) FROM candidates") == (5,)
    finally:
        store.close()
    return world, contents


async def test_what_was_counted_anew_is_not_counted_down_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks still to be looked at were left out of a count, and then taken off it: a log in use was removed."""
    world, contents = await _with_candidates()

    async def fail(*args: object, **options: object) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(reclaim, "dismantle_volume", fail)
        done = await repair(world.home, "memory", world.open_device)
    assert any("could not give back" in one for one in done)
    world.check()
    async with open_world(world) as pool:
        await pool.reclaimer.reclaim_all()
        assert await read_volume(pool, b"v") == contents
    world.check_clean()


async def test_what_changes_amid_a_count_is_in_the_count_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's tasks go on while it is repaired, and what they committed after the look was not in the count."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, noise(4, 1))
        await pool.snapshots.create(b"s")
        await put(pool, b"v", 0, noise(2, 2))
    named_counts, repair_running = repairs._named_counts, repairs.repair_running
    async with trio.open_nursery() as nursery:

        async def repaired_beside_a_write(pool: Pool) -> list[str]:
            async def with_a_write(*args: Any) -> dict[int, int]:
                found = await named_counts(*args)
                nursery.start_soon(put, pool, b"v", 8 * BLOCK, noise(1, 7))
                for _ in range(500):
                    await trio.lowlevel.checkpoint()
                return found

            monkeypatch.setattr(repairs, "_named_counts", with_a_write)
            return await repair_running(pool)

        monkeypatch.setattr(check, "repair_running", repaired_beside_a_write)
        with without_threads(1):
            await repair(world.home, "memory", world.open_device)
    world.check_clean()


async def test_a_count_below_what_is_still_to_be_looked_at_is_damage() -> None:
    """As an earlier version's repair left it: a mount would take them off, and with the last remove the log."""
    world, _ = await _with_candidates()
    store = Database(world.home, shard_file(0), "a store")
    with store.transaction():
        store.execute("UPDATE logs SET block_count = 5 WHERE block_count = 10")
    store.close()
    report = check_pool(world.home, "memory", world.open_device)
    assert report.is_damaged, report.findings
    world.home.close()


async def test_no_log_is_counted_below_nothing() -> None:
    """What a wrong count would have removed is kept, and told."""
    world, contents = await _with_candidates()
    store = Database(world.home, shard_file(0), "a store")
    with store.transaction():
        store.execute("UPDATE logs SET block_count = 4 WHERE block_count = 10")
    store.close()
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        with pytest.raises(DamagedError, match="counted"):
            await running.pool.reclaimer.reclaim_all()
        assert await read_volume(running.pool, b"v") == contents
        await running.close()


async def test_what_is_kept_for_nothing_is_given_back() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, noise(4, 1))
        await pool.sync()
    catalog = Database(world.home, "catalog.sqlite", "the catalog")
    catalog.execute("UPDATE volumes SET size_bytes = 100, trim = 0")
    catalog.execute(
        "INSERT INTO versions SELECT volume_id, 1, 1, name, size_bytes, mode, uid, gid, atime_ns, mtime_ns, ctime_ns"
        " FROM volumes"
    )
    catalog.execute("UPDATE volumes SET epoch = 2")
    catalog.execute("UPDATE meta SET value = 3 WHERE key IN ('epoch', 'next_instant')")
    catalog.close()
    report = world.check()
    assert {one.what for one in report.findings if one.severity == "leak"} == {
        "attributes of volume 256 are kept for no snapshot",
        "blocks are mapped behind the volume's size",
    }
    done = await repair(world.home, "memory", world.open_device)
    assert any("kept for no snapshot" in one for one in done) and any("behind the size" in one for one in done)
    world.check_clean()
    async with open_world(world) as pool:
        assert await read_volume(pool, b"v") == noise(4, 1)[:100]
