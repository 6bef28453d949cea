"""A pool's files are damaged in every way, one at a time, and what then is read is held against what was written."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import trio
import trio.testing

from snapfs.backends import CrashPlan, Device, MemoryDevice
from snapfs.check import Report, check_pool
from snapfs.errors import SnapfsError
from snapfs.pool import Pool
from snapfs.rescue import rescued_pool
from snapfs.scrub import verify

from .contents import PAGE
from .faults import FaultRunner
from .harness import WHERE, Running, World, seeded, snapshot_contents, volume_contents
from .model import Operation
from .powercut import OBJECT, State

WORKLOAD: list[Operation] = [
    ("create", b"a"),
    ("write", b"a", 0, 3 * PAGE, 1),
    ("write", b"a", OBJECT - 10, 5000, 2),
    ("create-special", b"b", "image-cow"),
    ("create", b"d"),
    ("write", b"d", 0, 70 * PAGE, 3),
    ("snapshot", b"s0", None),
    ("write", b"a", 50, 100, 4),
    ("write", b"b", PAGE, 3 * PAGE, 5),
    ("snapshot", b"s1", None),
    ("clone", b"s0", b"a", b"c"),
    ("write", b"c", 10, 20, 6),
    ("write", b"a", PAGE, 100, 7),
    ("snapshot", b"s2", None),
    ("seal",),
]
_KEEP_ALL = CrashPlan(0, 1.0, 0.0)
PROCESSOR_COUNT = 2
KINDS = ("flip", "zero", "scramble", "truncate", "swap", "remove", "empty", "extend")


@dataclass(slots=True)
class Outcome:
    """What came of one case: who noticed, what was read wrong, and what could not be read."""

    what: str
    is_told_by_check: bool = False
    is_told_at_opening: bool = False
    wrong: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    is_told_by_verify: bool = False
    is_rescued: bool = False
    # Of live volumes: which of their objects a rescued pool does not give.
    unread_objects: set[tuple[bytes, int]] = field(default_factory=set)


class Damages:
    """A pool in which all is sealed, and cases of damage to it."""

    def __init__(self) -> None:
        clock = trio.testing.MockClock()
        self._devices, self._state = trio.run(self._make, clock, clock=clock)
        self._files = [
            (where, name)
            for where, device in sorted(self._devices.items())
            for name in sorted(all_names(device))
            if name != "reserve" and device.read_file(name)
        ]

    async def _make(self, clock: trio.testing.MockClock) -> tuple[dict[str, MemoryDevice], State]:
        world = World(PROCESSOR_COUNT, 2)
        async with trio.open_nursery() as nursery:
            runner = FaultRunner(nursery, clock, world)
            await runner.start()
            for operation in WORKLOAD:
                await runner.step(operation)
            state = State.of(runner.model)
            await runner.running.stop()
        devices = {"home": world.home, "outside": world.outside, **world.devices}
        return {where: one for where, one in devices.items() if isinstance(one, MemoryDevice)}, state

    def strike(self, seed: int) -> Outcome:
        """One case. Fails when something other than an error in words comes of it."""
        rng = random.Random(seed)
        devices = {where: device.crash(_KEEP_ALL) for where, device in self._devices.items()}
        where, name = rng.choice(self._files)
        kind = rng.choice(KINDS)
        others = [other for other in self._files if other != (where, name)]
        damage(devices, (where, name), kind, rng, others)
        outcome = Outcome(f"{kind} of {where}:{name}")
        with seeded(seed):
            trio.run(self._look, World.found(devices), outcome, clock=trio.testing.MockClock())
        return outcome

    async def _look(self, world: World, outcome: Outcome) -> None:
        report = _checked(world)
        outcome.is_told_by_check = report is None or not report.is_clean
        running = Running(world)
        try:
            async with trio.open_nursery() as nursery:
                await running.start(nursery)
                await self._read_all(running.pool, outcome)
                await self._verify_all(running.pool, outcome)
                nursery.cancel_scope.cancel()
            for processor in running.pool.processors:
                processor.access.store.database.abandon()
            running.pool.catalog.catalog.database.abandon()
        except (SnapfsError, OSError):
            outcome.is_told_at_opening = True
        except BaseExceptionGroup as group:
            told, others = group.split((SnapfsError, OSError))
            if others is not None:
                raise
            outcome.is_told_at_opening = told is not None
        if outcome.is_told_at_opening:
            await self._rescue(world, outcome)

    async def _rescue(self, world: World, outcome: Outcome) -> None:
        """What a pool that does not open any more still gives."""
        world.home.close()
        before = {where: device_contents(device) for where, device in world.all_devices().items()}
        outcome.wrong.clear()
        outcome.unread.clear()
        try:
            async with rescued_pool(world.home, WHERE, world.open_device, world.open_image) as pool:
                outcome.is_rescued = True
                assert pool.lost or outcome.is_told_by_check
                await self._read_all(pool, outcome)
                await self._read_objects(pool, outcome)
        except (SnapfsError, OSError):
            assert not outcome.is_rescued, "a pool that was opened ends without an error"
        assert before == {where: device_contents(device) for where, device in world.all_devices().items()}

    async def _read_all(self, pool: Pool, outcome: Outcome) -> None:
        for name, versions in self._state.volumes.items():
            try:
                if await volume_contents(pool, name) != versions[-1]:
                    outcome.wrong.append(f"volume {name!r}")
            except (SnapfsError, OSError):
                outcome.unread.append(f"volume {name!r}")
        for name, held in self._state.snapshots.items():
            for one, data in held.items():
                try:
                    if await snapshot_contents(pool, pool.snapshots.get(name), one) != data:
                        outcome.wrong.append(f"{name!r}/{one!r}")
                except (SnapfsError, OSError):
                    outcome.unread.append(f"{name!r}/{one!r}")

    async def _read_objects(self, pool: Pool, outcome: Outcome) -> None:
        for name, versions in self._state.volumes.items():
            contents = versions[-1]
            async with pool.volumes.opened(name) as volume:
                for index, place in enumerate(range(0, len(contents), OBJECT)):
                    try:
                        wanted = contents.piece(place, min(OBJECT, len(contents) - place))
                        if await volume.read(place, OBJECT) != wanted:
                            outcome.wrong.append(f"object {index} of volume {name!r}")
                    except (SnapfsError, OSError):
                        outcome.unread_objects.add((name, index))

    async def _verify_all(self, pool: Pool, outcome: Outcome) -> None:
        for name in self._state.snapshots:
            try:
                if not (await verify(pool, pool.snapshots.get(name))).is_proven:
                    outcome.is_told_by_verify = True
            except (SnapfsError, OSError):
                outcome.is_told_by_verify = True


def device_contents(device: Device) -> dict[str, tuple[int, dict[int, bytes]]]:
    """All files of a device but the lock's: their sizes and pages."""
    assert isinstance(device, MemoryDevice)
    return {name: (one.size, dict(one.pages)) for name, one in device._files.items() if name != "lock"}


