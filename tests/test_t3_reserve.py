"""The pool's directory is full: what was written becomes durable all the same, and what is deleted comes back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from snapfs import reserve
from snapfs.backends import MemoryDevice
from snapfs.errors import NoMemoryError, NoSpaceError
from snapfs.making import VolumeWish
from snapfs.pool import SYNC_PERIOD_S, Pool
from snapfs.volume import Volume

from .harness import World, in_memory, open_world, read_volume
from .test_t3_between import noise

OBJECT = 4 << 20
BLOCK = 4096
FILLER = "filler"


def small_world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A pool whose directory has room for little, a sixth of it kept back."""
    monkeypatch.setattr(reserve, "_SHARE", 6)
    return World(1, make_device=lambda where, _: MemoryDevice(12 << 20 if where == "home" else None))


def fill(world: World) -> None:
    """Somebody else takes all room there is in the pool's directory."""
    home = in_memory(world.home)
    filler = home.create(FILLER)
    filler.write(bytes(home.space().free_bytes), 0)
    filler.close()


async def scatter(volume: Volume, seed: int) -> None:
    """Writes whose maps take more than a megabyte."""
    for index in range(300):
        for block in range(0, 64, 2):
            await volume.write(index * OBJECT + block * BLOCK, noise(1, seed))


@asynccontextmanager
async def open_and_full(world: World) -> AsyncIterator[tuple[Pool, Volume]]:
    """A pool with a snapshot that was written to since, and no room for the maps of that."""
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        pool.volumes.open(volume)
        await scatter(volume, 1)
        # This one is not written to again.
        await volume.write(100 * BLOCK, noise(1))
        await volume.sync()
        await pool.snapshots.create(b"s")
        fill(world)
        await scatter(volume, 2)
        with pytest.raises(NoSpaceError):
            await volume.sync()
        yield pool, volume


async def test_what_was_written_is_there_after_an_orderly_end(monkeypatch: pytest.MonkeyPatch) -> None:
    world = small_world(monkeypatch)
    async with open_and_full(world) as (pool, volume):
        written = bytes(await volume.read(0, 2 * OBJECT))
    async with open_world(world) as pool:
        assert (await read_volume(pool, b"v"))[: 2 * OBJECT] == written


async def test_what_was_written_becomes_durable_within_a_period(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_and_full(small_world(monkeypatch)) as (pool, volume):
        await trio.sleep(2 * SYNC_PERIOD_S)
        assert pool.reserve.is_spent and volume.is_clean
        await volume.sync()


async def test_nobody_takes_the_room_that_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    world = small_world(monkeypatch)
    async with open_and_full(world) as (pool, volume):
        await pool.sync()
        for _ in range(2):
            with pytest.raises(NoSpaceError, match="the pool's directory is full"):
                await volume.write(BLOCK, noise(1))
            # Neither does what takes none: over what was written since the snapshot, and zeros.
            await volume.write(0, noise(1, 7))
            await volume.write(2 * BLOCK, bytes(BLOCK))
            for refused in (pool.snapshots.create(b"t"), pool.volumes.create(b"w")):
                with pytest.raises(NoSpaceError):
                    await refused
            # Time alone gives no room.
            await trio.sleep(2 * SYNC_PERIOD_S)
        await pool.snapshots.delete(b"s")
        await pool.reclaimer.reclaim_all()
        assert not pool.snapshots.deleted
        in_memory(world.home).remove(FILLER)
        await trio.sleep(2 * SYNC_PERIOD_S)
        assert not pool.reserve.is_spent and not pool.reserve.is_short
        await volume.write(BLOCK, noise(1))
        await pool.snapshots.create(b"t")


async def test_a_pool_that_is_opened_without_room_keeps_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    world = small_world(monkeypatch)
    async with open_and_full(world) as (pool, _):
        await pool.sync()
    async with open_world(world) as pool, pool.volumes.opened(b"v") as volume:
        with pytest.raises(NoSpaceError):
            await volume.write(BLOCK, noise(1))
        await pool.snapshots.delete(b"s")


async def test_where_nothing_can_be_set_aside_there_is_no_end_of_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a filesystem that keeps no room for blocks of zeros."""
    world = small_world(monkeypatch)
    async with open_and_full(world) as (pool, volume):
        await pool.sync()
        in_memory(world.home).remove(FILLER)
        monkeypatch.setattr(pool.reserve, "fill", lambda: (_ for _ in ()).throw(OSError(95, "not supported")))
        await trio.sleep(2 * SYNC_PERIOD_S)
        assert pool.reserve.is_spent
        await volume.write(BLOCK, noise(1))


async def test_whoever_writes_while_the_reserve_is_filled_keeps_nobody_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room has come back, and is being set aside in a thread: a write asks at that very moment."""
    world = small_world(monkeypatch)
    async with open_and_full(world) as (pool, volume):
        await pool.sync()
        in_memory(world.home).remove(FILLER)
        fill_reserve = pool.reserve.fill
        is_filling, may_end = threading.Event(), threading.Event()

        def fill_slowly() -> None:
            fill_reserve()
            is_filling.set()
            assert may_end.wait(20)

        monkeypatch.setattr(pool.reserve, "fill", fill_slowly)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.reserve.refill)
            while not is_filling.is_set():
                await trio.to_thread.run_sync(lambda: None)
            nursery.start_soon(volume.write, BLOCK, noise(1))
            await trio.testing.wait_all_tasks_blocked()
            may_end.set()
        assert not pool.reserve.is_short and not pool.reserve.is_spent


