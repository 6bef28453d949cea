"""A commit of the catalog failed, and so does what would make sure of that: a power cut may yet bring it forth."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from snapfs.backends import CrashPlan, FaultyDevice, MemoryDevice
from snapfs.errors import BusyVolumeError, NoMemoryError, SnapfsError, StaleVolumeError
from snapfs.formats import COPY_ON_WRITE, AttributeChange
from snapfs.fuse import names
from snapfs.fuse.command import nothing_to_forget
from snapfs.fuse.namespace import Caller, Namespace, NoEntryError
from snapfs.fuse.ownmount import OwnMount
from snapfs.geometry import VolumeId
from snapfs.making import VolumeWish
from snapfs.pool import Pool
from snapfs.snapshot import Snapshot, SnapshotMembers
from snapfs.status import pool_status, processor_status

from .harness import Running, World, open_world, read_snapshot

NEWEST = CrashPlan(1, 1.0, 0.0, newest=True)


class Unsettling:
    """A hook: the next sync of the catalog's log fails, and every write and sync of it after that."""

    def __init__(self) -> None:
        self.is_on = False
        self._has_failed = False

    def __call__(self, kind: str, name: str) -> None:
        if self.is_on and "catalog" in name and (kind == "sync" or (kind == "write" and self._has_failed)):
            self._has_failed = True
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)


@asynccontextmanager
async def unsettling(world: World) -> AsyncIterator[tuple[Pool, Unsettling]]:
    """An open pool; at the end power is lost, what was written last being there, and what is left is looked at."""
    hook = Unsettling()
    home = world.home
    world.home = FaultyDevice(home, hook)
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        yield running.pool, hook
        assert isinstance(home, MemoryDevice)
        found = {"home": home.crash(NEWEST), "outside": MemoryDevice()}
        for path, device in world.devices.items():
            assert isinstance(device, MemoryDevice)
            found[path] = device.crash(NEWEST)
        nursery.cancel_scope.cancel()
    for processor in running.pool.processors:
        processor.access.store.database.abandon()
    running.pool.catalog.catalog.database.abandon()
    after = World.found(found)
    after.check()
    async with open_world(after) as pool:
        for snapshot in pool.snapshots.by_name.values():
            assert await read_snapshot(pool, snapshot, b"v") == b"X" * 8192


async def a_volume(pool: Pool) -> None:
    volume = await pool.volumes.create(b"v")
    pool.volumes.open(volume)
    await volume.write(0, b"X" * 8192)
    await volume.sync()


async def test_a_snapshot_that_failed_meanwhile_is_not_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    async with unsettling(World(2, 1)) as (pool, hook):
        await a_volume(pool)
        await pool.reclaimer.reclaim_all()
        release = pool.reclaimer._release_aborted
        released = []

        async def slow(snapshot_id: int, instant: int) -> None:
            released.append(snapshot_id)
            if len(released) == 1:
                hook.is_on = True
                with pytest.raises(SnapfsError):
                    await pool.snapshots.create(b"second")
                assert not pool.catalog.is_settled
                await pool.volumes.get(b"v").write(0, b"Y" * 8192)
                await pool.processors[0].commit()
            await release(snapshot_id, instant)  # type: ignore[arg-type]

        monkeypatch.setattr(pool.reclaimer, "_release_aborted", slow)
        with pytest.raises(SnapfsError):
            await pool.snapshots.create(b"first", max_stall_ms=0)
        with pytest.raises(SnapfsError):
            await pool.reclaimer.reclaim_all()
        assert len(released) == 1 and len(pool.snapshots.aborted) == 1


async def test_a_change_log_volume_that_may_come_forth_keeps_its_descriptor() -> None:
    world = World(2, 1)
    world.devices["logs"] = MemoryDevice()
    async with unsettling(world) as (pool, hook):
        await a_volume(pool)
        hook.is_on = True
        with pytest.raises(SnapfsError):
            await pool.changelogs.create(b"logs", ["logs"], 1 << 24)


async def test_no_sync_is_acknowledged() -> None:
    async with unsettling(World(2, 1)) as (pool, hook):
        await a_volume(pool)
        hook.is_on = True
        with pytest.raises(SnapfsError):
            await pool.volumes.remove(b"v")
        with pytest.raises(SnapfsError):
            await pool.volumes.get(b"v").sync(data_only=True)


