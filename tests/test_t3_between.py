"""What others do, or what fails, between two steps of a truncate, a deletion, a removal or a making."""

from __future__ import annotations

import errno
import itertools
import math
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from snapfs import changelogvolumes, reserve, snapshots
from snapfs.backends import DirectoryDevice, MemoryDevice
from snapfs.changelog import ChangeLog, ChangeLogs
from snapfs.check import repair
from snapfs.cli import init
from snapfs.errors import (
    BusyVolumeError,
    DatabaseFullError,
    ExistsError,
    HeldError,
    InUseError,
    NoMemoryError,
    NoSpaceError,
    NotFoundError,
    StallError,
    SyncFailedError,
)
from snapfs.formats import COPY_ON_WRITE, LEFTOVERS_FROM, REDIRECT, AttributeChange
from snapfs.freeze import Freeze
from snapfs.fuse.command import CommandContext
from snapfs.fuse.control import run_line
from snapfs.making import VolumeWish
from snapfs.pool import Pool
from snapfs.portion import Portion
from snapfs.processor import Processor
from snapfs.schedule import make_schedule
from snapfs.tasks import Wakeup, in_thread
from snapfs.volume import _TRIM_DUE, Volume

from .conftest import invoke
from .harness import World, in_memory, open_until_power_is_lost, open_world, read_snapshot, read_volume, without_threads

BLOCK = 4096
OBJECT = 4 << 20


def noise(block_count: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(block_count * BLOCK)


async def put(pool: Pool, name: bytes, offset: int, data: bytes) -> None:
    async with pool.volumes.opened(name) as volume:
        await volume.write(offset, data)
        await volume.sync()


class Held:
    """A call that waits until it is let go on, once, and then fails if it is to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.entered, self.go_on = trio.Event(), trio.Event()
        self._error = error

    async def wait(self) -> None:
        self.entered.set()
        await self.go_on.wait()
        if self._error is not None:
            raise self._error


def hold_clearing_of(name: bytes, monkeypatch: pytest.MonkeyPatch) -> Held:
    """Have what lies behind a volume's size be cleared only when that is let go on."""
    held, trim_portion = Held(), Volume._trim_portion

    async def trim_slowly(volume: Volume, processor: Processor, portion: Portion) -> None:
        if volume.name == name:
            await held.wait()
        await trim_portion(volume, processor, portion)

    monkeypatch.setattr(Volume, "_trim_portion", trim_slowly)
    return held


@pytest.mark.parametrize("is_power_lost", [False, True])
async def test_nothing_is_cleared_before_the_smaller_size_is_durable(
    monkeypatch: pytest.MonkeyPatch, is_power_lost: bool
) -> None:
    """A truncate whose commit fails, or never comes, beside the reclaimer, which looks for what is to be cleared."""
    world = World(processor_count=2)
    data = noise(1024) + noise(100, 2)
    held = Held(DatabaseFullError("the device that holds the catalog is full", ""))
    with without_threads(1):
        async with (open_until_power_is_lost if is_power_lost else open_world)(world) as pool:
            volume = await pool.volumes.create(b"v")
            await put(pool, b"v", 0, data)
            save = pool.catalog.save

            async def save_later(*args: object) -> None:
                monkeypatch.setattr(pool.catalog, "save", save)
                await held.wait()

            async def cut() -> None:
                with pytest.raises(NoSpaceError):
                    await pool.volumes.truncate(volume, BLOCK)

            monkeypatch.setattr(pool.catalog, "save", save_later)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cut)
                await held.entered.wait()
                nursery.start_soon(pool.reclaimer.reclaim_all)
                await trio.testing.wait_all_tasks_blocked()
                for processor in pool.processors:
                    await processor.commit()
                if is_power_lost:
                    nursery.cancel_scope.cancel()
                held.go_on.set()
            if not is_power_lost:
                assert await read_volume(pool, b"v") == data
        async with open_world(world) as pool:
            assert await read_volume(pool, b"v") == data


@pytest.mark.parametrize("change_mode", [0, COPY_ON_WRITE])
async def test_what_waited_while_its_volume_was_removed_leaves_snapshots_alone(change_mode: int) -> None:
    world = World(processor_count=2)
    data = noise(50)
    async with open_world(world) as pool:
        volume = await pool.maker.create(VolumeWish(b"v", 50 * BLOCK, change_mode))
        await put(pool, b"v", 0, data)
        snapshot = await pool.snapshots.create(b"s")
        await pool.volumes.remove(b"v")
        # Each looked the volume up before.
        with pytest.raises(NotFoundError):
            await pool.volumes.discard(volume, 0, 40 * BLOCK)
        with pytest.raises(NotFoundError):
            await pool.volumes.truncate(volume, BLOCK)
        with pytest.raises(NotFoundError):
            await pool.volumes.fit(volume)
        await volume.trim()
        if change_mode == COPY_ON_WRITE:
            # Even so: its source is its snapshots' alone.
            with pytest.raises(NotFoundError):
                await anext(volume.discard(0, 40 * BLOCK))
        assert await read_snapshot(pool, snapshot, b"v") == data
    async with open_world(world) as pool:
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == data
    world.check_clean()


