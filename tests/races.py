"""Clients side by side on one pool, in an order that a seed decides, and what each saw held against the others.

Threads are stood in for by steps of the scheduler and the scheduler by a seeded one, so that a seed gives the same
order again. Each half of a block is a register, and every write has a value of its own: whether a read could
give a value follows from when the calls began and ended (Herlihy and Wing, "Linearizability", TOPLAS 1990).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import trio
import trio.testing

from snapfs.errors import SnapfsError
from snapfs.formats import COPY_ON_WRITE
from snapfs.making import VolumeWish
from snapfs.pool import Pool
from snapfs.snapshot import Snapshot

from .harness import Running, World, read_snapshot, seeded

PAGE = 4096
HALF = PAGE // 2
OBJECT = 4 << 20
SIZE = OBJECT + 4 * PAGE
NAMES = (b"a", b"b")
BLOCKS = (0, 1, 5, (OBJECT // PAGE) - 1, OBJECT // PAGE, OBJECT // PAGE + 2)
Register = tuple[bytes, int]
NEVER = 1 << 60


@dataclass(slots=True)
class Write:
    """A write to a register: when it began and ended by the count of steps; one that was cancelled may end never."""

    value: int
    began: int
    ended: int = NEVER


@dataclass(slots=True)
class History:
    """All that happened. Value 0 is what is there from the beginning."""

    writes: dict[Register, dict[int, Write]] = field(default_factory=dict)
    clock: int = 0
    next_value: int = 1

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def begin(self, registers: list[Register]) -> list[Write]:
        began = self.tick()
        made = []
        for register in registers:
            write = Write(self.next_value, began)
            self.next_value += 1
            made.append(write)
            self.of(register)[write.value] = write
        return made

    def of(self, register: Register) -> dict[int, Write]:
        return self.writes.setdefault(register, {0: Write(0, -1, 0)})

    def check_read(self, register: Register, value: int, began: int, ended: int) -> None:
        """A read may give what was being written, or was written last before it began."""
        write = self.of(register).get(value)
        assert write is not None, f"{register}: {value} was never written there"
        assert write.began < ended, f"{register}: {value} comes from the future"
        for other in self.of(register).values():
            assert not (write.ended < other.began and other.ended < began), (
                f"{register}: {value}, which ended at {write.ended}, was written over by {other}; read {began}-{ended}"
            )

    def check_cut(self, found: dict[Register, int]) -> None:
        """No write is in a snapshot without those that had ended before it began."""
        latest = max(self.of(register)[value].began for register, value in found.items())
        for register, value in found.items():
            write = self.of(register)[value]
            for other in self.of(register).values():
                assert not (write.ended < other.began and other.ended < latest), (
                    f"{register}: the snapshot has {value} but not {other}, and a write that began at {latest}"
                )


def encoded(value: int) -> bytes:
    return value.to_bytes(8, "little") * (HALF // 8)


def decoded(data: bytes) -> int:
    value = int.from_bytes(data[:8], "little")
    assert data == encoded(value), "a half of a block is of several writes"
    return value


class Clients:
    """Tasks that read, write, sync, snapshot, delete and clone."""

    def __init__(self, pool: Pool, seed: int) -> None:
        self._pool = pool
        self._seed = seed
        self._history = History()
        self._kept: dict[bytes, bytes] = {}
        self._number = 0
        self.counts: dict[str, int] = {}

    async def run(self, steps: int) -> None:
        async with trio.open_nursery() as nursery:
            for client in range(5):
                nursery.start_soon(self._client, random.Random(f"{self._seed} {client}"), steps)
            for client in range(2):
                nursery.start_soon(self._snapshooter, random.Random(f"{self._seed} s{client}"), steps // 4)

    async def _client(self, rng: random.Random, steps: int) -> None:
        for _ in range(steps):
            volume, block = rng.choice(NAMES), rng.choice(BLOCKS)
            first = block * 2 + rng.randrange(2)
            count = rng.choice([1, 1, 2, 3])
            registers = [(volume, half) for half in range(first, first + count)]
            kind = rng.choice(["read", "read", "write", "write", "write", "cancelled", "synced", "sync"])
            self.counts[kind] = self.counts.get(kind, 0) + 1
            await getattr(self, "_" + kind)(rng, registers)

    async def _read(self, rng: random.Random, registers: list[Register]) -> None:
        began = self._history.tick()
        async with self._pool.volumes.opened(registers[0][0]) as volume:
            data = bytes(await volume.read(registers[0][1] * HALF, HALF * len(registers)))
        ended = self._history.tick()
        for number, register in enumerate(registers):
            self._history.check_read(register, decoded(data[number * HALF : (number + 1) * HALF]), began, ended)

    async def _write(self, rng: random.Random, registers: list[Register]) -> None:
        writes = self._history.begin(registers)
        async with self._pool.volumes.opened(registers[0][0]) as volume:
            await volume.write(registers[0][1] * HALF, b"".join(encoded(one.value) for one in writes))
        ended = self._history.tick()
        for one in writes:
            one.ended = ended

    async def _cancelled(self, rng: random.Random, registers: list[Register]) -> None:
        """A write whose caller goes away meanwhile."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, rng, registers)
            for _ in range(rng.randrange(6)):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    async def _synced(self, rng: random.Random, registers: list[Register]) -> None:
        """A write of a whole block, and a sync behind it."""
        name, half = registers[0]
        await self._write(rng, [(name, half // 2 * 2 + number) for number in range(2)])
        await self._pool.volumes.get(name).sync()

    async def _sync(self, rng: random.Random, registers: list[Register]) -> None:
        await self._pool.volumes.get(registers[0][0]).sync()

    async def _snapshooter(self, rng: random.Random, steps: int) -> None:
        for _ in range(steps):
            kind = rng.choice(["snapshot", "snapshot", "one", "delete", "clone", "reclaim", "seal"])
            self.counts[kind] = self.counts.get(kind, 0) + 1
            match kind:
                case "snapshot":
                    await self._snapshot(None)
                case "one":
                    await self._snapshot([rng.choice(NAMES)])
                case "delete" if self._kept:
                    name = rng.choice(sorted(self._kept)).rpartition(b"/")[0]
                    self._kept = {one: data for one, data in self._kept.items() if not one.startswith(name + b"/")}
                    with contextlib.suppress(SnapfsError):
                        await self._pool.snapshots.delete(name)
                case "clone" if self._kept:
                    await self._clone(rng.choice(sorted(self._kept)))
                case "reclaim":
                    await self._pool.reclaimer.reclaim_all()
                case "seal":
                    await self._pool.sealer.seal_all()

    async def _snapshot(self, names: list[bytes] | None) -> None:
        self._number += 1
        began = self._history.tick()
        snapshot = await self._pool.snapshots.create(b"s%d" % self._number, names)
        ended = self._history.tick()
        found: dict[Register, int] = {}
        kept = {}
        for name in names or NAMES:
            data = kept[b"%s/%s" % (snapshot.name or b"", name)] = await read_snapshot(self._pool, snapshot, name)
            for register, value in registers_in(name, data):
                found[register] = value
                self._history.check_read(register, value, began, ended)
        self._history.check_cut(found)
        # Only now may the other delete it.
        self._kept.update(kept)

    async def _clone(self, path: bytes) -> None:
        snapshot, _, name = path.rpartition(b"/")
        self._number += 1
        new = b"c%d" % self._number
        data = self._kept[path]
        try:
            await self._pool.clones.clone(snapshot, name, new)
        except SnapfsError:
            # Deleted by the other one meanwhile.
            assert path not in self._kept
            return
        async with self._pool.volumes.opened(new) as volume:
            assert bytes(await volume.read(0, volume.size_bytes)) == data
        await self._pool.volumes.remove(new)

    async def check_end(self) -> None:
        """Snapshots hold what they held when they were made."""
        for path, data in self._kept.items():
            snapshot, _, name = path.rpartition(b"/")
            found: Snapshot = self._pool.snapshots.get(snapshot)
            assert await read_snapshot(self._pool, found, name) == data, path


def registers_in(name: bytes, data: bytes) -> Iterator[tuple[Register, int]]:
    """The registers that clients use, and what a volume's contents say of them."""
    for block in BLOCKS:
        for half in (block * 2, block * 2 + 1):
            yield (name, half), decoded(data[half * HALF : (half + 1) * HALF])


async def _race(seed: int, steps: int) -> dict[str, int]:
    world = World(processor_count=2, device_count=2)
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        await pool.maker.create(VolumeWish(b"a", SIZE))
        await pool.maker.create(VolumeWish(b"b", SIZE, COPY_ON_WRITE))
        clients = Clients(pool, seed)
        await clients.run(steps)
        await clients.check_end()
        await pool.reclaimer.reclaim_all()
        await clients.check_end()
        await running.stop()
    world.check_clean()
    return clients.counts


def race(seed: int, steps: int) -> dict[str, int]:
    """Run clients in an order of the seed's; how many operations of each kind there were."""
    try:
        with seeded(seed):
            counts: dict[str, int] = trio.run(partial(_race, seed, steps), clock=trio.testing.MockClock())
    except BaseException as error:
        raise AssertionError(f"seed {seed}, {steps} steps") from error
    return counts
