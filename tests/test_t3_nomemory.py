"""No memory, at each allocation in turn: whatever fails can be tried again, and what was acknowledged is there."""

from __future__ import annotations

import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
import trio.testing

from snapfs.backends import CrashPlan
from snapfs.formats import COPY_ON_WRITE, REDIRECT
from snapfs.making import VolumeWish
from snapfs.notresident import NotResidentError
from snapfs.pool import Pool
from snapfs.processor import Processor
from snapfs.snapshots import SnapshotTable
from snapfs.tasks import kept_up, side_by_side
from snapfs.volume import Volume
from snapfs.volumes import VolumeTable

from .harness import Running, World, open_until_power_is_lost, open_world, read_snapshot, read_volume, without_threads

BLOCK = 4096
BLOCKS = 64
# Each allocation takes minutes: SNAPFS_TEST_ALLOCATIONS=1 tries every one.
STEP = int(os.environ.get("SNAPFS_TEST_ALLOCATIONS", "4"))
try:
    _testcapi: Any = importlib.import_module("_testcapi")
except ImportError:  # A distribution may leave out what CPython tests itself with.
    _testcapi = None
# What an interpreter does when a generator cannot even be closed; nobody is told anything else by it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
needs_testcapi = pytest.mark.skipif(_testcapi is None, reason="this Python has no _testcapi, which refuses memory")


@contextmanager
def refused(number: int) -> Iterator[list[bool]]:
    """The allocation of this number inside fails; whether it was met. MemoryError ends the block."""
    met: list[bool] = []
    _testcapi.set_nomemory(number, number + 1)
    try:
        yield met
    except (MemoryError, SystemError):
        # SystemError: an internal call of the interpreter's that failed without saying why.
        _testcapi.remove_mem_hooks()
        met.append(True)
    finally:
        _testcapi.remove_mem_hooks()


def each_allocation(scenario: Callable[[int], bool]) -> int:
    """Run a scenario with one allocation after the other failing, until there is none left; how many were met."""
    met_count = misses = 0
    for number in itertools.count(1, STEP):
        is_met = scenario(number)
        met_count += is_met
        misses = 0 if is_met else misses + 1
        if misses == 2:
            break
    return met_count


def run_scenario(scenario: Callable[..., Any], *args: object) -> bool:
    """In virtual time, and without threads: what fails is what was armed."""
    with without_threads(1):
        return bool(trio.run(scenario, *args, clock=trio.testing.MockClock(autojump_threshold=0)))


WRITES = {
    "second": (5 * BLOCK, b"x" * BLOCK),
    "in-place": (0, b"x" * BLOCK),
    "part": (BLOCK + 100, b"x" * BLOCK),
    "zeros": (BLOCK, bytes(BLOCK)),
    "mixed": (0, b"x" * BLOCK + bytes(BLOCK) + b"y" * BLOCK),
}


async def write_once(number: int, mode: int, has_snapshot: bool, offset: int, data: bytes) -> bool:
    """One write meets the end of memory and is made again; what is synced then is there after a power cut."""
    world = World(processor_count=1)
    async with open_until_power_is_lost(world) as pool:
        await pool.maker.create(VolumeWish(b"v", BLOCKS * BLOCK, mode))
        async with pool.volumes.opened(b"v") as volume:
            for block in range(3):
                await volume.write(block * BLOCK, bytes([block + 1]) * BLOCK)
            await volume.sync()
            if has_snapshot:
                await pool.snapshots.create(b"s")
            was_met = await write_with_no_memory(volume, number, offset, data)
            if was_met:
                await volume.write(offset, data)
            await volume.sync()
    before = b"".join(bytes([block + 1]) * BLOCK for block in range(3)) + bytes((BLOCKS - 3) * BLOCK)
    after = before[:offset] + data + before[offset + len(data) :]
    world.check()
    async with open_world(world) as pool:
        assert await read_volume(pool, b"v") == after, number
        if has_snapshot:
            assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == before, number
        await pool.reclaimer.reclaim_all()
    world.check_clean()
    return was_met


async def write_with_no_memory(volume: Volume, number: int, offset: int, data: bytes) -> bool:
    """The write itself, once all it needs is in memory."""
    while True:
        missing: list[NotResidentError] = []
        with refused(number) as met:
            try:
                volume.write_now(offset, data, {})
            except NotResidentError as error:
                missing.append(error)
        if not missing:
            return bool(met)
        await missing[0].fetch({})