def all_names(device: MemoryDevice) -> list[str]:
    """Every file of a device."""
    return list(device._files)


def damage(
    devices: Mapping[str, MemoryDevice],
    at: tuple[str, str],
    kind: str,
    rng: random.Random,
    others: list[tuple[str, str]],
) -> None:
    """Damage one file, durably."""
    device, name = devices[at[0]], at[1]
    contents = bytearray(device.read_file(name))
    place = rng.randrange(len(contents))
    length = min(rng.choice([1, 16, 512, 4096, 20000]), len(contents) - place)
    match kind:
        case "flip":
            contents[place] ^= 1 << rng.randrange(8)
        case "zero":
            contents[place : place + length] = bytes(length)
        case "scramble":
            contents[place : place + length] = rng.randbytes(length)
        case "truncate":
            del contents[place:]
        case "empty":
            contents.clear()
        case "extend":
            contents += rng.randbytes(length)
        case "swap":
            other_where, other_name = rng.choice(others)
            theirs = devices[other_where].read_file(other_name)
            _put(devices[other_where], other_name, bytes(contents))
            contents = bytearray(theirs)
    if kind == "remove":
        device.remove(name)
    else:
        _put(device, name, bytes(contents))


def _put(device: MemoryDevice, name: str, contents: bytes) -> None:
    file = device.create(name)
    file.write(contents, 0)
    file.sync()
    file.close()


def _checked(world: World) -> Report | None:
    """The verifier's report; None when it says that there is nothing to be verified."""
    try:
        return check_pool(world.home, WHERE, world.open_device, world.has_image)
    except (SnapfsError, OSError):
        return None
    finally:
        world.home.close()


FAMILIES = ({"a", "c"}, {"b"}, {"d"})


def judge_damage(outcome: Outcome) -> None:
    """Nothing wrong was read but of an image outside of the pool, and what one log holds is all that cannot be read.

    Of a pool that only opens as a damaged one, what other shard stores know of is read.
    """
    where, _, name = outcome.what.partition(" of ")[2].partition(":")
    is_outside = where == "outside" or "swap" in outcome.what
    wrong = {one.rstrip("'")[-1] for one in outcome.wrong}
    assert wrong <= ({"b"} if is_outside else set()), outcome
    unread = {one.rstrip("'")[-1] for one in outcome.unread}
    if unread:
        assert outcome.is_told_by_check or outcome.is_told_by_verify, outcome
    if outcome.is_rescued and name.startswith("shards/") and "swap" not in outcome.what:
        lost_index = int(name.removeprefix("shards/")[0])
        assert all(index % PROCESSOR_COUNT == lost_index for _, index in outcome.unread_objects), outcome
    if outcome.is_rescued and name == "pool.json" and "swap" not in outcome.what:
        assert not unread, outcome
    if name.startswith("logs/") and "swap" not in outcome.what and not outcome.is_told_at_opening:
        assert any(unread <= family for family in FAMILIES), outcome
