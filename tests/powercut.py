"""Power cuts at every call that reaches a device, during a workload, each judged against the model.

A workload of the pool's model is recorded with :class:`RecordingDevice`. For each cut what it leaves is verified,
opened, and compared with the model as it was before and after the operation that was under way.
"""

from __future__ import annotations

import copy
import errno
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import trio
import trio.testing

from snapfs.backends import CrashImages, Journal, MemoryDevice, PowerCut, RecordingDevice, distinct_cuts
from snapfs.errors import NoSpaceError
from snapfs.pool import Pool

from .contents import PAGE, Contents, first_of_no_version
from .harness import Running, World, seeded, snapshot_contents, volume_contents
from .model import Model, Operation, Runner

OBJECT = 4 << 20
NAMES = (b"a", b"b")
SNAPSHOTS = (b"s0", b"s1", b"s2")
# Blocks at the beginning and around the border of two objects, which two processors have.
PLACES = (0, 100, PAGE, 3 * PAGE, OBJECT - PAGE, OBJECT - 10, OBJECT, OBJECT + PAGE)
FULL_BYTES = 3 * PAGE
LENGTHS = (1, 700, PAGE, PAGE + 1, 3 * PAGE)


@dataclass(frozen=True, slots=True)
class State:
    """What the model allows: for each volume the versions of its contents, for each snapshot its volumes' contents."""

    volumes: Mapping[bytes, tuple[Contents, ...]]
    snapshots: Mapping[bytes, Mapping[bytes, Contents]]

    @classmethod
    def of(cls, model: Model) -> State:
        return cls(
            {name: (*(each.copy() for each in one.versions), one.data.copy()) for name, one in model.volumes.items()},
            {name: {one: data for one, (_, data) in held.items()} for name, held in model.snapshots.items()},
        )

    def difference(self, volumes: Mapping[bytes, Contents], snapshots: Mapping[bytes, Mapping[bytes, Contents]]) -> str:
        """What of this was found otherwise; empty when nothing."""
        if set(volumes) != set(self.volumes):
            return f"volumes {sorted(volumes)} instead of {sorted(self.volumes)}"
        if {name: set(held) for name, held in snapshots.items()} != {
            name: set(held) for name, held in self.snapshots.items()
        }:
            return f"snapshots {sorted(snapshots)} instead of {sorted(self.snapshots)}"
        for name, held in snapshots.items():
            for one, data in held.items():
                if data != self.snapshots[name][one]:
                    return f"snapshot {name!r} holds other contents of {one!r}"
        for name, data in volumes.items():
            if (where := first_of_no_version(data, self.volumes[name])) is not None:
                return f"volume {name!r}: {where}"
        return ""


@dataclass(frozen=True, slots=True)
class Mark:
    """An operation: from the first call to a device during it to the last, and what holds before and after."""

    what: Operation
    start: int
    end: int
    before: State
    after: State

    def allowed(self) -> Iterator[State]:
        """What a cut in between may leave."""
        yield self.before
        yield self.after
        if self.what[0] == "rollback":
            # The present is kept before anything changes.
            yield State(self.before.volumes, self.after.snapshots)


@dataclass(slots=True)
class Recording:
    """A workload that ran."""

    journal: Journal = field(default_factory=Journal)
    marks: list[Mark] = field(default_factory=list)

    def make_device(self, where: str, capacity_bytes: int | None) -> RecordingDevice:
        return RecordingDevice(self.journal, where, capacity_bytes)

    @property
    def places(self) -> range:
        """From when the pool was made on."""
        return range(self.marks[0].start, len(self.journal.operations) + 1)

    def distinct_cuts(self, seed: int) -> list[PowerCut]:
        """The cuts of all places; of those that leave the same during one operation, one."""
        found: dict[object, PowerCut] = {}
        for place in self.places:
            during = self.mark_at(place).start
            for what, cut in distinct_cuts(self.journal, place, seed).items():
                found.setdefault((during, what), cut)
        return list(found.values())

    def mark_at(self, place: int) -> Mark:
        """The operation that a cut before the call at a place strikes."""
        return next(mark for mark in self.marks if place <= mark.end)


def random_operation(rng: random.Random) -> Operation:
    """One operation of the model, on few and small volumes."""
    name, snapshot = rng.choice(NAMES), rng.choice(SNAPSHOTS)
    place, length = rng.choice(PLACES), rng.choice(LENGTHS)
    kinds: list[tuple[int, Callable[[], Operation]]] = [
        (10, lambda: ("write", name, place, length, rng.randrange(1, 256))),
        (4, lambda: ("sync", name)),
        (5, lambda: ("snapshot", snapshot, rng.choice([None, None, [name]]))),
        (3, lambda: ("delete", snapshot)),
        (2, lambda: ("truncate", name, rng.choice(PLACES))),
        (2, lambda: ("discard", name, place, length)),
        (1, lambda: ("sparse", name, place, [rng.random() < 0.5 for _ in range(3)])),
        (1, lambda: ("create", name)),
        (1, lambda: ("create-special", name, rng.choice(["cow", "image-cow", "image"]))),
        (1, lambda: ("remove", name)),
        (1, lambda: ("rename", name, rng.choice(NAMES))),
        (2, lambda: ("clone", snapshot, name, rng.choice(NAMES))),
        (2, lambda: ("rollback", snapshot, rng.choice([None, name]))),
        (1, lambda: ("flatten", name)),
        (1, lambda: ("hold", snapshot)),
        (1, lambda: ("release", snapshot)),
        (2, lambda: ("reclaim",)),
        (2, lambda: ("seal",)),
        (2, lambda: ("pass-time",)),
        (1, lambda: ("reopen",)),
    ]
    return rng.choices([make for _, make in kinds], [weight for weight, _ in kinds])[0]()


