"""Clients side by side with every operation there is, on devices that fail and hold up, until power is lost.

As in races.py a seed decides the order, and each half of a block is a register of which a history is kept. Here
calls to devices fail as well, some threads take long, volumes come, go, shrink and are put back, and what failed or
was cut off may have happened or not: once, while it was under way. What is left is held against the histories.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial

import trio
import trio.testing

from snapfs.backends import CrashPlan, Device, FaultyDevice, MemoryDevice
from snapfs.errors import SnapfsError
from snapfs.formats import COPY_ON_WRITE, REDIRECT
from snapfs.geometry import VolumeId
from snapfs.making import VolumeWish
from snapfs.pool import Pool
from snapfs.volume import VolumeView

from .harness import Running, World, seeded
from .races import HALF, NEVER, OBJECT, PAGE, encoded

BLOCKS = (0, 1, 2, 5, OBJECT // PAGE - 1, OBJECT // PAGE, OBJECT // PAGE + 2, 2 * OBJECT // PAGE + 7)
HALVES = tuple(half for block in BLOCKS for half in (2 * block, 2 * block + 1))
SIZES = (
    0,
    HALF,
    PAGE,
    2 * PAGE + HALF,
    6 * PAGE,
    OBJECT - PAGE,
    OBJECT + HALF,
    OBJECT + 3 * PAGE,
    2 * OBJECT + 9 * PAGE,
)
Failure = (SnapfsError, OSError)
# How many operations, errors and faults of each kind there were.
Told = tuple[Counter[str], Counter[str], Counter[str]]


@dataclass(slots=True)
class Change:
    """A register gets a value: between when, and whether it surely did. One that is not sure is none, or is that."""

    value: int
    began: int
    ended: int = NEVER
    is_sure: bool = False


@dataclass(slots=True)
class Register:
    """All that may have happened to one half of a block."""

    changes: list[Change]

    def allows(self, value: int, began: int, ended: int, latest: int | None = None) -> bool:
        """Whether it may hold a value for who looked between two moments.

        Nothing surely came behind the change that gave the value and was over before the look began, or, for a
        look at what a power cut left, before ``latest``: what was made durable.
        """
        bound = began if latest is None else latest
        over = [one for one in self.changes if one.is_sure and one.ended < bound]
        return any(
            one.value == value and one.began < ended and not any(one.ended < other.began for other in over)
            for one in self.changes
        )


class Tracked:
    """A volume, by what was done to it. ``durable``: what ended before that is on the medium."""

    def __init__(self, file_id: int, began: int, values: dict[int, int] | None = None) -> None:
        self.file_id = file_id
        self.registers = {half: Register([]) for half in HALVES}
        self.durable = began
        self.start_from(values or {}, began)

    def start_from(self, values: dict[int, int], moment: int) -> None:
        """Nothing that happened before counts any more."""
        for half, register in self.registers.items():
            register.changes = [Change(values.get(half, 0), moment, moment, is_sure=True)]
        self.durable = moment


@dataclass(slots=True)
class Kept:
    """What a snapshot is to hold of one volume: unknown until it was read, for the first time or in vain."""

    tracked: Tracked
    began: int
    ended: int
    registers: dict[int, list[Change]]
    values: dict[int, int] | None = None


class Trouble:
    """Has calls to devices fail for a while."""

    def __init__(self) -> None:
        self.rules: list[tuple[str, frozenset[str], int, float, random.Random]] = []
        self.failed: Counter[str] = Counter()

    def ask(self, where: str, kind: str, name: str) -> None:
        """Be asked before a call; raise if it is one that is to fail."""
        for place, kinds, code, chance, rng in self.rules:
            if place in (where, "") and kind in kinds and rng.random() < chance:
                self.failed[f"{where} {kind}"] += 1
                raise OSError(code, os.strerror(code), name)


KINDS = (
    frozenset({"write"}),
    frozenset({"write", "create", "truncate", "reserve"}),
    frozenset({"sync_names", "create", "remove", "open"}),
    frozenset({"punch", "truncate"}),
    frozenset({"read", "try_read"}),
    frozenset({"sync"}),
)


class StormyWorld(World):
    """Devices that fail when there is trouble, and can lose power all the same."""

    def __init__(self, trouble: Trouble) -> None:
        self._trouble = trouble
        super().__init__(2, 2, make_device=self._made)

    def _made(self, where: str, capacity_bytes: int | None) -> Device:
        return self._over(where, MemoryDevice(capacity_bytes))

    def _over(self, where: str, inner: Device) -> Device:
        return FaultyDevice(inner, partial(self._trouble.ask, where))

    def lose_power(self, plan: CrashPlan) -> None:
        for where, device in self.all_devices().items():
            assert isinstance(device, FaultyDevice) and isinstance(device.inner, MemoryDevice)
            after = self._over(where, device.inner.crash(plan))
            if where in self.devices:
                self.devices[where] = after
            else:
                setattr(self, where, after)


def decoded(data: bytes) -> int:
    if not data:
        return 0
    value = int.from_bytes(data[:8], "little")
    assert data == encoded(value)[: len(data)], "a half of a block is of several writes"
    return value


async def values_in(view: VolumeView) -> dict[int, int]:
    """What the registers of a volume hold, or of a snapshot's."""
    found = {}
    for block in BLOCKS:
        data = bytes(await view.read(block * PAGE, PAGE))
        found[2 * block], found[2 * block + 1] = decoded(data[:HALF]), decoded(data[HALF:])
    return found


