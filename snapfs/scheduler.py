"""The daemon's task that makes snapshots on schedules and deletes those that no rule keeps.

It goes by the wall clock, and looks at it at least once a minute, so that a clock that jumps or a
machine that slept is noticed. What was missed is made up once.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence

import trio

from .catalogaccess import CatalogAccess
from .errors import DamagedError, ExistsError, HeldError, NotFoundError, SnapfsError
from .events import EventLog
from .formats import CatalogBatch, ScheduleRow
from .schedule import SECOND_NS, Schedule, damaged_entry, entry, to_delete
from .snapshot import Snapshot
from .snapshots import SnapshotTable
from .tasks import Wakeup
from .units import show_name, utc_name

CLOCK_CHECK_S = 60.0


class Scheduler:
    """The schedules of a pool. ``wall_ns`` is the clock they go by."""

    def __init__(
        self,
        catalog: CatalogAccess,
        snapshots: SnapshotTable,
        events: EventLog,
        rows: Sequence[ScheduleRow],
        wall_ns: Callable[[], int] = time.time_ns,
        clock_check_s: float = CLOCK_CHECK_S,
    ) -> None:
        self._catalog = catalog
        self._snapshots = snapshots
        self._events = events
        self._wall_ns = wall_ns
        self._clock_check_s = clock_check_s
        self._schedules: dict[str, Schedule] = {}
        self._last_run_ns: dict[str, int] = {}
        self._failures: dict[str, str] = {}
        # Those whose rules cannot be read, and why: nothing is made by them, and that is told until they are removed.
        self._damaged: dict[str, str] = {}
        self._changed = Wakeup()
        self._turn = trio.Lock()
        for row in rows:
            try:
                self._schedules[row.name] = Schedule.from_json(row.name, row.rule)
            except SnapfsError as error:
                self._damaged[row.name] = error.reason
                self._events.note("schedule-damaged", logging.ERROR, name=row.name, reason=str(error))
            self._last_run_ns[row.name] = row.last_run_ns

    # -- schedules ---------------------------------------------------------------------------

    def entries(self) -> list[dict[str, object]]:
        """All schedules, for lists."""
        now_ns = self._wall_ns()
        found = [
            {**entry(one, self._last_run_ns[one.name], now_ns), "failure": self._failures.get(one.name)}
            for one in self._schedules.values()
        ]
        found += [
            {**damaged_entry(name, self._last_run_ns[name]), "failure": reason}
            for name, reason in self._damaged.items()
        ]
        return sorted(found, key=lambda one: str(one["name"]))

    def get(self, name: str) -> Schedule:
        """One schedule. Raises NotFoundError."""
        schedule = self._schedules.get(name)
        if name in self._damaged:
            raise DamagedError(self._damaged[name], "Remove it and add it again")
        if schedule is None:
            raise NotFoundError(f"there is no schedule {name!r}", "See snapfs schedule list")
        return schedule

    async def add(self, schedule: Schedule) -> None:
        """Add a schedule, durably. Its first snapshot is due when its next period begins. Raises ExistsError."""
        async with self._turn:
            if schedule.name in self._schedules or schedule.name in self._damaged:
                raise ExistsError(f"there is a schedule {schedule.name!r} already", "Remove it first")
            await self._save(schedule, schedule.due_ns(self._wall_ns()))
            self._schedules[schedule.name] = schedule
        self._events.note("schedule-added", name=schedule.name, every_s=schedule.every_s)
        self._changed.set()

    async def remove(self, name: str) -> None:
        """Remove a schedule, durably. Its snapshots stay. Raises NotFoundError."""
        async with self._turn:
            if name not in self._damaged:
                self.get(name)
            await self._catalog.save([], lambda: CatalogBatch(dropped_schedules=[name]))
            for known in (self._schedules, self._failures, self._damaged):
                known.pop(name, None)
        self._events.note("schedule-removed", name=name)
        self._changed.set()

    async def _save(self, schedule: Schedule, last_run_ns: int) -> None:
        row = ScheduleRow(schedule.name, schedule.to_json(), last_run_ns)
        await self._catalog.save([], lambda: CatalogBatch(schedules=[row]))
        self._last_run_ns[schedule.name] = last_run_ns

    # -- running -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Make what is due; until cancelled."""
        while True:
            for name in list(self._schedules):
                await self._run_if_due(name)
            now_ns = self._wall_ns()
            waits = [
                (one.next_ns(self._last_run_ns[one.name], now_ns) - now_ns) / SECOND_NS
                for one in self._schedules.values()
            ]
            with trio.move_on_after(max(0.001, min([self._clock_check_s, *waits]))):
                await self._changed.wait()

    async def _run_if_due(self, name: str) -> None:
        async with self._turn:
            schedule = self._schedules.get(name)
            now_ns = self._wall_ns()
            if schedule is None or not schedule.is_due(self._last_run_ns[name], now_ns):
                return
            try:
                await self._run(schedule, now_ns)
                self._failures.pop(name, None)
            except (SnapfsError, OSError) as error:
                told = error.public if isinstance(error, SnapfsError) else str(error)
                self._failures[name] = told
                self._events.note("schedule-failed", logging.ERROR, name=name, reason=told)
            # Done with, made or failed: a full device is not to be tried a thousand times.
            due_ns = schedule.due_ns(now_ns)
            try:
                await self._save(schedule, due_ns)
            except (SnapfsError, OSError) as error:
                self._last_run_ns[name] = due_ns
                self._events.note("schedule-not-noted", logging.ERROR, name=name, reason=str(error))

    def failing(self) -> list[str]:
        """The schedules whose last turn failed, or that are damaged."""
        return sorted({*self._failures, *self._damaged})

    async def run_now(self, name: str) -> Snapshot | None:
        """Make a schedule's snapshot now, and delete what its rules do not keep. None when nothing changed."""
        async with self._turn:
            made = await self._run(self.get(name), self._wall_ns())
            self._failures.pop(name, None)
            return made

    async def _run(self, schedule: Schedule, now_ns: int) -> Snapshot | None:
        """Make one, and delete what no rule keeps, also when none could be made: a full device needs the room."""
        try:
            return await self._make(schedule, now_ns)
        finally:
            await self._delete_unkept(schedule)

    async def _make(self, schedule: Schedule, now_ns: int) -> Snapshot | None:
        volumes = [name.encode("utf-8", "surrogateescape") for name in schedule.volumes] or None
        if schedule.skips_unchanged and not await self._has_changed(schedule, volumes):
            return None
        stem = f"{schedule.name}-{utc_name(now_ns)}".encode("utf-8", "surrogateescape")
        return await self._snapshots.create(
            self._snapshots.unused_name(stem), volumes, hold_tags=schedule.hold_tags, schedule=schedule.name
        )

    async def _delete_unkept(self, schedule: Schedule) -> None:
        for snapshot in self.would_delete(schedule):
            # Its name may be another one's by now; somebody may have deleted it, or hold it.
            with contextlib.suppress(NotFoundError, HeldError):
                await self._snapshots.delete_this(snapshot)

    async def _has_changed(self, schedule: Schedule, volumes: list[bytes] | None) -> bool:
        own = self._of(schedule)
        return not own or await self._snapshots.has_changed_since(own[-1], volumes)

    def _of(self, schedule: Schedule) -> list[Snapshot]:
        """The snapshots that a schedule made, oldest first."""
        own = [one for one in self._snapshots.by_id.values() if one.schedule == schedule.name]
        return sorted(own, key=lambda one: one.instant)

    def would_delete(self, schedule: Schedule) -> list[Snapshot]:
        """What the rules of a schedule do not keep now: only of its own snapshots, and none that a tag holds."""
        own = self._of(schedule)
        unkept = to_delete(schedule.keep, own, lambda one: one.created_ns)
        return [one for one in unkept if not one.hold_tags]


def shown(snapshots: Sequence[Snapshot]) -> list[str]:
    """Names of snapshots, for answers."""
    return [show_name(one.name or b"") for one in snapshots]
