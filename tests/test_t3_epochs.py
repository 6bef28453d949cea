"""The epoch that was begun is known after any crash, also when nothing but a map speaks of it."""

from __future__ import annotations

import pytest

from snapfs.errors import StallError
from snapfs.pool import Pool

from .harness import World, open_until_power_is_lost, open_world, read_snapshot, read_volume

BLOCK = 4096


async def write_in_an_epoch_whose_log_is_gone(pool: Pool, *, by_itself: bool) -> None:
    """A map of an epoch that began with a snapshot that came to nothing; the log of that epoch is empty and gone.

    ``by_itself``: the processor commits, as it does now and then; not all is made durable by the volume.
    """
    await pool.volumes.create(b"v")
    async with pool.volumes.opened(b"v") as volume:
        await volume.write(0, b"A" * 8 * BLOCK)
        await volume.sync()
        with pytest.raises(StallError):
            await pool.snapshots.create(b"too slow", max_stall_ms=0.0)
        await pool.reclaimer.reclaim_all()
        await volume.write(5 * BLOCK, b"x" * BLOCK)
        await pool.volumes.discard(volume, 5 * BLOCK, BLOCK)
        if by_itself:
            await pool.processors[0].commit()
        else:
            await volume.sync(data_only=True)
        store = pool.processors[0].access.store
        assert [one.epoch for one in store.maps(volume.volume_id, 0, 9)] == [2]
        assert [one.epoch for one in store.all_logs()] == [1]


@pytest.mark.parametrize(("by_itself", "is_of_an_earlier_version"), [(False, False), (True, False), (True, True)])
async def test_a_snapshot_after_a_crash_has_what_was_there(by_itself: bool, is_of_an_earlier_version: bool) -> None:
    world = World(processor_count=1)
    async with open_until_power_is_lost(world) as pool:
        await write_in_an_epoch_whose_log_is_gone(pool, by_itself=by_itself)
        if is_of_an_earlier_version:
            database = pool.processors[0].access.store.database
            with database.transaction():
                database.execute("DELETE FROM meta WHERE key LIKE 'epoch%'")
    expected = b"A" * 5 * BLOCK + bytes(BLOCK) + b"A" * 2 * BLOCK
    async with open_world(world) as pool:
        snapshot = await pool.snapshots.create(b"s")
        assert await read_snapshot(pool, snapshot, b"v") == expected
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"B" * 2 * BLOCK)
            await volume.sync()
        await pool.reclaimer.reclaim_all()
        assert await read_snapshot(pool, snapshot, b"v") == expected
        assert await read_volume(pool, b"v") == b"B" * 2 * BLOCK + expected[2 * BLOCK :]


async def test_what_an_earlier_version_wrote_since_is_looked_at() -> None:
    world = World(processor_count=1)
    async with open_until_power_is_lost(world) as pool:
        await write_in_an_epoch_whose_log_is_gone(pool, by_itself=True)
        database = pool.processors[0].access.store.database
        with database.transaction():
            # It leaves what it does not know as it was.
            database.execute("UPDATE meta SET value = 1 WHERE key = 'epoch'")
            database.execute("UPDATE meta SET value = value - 1 WHERE key = 'epoch_generation'")
    async with open_world(world) as pool:
        snapshot = await pool.snapshots.create(b"s")
        assert await read_snapshot(pool, snapshot, b"v") == b"A" * 5 * BLOCK + bytes(BLOCK) + b"A" * 2 * BLOCK
