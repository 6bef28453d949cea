"""The hooks of a pool, and having applications hold still with them while a snapshot is cut."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict

import trio

from .catalogaccess import CatalogAccess
from .errors import ExistsError, HookFailedError, NotFoundError, SnapfsError, StallError
from .events import EventLog
from .formats import CatalogBatch
from .hook import Hook

GUARD_FILE = os.path.join(os.path.dirname(__file__), "hookguard.py")
FREEZE_LIMIT_S = 60.0
GRACE_S = 0.25
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class HookTable:
    """The hooks of a pool, kept in its catalog."""

    def __init__(self, catalog: CatalogAccess, events: EventLog, rows: Sequence[tuple[str, str]]) -> None:
        self.mount_point = ""
        self._catalog = catalog
        self._events = events
        self._hooks: dict[str, Hook] = {}
        for name, rule in rows:
            try:
                self._hooks[name] = Hook.from_json(name, rule)
            except SnapfsError as error:
                self._events.note("hook-damaged", logging.ERROR, name=name, reason=str(error))

    def entries(self) -> list[dict[str, object]]:
        """All hooks, for lists."""
        return [asdict(hook) for _, hook in sorted(self._hooks.items())]

    async def add(self, hook: Hook) -> None:
        """Add a hook, durably. Raises ExistsError."""
        if hook.name in self._hooks:
            raise ExistsError(f"there is a hook {hook.name!r} already", "Remove it first")
        await self._catalog.save([], lambda: CatalogBatch(hooks=[(hook.name, hook.to_json())]))
        self._hooks[hook.name] = hook
        self._events.note("hook-added", name=hook.name)

    async def remove(self, name: str) -> None:
        """Remove a hook, durably. Raises NotFoundError."""
        if name not in self._hooks:
            raise NotFoundError(f"there is no hook {name!r}", "See snapfs hook list")
        await self._catalog.save([], lambda: CatalogBatch(dropped_hooks=[name]))
        del self._hooks[name]
        self._events.note("hook-removed", name=name)

    def concerning(self, volume_names: Iterable[str] | None) -> list[Hook]:
        """The hooks for a snapshot of these volumes, or of all (None), in the order of their names."""
        names = None if volume_names is None else set(volume_names)
        return [hook for _, hook in sorted(self._hooks.items()) if hook.concerns(names)]

    @asynccontextmanager
    async def frozen(
        self, hooks: Sequence[Hook], snapshot_name: str, max_stall_s: float | None
    ) -> AsyncIterator[Freeze]:
        """Applications hold still inside, until :meth:`Freeze.thaw_now` or the end of the block.

        They are thawed whatever happens, also when this process is killed. Raises HookFailedError when one
        could not be frozen; then all are thawed already.
        """
        freeze = Freeze(hooks, self._environment(snapshot_name), max_stall_s, self._events)
        if not hooks:
            yield freeze
            return
        try:
            await freeze.begin()
            yield freeze
        finally:
            with trio.CancelScope(shield=True):
                await freeze.end()

    def _environment(self, snapshot_name: str) -> dict[str, str]:
        return {
            "PATH": _PATH,
            "LANG": "C.UTF-8",
            "SNAPFS_MOUNT": self.mount_point,
            "SNAPFS_SNAPSHOT": snapshot_name.encode("utf-8", "surrogateescape").decode(errors="replace"),
        }


class Freeze:
    """Applications that hold still for one snapshot. Their guard is a process that outlives this one.

    ``frozen_ns`` is for how long they did, once they no longer do; ``failures`` is what went wrong with thawing.
    """

    def __init__(
        self, hooks: Sequence[Hook], environment: dict[str, str], max_stall_s: float | None, events: EventLog
    ) -> None:
        self.frozen_ns = 0
        self.failures: list[str] = []
        self.is_active = bool(hooks)
        self._hooks = hooks
        self._environment = environment
        self._max_stall_s = max_stall_s
        self._events = events
        self._guard: trio.Process | None = None
        self._told = bytearray()
        self._until = float("inf")
        self._is_over = not hooks

    @property
    def _limit_s(self) -> float:
        return FREEZE_LIMIT_S if self._max_stall_s is None else self._max_stall_s

    async def begin(self) -> None:
        """Freeze. Raises HookFailedError."""
        self._guard = await self._start(only_thaw=False)
        # From before the plan is sent: the guard begins no earlier.
        self._until = time.monotonic() + self._limit_s
        await self._send_plan(self._guard, only_thaw=False)
        answer = await self._answer(self._guard)
        failure = "the process that runs the hooks ended" if answer is None else str(answer["failure"])
        if failure:
            await self.end()
            raise HookFailedError(failure, "No snapshot was made. Mend the hook, remove it, or go without: hooks=no")

    async def _start(self, *, only_thaw: bool) -> trio.Process:
        return await trio.lowlevel.open_process(
            [sys.executable, "-I", "-S", GUARD_FILE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    async def _send_plan(self, guard: trio.Process, *, only_thaw: bool) -> None:
        plan = {
            "hooks": [hook.plan() for hook in self._hooks],
            "environment": self._environment,
            "freeze_limit_s": self._limit_s,
            "grace_s": GRACE_S,
            "only_thaw": only_thaw,
        }
        assert guard.stdin is not None
        # One that has ended already tells nothing, which is seen by whoever waits for its answer.
        with contextlib.suppress(trio.BrokenResourceError):
            await guard.stdin.send_all(json.dumps(plan).encode() + b"\n")

    async def _answer(self, guard: trio.Process) -> dict[str, object] | None:
        """The guard's next line; None when it has ended."""
        assert guard.stdout is not None
        while b"\n" not in self._told:
            part = await guard.stdout.receive_some(65536)
            if not part:
                return None
            self._told += part
        line, _, rest = bytes(self._told).partition(b"\n")
        self._told[:] = rest
        found: dict[str, object] = json.loads(line)
        return found

    def check_now(self) -> None:
        """Right before the cut: raises StallError when applications have held still for too long, or no longer do."""
        if self.is_active and time.monotonic() > self._until:
            raise StallError(
                f"applications were to hold still for {self._limit_s:g} s at most; the snapshot was not cut by then",
                "No snapshot was made. Try again, or allow more with max-stall",
            )

    def thaw_now(self) -> None:
        """Right after the cut: have applications go on, without waiting for it. Raises StallError."""
        if self.is_active and time.monotonic() > self._until + GRACE_S:
            # This process was stopped in between, and the guard has thawed them by itself.
            raise StallError("applications no longer held still when the snapshot was cut", "Try again")
        if self._guard is not None and self._guard.stdin is not None and not self._is_over:
            try:
                os.write(self._guard.stdin.fileno(), b"t")  # type: ignore[attr-defined]
            except OSError:
                # The guard has ended; end() sees to it.
                return

    async def end(self) -> None:
        """Wait until applications go on again. Does nothing the second time."""
        if self._is_over or self._guard is None:
            return
        self._is_over = True
        guard = self._guard
        assert guard.stdin is not None
        await guard.stdin.aclose()
        answer = await self._answer(guard)
        if answer is not None and "failure" in answer:
            # Cancelled while it froze: what follows is what it did.
            answer = await self._answer(guard)
        await guard.wait()
        if answer is None:
            # Somebody killed it. What it froze is thawed by another.
            answer = await self._thaw_alone()
        self.frozen_ns = int(str(answer.get("frozen_ns", 0)))
        failures = answer.get("failures", [])
        assert isinstance(failures, list)
        self.failures = [str(one) for one in failures]
        for one in self.failures:
            self._events.note("hook-failed", logging.ERROR, reason=one)

    async def _thaw_alone(self) -> dict[str, object]:
        self._told.clear()
        guard = await self._start(only_thaw=True)
        await self._send_plan(guard, only_thaw=True)
        await self._answer(guard)
        answer = await self._answer(guard)
        await guard.wait()
        return answer or {"failures": ["the process that runs the hooks ended twice"]}
