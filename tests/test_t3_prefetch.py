"""What reads of an object will need is brought in together, and what fails there harms nobody else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import trio

from snapfs import changelog, sealedfile
from snapfs.changelog import ChangeLog, ChangeLogs
from snapfs.errors import DamagedError, UnreadableError
from snapfs.formats import LogRow
from snapfs.pool import Pool
from snapfs.processor import Processor
from snapfs.shardstate import ShardAccess
from snapfs.shardstore import ShardStore
from snapfs.volume import Volume

from .harness import Running, World, open_world

BLOCK = 4096
COUNT = 60
_OF_READS = ("maps_with_ancestors", "some_logs", "checksums", "some_checksums")


async def scatter(pool: Pool) -> None:
    """One object whose every block lies in a change log of its own, all of them sealed."""
    await pool.volumes.create(b"v")
    async with pool.volumes.opened(b"v") as volume:
        for block in range(COUNT):
            await volume.write(block * BLOCK, bytes([block + 1]) * BLOCK)
            await pool.snapshots.create()
    assert await pool.sealer.seal_all()


def count_asks(patch: pytest.MonkeyPatch) -> list[str]:
    """The calls of stores from now on, by name."""
    asked: list[str] = []
    ask = ShardAccess.ask

    async def counting(self: ShardAccess, call: Callable[..., Any], *args: object) -> Any:
        asked.append(call.__name__)
        return await ask(self, call, *args)

    patch.setattr(ShardAccess, "ask", counting)
    return asked


def of_reads(asked: list[str]) -> list[str]:
    """Without what the background asks for."""
    return [one for one in asked if one in _OF_READS]


def processor_of(pool: Pool) -> Processor:
    return pool.processors[0]


async def read_all_but_the_first(world: World, damage: str) -> None:
    """All blocks read but the first, whose log has this damage; the verifier tells of it too."""
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        async with running.pool.volumes.opened(b"v") as volume:
            for block in range(1, COUNT):
                assert await volume.read(block * BLOCK, BLOCK) == bytes([block + 1]) * BLOCK
            with pytest.raises(DamagedError, match=damage):
                await volume.read(0, BLOCK)
        await running.close()
    with pytest.raises(AssertionError, match=damage):
        world.check()


async def test_the_first_reads_of_an_object_in_many_logs_take_a_few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await scatter(pool)
    async with open_world(world) as pool, pool.volumes.opened(b"v") as volume:
        asked = count_asks(monkeypatch)
        for block in range(COUNT):
            assert await volume.read(block * BLOCK, BLOCK) == bytes([block + 1]) * BLOCK
        assert len(of_reads(asked)) <= 4, of_reads(asked)
        monkeypatch.undo()


async def test_so_does_a_long_read(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await scatter(pool)
    async with open_world(world) as pool, pool.volumes.opened(b"v") as volume:
        asked = count_asks(monkeypatch)
        found = await volume.read(0, COUNT * BLOCK)
        assert found == b"".join(bytes([block + 1]) * BLOCK for block in range(COUNT))
        assert len(of_reads(asked)) <= 4, of_reads(asked)
        monkeypatch.undo()


async def test_nothing_leaves_memory_for_what_is_brought_in(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await scatter(pool)
    monkeypatch.setattr(changelog, "OPEN_FILES_MAX", 8)
    monkeypatch.setattr(changelog, "KNOWN_LOGS_MAX", 16)
    monkeypatch.setattr(sealedfile, "_KEPT_MIN", 4)
    monkeypatch.setattr(sealedfile.SumCache.__init__, "__defaults__", (4096,))
    async with open_world(world) as pool, pool.volumes.opened(b"v") as volume:
        logs = processor_of(pool).logs
        for block in (0, 30, 59):
            assert await volume.read(block * BLOCK, BLOCK) == bytes([block + 1]) * BLOCK
            # What is read itself may be one more than there was room for.
            assert sum(log.file is not None for log in logs.known.values()) <= 9
            assert len(logs.known) <= 17
            assert sum(len(known) for known in logs.sums.known.values()) <= 12
        monkeypatch.undo()


async def test_damaged_checksums_of_one_log_keep_no_other_block_from_being_read() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await scatter(pool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "check", lambda _: None)
        async with open_world(world) as pool:
            database = processor_of(pool).access.store.database
            with database.transaction():
                database.execute("UPDATE sums SET guards = zeroblob(16) WHERE log_id = 1")
    await read_all_but_the_first(world, "checksums of object 0")


async def test_a_log_whose_file_is_missing_keeps_no_other_block_from_being_read() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await scatter(pool)
    device = world.devices["0"]
    names = sorted(device.names("logs/0"))
    device.remove(f"logs/0/{names[0]}")
    await read_all_but_the_first(world, "missing")


async def test_a_store_that_cannot_be_read_for_others_keeps_no_block_from_being_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await scatter(pool)

    def refuse(self: ShardStore, *args: object) -> NoReturn:
        raise UnreadableError("the shard store cannot be read")

    for name in ("some_logs", "some_checksums"):
        with monkeypatch.context() as patch:
            patch.setattr(ShardStore, name, refuse)
            async with open_world(world) as pool, pool.volumes.opened(b"v") as volume:
                assert await volume.read(3 * BLOCK, BLOCK) == bytes([4]) * BLOCK
                assert await volume.read(0, 2 * BLOCK) == bytes([1]) * BLOCK + bytes([2]) * BLOCK


async def test_nothing_is_looked_for_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await scatter(pool)
    async with open_world(world) as pool, pool.volumes.opened(b"v") as volume:
        monkeypatch.setattr(changelog, "OPEN_FILES_MAX", 1)
        await volume.read(5 * BLOCK, BLOCK)
        asked = count_asks(monkeypatch)
        for block in (3, 30, 3):
            assert await volume.read(block * BLOCK, BLOCK) == bytes([block + 1]) * BLOCK
        assert "some_logs" not in asked
        monkeypatch.undo()


async def test_readers_of_one_object_bring_it_in_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await scatter(pool)

    async def read(volume: Volume, block: int) -> None:
        assert await volume.read(block * BLOCK, BLOCK) == bytes([block + 1]) * BLOCK

    async with open_world(world) as pool, pool.volumes.opened(b"v") as volume:
        asked = count_asks(monkeypatch)
        async with trio.open_nursery() as nursery:
            for block in range(0, COUNT, 4):
                nursery.start_soon(read, volume, block)
        assert asked.count("some_logs") == 1
        assert asked.count("some_checksums") + asked.count("checksums") <= 2, of_reads(asked)
        monkeypatch.undo()


async def test_a_reader_that_gives_up_lets_the_others_read(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await scatter(pool)
    read: list[int] = []

    async def read_it(volume: Volume, block: int) -> None:
        assert await volume.read(block * BLOCK, BLOCK) == bytes([block + 1]) * BLOCK
        read.append(block)

    async with open_world(world) as pool, pool.volumes.opened(b"v") as volume:
        first = trio.CancelScope()
        adopt = ChangeLogs.adopt

        def give_up(self: ChangeLogs, row: LogRow) -> ChangeLog:
            first.cancel()
            return adopt(self, row)

        async def read_first() -> None:
            with first:
                await read_it(volume, 0)

        monkeypatch.setattr(ChangeLogs, "adopt", give_up)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_first)
                for block in range(1, COUNT):
                    nursery.start_soon(read_it, volume, block)
        monkeypatch.undo()
        assert first.cancelled_caught
        assert sorted(read) == list(range(1, COUNT))
