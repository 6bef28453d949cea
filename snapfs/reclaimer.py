"""The pool's task that gives back what deleted snapshots and removed volumes held."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TypeVar

import trio

from . import reclaim
from .catalogaccess import CatalogAccess
from .errors import SnapfsError
from .events import EventLog
from .formats import COPY_ON_WRITE, LEFTOVERS_FROM, CatalogBatch, VolumeTraits
from .geometry import Epoch, SnapshotId, VolumeId
from .namedblocks import NamedBlocks
from .pace import Demand, Pace
from .processor import Processor
from .reserve import Reserve
from .snapshot import Snapshot
from .snapshotindex import NEVER, SnapshotIndex
from .snapshots import SnapshotTable
from .tasks import Wakeup, side_by_side
from .unnamed import free_suspect_logs
from .volumes import VolumeTable

T = TypeVar("T")

RETRY_S = 5.0
RETRY_S_MAX = 80.0
# So many are released in one commit of the catalog.
_RELEASED_AT_ONCE = 64
_ROOM_SHORT_PERCENT = 90
# Of deleted snapshots and removed volumes: with more of them for so long it rests less, with as many as the last not
# at all. A thousand that go at once may wait; what comes all the time must not be fallen behind for good.
_BEHIND = 256
_BEHIND_S = 30.0
_FAR_BEHIND = 4096


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
        demand: Demand,
        used_percent: Callable[[], Awaitable[int]],
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
        self._pace = Pace(demand)
        self._used_percent = used_percent
        self._has_failed = False
        # By processor and source: the first object of which a map names it.
        self._source_named_at: dict[tuple[int, int], int] = {}
        # When there was last little to do. Nothing has fallen behind before it runs.
        self._kept_up_s = math.inf

    async def run(self) -> None:
        """Free whenever there is something to free; until cancelled."""
        self._kept_up_s = trio.current_time()
        retry_s = RETRY_S
        while True:
            self._note_keeping_up()
            try:
                await self.reclaim_all(gently=True)
                self._has_failed = False
                retry_s = RETRY_S
                # Deletions that come meanwhile are worked through together.
                await self._rest()
            except (SnapfsError, OSError) as error:
                self._has_failed = True
                self._events.note("reclaim-failed", logging.WARNING, reason=str(error))
                await trio.sleep(RETRY_S)
                # What cannot be given back for long is tried less and less often, unless there is something new.
                with trio.move_on_after(retry_s - RETRY_S):
                    await self._wakeup.wait()
                retry_s = min(2 * retry_s, RETRY_S_MAX)
            else:
                await self._wakeup.wait()

    def _note_keeping_up(self) -> None:
        if not self._has_waiting(_BEHIND):
            self._kept_up_s = trio.current_time()

    def _has_waiting(self, count: int) -> bool:
        """Whether as many wait that can go now."""
        return self.waiting_count >= count and self._free_count() >= count

    def _free_count(self) -> int:
        deleted = sum(1 for _ in self._free())
        return deleted + len(self._snapshots.aborted) + self._volumes.removed_unused_count

    async def _rest(self) -> None:
        self._note_keeping_up()
        if self._has_waiting(_FAR_BEHIND):
            await trio.lowlevel.checkpoint()
            self._pace.begin()
            return
        is_pressed = trio.current_time() - self._kept_up_s >= _BEHIND_S
        if not is_pressed:
            is_pressed = await self._used_percent() >= _ROOM_SHORT_PERCENT
        await self._pace.rest(is_pressed=is_pressed)

    def wake(self) -> None:
        """Have the task look for work now."""
        self._wakeup.set()

    @property
    def waiting_count(self) -> int:
        """Deleted snapshots and removed volumes that still hold space."""
        return len(self._snapshots.deleted) + len(self._snapshots.aborted) + len(self._volumes.removed)

    @property
    def is_at_work(self) -> bool:
        """Whether something is being freed, or will be."""
        return self._turn.locked() or self._wakeup.is_set() or self._has_failed

    async def reclaim_all(self, *, gently: bool = False) -> None:
        """Free all that nobody has open; ``gently`` with rests while volumes are used, if room is not short."""
        with self._pace.hurried(not gently):
            async with self._turn:
                self._pace.begin()
                await self._reclaim_all(gently=gently)

    async def _reclaim_all(self, *, gently: bool) -> None:
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
            await self._reserve.helped(partial(self._dismantle, volume_id, epoch, gently=gently))
        await self._free_candidates(gently=gently)
        failed: SnapfsError | OSError | None = None
        for snapshot in list(self._snapshots.deleted.values()):
            try:
                await self._reserve.helped(partial(self._settle_inheritors, snapshot))
            except (SnapfsError, OSError) as error:
                # A clone for whose maps there is no room, say, must not keep others' space from coming back.
                failed = error
        while released := self._to_release():
            await self._reserve.helped(partial(self._release, released, gently=gently))
        for volume in self._volumes.to_trim():
            try:
                await self._reserve.helped(volume.trim)
                if volume.needs_trim:
                    # It was stopped halfway.
                    self._wakeup.set()
            except (SnapfsError, OSError) as error:
                # One whose change log is full must not keep the others from being freed.
                failed = error
        await self._reserve.helped(partial(self._drop_leftovers, gently=gently))
        # Before traits go, and not only after: from then on an origin counts its blocks out itself, and what a clone
        # that is gone left to be looked at would be counted out once more.
        await self._free_candidates(gently=gently)
        await self._prune_traits()
        await self._free_candidates(gently=gently)
        for processor in self._processors:
            try:
                await self._reserve.helped(partial(reclaim.settle_lost, processor))
                await free_suspect_logs(processor)
                await processor.punch_freed()
            except (SnapfsError, OSError) as error:
                # A log of this one must not keep the others' room.
                failed = error
        await self._reserve.refill()
        if failed is not None:
            raise failed

    async def _free_candidates(self, *, gently: bool) -> None:
        rest = self._rest if gently else trio.lowlevel.checkpoint
        for processor in self._processors:
            await self._reserve.helped(partial(reclaim.free_candidates, processor, rest))

    async def _on_each(self, part: Callable[..., Awaitable[T]], *, gently: bool = False) -> list[T]:
        """Run the processors' parts of something: one after the other with rests, or side by side. What they give."""
        if gently:
            return [await part(processor, rest=self._rest) for processor in self._processors]
        found: list[T] = []

        async def run(processor: Processor) -> None:
            found.append(await part(processor))

        await side_by_side([partial(run, one) for one in self._processors])
        return found

    async def _release_aborted(self, snapshot_id: SnapshotId, instant: int) -> None:
        """Take apart what was kept for a snapshot that came to nothing, attributes among it."""
        await self._release_parts([reclaim.Deleted(snapshot_id, instant)], CatalogBatch(), gently=False)

    async def _release_parts(self, deleted: Sequence[reclaim.Deleted], batch: CatalogBatch, *, gently: bool) -> None:
        """Take apart what the processors and the catalog kept; then commit this batch, which tells what had to stay."""
        is_complete = all(await self._on_each(partial(reclaim.release_snapshots, deleted=deleted), gently=gently))
        batch.dropped_versions += await self._idle_versions(reclaim.unheld_spans(self._index, deleted))
        leftovers_from = 0

        def make_batch() -> CatalogBatch:
            nonlocal leftovers_from
            leftovers_from = self._snapshots.with_leftovers([] if is_complete else [one.instant for one in deleted])
            if leftovers_from != self._snapshots.leftovers_from:
                batch.meta[LEFTOVERS_FROM] = leftovers_from
            return batch

        await self._catalog.save([], make_batch)
        self._snapshots.leftovers_from = leftovers_from

    def _to_release(self) -> list[Snapshot]:
        """Some of the deleted snapshots that nobody has open, and that no clone looks into."""
        return list(islice(self._free(), _RELEASED_AT_ONCE))

    def _free(self) -> Iterator[Snapshot]:
        looked_into = {row.origin_snapshot_id for row in self._traits.rows.values() if row.inherits}
        for snapshot in self._snapshots.deleted.values():
            if snapshot.opens == 0 and snapshot.snapshot_id not in looked_into:
                yield snapshot

    async def _release(self, snapshots: Sequence[Snapshot], *, gently: bool) -> None:
        for snapshot in snapshots:
            if snapshot.is_kept:
                snapshot.is_kept = False
                self._snapshots.keep_no_more(snapshot.instant, snapshot.volume_ids)
        deleted = [reclaim.Deleted(one.snapshot_id, one.instant, one.volume_ids) for one in snapshots]
        batch = CatalogBatch(dropped_snapshots=[one.snapshot_id for one in snapshots])
        await self._release_parts(deleted, batch, gently=gently)
        for snapshot in snapshots:
            self._snapshots.deleted.pop(snapshot.snapshot_id, None)

    async def _drop_leftovers(self, *, gently: bool) -> None:
        """Drop what was not when its snapshot went: of a volume that had failed, or when the daemon died just then."""
        lowest = self._snapshots.leftovers_from
        if not lowest or any(portion.failure for one in self._processors for portion in one.portions.values()):
            return
        part = partial(reclaim.drop_unneeded_copies, spans=[(lowest, NEVER)])
        is_complete = all(await self._on_each(part, gently=gently))
        idle = await self._idle_versions([(lowest, NEVER)])
        leftovers_from = lowest

        def make_batch() -> CatalogBatch:
            nonlocal leftovers_from
            # One that came to nothing meanwhile may have some too.
            leftovers_from = 0 if is_complete and not self._snapshots.aborted else self._snapshots.leftovers_from
            return CatalogBatch(dropped_versions=idle, meta={LEFTOVERS_FROM: leftovers_from})

        await self._catalog.save([], make_batch)
        self._snapshots.leftovers_from = leftovers_from

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
        """Forget the traits of volumes of which nothing is left, and what such ones stood on."""
        if not self._traits.rows or self._snapshots.leftovers_from:
            # What is left over of a volume needs its source, and its family, to be dropped.
            return
        await self._let_go_of_sources()
        async with self._volumes.lock:
            gone = await self._gone_volumes()
            # Again when some are forgotten: what they descend from is no origin any more.
            while idle := [one for one in gone if not self._traits.is_origin(one)]:
                await self._drop_sources(idle)
                await self._change_traits(list, idle)
                gone = [one for one in gone if one not in idle]
            for one in gone:
                await self._leave_out(one)

    async def _gone_volumes(self) -> list[VolumeId]:
        """Volumes of which nothing is left but traits.

        The volumes' lock keeps out those that are being made, which are not among the volumes yet.
        """
        kept = await self._catalog.ask(self._catalog.catalog.version_volume_ids)
        return [
            one
            for one in self._traits.rows
            if one not in kept and one not in self._volumes.by_id and one not in self._volumes.removed
        ]

    async def _drop_sources(self, volume_ids: Iterable[VolumeId]) -> None:
        for processor in self._processors:
            for one in volume_ids:
                await processor.drop_source(one)

    async def _let_go_of_sources(self) -> None:
        standing = {one for processor in self._processors for one in processor.sources}
        standing.update(row.volume_id for row in self._traits.rows.values() if row.source_path)
        if not standing:
            return
        async with self._volumes.lock:
            gone = await self._gone_volumes()
        for one in gone:
            if one in standing:
                await self._let_go_of_source(one)

    async def _let_go_of_source(self, volume_id: VolumeId) -> None:
        """Forget what a volume of which nothing is left stood on, if no clone of it needs that any more.

        No map comes to name it again: each is made of one that did.
        """
        if any(clone.inherits for clone in self._traits.clones_of(volume_id)):
            return
        for processor in self._processors:
            if await self._names_source_of(processor, volume_id):
                return
        # The path goes last: a log of an image is opened by it.
        await self._drop_sources([volume_id])
        await self._change_traits(
            lambda: [self._traits.get(volume_id)._replace(source_path="", source_size_bytes=0, source_mtime_ns=0)]
        )

    async def _names_source_of(self, processor: Processor, volume_id: VolumeId) -> bool:
        """Whether a map of a relative names what a volume stands on; one of a relative that failed may."""
        source = processor.sources.get(volume_id)
        if source is None:
            return False
        family = self._traits.family_of(volume_id)
        portions = [processor.portions[one] for one in family if one in processor.portions]
        if any(portion.failure for portion in portions):
            return True
        # What is pending goes to the store first, so that its rows tell all.
        await processor.commit(processor.sound_portions())
        log_id = int(source.log_id)
        key = (processor.index, log_id)
        named = NamedBlocks(
            processor.access,
            partial(self._traits.family_of, volume_id),
            {log_id},
            from_object=self._source_named_at.get(key, 0),
        )
        while (found := await named.step()) is not None:
            if found:
                # Before it nothing names the source, and nothing will.
                self._source_named_at[key] = min(found)
                return True
        self._source_named_at.pop(key, None)
        return False

    async def _leave_out(self, volume_id: VolumeId) -> None:
        """Have the clones of a volume descend from its origin, if nothing of it is left that they could name.

        Each rollback makes a volume descend from the one before: without this, lines would only ever get longer.
        """
        origin = self._traits.get(volume_id)
        if origin.change_mode == COPY_ON_WRITE or any(row.inherits for row in self._traits.clones_of(volume_id)):
            # By an origin that was written in place its clones are known as ones whose blocks are not counted.
            return
        for processor in self._processors:
            if await processor.access.ask(processor.access.store.has_anything_of, volume_id):
                return

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

    async def _idle_versions(self, spans: Iterable[tuple[int, int]]) -> list[tuple[VolumeId, Epoch]]:
        """Kept attributes that no snapshot needs, with instants from the first up to the second of a span."""
        idle = []
        for low, high in spans:
            versions = await self._catalog.ask(self._catalog.catalog.versions_between, low, high)
            idle += [
                (row.volume_id, row.instant)
                for row in versions
                if not self._index.holds(row.volume_id, row.epoch, row.instant)
            ]
        return idle

    async def _dismantle(self, volume_id: VolumeId, epoch: Epoch, *, gently: bool) -> None:
        part = partial(reclaim.dismantle_volume, volume_id=volume_id, last_instant=epoch - 1)
        await self._on_each(part, gently=gently)
        await self._catalog.save([], lambda: CatalogBatch(dropped_removed=[volume_id]))
        self._volumes.removed.pop(volume_id, None)

    async def free_orphans(self) -> None:
        """After opening, before anything is written: settle what 0.8.6 and earlier left of clones that are forgotten.

        What is still to be looked at may have been counted out already by who was their origin. So it is counted anew.
        """
        for processor in self._processors:
            try:
                for volume_id in await processor.access.ask(processor.access.store.candidate_volumes):
                    if len(self._traits.family_of(volume_id)) == 1:
                        await reclaim.count_anew(processor, volume_id)
            except (SnapfsError, OSError) as error:
                # Some of its maps are damaged, say: that keeps no pool from being opened.
                self._events.note("reclaim-failed", logging.WARNING, reason=str(error))

    async def drop_idle_versions(self) -> int:
        """Forget kept attributes that no snapshot needs; how many."""
        idle = await self._idle_versions([(0, NEVER)])
        if idle:
            await self._catalog.save([], lambda: CatalogBatch(dropped_versions=idle))
        return len(idle)

    async def drop_unpublished(self, from_instant: int) -> None:
        """After opening: give back what was kept for a snapshot that was cut and never published."""
        lowest = from_instant
        known = set(self._snapshots.by_id) | set(self._snapshots.deleted)
        for processor in self._processors:
            parts = await processor.access.ask(processor.access.store.intermediates)
            for part in parts:
                if part.snapshot_id not in known:
                    lowest = min(lowest, part.instant)
                    await reclaim.release_snapshots(processor, [reclaim.Deleted(part.snapshot_id, part.instant)])
            if await processor.access.ask(processor.access.store.epoch_max) > from_instant:
                await reclaim.release_snapshots(processor, [reclaim.Deleted(SnapshotId(0), from_instant)])
        idle = await self._idle_versions([(lowest, NEVER)])
        await self._catalog.save([], lambda: CatalogBatch(dropped_versions=idle))
