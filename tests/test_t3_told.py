"""What the verifier, comparisons and schedules tell: each of these was told otherwise, or not at all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from snapfs import affected
from snapfs.check import check_pool
from snapfs.database import Database
from snapfs.diff import content_of, diff
from snapfs.errors import DamagedError, NoSpaceError, UnsupportedError
from snapfs.formats import COPY_ON_WRITE, shard_file
from snapfs.making import VolumeWish
from snapfs.pool import Pool
from snapfs.receive import Receiver
from snapfs.schedule import Schedule
from snapfs.streamhead import parse_head

from .harness import WHERE, Running, World, open_world, read_snapshot, read_volume

BLOCK = 4096
OBJECT = 4 << 20


async def put(pool: Pool, name: bytes, offset: int, data: bytes) -> None:
    async with pool.volumes.opened(name) as volume:
        await volume.write(offset, data)


async def test_what_became_a_hole_by_a_rollback_differs_also_when_its_snapshot_is_gone() -> None:
    async with open_world(World(processor_count=1)) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"x" * BLOCK)
        await pool.volumes.truncate(pool.volumes.get(b"v"), 3 * OBJECT)
        await pool.snapshots.create(b"s1")
        await put(pool, b"v", OBJECT, b"y" * 2 * BLOCK)
        before = await pool.snapshots.create(b"s2")
        await pool.clones.rollback(b"s1")
        after = await pool.snapshots.create(b"s3")
        wanted = [(OBJECT, 2 * BLOCK, False)]
        for is_gone in (False, True):
            if is_gone:
                await pool.snapshots.delete(b"s1")
                await pool.reclaimer.reclaim_all()
            for found in (await diff(pool, before, after), await content_of(pool, before, after)):
                extents = [(one.offset, one.length, one.is_data) for change in found for one in change.extents]
                assert [one for one in extents if one[0] >= OBJECT] == wanted
        assert (await read_snapshot(pool, after, b"v"))[OBJECT : OBJECT + BLOCK] == bytes(BLOCK)


async def test_damage_that_many_volumes_have_is_told_of_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affected, "_VOLUMES_MAX", 2)
    world = World(processor_count=1)
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"marker" + b"x" * (BLOCK - 6))
        await pool.snapshots.create(b"s")
        for number in range(4):
            await pool.clones.clone(b"s", b"v", b"c%d" % number)
        assert await pool.sealer.seal_all()
        device = world.devices["0"]
        for name in device.names("logs/0"):
            file = device.open(f"logs/0/{name}")
            file.write(b"MARKER", 0)
            file.close()
        with pytest.raises(DamagedError):
            await read_volume(pool, b"v")
        with trio.fail_after(30):
            while not pool.damage.entries():
                await trio.sleep(0.01)
        (told,) = pool.damage.entries()
        volumes: Any = told["volumes"]
        assert {one["volume"] for one in volumes} == {"v", "c0", "c1", "c2", "c3"}
        await running.close()
        nursery.cancel_scope.cancel()


async def edited(make: Callable[[Pool], Awaitable[None]], statement: str) -> World:
    """A pool whose first shard store was edited when it was closed."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await make(pool)
    store = Database(world.home, shard_file(0), "a store")
    try:
        with store.transaction():
            store.execute(statement)
    finally:
        store.close()
    return world


async def _overwritten(pool: Pool) -> None:
    await pool.volumes.create(b"v")
    await put(pool, b"v", 0, b"old" * 1000)
    await pool.snapshots.create(b"s")
    await put(pool, b"v", 0, b"new" * 1000)


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("UPDATE maps SET (epoch, map) = (SELECT epoch, map FROM copies)", "is older than its copies"),
        ("DELETE FROM maps", "its live map is lost"),
    ],
)
async def test_a_live_map_that_is_stale_or_lost_is_damage(statement: str, told: str) -> None:
    world = await edited(_overwritten, statement)
    with pytest.raises(AssertionError, match=told):
        world.check()


async def _in_place(pool: Pool) -> None:
    await pool.maker.create(VolumeWish(b"w", 1 << 20, COPY_ON_WRITE))
    await pool.volumes.create(b"v")
    await put(pool, b"w", 0, b"DATA" * 1024)
    await put(pool, b"v", 0, b"more" * 1024)


async def test_a_source_whose_record_is_lost_is_damage_and_stays() -> None:
    world = await edited(_in_place, "DELETE FROM logs WHERE kind = 1")
    files = world.devices["0"].names("logs/0")
    with pytest.raises(AssertionError, match="has lost the record"):
        world.check()
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        with pytest.raises(DamagedError, match="has lost the record"):
            await read_volume(running.pool, b"w")
        assert (await read_volume(running.pool, b"v"))[:4] == b"more"
        await running.close()
        nursery.cancel_scope.cancel()
    assert world.devices["0"].names("logs/0") == files


async def test_no_room_for_copies_is_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")

    def no_room(*args: object) -> None:
        raise NoSpaceError("there is no place for copies")

    monkeypatch.setattr("snapfs.check.read_copy", no_room)
    with pytest.raises(NoSpaceError):
        check_pool(world.home, WHERE, world.open_device, world.has_image)


GOOD: dict[str, Any] = {
    "every_s": 3600,
    "offset_s": 0,
    "volumes": [],
    "keep": [[24, "h"], [3, ""]],
    "hold_tags": [],
    "skips_unchanged": False,
}


@pytest.mark.parametrize(
    "rule",
    [
        *(
            json.dumps(GOOD | change)
            for change in (
                {"every_s": 0},
                {"every_s": float("inf")},
                {"every_s": 10**400},
                {"offset_s": -1},
                {"keep": [[3, "x"]]},
                {"keep": [["a", "h"]]},
                {"keep": [[3]]},
                {"keep": [[3, "h,4d"]]},
                {"volumes": [5]},
                {"volumes": "text"},
                {"hold_tags": [None]},
            )
        ),
        "[" * 100_000,
    ],
)
def test_a_schedule_that_nobody_could_have_made_is_damaged(rule: str) -> None:
    assert Schedule.from_json("s", json.dumps(GOOD)).to_json() == Schedule.from_json("s", json.dumps(GOOD)).to_json()
    with pytest.raises(DamagedError):
        Schedule.from_json("s", rule)


def test_a_stream_of_no_volumes_is_refused() -> None:
    """Its snapshot would have been one of all that the target has."""
    head = parse_head(
        {
            "snapshot": {"guid": "p:1", "name": "s", "note": ""},
            "base": None,
            "volumes": [],
            "gone": [],
            "resume": None,
        }
    )
    asked: list[str] = []

    def ask(mount_point: str, *words: str, options: Any = ()) -> dict[str, Any]:
        asked.append(words[0])
        return {"snapshots": [], "states": {}}

    receiver = Receiver(ask, lambda *_: contextlib.nullcontext(), "/nowhere", force=False, is_resumable=False)
    receiver._head = head
    with pytest.raises(UnsupportedError, match="holds no volume"):
        receiver._check("s")
    assert not asked
