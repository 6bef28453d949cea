"""The pool against a model of dictionaries: any sequence of operations, power cuts among them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from snapfs.backends import CrashPlan
from snapfs.errors import ExistsError, HeldError, NotFoundError, SnapfsError, UnsupportedError
from snapfs.formats import COPY_ON_WRITE, REDIRECT
from snapfs.making import VolumeWish
from snapfs.pool import Pool

from .contents import Contents, first_of_no_version
from .harness import Running, World, everything_is_proven, seeded, snapshot_contents, volume_contents

SPAN = 3 * (4 << 20) + 20000  # the volumes reach over four objects
NAMES = [b"a", b"b", b"c"]
IMAGE = bytes(index * 7 & 0xFF for index in range(9000)) + bytes(5 << 20) + b"end" * 3000
SNAPSHOT_NAMES = [b"s0", b"s1", b"s2", b"s3"]
# A kind and its arguments.
Operation = tuple[Any, ...]


@dataclass
class ModelVolume:
    """What a volume holds, and what it may hold after a power cut: every version since the last sync."""

    data: Contents = field(default_factory=Contents)
    identity: object = field(default_factory=object)
    versions: list[Contents] = field(default_factory=lambda: [Contents()])

    def note(self) -> None:
        self.versions.append(self.data.copy())

    def synced(self) -> None:
        self.versions = [self.data.copy()]

    def write(self, offset: int, data: bytes) -> None:
        self.data.write(offset, data)
        self.note()

    def discard(self, offset: int, length: int) -> None:
        self.data.clear(offset, offset + length)
        self.note()

    def adopt(self, found: Contents, *, exact_size: bool = True) -> None:
        """After a power cut: each sector is one of its versions; what is found is the truth from now on."""
        wrong = first_of_no_version(found, self.versions, exact_size=exact_size)
        assert wrong is None, wrong
        self.data = found.copy()
        self.synced()


async def named_blocks(pool: Pool) -> int:
    """Blocks in all change logs that anything names."""
    total = 0
    for processor in pool.processors:
        counts = await processor.access.ask(processor.access.store.block_counts_by_device)
        total += sum(counts.values())
    return total


class Model:
    def __init__(self) -> None:
        self.volumes: dict[bytes, ModelVolume] = {}
        self.snapshots: dict[bytes, dict[bytes, tuple[object, Contents]]] = {}
        self.held: set[bytes] = set()
        self.in_place: set[object] = set()


offsets = st.one_of(
    st.integers(0, SPAN),
    st.sampled_from([0, 4096, (4 << 20) - 1, 4 << 20, (8 << 20) - 4096, 100, 12 << 20]),
)
lengths = st.one_of(st.integers(1, 10000), st.sampled_from([1, 512, 4096, 8192, 70000, 5 << 20]))
operations = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(NAMES), offsets, lengths, st.integers(1, 255)),
    st.tuples(
        st.just("write"), st.sampled_from(NAMES), st.integers(0, 40000), st.integers(1, 9000), st.integers(1, 255)
    ),
    st.tuples(st.just("truncate"), st.sampled_from(NAMES), offsets),
    st.tuples(st.just("zero"), st.sampled_from(NAMES), st.integers(0, 3500), st.integers(1, 600)),
    st.tuples(st.just("sparse"), st.sampled_from(NAMES), st.integers(0, 60000), st.lists(st.booleans(), max_size=8)),
    st.tuples(st.just("discard"), st.sampled_from(NAMES), offsets, lengths),
    st.tuples(st.just("create"), st.sampled_from(NAMES)),
    st.tuples(st.just("create-special"), st.sampled_from(NAMES), st.sampled_from(["cow", "image-cow", "image"])),
    st.tuples(st.just("remove"), st.sampled_from(NAMES)),
    st.tuples(st.just("rename"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
    st.tuples(st.just("sync"), st.sampled_from(NAMES)),
    st.tuples(st.just("snapshot"), st.sampled_from(SNAPSHOT_NAMES), st.sampled_from([None, [b"a"], [b"b"]])),
    st.tuples(st.just("delete"), st.sampled_from(SNAPSHOT_NAMES)),
    st.tuples(st.just("delete-exactly"), st.lists(st.sampled_from(SNAPSHOT_NAMES), min_size=1, unique=True)),
    st.tuples(st.just("clone"), st.sampled_from(SNAPSHOT_NAMES), st.sampled_from(NAMES), st.sampled_from(NAMES)),
    st.tuples(st.just("rollback"), st.sampled_from(SNAPSHOT_NAMES), st.sampled_from([None, *NAMES])),
    st.tuples(st.just("flatten"), st.sampled_from(NAMES)),
    st.tuples(st.just("hold"), st.sampled_from(SNAPSHOT_NAMES)),
    st.tuples(st.just("release"), st.sampled_from(SNAPSHOT_NAMES)),
    st.tuples(st.just("reclaim")),
    st.tuples(st.just("seal")),
    st.tuples(st.just("pass-time")),
    st.tuples(st.just("reopen")),
    st.tuples(st.just("crash"), st.integers(0, 1 << 30), st.sampled_from([0.0, 0.5, 1.0])),
)


class Runner:
    def __init__(self, nursery: trio.Nursery, clock: trio.testing.MockClock, world: World | None = None) -> None:
        self.world = world or World(processor_count=2, device_count=2)
        self.model = Model()
        self.nursery = nursery
        self.clock = clock
        self.running = Running(self.world)
        self.image_count = 0

    async def start(self) -> None:
        self.running = Running(self.world)
        await self.running.start(self.nursery)

    async def step(self, operation: Operation) -> None:
        kind, *arguments = operation
        await getattr(self, "do_" + kind.replace("-", "_"))(*arguments)

    async def do_write(self, name: bytes, offset: int, length: int, fill: int) -> None:
        volume = self.model.volumes.get(name)
        if volume is None:
            return
        data = bytes((fill + index) & 0xFF or 1 for index in range(251)) * (length // 251 + 1)
        data = data[:length]
        volume.write(offset, data)
        async with self.running.pool.volumes.opened(name) as real:
            await real.write(offset, data)

    async def do_zero(self, name: bytes, block: int, count: int) -> None:
        volume = self.model.volumes.get(name)
        if volume is None:
            return
        offset, length = block * 4096, count * 4096
        volume.write(offset, bytes(length))
        async with self.running.pool.volumes.opened(name) as real:
            await real.write(offset, bytes(length))

    async def do_sparse(self, name: bytes, offset: int, pattern: list[bool]) -> None:
        """A write in which some blocks are of zeros."""
        volume = self.model.volumes.get(name)
        if volume is None or not pattern:
            return
        head = b"h" * (-offset % 4096)
        data = head + b"".join(b"d" * 4096 if one else bytes(4096) for one in pattern) + b"t" * 100
        volume.write(offset, data)
        async with self.running.pool.volumes.opened(name) as real:
            await real.write(offset, data)

    async def do_discard(self, name: bytes, offset: int, length: int) -> None:
        volume = self.model.volumes.get(name)
        if volume is None:
            return
        volume.discard(offset, length)
        await self.running.pool.volumes.discard(self.running.pool.volumes.get(name), offset, length)

    async def do_truncate(self, name: bytes, size: int) -> None:
        volume = self.model.volumes.get(name)
        if volume is None:
            return
        pool = self.running.pool
        if size < len(volume.data) and pool.volumes.get(name).block_count:
            # Durable at once: no version reaches behind it any more.
            for version in volume.versions:
                version.truncate(min(size, len(version)))
        volume.data.truncate(size)
        volume.note()
        await pool.volumes.truncate(pool.volumes.get(name), size)

    async def do_create(self, name: bytes) -> None:
        if name in self.model.volumes:
            return
        self.model.volumes[name] = ModelVolume()
        await self.running.pool.volumes.create(name)

    async def do_create_special(self, name: bytes, kind: str) -> None:
        if name in self.model.volumes:
            return
        contents = b""
        path = ""
        if kind != "cow":
            self.image_count += 1
            path = f"/image{self.image_count}"
            contents = IMAGE
            self.world.make_image(path, contents)
        change_mode = REDIRECT if kind == "image" else COPY_ON_WRITE
        await self.running.pool.maker.create(VolumeWish(name, None, change_mode, path))
        self.model.volumes[name] = ModelVolume(Contents(contents))
        self.model.volumes[name].synced()
        if change_mode == COPY_ON_WRITE:
            self.model.in_place.add(self.model.volumes[name].identity)

    async def do_remove(self, name: bytes) -> None:
        if self.model.volumes.pop(name, None) is not None:
            await self.running.pool.volumes.remove(name)

    async def do_rename(self, old: bytes, new: bytes) -> None:
        if old in self.model.volumes and old != new:
            self.model.volumes[new] = self.model.volumes.pop(old)
            await self.running.pool.volumes.rename(old, new)

    async def do_sync(self, name: bytes) -> None:
        volume = self.model.volumes.get(name)
        if volume is not None:
            await self.running.pool.volumes.get(name).sync()
            volume.synced()

    async def do_snapshot(self, name: bytes, names: list[bytes] | None) -> None:
        expected_error = name in self.model.snapshots or (
            names is not None and any(one not in self.model.volumes for one in names)
        )
        try:
            await self.running.pool.snapshots.create(name, names)
        except SnapfsError:
            assert expected_error
            return
        assert not expected_error
        held = self.model.volumes if names is None else {one: self.model.volumes[one] for one in names}
        self.keep(name, held)

    def keep(self, name: bytes, held: dict[bytes, ModelVolume]) -> None:
        self.model.snapshots[name] = {one: (volume.identity, volume.data.copy()) for one, volume in held.items()}
        for volume in held.values():
            volume.synced()

    async def do_delete(self, name: bytes) -> None:
        if name in self.model.held:
            with pytest.raises(HeldError):
                await self.running.pool.snapshots.delete(name)
        elif self.model.snapshots.pop(name, None) is not None:
            await self.running.pool.snapshots.delete(name)

    async def do_delete_exactly(self, names: list[bytes]) -> None:
        """What deleting some snapshots frees is what was predicted, to the block."""
        names = [name for name in names if name in self.model.snapshots and name not in self.model.held]
        pool = self.running.pool
        await pool.sync()
        for volume in self.model.volumes.values():
            volume.synced()
        await pool.reclaimer.reclaim_all()
        await pool.sync()
        account = await pool.snapshots.account()
        instants = [pool.snapshots.get(name).instant for name in names]
        predicted = account.freed_blocks(instants)
        if len(instants) == 1:
            assert account.exclusive_blocks().get(instants[0], 0) == predicted
        before = await named_blocks(pool)
        for name in names:
            del self.model.snapshots[name]
            await pool.snapshots.delete(name)
        await pool.reclaimer.reclaim_all()
        await pool.sync()
        assert before - await named_blocks(pool) == predicted

    async def do_hold(self, name: bytes) -> None:
        if name in self.model.snapshots and name not in self.model.held:
            await self.running.pool.snapshots.hold(name, "tag")
            self.model.held.add(name)

    async def do_release(self, name: bytes) -> None:
        if name in self.model.held:
            await self.running.pool.snapshots.release(name, "tag")
            self.model.held.remove(name)

    async def do_clone(self, snapshot: bytes, source: bytes, new: bytes) -> None:
        found = self.model.snapshots.get(snapshot, {}).get(source)
        if found is None or new in self.model.volumes:
            with pytest.raises((NotFoundError, ExistsError)):
                await self.running.pool.clones.clone(snapshot, source, new)
            return
        await self.running.pool.clones.clone(snapshot, source, new)
        self.model.volumes[new] = ModelVolume(found[1].copy())
        self.model.volumes[new].synced()

    async def do_rollback(self, snapshot: bytes, name: bytes | None) -> None:
        kept = self.model.snapshots.get(snapshot, {})
        wanted = kept if name is None else {name: kept[name]} if name in kept else None
        if snapshot not in self.model.snapshots or wanted is None:
            return
        now = {volume.identity: (one, volume) for one, volume in self.model.volumes.items()}
        if any(identity in self.model.in_place and identity not in now for identity, _ in wanted.values()):
            with pytest.raises((UnsupportedError, ExistsError)):
                await self.running.pool.clones.rollback(snapshot, None if name is None else [name])
            return
        if any(identity not in now and one in self.model.volumes for one, (identity, _) in wanted.items()):
            with pytest.raises(ExistsError):
                await self.running.pool.clones.rollback(snapshot, None if name is None else [name])
            return
        if name is not None and any(now[one][0] != name for one, _ in wanted.values() if one in now):
            with pytest.raises(NotFoundError):
                await self.running.pool.clones.rollback(snapshot, [name])
            return
        undo = (await self.running.pool.clones.rollback(snapshot, None if name is None else [name])).undo
        assert undo.name is not None
        self.keep(undo.name, {now[i][0]: now[i][1] for i, _ in wanted.values() if i in now})
        for one, (identity, data) in wanted.items():
            volume = now[identity][1] if identity in now else ModelVolume(identity=identity)
            volume.data = data.copy()
            volume.synced()
            if identity not in now:
                self.model.volumes[one] = volume

    async def do_flatten(self, name: bytes) -> None:
        if name in self.model.volumes:
            await self.running.pool.clones.flatten(name)
            if self.model.volumes[name].identity not in self.model.in_place:
                self.model.volumes[name].synced()

    async def do_reclaim(self) -> None:
        await self.running.pool.reclaimer.reclaim_all()

    async def do_seal(self) -> None:
        assert await self.running.pool.sealer.seal_all()

    async def do_pass_time(self) -> None:
        self.clock.jump(6)
        await trio.testing.wait_all_tasks_blocked()

    async def do_reopen(self) -> None:
        await self.running.stop()
        for volume in self.model.volumes.values():
            volume.synced()
        await self.start()

    async def do_crash(self, seed: int, keep: float) -> None:
        await self.running.crash(CrashPlan(seed, keep))
        self.world.check()
        await self.start()
        pool = self.running.pool
        assert set(pool.volumes.by_name) == set(self.model.volumes)
        for name, volume in self.model.volumes.items():
            volume.adopt(await volume_contents(pool, name))
        await self.verify()

    async def verify(self) -> None:
        pool = self.running.pool
        assert set(pool.volumes.by_name) == set(self.model.volumes)
        for name, volume in self.model.volumes.items():
            assert await volume_contents(pool, name) == volume.data
        assert set(pool.snapshots.by_name) == set(self.model.snapshots)
        for name, contents in self.model.snapshots.items():
            snapshot = pool.snapshots.get(name)
            members = await pool.snapshots.members(snapshot)
            assert set(members.by_name) == set(contents)
            for volume_name, (_, data) in contents.items():
                assert await snapshot_contents(pool, snapshot, volume_name) == data

    async def finish(self) -> None:
        await self.verify()
        await self.running.pool.reclaimer.reclaim_all()
        await self.verify()
        await everything_is_proven(self.running.pool)
        await self.verify()
        await self.running.stop()
        self.world.check_clean()


async def run_operations(ops: list[Operation], clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        runner = Runner(nursery, clock)
        await runner.start()
        for operation in ops:
            await runner.step(operation)
        await runner.finish()


beginnings = st.sampled_from(
    [
        [("create", b"a"), ("create", b"b")],
        [("create-special", b"a", "cow"), ("create", b"b")],
        [("create-special", b"a", "image-cow"), ("create-special", b"b", "image")],
    ]
)


def explore(seed: int, example_count: int, *, in_threads: bool) -> None:
    """Hold examples of a seed's against the model; with threads, or with stand-ins, which are three times as fast."""

    @hypothesis_seed(seed)
    @settings(max_examples=example_count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(beginnings, st.lists(operations, min_size=4, max_size=26))
    def agree(beginning: list[Operation], ops: list[Operation]) -> None:
        clock = trio.testing.MockClock()
        with contextlib.nullcontext() if in_threads else seeded(seed):
            trio.run(run_operations, [*beginning, *ops], clock, clock=clock)

    agree()
