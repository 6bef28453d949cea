"""The hooks of a pool, and having applications hold still with them while a snapshot is cut."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict

import trio

from .catalogaccess import CatalogAccess
from .errors import ExistsError, HookFailedError, InsideHookError, NotFoundError, SnapfsError
from .events import EventLog
from .formats import CatalogBatch
from .freeze import PATH, Freeze
from .hook import Hook

_ANCESTORS_MAX = 64


class HookTable:
    """The hooks of a pool, kept in its catalog.

    ``lock_path`` is a file of the daemon's user alone, by which the processes that run hooks keep each other out; None
    where there is none.
    """

    def __init__(
        self,
        catalog: CatalogAccess,
        events: EventLog,
        lock_path: str | None,
        rows: Sequence[tuple[bytes, bytes]],
    ) -> None:
        self.mount_point = ""
        self._catalog = catalog
        self._events = events
        self._lock_path = lock_path
        self._hooks: dict[str, Hook] = {}
        self._damaged: dict[str, bytes] = {}
        self._guard_pids: set[int] = set()
        for stored_name, rule in rows:
            name = stored_name.decode(errors="replace")
            try:
                self._hooks[name] = Hook.from_json(name, rule)
            except SnapfsError as error:
                self._damaged[name] = stored_name
                self._events.note("hook-damaged", logging.ERROR, name=name, reason=str(error))

    def entries(self) -> list[dict[str, object]]:
        """All hooks, for lists."""
        found: list[dict[str, object]] = [{**asdict(hook), "is_damaged": False} for hook in self._hooks.values()]
        found += [{"name": name, "is_damaged": True} for name in self._damaged]
        return sorted(found, key=lambda one: str(one["name"]))

    async def add(self, hook: Hook) -> None:
        """Add a hook, durably. Raises ExistsError."""
        if hook.name in self._hooks or hook.name in self._damaged:
            raise ExistsError(f"there is a hook {hook.name!r} already", "Remove it first")
        await self._catalog.save([], lambda: CatalogBatch(hooks=[(hook.name, hook.to_json())]))
        self._hooks[hook.name] = hook
        self._events.note("hook-added", name=hook.name)

    async def remove(self, name: str) -> None:
        """Remove a hook, durably. Raises NotFoundError."""
        if name not in self._hooks and name not in self._damaged:
            raise NotFoundError(f"there is no hook {name!r}", "See snapfs hook list")
        stored_name = self._damaged.get(name, name.encode())
        await self._catalog.save([], lambda: CatalogBatch(dropped_hooks=[stored_name]))
        self._hooks.pop(name, None)
        self._damaged.pop(name, None)
        self._events.note("hook-removed", name=name)

    def concerning(self, volume_names: Iterable[str] | None) -> list[Hook]:
        """The hooks for a snapshot of these volumes, or of all (None), in the order of their names.

        Raises HookFailedError when there is one that cannot be read: it may concern them.
        """
        if self._damaged:
            raise HookFailedError(
                f"hook {min(self._damaged)!r} is damaged, and so cannot be run",
                "No snapshot was made. Remove the hook and add it again, or go without: --no-hooks (hooks=no)",
            )
        names = None if volume_names is None else set(volume_names)
        return [hook for _, hook in sorted(self._hooks.items()) if hook.concerns(names)]

    def refuse_inside(self, pid: int) -> None:
        """Raises InsideHookError when a process is one that a hook runs: its snapshot waits for it to end."""
        if not self._guard_pids:
            return
        for _ in range(_ANCESTORS_MAX):
            if pid in self._guard_pids:
                raise InsideHookError(
                    "a hook gives no commands and makes no snapshots: the one that runs it waits for it", "Leave it out"
                )
            pid = _parent_of(pid)
            if pid <= 1:
                return

    @asynccontextmanager
    async def frozen(
        self, hooks: Sequence[Hook], snapshot_name: str, max_stall_s: float | None
    ) -> AsyncIterator[Freeze]:
        """Applications hold still inside, until :meth:`Freeze.thaw_now` or the end of the block.

        They are thawed whatever happens, also when this process is killed. Raises HookFailedError when one
        could not be frozen; then all are thawed already.
        """
        freeze = Freeze(
            hooks,
            self._environment(snapshot_name),
            self._lock_path,
            max_stall_s,
            self._events,
            self._guard_pids,
        )
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
            "PATH": PATH,
            "LANG": "C.UTF-8",
            "SNAPFS_MOUNT": self.mount_point,
            "SNAPFS_SNAPSHOT": snapshot_name.encode("utf-8", "surrogateescape").decode(errors="replace"),
        }


def _parent_of(pid: int) -> int:
    """The number of a process's parent; 0 when it is not there."""
    with suppress(OSError, ValueError), open(f"/proc/{pid}/stat", "rb") as file:
        # The name before it may have anything in it, but for the last parenthesis.
        return int(file.read().rpartition(b")")[2].split()[1])
    return 0