async def test_a_volume_that_is_removed_before_its_turn_to_be_cleared_leaves_snapshots_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a crash amid a truncate the reclaimer clears what lies behind sizes, one volume after the other."""
    world = World(processor_count=1)
    data = noise(50)
    with without_threads(1):
        async with open_until_power_is_lost(world) as pool:
            await pool.volumes.create(b"a")
            await put(pool, b"a", 0, noise(10))
            volume = await pool.maker.create(VolumeWish(b"v", 50 * BLOCK, COPY_ON_WRITE))
            await put(pool, b"v", 0, data)
            await pool.snapshots.create(b"s")
            never = Held()
            with monkeypatch.context() as patch:
                patch.setattr(Volume, "_trim_portion", lambda *_: never.wait())
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pool.volumes.truncate, volume, BLOCK)
                    await never.entered.wait()
                    nursery.cancel_scope.cancel()
        held = hold_clearing_of(b"a", monkeypatch)
        async with open_world(world) as pool:
            await held.entered.wait()
            await pool.volumes.remove(b"v")
            held.go_on.set()
            await trio.testing.wait_all_tasks_blocked()
            assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == data


async def test_a_volume_that_is_removed_while_it_is_cleared_goes(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: None
) -> None:
    world = World(processor_count=1)
    with without_threads(1):
        async with open_until_power_is_lost(world) as pool:
            await pool.volumes.create(b"v")
            await put(pool, b"v", 0, noise(50))
        held = hold_clearing_of(b"v", monkeypatch)
        async with open_world(world) as pool:
            await held.entered.wait()
            await pool.volumes.remove(b"v")
            held.go_on.set()
            await trio.sleep(10)
            assert not pool.reclaimer.waiting_count and not pool.reclaimer.is_at_work
    world.check_clean()


async def test_a_clone_that_finds_no_room_keeps_no_other_space_from_coming_back() -> None:
    """The snapshot a clone looks into is deleted while the change log volume that it would need is full."""
    world = World(processor_count=2)
    world.devices["x"] = MemoryDevice()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"x", ["x"], 300 * BLOCK)
        await pool.maker.create(VolumeWish(b"v", 1 << 20, COPY_ON_WRITE, changelog_name=b"x"))
        await put(pool, b"v", 0, noise(200))
        await pool.snapshots.create(b"s0")
        for number in range(1, 5):
            await put(pool, b"v", 0, noise(50, number))
            await pool.snapshots.create(b"s%d" % number)
        await pool.clones.clone(b"s4", b"v", b"c")
        await put(pool, b"v", 0, noise(50, 5))
        await pool.snapshots.create(b"s5")
        with pytest.raises(NoSpaceError):
            await put(pool, b"v", 0, noise(200, 6))
        for name in (b"s4", b"s0", b"s1", b"s2", b"s3", b"s5"):
            await pool.snapshots.delete(name)
        for _ in range(2):
            try:
                await pool.reclaimer.reclaim_all()
            except NoSpaceError:
                continue
        assert not pool.snapshots.deleted
        contents = noise(50, 4) + noise(200)[50 * BLOCK :]
        assert await read_volume(pool, b"c") == contents.ljust(1 << 20, b"\0")
        await put(pool, b"v", 0, noise(50, 7))


async def test_deleting_takes_the_reserve_also_for_what_is_to_be_committed_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pool's directory is full, and a writer's maps wait; the deletion itself had room in the write-ahead log."""
    monkeypatch.setattr(reserve, "_SHARE", 3)
    world = World(1, make_device=lambda where, _: MemoryDevice(15 << 20 if where == "home" else None))
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        pool.volumes.open(volume)
        for number in range(4):
            for index in range(6):
                for block in range(number, 1024, 7):
                    await volume.write(index * OBJECT + block * BLOCK, noise(1))
            await volume.sync()
            await pool.snapshots.create(b"s%d" % number)
        for _ in range(600):
            await pool.snapshots.hold(b"s0", "tag")
            await pool.snapshots.release(b"s0", "tag")
        home = in_memory(world.home)
        filler = home.create("filler")
        filler.write(bytes(home.space().free_bytes), 0)
        for index in range(6):
            for block in range(4, 1024, 3):
                await volume.write(index * OBJECT + block * BLOCK, noise(1, 2))
        for index in range(6, 300):
            await volume.write(index * OBJECT + BLOCK, noise(1, 3))
        with pytest.raises(NoSpaceError):
            await volume.sync()
        await pool.snapshots.delete(b"s0")
        await pool.reclaimer.reclaim_all()
        assert not pool.snapshots.deleted
        await volume.sync()
        pool.volumes.close(volume)
        filler.close()
        home.remove("filler")


