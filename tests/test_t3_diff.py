"""What changed between snapshots, held against a comparison byte for byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given

from snapfs import shardstore
from snapfs.diff import VolumeChange, blame, content_of, diff, differing_runs
from snapfs.errors import BadCommandError, NotFoundError
from snapfs.formats import COPY_ON_WRITE
from snapfs.geometry import VolumeId
from snapfs.making import VolumeWish
from snapfs.pool import Pool

from .harness import World, open_world, read_snapshot, read_volume
from .test_t0_pure import maps
from .test_t3_clones import BLOCK, OBJECT, put


def spans(change: VolumeChange) -> list[tuple[int, int, bool]]:
    return [(one.offset, one.length, one.is_data) for one in change.extents]


async def check_against_contents(pool: Pool, first: bytes, second: bytes | None) -> list[VolumeChange]:
    """Every byte that differs lies in an extent; extents of zeros read as zeros."""
    before = pool.snapshots.get(first)
    after = None if second is None else pool.snapshots.get(second)
    changes = await diff(pool, before, after)
    for one in changes:
        if one.before is None or one.after is None:
            continue
        old = await read_snapshot(pool, before, one.before.name)
        new = (
            await read_volume(pool, one.after.name)
            if after is None
            else await read_snapshot(pool, after, one.after.name)
        )
        inside = bytearray(len(new))
        for extent in one.extents:
            inside[extent.offset : extent.offset + extent.length] = b"\1" * extent.length
            if not extent.is_data:
                assert not any(new[extent.offset : extent.offset + extent.length])
        for start in range(0, len(new), BLOCK):
            if old[start : start + BLOCK].ljust(BLOCK, b"\0") != new[start : start + BLOCK].ljust(BLOCK, b"\0"):
                assert inside[start], f"block at {start} differs and is in no extent"
    return changes


@pytest.mark.parametrize("mode", [0, COPY_ON_WRITE])
async def test_extents_between_snapshots_and_until_now(mode: int) -> None:
    async with open_world(World()) as pool:
        await pool.maker.create(VolumeWish(b"v", 10 * OBJECT, mode))
        await pool.volumes.create(b"still")
        await put(pool, b"v", 0, b"1" * 2 * OBJECT)
        await pool.snapshots.create(b"a")
        await put(pool, b"v", 3 * BLOCK + 5, b"2" * BLOCK)
        await put(pool, b"v", OBJECT - BLOCK, b"2" * 2 * BLOCK)
        await pool.snapshots.create(b"b")
        await put(pool, b"v", 5 * OBJECT, b"3" * 100)
        await pool.volumes.create(b"new")
        ab = await check_against_contents(pool, b"a", b"b")
        assert [one.name for one in ab] == [b"v"]
        assert spans(ab[0]) == [(3 * BLOCK, 2 * BLOCK, True), (OBJECT - BLOCK, 2 * BLOCK, True)]
        now = await check_against_contents(pool, b"b", None)
        assert [(one.name, one.before is None) for one in now] == [(b"new", True), (b"v", False)]
        assert spans(now[1]) == [(5 * OBJECT, BLOCK, True)]
        assert len(spans((await check_against_contents(pool, b"a", None))[1])) == 3
        await pool.volumes.truncate(pool.volumes.get(b"v"), OBJECT)
        await pool.volumes.truncate(pool.volumes.get(b"v"), 3 * OBJECT)
        await pool.volumes.rename(b"v", b"w")
        await pool.volumes.remove(b"still")
        await pool.snapshots.create(b"c")
        bc = {one.name: one for one in await check_against_contents(pool, b"b", b"c")}
        assert bc[b"still"].after is None
        assert bc[b"w"].before is not None and bc[b"w"].before.name == b"v"
        if mode != COPY_ON_WRITE:
            assert spans(bc[b"w"]) == [(OBJECT, OBJECT, False)]
        assert await diff(pool, pool.snapshots.get(b"c"), None) == []
        with pytest.raises(BadCommandError):
            await diff(pool, pool.snapshots.get(b"b"), pool.snapshots.get(b"a"))


async def test_a_volume_is_followed_through_rollbacks_and_clones_settling() -> None:
    async with open_world(World()) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * OBJECT)
        await pool.snapshots.create(b"a")
        await put(pool, b"v", 0, b"2" * BLOCK)
        await pool.snapshots.create(b"b")
        await put(pool, b"v", BLOCK, b"3" * BLOCK)
        await pool.clones.rollback(b"a")
        await put(pool, b"v", 2 * BLOCK, b"4" * BLOCK)
        assert spans((await check_against_contents(pool, b"a", None))[0]) == [(2 * BLOCK, BLOCK, True)]
        expected = [(0, BLOCK, True), (2 * BLOCK, BLOCK, True)]
        assert spans((await check_against_contents(pool, b"b", None))[0]) == expected
        await pool.snapshots.create(b"c")
        await pool.snapshots.delete(b"a")
        await pool.reclaimer.reclaim_all()
        assert spans((await check_against_contents(pool, b"b", b"c"))[0]) == expected
        await pool.clones.rollback(b"b")
        assert spans((await check_against_contents(pool, b"c", None))[0]) == expected


async def names(pool: Pool, offset: int) -> list[tuple[bytes | None, bytes | None]]:
    found = await blame(pool, b"v", offset)
    return [(one.after.name if one.after else None, one.before.name if one.before else None) for one in found]


async def test_blame_tells_between_which_snapshots_a_block_changed() -> None:
    async with open_world(World()) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 3 * BLOCK)
        for name, offset in ((b"s1", BLOCK), (b"s2", 0), (b"s3", BLOCK), (b"s4", 2 * OBJECT)):
            await pool.snapshots.create(name)
            await put(pool, b"v", offset, name * 10)
        assert await names(pool, 4100) == [(b"s3", b"s4"), (b"s1", b"s2"), (None, b"s1")]
        assert await names(pool, 0) == [(b"s2", b"s3"), (None, b"s1")]
        await pool.clones.rollback(b"s1")
        last = (await blame(pool, b"v", 0))[0]
        assert last.before is None and last.after is not None and b"before-rollback" in (last.after.name or b"")
        with pytest.raises(BadCommandError):
            await blame(pool, b"v", 1 << 40)
        with pytest.raises(NotFoundError):
            await blame(pool, b"none", 0)


@given(maps, maps)
def test_differing_runs_cover_exactly_the_blocks_that_differ(old: object, new: object) -> None:
    from snapfs import blockmap

    before, after = list(blockmap.expanded(old)), list(blockmap.expanded(new))  # type: ignore[arg-type]
    covered: dict[int, bool] = {}
    for first, count, is_data in differing_runs(old, new):  # type: ignore[arg-type]
        for block in range(first, first + count):
            assert block not in covered
            covered[block] = is_data
    assert covered == {block: after[block] != 0 for block in range(len(before)) if before[block] != after[block]}


async def test_a_rollback_changes_no_block_of_a_volume_whose_end_is_in_the_middle_of_one() -> None:
    async with open_world(World()) as pool:
        for name, size in ((b"v", 5000), (b"w", 100)):
            await pool.volumes.create(name)
            await put(pool, name, 0, b"1" * size)
        await pool.snapshots.create(b"a")
        undo = (await pool.clones.rollback(b"a")).undo
        assert undo.name is not None
        await pool.snapshots.delete(undo.name)
        await pool.reclaimer.reclaim_all()
        assert await diff(pool, pool.snapshots.get(b"a"), None) == []


@pytest.mark.parametrize("when", ["before", "objects", "maps"])
async def test_what_is_compared_is_not_taken_apart_meanwhile(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of what changed since a base that is deleted while it is looked at has all of it, or there is none."""
    async with open_world(World(processor_count=1)) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 4 * BLOCK)
        base = await pool.snapshots.create(b"base")
        await put(pool, b"v", 0, b"2" * 2 * BLOCK)
        after = await pool.snapshots.create(b"after")
        await put(pool, b"v", 0, b"3" * 3 * BLOCK)
        (processor,) = pool.processors
        ask = processor.access.ask

        async def delete() -> None:
            await pool.snapshots.delete(b"base")
            await pool.reclaimer.reclaim_all()

        async def deleting(call: Callable[..., object], *args: object) -> object:
            found = await ask(call, *args)
            if b"base" in pool.snapshots.by_name and getattr(call, "__name__", "") == f"changed_{when}":
                await delete()
            return found

        monkeypatch.setattr(processor.access, "ask", deleting)
        if when == "before":
            await delete()
            with pytest.raises(NotFoundError, match="deleted meanwhile"):
                await content_of(pool, base, after)
            return
        (change,) = await content_of(pool, base, after)
        assert b"base" not in pool.snapshots.by_name and spans(change) == [(0, 2 * BLOCK, True)]
        monkeypatch.setattr(processor.access, "ask", ask)
        await pool.reclaimer.reclaim_all()
        assert pool.reclaimer.waiting_count == 0


async def test_long_and_short_spans_are_looked_up_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_world(World(processor_count=1)) as pool:
        for name in (b"v", b"w"):
            await pool.volumes.create(name)
        made = []
        for number in range(6):
            for name in (b"v", b"w")[: 1 + number % 2]:
                await put(pool, name, (number % 3) * OBJECT, b"%d" % number * BLOCK)
            made.append(await pool.snapshots.create(b"s%d" % number))
        store = pool.processors[0].access.store
        ids = [pool.volumes.get(name).volume_id for name in (b"v", b"w")]
        for first, one in enumerate(made):
            for other in made[first:]:
                found: dict[VolumeId, list[int]] = {}
                for span in (0, 1000):
                    monkeypatch.setattr(shardstore, "_SHORT_SPAN", span)
                    for volume_id in ids:
                        objects = store.changed_objects(volume_id, one.instant, other.instant)
                        assert found.setdefault(volume_id, objects) == objects
                at_once = store.changed_objects_of_all(one.instant, other.instant)
                assert at_once == {volume_id: objects for volume_id, objects in found.items() if objects}
