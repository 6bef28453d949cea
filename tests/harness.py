"""A pool on devices in memory that can lose power, with the verifier run whenever it is closed."""

from __future__ import annotations

import errno
import itertools
import os
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

import pytest
import trio
import trio._core._run as trio_run

from snapfs.backends import CrashPlan, Device, DeviceFile, MemoryDevice
from snapfs.check import Report, check_pool
from snapfs.pool import Pool, create_pool
from snapfs.scrub import scrub, verify
from snapfs.snapshot import Snapshot
from snapfs.threads import Threads

from .conftest import MEMORY
from .contents import Contents, contents_of

WHERE = "memory"
# By how much the order of a seed may have what a thread does begin later than it could.
THREAD_STEPS_MAX = 3


class World:
    """The devices of one pool: its home, and where its data lies."""

    home: Device
    outside: Device
    devices: dict[str, Device]

    def __init__(
        self,
        processor_count: int = 4,
        device_count: int = 1,
        capacity_bytes: int | None = None,
        make_device: Callable[[str, int | None], Device] | None = None,
    ) -> None:
        make = make_device or (lambda where, capacity_bytes: MemoryDevice(capacity_bytes))
        self.home = make("home", None)
        self.outside = make("outside", None)
        self.devices = {str(number): make(str(number), capacity_bytes) for number in range(device_count)}
        create_pool(self.home, dict(self.devices), processor_count)
        for device in self.devices.values():
            device.sync_names("")

    @classmethod
    def found(cls, devices: Mapping[str, MemoryDevice]) -> World:
        """That of which these devices are left."""
        world = cls.__new__(cls)
        world.devices = dict(devices)
        world.home, world.outside = (world.devices.pop(where) for where in ("home", "outside"))
        return world

    def all_devices(self) -> dict[str, Device]:
        """All of them, by where they are."""
        return {"home": self.home, "outside": self.outside, **self.devices}

    def open_device(self, path: str) -> Device:
        if path not in self.devices:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return self.devices[path]

    def open_image(self, path: str, writable: bool) -> DeviceFile:
        return self.outside.open(path.lstrip("/"))

    def has_image(self, path: str) -> bool:
        return path.lstrip("/") in self.outside.names("")

    def make_image(self, path: str, contents: bytes) -> None:
        """An image outside of the pool, durable."""
        file = self.outside.create(path.lstrip("/"))
        file.write(contents, 0)
        file.sync()
        file.close()
        self.outside.sync_names("")

    def lose_power(self, plan: CrashPlan) -> None:
        """What was not synced may be gone."""
        assert isinstance(self.home, MemoryDevice) and isinstance(self.outside, MemoryDevice)
        self.home = self.home.crash(plan)
        self.outside = self.outside.crash(CrashPlan(plan.seed + 2, plan.keep, plan.torn))
        self.devices = {
            path: device.crash(CrashPlan(plan.seed + 1, plan.keep, plan.torn))
            for path, device in self.devices.items()
            if isinstance(device, MemoryDevice)
        }

    def check(self) -> Report:
        """The verifier's report; fails on damage."""
        with pytest.MonkeyPatch.context() as patch:
            # The verifier's copies of databases, thousands of times.
            patch.setattr(tempfile, "tempdir", MEMORY)
            report = check_pool(self.home, WHERE, self.open_device, self.has_image)
        self.home.close()
        assert not report.is_damaged, report.findings
        return report

    def check_clean(self) -> None:
        """The verifier finds neither damage nor leaked space."""
        report = self.check()
        assert report.is_clean, [finding for finding in report.findings if finding.severity != "note"]


def in_memory(device: Device) -> MemoryDevice:
    """A device of a world's own making, to fill it or to have it lose power."""
    assert isinstance(device, MemoryDevice)
    return device


