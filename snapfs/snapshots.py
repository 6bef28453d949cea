"""The table of snapshots: making them at one instant on all processors, listing and deleting them.

Making one: the kernel's dirty pages are flushed (by whoever mounts; see ``before_cut``); then, with
no await in between, every processor begins a new epoch - that is the instant; then each processor
makes its part durable and prepares its intermediate snapshot, side by side; then one commit of the
catalog makes the snapshot exist. What a crash leaves prepared without that commit is dropped when
the pool is opened.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import trio

from .catalogaccess import CatalogAccess
from .errors import ExistsError, HeldError, NotFoundError, SnapfsError, StallError
from .events import EventLog
from .formats import LEFTOVERS_FROM, Attributes, CatalogBatch, IntermediateRow, SnapshotRow, VersionRow
from .freeze import Freeze
from .geometry import BLOCK_SIZE, Epoch, SnapshotId, VolumeId
from .hooks import HookTable
from .processor import Processor
from .reserve import Reserve
from .shardstate import EpochClock
from .snapshot import Snapshot, SnapshotMembers, SnapshotVolume
from .snapshotindex import NEVER, SnapshotIndex
from .space import SpaceAccount, VolumeSpan, account_of
from .tasks import Wakeup, side_by_side
from .units import check_name, check_tag, show_name, utc_name
from .volume import Volume
from .volumes import VolumeTable

BeforeCut = Callable[[Sequence[Volume]], Awaitable[None]]
ForgetName = Callable[[bytes], Awaitable[None]]
_MEMBERS_KEPT = 8
# For how long what is cut off a volume may keep a snapshot waiting.
_CLEARING_S_MAX = 0.25


async def nothing_before_cut(volumes: Sequence[Volume]) -> None:
    """Without a mount there are no dirty pages to flush."""


async def no_name_kept(name: bytes) -> None:
    """Without a mount nobody keeps names in mind."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a snapshot is to be called, and to carry."""

    name: bytes | None
    note: str
    hold_tags: frozenset[str]
    schedule: str
    guid: str = ""


@dataclass(slots=True)
class _Cut:
    """A snapshot that was cut and is not durable yet."""

    row: SnapshotRow
    parts: list[IntermediateRow]
    marks: dict[Volume, tuple[int, int]]
    chosen: list[Volume] | None
    cut_ns: int
    freeze: Freeze | None = None
    max_stall_ms: float | None = None
    make_change: Callable[[CatalogBatch, int], None] | None = None
    kept: Sequence[Volume] = ()


@dataclass(slots=True)
class AbortedSnapshot:
    """One that came to nothing. ``is_kept`` while a power cut may yet bring it forth: then copies are kept for it."""

    row: SnapshotRow
    is_kept: bool = True


