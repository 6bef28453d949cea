"""Small things that other tests did not notice when they were changed."""

from __future__ import annotations

import errno
import os

import pytest
import trio

from snapfs.backends import MemoryDevice
from snapfs.backends.memory import MemoryFile
from snapfs.formats import COPY_ON_WRITE
from snapfs.making import VolumeWish
from snapfs.pool import Pool

from .harness import WHERE, Running, World, open_world, read_volume

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