async def test_nobody_opens_a_volume_of_which_the_kernel_keeps_what_it_was() -> None:
    async with open_world(World(2, 1)) as pool:
        volume, other = await pool.volumes.create(b"v"), await pool.volumes.create(b"w")
        await pool.snapshots.create(b"s")

        async def resize(name: bytes, size_bytes: int) -> None:
            """Nobody asks for it."""

        async def fail(file_ids: Sequence[VolumeId]) -> dict[VolumeId, str]:
            return {volume.file_id: "out of luck"}

        async def succeed(file_ids: Sequence[VolumeId]) -> dict[VolumeId, str]:
            return {}

        namespace = Namespace(pool, "/nowhere", resize, nothing_to_forget)
        pool.clones.after_rollback = fail
        with pytest.raises(StaleVolumeError, match=r"kept as '.*-before-rollback'.* that 'v' had .out of luck."):
            await pool.clones.rollback(b"s")
        assert len(pool.snapshots.by_name) == 2
        for flags in (os.O_RDONLY, os.O_RDWR | os.O_TRUNC):
            with pytest.raises(StaleVolumeError):
                await namespace.open(names.of_volume(volume.file_id), flags, Caller(1, 1, 1))
        namespace.close(await namespace.open(names.of_volume(other.file_id), os.O_RDONLY, Caller(1, 1, 1)))
        assert not await pool.clones.mend_stale()
        with pytest.raises(StaleVolumeError):
            await namespace.open(names.of_volume(volume.file_id), os.O_RDONLY, Caller(1, 1, 1))
        pool.clones.after_rollback = succeed
        assert await pool.clones.mend_stale()
        namespace.close(await namespace.open(names.of_volume(volume.file_id), os.O_RDONLY, Caller(1, 1, 1)))


async def test_one_file_that_the_kernel_cannot_be_told_of_keeps_no_other_from_it() -> None:
    async with open_world(World(2, 1)) as pool:
        volumes = [await pool.volumes.create(name) for name in (b"v", b"w")]
        told: list[int] = []

        async def resize(name: bytes, size_bytes: int) -> None:
            """Nobody asks for it."""

        async def invalidate(inode: int) -> None:
            told.append(inode)
            raise NoMemoryError("no thread")

        own_mount = OwnMount(Namespace(pool, "/nowhere", resize, nothing_to_forget), "/nowhere", invalidate)
        failed = await own_mount.refresh([one.file_id for one in volumes])
        assert set(failed) == {one.file_id for one in volumes} and len(told) == 2


async def test_a_rollback_that_is_known_to_fail_changes_nothing() -> None:
    async with open_world(World(2, 1)) as pool:
        await pool.volumes.create(b"v")
        await pool.snapshots.create(b"s")

        async def refuse(volumes: object) -> None:
            raise BusyVolumeError("it runs")

        pool.clones.before_rollback = refuse
        with pytest.raises(BusyVolumeError, match="it runs"):
            await pool.clones.rollback(b"s")
        assert list(pool.snapshots.by_name) == [b"s"] and not pool.clones.rolling_back


async def test_nobody_opens_a_volume_that_is_being_rolled_back() -> None:
    async with open_world(World(2, 1)) as pool:
        volume = await pool.volumes.create(b"v")
        await pool.snapshots.create(b"s")
        seen = []

        async def resize(name: bytes, size_bytes: int) -> None:
            """Nobody asks for it."""

        namespace = Namespace(pool, "/nowhere", resize, nothing_to_forget)
        inode = names.of_volume(volume.file_id)

        async def look(volumes: object) -> dict[VolumeId, str]:
            with pytest.raises(BusyVolumeError):
                await namespace.open(inode, os.O_RDONLY, Caller(1, 1, 1))
            with pytest.raises(BusyVolumeError):
                await namespace.open(inode, os.O_RDWR | os.O_TRUNC, Caller(1, 1, 1))
            for change, size_bytes in ((AttributeChange(mode=0o777), None), (AttributeChange(), 0)):
                with pytest.raises(BusyVolumeError):
                    await namespace.change(inode, change, size_bytes, Caller(1, 1, 1))
            await namespace.change(inode, AttributeChange(mtime_ns=1), None, Caller(1, 1, 1))
            seen.append(volumes)
            return {}

        pool.clones.after_rollback = look
        await pool.clones.rollback(b"s")
        assert len(seen) == 1
        handle = await namespace.open(inode, os.O_RDONLY, Caller(1, 1, 1))
        namespace.close(handle)