async def test_a_schedule_deletes_what_it_chose_by_whatever_name() -> None:
    """Meanwhile a script makes the newest snapshot the one called latest, a name that was chosen for deletion."""
    async with open_world(World(processor_count=1)) as pool:
        await pool.volumes.create(b"v")
        await pool.scheduler.add(make_schedule("hourly", "1h", keep="1"))
        for name in (b"one", b"latest"):
            await pool.snapshots.create(name, schedule="hourly")
        renamed: list[bytes] = []

        async def forget(name: bytes) -> None:
            if name == b"one" and not renamed:
                await pool.snapshots.delete(b"latest")
                newest = max(pool.snapshots.by_id.values(), key=lambda one: one.instant)
                renamed.append(newest.name or b"")
                await pool.snapshots.rename(renamed[0], b"latest")

        pool.snapshots.forget_name = forget
        made = await pool.scheduler.run_now("hourly")
        assert renamed and made is not None and list(pool.snapshots.by_name) == [b"latest"]
        assert made.snapshot_id in pool.snapshots.by_id


async def test_change_log_volumes_that_the_catalog_has_stay_when_their_devices_cannot_be_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(processor_count=1)
    world.devices["x"] = MemoryDevice()

    async def short_of_threads(call: object, *args: object) -> object:
        if getattr(call, "__name__", "") == "_note_generation":
            raise NoMemoryError("can't start new thread", "")
        return await in_thread(call, *args)  # type: ignore[arg-type]

    async with open_world(world) as pool:
        monkeypatch.setattr(changelogvolumes, "in_thread", short_of_threads)
        await pool.changelogs.create(b"x", ["x"], 1 << 30)
        assert [one["name"] for one in pool.changelogs.entries()] == ["x"]
    async with open_world(world) as pool:
        assert [one["name"] for one in pool.changelogs.entries()] == ["x"]


async def test_room_is_made_although_a_cut_volume_cannot_be_cleared_for_want_of_it() -> None:
    world = World(processor_count=1)
    world.devices["x"] = MemoryDevice()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"x", ["x"], 200 * BLOCK, frees_oldest=True)
        for name in (b"a", b"b"):
            await pool.maker.create(VolumeWish(name, 1 << 20, changelog_name=b"x"))
        await put(pool, b"b", 0, noise(100))
        await put(pool, b"a", 0, noise(100))
        await pool.snapshots.create(b"old", hold_tags=["keep"])
        await put(pool, b"a", 0, noise(100, 2))
        await pool.snapshots.create(b"new", hold_tags=["keep"])
        await put(pool, b"a", 0, noise(100, 3))
        await pool.volumes.truncate(pool.volumes.get(b"b"), 100)
        assert pool.volumes.get(b"b").needs_trim
        await pool.snapshots.release(b"new", "keep")
        quota = pool.changelogs.get(b"x")
        (changelog_id,) = pool.placement.quotas
        await pool.freer._free(changelog_id, quota)
        assert list(pool.snapshots.by_name) == [b"old"]


@pytest.mark.parametrize("when", ["account", "delete_this"])
async def test_what_a_user_deletes_while_room_is_made_is_waited_for(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    world.devices["x"] = MemoryDevice()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"x", ["x"], 200 * BLOCK, frees_oldest=True)
        await pool.maker.create(VolumeWish(b"a", 1 << 20, changelog_name=b"x"))
        await put(pool, b"a", 0, noise(100))
        await pool.snapshots.create(b"old", hold_tags=["keep"])
        await put(pool, b"a", 0, noise(100, 2))
        await pool.snapshots.create(b"new", hold_tags=["keep"])
        quota = pool.changelogs.get(b"x")
        (changelog_id,) = pool.placement.quotas
        looked = getattr(pool.snapshots, when)
        frees = pool.freer._free
        # The pool's own tasks for this are busy elsewhere.
        monkeypatch.setattr(pool.freer, "_look_at", lambda *_: trio.sleep(0))
        monkeypatch.setattr(pool.snapshots, "_reclaim_wakeup", Wakeup())
        await put(pool, b"a", 0, noise(100, 3))

        async def user_is_first(*args: object) -> object:
            if b"new" in pool.snapshots.by_name:
                await pool.snapshots.delete(b"new")
            return await looked(*args)

        monkeypatch.setattr(pool.snapshots, when, user_is_first)
        await pool.snapshots.release(b"new", "keep")
        assert await frees(changelog_id, quota) == ""
        assert list(pool.snapshots.by_name) == [b"old"] and quota.used_blocks <= 100