@needs_testcapi
@pytest.mark.parametrize("has_snapshot", [False, True])
@pytest.mark.parametrize("what", list(WRITES))
def test_a_write_for_which_there_is_no_memory_can_be_made_again(what: str, has_snapshot: bool) -> None:
    met_count = each_allocation(lambda number: run_scenario(write_once, number, REDIRECT, has_snapshot, *WRITES[what]))
    assert met_count >= 1


@needs_testcapi
@pytest.mark.parametrize("has_snapshot", [False, True])
def test_so_can_one_to_a_copy_on_write_volume(has_snapshot: bool) -> None:
    what = WRITES["in-place"]
    assert each_allocation(lambda number: run_scenario(write_once, number, COPY_ON_WRITE, has_snapshot, *what)) >= 1


async def arm_and_go_on(number: int, owner: type, name: str) -> bool:
    """One call of a method meets the end of memory amid ordinary work, of which each step is tried again."""
    world = World(processor_count=2)
    was_met, is_armed = False, True
    contents: dict[str, bytes] = {}
    expected = bytearray(BLOCKS * BLOCK)

    async with open_until_power_is_lost(world) as pool:
        await pool.maker.create(VolumeWish(b"v", len(expected), REDIRECT))
        original = getattr(owner, name)

        def armed(self: Any, *args: Any, **options: Any) -> Any:
            nonlocal was_met, is_armed
            if not is_armed:
                return original(self, *args, **options)
            is_armed = False
            with refused(number) as met:
                return original(self, *args, **options)
            was_met = bool(met)
            raise MemoryError

        async def write(block: int, letter: bytes) -> None:
            volume = pool.volumes.get(b"v")
            await again(lambda: put(pool, volume, block, letter))
            expected[block * BLOCK : (block + 1) * BLOCK] = letter * BLOCK

        await write(0, b"1")
        await write(1, b"2")
        await pool.volumes.get(b"v").sync()
        await pool.snapshots.create(b"s0")
        contents["s0"] = bytes(expected)
        await write(1, b"3")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, armed)
            if name == "take_back":
                await again(lambda: pool.clones.rollback(b"s0"))
                expected[:] = contents["s0"]
            await write(0, b"4")
            await again(lambda: pool.volumes.get(b"v").sync())
            await again(lambda: pool.snapshots.create(b"s1"))
        contents["s1"] = bytes(expected)
        await write(2, b"5")
        await pool.volumes.get(b"v").sync()
    world.check()
    async with open_world(world) as pool:
        assert await read_volume(pool, b"v") == bytes(expected), number
        for snapshot, held in contents.items():
            assert await read_snapshot(pool, pool.snapshots.get(snapshot.encode()), b"v") == held, (number, snapshot)
        await pool.reclaimer.reclaim_all()
    world.check_clean()
    return was_met


async def put(pool: Pool, volume: Volume, block: int, letter: bytes) -> None:
    pool.volumes.open(volume)
    try:
        await volume.write(block * BLOCK, letter * BLOCK)
    finally:
        pool.volumes.close(volume)


async def again(step: Callable[[], Any]) -> None:
    """A step, once more if there was no memory for it."""
    try:
        await step()
    except MemoryError:
        await step()


@needs_testcapi
@pytest.mark.parametrize(
    ("owner", "name"),
    [(Processor, "_begin_commit"), (SnapshotTable, "_cut"), (VolumeTable, "take_back"), (Volume, "open")],
)
def test_what_finds_no_memory_amid_a_commit_or_a_cut_loses_nothing(owner: type, name: str) -> None:
    assert each_allocation(lambda number: run_scenario(arm_and_go_on, number, owner, name)) >= 1


async def test_a_volume_that_could_not_be_opened_opens_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(World(processor_count=2)) as pool:
        volume = await pool.volumes.create(b"v")
        await put(pool, volume, 0, b"1")
        await volume.sync()
        snapshot = await pool.snapshots.create(b"s")

        def refuse(self: Processor, volume_id: int) -> Any:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(Processor, "portion", refuse)
            with pytest.raises(MemoryError):
                pool.volumes.open(volume)
            with pytest.raises(MemoryError):
                await pool.snapshots.open_volume(snapshot, volume.volume_id)
        assert await read_volume(pool, b"v") == b"1" * BLOCK
        assert await read_snapshot(pool, snapshot, b"v") == b"1" * BLOCK
        assert not snapshot.opens
        await pool.clones.rollback(b"s")


