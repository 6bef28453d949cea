"""When devices are asked to begin to write, and what that may not change."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trio.testing

from snapfs.backends import DirectoryDevice, FaultyDevice, MemoryDevice
from snapfs.pool import Pool
from snapfs.processor import Processor

from .harness import World, open_world, read_volume, without_threads

BLOCK = 4096
MIB = 1 << 20


class Begun:
    """Counts calls of a kind, and fails those that are to begin to write, if told so."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.code = 0

    def of_begins(self) -> int:
        return self.counts["begin_writeback"]

    def __call__(self, kind: str, name: str) -> None:
        self.counts[kind] += 1
        if kind == "begin_writeback" and self.code:
            raise OSError(self.code, os.strerror(self.code), name)


def world_that_counts(begun: Begun) -> World:
    return World(1, make_device=lambda _, capacity_bytes: FaultyDevice(MemoryDevice(capacity_bytes), begun))


async def settled() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def write(pool: Pool, offset: int, data: bytes) -> None:
    async with pool.volumes.opened(b"v") as volume:
        for start in range(0, len(data), MIB):
            await volume.write(offset + start, data[start : start + MIB])
    await settled()


async def test_a_device_begins_to_write_what_is_new_and_large() -> None:
    begun = Begun()
    with without_threads(1):
        async with open_world(world_that_counts(begun)) as pool:
            await pool.volumes.create(b"v")
            await write(pool, 0, b"x" * (4 * MIB - BLOCK))
            assert begun.of_begins() == 0
            await write(pool, 4 * MIB, b"x" * MIB)
            # Of the second object's part in the same log: 4 MiB are full.
            assert begun.of_begins() == 1
            # What is written over in place stays with the kernel, and so does what is scattered.
            await write(pool, 0, b"y" * 4 * MIB)
            for number in range(1100):
                await write(pool, (8 * MIB) + number * 2 * BLOCK, b"z" * BLOCK)
            assert begun.of_begins() == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_a_device_that_cannot_begin_changes_nothing(code: int) -> None:
    begun = Begun()
    begun.code = code
    world = world_that_counts(begun)
    with without_threads(1):
        async with open_world(world) as pool:
            await pool.volumes.create(b"v")
            for _ in range(2):
                await write(pool, 0, b"x" * 8 * MIB)
                await pool.snapshots.create(b"s%d" % begun.of_begins())
            assert begun.of_begins() >= 2
            await pool.volumes.get(b"v").sync()
            assert pool.volumes.get(b"v").failure is None
        async with open_world(world) as pool:
            assert await read_volume(pool, b"v") == b"x" * 8 * MIB


async def test_a_log_that_was_closed_meanwhile_is_left_alone() -> None:
    """It is synced and closed between the write and the turn of who has the device begin."""
    begun = Begun()
    with without_threads(1):
        async with open_world(world_that_counts(begun)) as pool:
            await pool.volumes.create(b"v")
            await write(pool, 0, b"x" * BLOCK)
            (processor,) = pool.processors
            log = next(iter(processor.logs.known.values()))
            file, log.file = log.file, None
            processor.writeback.note(log, 1024)
            await settled()
            assert begun.of_begins() == 0
            log.file = file
            processor.writeback.note(log, 1024)
            await settled()
            assert begun.of_begins() == 1


def test_a_closed_file_cannot_begin(tmp_path: Path) -> None:
    file = DirectoryDevice(tmp_path).create("f")
    file.begin_writeback()
    file.close()
    with pytest.raises(OSError) as caught:
        file.begin_writeback()
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("code", [0, errno.EIO])
async def test_much_goes_to_the_devices_before_others_are_kept_from_committing(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one processor after the other commits it, so that each is kept from others for a part of the time only."""
    monkeypatch.setattr("snapfs.volume._EARLY_OBJECTS", 4)
    monkeypatch.setattr("snapfs.volume._MUCH_OBJECTS", 4)
    monkeypatch.setattr("snapfs.pool.SYNC_PERIOD_S", 1e6)
    begun = Begun()
    begun.code = code
    world = World(2, make_device=lambda _, capacity_bytes: FaultyDevice(MemoryDevice(capacity_bytes), begun))
    at_work: list[int] = []
    commit = Processor.commit

    async def noting(processor: Processor, *args: Any) -> int:
        if args != ([processor.portions[volume.volume_id]],):
            # The sealer's, or another of the pool's own.
            return await commit(processor, *args)
        at_work.append(processor.index)
        most.append(len(at_work))
        try:
            return await commit(processor, *args)
        finally:
            at_work.remove(processor.index)

    with without_threads(1):
        async with open_world(world) as pool:
            volume = await pool.volumes.create(b"v")
            async with pool.volumes.opened(b"v"):
                monkeypatch.setattr(Processor, "commit", noting)
                for object_count, is_much in ((6, False), (8, True)):
                    most: list[int] = []
                    before = begun.of_begins()
                    for index in range(object_count):
                        await volume.write(index * 4 * MIB + object_count * BLOCK, b"x" * BLOCK)
                    await volume.sync()
                    assert volume.is_clean
                    # What is little is committed side by side, though one may be done before the other begins.
                    # Others may have committed some of it meanwhile: who gives space back, say.
                    assert (begun.of_begins() - before in (1, 2)) if is_much else begun.of_begins() == before
                    assert max(most) == 1 or not is_much
                monkeypatch.setattr(Processor, "commit", commit)
    assert world.check().is_clean