async def test_a_snapshots_file_stays_while_it_is_open_also_when_asked_for_amid_a_deletion() -> None:
    world = World(2, 1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"1" * 4096)
        snapshot = await pool.snapshots.create(b"s")
        await pool.volumes.change(volume, AttributeChange(mode=0o600))
        await pool.snapshots.create(b"t")
        await pool.snapshots.delete(b"t")

        async def resize(name: bytes, size_bytes: int) -> None:
            """Nobody asks for it."""

        namespace = Namespace(pool, "/nowhere", resize, nothing_to_forget)
        inode = names.of_snapshot_volume(snapshot.snapshot_id, volume.volume_id)
        handle = await namespace.open(inode, os.O_RDONLY, Caller(1, 1, 1))
        members = pool.snapshots.members

        async def late(asked: Snapshot) -> SnapshotMembers:
            await pool.snapshots.delete(b"s")
            await pool.reclaimer.reclaim_all()
            return await members(asked)

        pool.snapshots.members = late  # type: ignore[method-assign,assignment]
        for _ in range(2):
            node = await namespace.node(inode)
            # Blocks are not counted any more; as many are told as there may be.
            assert (node.size_bytes, node.block_count_512) == (4096, 8)
        namespace.close(handle)
        with pytest.raises(NoEntryError):
            await namespace.node(inode)
    world.check_clean()


async def test_status_tells_of_a_device_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(World(2, 1)) as pool:

        def gone() -> object:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

        with monkeypatch.context() as patch:
            patch.setattr(pool.devices[next(iter(pool.devices))], "space", gone)
            status: dict[str, Any] = await pool_status(pool)
        (device,) = status["devices"]
        assert device["free_bytes"] is None and status["space"]["free_bytes"] == 0


async def test_status_tells_of_a_pool_of_which_nothing_can_be_read() -> None:
    """All calls to all devices fail from some moment on, as when the filesystem below shuts down."""
    is_down: list[bool] = []

    def fail(kind: str, name: str) -> None:
        if is_down:
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    world = World(2, 1, make_device=lambda where, capacity_bytes: FaultyDevice(MemoryDevice(capacity_bytes), fail))
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"x" * 9000)
        await pool.snapshots.create(b"s")
        for processor in pool.processors:
            # What SQLite still has in its cache would hide the failure.
            await processor.access.ask(lambda store=processor.access.store: store.database.rows("PRAGMA shrink_memory"))
        is_down.append(True)
        status: dict[str, Any] = await pool_status(pool)
        assert status["health"] == "failed"
        (device,) = status["devices"]
        assert device["failure"] == "Input/output error"
        for processor in pool.processors:
            assert "processor" in await processor_status(processor)
        is_down.clear()


async def test_a_volume_that_did_not_come_forth_leaves_nothing_behind() -> None:
    """What was made for it is given back by the next opening."""
    world = World(2, 1)
    hook = Unsettling()
    home = world.home
    assert isinstance(home, MemoryDevice)
    world.home = FaultyDevice(home, hook)
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        hook.is_on = True
        with pytest.raises(SnapfsError):
            await running.pool.maker.create(VolumeWish(b"c", 8192, COPY_ON_WRITE))
        assert not running.pool.catalog.is_settled
        for processor in running.pool.processors:
            await processor.commit()
        (data,) = world.devices.values()
        assert isinstance(data, MemoryDevice)
        found = {"home": home.crash(CrashPlan(1, 0.0)), "outside": MemoryDevice(), "0": data.crash(CrashPlan(1, 0.0))}
        nursery.cancel_scope.cancel()
    for processor in running.pool.processors:
        processor.access.store.database.abandon()
    running.pool.catalog.catalog.database.abandon()
    after = World.found(found)
    async with open_world(after) as pool:
        assert not pool.volumes.by_name
        await pool.reclaimer.reclaim_all()
    after.check_clean()