def random_workload(seed: int, length: int) -> list[Operation]:
    """Operations that a seed stands for."""
    rng = random.Random(seed)
    beginning: list[Operation] = [
        rng.choice([("create", b"a"), ("create-special", b"a", "cow"), ("create-special", b"a", "image-cow")]),
        ("write", b"a", 0, 2 * PAGE, 1),
        ("write", b"a", OBJECT - 10, 100, 2),
    ]
    operations = [random_operation(rng) for _ in range(length)]
    if is_full(seed):
        # As docs/operations.md says: reading the clone of a copy-on-write volume may need room in its change log, and
        # a rollback that finds none has redirecting volumes back by then.
        operations = [one for one in operations if one[0] not in ("clone", "rollback")]
    return beginning + operations


def is_full(seed: int) -> bool:
    """Whether the devices of a workload have so little room that many a write finds none."""
    return seed % 2 == 0


class FullRunner(Runner):
    """Runs operations on devices that may be full: what finds no room is told so, and leaves nothing half made."""

    # Reclaiming tells, at its end, of a volume that found no room to be trimmed.
    FREEING = ("delete", "remove", "release", "seal", "pass-time", "sync", "hold")

    async def step(self, operation: Operation) -> None:
        before = copy.deepcopy(self.model)
        try:
            await super().step(operation)
        except (NoSpaceError, OSError) as error:
            assert error.errno == errno.ENOSPC
            assert operation[0] not in self.FREEING, operation
            self.model = before
            pool = self.running.pool
            assert set(pool.volumes.by_name) == set(before.volumes), operation
            assert set(pool.snapshots.by_name) == set(before.snapshots), operation
            for name, volume in before.volumes.items():
                # A part of it may have been written.
                volume.data = await volume_contents(pool, name)
                volume.note()

    async def do_snapshot(self, name: bytes, names: list[bytes] | None) -> None:
        if name in self.model.snapshots or (names is not None and not set(names) <= set(self.model.volumes)):
            return
        await self.running.pool.snapshots.create(name, names)
        self.keep(name, self.model.volumes if names is None else {one: self.model.volumes[one] for one in names})

    async def do_seal(self) -> None:
        # It needs room in the pool's own directory only, but may find a log that cannot be synced.
        await self.running.pool.sealer.seal_all()


async def record(
    operations: list[Operation], clock: trio.testing.MockClock, capacity_bytes: int | None = None
) -> Recording:
    """Run a workload on devices that are recorded."""
    recording = Recording()
    world = World(2, 2, capacity_bytes, make_device=recording.make_device)
    async with trio.open_nursery() as nursery:
        runner = (Runner if capacity_bytes is None else FullRunner)(nursery, clock, world)
        start = len(recording.journal.operations)
        await runner.start()
        for operation in operations:
            before = State.of(runner.model)
            await runner.step(operation)
            await trio.testing.wait_all_tasks_blocked()
            end = len(recording.journal.operations)
            recording.marks.append(Mark(operation, start, end, before, State.of(runner.model)))
            start = end
        final = State.of(runner.model)
        await runner.running.stop()
        recording.marks.append(Mark(("stop",), start, len(recording.journal.operations), final, final))
    return recording


async def found_in(pool: Pool) -> tuple[dict[bytes, Contents], dict[bytes, dict[bytes, Contents]]]:
    """The contents of all volumes and of all snapshots."""
    volumes = {name: await volume_contents(pool, name) for name in list(pool.volumes.by_name)}
    snapshots = {}
    for name, snapshot in list(pool.snapshots.by_name.items()):
        members = await pool.snapshots.members(snapshot)
        snapshots[name] = {one: await snapshot_contents(pool, snapshot, one) for one in members.by_name}
    return volumes, snapshots


async def judge(mark: Mark, devices: Mapping[str, MemoryDevice], *, once_more: bool = True) -> None:
    """Verify and open what a cut left, and hold it against the model; fails when it is not allowed.

    With ``once_more`` what the opening left behind is verified as well.
    """
    world = World.found(devices)
    world.check()
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        volumes, snapshots = await found_in(running.pool)
        await (running.stop() if once_more else running.close())
    differences = []
    for state in mark.allowed():
        difference = state.difference(volumes, snapshots)
        if not difference:
            return
        differences.append(difference)
    raise AssertionError(f"during {mark.what}: {' / '.join(differences)}")


def try_power_cuts(seed: int, length: int, share: tuple[int, int] = (0, 1)) -> int:
    """Record a workload and judge all that cuts leave, or every ``share[1]``-th from ``share[0]`` on; how many."""
    clock = trio.testing.MockClock()
    capacity_bytes = FULL_BYTES if is_full(seed) else None
    with seeded(seed):
        recording: Recording = trio.run(record, random_workload(seed, length), clock, capacity_bytes, clock=clock)
    count = 0
    images = CrashImages(recording.journal, recording.places.start)
    for cut in recording.distinct_cuts(seed)[share[0] :: share[1]]:
        try:
            look = partial(judge, recording.mark_at(cut.place), images.after(cut), once_more=count % 3 == 0)
            # Only what is left is judged: the order that tasks run in then is for other tests.
            with seeded(seed, thread_steps_max=1):
                trio.run(look, clock=trio.testing.MockClock())
        except BaseException as error:
            raise AssertionError(f"seed {seed}, length {length}, {describe(cut, recording)}") from error
        count += 1
    return count


def describe(cut: PowerCut, recording: Recording) -> str:
    """A cut in words."""
    operations = recording.journal.operations
    shown = [operations[one]._replace(data=b"") for one in sorted(cut.kept)[-4:]]
    return f"cut before call {cut.place} of {len(operations)}, {len(cut.kept)} unsynced kept, the last of them {shown}"