class SnapshotTable:
    """The snapshots of a pool by name and by id.

    ``lock`` lets one snapshot be made, renamed or deleted at a time. From the instant ``leftovers_from`` on, 0 for
    none, there may be copies and attributes that no snapshot needs and nothing else tells of. ``forget_name`` has
    whoever keeps names in mind, the kernel that is, look a name up again; it is called with no lock held.
    """

    def __init__(
        self,
        catalog: CatalogAccess,
        volumes: VolumeTable,
        index: SnapshotIndex,
        clock: EpochClock,
        next_instant: int,
        next_snapshot_id: int,
        reserve: Reserve,
        events: EventLog,
        hooks: HookTable,
        reclaim_wakeup: Wakeup,
        sealer_wakeup: Wakeup,
    ) -> None:
        self.by_name: dict[bytes, Snapshot] = {}
        self.by_id: dict[SnapshotId, Snapshot] = {}
        # When one was made, deleted or renamed last, as far as is known.
        self.names_changed_ns = 0
        self.deleted: dict[SnapshotId, Snapshot] = {}
        self.before_cut: BeforeCut = nothing_before_cut
        self.forget_name: ForgetName = no_name_kept
        self.processors: Sequence[Processor] = ()
        self.lock = trio.Lock()
        self.hooks = hooks
        self.aborted: list[AbortedSnapshot] = []
        self.leftovers_from = 0
        self._catalog = catalog
        self._volumes = volumes
        self._index = index
        self._clock = clock
        self._next_instant = next_instant
        self._next_snapshot_id = next_snapshot_id
        self._reserve = reserve
        self._events = events
        self._members: OrderedDict[SnapshotId, SnapshotMembers] = OrderedDict()
        self._reclaim_wakeup = reclaim_wakeup
        self._sealer_wakeup = sealer_wakeup

    def load(self, rows: Sequence[SnapshotRow], leftovers_from: int) -> None:
        """Fill the table and the indexes from the catalog."""
        self.leftovers_from = leftovers_from
        for row in rows:
            snapshot = Snapshot(row)
            # One that is deleted is still kept while clones look into it.
            snapshot.is_kept = row.name is not None or bool(self._volumes.traits.inheritors(row.snapshot_id))
            if snapshot.is_kept:
                self._index.add(snapshot.instant, snapshot.volume_ids)
                for processor in self.processors:
                    processor.snapshots.add(snapshot.instant, snapshot.volume_ids)
            if snapshot.name is None:
                self.deleted[snapshot.snapshot_id] = snapshot
            else:
                self.by_name[snapshot.name] = snapshot
                self.by_id[snapshot.snapshot_id] = snapshot
        self.names_changed_ns = max((one.created_ns for one in self.by_id.values()), default=0)

    def keep_no_more(self, instant: int, volume_ids: Collection[VolumeId] | None) -> None:
        """From now on no copy is made or kept for a snapshot with this instant."""
        self._index.remove(instant, volume_ids)
        for processor in self.processors:
            processor.snapshots.remove(instant, volume_ids)

    def let_go_of(self, aborted: AbortedSnapshot) -> None:
        """No power cut brings it forth any more: keep nothing for it from now on."""
        if aborted.is_kept:
            aborted.is_kept = False
            self.keep_no_more(aborted.row.instant, aborted.row.volume_ids)

    def get(self, name: bytes) -> Snapshot:
        """The snapshot of that name. Raises NotFoundError."""
        snapshot = self.by_name.get(name)
        if snapshot is None:
            raise NotFoundError(f"there is no snapshot {show_name(name)!r}", "See the names with snapfs list")
        return snapshot

    # -- making one --------------------------------------------------------------------------

    async def create(
        self,
        name: bytes | None = None,
        volume_names: Iterable[bytes] | None = None,
        note: str = "",
        *,
        hold_tags: Iterable[str] = (),
        schedule: str = "",
        guid: str = "",
        with_hooks: bool = True,
        max_stall_ms: float | None = None,
    ) -> Snapshot:
        """Make a snapshot of the volumes named, or of all (None), at one instant; it is durable.

        Without a name it gets the time in UTC. ``guid`` is that of the snapshot it was received from.
        ``max_stall_ms`` bounds for how long it may keep the daemon from serving, and applications frozen.
        Raises BadNameError, ExistsError, NotFoundError, HookFailedError, StallError,
        NoSpaceError, SyncFailedError; then there is no snapshot.
        """
        if name is not None:
            check_name(name, "snapshot")
        await self._reserve.check()
        volume_names = None if volume_names is None else list(volume_names)
        wish = _Wish(name, note, frozenset(check_tag(tag) for tag in hold_tags), schedule, guid)
        async with self.lock:
            self._check_free(name)
            # Until then what is being cut off is waited for.
            clear_by = trio.current_time() + _CLEARING_S_MAX
            chosen = await self._flushed(volume_names, clear_by)
            shown = None if volume_names is None else [show_name(one) for one in volume_names]
            hooks = self.hooks.concerning(shown) if with_hooks else []
            max_stall_s = None if max_stall_ms is None else max_stall_ms / 1e3
            async with self.hooks.frozen(hooks, show_name(name or b""), max_stall_s) as freeze:
                if freeze.is_active:
                    # What they wrote to hold still. The first flush left little else to write. They are not kept
                    # waiting for anything else.
                    clear_by = -math.inf
                    chosen = await self._flushed(volume_names, clear_by)
                cut = None
                while cut is None:
                    # Cancelled in between, it would be neither there nor not there.
                    with trio.CancelScope(shield=True):
                        async with self._volumes.lock:
                            freeze.check_now()
                            is_clear = trio.current_time() >= clear_by or not self._cut_short(chosen)
                            if is_clear and self._chosen(volume_names) == chosen:
                                cut = self._cut(wish, chosen)
                        if cut is not None:
                            cut.freeze, cut.max_stall_ms = freeze, max_stall_ms
                            made = await self._see_through(cut)
                    if cut is None:
                        # A name stands for another volume by now, of which the kernel may have pages; or one was cut.
                        chosen = await self._flushed(volume_names, clear_by)
                        # What cannot be cleared is not tried for ever.
                        clear_by = -math.inf
        return made

    async def _flushed(self, volume_names: Iterable[bytes] | None, clear_by: float) -> list[Volume] | None:
        """The volumes of these names, or None for all, of which the kernel has handed over what was written before.

        What lies behind their sizes counts for the root: it is cleared, if that is done by then.
        """
        chosen = self._chosen(volume_names)
        self._volumes.check_whole(self._volumes.by_name.values() if chosen is None else chosen)
        await self.before_cut(self._volumes.unsaved() if chosen is None else chosen)
        with trio.move_on_at(clear_by):
            for volume in self._cut_short(chosen):
                with suppress(SnapfsError, OSError, MemoryError):
                    await volume.trim()
        return chosen

    def _cut_short(self, chosen: Iterable[Volume] | None) -> list[Volume]:
        volumes = self._volumes.by_name.values() if chosen is None else chosen
        return [volume for volume in volumes if volume.is_cut_short]

    async def create_before(
        self,
        name: bytes | None,
        chosen: list[Volume],
        note: str,
        make_change: Callable[[CatalogBatch, int], None],
        kept: Sequence[Volume] = (),
    ) -> Snapshot:
        """Make a snapshot of these volumes and replace them, in one commit.

        ``make_change`` gets the commit and the instant; the rows of these volumes are its own
        business, but those of ``kept``, which are not replaced. The caller has flushed them, keeps
        writers out, holds this table's lock and the
        volumes', and shields this from cancellation. Raises what :meth:`create` does.
        """
        self._check_free(name)
        cut = self._cut(_Wish(name, note, frozenset(), ""), chosen)
        cut.make_change, cut.kept = make_change, kept
        return await self._see_through(cut)

    def _check_free(self, name: bytes | None) -> None:
        if name is not None and name in self.by_name:
            raise ExistsError(f"there is a snapshot {show_name(name)!r} already", "Choose another name")

    def _chosen(self, volume_names: Iterable[bytes] | None) -> list[Volume] | None:
        if volume_names is None:
            return None
        chosen = {name: self._volumes.get(name) for name in volume_names}
        if not chosen:
            raise NotFoundError("a snapshot of no volume was asked for", "Name at least one, or none for all")
        return list(chosen.values())

    async def _see_through(self, cut: _Cut) -> Snapshot:
        """Make a cut durable on all processors, and then in the catalog."""
        row = cut.row
        try:
            if cut.freeze is not None:
                cut.freeze.thaw_now()
            await side_by_side(
                [
                    partial(self._prepare, cut, processor, part)
                    for processor, part in zip(self.processors, cut.parts, strict=True)
                ]
            )
            if cut.freeze is not None:
                await cut.freeze.end()
                row = cut.row = cut.row._replace(frozen_ns=cut.freeze.frozen_ns)
            _check_stall(cut)
            await self._publish(cut)
        except BaseException as error:
            self._abort(row, error)
            raise
        row = cut.row
        snapshot = Snapshot(row)
        snapshot.cut_ns = cut.cut_ns
        assert row.name is not None
        self.by_name[row.name] = snapshot
        self.by_id[row.snapshot_id] = snapshot
        self.names_changed_ns = time.time_ns()
        self._events.note("snapshot", name=show_name(row.name), instant=row.instant, stall_us=row.stall_ns // 1000)
        self._sealer_wakeup.set()
        return snapshot

    async def _prepare(self, cut: _Cut, processor: Processor, part: IntermediateRow) -> None:
        stall_ns = await processor.prepare(part, cut.row.volume_ids, self._catalog.generation)
        cut.row = cut.row._replace(stall_ns=max(stall_ns, cut.row.stall_ns))

    def _cut(self, wish: _Wish, chosen: list[Volume] | None) -> _Cut:
        """The instant. Runs without an await, so it falls between any two writes."""
        created_ns = time.time_ns()
        marks = {volume: volume.size_mark() for volume in self._volumes.unsaved()}
        volume_ids = None if chosen is None else frozenset(volume.volume_id for volume in chosen)
        row = SnapshotRow(
            SnapshotId(self._next_snapshot_id),
            wish.name if wish.name is not None else self.unused_name(utc_name(created_ns).encode()),
            Epoch(self._next_instant),
            created_ns,
            volume_ids,
            0,
            wish.note,
            wish.schedule,
            wish.guid,
            wish.hold_tags,
        )
        self._next_snapshot_id += 1
        self._next_instant += 1
        started = time.perf_counter_ns()
        try:
            parts = [processor.cut(row.snapshot_id, row.instant, volume_ids) for processor in self.processors]
            self._index.add(row.instant, volume_ids)
            if chosen is None:
                self._clock.epoch = row.instant + 1
            for volume in chosen or ():
                volume.named_epoch = Epoch(row.instant + 1)
            stall_ns = time.perf_counter_ns() - started
            return _Cut(row._replace(stall_ns=stall_ns), parts, marks, chosen, stall_ns)
        except BaseException as error:
            # There was no memory for all of it: some processors may have begun a new epoch, which does no harm.
            self._abort(row, error)
            raise

    def unused_name(self, stem: bytes) -> bytes:
        """A name, with ``-2`` and so on behind it when it is taken."""
        name, number = stem, 2
        while name in self.by_name:
            name = stem + b"-%d" % number
            number += 1
        return name

    async def _publish(self, cut: _Cut) -> None:
        covered = list(cut.marks if cut.chosen is None else cut.chosen)
        for volume in covered:
            if not volume.is_removed and volume in cut.marks and not volume.data_synced(cut.marks[volume]):
                await volume.sync_data()

        leftovers_from = self.leftovers_from

        def batch() -> CatalogBatch:
            nonlocal leftovers_from
            # Once this one is published, opening the pool tells no more what was kept for those that were not.
            leftovers_from = self.with_leftovers(one.row.instant for one in self.aborted)
            rows = CatalogBatch(
                snapshots=[cut.row],
                shard_generations=[(one.index, one.access.store.generation) for one in self.processors],
                meta={
                    "epoch": self._clock.epoch,
                    "next_instant": cut.row.instant + 1,
                    "next_snapshot_id": cut.row.snapshot_id + 1,
                    LEFTOVERS_FROM: leftovers_from,
                },
            )
            if cut.make_change is not None:
                cut.make_change(rows, cut.row.instant)
            return rows

        await self._catalog.save(covered if cut.make_change is None else cut.kept, batch)
        self.leftovers_from = leftovers_from

    def with_leftovers(self, instants: Iterable[int]) -> int:
        """What ``leftovers_from`` is with these instants."""
        return min((one for one in (self.leftovers_from, *instants) if one), default=0)

    def _abort(self, row: SnapshotRow, error: BaseException) -> None:
        """Forget a snapshot that could not be made durable; give back what was kept for it."""
        aborted = AbortedSnapshot(row)
        if self._catalog.is_settled:
            self.let_go_of(aborted)
        self.aborted.append(aborted)
        self._reclaim_wakeup.set()
        self._events.note("snapshot-failed", logging.WARNING, name=show_name(row.name or b""), reason=str(error))

    # -- looking into one --------------------------------------------------------------------

    async def members(self, snapshot: Snapshot) -> SnapshotMembers:
        """The volumes of a snapshot."""
        known = self._members.get(snapshot.snapshot_id)
        if known is not None:
            self._members.move_to_end(snapshot.snapshot_id)
            return known
        block_counts = await self._block_counts(snapshot.instant)
        members = SnapshotMembers(snapshot, await self.attributes_of(snapshot), block_counts)
        self._members[snapshot.snapshot_id] = members
        while len(self._members) > _MEMBERS_KEPT:
            self._members.popitem(last=False)
        return members

    async def attributes_of(self, snapshot: Snapshot) -> dict[VolumeId, Attributes]:
        """The attributes of a snapshot's volumes."""
        instant = snapshot.instant
        rows = await self._catalog.ask(self._catalog.catalog.versions_at, instant)
        # From here on without an await: memory is newer than what was asked.
        found: dict[VolumeId, Attributes] = {}
        for row in rows:
            if snapshot.holds(row.volume_id):
                found[row.volume_id] = row.attributes
        for volume in self._volumes.by_id.values():
            if not snapshot.holds(volume.volume_id):
                continue
            if volume.epoch <= instant and not volume.is_removed:
                found[volume.volume_id] = volume.attributes()
            for version in volume.versions:
                if version.epoch <= instant <= version.instant:
                    found[volume.volume_id] = version.attributes
        return found

    async def attributes_over_time(self, volume_id: VolumeId) -> list[VersionRow]:
        """The attributes that a volume has had, as far as snapshots may hold them, oldest first."""
        kept = await self._catalog.ask(self._catalog.catalog.versions_of, volume_id)
        # From here on without an await: memory is newer than what was asked.
        found = {row.epoch: row for row in kept}
        volume = self._volumes.by_id.get(volume_id)
        if volume is not None:
            found.update({row.epoch: row for row in volume.versions})
            if not volume.is_removed:
                now = VersionRow(volume_id, Epoch(volume.epoch), Epoch(NEVER), volume.attributes())
                found[now.epoch] = now
        return [found[epoch] for epoch in sorted(found)]

    async def _block_counts(self, instant: int) -> dict[VolumeId, int]:
        """Blocks that each volume had mapped at an instant."""
        counts: dict[VolumeId, int] = {}
        for processor in self.processors:
            then = await processor.access.ask(processor.access.store.live_counts_at, instant)
            for volume_id, count in processor.block_counts_at(instant, then).items():
                counts[volume_id] = counts.get(volume_id, 0) + count
        return counts

    def of_instant(self, instant: int) -> Snapshot | None:
        """The snapshot of an instant."""
        return next((one for one in self.by_id.values() if one.instant == instant), None)

    def at(self, moment_ns: int) -> Snapshot:
        """The last snapshot made at or before a moment. Raises NotFoundError."""
        found = [one for one in self.by_id.values() if one.created_ns <= moment_ns]
        if not found:
            raise NotFoundError("there is no snapshot of that time or before", "See the times with snapfs list")
        return max(found, key=lambda one: (one.created_ns, one.instant))

    async def has_changed_since(self, snapshot: Snapshot, volume_names: Iterable[bytes] | None = None) -> bool:
        """Whether the volumes named, or all (None), are other than a snapshot holds them, or others."""
        chosen = self._chosen(volume_names)
        await self.before_cut(self._volumes.unsaved() if chosen is None else chosen)
        now = list(self._volumes.by_name.values()) if chosen is None else chosen
        if any(volume.epoch > snapshot.instant for volume in now):
            return True
        members = await self.members(snapshot)
        return {volume.volume_id for volume in now} != set(members.by_id)

    def changelog_of(self, volume_id: VolumeId) -> int:
        """The change log volume of a volume that a snapshot holds."""
        return self._volumes.traits.get(volume_id).changelog_id

    async def open_volume(self, snapshot: Snapshot, volume_id: VolumeId) -> SnapshotVolume:
        """A volume of a snapshot, open until its ``close``. Raises NotFoundError."""
        members = await self.members(snapshot)
        attributes = members.by_id.get(volume_id)
        if attributes is None or snapshot.snapshot_id not in self.by_id:
            raise NotFoundError("the snapshot or its volume is gone")
        return SnapshotVolume(snapshot, volume_id, attributes, self.processors)

    def close_volume(self, volume: SnapshotVolume) -> None:
        """Undo :meth:`open_volume`. The space of a deleted snapshot comes back when its last file is closed."""
        volume.close()
        self._note_closed(volume.snapshot)

    def _note_closed(self, snapshot: Snapshot) -> None:
        if snapshot.opens == 0 and snapshot.snapshot_id in self.deleted:
            self._reclaim_wakeup.set()

    @contextmanager
    def looked_into(self, snapshots: Iterable[Snapshot | None]) -> Iterator[None]:
        """Until the block ends nothing that these hold is taken apart, also when they are deleted meanwhile.

        Raises NotFoundError for one that is deleted already.
        """
        held = [one for one in snapshots if one is not None]
        for one in held:
            if one.snapshot_id not in self.by_id:
                raise NotFoundError("a snapshot was deleted meanwhile", "Choose among those that snapfs list shows")
        for one in held:
            one.opens += 1
        try:
            yield
        finally:
            for one in held:
                one.opens -= 1
                self._note_closed(one)

    async def referenced_bytes(self, snapshot: Snapshot) -> int:
        """Bytes that were mapped in the volumes of a snapshot at its instant."""
        referenced = 0
        for processor in self.processors:
            part = await processor.access.ask(processor.access.store.intermediate, snapshot.snapshot_id)
            referenced += 0 if part is None else part.block_count * BLOCK_SIZE
        return referenced

    async def account(self, device_ids: Collection[int] | None = None, also: Iterable[Snapshot] = ()) -> SpaceAccount:
        """Who holds which blocks in change logs, as it is now; what deleting any set of snapshots would free.

        With ``device_ids`` on these devices. ``also`` are deleted ones that are to be counted among those who hold.
        """
        for processor in self.processors:
            await processor.commit(processor.sound_portions())
        of_all: list[int] = []
        of_volumes: dict[VolumeId, list[int]] = {}
        for snapshot in [*self.by_id.values(), *also]:
            if snapshot.volume_ids is None:
                of_all.append(snapshot.instant)
            for volume_id in snapshot.volume_ids or ():
                of_volumes.setdefault(volume_id, []).append(snapshot.instant)
        return await account_of(self.processors, self._volumes.traits, of_all, of_volumes, self._span_of, device_ids)

    def _span_of(self, volume_id: VolumeId) -> VolumeSpan:
        facts = self._volumes.facts_of(volume_id)
        return VolumeSpan(facts.birth_epoch, facts.last_instant)

    # -- names -------------------------------------------------------------------------------

    async def rename(self, old: bytes, new: bytes, *, by_kernel: bool = False) -> None:
        """Give a snapshot another name, durably. Raises NotFoundError, ExistsError, BadNameError.

        ``by_kernel``: it asked for it, and sees to the name itself.
        """
        check_name(new, "snapshot")
        async with self.lock:
            snapshot = self.get(old)
            if old == new:
                return
            self._check_free(new)
            batch = CatalogBatch(renamed_snapshots=[(snapshot.snapshot_id, new)])
            await self._catalog.save([], lambda: batch)
            del self.by_name[old]
            snapshot.name = new
            self.by_name[new] = snapshot
            self.names_changed_ns = time.time_ns()
            self._events.note("snapshot-renamed", name=show_name(old), to=show_name(new))
        if not by_kernel:
            await self.forget_name(old)

    async def delete(self, name: bytes, *, by_kernel: bool = False) -> Snapshot:
        """Delete a snapshot: its name is gone, durably, and its space comes back in the background.

        Files of it that are open stay readable until they are closed. Works on a full device.
        ``by_kernel``: it asked for it, and sees to the name itself.
        Raises NotFoundError, HeldError.
        """
        async with self.lock:
            snapshot = self.get(name)
            await self._delete(snapshot, name)
        if not by_kernel:
            await self.forget_name(name)
        return snapshot

    async def delete_this(self, snapshot: Snapshot) -> None:
        """Like :meth:`delete`, of a snapshot that was chosen, by whatever name it has by now."""
        async with self.lock:
            if snapshot.snapshot_id not in self.by_id or snapshot.name is None:
                raise NotFoundError("the snapshot is deleted already")
            name = snapshot.name
            await self._delete(snapshot, name)
        await self.forget_name(name)

    async def _delete(self, snapshot: Snapshot, name: bytes) -> None:
        check_not_held(snapshot)
        restoring = [one for one in self._volumes.by_name.values() if self._volumes.is_restoring(one)]
        instants = [self._volumes.traits.get(one.volume_id).restore_instant for one in restoring]
        if snapshot.instant in instants:
            raise HeldError(
                f"a rollback to snapshot {show_name(name)!r} is not finished", "Unmount and mount, to finish it"
            )
        batch = CatalogBatch(renamed_snapshots=[(snapshot.snapshot_id, None)])
        await self._reserve.helped(lambda: self._catalog.save([], lambda: batch))
        del self.by_name[name]
        del self.by_id[snapshot.snapshot_id]
        self.names_changed_ns = time.time_ns()
        self._members.pop(snapshot.snapshot_id, None)
        self.deleted[snapshot.snapshot_id] = snapshot
        self._events.note("snapshot-deleted", name=show_name(name))
        self._reclaim_wakeup.set()

    # -- holds -------------------------------------------------------------------------------

    async def hold(self, name: bytes, tag: str) -> None:
        """Keep a snapshot from being deleted until the tag is released, durably. Raises ExistsError, NotFoundError."""
        check_tag(tag)
        async with self.lock:
            snapshot = self.get(name)
            if tag in snapshot.hold_tags:
                raise ExistsError(f"{tag!r} holds snapshot {show_name(name)!r} already", "Choose another tag")
            await self._catalog.save([], lambda: CatalogBatch(holds=[(snapshot.snapshot_id, tag)]))
            snapshot.hold_tags |= {tag}
            self._events.note("snapshot-held", name=show_name(name), tag=tag)

    async def release(self, name: bytes, tag: str) -> None:
        """Take a tag away, durably. Raises NotFoundError."""
        async with self.lock:
            snapshot = self.get(name)
            if tag not in snapshot.hold_tags:
                raise NotFoundError(
                    f"{tag!r} does not hold snapshot {show_name(name)!r}",
                    f"Its tags: {', '.join(sorted(snapshot.hold_tags)) or 'none'}",
                )
            await self._catalog.save([], lambda: CatalogBatch(dropped_holds=[(snapshot.snapshot_id, tag)]))
            snapshot.hold_tags -= {tag}
            self._events.note("snapshot-released", name=show_name(name), tag=tag)


def _check_stall(cut: _Cut) -> None:
    """Raises StallError when a snapshot held things up for longer than was allowed."""
    longest_ms = max(cut.row.stall_ns, cut.row.frozen_ns) / 1e6
    if cut.max_stall_ms is not None and longest_ms > cut.max_stall_ms:
        raise StallError(
            f"the snapshot held things up for {longest_ms:.3f} ms, and {cut.max_stall_ms:g} ms were allowed",
            "No snapshot was made. Try again, or allow more with max-stall",
        )


def check_not_held(snapshot: Snapshot) -> None:
    """Raises HeldError, with the tags, when something holds a snapshot."""
    if snapshot.hold_tags:
        raise HeldError(
            f"snapshot {show_name(snapshot.name or b'')!r} is held by {', '.join(sorted(snapshot.hold_tags))}",
            "Release each tag first, with snapfs release",
        )
