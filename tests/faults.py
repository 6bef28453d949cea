"""Every call to a device fails once, one after the other: the countdown of SQLite's tests (sqlite.org/testing.html).

A fixed workload runs with the n-th call of a kind failing, for n from 1 on until nothing fails any more. Where
an operation ends with an error, the pool must go on to read what it read before, must say what is wrong, and
after a power cut hold what was acknowledged.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import trio
import trio.testing

from snapfs.backends import CrashPlan, FailNth, FaultyDevice, MemoryDevice
from snapfs.errors import SnapfsError
from snapfs.pool import Pool
from snapfs.status import pool_status

from .contents import PAGE, Contents
from .harness import Running, World, seeded, without_threads
from .model import Operation, Runner
from .powercut import OBJECT, Mark, State, found_in

WORKLOAD: list[Operation] = [
    ("create", b"a"),
    ("write", b"a", 0, 3 * PAGE, 1),
    ("write", b"a", OBJECT - 10, 5000, 2),
    ("sync", b"a"),
    ("create-special", b"b", "image-cow"),
    ("write", b"b", 100, 2 * PAGE, 3),
    ("snapshot", b"s0", None),
    ("write", b"a", 50, 100, 4),
    ("write", b"b", PAGE, 3 * PAGE, 5),
    ("sync", b"b"),
    ("discard", b"a", 0, PAGE),
    ("snapshot", b"s1", [b"a"]),
    ("seal",),
    ("pass-time",),
    ("truncate", b"a", PAGE + 100),
    ("clone", b"s0", b"a", b"c"),
    ("write", b"c", 10, 20, 6),
    ("rollback", b"s0", None),
    ("write", b"a", 0, 10, 7),
    ("hold", b"s1"),
    ("release", b"s1"),
    ("delete", b"s0"),
    ("reclaim",),
    ("flatten", b"c"),
    ("rename", b"c", b"d"),
    ("remove", b"b"),
    ("reclaim",),
    ("snapshot", b"s2", None),
    ("write", b"a", PAGE - 5, 10, 8),
    ("reopen",),
    ("write", b"a", 0, 10, 9),
    ("sync", b"a"),
]
IN_PLACE = {b"b"}
RARE_KINDS = ("open", "create", "remove", "sync_names", "names", "punch", "truncate", "try_read")
OFTEN_KINDS = ("write", "sync", "read")
CODES = (errno.EIO, errno.ENOSPC, errno.EINTR)
DELAY_S = 10.0
PLANS: tuple[Callable[[int], CrashPlan], ...] = (
    lambda seed: CrashPlan(seed, 0.0),
    lambda seed: CrashPlan(seed, 1.0, 0.0, newest=True),
    lambda seed: CrashPlan(seed, 0.5),
    lambda seed: CrashPlan(seed, 1.0),
)
# Once; and until the cause is gone.
TIMES = (1, 1 << 30)


class FaultRunner(Runner):
    """Runs operations whose errors are for the caller to see."""

    async def do_snapshot(self, name: bytes, names: list[bytes] | None) -> None:
        await self.running.pool.snapshots.create(name, names)
        self.keep(name, self.model.volumes if names is None else {one: self.model.volumes[one] for one in names})

    async def do_seal(self) -> None:
        # It tells of failures in events, and tries again later.
        await self.running.pool.sealer.seal_all()

    async def do_reopen(self) -> None:
        # Without the verifier, which would meet the fault.
        await self.running.close()
        for volume in self.model.volumes.values():
            volume.synced()
        await self.start()


def make_base() -> dict[str, MemoryDevice]:
    """The devices of a pool just made."""
    world = World(2, 2)
    return _after_power_cut(world, CrashPlan(0, 1.0, 0.0))


def _memory(device: object) -> MemoryDevice:
    inner = device.inner if isinstance(device, FaultyDevice) else device
    assert isinstance(inner, MemoryDevice)
    return inner


def _after_power_cut(world: World, plan: CrashPlan) -> dict[str, MemoryDevice]:
    found = {where: _memory(device).crash(plan) for where, device in world.devices.items()}
    return {**found, "home": _memory(world.home).crash(plan), "outside": _memory(world.outside).crash(plan)}


class Delay:
    """A hook that has the n-th call of a kind take long."""

    def __init__(self, kind: str, nth: int, clock: trio.testing.MockClock) -> None:
        self._kind = kind
        self._remaining = nth
        self._clock = clock
        self._holds_up_all = nth % 2 == 0
        self._is_due = False
        self.failed_count = 0

    def __call__(self, kind: str, name: str) -> None:
        """Be asked before a call."""
        if kind != self._kind:
            return
        self._remaining -= 1
        if self._remaining:
            return
        self.failed_count += 1
        if self._holds_up_all:
            self._clock.jump(DELAY_S)
        else:
            self._is_due = True

    async def sleep(self) -> None:
        """Behind the work of a thread: it takes long, if it was that call's."""
        if self._is_due:
            self._is_due = False
            await trio.sleep(DELAY_S)