@pytest.mark.parametrize("failure", [OSError(5, "broken"), NoMemoryError("no thread"), FileNotFoundError(2, "gone")])
async def test_a_reserve_that_cannot_be_given_up_shuts_nobody_out(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    world = small_world(monkeypatch)

    def fail(home: object) -> None:
        raise failure

    async with open_and_full(world) as (pool, volume):
        with monkeypatch.context() as patch:
            if isinstance(failure, FileNotFoundError):
                # By somebody who looked for room, which is what it is for.
                in_memory(world.home).remove("reserve")
            else:
                patch.setattr(reserve, "give_up", fail)
            is_gone = isinstance(failure, FileNotFoundError)
            with contextlib.nullcontext() if is_gone else pytest.raises(type(failure)):
                await pool.sync()
        in_memory(world.home).remove(FILLER)
        with trio.fail_after(60):
            await trio.sleep(2 * SYNC_PERIOD_S)
            await volume.write(BLOCK, noise(1))
        assert not pool.reserve.is_short


async def test_a_cut_to_within_a_block_gives_room_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of its last block is to be zeros, in a new place: that waits, and nothing else does."""
    async with open_and_full(small_world(monkeypatch)) as (pool, volume):
        await pool.sync()
        assert pool.reserve.is_short
        assert volume.block_count > 5000
        await pool.volumes.truncate(volume, 100 * BLOCK + 100)
        assert volume.block_count == 33


async def test_a_full_change_log_volume_takes_nothing_of_the_reserve() -> None:
    world = World(1)
    world.devices["logs"] = MemoryDevice()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"logs", ["logs"], 4 * BLOCK)
        await pool.maker.create(VolumeWish(b"v", 1 << 20, changelog_name=b"logs"))
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, noise(4))
            await pool.snapshots.create(b"s")
            await volume.write(0, noise(4, 2))
            with pytest.raises(NoSpaceError):
                await volume.write(4 * BLOCK, noise(1))
            await pool.snapshots.create(b"t")
            # The rest of the last block finds no room there, each time it is tried.
            await pool.volumes.truncate(volume, 100)
            assert volume.needs_trim
            await trio.sleep(60)
        assert not pool.reserve.is_spent and not pool.reserve.is_short
        await pool.volumes.create(b"w")


async def test_checksums_do_not_take_the_room_that_deleting_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sealer has not come to what was written when the device is full and a deletion is given the reserve."""
    monkeypatch.setattr(reserve, "_SHARE", 10)
    world = World(1, make_device=lambda where, _: MemoryDevice(12 << 20 if where == "home" else None))
    names = [b"s%d" % number for number in range(6)]
    async with open_world(world) as pool:
        async with pool.sealer._turn:
            volume = await pool.volumes.create(b"v")
            pool.volumes.open(volume)
            blocks = noise(1024)
            for index in range(56):
                await volume.write(index * OBJECT, blocks)
            for name in names:
                await pool.snapshots.create(name)
                await volume.write(int(name[1:]) * OBJECT, noise(1, 2))
            await volume.sync()
            fill(world)
            await pool.snapshots.delete(names[0])
            await pool.reclaimer.reclaim_all()
            assert pool.reserve.is_short
        free_bytes = world.home.space().free_bytes
        assert not await pool.sealer.seal_all()
        assert world.home.space().free_bytes == free_bytes
        for name in names[1:]:
            await pool.snapshots.delete(name)
        await pool.reclaimer.reclaim_all()
        in_memory(world.home).remove(FILLER)
        await trio.sleep(2 * SYNC_PERIOD_S)
        assert not pool.reserve.is_short
        # From then on there is room for them.
        await pool.snapshots.create(b"last")
        assert await pool.sealer.seal_all()
        pool.volumes.close(volume)
    world.check_clean()
