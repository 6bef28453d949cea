"""What a reader of the storage core found between two steps: each of these failed before it was mended."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest
import trio

from snapfs import unnamed
from snapfs.backends import CrashPlan, DirectoryDevice, FailNth, FaultyDevice, MemoryDevice
from snapfs.blockmap import LOG_ID_MAX
from snapfs.errors import IdsUsedUpError, NoSpaceError
from snapfs.formats import COPY_ON_WRITE, REDIRECT
from snapfs.making import VolumeWish
from snapfs.pool import Pool
from snapfs.volume import Volume

from .harness import Running, World, open_world, read_snapshot, read_volume

BLOCK = 4096
OBJECT = 4 << 20
BORDER = OBJECT - BLOCK


async def put(pool: Pool, name: bytes, offset: int, data: bytes) -> None:
    async with pool.volumes.opened(name) as volume:
        await volume.write(offset, data)


async def test_clearing_after_a_crash_ends_where_a_batch_of_logs_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last log of a family was the one that filled the batch: what was left was a batch of none."""
    monkeypatch.setattr(unnamed, "_MASKS_MAX", 2)
    world = World(processor_count=1)
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        await running.pool.volumes.create(b"v")
        for index in range(2):
            await put(running.pool, b"v", index * OBJECT, b"x" * BLOCK)
        await running.pool.volumes.get(b"v").sync()
        await put(running.pool, b"v", BLOCK, b"y" * BLOCK)
        await running.crash(CrashPlan(1, 1.0, 0.0))
        nursery.cancel_scope.cancel()
    async with open_world(world) as pool:
        await pool.reclaimer.reclaim_all()
        assert (await read_volume(pool, b"v"))[:BLOCK] == b"x" * BLOCK
    world.check_clean()


@pytest.mark.parametrize("hooked", [False, True])
async def test_a_snapshot_by_name_holds_what_was_renamed_into_place_meanwhile(hooked: bool) -> None:
    async with open_world(World()) as pool:
        old, new = await pool.volumes.create(b"a"), await pool.volumes.create(b"b")
        # What a kernel has in its pages, of writes that have returned.
        in_kernel = {old: b"old" * 1000, new: b"new" * 1000}
        is_renamed = False

        async def before_cut(volumes: Sequence[Volume]) -> None:
            nonlocal is_renamed
            for volume in volumes:
                data = in_kernel.pop(volume, None)
                if data is not None:
                    async with pool.volumes.opened(volume.name) as opened:
                        await opened.write(0, data)
            if not is_renamed:
                is_renamed = True
                await pool.volumes.rename(b"b", b"a")

        pool.snapshots.before_cut = before_cut
        snapshot = await pool.snapshots.create(b"s", [b"a"], with_hooks=hooked)
        assert await read_snapshot(pool, snapshot, b"a") == b"new" * 1000


class _ChangeLogWorld(World):
    def open_device(self, path: str) -> MemoryDevice:
        if path == "logs":
            self.devices.setdefault(path, MemoryDevice())
        found = super().open_device(path)
        assert isinstance(found, MemoryDevice)
        return found


@pytest.mark.parametrize("mode", [REDIRECT, COPY_ON_WRITE])
async def test_what_needs_no_room_is_written_though_a_change_log_volume_was_made_too_small(mode: int) -> None:
    async with open_world(_ChangeLogWorld()) as pool:
        await pool.changelogs.create(b"c", ["logs"], 1 << 20)
        await pool.maker.create(VolumeWish(b"v", 2 * OBJECT, mode, changelog_name=b"c"))
        await put(pool, b"v", BORDER - BLOCK, b"1" * 3 * BLOCK)
        await pool.snapshots.create(b"s")
        await put(pool, b"v", BORDER, b"2" * 2 * BLOCK)
        await pool.changelogs.resize(b"c", BLOCK)
        await put(pool, b"v", BORDER, b"3" * 2 * BLOCK)
        assert (await read_volume(pool, b"v"))[BORDER:][: 2 * BLOCK] == b"3" * 2 * BLOCK
        with pytest.raises(NoSpaceError):
            await put(pool, b"v", BORDER - BLOCK, b"4" * 2 * BLOCK)


async def test_setting_the_size_that_it_has_changes_no_snapshots_times() -> None:
    async with open_world(World()) as pool:
        volume = await pool.volumes.create(b"v")
        await pool.volumes.truncate(volume, BLOCK)
        snapshot = await pool.snapshots.create(b"s")
        before = (await pool.snapshots.attributes_of(snapshot))[volume.volume_id]
        await pool.volumes.truncate(volume, BLOCK)
        assert volume.mtime_ns > before.mtime_ns
        assert (await pool.snapshots.attributes_of(snapshot))[volume.volume_id] == before


async def test_a_write_that_fails_halfway_is_a_change() -> None:
    devices: dict[str, FaultyDevice] = {}

    def make(where: str, capacity_bytes: int | None) -> FaultyDevice:
        return devices.setdefault(where, FaultyDevice(MemoryDevice(capacity_bytes)))

    async with open_world(World(processor_count=2, make_device=make)) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", BORDER, b"1" * 2 * BLOCK)
        await pool.volumes.get(b"v").sync()
        snapshot = await pool.snapshots.create(b"s")
        devices["0"].hook = FailNth("write", 2, errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            await put(pool, b"v", BORDER, b"2" * 2 * BLOCK)
        devices["0"].hook = None
        assert (await read_volume(pool, b"v"))[BORDER : BORDER + BLOCK] == b"2" * BLOCK
        assert await pool.snapshots.has_changed_since(snapshot)


async def test_no_change_log_is_begun_that_no_map_could_name() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        pool.processors[0].logs.next_log_id = LOG_ID_MAX
        await put(pool, b"v", 0, b"1" * OBJECT)
        await pool.snapshots.create(b"s")
        for length in (BLOCK, OBJECT):
            with pytest.raises(IdsUsedUpError):
                await put(pool, b"v", 0, b"2" * length)
        await pool.volumes.get(b"v").sync()
    async with open_world(world) as pool:
        assert await read_volume(pool, b"v") == b"1" * OBJECT
        with pytest.raises(IdsUsedUpError):
            await put(pool, b"v", 0, b"2" * BLOCK)
    world.check_clean()


def test_a_device_that_is_closed_says_so(tmp_path: object) -> None:
    device = DirectoryDevice(str(tmp_path))
    device.create("logs/0/1").close()
    device.close()
    for call in (device.open, device.create, device.remove):
        with pytest.raises(OSError, match="closed"):
            call("logs/0/1")