async def test_after_a_failed_sync_no_zeros_are_taken_either(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    async with open_until_power_is_lost(world) as pool:
        await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, noise(10))
            (log,) = pool.processors[0].logs.known.values()
            assert log.file is not None

            def fail() -> None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            monkeypatch.setattr(log.file, "sync", fail)
            with pytest.raises(SyncFailedError):
                await volume.sync()
            for data in (noise(1), bytes(BLOCK)):
                with pytest.raises(SyncFailedError):
                    await volume.write(20 * BLOCK, data)


async def test_an_image_becomes_the_source_of_one_of_many_that_are_made_at_a_time() -> None:
    world = World(processor_count=2)
    world.make_image("/img", noise(20))
    async with open_world(world) as pool:
        refused: list[bytes] = []

        async def make(name: bytes, change_mode: int) -> None:
            try:
                await pool.maker.create(VolumeWish(name, None, change_mode, "/img"))
            except InUseError:
                refused.append(name)

        async with trio.open_nursery() as nursery:
            for name, change_mode in ((b"a", COPY_ON_WRITE), (b"b", COPY_ON_WRITE), (b"r", REDIRECT)):
                nursery.start_soon(make, name, change_mode)
        assert len(refused) == 2 and len(pool.volumes.by_name) == 1
    world.check_clean()


async def test_a_change_log_volume_is_not_removed_while_a_volume_is_made_that_names_it() -> None:
    world = World(processor_count=1)
    world.devices["x"] = MemoryDevice()
    with without_threads(1):
        async with open_world(world) as pool:
            await pool.changelogs.create(b"x", ["x"], 1 << 30)
            refused: list[BusyVolumeError] = []

            async def remove() -> None:
                try:
                    await pool.changelogs.remove(b"x")
                except BusyVolumeError as error:
                    refused.append(error)

            async with trio.open_nursery() as nursery, pool.volumes.lock:
                nursery.start_soon(pool.maker.create, VolumeWish(b"v", 1 << 20, changelog_name=b"x"))
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(remove)
                await trio.testing.wait_all_tasks_blocked()
            assert len(refused) == 1 and len(pool.placement.quotas) == 1
            await put(pool, b"v", 0, noise(1))
            await pool.snapshots.create(b"s")
            await put(pool, b"v", 0, noise(1, 2))
    world.check_clean()


@asynccontextmanager
async def written_and_not_synced(pool: Pool, data: bytes) -> AsyncIterator[Volume]:
    """A volume, open, of which the first block is durable, and all else of this is not."""
    volume = await pool.volumes.create(b"v")
    await put(pool, b"v", 0, data[:BLOCK])
    async with pool.volumes.opened(b"v"):
        await volume.write(0, data)
        yield volume