@dataclass(slots=True)
class Switch:
    """A hook that can be turned off: the cause is gone."""

    hook: Callable[[str, str], None]
    is_on: bool = True

    def __call__(self, kind: str, name: str) -> None:
        if self.is_on:
            self.hook(kind, name)


def without_fault(base: Mapping[str, MemoryDevice]) -> list[State]:
    """What the model allows after each operation; the first is before all."""

    async def main(clock: trio.testing.MockClock) -> list[State]:
        async with trio.open_nursery() as nursery:
            runner = FaultRunner(nursery, clock, World.found({where: one.crash(_ALL) for where, one in base.items()}))
            await runner.start()
            states = [State.of(runner.model)]
            for operation in WORKLOAD:
                await runner.step(operation)
                states.append(State.of(runner.model))
            await runner.running.stop()
        return states

    clock = trio.testing.MockClock()
    return trio.run(main, clock, clock=clock)


_ALL = CrashPlan(0, 1.0, 0.0)


class Faults:
    """Runs of the workload with one fault each."""

    def __init__(self) -> None:
        self._base = make_base()
        self._states = without_fault(self._base)

    def strike(self, hook: FailNth, seed: int = 0) -> bool:
        """One run; whether the fault was met. Fails when what is left is not allowed."""
        clock = trio.testing.MockClock()
        with seeded(seed) if seed % 4 else contextlib.nullcontext():
            trio.run(self._run, hook, seed, clock, clock=clock)
        return hook.failed_count > 0

    def delay(self, kind: str, nth: int) -> bool:
        """One run in which a call takes ten seconds; whether it was met. Fails unless all goes well, only later.

        Of two calls one holds up the whole event loop, as those do that it makes itself, and the other a thread.
        """
        clock = trio.testing.MockClock(autojump_threshold=0)
        delay = Delay(kind, nth, clock)
        with without_threads(nth, delay.sleep):
            mark = trio.run(self._run, delay, nth, clock, clock=clock)
        assert mark.what == ("sync",) and mark.before is mark.after, f"{mark.what} failed"
        return delay.failed_count > 0

    async def _run(self, hook: FailNth | Delay, seed: int, clock: trio.testing.MockClock) -> Mark:
        world = World.found({where: one.crash(_ALL) for where, one in self._base.items()})
        switch = Switch(hook)
        world.devices = {where: FaultyDevice(one, switch) for where, one in world.devices.items()}
        world.home, world.outside = FaultyDevice(world.home, switch), FaultyDevice(world.outside, switch)
        async with trio.open_nursery() as nursery:
            runner = FaultRunner(nursery, clock, world)
            mark, is_open = await self._until_it_strikes(runner)
            switch.is_on = False
            if is_open:
                await self._look(runner.running.pool, mark, has_failed=hook.failed_count > 0)
                nursery.cancel_scope.cancel()
        images = _after_power_cut(world, PLANS[seed % len(PLANS)](seed))
        if is_open:
            _abandon(runner.running.pool)
        await _judge_what_is_left(images, mark)
        return mark

    async def _until_it_strikes(self, runner: Runner) -> tuple[Mark, bool]:
        """What was under way when the workload ended, and whether the pool is open then."""
        try:
            await runner.start()
        except (OSError, SnapfsError):
            return Mark(("open",), 0, 0, self._states[0], self._states[0]), False
        for number, operation in enumerate(WORKLOAD):
            mark = Mark(operation, 0, 0, self._states[number], self._states[number + 1])
            try:
                await runner.step(operation)
            except (OSError, SnapfsError):
                return mark, operation[0] != "reopen"
        last = self._states[-1]
        mark = Mark(("sync",), 0, 0, last, State({n: v[-1:] for n, v in last.volumes.items()}, last.snapshots))
        try:
            await runner.running.pool.sync()
        except (OSError, SnapfsError):
            return mark, True
        # All was acknowledged.
        return Mark(mark.what, 0, 0, mark.after, mark.after), True

    async def _look(self, pool: Pool, mark: Mark, *, has_failed: bool) -> None:
        """It lives, and reads what it should."""
        before = failed_volumes(pool)
        is_failed = (await pool_status(pool))["health"] == "failed"
        # What is done in the background may have failed meanwhile.
        failed = failed_volumes(pool)
        assert bool(before) <= is_failed <= bool(failed), (before, is_failed, failed)
        try:
            found = await found_in(pool)
        except SnapfsError:
            # Only one that a rollback in place has left half done is not read.
            assert mark.what[0] == "rollback" and failed >= IN_PLACE and has_failed, (mark.what, failed)
        else:
            hold_against(mark, *found)


