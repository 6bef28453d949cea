"""A device that hangs: what does not need it goes on, and status tells what waits and for how long."""

from __future__ import annotations

import threading
import time
from typing import Any

import trio

from snapfs.backends import FaultyDevice, MemoryDevice
from snapfs.status import pool_status, processor_status

from .harness import Running, World, read_snapshot, read_volume

BLOCK = 4096


class Hanging:
    """A hook that has syncs of change logs wait, once it is on."""

    def __init__(self) -> None:
        self.is_on = False
        self.go_on = threading.Event()
        self.begun = threading.Event()

    def __call__(self, kind: str, name: str) -> None:
        if self.is_on and kind == "sync" and name.startswith("logs/"):
            self.begun.set()
            self.go_on.wait()


async def test_a_sync_that_hangs_holds_up_neither_status_nor_reads() -> None:
    world = World(processor_count=2)
    hook = Hanging()
    memory = world.devices["0"]
    assert isinstance(memory, MemoryDevice)
    world.devices = {"0": FaultyDevice(memory, hook)}
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        pool = running.pool
        for name in (b"a", b"b"):
            await pool.volumes.create(name)
            async with pool.volumes.opened(name) as volume:
                await volume.write(0, name * BLOCK)
        snapshot = await pool.snapshots.create(b"s")
        hook.is_on = True
        ended = trio.Event()

        async def sync() -> None:
            async with pool.volumes.opened(b"a") as volume:
                await volume.write(0, b"A")
                await volume.sync()
            ended.set()

        nursery.start_soon(sync)
        await trio.to_thread.run_sync(hook.begun.wait)
        try:
            with trio.fail_after(30):
                status: dict[str, Any] = await pool_status(pool)
                assert status["health"] == "ok" and status["stuck_calls"] == []
                # A minute passes.
                pool.pending.now_s = lambda: time.monotonic() + 60
                # Calls of the background that were under way then seem old as well, until they end.
                while len((status := await pool_status(pool))["stuck_calls"]) > 1:  # type: ignore[arg-type]
                    await trio.lowlevel.checkpoint()
                (call,) = status["stuck_calls"]
                assert status["health"] == "stuck"
                assert (call["where"], call["what"]) == ("processor 0", "sync data") and 60 <= call["age_s"] < 90
                assert (await processor_status(pool.processors[0]))["is_stuck"]
                assert not (await processor_status(pool.processors[1]))["is_stuck"]
                assert await read_volume(pool, b"b") == b"b" * BLOCK
                assert await read_snapshot(pool, snapshot, b"a") == b"a" * BLOCK
                async with pool.volumes.opened(b"b") as volume:
                    await volume.write(10, b"B")
                assert not ended.is_set()
        finally:
            hook.go_on.set()
        await ended.wait()
        assert (await pool_status(pool))["health"] == "ok"
        assert b'"event": "was-stuck", "where": "processor 0"' in pool.events.contents
        world.devices = {"0": memory}
        await running.stop()