@pytest.mark.parametrize("kind", ["sync", "snapshot"])
async def test_what_is_synced_beside_a_truncate_is_durable_up_to_the_smaller_size(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size up to which data had become durable was forgotten, and power loss cut the volume to the one before."""
    world = World(processor_count=1)
    data = noise(100)
    with without_threads(1):
        async with open_until_power_is_lost(world) as pool, written_and_not_synced(pool, data) as volume:
            held = Held()
            (processor,) = pool.processors
            commit = processor.commit

            async def commit_later(*args: object) -> int:
                monkeypatch.setattr(processor, "commit", commit)
                stall_ns = await commit(*args)  # type: ignore[arg-type]
                await held.wait()
                return stall_ns

            monkeypatch.setattr(processor, "commit", commit_later)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(volume.sync if kind == "sync" else pool.snapshots.create)
                await held.entered.wait()
                await pool.volumes.truncate(volume, 50 * BLOCK)
                held.go_on.set()
        async with open_world(world) as pool:
            assert await read_volume(pool, b"v") == data[: 50 * BLOCK]


async def test_what_is_synced_beside_a_truncate_that_fails_is_durable_up_to_the_size_that_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(processor_count=1)
    data = noise(100)
    with without_threads(1):
        async with open_until_power_is_lost(world) as pool, written_and_not_synced(pool, data) as volume:
            held = Held(DatabaseFullError("the device that holds the catalog is full", ""))
            save = pool.catalog.save

            async def save_later(*args: object) -> None:
                monkeypatch.setattr(pool.catalog, "save", save_after)
                await held.wait()

            async def save_after(*args: object) -> None:
                # One at a time: the one that fails was first.
                monkeypatch.setattr(pool.catalog, "save", save)
                held.go_on.set()
                await trio.testing.wait_all_tasks_blocked()
                await save(*args)  # type: ignore[arg-type]

            async def cut() -> None:
                with pytest.raises(NoSpaceError):
                    await pool.volumes.truncate(volume, 50 * BLOCK)

            monkeypatch.setattr(pool.catalog, "save", save_later)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cut)
                await held.entered.wait()
                await volume.sync()
        async with open_world(world) as pool:
            assert await read_volume(pool, b"v") == data


async def test_what_was_kept_for_a_snapshot_that_failed_goes_also_after_a_crash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another was published, and the daemon died, before the reclaimer came by: it stayed until check --repair."""
    world = World(processor_count=2)
    with without_threads(1):
        async with open_until_power_is_lost(world) as pool:
            monkeypatch.setattr(pool.reclaimer, "reclaim_all", lambda **_: trio.sleep_forever())
            await pool.volumes.create(b"v")
            await put(pool, b"v", 0, noise(1))
            with pytest.raises(StallError):
                await pool.snapshots.create(b"failed", max_stall_ms=0)
            # What was there then is kept for it.
            await put(pool, b"v", 0, noise(1, 2))
            await pool.volumes.change(pool.volumes.get(b"v"), AttributeChange(mode=0o640))
            await pool.snapshots.create(b"s")
        # Still to be given back is no leak.
        world.check_clean()
        async with open_world(world) as pool:
            await pool.reclaimer.reclaim_all()
            assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == noise(1, 2)
            copies = [
                one.access.store.copies_in(pool.volumes.get(b"v").volume_id, 0, 1 << 40) for one in pool.processors
            ]
            assert not any(copies) and not pool.catalog.catalog.versions()
            assert pool.catalog.catalog.meta(LEFTOVERS_FROM) == 0
    world.check_clean()


@pytest.mark.parametrize("change_mode", [0, COPY_ON_WRITE])
async def test_what_a_failed_volume_kept_for_a_deleted_snapshot_goes_when_it_is_sound_again(
    change_mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stayed until check --repair; of a removed copy-on-write volume it was damage, for its source was gone."""

    def fail(logs: ChangeLogs, dirty: list[ChangeLog]) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    world = World(1)
    with without_threads(1):
        async with open_until_power_is_lost(world) as pool:
            await pool.maker.create(VolumeWish(b"v", 50 * BLOCK, change_mode))
            await pool.volumes.create(b"w")
            await put(pool, b"v", 0, noise(50))
            snapshot = await pool.snapshots.create(b"s")
            await put(pool, b"v", 0, noise(50, 2))
            async with pool.volumes.opened(b"v") as volume:
                await volume.write(0, noise(1, 3))
                with monkeypatch.context() as patch, pytest.raises(SyncFailedError):
                    patch.setattr(ChangeLogs, "sync", fail)
                    await volume.sync()
                await pool.snapshots.delete(b"s")
                await pool.reclaimer.reclaim_all()
                assert pool.snapshots.leftovers_from == snapshot.instant
                # Of another one that is deleted now nothing is left; what is, is remembered.
                await pool.snapshots.create(b"t", [b"w"])
                await put(pool, b"w", 0, noise(1))
                await pool.snapshots.delete(b"t")
                await pool.reclaimer.reclaim_all()
                assert pool.snapshots.leftovers_from == snapshot.instant
            if change_mode == COPY_ON_WRITE:
                await pool.volumes.remove(b"v")
        async with open_world(world) as pool:
            await pool.reclaimer.reclaim_all()
            assert pool.snapshots.leftovers_from == 0
            if change_mode != COPY_ON_WRITE:
                # Its own failed sync aside nothing of it was lost.
                assert (await read_volume(pool, b"v"))[BLOCK:] == noise(50, 2)[BLOCK:]
    world.check_clean()


async def test_two_that_find_no_room_both_have_the_reserve() -> None:
    """The second found it spent, and was refused, when the first had given it up a moment before."""
    world = World()
    given_up = trio.Event()
    reserved = reserve.Reserve(world.home)
    calls = {"first": 0, "second": 0}

    async def call(name: str) -> None:
        calls[name] += 1
        if calls[name] == 1:
            if name == "second":
                await given_up.wait()
            raise DatabaseFullError("full", "")
        given_up.set()

    async with trio.open_nursery() as nursery:
        for name in calls:
            nursery.start_soon(reserved.helped, lambda name=name: call(name))
    assert calls == {"first": 2, "second": 2} and reserved.is_spent
    with pytest.raises(NoSpaceError):
        await reserved.helped(lambda: call_in_vain())


async def call_in_vain() -> None:
    raise DatabaseFullError("full", "")


async def test_what_is_held_while_room_is_made_is_told_with_what_is_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        for number in range(3):
            await (pool.volumes.create(b"v") if not number else trio.lowlevel.checkpoint())
            await put(pool, b"v", 0, noise(50, number))
            await pool.snapshots.create(b"s%d" % number)
        await put(pool, b"v", 0, noise(50, 9))

        async def hold_another(name: bytes) -> None:
            monkeypatch.undo()
            await pool.snapshots.hold(b"s1", "tag")

        async def resize(name: bytes, size_bytes: int) -> None:
            raise AssertionError

        monkeypatch.setattr(pool.snapshots, "forget_name", hold_another)
        with pytest.raises(HeldError, match="hold s1") as caught:
            await run_line(CommandContext(pool, resize), b"reclaim need=600K")
        assert "Deleted: s0, s2." in caught.value.fix
        assert list(pool.snapshots.by_name) == [b"s1"]


def test_who_comes_second_leaves_a_pool_that_was_made_meanwhile_alone(tmp_path: Path) -> None:
    device, pools = tmp_path / "device", [tmp_path / "one", tmp_path / "other"]
    device.mkdir()
    make_home = init._make_home

    def make_home_later(pool: str) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(init, "_make_home", make_home)
            assert invoke("init", pools[0], "--device", device).exit_code == 0
        return make_home(pool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "_make_home", make_home_later)
        assert isinstance(invoke("init", pools[1], "--device", device).exception, ExistsError)
    assert not pools[1].exists()
    assert invoke("check", pools[0]).exit_code == 0
    # One that is at it now.
    for folder in (pools[1], tmp_path / "empty"):
        folder.mkdir()
    for folder in (pools[1], tmp_path / "empty"):
        busy = DirectoryDevice(folder)
        busy.claim()
        assert isinstance(invoke("init", pools[1], "--device", tmp_path / "empty").exception, InUseError)
        busy.close()
        assert os.listdir(pools[1]) == []


@pytest.mark.parametrize("is_power_lost", [False, True])
async def test_a_log_without_blocks_outlives_its_change_log_volume(is_power_lost: bool) -> None:
    """After a discard as the first change since a snapshot it was on record, and no mount after a crash ended well."""
    world = World(processor_count=1)
    world.devices["logs"] = MemoryDevice()
    async with (open_until_power_is_lost if is_power_lost else open_world)(world) as pool:
        await pool.changelogs.create(b"c", ["logs"], 1 << 30)
        volume = await pool.maker.create(VolumeWish(b"v", 64 * BLOCK, changelog_name=b"c"))
        await put(pool, b"v", 0, noise(4))
        await pool.snapshots.create(b"s")
        async with pool.volumes.opened(b"v"):
            await pool.volumes.discard(volume, 0, BLOCK)
            await volume.sync()
        await pool.volumes.remove(b"v")
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        await pool.changelogs.remove(b"c")
        await pool.snapshots.create(b"t")
    for _ in range(2):
        async with open_world(world) as pool:
            await pool.reclaimer.reclaim_all()
    await repair(world.home, "memory", world.open_device)
    world.check_clean()


async def test_what_is_left_over_is_dropped_with_the_reserve_if_need_be(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(World()) as pool:
        drop = pool.reclaimer._drop_leftovers
        tries = []

        async def drop_without_room(*, gently: bool) -> None:
            tries.append(gently)
            if len(tries) == 1:
                raise DatabaseFullError("the device that holds the shard store is full", "")
            await drop(gently=gently)

        monkeypatch.setattr(pool.reclaimer, "_drop_leftovers", drop_without_room)
        await pool.reclaimer.reclaim_all()
        # The task may have come first.
        assert len(tries) >= 2 and tries[0] == tries[1]


async def test_a_truncate_that_takes_long_holds_up_nobody_else() -> None:
    """Nor do more of them, of the same volume, to less or to more, which waits until what was cut off is cleared."""
    async with open_world(World()) as pool:
        volume = await pool.volumes.create(b"v")
        pool.volumes.open(volume)
        for index in range(3000):
            await volume.write(index * OBJECT, b"x")
        await volume.sync()
        others = 0

        async def cut(size_bytes: int) -> None:
            await pool.volumes.truncate(volume, size_bytes)

        async with trio.open_nursery() as nursery:
            for size_bytes in (10 * OBJECT, 5 * OBJECT, 2999 * OBJECT, 1):
                nursery.start_soon(cut, size_bytes)
                await wait_until_trimming(volume)
                await pool.volumes.create(b"other-%d" % others)
                others += volume.is_cut_short
        assert others >= 3
        assert volume.size_bytes == 2999 * OBJECT and volume.block_count == 1 and not volume.is_cut_short
        assert bytes(await volume.read(0, 6 * OBJECT)) == b"x" + bytes(6 * OBJECT - 1)
        pool.volumes.close(volume)


async def wait_until_trimming(volume: Volume) -> None:
    for _ in range(10_000):
        if volume.is_cut_short and not volume.needs_trim:
            return
        await trio.to_thread.run_sync(lambda: None)
    raise AssertionError("nothing is cleared")


async def test_a_snapshot_amid_a_long_cut_has_the_root_of_its_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lay behind the size would count for it, and be missing where the snapshot is received."""
    # It is waited for only so long, which is for another test.
    monkeypatch.setattr(snapshots, "_CLEARING_S_MAX", math.inf)
    roots = []
    for waits in (True, False):
        async with open_world(World()) as pool:
            volume = await pool.volumes.create(b"v")
            pool.volumes.open(volume)
            for index in range(3000):
                await volume.write(index * OBJECT, b"x" * BLOCK)
            await volume.sync()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.volumes.truncate, volume, 5000)
                await wait_until_trimming(volume)
                if waits:
                    while volume.is_cut_short:
                        await trio.to_thread.run_sync(lambda: None)
                await pool.snapshots.create(b"s")
            await pool.sealer.seal_all()
            roots.append(pool.snapshots.get(b"s").root)
            pool.volumes.close(volume)
    assert roots[0] and roots[0] == roots[1]


async def test_what_was_stopped_for_nobody_is_cleared_all_the_same() -> None:
    """A rollback that is refused in the end has stopped the clearing of what was cut off."""
    async with open_world(World()) as pool:
        volume = await pool.volumes.create(b"v")
        pool.volumes.open(volume)
        await pool.snapshots.create(b"s")
        for index in range(3000):
            await volume.write(index * OBJECT, b"x" * BLOCK)
        await volume.sync()

        async def refused() -> None:
            async with volume.kept_from_trimming():
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.volumes.truncate, volume, BLOCK)
            await wait_until_trimming(volume)
            nursery.start_soon(refused)
        with trio.fail_after(60):
            while volume.needs_trim:
                await trio.sleep(1)
        assert volume.block_count == 1
        pool.volumes.close(volume)