def failed_volumes(pool: Pool) -> set[bytes]:
    """Volumes that take no more writes."""
    return {name for name, volume in pool.volumes.by_name.items() if volume.failure is not None}


def timeless(snapshots: Mapping[bytes, Mapping[bytes, Contents]]) -> dict[bytes, Mapping[bytes, Contents]]:
    """The same, with what a rollback kept called alike in every run."""
    return {b"undo" if name.endswith(b"-before-rollback") else name: held for name, held in snapshots.items()}


def hold_against(
    mark: Mark, volumes: Mapping[bytes, Contents], snapshots: Mapping[bytes, Mapping[bytes, Contents]]
) -> None:
    """Fail when this is not what may be found during an operation."""
    allowed = [State(state.volumes, timeless(state.snapshots)) for state in mark.allowed()]
    if mark.what[0] == "rollback":
        # When one that is written in place cannot be put back, others are by then.
        kept = {name: versions for name, versions in mark.before.volumes.items() if name in IN_PLACE}
        allowed.append(State({**mark.after.volumes, **kept}, timeless(mark.after.snapshots)))
    differences = [state.difference(volumes, timeless(snapshots)) for state in allowed]
    assert "" in differences, f"during {mark.what}: {' / '.join(differences)}"


def _abandon(pool: Pool) -> None:
    for processor in pool.processors:
        processor.access.store.database.abandon()
    pool.catalog.catalog.database.abandon()


async def _judge_what_is_left(images: Mapping[str, MemoryDevice], mark: Mark) -> None:
    world = World.found(images)
    world.check()
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        hold_against(mark, *await found_in(pool))
        # It takes writes again.
        if b"a" in pool.volumes.by_name:
            async with pool.volumes.opened(b"a") as volume:
                await volume.write(0, b"again")
                await volume.sync()
            await pool.snapshots.create(b"again")
        await running.stop()


def countdown(faults: Faults, kind: str, code: int, times: int, *, first: int = 1, step: int = 1) -> int:
    """Fail the ``first`` call, then each ``step``-th after it, until a run meets no fault; how many there were."""
    return _count(
        lambda nth: faults.strike(FailNth(kind, nth, code, times=times), nth),
        f"{kind} fails with {os.strerror(code)}, {times} times",
        first,
        step,
    )


def countdown_of_delays(faults: Faults, kind: str, *, first: int = 1, step: int = 1) -> int:
    """Hold up the ``first`` call, then each ``step``-th after it, until a run meets no delay; how many there were."""
    return _count(lambda nth: faults.delay(kind, nth), f"{kind} takes long", first, step)


def _count(strike: Callable[[int], bool], what: str, first: int, step: int) -> int:
    nth = first
    while True:
        try:
            was_met = strike(nth)
        except BaseException as error:
            raise AssertionError(f"number {nth}: {what}") from error
        if not was_met:
            return len(range(first, nth, step))
        nth += step
