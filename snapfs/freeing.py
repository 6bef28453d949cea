"""Change log volumes whose user said so: nearly full, they have the oldest snapshots deleted.

Never one that a tag holds, and only those that hold a volume whose change logs lie there.
"""

from __future__ import annotations

import logging

import trio

from .changelogvolumes import FULL_PERCENT, ChangeLogVolumes
from .errors import SnapfsError
from .events import EventLog
from .placement import Placement, Quota
from .reclaimer import Reclaimer
from .snapshot import Snapshot
from .snapshots import SnapshotTable
from .units import show_name

RETRY_S = 5.0


class OldestFreer:
    """The pool's task for this."""

    def __init__(
        self,
        changelogs: ChangeLogVolumes,
        placement: Placement,
        snapshots: SnapshotTable,
        reclaimer: Reclaimer,
        events: EventLog,
    ) -> None:
        self._changelogs = changelogs
        self._placement = placement
        self._snapshots = snapshots
        self._reclaimer = reclaimer
        self._events = events

    async def run(self) -> None:
        """Free whenever a change log volume gets full; until cancelled."""
        while True:
            await self._changelogs.nearly_full.wait()
            for quota in list(self._placement.quotas.values()):
                try:
                    await self._free(quota)
                except (SnapfsError, OSError) as error:
                    self._events.note("freeing-failed", logging.WARNING, name=quota.name, reason=str(error))
                    await trio.sleep(RETRY_S)
                    self._changelogs.nearly_full.set()

    async def _free(self, quota: Quota) -> None:
        while quota.row.frees_oldest and quota.percent >= FULL_PERCENT:
            snapshot = await self._oldest(quota.row.changelog_id)
            if snapshot is None or snapshot.name is None:
                return
            name = snapshot.name
            await self._snapshots.delete(name)
            self._events.note("snapshot-freed", logging.WARNING, name=show_name(name), change_log_volume=quota.name)
            await self._reclaimer.reclaim_all()

    async def _oldest(self, changelog_id: int) -> Snapshot | None:
        """The oldest snapshot that nothing holds, and that holds a volume which logs there."""
        for snapshot in sorted(self._snapshots.by_id.values(), key=lambda one: one.instant):
            if snapshot.hold_tags:
                continue
            members = await self._snapshots.members(snapshot)
            if any(self._snapshots.changelog_of(volume_id) == changelog_id for volume_id in members.by_id):
                return snapshot
        return None
