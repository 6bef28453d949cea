"""The pool's task that gives back what deleted snapshots and removed volumes held."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import trio

from . import reclaim
from .catalogaccess import CatalogAccess
from .errors import SnapfsError
from .events import EventLog
from .formats import CatalogBatch, VolumeTraits
from .geometry import Epoch, SnapshotId, VolumeId
from .processor import Processor
from .reserve import Reserve
from .snapshot import Snapshot
from .snapshotindex import NEVER, SnapshotIndex
from .snapshots import SnapshotTable
from .tasks import Wakeup, side_by_side
from .volumes import VolumeTable

RETRY_S = 5.0


class Reclaimer:
    """Works through what is to be freed, one thing at a time. It may be stopped at any await."""

    def __init__(
        self,
        catalog: CatalogAccess,
        volumes: VolumeTable,
        snapshots: SnapshotTable,
        index: SnapshotIndex,
        processors: Sequence[Processor],
        reserve: Reserve,
        events: EventLog,
        wakeup: Wakeup,
    ) -> None:
        self._catalog = catalog
        self._volumes = volumes
        self._snapshots = snapshots
        self._index = index
        self._processors = processors
        self._reserve = reserve
        self._events = events
        self._wakeup = wakeup
        self._traits = volumes.traits
        self._turn = trio.Lock()

    async def run(self) -> None:
        """Free whenever there is something to free; until cancelled."""
        while True:
            try:
                await self.reclaim_all()
            except (SnapfsError, OSError) as error:
                self._events.note("reclaim-failed", logging.WARNING, reason=str(error))
                await trio.sleep(RETRY_S)
            else:
                await self._wakeup.wait()

    def wake(self) -> None:
        """Have the task look for work now."""
        self._wakeup.set()

    @property
    def waiting_count(self) -> int:
        """Deleted snapshots and removed volumes that still hold space."""
        return len(self._snapshots.deleted) + len(self._snapshots.aborted) + len(self._volumes.removed)

    async def reclaim_all(self) -> None:
        """Free all that nobody has open."""
        async with self._turn:
            await self._reserve.helped(self._catalog.settle)
            aborted = self._snapshots.aborted
            while aborted:
                # Again for each of them: another may have come while the one before was taken apart.
                await self._reserve.helped(self._catalog.settle)
                self._snapshots.let_go_of(aborted[0])
                row = aborted[0].row
                await self._reserve.helped(partial(self._release_aborted, row.snapshot_id, row.instant))
                aborted.pop(0)
            for volume_id, epoch in self._volumes.to_dismantle():
                await self._reserve.helped(partial(self._dismantle, volume_id, epoch))
            for processor in self._processors:
                await reclaim.free_candidates(processor)
            for snapshot in list(self._snapshots.deleted.values()):
                await self._settle_inheritors(snapshot)
                if snapshot.opens == 0 and not self._traits.inheritors(snapshot.snapshot_id):
                    await self._reserve.helped(partial(self._release, snapshot))
            failed: SnapfsError | OSError | None = None
            for volume in self._volumes.to_trim():
                try:
                    await self._reserve.helped(volume.trim)
                except (SnapfsError, OSError) as error:
                    # One whose change log is full must not keep the others from being freed.
                    failed = error
            await self._prune_traits()
            for processor in self._processors:
                await reclaim.free_candidates(processor)
                await processor.scrub_suspect_logs()
                await processor.punch_freed()
            await self._reserve.refill()
            if failed is not None:
                raise failed

    async def _release_parts(self, snapshot_id: SnapshotId, instant: int) -> None:
        await side_by_side([partial(reclaim.release_snapshot, one, snapshot_id, instant) for one in self._processors])

    async def _release_aborted(self, snapshot_id: SnapshotId, instant: int) -> None:
        """Take apart what was kept for a snapshot that came to nothing, attributes among it."""
        await self._release_parts(snapshot_id, instant)
        idle = await self._idle_versions(instant, self._index.next_of_all(instant))
        await self._catalog.save([], lambda: CatalogBatch(dropped_versions=idle))

    async def _release(self, snapshot: Snapshot) -> None:
        if snapshot.is_kept:
            snapshot.is_kept = False
            self._snapshots.keep_no_more(snapshot.instant, snapshot.volume_ids)
        await self._release_parts(snapshot.snapshot_id, snapshot.instant)
        idle = await self._idle_versions(snapshot.instant, self._index.next_of_all(snapshot.instant))
        batch = CatalogBatch(dropped_snapshots=[snapshot.snapshot_id], dropped_versions=idle)
        await self._catalog.save([], lambda: batch)
        self._snapshots.deleted.pop(snapshot.snapshot_id, None)

    async def _settle_inheritors(self, snapshot: Snapshot) -> None:
        """A deleted snapshot that clones look into: give them maps of their own, so that its space comes back."""
        for row in self._traits.inheritors(snapshot.snapshot_id):
            spans: reclaim.Span | None = None
            if row.volume_id not in self._volumes.by_id:
                if row.volume_id in self._volumes.removed:
                    continue
                spans = await self._catalog.ask(self._catalog.catalog.version_span, row.volume_id)
            settled = [await reclaim.settle_volume(one, row.volume_id, spans) for one in self._processors]
            if all(settled):
                await self.stop_inheriting(row.volume_id)

    async def stop_inheriting(self, volume_id: VolumeId) -> None:
        """A volume has maps of its own for all that it inherited, durably: note it."""
        await self._change_traits(lambda: [self._traits.get(volume_id)._replace(inherits=0)])

    async def _change_traits(self, change: Callable[[], list[VolumeTraits]], dropped: Sequence[VolumeId] = ()) -> None:
        """Change and drop traits in one commit; ``change`` is asked when the catalog's turn has come."""
        changed: list[VolumeTraits] = []

        def batch() -> CatalogBatch:
            changed[:] = change()
            return CatalogBatch(traits=list(changed), dropped_traits=list(dropped))

        await self._catalog.save([], batch)
        for row in changed:
            self._traits.put(row)
        for one in dropped:
            self._traits.drop(one)

    async def _prune_traits(self) -> None:
        """Forget the traits of volumes of which nothing is left."""
        if not self._traits.rows:
            return
        # The lock keeps out those that are being made, which are not among the volumes yet.
        async with self._volumes.lock:
            kept = await self._catalog.ask(self._catalog.catalog.version_volume_ids)
            gone = [
                one
                for one in self._traits.rows
                if one not in kept and one not in self._volumes.by_id and one not in self._volumes.removed
            ]
            idle = [one for one in gone if not self._traits.is_origin(one)]
            if idle:
                for processor in self._processors:
                    for one in idle:
                        await processor.drop_source(one)
                await self._change_traits(list, idle)
            for one in gone:
                if one not in idle:
                    await self._leave_out(one)

    async def _leave_out(self, volume_id: VolumeId) -> None:
        """Have the clones of a volume descend from its origin, if nothing of it is left that they could name.

        Each rollback makes a volume descend from the one before: without this, lines would only ever get longer.
        """
        if any(row.inherits for row in self._traits.clones_of(volume_id)):
            return
        for processor in self._processors:
            if await processor.access.ask(processor.access.store.has_anything_of, volume_id):
                return
        origin = self._traits.get(volume_id)

        def moved() -> list[VolumeTraits]:
            return [
                row._replace(
                    origin_id=origin.origin_id,
                    origin_instant=origin.origin_instant,
                    origin_snapshot_id=origin.origin_snapshot_id,
                )
                for row in self._traits.clones_of(volume_id)
            ]

        await self._change_traits(moved, [volume_id])

    async def _idle_versions(self, low: int, high: int) -> list[tuple[VolumeId, Epoch]]:
        """Kept attributes with instants from ``low`` up to ``high`` that no snapshot needs."""
        versions = await self._catalog.ask(self._catalog.catalog.versions_between, low, high)
        return [
            (row.volume_id, row.instant)
            for row in versions
            if not self._index.holds(row.volume_id, row.epoch, row.instant)
        ]

    async def _dismantle(self, volume_id: VolumeId, epoch: Epoch) -> None:
        await side_by_side([partial(reclaim.dismantle_volume, one, volume_id, epoch - 1) for one in self._processors])
        await self._catalog.save([], lambda: CatalogBatch(dropped_removed=[volume_id]))
        self._volumes.removed.pop(volume_id, None)

    async def drop_unpublished(self, from_instant: int) -> None:
        """After opening: give back what was kept for a snapshot that was cut and never published."""
        lowest = from_instant
        known = set(self._snapshots.by_id) | set(self._snapshots.deleted)
        for processor in self._processors:
            parts = await processor.access.ask(processor.access.store.intermediates)
            for part in parts:
                if part.snapshot_id not in known:
                    lowest = min(lowest, part.instant)
                    await reclaim.release_snapshot(processor, part.snapshot_id, part.instant)
            if await processor.access.ask(processor.access.store.epoch_max) > from_instant:
                await reclaim.release_snapshot(processor, SnapshotId(0), from_instant)
        idle = await self._idle_versions(lowest, NEVER)
        await self._catalog.save([], lambda: CatalogBatch(dropped_versions=idle))
