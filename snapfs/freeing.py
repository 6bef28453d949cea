"""Change log volumes whose user said so: nearly full, they have the oldest snapshots deleted.

Never one that a tag holds, and only those that hold something in change logs there that comes free with them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import trio

from .changelogvolumes import FULL_PERCENT, ChangeLogVolumes
from .errors import NotFoundError, SnapfsError
from .events import EventLog
from .geometry import BLOCK_SHIFT
from .placement import Placement, Quota
from .reclaimer import Reclaimer
from .reserve import Reserve
from .snapshot import Snapshot
from .snapshots import SnapshotTable
from .space import SpaceAccount
from .tasks import in_thread
from .units import show_name

RETRY_S = 5.0
# Between two looks at one that stays nearly full there is so many times as long as one takes, within these bounds.
_REST_FACTOR = 20
_REST_S_MIN, _REST_S_MAX = 1.0, 60.0
_NOTHING_TO_FREE = "no snapshot that may be deleted holds anything there alone"
_NOTHING_FREED = "what was deleted gave nothing back there"


class OldestFreer:
    """The pool's task for this."""

    def __init__(
        self,
        changelogs: ChangeLogVolumes,
        placement: Placement,
        snapshots: SnapshotTable,
        reclaimer: Reclaimer,
        reserve: Reserve,
        events: EventLog,
    ) -> None:
        self._changelogs = changelogs
        self._placement = placement
        self._snapshots = snapshots
        self._reclaimer = reclaimer
        self._reserve = reserve
        self._events = events
        # By change log volume that stays nearly full: when to look again, why as it was told, and who is waited for.
        self._due_s: dict[int, float] = {}
        self._told: dict[int, set[str]] = {}
        self._read: dict[int, Snapshot] = {}
        self._look_s = 0.0
        self._looked_s = 0.0

    async def run(self) -> None:
        """Free whenever a change log volume gets full; until cancelled."""
        while True:
            with trio.move_on_at(min(self._due_s.values(), default=math.inf)) as rest:
                await self._changelogs.nearly_full.wait()
            if not rest.cancelled_caught:
                # One has become full, or nearly so once more: much may be other than when it was looked at.
                self._due_s = {one: min(due_s, self._looked_s + _REST_S_MIN) for one, due_s in self._due_s.items()}
            self._due_s = {one: due_s for one, due_s in self._due_s.items() if one in self._placement.quotas}
            for changelog_id, quota in list(self._placement.quotas.items()):
                if self._due_s.get(changelog_id, 0.0) <= trio.current_time():
                    await self._look_at(changelog_id, quota)
                    self._looked_s = trio.current_time()

    async def _look_at(self, changelog_id: int, quota: Quota) -> None:
        """Free what is needed; tell once what keeps it from that, and look again later."""
        self._due_s.pop(changelog_id, None)
        self._look_s = 0.0
        try:
            hindrance = await self._free(changelog_id, quota)
        except (SnapfsError, OSError) as error:
            self._events.note("freeing-failed", logging.WARNING, name=quota.name, reason=str(error))
            self._due_s[changelog_id] = trio.current_time() + RETRY_S
            return
        if not hindrance:
            self._told.pop(changelog_id, None)
            return
        told = self._told.setdefault(changelog_id, set())
        if hindrance not in told:
            self._events.note("freeing-stopped", logging.WARNING, name=quota.name, reason=hindrance)
            told.add(hindrance)
        rest_s = min(_REST_S_MAX, max(_REST_S_MIN, _REST_FACTOR * self._look_s))
        self._due_s[changelog_id] = trio.current_time() + rest_s

    async def _free(self, changelog_id: int, quota: Quota) -> str:
        """Delete the oldest snapshots until there is room; what keeps it from that, in words, or nothing."""
        while _is_short(quota):
            read = self._read.pop(changelog_id, None)
            if read is not None and read.opens and not read.hold_tags:
                self._read[changelog_id] = read
                return _is_read(read)
            began = trio.current_time()
            # What is on its way back already is no reason to delete anything.
            failure = await self._reclaim()
            freed_blocks = quota.freed_blocks
            on_their_way = set(self._snapshots.deleted)
            chosen = await self._chosen(changelog_id, quota)
            self._look_s = trio.current_time() - began
            if not chosen and _is_short(quota):
                if not on_their_way.issuperset(self._snapshots.deleted):
                    # A user deleted one meanwhile.
                    continue
                return _hindrance(failure, _NOTHING_TO_FREE)
            for snapshot in chosen:
                if snapshot.opens:
                    # Deleted or not, it gives nothing back before it is closed; no newer one goes in its place.
                    self._read[changelog_id] = snapshot
                    return _is_read(snapshot)
                if _is_short(quota):
                    failure = await self._delete(snapshot, quota) or failure
            if quota.freed_blocks == freed_blocks and _is_short(quota):
                # What is used tells nothing: who writes meanwhile may take as much as comes back.
                return _hindrance(failure, _NOTHING_FREED)
        return ""

    async def _chosen(self, changelog_id: int, quota: Quota) -> Sequence[Snapshot]:
        """The oldest snapshots that must go for room; none if there is room, or none would make any."""
        needed_blocks = quota.used_blocks - _used_blocks_max(quota)
        if needed_blocks <= 0:
            return ()
        accounts: list[SpaceAccount] = []

        async def look() -> None:
            device_ids = self._placement.devices_of(changelog_id)
            accounts.append(await self._snapshots.account(device_ids, list(self._snapshots.deleted.values())))

        await self._reserve.helped(look)
        # Of what is deleted only that which is read: it is waited for.
        read = [one for one in self._snapshots.deleted.values() if one.opens]
        allowed = {int(one.instant): one for one in [*self._snapshots.by_id.values(), *read] if not one.hold_tags}
        instants = await in_thread(accounts[-1].first_needed, list(allowed), needed_blocks)
        return [allowed[one] for one in instants]

    async def _delete(self, snapshot: Snapshot, quota: Quota) -> SnapfsError | OSError | None:
        """Delete a snapshot, if nobody else was first; what failed of freeing it."""
        try:
            await self._snapshots.delete_this(snapshot)
        except NotFoundError:
            return await self._reclaim()
        name = snapshot.name or b""
        self._events.note("snapshot-freed", logging.WARNING, name=show_name(name), change_log_volume=quota.name)
        return await self._reclaim()

    async def _reclaim(self) -> SnapfsError | OSError | None:
        """Free what is deleted; what failed of that, which may be for want of the very room that is looked for."""
        try:
            await self._reclaimer.reclaim_all()
        except (SnapfsError, OSError) as error:
            return error
        return None


def _hindrance(failure: SnapfsError | OSError | None, otherwise: str) -> str:
    if failure is not None:
        raise failure
    return otherwise


def _is_short(quota: Quota) -> bool:
    return bool(quota.row.frees_oldest) and quota.percent >= FULL_PERCENT


def _used_blocks_max(quota: Quota) -> int:
    """With so many blocks it is not nearly full."""
    return max(0, (FULL_PERCENT * quota.row.capacity_bytes - 1) // (100 << BLOCK_SHIFT))


def _is_read(snapshot: Snapshot) -> str:
    return f"snapshot {show_name(snapshot.name or b'')!r}, the oldest to be deleted, is open"