@pytest.mark.parametrize("who", ["truncate", "snapshot"])
async def test_a_volume_that_is_removed_while_it_is_cleared_is_taken_apart_then(
    monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    world = World(1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, noise(1024))
        await pool.snapshots.create(b"s")
        if who == "snapshot":
            # What a clone inherits behind its size is still to be cleared.
            await pool.clones.clone(b"s", b"v", b"c")
        name = b"c" if who == "snapshot" else b"v"
        await pool.reclaimer.reclaim_all()
        volume = pool.volumes.get(name)
        if who == "snapshot":
            volume._trim = _TRIM_DUE
        held = hold_clearing_of(name, monkeypatch)
        async with trio.open_nursery() as nursery:
            if who == "snapshot":
                nursery.start_soon(pool.snapshots.create, b"s1")
            else:
                nursery.start_soon(pool.volumes.truncate, volume, BLOCK)
            await held.entered.wait()
            await pool.volumes.remove(name)
            await trio.testing.wait_all_tasks_blocked()
            held.go_on.set()
        with trio.fail_after(30):
            while pool.volumes.removed:
                await trio.sleep(0.01)
        assert volume not in pool.volumes._open
    world.check_clean()


async def test_a_snapshot_waits_only_so_long_for_what_is_being_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(2)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, noise(1024))
        volume = pool.volumes.get(b"v")
        held = hold_clearing_of(b"v", monkeypatch)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.volumes.truncate, volume, BLOCK)
            await held.entered.wait()
            began_s = trio.current_time()
            await pool.snapshots.create(b"s")
            assert trio.current_time() - began_s < 1
            held.go_on.set()
        assert len(await read_snapshot(pool, pool.snapshots.get(b"s"), b"v")) == BLOCK
    world.check_clean()