class Running:
    """An open pool and its tasks, that can be closed, or left as by a crash."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.pool: Pool

    async def start(self, nursery: trio.Nursery) -> None:
        self.pool = Pool.open(self.world.home, WHERE, self.world.open_device, "test", self.world.open_image)
        await self.pool.recover()
        self._ended = trio.Event()
        self._scope: trio.CancelScope = await nursery.start(self._run)

    async def _run(self, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        try:
            with trio.CancelScope() as scope:
                task_status.started(scope)
                await self.pool.run()
        finally:
            self._ended.set()

    async def close(self) -> None:
        """Close the pool, without a look at what is left."""
        self._scope.cancel()
        await self._ended.wait()
        await self.pool.close()
        self.world.home.close()

    async def stop(self) -> None:
        """Close the pool, and verify it."""
        await self.close()
        self.world.check()

    async def crash(self, plan: CrashPlan) -> None:
        """Lose power now; what the old tasks still do goes nowhere."""
        self.world.lose_power(plan)
        self._scope.cancel()
        await self._ended.wait()
        for processor in self.pool.processors:
            processor.access.store.database.abandon()
        self.pool.catalog.catalog.database.abandon()


@asynccontextmanager
async def open_world(world: World) -> AsyncIterator[Pool]:
    """An open pool with its tasks; closed and verified at the end."""
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        yield running.pool
        await running.stop()


@asynccontextmanager
async def open_until_power_is_lost(world: World) -> AsyncIterator[Pool]:
    """An open pool with its tasks, which at the end loses power, and all that was not synced."""
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        yield running.pool
        await running.crash(CrashPlan(1, 0.0, 0.0))
        nursery.cancel_scope.cancel()


async def read_snapshot(pool: Pool, snapshot: Snapshot, name: bytes) -> bytes:
    """A volume's contents in a snapshot."""
    members = await pool.snapshots.members(snapshot)
    volume_id, _ = members.get(name)
    volume = await pool.snapshots.open_volume(snapshot, volume_id)
    try:
        return bytes(await volume.read(0, volume.size_bytes))
    finally:
        pool.snapshots.close_volume(volume)


async def read_volume(pool: Pool, name: bytes) -> bytes:
    """A volume's contents."""
    async with pool.volumes.opened(name) as volume:
        return bytes(await volume.read(0, volume.size_bytes))


async def snapshot_contents(pool: Pool, snapshot: Snapshot, name: bytes) -> Contents:
    """A volume's contents in a snapshot, piece by piece."""
    members = await pool.snapshots.members(snapshot)
    volume_id, _ = members.get(name)
    volume = await pool.snapshots.open_volume(snapshot, volume_id)
    try:
        return await contents_of(volume.read, volume.size_bytes)
    finally:
        pool.snapshots.close_volume(volume)


async def volume_contents(pool: Pool, name: bytes) -> Contents:
    """A volume's contents, piece by piece."""
    async with pool.volumes.opened(name) as volume:
        return await contents_of(volume.read, volume.size_bytes)


async def everything_is_proven(pool: Pool) -> None:
    """All snapshots are sealed and hold what they were sealed with, and their roots do not depend on the way."""
    assert await pool.sealer.seal_all()
    report = await scrub(pool)
    assert not report.damaged and not report.unreadable_logs
    for snapshot in list(pool.snapshots.by_name.values()):
        found = await verify(pool, snapshot)
        assert found.is_proven, (snapshot.name, found)


@contextmanager
def seeded(seed: int, thread_steps_max: int = THREAD_STEPS_MAX) -> Iterator[None]:
    """Whatever runs in trio inside runs in an order of the seed's, and in that order again when it is tried again."""
    with pytest.MonkeyPatch.context() as patch, without_threads(seed, thread_steps_max=thread_steps_max):
        patch.setattr(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
        patch.setattr(trio_run, "_r", random.Random(seed))
        # What rests for as long as it has worked rests for as long again.
        steps_ns = itertools.count(0, 100_000)
        patch.setattr(time, "perf_counter_ns", lambda: next(steps_ns))
        patch.setattr(time, "perf_counter", lambda: next(steps_ns) / 1e9)
        yield


@contextmanager
def without_threads(
    seed: int,
    after_each: Callable[[], Awaitable[None]] | None = None,
    *,
    thread_steps_max: int = THREAD_STEPS_MAX,
) -> Iterator[None]:
    """The work of threads is done in the scheduler, some steps later, as a seed decides.

    ``after_each`` is awaited behind each call, before it returns to who made it.
    """
    rng = random.Random(f"{seed} threads")

    async def run_sync(call: Callable[..., object], *args: object, **options: object) -> object:
        await trio.lowlevel.checkpoint_if_cancelled()
        with trio.CancelScope(shield=True):
            for _ in range(rng.randrange(thread_steps_max + 1)):
                await trio.lowlevel.checkpoint()
            try:
                answer = call(*args)
            finally:
                for _ in range(rng.randrange(thread_steps_max)):
                    await trio.lowlevel.checkpoint()
                if after_each is not None:
                    await after_each()
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trio.to_thread, "run_sync", run_sync)
        patch.setattr(Threads, "run", lambda _, call, *args: run_sync(call, *args))
        yield


def damage_blocks(world: World, marker: bytes, *, by: bytes = b"damaged!", shift: int = 0) -> int:
    """Overwrite the first place of every log that holds these bytes, behind everybody's back; how many."""
    count = 0
    for device in world.devices.values():
        for index in range(4):
            for name in device.names(f"logs/{index}"):
                file = device.open(f"logs/{index}/{name}")
                for start, end in file.data_extents():
                    contents = bytearray(end - start)
                    file.read_into(contents, start)
                    at = contents.find(marker)
                    if at >= 0:
                        file.write(by, start + at + shift)
                        count += 1
                        break
                file.close()
    return count
