"""What sets of snapshots hold and free, to the block, and the smallest set that frees enough."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapfs import smallest, space
from snapfs.formats import COPY_ON_WRITE
from snapfs.making import VolumeWish
from snapfs.pool import Pool
from snapfs.smallest import smallest_choice
from snapfs.space import Holders, Row, SpaceAccount

from .harness import World, open_world

BLOCK = 4096
OBJECT = 4 << 20


async def put(pool: Pool, name: bytes, offset: int, data: bytes) -> None:
    async with pool.volumes.opened(name) as volume:
        await volume.write(offset, data)


def account_of_rows(rows: list[tuple[int, int, int]], count: int) -> SpaceAccount:
    """An account of snapshots with instants 10, 20, and so on, and blocks held by rows ``(first, last, blocks)``."""
    account = SpaceAccount({0: [10 * (place + 1) for place in range(count)]})
    for first, last, blocks in rows:
        if first <= last:
            account.add(Holders(False, (Row(0, first, last),)), blocks)
    account.add(Holders(True, (Row(0, 0, count - 1),)), 1000)
    return account


def smallest_size(account: SpaceAccount, candidates: list[int], need: int) -> int | None:
    for size in range(len(candidates) + 1):
        if any(account.freed_blocks(one) >= need for one in combinations(candidates, size)):
            return size
    return None


rows = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(1, 9)), max_size=14)


@settings(max_examples=300)
@given(rows, st.integers(0, 60), st.sets(st.integers(0, 7)), st.booleans())
def test_the_smallest_set_is_the_smallest(
    held: list[tuple[int, int, int]], need: int, tagged: set[int], by_trying: bool
) -> None:
    account = account_of_rows(held, 8)
    candidates = [10 * (place + 1) for place in range(8) if place not in tagged]
    before = smallest._TRIES_MAX
    smallest._TRIES_MAX = before if by_trying else 0
    try:
        choice = smallest_choice(account, candidates, need)
    finally:
        smallest._TRIES_MAX = before
    wanted = smallest_size(account, candidates, need)
    assert (choice is None) == (wanted is None)
    if choice is not None and wanted is not None:
        assert choice.is_smallest and len(choice.instants) == wanted
        assert choice.freed_blocks == account.freed_blocks(choice.instants) >= need
        assert set(choice.instants) <= set(candidates)


@given(rows, st.sets(st.integers(0, 7)))
def test_what_a_set_frees_is_the_same_from_a_table_of_runs(held: list[tuple[int, int, int]], chosen: set[int]) -> None:
    account = account_of_rows(held, 8)
    instants = account.instants[0]
    by_place = smallest._held_by(account, instants)
    mask = sum(1 << place for place in chosen)
    assert smallest._places_in(mask) == sorted(chosen)
    wanted = account.freed_blocks([instants[place] for place in chosen])
    for are_runs in (False, True):
        assert smallest._freed_by(by_place, 8, are_runs=are_runs)(mask) == wanted


def test_very_many_snapshots_still_give_a_set_that_is_enough() -> None:
    count = 3000
    account = account_of_rows(
        [(place, min(count - 1, place + place % 4), place % 7 + 1) for place in range(count)], count
    )
    choice = smallest_choice(account, account.instants[0], 3000)
    assert choice is not None and not choice.is_smallest
    assert account.freed_blocks(choice.instants) == choice.freed_blocks >= 3000
    for one in choice.instants[::50]:
        assert account.freed_blocks([other for other in choice.instants if other != one]) < 3000


async def test_written_referenced_and_together() -> None:
    async with open_world(World()) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"0" * 8 * BLOCK)
        first = await pool.snapshots.create(b"first")
        await put(pool, b"v", 0, b"1" * 3 * BLOCK)
        second = await pool.snapshots.create(b"second")
        third = await pool.snapshots.create(b"third")
        await put(pool, b"v", 0, b"2" * 2 * BLOCK)
        account = await pool.snapshots.account()
        instants = [one.instant for one in (first, second, third)]
        assert [account.written.get(one, 0) for one in instants] == [8, 3, 0]
        exclusive = account.exclusive_blocks()
        assert [exclusive.get(one, 0) for one in instants] == [3, 0, 0]
        assert account.freed_blocks(instants[1:]) == 2
        assert account.freed_blocks(instants) == 5
        assert [account.referenced_blocks([one]) for one in instants] == [8, 8, 8]
        assert account.referenced_blocks(instants) == 11
        for one in (first, second, third):
            assert await pool.snapshots.referenced_bytes(one) == 8 * BLOCK


async def test_clones_and_copy_on_write_are_taken_into_account() -> None:
    async with open_world(World()) as pool:
        await pool.volumes.create(b"v")
        await pool.maker.create(VolumeWish(b"w", OBJECT, COPY_ON_WRITE))
        await put(pool, b"v", 0, b"0" * 8 * BLOCK)
        await put(pool, b"w", 0, b"0" * 8 * BLOCK)
        await pool.volumes.sync_all()
        first = await pool.snapshots.create(b"first")
        await put(pool, b"v", 0, b"1" * 8 * BLOCK)
        second = await pool.snapshots.create(b"second")
        await put(pool, b"w", 0, b"1" * 2 * BLOCK)
        # What was preserved for the second holds for the first too.
        account = await pool.snapshots.account()
        assert account.freed_blocks([first.instant]) == 8
        assert account.freed_blocks([second.instant]) == 0
        assert account.freed_blocks([first.instant, second.instant]) == 10
        await pool.clones.clone(b"first", b"v", b"c")
        await put(pool, b"c", 0, b"2" * BLOCK)
        account = await pool.snapshots.account()
        assert account.freed_blocks([first.instant]) == 1
        await pool.volumes.remove(b"c")
        await pool.reclaimer.reclaim_all()
        account = await pool.snapshots.account()
        assert account.freed_blocks([first.instant]) == 8


@pytest.mark.parametrize("count", [40])
async def test_one_account_serves_many_snapshots(count: int) -> None:
    async with open_world(World()) as pool:
        await pool.volumes.create(b"v")
        for number in range(count):
            await put(pool, b"v", number % 7 * BLOCK, b"x" * BLOCK * 3)
            await pool.snapshots.create(b"s%d" % number)
        account = await pool.snapshots.account()
        assert sum(account.written.values()) == count * 3
        assert account.freed_blocks(account.instants[0]) + 9 == count * 3


async def test_what_clones_stand_on_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many clones and many copies it would take as many times as long as there are clones."""
    calls = 0
    without_source = space._without_source

    def count_calls(versions: list[space._Version], source_id: int) -> list[space._Version]:
        nonlocal calls
        calls += 1
        return without_source(versions, source_id)

    monkeypatch.setattr(space, "_without_source", count_calls)
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"c", OBJECT, COPY_ON_WRITE))
        await put(pool, b"c", 0, b"1" * BLOCK)
        for number in range(6):
            name = b"%d" % number
            await pool.snapshots.create(name)
            await put(pool, b"c", 0, name * BLOCK)
            await pool.clones.clone(name, b"c", b"clone-of-" + name)
        await pool.volumes.sync_all()
        await pool.snapshots.account()
        assert calls == 1
    world.check_clean()
