"""Calls to devices that fail, once or until the cause is gone, or take long; ``contrib/soak faults`` has each do so."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from snapfs.backends import CrashPlan, DirectoryDevice, FailNth, FaultyDevice, MemoryDevice
from snapfs.database import Database, Row
from snapfs.errors import SyncFailedError, UnreadableError

from .faults import CODES, OFTEN_KINDS, RARE_KINDS, TIMES, Faults, Switch, countdown, countdown_of_delays
from .harness import Running, World

STEP = 31


@pytest.fixture(scope="module")
def faults() -> Faults:
    return Faults()


@pytest.mark.parametrize("kind", RARE_KINDS)
def test_each_rare_call_fails_once(faults: Faults, kind: str) -> None:
    assert countdown(faults, kind, errno.EIO, 1) > 1


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("kind", OFTEN_KINDS)
def test_some_calls_of_each_kind_fail(faults: Faults, kind: str, code: int, times: int) -> None:
    step = STEP if kind == "write" else 9
    first = 1 + (OFTEN_KINDS.index(kind) + 5 * CODES.index(code) + 11 * TIMES.index(times)) % step
    assert countdown(faults, kind, code, times, first=first, step=step) > 3


@pytest.mark.parametrize("kind", ["write", "sync", "read", "sync_names", "try_read"])
def test_calls_that_take_ten_seconds_only_hold_things_up(faults: Faults, kind: str) -> None:
    assert countdown_of_delays(faults, kind, step=STEP if kind == "write" else 4) > 1


# -- a commit that failed --------------------------------------------------------------------


def crashed_database(kind: str, nth: int, keep: float) -> list[Row]:
    """Rows are inserted with a fault each, power is lost with what was written last there; the rows found."""
    memory = MemoryDevice()
    device = FaultyDevice(memory)
    database = Database(device, "x.sqlite", "x", create_schemas=["CREATE TABLE t (n)"])
    # Twice, for what takes the commit's place is then what is there already.
    for number in range(2):
        device.hook = FailNth(kind, nth, errno.EIO, only="wal")
        with pytest.raises(UnreadableError), database.transaction():
            database.execute("INSERT INTO t VALUES (?)", (number,))
        assert database.is_settled
    after = memory.crash(CrashPlan(1, keep, 0.0, newest=True))
    database.abandon()
    again = Database(after, "x.sqlite", "x")
    rows = again.rows("SELECT * FROM t")
    again.close()
    return rows


@pytest.mark.parametrize(("kind", "nth"), [("write", 1), ("write", 2), ("sync", 1)])
@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_a_commit_that_failed_is_not_found_after_a_power_cut(kind: str, nth: int, keep: float) -> None:
    assert crashed_database(kind, nth, keep) == []


def test_while_that_is_not_sure_nothing_else_is_committed() -> None:
    device = FaultyDevice(MemoryDevice(), switch := Switch(FailNth("sync", 1, errno.EIO, times=3), is_on=False))
    database = Database(device, "x.sqlite", "x", create_schemas=["CREATE TABLE t (n)"])
    switch.is_on = True
    for _ in range(2):
        with pytest.raises(UnreadableError), database.transaction():
            database.execute("INSERT INTO t VALUES (1)")
        assert not database.is_settled
    with database.transaction():
        database.execute("INSERT INTO t VALUES (2)")
    assert database.is_settled and database.rows("SELECT * FROM t") == [(2,)]
    database.close()


# -- calls of the system that do less than they were asked to ---------------------------------


def short(call: Callable[..., int]) -> Callable[..., int]:
    """The same call, of at most 700 bytes at a time."""

    def less(fd: int, data: bytes, offset: int) -> int:
        return call(fd, memoryview(data)[:700], offset)

    return less


def test_short_writes_and_reads_of_the_system_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(10_000)
    device = DirectoryDevice(tmp_path)
    file = device.create("f")
    preadv = os.preadv
    monkeypatch.setattr(os, "pwrite", short(os.pwrite))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset, *flags: preadv(fd, [buffers[0][:700]], offset))
    file.write(data, 5)
    file.write_new(data, 20_000)
    for offset in (5, 20_000):
        buffer = bytearray(len(data))
        assert file.read_into(memoryview(buffer), offset) == len(data)
        assert bytes(buffer) == data
    file.close()
    device.close()


async def test_after_a_sync_that_failed_within_a_snapshot_no_processor_takes_writes() -> None:
    switch = Switch(FailNth("sync", 1, errno.EIO, only="logs/0/"), is_on=False)
    world = World(processor_count=2)
    world.devices = {where: FaultyDevice(device, switch) for where, device in world.devices.items()}
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        volume = await running.pool.volumes.create(b"v")
        async with running.pool.volumes.opened(b"v"):
            for object_index in range(2):
                await volume.write(object_index << 22, b"a" * 4096)
            await volume.sync()
            await volume.write(0, b"b" * 4096)
            switch.is_on = True
            with pytest.raises(SyncFailedError):
                await running.pool.snapshots.create(b"s")
            switch.is_on = False
            for object_index in range(2):
                with pytest.raises(SyncFailedError):
                    await volume.write(object_index << 22, b"c" * 4096)
        world.devices = {where: device.inner for where, device in world.devices.items()}  # type: ignore[attr-defined]
        await running.crash(CrashPlan(1, 0.0, 0.0))
        nursery.cancel_scope.cancel()