class Still(Freeze):
    """Applications that hold still for as long as one likes."""

    def check_now(self) -> None:
        """They do."""

    def thaw_now(self) -> None:
        """They may go on."""

    async def end(self) -> None:
        """They have."""


async def test_what_is_being_cut_off_keeps_no_application_frozen(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A hook holds it still; another program cuts a file meanwhile."""
    world = World(2)
    with without_threads(1):
        async with open_world(world) as pool:
            await pool.volumes.create(b"v")
            await put(pool, b"v", 0, noise(1024))
            volume = pool.volumes.get(b"v")
            held = hold_clearing_of(b"v", monkeypatch)
            async with trio.open_nursery() as nursery:

                @asynccontextmanager
                async def frozen(*args: object) -> AsyncIterator[Freeze]:
                    nursery.start_soon(pool.volumes.truncate, volume, BLOCK)
                    await held.entered.wait()
                    still = Still([], {}, None, None, pool.events, set())
                    still.is_active = True
                    yield still

                monkeypatch.setattr(pool.hooks, "frozen", frozen)
                began_s = trio.current_time()
                await pool.snapshots.create(b"s")
                assert trio.current_time() == began_s
                held.go_on.set()
    world.check_clean()


async def test_a_cut_just_before_a_snapshot_does_not_count_for_its_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the snapshot has looked for such, and has the lock before it."""
    roots = []
    for is_late in (False, True):
        world = World(2)
        async with open_world(world) as pool:
            volume = await pool.volumes.create(b"v")
            for index in range(20):
                await put(pool, b"v", index * OBJECT, noise(2, index))
            async with trio.open_nursery() as nursery:
                flushed = pool.snapshots._flushed

                async def late(*args: object, pool: Pool = pool, volume: Volume = volume) -> object:
                    chosen = await flushed(*args)  # type: ignore[arg-type]  # noqa: B023
                    if not volume.is_cut_short and volume.size_bytes > BLOCK:
                        nursery.start_soon(pool.volumes.truncate, volume, BLOCK)
                        while not pool.volumes.lock.locked():
                            await trio.lowlevel.checkpoint()
                    return chosen

                if is_late:
                    monkeypatch.setattr(pool.snapshots, "_flushed", late)
                else:
                    await pool.volumes.truncate(volume, BLOCK)
                snapshot = await pool.snapshots.create(b"s")
            assert await read_snapshot(pool, snapshot, b"v") == noise(1, 0)
            assert await pool.sealer.seal_all()
            roots.append(snapshot.root)
        world.check_clean()
    assert roots[0] == roots[1]


def hold_discarding(number: int, monkeypatch: pytest.MonkeyPatch) -> Held:
    """Have the object that is discarded as the so-manieth wait until it is let go on."""
    held, discard_all_of = Held(), Volume._discard_all_of
    numbers = itertools.count(1)

    async def slowly(volume: Volume, offset: int, end: int) -> None:
        if next(numbers) == number:
            await held.wait()
        await discard_all_of(volume, offset, end)

    monkeypatch.setattr(Volume, "_discard_all_of", slowly)
    return held


async def test_others_have_their_turns_while_much_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapfs.volume._TRIM_BATCH", 4)
    world = World(2)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        other = await pool.volumes.create(b"other")
        for index in range(40):
            await put(pool, b"v", index * OBJECT, noise(2, index))
        await put(pool, b"v", 40 * OBJECT, noise(1))
        held = hold_discarding(12, monkeypatch)
        came: list[str] = []
        async with trio.open_nursery() as nursery:

            async def discard() -> None:
                assert await pool.volumes.discard(volume, 100, 40 * OBJECT) > 10 * 2 * BLOCK
                came.append("discard")

            async def cut() -> None:
                await pool.volumes.truncate(other, 7)
                await pool.volumes.truncate(volume, 30 * OBJECT + 5)
                came.append("cut")

            nursery.start_soon(discard)
            await held.entered.wait()
            nursery.start_soon(cut)
            await trio.testing.wait_all_tasks_blocked()
            held.go_on.set()
        assert came == ["cut", "discard"]
        # The cut came between: nothing is written behind it.
        assert volume.size_bytes == 30 * OBJECT + 5
        assert bytes(await read_volume(pool, b"v")) == noise(1, 0)[:100] + bytes(30 * OBJECT + 5 - 100)
    world.check_clean()


async def test_a_rollback_amid_a_discard_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapfs.volume._TRIM_BATCH", 4)
    world = World(2)
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        for index in range(20):
            await put(pool, b"v", index * OBJECT, noise(2, index))
        await pool.snapshots.create(b"s")
        held = hold_discarding(3, monkeypatch)
        async with trio.open_nursery() as nursery:

            async def discard() -> None:
                with pytest.raises(BusyVolumeError, match="rolled back"):
                    await pool.volumes.discard(volume, 0, 20 * OBJECT)

            nursery.start_soon(discard)
            await held.entered.wait()
            nursery.start_soon(partial(pool.clones.rollback, b"s", force=True))
            await trio.testing.wait_all_tasks_blocked()
            held.go_on.set()
        found = await read_volume(pool, b"v")
        assert b"".join(found[index * OBJECT : index * OBJECT + 2 * BLOCK] for index in range(20)) == b"".join(
            noise(2, index) for index in range(20)
        )
    world.check_clean()