async def test_a_task_whose_nursery_finds_no_memory_is_begun_again(autojump_clock: trio.testing.MockClock) -> None:
    begun = 0

    async def task() -> None:
        nonlocal begun
        begun += 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 0)
            if begun < 3:
                raise MemoryError

    told: list[int] = []
    await kept_up(task, lambda: told.append(begun))
    assert begun == 3 and told == [1, 2]

    async def fail() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 0)
            raise ValueError

    with pytest.raises(ExceptionGroup):
        await kept_up(fail, lambda: None)


async def test_calls_side_by_side_of_which_one_finds_no_memory_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    async def call() -> None:
        await trio.lowlevel.checkpoint()
        ended.append(True)

    start_soon, count = trio.Nursery.start_soon, 0

    def refuse(self: trio.Nursery, *args: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise MemoryError
        start_soon(self, *args, **options)

    monkeypatch.setattr(trio.Nursery, "start_soon", refuse)
    with pytest.raises(MemoryError):
        await side_by_side([call, call, call])
    assert ended == [True]


async def test_changes_that_there_is_no_memory_to_note_are_never_said_to_be_synced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from snapfs.errors import SyncFailedError
    from snapfs.portion import Portion

    world = World(processor_count=1)
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        volume = await running.pool.volumes.create(b"v")
        await put(running.pool, volume, 0, b"1")

        def refuse(self: object, *args: object) -> None:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(type(running.pool.processors[0].access.store), "commit", refuse)
            patch.setattr(Portion, "_take_back", refuse)
            with pytest.raises(MemoryError):
                await volume.sync()
        for _ in range(2):
            with pytest.raises(SyncFailedError, match="no memory to note"):
                await volume.sync()
        with pytest.raises(SyncFailedError):
            await put(running.pool, volume, 1, b"2")
        await running.crash(CrashPlan(1, 0.0, 0.0))
        nursery.cancel_scope.cancel()


async def write_behind_the_end(number: int, offset: int, data: bytes) -> bool:
    """One write behind the end meets the end of memory; the file grows then: what was not written is zeros."""
    world = World(processor_count=2)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(offset - BLOCK, b"a" * BLOCK)
            await volume.sync()
            await pool.snapshots.create(b"s")
            await volume.read(0, BLOCK)
            was_met = await write_with_no_memory(volume, number, offset, data)
            expected = data if volume.size_bytes == offset + len(data) else bytes(len(data))
            assert was_met or expected == data
            await pool.volumes.truncate(volume, offset + len(data) + BLOCK)
            assert await volume.read(offset, len(data) + BLOCK) == expected + bytes(BLOCK), number
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"v") == bytes(offset - BLOCK) + b"a" * BLOCK
    return was_met


@needs_testcapi
@pytest.mark.parametrize(("offset", "length"), [(BLOCK, 2 * BLOCK), ((4 << 20) - BLOCK, 2 * BLOCK)])
def test_what_a_write_behind_the_end_left_without_memory_is_never_seen(offset: int, length: int) -> None:
    data = b"leftover" * (length // 8)
    assert each_allocation(lambda number: run_scenario(write_behind_the_end, number, offset, data)) >= 1


@pytest.mark.parametrize("part", [0, 1])
async def test_nor_is_what_only_a_part_of_it_left(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapfs.portion import Portion

    world = World(processor_count=2)
    border = 4 << 20
    async with open_world(world) as pool:
        volume = await pool.volumes.create(b"v")
        async with pool.volumes.opened(b"v"):
            await volume.write(border - 2 * BLOCK, b"a" * BLOCK)
            await volume.sync()
            snapshot = await pool.snapshots.create(b"s")
            await volume.write(0, b"b" * BLOCK)
            write_now = Portion.write_now

            def refuse(self: Portion, object_index: int, *rest: Any) -> None:
                if object_index == part:
                    raise MemoryError
                write_now(self, object_index, *rest)

            with monkeypatch.context() as patch:
                patch.setattr(Portion, "write_now", refuse)
                with pytest.raises(MemoryError):
                    await volume.write(border - BLOCK, b"leftover" * (2 * BLOCK // 8))
            assert volume.size_bytes == border - BLOCK
            await pool.volumes.truncate(volume, border + BLOCK)
            assert await volume.read(border - BLOCK, 2 * BLOCK) == bytes(2 * BLOCK)
        assert await read_snapshot(pool, snapshot, b"v") == bytes(border - 2 * BLOCK) + b"a" * BLOCK
