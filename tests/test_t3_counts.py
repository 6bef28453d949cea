"""What change logs are counted to hold, while volumes, clones and the reclaimer change it at the same time.

A count that is too low has a change log removed with live blocks in it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import trio

from snapfs import blockmap, reclaim
from snapfs.backends import CrashPlan, FaultyDevice
from snapfs.errors import SnapfsError
from snapfs.formats import COPY_ON_WRITE
from snapfs.making import VolumeWish
from snapfs.pool import Pool
from snapfs.reclaimer import Reclaimer

from .harness import WHERE, Running, World, in_memory, open_until_power_is_lost, open_world, read_snapshot, read_volume

BLOCK = 4096
NOTHING_KEPT = CrashPlan(1, 0.0, 0.0)


def counted_and_named(pool: Pool) -> dict[int, tuple[int, int]]:
    """By change log of the first processor: the blocks that are counted, durably, and those that stored maps name."""
    store = pool.processors[0].access.store
    named: dict[int, set[tuple[int, int]]] = {}
    for table in ("maps", "copies"):
        for object_index, text in store.database.rows(f"SELECT object_index, map FROM {table}"):
            for block, count, log_id in blockmap.all_runs(blockmap.decode(text)):
                named.setdefault(log_id, set()).update((object_index, one) for one in range(block, block + count))
    return {log.log_id: (log.block_count, len(named.get(log.log_id, ()))) for log in store.all_logs()}


def assert_counted(pool: Pool) -> None:
    assert all(counted >= named for counted, named in counted_and_named(pool).values()), counted_and_named(pool)


async def with_a_clone_gone(pool: Pool) -> None:
    """A volume of eight blocks, of which a clone was made, written to and removed; its snapshots are there."""
    await pool.volumes.create(b"v")
    async with pool.volumes.opened(b"v") as volume:
        await volume.write(0, b"".join(bytes([one]) * BLOCK for one in range(1, 9)))
        await volume.sync()
    await pool.snapshots.create(b"s")
    await pool.clones.clone(b"s", b"v", b"c")
    await pool.snapshots.create(b"t")
    async with pool.volumes.opened(b"c") as clone:
        await clone.write(100 * BLOCK, b"c" * BLOCK)
    await pool.sync()
    await pool.volumes.remove(b"c")
    await pool.reclaimer.reclaim_all()


async def write_one(pool: Pool, block: int) -> None:
    async with pool.volumes.opened(b"v") as volume:
        await volume.write(block * BLOCK, b"n" * BLOCK)


async def assert_blocks_live(world: World, expected: bytes) -> None:
    """All is there after the rest was overwritten, reclaimed, and the pool opened again."""
    async with open_world(world) as pool:
        found = await read_volume(pool, b"v")
        assert found[::BLOCK] == expected
    world.check_clean()


async def test_a_block_that_a_clone_left_is_not_counted_out_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await with_a_clone_gone(pool)
        prune = Reclaimer._prune_traits

        async def pruned(reclaimer: Reclaimer) -> None:
            await prune(reclaimer)
            if not pool.volumes.traits.rows and not struck:
                struck.append(True)
                await write_one(pool, 0)

        struck: list[bool] = []
        monkeypatch.setattr(Reclaimer, "_prune_traits", pruned)
        for name in (b"s", b"t"):
            await pool.snapshots.delete(name)
        await pool.reclaimer.reclaim_all()
        await pool.sync()
        assert struck
        assert_counted(pool)
        for block in range(1, 7):
            await write_one(pool, block)
        await pool.sync()
        await pool.reclaimer.reclaim_all()
    await assert_blocks_live(world, b"nnnnnnn\x08")


@pytest.mark.parametrize("is_counted_out", [False, True])
async def test_what_an_earlier_version_left_to_be_looked_at_is_before_anything_is_written(is_counted_out: bool) -> None:
    """As it was stopped between dropping a clone's traits and looking at what the clone had left.

    Some of it the clone's origin may have counted out in between.
    """
    world = World(processor_count=1)
    async with open_until_power_is_lost(world) as pool:
        await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"".join(bytes([one]) * BLOCK for one in range(1, 9)))
            await volume.sync()
        await pool.sync()
        (log_id,) = counted_and_named(pool)
        if is_counted_out:
            await pool.volumes.discard(pool.volumes.get(b"v"), 0, 3 * BLOCK)
            await pool.sync()
        pool.processors[0].access.store.database.execute("INSERT INTO candidates VALUES (?, 0, 0, 8)", (log_id,))
        world.lose_power(CrashPlan(1, 1.0, 0.0))
    # Without the pool's tasks, which would look at it sooner or later.
    pool = Pool.open(world.home, WHERE, world.open_device, "test", world.open_image)
    await pool.recover()
    for block in range(7):
        await write_one(pool, block)
    await pool.sync()
    assert_counted(pool)
    await pool.reclaimer.reclaim_all()
    assert_counted(pool)
    await pool.close()
    world.home.close()
    await assert_blocks_live(world, b"nnnnnnn\x08")


@pytest.mark.parametrize("left_count", [0, 2])
async def test_a_count_is_lowered_by_what_is_durable(monkeypatch: pytest.MonkeyPatch, left_count: int) -> None:
    """A writer counts a block out while the reclaimer frees another one of the log; then power is lost."""
    world = World(processor_count=1)
    block_count = 2 + left_count
    lost_power: list[bool] = []

    def lose_power() -> None:
        if not lost_power:
            lost_power.append(True)
            # What is committed from here on goes nowhere.
            world.lose_power(NOTHING_KEPT)

    async with open_until_power_is_lost(world) as pool:
        await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"o" * block_count * BLOCK)
            await volume.sync()
        await pool.snapshots.create(b"s")
        await pool.clones.clone(b"s", b"v", b"c")
        await pool.volumes.remove(b"c")
        await pool.snapshots.delete(b"s")
        with monkeypatch.context() as patch:
            hooked(patch, pool, lose_power)
            await pool.reclaimer.reclaim_all()
        assert lost_power
    world.check()
    async with open_world(world) as pool:
        assert_counted(pool)
        for block in range(2, block_count):
            await write_one(pool, block)
        await pool.sync()
        await pool.reclaimer.reclaim_all()
        found = await read_volume(pool, b"v")
        assert found[BLOCK] == ord("o") and found[2 * BLOCK :] == b"n" * left_count * BLOCK
    world.check_clean()


def hooked(patch: pytest.MonkeyPatch, pool: Pool, lose_power: Callable[[], None]) -> None:
    """Write while the clone's traits go, and once more between looking at candidates and freeing them; that is the last
    that is committed."""
    prune, unnamed_of, commit_freed = Reclaimer._prune_traits, reclaim._unnamed_of, reclaim._commit_freed
    written: list[int] = []

    async def write_once(block: int) -> None:
        if block not in written:
            written.append(block)
            await write_one(pool, block)

    async def pruned(reclaimer: Reclaimer) -> None:
        if b"s" not in pool.snapshots.by_name and not pool.volumes.removed:
            await write_once(0)
        await prune(reclaimer)

    async def looked_at(*arguments: object) -> object:
        found = await unnamed_of(*arguments)  # type: ignore[arg-type]
        if not pool.volumes.traits.rows and any(mask for _, mask in found):
            await write_once(1)
        return found

    async def freed(*arguments: object) -> object:
        found = await commit_freed(*arguments)  # type: ignore[arg-type]
        if 1 in written:
            lose_power()
        return found

    patch.setattr(Reclaimer, "_prune_traits", pruned)
    patch.setattr(reclaim, "_unnamed_of", looked_at)
    patch.setattr(reclaim, "_commit_freed", freed)


@pytest.mark.parametrize("what", ["sync of a log", "write to a store"])
async def test_a_clone_stands_on_nothing_that_its_origin_could_not_make_durable(what: str) -> None:
    """Looking at a clone has its copy-on-write origin preserve blocks; that fails once."""
    world = World(1, 1)
    failing: list[str] = []

    def fail_once(kind: str, name: str) -> None:
        if failing and (kind, name.partition("/")[0]) == tuple(failing[0].split()):
            failing.pop()
            raise OSError(errno.EIO, "injected", name)

    plain = World.found({where: in_memory(device) for where, device in world.all_devices().items()})
    world.home = FaultyDevice(world.home, fail_once)
    world.devices = {path: FaultyDevice(device, fail_once) for path, device in world.devices.items()}
    acknowledged = b""
    async with trio.open_nursery() as nursery:
        running = Running(world)
        await running.start(nursery)
        pool = running.pool
        await pool.maker.create(VolumeWish(b"w", None, COPY_ON_WRITE, ""))
        async with pool.volumes.opened(b"w") as volume:
            await volume.write(0, b"A" * BLOCK + b"B" * BLOCK + b"C" * BLOCK)
            await volume.sync()
        await pool.snapshots.create(b"s")
        await pool.clones.clone(b"s", b"w", b"x")
        failing.append("sync logs" if what == "sync of a log" else "write shards")
        async with pool.volumes.opened(b"x") as clone:
            for _ in range(3):
                try:
                    await clone.read(0, 3 * BLOCK)
                    await clone.write(2 * BLOCK, b"new")
                    await clone.sync()
                    acknowledged = b"AB" + b"n"
                except (SnapfsError, OSError):
                    continue
        assert not failing
        plain.lose_power(NOTHING_KEPT)
        nursery.cancel_scope.cancel()
    assert acknowledged or what == "sync of a log"
    plain.check()
    async with open_world(plain) as pool:
        assert (await read_volume(pool, b"x"))[::BLOCK] == (acknowledged or b"ABC")
        assert (await read_volume(pool, b"w"))[::BLOCK] == b"ABC"
        assert (await read_snapshot(pool, pool.snapshots.get(b"s"), b"w"))[::BLOCK] == b"ABC"
