"""Work in the background makes room for those who use the volumes, and none when somebody waits for it."""

from __future__ import annotations

import trio

from snapfs.pace import Demand, Pace


async def _rested_s(pace: Pace, work_s: float, *, is_pressed: bool = False) -> float:
    pace.begin()
    pace._since_ns -= int(work_s * 1e9)
    began = trio.current_time()
    await pace.rest(is_pressed=is_pressed)
    return trio.current_time() - began


async def test_it_rests_long_while_volumes_are_used_and_only_then(autojump_clock: None) -> None:
    demand = Demand()
    count = 0
    demand.count = lambda: count
    pace = Pace(demand)
    assert 0.045 < await _rested_s(pace, 0.05) < 0.07
    count += 100
    assert 0.4 < await _rested_s(pace, 0.05) < 0.6
    # Nobody came meanwhile.
    assert 0.045 < await _rested_s(pace, 0.05) < 0.07
    count += 100
    assert 0.045 < await _rested_s(pace, 0.05, is_pressed=True) < 0.07


async def test_no_rest_is_longer_than_a_second(autojump_clock: None) -> None:
    demand = Demand()
    demand.count = iter(range(100, 100000, 100)).__next__
    assert await _rested_s(Pace(demand), 1000.0) == 1.0


async def test_whoever_waits_for_it_ends_a_rest(autojump_clock: None) -> None:
    demand = Demand()
    demand.count = iter(range(100, 100000, 100)).__next__
    pace = Pace(demand)
    rested: list[float] = []

    async def work() -> None:
        rested.append(await _rested_s(pace, 0.1))
        rested.append(await _rested_s(pace, 0.1))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work)
        await trio.sleep(0.5)
        with pace.hurried():
            await trio.sleep(5)
    assert 0.4 < rested[0] < 0.6 and rested[1] == 0


async def test_nobody_who_is_in_no_hurry_ends_a_rest(autojump_clock: None) -> None:
    pace = Pace(Demand())
    with pace.hurried(False):
        assert 0.045 < await _rested_s(pace, 0.05) < 0.07
