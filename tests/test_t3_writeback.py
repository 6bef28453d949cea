"""When devices are asked to begin to write, and what that may not change."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path

import pytest
import trio.testing

from snapfs.backends import DirectoryDevice, FaultyDevice, MemoryDevice
from snapfs.pool import Pool

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
