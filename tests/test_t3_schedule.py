"""Schedules: what is due and kept, over simulated years, clock jumps and restarts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from snapfs.errors import BadCommandError, BadNameError, DamagedError, ExistsError, NoSpaceError, NotFoundError
from snapfs.events import EventLog
from snapfs.formats import CatalogBatch, ScheduleRow, SnapshotRow
from snapfs.geometry import Epoch, SnapshotId
from snapfs.schedule import SECOND_NS, Keep, Schedule, format_keep, make_schedule, parse_keep, to_delete
from snapfs.scheduler import Scheduler
from snapfs.snapshot import Snapshot
from snapfs.status import pool_status
from snapfs.units import parse_duration, parse_moment

from .harness import Running, World, open_world
from .test_t3_clones import put

START = datetime(2026, 1, 1, tzinfo=UTC)
START_NS = int(START.timestamp()) * SECOND_NS


def ns(when: datetime) -> int:
    return int(when.timestamp()) * SECOND_NS


class FakeSnapshots:
    """The table of snapshots, as far as a scheduler uses it."""

    def __init__(self, wall_ns: Callable[[], int]) -> None:
        self.by_id: dict[int, Snapshot] = {}
        self.made_ns: list[int] = []
        self.has_changed = True
        self.error: Exception | None = None
        self._wall_ns = wall_ns
        self._next = 1

    def unused_name(self, stem: bytes) -> bytes:
        taken = {one.name for one in self.by_id.values()}
        return next(name for name in (stem, *(stem + b"-%d" % number for number in range(2, 99))) if name not in taken)

    async def create(
        self, name: bytes, volumes: list[bytes] | None, *, hold_tags: Iterable[str] = (), schedule: str = ""
    ) -> Snapshot:
        if self.error is not None:
            raise self.error
        now_ns = self._wall_ns()
        number = self._next
        self._next += 1
        row = SnapshotRow(
            SnapshotId(number),
            name,
            Epoch(number),
            now_ns,
            None,
            0,
            "",
            schedule=schedule,
            hold_tags=frozenset(hold_tags),
        )
        self.by_id[number] = Snapshot(row)
        self.made_ns.append(now_ns)
        return self.by_id[number]

    async def delete_this(self, snapshot: Snapshot) -> None:
        number = next(number for number, one in self.by_id.items() if one is snapshot)
        del self.by_id[number]

    async def has_changed_since(self, snapshot: Snapshot, volumes: list[bytes] | None) -> bool:
        return self.has_changed


class FakeCatalog:
    def __init__(self) -> None:
        self.rows: dict[str, ScheduleRow] = {}

    async def save(self, volumes: list[object], make_batch: Callable[[], CatalogBatch]) -> None:
        batch = make_batch()
        self.rows.update({row.name: row for row in batch.schedules})
        for name in batch.dropped_schedules:
            del self.rows[name]


class Simulation:
    """A scheduler over fakes, under a clock that jumps ahead whenever nothing is to be done."""

    def __init__(self, clock_check_s: float = 60.0) -> None:
        self.jump_ns = 0
        self.snapshots = FakeSnapshots(self.wall_ns)
        self.catalog = FakeCatalog()
        self.clock_check_s = clock_check_s
        self.restart()

    def wall_ns(self) -> int:
        return START_NS + int(trio.current_time() * SECOND_NS) + self.jump_ns

    def restart(self) -> None:
        self.scheduler = Scheduler(
            self.catalog,  # type: ignore[arg-type]
            self.snapshots,  # type: ignore[arg-type]
            EventLog(),
            list(self.catalog.rows.values()),
            self.wall_ns,
            self.clock_check_s,
        )

    async def run_for(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self.scheduler.run()

    def kept(self, schedule: str) -> list[datetime]:
        found = [one.created_ns for one in self.snapshots.by_id.values() if one.schedule == schedule]
        return [datetime.fromtimestamp(one / 1e9, UTC) for one in sorted(found)]


async def test_every_quarter_of_an_hour(autojump_clock: None) -> None:
    simulation = Simulation()
    await simulation.scheduler.add(make_schedule("q", "15m"))
    await simulation.run_for(3600 * 3 + 1)
    assert simulation.snapshots.made_ns == [START_NS + 900 * SECOND_NS * (number + 1) for number in range(12)]
    assert next(one.name for one in simulation.snapshots.by_id.values()) == b"q-2026-01-01T001500Z"


async def test_three_years_of_hours_days_months_and_years(autojump_clock: None) -> None:
    simulation = Simulation(clock_check_s=86400.0)
    await simulation.scheduler.add(make_schedule("h", "6h", keep="24h,30d,12m,5y"))
    await simulation.run_for(3 * 365 * 86400)
    end = START + timedelta(days=3 * 365) - timedelta(hours=6)
    kept = simulation.kept("h")
    assert len(simulation.snapshots.made_ns) == 3 * 365 * 4 - 1
    # Of the last 24 hours in which there are any: six days.
    hours = {end - timedelta(hours=6 * number) for number in range(24)}
    assert hours <= set(kept)
    days = [max(when for when in kept if when.date() == (end - timedelta(days=number)).date()) for number in range(30)]
    assert all(when.hour == 18 for when in days)
    months = {(when.year, when.month) for when in kept}
    assert len(months) == 12 + 2 and {when.year for when in kept} == {2026, 2027, 2028}
    assert len(kept) == 24 + 24 + 11 + 2


async def test_several_side_by_side_and_a_time_of_day(autojump_clock: None) -> None:
    simulation = Simulation(clock_check_s=3600.0)
    await simulation.scheduler.add(make_schedule("day", "1d", "03:30", keep="3"))
    await simulation.scheduler.add(make_schedule("six", "6h", keep="2", volumes=["v"]))
    await simulation.run_for(10 * 86400)
    assert simulation.kept("day") == [START + timedelta(days=day, hours=3, minutes=30) for day in (7, 8, 9)]
    assert simulation.kept("six") == [START + timedelta(days=9, hours=hour) for hour in (12, 18)]


async def test_a_second_is_a_legal_period(autojump_clock: None) -> None:
    simulation = Simulation()
    await simulation.scheduler.add(make_schedule("s", "1s", keep="5"))
    await simulation.run_for(600.5)
    assert len(simulation.snapshots.made_ns) == 600
    assert len(simulation.kept("s")) == 5


async def test_what_was_missed_is_made_up_once(autojump_clock: None) -> None:
    simulation = Simulation()
    await simulation.scheduler.add(make_schedule("h", "1h"))
    await simulation.run_for(3 * 3600 + 1)
    await trio.sleep(100 * 3600)
    simulation.restart()
    await simulation.run_for(3601)
    made = [START + timedelta(seconds=(one - START_NS) // SECOND_NS) for one in simulation.snapshots.made_ns]
    assert made[:3] == [START + timedelta(hours=hour) for hour in (1, 2, 3)]
    assert made[3] == START + timedelta(hours=103, seconds=1)
    assert made[4:] == [START + timedelta(hours=104)]


@pytest.mark.parametrize("jump_h", [-10000, -3, -1, 1, 5, 10000])
async def test_clock_jumps_make_at_most_one_more_and_stop_nothing(autojump_clock: None, jump_h: int) -> None:
    simulation = Simulation()
    await simulation.scheduler.add(make_schedule("h", "1h"))
    await simulation.run_for(5 * 3600 + 100)
    simulation.jump_ns = jump_h * 3600 * SECOND_NS
    await simulation.run_for(5 * 3600)
    # Five before; after a small step back the period is waited out, so one or two fewer.
    assert 5 + 3 <= len(simulation.snapshots.made_ns) <= 5 + 6


@pytest.mark.parametrize("keep", ["3", "3h", "2d,2"])
async def test_after_a_step_back_what_is_made_is_kept(autojump_clock: None, keep: str) -> None:
    """The older ones have later times until the clock has caught up, and go first nevertheless."""
    simulation = Simulation()
    await simulation.scheduler.add(make_schedule("h", "1h", keep=keep))
    await simulation.run_for(5 * 3600 + 100)
    before = {one.instant for one in simulation.snapshots.by_id.values()}
    simulation.jump_ns = -72 * 3600 * SECOND_NS
    await simulation.run_for(5 * 3600)
    kept = sorted(one.instant for one in simulation.snapshots.by_id.values())
    newest = max(before) + len(simulation.snapshots.made_ns) - 5
    assert kept[-1] == newest and len(set(kept) - before) >= 2


async def test_a_failure_is_told_and_the_next_period_tries_again(autojump_clock: None) -> None:
    simulation = Simulation()
    await simulation.scheduler.add(make_schedule("h", "1h"))
    simulation.snapshots.error = NoSpaceError("full")
    await simulation.run_for(2 * 3600 + 1)
    assert simulation.scheduler.entries()[0]["failure"] == "full"
    simulation.snapshots.error = None
    await simulation.run_for(3600)
    assert simulation.scheduler.entries()[0]["failure"] is None
    assert len(simulation.snapshots.made_ns) == 1


async def test_what_no_rule_keeps_goes_also_when_none_can_be_made(autojump_clock: None) -> None:
    """A full device needs the room: a snapshot whose hold was released meanwhile gives it back."""
    simulation = Simulation()
    await simulation.scheduler.add(make_schedule("h", "1h", keep="2"))
    await simulation.run_for(3601)
    held = next(iter(simulation.snapshots.by_id.values()))
    held.hold_tags = frozenset({"mine"})
    await simulation.run_for(3 * 3600)
    assert len(simulation.kept("h")) == 3
    held.hold_tags = frozenset()
    simulation.snapshots.error = NoSpaceError("full")
    await simulation.run_for(3600)
    assert len(simulation.kept("h")) == 2
    assert simulation.scheduler.failing() == ["h"]


async def test_weeks_begin_on_mondays(autojump_clock: None) -> None:
    simulation = Simulation()
    await simulation.scheduler.add(make_schedule("w", "1w"))
    await simulation.scheduler.add(make_schedule("two", "2w", "03:30"))
    await simulation.run_for(60 * 86400)
    for name, hour, count in (("w", 0, 8), ("two", 3, 4)):
        found = simulation.kept(name)
        assert len(found) == count
        assert {(one.weekday(), one.hour) for one in found} == {(0, hour)}


def test_the_next_moment_is_told_right_after_the_clock_was_set_back() -> None:
    schedule = make_schedule("d", "1d")
    noon = ns(datetime(2026, 5, 10, 12, tzinfo=UTC))
    last_run_ns = ns(datetime(2026, 5, 11, tzinfo=UTC))
    # It ran at what was midnight by a clock that was twelve hours ahead.
    assert not schedule.is_due(last_run_ns, noon)
    told = schedule.next_ns(last_run_ns, noon)
    assert told == ns(datetime(2026, 5, 12, tzinfo=UTC))
    assert not schedule.is_due(last_run_ns, told - 1) and schedule.is_due(last_run_ns, told)
    # By an earlier version, on a Thursday.
    weekly, friday = make_schedule("w", "1w"), ns(datetime(2026, 11, 27, tzinfo=UTC))
    assert weekly.next_ns(ns(datetime(2026, 11, 26, tzinfo=UTC)), friday) == ns(datetime(2026, 11, 30, tzinfo=UTC))


async def test_held_and_hand_made_snapshots_are_never_deleted(autojump_clock: None) -> None:
    simulation = Simulation()
    await simulation.snapshots.create(b"by hand", None)
    await simulation.snapshots.create(b"other", None, schedule="other")
    await simulation.scheduler.add(make_schedule("h", "1h", keep="2"))
    await simulation.run_for(3601)
    simulation.snapshots.by_id[3].hold_tags = frozenset({"mine"})
    await simulation.run_for(10 * 3600)
    assert {1, 2, 3} <= set(simulation.snapshots.by_id) and len(simulation.kept("h")) == 3
    await simulation.scheduler.add(make_schedule("held", "1h", keep="1", hold_tags=["tag"]))
    await simulation.run_for(3 * 3600)
    assert len(simulation.kept("held")) == 3


async def test_unchanged_is_skipped(autojump_clock: None) -> None:
    simulation = Simulation()
    await simulation.scheduler.add(make_schedule("h", "1h", skips_unchanged=True))
    await simulation.run_for(2 * 3600 + 1)
    simulation.snapshots.has_changed = False
    await simulation.run_for(5 * 3600)
    assert len(simulation.snapshots.made_ns) == 2


async def test_schedules_on_a_real_pool_survive_a_restart() -> None:
    world = World()
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        schedule = make_schedule("s", "1h", volumes=["v"], keep="2", hold_tags=[], skips_unchanged=True)
        await pool.scheduler.add(schedule)
        with pytest.raises(ExistsError):
            await pool.scheduler.add(schedule)
        assert await pool.scheduler.run_now("s") is not None
        assert await pool.scheduler.run_now("s") is None
        for number in range(3):
            await put(pool, b"v", number, b"1")
            assert await pool.scheduler.run_now("s") is not None
        assert len(pool.snapshots.by_name) == 2
    async with open_world(world) as pool:
        assert [one["name"] for one in pool.scheduler.entries()] == ["s"]
        assert pool.scheduler.get("s") == schedule
        assert all(one.schedule == "s" for one in pool.snapshots.by_name.values())
        assert await pool.scheduler.run_now("s") is None
        await pool.scheduler.remove("s")
        with pytest.raises(NotFoundError):
            await pool.scheduler.remove("s")
    async with open_world(world) as pool:
        assert pool.scheduler.entries() == []
        assert len(pool.snapshots.by_name) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("s", "0s"),
        ("s", "x"),
        ("s", "-1h"),
        ("s", "1h", "03:30"),
        ("s", "1d", "25:00"),
        ("s", "1d", None, (), "24x"),
        ("s", "1d", None, (), "0h"),
        ("s", "1d", None, (), ","),
        ("x" * 201, "1d"),
    ],
)
def test_bad_schedules(arguments: tuple[str, ...]) -> None:
    with pytest.raises(BadCommandError):
        make_schedule(*arguments)


def test_bad_names_and_damaged_rules() -> None:
    for name in ("", "a/b", ".x", "@x"):
        with pytest.raises(BadNameError):
            make_schedule(name, "1h")
    for text in ("", "[]", "{}", json.dumps({"every_s": "x"})):
        with pytest.raises(DamagedError):
            Schedule.from_json("s", text)


@given(st.lists(st.tuples(st.integers(1, 50), st.sampled_from(["", "h", "d", "w", "m", "y"])), max_size=4))
def test_keep_rules_survive_their_text(rules: list[tuple[int, str]]) -> None:
    keep = tuple(Keep(*one) for one in rules)
    assert parse_keep(format_keep(keep)) == keep


@given(
    st.lists(st.integers(0, 5 * 365 * 86400), unique=True, max_size=60),
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["", "h", "d", "w", "m", "y"])), min_size=1, max_size=3),
)
def test_the_newest_always_stays_and_pruning_again_changes_nothing(
    seconds: list[int], rules: list[tuple[int, str]]
) -> None:
    keep = [Keep(*one) for one in rules]
    moments = [START_NS + one * SECOND_NS for one in seconds]
    gone = to_delete(keep, moments, lambda one: one)
    left = [one for one in moments if one not in gone]
    assert gone == [one for one in moments if one in gone]
    # Made last, whatever the clock said.
    assert not moments or moments[-1] in left
    assert to_delete(keep, left, lambda one: one) == []


def test_moments() -> None:
    now = ns(datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC))
    at = ns(datetime(2026, 11, 22, 8, 31, 13, tzinfo=UTC))
    for text in ("2026-11-22T08:31:13Z", "2026-11-22T083113Z", "2026-11-22T08:31:13", "GMT-2026.11.22-08.31.13"):
        # Any moment within that second counts.
        assert parse_moment(text, now) == at + SECOND_NS - 1
    assert parse_moment("1h", now) == now - 3600 * SECOND_NS
    assert parse_moment("90", now) == now - 90 * SECOND_NS
    assert parse_moment("2026-11-22", now) == ns(datetime(2026, 11, 22, tzinfo=UTC))
    assert parse_moment("latest", now) > now
    for text in ("", "x", "2026-13-01", "1h1h", "GMT-2026", "@latest"):
        with pytest.raises(BadNameError):
            parse_moment(text, now)
    assert parse_duration("2w") == 1209600


async def test_a_damaged_schedule_is_told_until_it_is_removed() -> None:
    world = World(1)
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        for name in ("hourly", "daily"):
            await running.pool.scheduler.add(make_schedule(name, "1h"))
        row = ScheduleRow("hourly", '{"every_s": 36x0}', 0)
        await running.pool.catalog.save([], lambda: CatalogBatch(schedules=[row]))
        await running.close()
    with pytest.raises(AssertionError, match="the rule of schedule 'hourly' is damaged"):
        world.check()
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        scheduler = running.pool.scheduler
        assert scheduler.failing() == ["hourly"]
        assert [(one["name"], bool(one["failure"])) for one in scheduler.entries()] == [
            ("daily", False),
            ("hourly", True),
        ]
        assert (await pool_status(running.pool))["health"] == "schedule-failed"
        with pytest.raises(DamagedError):
            await scheduler.run_now("hourly")
        with pytest.raises(ExistsError):
            await scheduler.add(make_schedule("hourly", "1h"))
        await scheduler.remove("hourly")
        assert scheduler.failing() == []
        await scheduler.add(make_schedule("hourly", "1h"))
        await running.stop()