class Storm:
    """One pool's clients, and what they know of it."""

    def __init__(self, seed: int, world: StormyWorld, trouble: Trouble, clock: trio.testing.MockClock) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.world = world
        self.trouble = trouble
        self.clock = clock
        self.running = Running(world)
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        # Those that are there, by name, and those of which nobody can tell: removed or made in vain.
        self.live: dict[bytes, Tracked] = {}
        self.doubtful: dict[int, Tracked] = {}
        self.snapshots: dict[bytes, dict[int, Kept]] = {}
        self.doubtful_snapshots: set[bytes] = set()
        self._tick = 0
        self._value = 0
        self._number = 0

    @property
    def pool(self) -> Pool:
        return self.running.pool

    def tick(self) -> int:
        self._tick += 1
        return self._tick

    def fresh(self, stem: bytes) -> bytes:
        self._number += 1
        return stem + b"%d" % self._number

    def next_value(self) -> int:
        self._value += 1
        return self._value

    # -- one round -----------------------------------------------------------------------------

    async def clients(self, steps: int, *, is_stormy: bool) -> None:
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as working:
                for client in range(4):
                    working.start_soon(self._writer, random.Random(f"{self.seed} {client} {self._tick}"), steps)
                for client in range(3):
                    working.start_soon(self._operator, random.Random(f"{self.seed} o{client} {self._tick}"), steps // 3)
                if is_stormy:
                    nursery.start_soon(self._make_trouble, random.Random(f"{self.seed} t {self._tick}"))
            nursery.cancel_scope.cancel()
        self.trouble.rules.clear()

    async def _make_trouble(self, rng: random.Random) -> None:
        while True:
            for _ in range(rng.choice([10, 60, 300, 1000])):
                await trio.lowlevel.checkpoint()
            kinds = rng.choice(KINDS)
            code = rng.choice([errno.EIO, errno.ENOSPC])
            where = rng.choice(["home", "home", "0", "1", "outside", ""])
            self.trouble.rules.append((where, kinds, code, rng.choice([0.05, 0.3, 1.0]), rng))
            for _ in range(rng.choice([1, 5, 30, 100])):
                await trio.lowlevel.checkpoint()
            self.trouble.rules.clear()

    async def _attempt(self, kind: str, call: Callable[[], Awaitable[object]]) -> bool:
        """Whether it went well."""
        self.counts[kind] += 1
        try:
            await call()
        except Failure as error:
            self.errors[f"{kind}: {type(error).__name__}"] += 1
            return False
        return True

    # -- clients that write --------------------------------------------------------------------

    async def _writer(self, rng: random.Random, steps: int) -> None:
        for _ in range(steps):
            if not self.live:
                await self._create(rng)
                continue
            name = rng.choice(sorted(self.live))
            kind = rng.choice(["read", "read", "write", "write", "write", "cancelled", "sync", "discard", "truncate"])
            await getattr(self, "_" + kind)(rng, name, self.live[name])

    def _range(self, rng: random.Random) -> list[int]:
        first = rng.randrange(len(HALVES))
        found = [HALVES[first]]
        for half in HALVES[first + 1 : first + rng.choice([1, 1, 2, 3])]:
            if half == found[-1] + 1:
                found.append(half)
        return found

    @contextlib.contextmanager
    def _changing(self, tracked: Tracked, values: dict[int, int]) -> Iterator[Callable[[], None]]:
        """Registers get these values inside; surely if what this gives is called."""
        began = self.tick()
        changes = {half: Change(value, began) for half, value in values.items()}
        for half, change in changes.items():
            tracked.registers[half].changes.append(change)

        def done() -> None:
            ended = self.tick()
            for change in changes.values():
                change.ended, change.is_sure = ended, True

        try:
            yield done
        finally:
            ended = self.tick()
            for change in changes.values():
                change.ended = min(change.ended, ended)

    async def _read(self, rng: random.Random, name: bytes, tracked: Tracked) -> None:
        halves = self._range(rng)
        began = self.tick()

        async def read() -> None:
            async with self.pool.volumes.opened(name) as volume:
                if volume.file_id != tracked.file_id:
                    return
                data = bytes(await volume.read(halves[0] * HALF, HALF * len(halves)))
            ended = self.tick()
            for number, half in enumerate(halves):
                value = decoded(data[number * HALF : (number + 1) * HALF])
                assert tracked.registers[half].allows(value, began, ended), (
                    f"{name!r} {half}: {value} at {began}-{ended}, {tracked.registers[half]}"
                )

        await self._attempt("read", read)

    async def _write(self, rng: random.Random, name: bytes, tracked: Tracked) -> None:
        values = {half: self.next_value() for half in self._range(rng)}

        async def write() -> None:
            async with self.pool.volumes.opened(name) as volume:
                if volume.file_id != tracked.file_id:
                    return
                with self._changing(tracked, values) as done:
                    await volume.write(min(values) * HALF, b"".join(encoded(one) for one in values.values()))
                    done()

        await self._attempt("write", write)

    async def _cancelled(self, rng: random.Random, name: bytes, tracked: Tracked) -> None:
        """Something whose caller goes away meanwhile."""
        kind = rng.choice(["write", "write", "sync", "discard", "truncate", "read"])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(getattr(self, "_" + kind), rng, name, tracked)
            for _ in range(rng.randrange(12)):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    async def _sync(self, rng: random.Random, name: bytes, tracked: Tracked) -> None:
        began = self.tick()

        async def sync() -> None:
            volume = self.pool.volumes.get(name)
            if volume.file_id == tracked.file_id:
                await volume.sync()
                tracked.durable = max(tracked.durable, began)

        await self._attempt("sync", sync)

    async def _discard(self, rng: random.Random, name: bytes, tracked: Tracked) -> None:
        first = rng.choice(HALVES)
        last = first + rng.choice([1, 2, 3, 4, 8, 3000])
        values = {half: 0 for half in HALVES if first <= half < last}

        async def discard() -> None:
            volume = self.pool.volumes.get(name)
            if volume.file_id == tracked.file_id:
                with self._changing(tracked, values) as done:
                    await self.pool.volumes.discard(volume, first * HALF, (last - first) * HALF)
                    done()

        await self._attempt("discard", discard)

    async def _truncate(self, rng: random.Random, name: bytes, tracked: Tracked) -> None:
        size = rng.choice(SIZES)
        values = {half: 0 for half in HALVES if half * HALF >= size}

        async def truncate() -> None:
            volume = self.pool.volumes.get(name)
            if volume.file_id == tracked.file_id:
                with self._changing(tracked, values) as done:
                    await self.pool.volumes.truncate(volume, size)
                    done()

        await self._attempt("truncate", truncate)

    # -- clients that do all else --------------------------------------------------------------

    async def _operator(self, rng: random.Random, steps: int) -> None:
        kinds = [
            *["snapshot"] * 4,
            *["delete"] * 3,
            *["create", "remove", "rename", "clone", "clone", "rollback", "flatten", "look", "look"],
            *["reclaim", "seal", "pass_time", "sync_all", "commit", "rename_snapshot"],
        ]
        for _ in range(steps):
            await getattr(self, "_" + rng.choice(kinds))(rng)

    async def _create(self, rng: random.Random) -> None:
        name = self.fresh(b"v")
        kind = rng.choice(["plain", "plain", "cow", "image-cow", "image"])
        values: dict[int, int] = {}
        wish = VolumeWish(name, rng.choice(SIZES), COPY_ON_WRITE if "cow" in kind else REDIRECT)
        if "image" in kind:
            path = b"/" + name
            values = {half: self.next_value() for half in HALVES[:8]}
            contents = bytearray(max(values) * HALF + HALF)
            for half, value in values.items():
                contents[half * HALF : (half + 1) * HALF] = encoded(value)
            try:
                self.world.make_image(path.decode(), bytes(contents))
            except OSError:
                return
            wish = VolumeWish(name, None, wish.change_mode, path.decode())

        async def create() -> None:
            volume = await self.pool.maker.create(wish)
            self.live[name] = Tracked(volume.file_id, self.tick(), values)

        await self._attempt("create " + kind, create)

    def _any(self, rng: random.Random) -> bytes | None:
        return rng.choice(sorted(self.live)) if self.live else None

    async def _remove(self, rng: random.Random) -> None:
        name = self._any(rng)
        if name is None or len(self.live) < 3:
            return
        tracked = self.live.pop(name)
        self.doubtful[tracked.file_id] = tracked
        await self._attempt("remove", lambda: self.pool.volumes.remove(name))

    async def _rename(self, rng: random.Random) -> None:
        name = self._any(rng)
        if name is None:
            return
        new = self.fresh(b"v")
        tracked = self.live.pop(name)
        self.doubtful[tracked.file_id] = tracked

        async def rename() -> None:
            await self.pool.volumes.rename(name, new)
            if self.pool.volumes.get(new).file_id == tracked.file_id:
                self.live[new] = self.doubtful.pop(tracked.file_id)

        await self._attempt("rename", rename)

    async def _snapshot(self, rng: random.Random) -> None:
        chosen = rng.choice([None, None, self._any(rng)])
        name = self.fresh(b"s")
        before = dict(self.live)
        began = self.tick()
        self.doubtful_snapshots.add(name)

        async def create() -> None:
            await self.pool.snapshots.create(name, None if chosen is None else [chosen])
            held = before.items() if chosen is None else [(chosen, before[chosen])]
            self._note_snapshot(name, began, [tracked for _, tracked in held])

        if await self._attempt("snapshot", create):
            await self._look_into(name)

    def _note_snapshot(self, name: bytes, began: int, held: list[Tracked]) -> None:
        ended = self.tick()
        self.doubtful_snapshots.discard(name)
        self.snapshots[name] = {
            one.file_id: Kept(one, began, ended, {half: list(r.changes) for half, r in one.registers.items()})
            for one in held
        }
        for one in held:
            one.durable = max(one.durable, began)

    async def _look(self, rng: random.Random) -> None:
        if self.snapshots:
            await self._look_into(rng.choice(sorted(self.snapshots)))

    async def _look_into(self, name: bytes) -> None:
        await self._attempt("look", partial(self._compare, name))

    async def _compare(self, name: bytes) -> None:
        """Hold a snapshot against what is known of it, and remember what was not known."""
        expected = self.snapshots.get(name)
        snapshot = self.pool.snapshots.get(name)
        if expected is None:
            return
        members = await self.pool.snapshots.members(snapshot)
        traits = self.pool.volumes.traits
        found: dict[int, VolumeId] = {traits.get(volume_id).file_id: volume_id for volume_id in members.by_id}
        for file_id, kept in expected.items():
            if file_id not in found:
                # Removed between the look at the list and the cut.
                assert file_id not in {one.file_id for one in self.live.values()} or kept.values is None
                continue
            view = await self.pool.snapshots.open_volume(snapshot, found[file_id])
            try:
                values = await values_in(view)
            finally:
                self.pool.snapshots.close_volume(view)
            self._judge_kept(name, kept, values)

    def _judge_kept(self, name: bytes, kept: Kept, values: dict[int, int]) -> None:
        if kept.values is None:
            # What was under way has ended since, and may be in it.
            for half, value in values.items():
                register = Register(kept.registers[half])
                assert register.allows(value, kept.began, kept.ended), (
                    f"snapshot {name!r} {half}: {value} at {kept.began}-{kept.ended}, {register}"
                )
            kept.values = values
        assert values == kept.values, f"snapshot {name!r}: {values}, and was {kept.values}"

    async def _delete(self, rng: random.Random) -> None:
        if len(self.snapshots) < 2:
            return
        name = rng.choice(sorted(self.snapshots))
        del self.snapshots[name]
        self.doubtful_snapshots.add(name)
        if await self._attempt("delete", lambda: self.pool.snapshots.delete(name)):
            self.doubtful_snapshots.discard(name)

    async def _rename_snapshot(self, rng: random.Random) -> None:
        if not self.snapshots:
            return
        name, new = rng.choice(sorted(self.snapshots)), self.fresh(b"r")
        kept = self.snapshots.pop(name)
        self.doubtful_snapshots |= {name, new}

        async def rename() -> None:
            await self.pool.snapshots.rename(name, new)
            self.snapshots[new] = kept
            self.doubtful_snapshots.difference_update({name, new})

        await self._attempt("rename snapshot", rename)

    def _one_kept(self, rng: random.Random) -> tuple[bytes, Kept] | None:
        """A snapshot, and what it is known to hold of one volume."""
        known = [
            (name, file_id)
            for name, kept in sorted(self.snapshots.items())
            for file_id, one in kept.items()
            if one.values is not None
        ]
        if not known:
            return None
        name, file_id = rng.choice(known)
        return name, self.snapshots[name][file_id]

    async def _name_in(self, name: bytes, kept: Kept) -> bytes | None:
        """How a snapshot calls a volume."""
        members = await self.pool.snapshots.members(self.pool.snapshots.get(name))
        traits = self.pool.volumes.traits
        for volume_id, attributes in members.by_id.items():
            if traits.get(volume_id).file_id == kept.tracked.file_id:
                return attributes.name
        return None

    async def _clone(self, rng: random.Random) -> None:
        chosen = self._one_kept(rng)
        if chosen is None or len(self.live) > 6:
            return
        (name, kept), new = chosen, self.fresh(b"c")

        async def clone() -> None:
            source = await self._name_in(name, kept)
            if source is None:
                return
            volume = await self.pool.clones.clone(name, source, new)
            self.live[new] = Tracked(volume.file_id, self.tick(), kept.values)

        await self._attempt("clone", clone)

    async def _rollback(self, rng: random.Random) -> None:
        chosen = self._one_kept(rng)
        if chosen is None:
            return
        name, kept = chosen
        tracked = kept.tracked
        assert kept.values is not None
        values = dict(kept.values)
        if tracked not in self.live.values():
            return

        async def rollback() -> None:
            source = await self._name_in(name, kept)
            if source is None:
                return
            with self._changing(tracked, values) as done:
                began = self.tick()
                try:
                    undo = (await self.pool.clones.rollback(name, [source], force=rng.random() < 0.7)).undo
                except BaseException:
                    # One that is put back in place is finished when the pool is opened again.
                    for half, value in values.items():
                        tracked.registers[half].changes.append(Change(value, began))
                    raise
                done()
                tracked.durable = max(tracked.durable, began)
                if tracked in self.live.values():
                    assert undo.name is not None
                    self._note_snapshot(undo.name, began, [tracked])
                else:
                    # It came back.
                    self.doubtful[tracked.file_id] = tracked

        await self._attempt("rollback", rollback)

    async def _flatten(self, rng: random.Random) -> None:
        name = self._any(rng)
        if name is not None:
            await self._attempt("flatten", lambda: self.pool.clones.flatten(name))

    async def _reclaim(self, rng: random.Random) -> None:
        await self._attempt("reclaim", self.pool.reclaimer.reclaim_all)

    async def _seal(self, rng: random.Random) -> None:
        await self._attempt("seal", self.pool.sealer.seal_all)

    async def _sync_all(self, rng: random.Random) -> None:
        await self._attempt("sync all", self.pool.sync)

    async def _commit(self, rng: random.Random) -> None:
        await self._attempt("commit", rng.choice(self.pool.processors).commit)

    async def _pass_time(self, rng: random.Random) -> None:
        self.clock.jump(rng.choice([1, 6, 60]))
        await trio.lowlevel.checkpoint()

    # -- the end of a round --------------------------------------------------------------------

    async def look_around(self) -> None:
        """With all devices well again everything is read, and is what it may be."""
        for name, tracked in self.live.items():
            volume = self.pool.volumes.get(name)
            assert volume.file_id == tracked.file_id, name
            now = self.tick()
            try:
                await self._read_all(name, tracked, now, None)
            except SnapfsError:
                # A rollback in place that could not be finished; or a clone of one whose blocks cannot be preserved.
                assert any(one.failure is not None for one in self.pool.volumes.by_name.values()), name
        for name in sorted(self.snapshots):
            await self._compare(name)

    async def _read_all(self, name: bytes, tracked: Tracked, now: int, latest: int | None) -> dict[int, int]:
        async with self.pool.volumes.opened(name) as volume:
            values = await values_in(volume)
        for half, value in values.items():
            register = tracked.registers[half]
            assert register.allows(value, now, now + 1, latest), (
                f"{name!r} {half}: {value} at {now}, {latest}, {register}"
            )
        return values

    async def work_again(self) -> None:
        """What is not refused for good takes writes, syncs and snapshots."""
        if not any(one.failure for one in self.pool.volumes.by_name.values()):
            await self.pool.reclaimer.reclaim_all()
            await self.pool.sealer.seal_all()
        rng = random.Random(self.seed)
        for name, tracked in sorted(self.live.items()):
            if self.pool.volumes.get(name).failure is None:
                before = Counter(self.errors)
                await self._write(rng, name, tracked)
                await self._sync(rng, name, tracked)
                # A clone of one whose blocks cannot be preserved cannot be written either.
                is_refused = any(one.failure is not None for one in self.pool.volumes.by_name.values())
                assert self.errors == before or is_refused, (name, self.errors - before)

    async def find(self, *, after_power_cut: bool) -> None:
        """After opening: what is there is what may be, and from now on is what is."""
        volumes = self.pool.volumes
        found = {name: volumes.by_name[name].file_id for name in volumes.by_name}
        for name, tracked in self.live.items():
            assert found.get(name) == tracked.file_id, f"{name!r} is not there: {sorted(found)}"
        for name in self.snapshots:
            assert name in self.pool.snapshots.by_name, f"snapshot {name!r} is not there"
            await self._compare(name)
        for name in self.pool.snapshots.by_name:
            known = name in self.snapshots or name in self.doubtful_snapshots or b"-before-rollback" in name
            assert known, f"snapshot {name!r} was deleted, or never made"
        by_id = {one.file_id: one for one in self.live.values()} | self.doubtful
        adopted = {}
        for name, file_id in found.items():
            old = by_id.get(file_id)
            if old is None:
                # Of a making that failed.
                old = Tracked(file_id, self.tick())
                async with volumes.opened(name) as volume:
                    values = await values_in(volume)
            else:
                latest = old.durable if after_power_cut else None
                values = await self._read_all(name, old, self.tick(), latest)
            old.start_from(values, self.tick())
            adopted[name] = old
        self.live, self.doubtful = adopted, {}
        self.doubtful_snapshots = set(self.pool.snapshots.by_name) - set(self.snapshots)


async def _storm(
    seed: int, steps: int, clock: trio.testing.MockClock
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    rng = random.Random(f"{seed} storm")
    trouble = Trouble()
    world = StormyWorld(trouble)
    storm = Storm(seed, world, trouble, clock)
    has_failed = is_cut = False
    for number in range(3):
        async with trio.open_nursery() as nursery:
            storm.running = Running(world)
            await storm.running.start(nursery)
            if number:
                await storm.find(after_power_cut=is_cut)
            if number == 2:
                await storm.pool.reclaimer.reclaim_all()
                await storm.look_around()
                await storm.running.stop()
                break
            for _ in range(2):
                await storm._create(rng)
            await storm.clients(steps, is_stormy=rng.random() < 0.8)
            await storm.look_around()
            if rng.random() < 0.5:
                await storm.work_again()
                await storm.look_around()
            failed = [name for name, one in storm.pool.volumes.by_name.items() if one.failure is not None]
            # Also of one that was removed since.
            has_failed |= any(one.endswith("SyncFailedError") for one in storm.errors)
            is_cut = rng.random() < 0.5 or bool(failed)
            if is_cut:
                await storm.running.crash(CrashPlan(seed, rng.choice([0.0, 0.5, 1.0]), 0.0))
                world.check()
                nursery.cancel_scope.cancel()
            else:
                await storm.running.stop()
    if not has_failed:
        world.check_clean()
    return storm.counts, storm.errors, trouble.failed


def storm(seed: int, steps: int) -> Told:
    """Run clients in an order of the seed's; how many operations, errors and faults of each kind there were."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    try:
        with seeded(seed):
            return trio.run(_storm, seed, steps, clock, clock=clock)
    except BaseException as error:
        raise AssertionError(f"seed {seed}, {steps} steps") from error
