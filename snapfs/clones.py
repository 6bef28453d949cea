"""Going sideways and back: writable clones of what a snapshot holds, and rollbacks.

A clone is made at once, whatever its size: a volume without maps of its own, whose objects are its
origin's as that stood at the snapshot, until they are written. A rollback is a snapshot of the
present and, in the same commit of the catalog, such a clone in the place of each volume.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import trio

from .errors import BusyVolumeError, ExistsError, NotFoundError, SnapfsError, StaleVolumeError, UnsupportedError
from .events import EventLog
from .formats import COPY_ON_WRITE, Attributes, CatalogBatch, ShardBatch, VolumeRow, VolumeTraits
from .geometry import BLOCK_SHIFT, Epoch, VolumeId
from .jobs import Job, Jobs
from .notresident import NotResidentError, OldBlocks, when_resident
from .portion import Portion, Segment
from .processor import Processor
from .reclaimer import Reclaimer
from .restoring import Restorer
from .sealedfile import DamagedBlockError
from .snapshot import Snapshot, SnapshotMembers
from .snapshots import SnapshotTable
from .tasks import until_memory
from .units import check_name, show_name, utc_name
from .volume import Volume
from .volumes import VolumeTable

BeforeRollback = Callable[[Sequence[Volume]], Awaitable[None]]
AfterRollback = Callable[[Sequence[VolumeId]], Awaitable[dict[VolumeId, str]]]
_CLOSING_S = 2.0
_FLATTEN_BATCH = 256
# Read together.
_LOT_BLOCKS = 256
# First block, block count, change log.
_Run = tuple[int, int, int]


async def nothing_before_rollback(volumes: Sequence[Volume]) -> None:
    """Without a mount nothing keeps any from being rolled back."""


async def nothing_after_rollback(file_ids: Sequence[VolumeId]) -> dict[VolumeId, str]:
    """Without a mount nobody has pages of them."""
    return {}


@dataclass(frozen=True, slots=True)
class _Target:
    """A volume to be rolled back, None for one that is gone, and what it is to be."""

    volume: Volume | None
    source_id: VolumeId
    attributes: Attributes
    is_in_place: bool


@dataclass(frozen=True, slots=True)
class RolledBack:
    """What a rollback did: the snapshot that it kept of the present, and the volumes that went back, as named now."""

    undo: Snapshot
    names: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class _Restore:
    """A volume to be put back in place, to what, and what does it."""

    volume: Volume
    attributes: Attributes
    restorer: Restorer


class Clones:
    """Makes clones, rolls back, and makes clones independent.

    ``after_rollback`` has whoever mounts drop what the kernel keeps of rolled back volumes, pages and sizes; it gives
    those for which that failed, with the reason, by their ids as files. Until it has, nobody is to open those in
    ``rolling_back``: their modes change; nor those in ``stale`` after that: they would write where the file of before
    ended. ``before_rollback`` raises what is known beforehand to keep it from that.
    """

    def __init__(
        self,
        volumes: VolumeTable,
        snapshots: SnapshotTable,
        processors: Sequence[Processor],
        reclaimer: Reclaimer,
        events: EventLog,
        jobs: Jobs,
    ) -> None:
        self.before_rollback: BeforeRollback = nothing_before_rollback
        self.after_rollback: AfterRollback = nothing_after_rollback
        self.rolling_back: set[Volume] = set()
        self.stale: dict[VolumeId, str] = {}
        self._volumes = volumes
        self._snapshots = snapshots
        self._processors = processors
        self._reclaimer = reclaimer
        self._events = events
        self._jobs = jobs

    # -- clones ------------------------------------------------------------------------------

    async def clone(self, snapshot_name: bytes, volume_name: bytes, new_name: bytes) -> Volume:
        """Make a writable volume of what a snapshot holds of one; it is durable.

        Takes mode and owner from there. Raises NotFoundError, ExistsError, BadNameError, NoSpaceError.
        """
        check_name(new_name, "volume")
        with trio.CancelScope(shield=True):
            # The lock keeps the snapshot there until the clone is known to need it.
            async with self._snapshots.lock:
                snapshot = self._snapshots.get(snapshot_name)
                members = await self._snapshots.members(snapshot)
                source_id, attributes = members.get(volume_name)
                volume = await self._volumes.create_as(
                    attributes._replace(name=new_name, ctime_ns=time.time_ns()),
                    lambda volume_id: self._traits(volume_id, volume_id, source_id, snapshot),
                    partial(self._note_counts, source_id, snapshot.instant),
                    snapshot.instant,
                )
        self._events.note("cloned", name=show_name(new_name), of=f"{show_name(snapshot_name)}/{show_name(volume_name)}")
        return volume

    def _traits(self, volume_id: VolumeId, file_id: VolumeId, source_id: VolumeId, snapshot: Snapshot) -> VolumeTraits:
        return VolumeTraits(
            volume_id,
            file_id,
            origin_id=source_id,
            origin_instant=snapshot.instant,
            origin_snapshot_id=snapshot.snapshot_id,
            inherits=1,
            changelog_id=self._volumes.traits.get(source_id).changelog_id,
        )

    async def _note_counts(self, source_id: VolumeId, instant: int, volume_id: VolumeId) -> None:
        """Have each processor count what the clone inherits, durably, before the clone is."""
        for processor in self._processors:
            portion = processor.portions.get(source_id)
            if portion is not None and portion.failure is None:
                # The log that tells the count of then may not be stored yet.
                await processor.commit([portion])
            store = processor.access.store
            stored = await processor.access.ask(store.live_count_at, source_id, instant)
            count = processor.block_count_at(source_id, instant, stored)
            if count:
                await processor.commit([], ShardBatch(portions=[(volume_id, count)]))
                processor.tally.add(volume_id, count)

    # -- rollback ----------------------------------------------------------------------------

    async def rollback(
        self, snapshot_name: bytes, volume_names: Iterable[bytes] | None = None, *, force: bool = False
    ) -> RolledBack:
        """Put the volumes named, or all that the snapshot holds (None), back to what they were; durable.

        All at one instant, or none; but when a copy-on-write volume cannot be put back, redirecting ones are
        by then, and a rollback to the snapshot of the present brings them forth again. The present is kept as
        a snapshot; newer snapshots stay; volumes that were made later stay as they are, those
        removed since come back. A copy-on-write volume is restored in place, which takes as long as copying what
        changed, and nobody reads or writes it meanwhile. One that was renamed since keeps the name it has; named
        itself it is refused, for what has the name now, if anything, is something else. Raises NotFoundError;
        BusyVolumeError when one is open, without ``force``; ExistsError when the name of one that is to come back is
        taken; StaleVolumeError when all is done, but the kernel keeps what one was.
        """
        with trio.CancelScope(shield=True):
            async with self._snapshots.lock:
                snapshot = self._snapshots.get(snapshot_name)
                members = await self._snapshots.members(snapshot)
                wanted = list(members.by_name if volume_names is None else dict.fromkeys(volume_names))
                is_named = volume_names is not None
                targets = [self._target(*members.get(name), is_named=is_named) for name in wanted]
                volumes = [target.volume for target in targets if target.volume is not None]
                # Of those too that are gone: the kernel may still keep pages of the file that comes back.
                file_ids = [self._volumes.traits.get(target.source_id).file_id for target in targets]
                self.rolling_back.update(volumes)
                try:
                    await self.before_rollback(volumes)
                    if not force:
                        await self._wait_until_closed(volumes)
                    await self._snapshots.before_cut(volumes)
                    try:
                        done = await self._replace(snapshot, members, wanted, is_named=is_named, force=force)
                    finally:
                        # Also when one could not be put back: others may have been.
                        await self._refresh(file_ids)
                finally:
                    self.rolling_back.difference_update(volumes)
        self._events.note(
            "rolled-back",
            to=show_name(snapshot_name),
            volumes=[show_name(name) for name in done.names],
            undo=show_name(done.undo.name or b""),
        )
        self._check_fresh(file_ids, done)
        return done

    async def _refresh(self, file_ids: Sequence[VolumeId]) -> None:
        failed = await self.after_rollback(file_ids)
        for file_id in file_ids:
            self.stale.pop(file_id, None)
        self.stale.update(failed)

    async def mend_stale(self) -> bool:
        """Try once more to have the kernel drop what it keeps of volumes of which it did not; whether none is left.

        What kept it from that may be over: a lease that a program had, a mount that was elsewhere.
        """
        async with self._snapshots.lock:
            # One by one: each is as it is then, and none keeps the others from it.
            for file_id in tuple(self.stale):
                await self._refresh((file_id,))
        return not self.stale

    def _check_fresh(self, file_ids: Sequence[VolumeId], done: RolledBack) -> None:
        stale = [(name, self.stale[one]) for name, one in zip(done.names, file_ids, strict=True) if one in self.stale]
        if stale:
            undo = show_name(done.undo.name or b"")
            raise StaleVolumeError(
                f"all is rolled back, and the present kept as {undo!r};"
                f" but the kernel keeps the size that {show_name(stale[0][0])!r} had ({stale[0][1]})",
                "That is tried again, or unmount and mount; until it is done it cannot be opened, and whoever has it"
                " open must not write to it",
            )

    def _target(self, source_id: VolumeId, attributes: Attributes, *, is_named: bool) -> _Target:
        volume = self._volumes.by_file_id.get(self._volumes.traits.get(source_id).file_id)
        if volume is not None and volume.is_removed:
            volume = None
        if is_named and volume is not None and volume.name != attributes.name:
            raise NotFoundError(
                f"the volume that was {show_name(attributes.name)!r} in the snapshot is {show_name(volume.name)!r} now",
                "Rename it back, and then roll back, or clone it from the snapshot",
            )
        if volume is None and attributes.name in self._volumes.by_name:
            raise ExistsError(
                f"another volume has the name {show_name(attributes.name)!r} now",
                "Rename that one, then try again; or clone what the snapshot has",
            )
        if volume is not None:
            self._volumes.check_whole([volume])
        is_in_place = self._volumes.traits.get(source_id).change_mode == COPY_ON_WRITE
        if is_in_place and (volume is None or volume.volume_id != source_id):
            raise UnsupportedError(
                f"volume {show_name(attributes.name)!r} is copy-on-write, and was removed",
                "Clone the snapshot instead: snapfs clone",
            )
        return _Target(volume, source_id, attributes, is_in_place)

    async def _wait_until_closed(self, volumes: Sequence[Volume]) -> None:
        """A close may still be on its way. Raises BusyVolumeError for a volume that stays open."""
        with trio.move_on_after(_CLOSING_S):
            for volume in volumes:
                await self._volumes.wait_until_closed(volume)
        for volume in volumes:
            if volume.opens:
                raise BusyVolumeError(
                    f"volume {show_name(volume.name)!r} is open",
                    "Close what uses it, or force the rollback: its users then see other contents at once",
                )

    async def _replace(
        self, snapshot: Snapshot, members: SnapshotMembers, wanted: Sequence[bytes], *, is_named: bool, force: bool
    ) -> RolledBack:
        """The present as a snapshot, and the volumes as they were, in one commit."""
        async with AsyncExitStack() as stack:
            # In this order: a truncate trims while it has the lock of the volumes.
            await stack.enter_async_context(self._volumes.lock)
            # One may have been removed meanwhile, or its name been taken.
            targets = [self._target(*members.get(name), is_named=is_named) for name in wanted]
            names = [one.attributes.name if one.volume is None else one.volume.name for one in targets]
            volumes = [target.volume for target in targets if target.volume is not None]
            for volume in volumes:
                await stack.enter_async_context(volume.kept_from_trimming())
            if not force:
                # One may have been opened meanwhile.
                for volume in volumes:
                    if volume.opens:
                        raise BusyVolumeError(f"volume {show_name(volume.name)!r} is open", "Close what uses it")
            await stack.enter_async_context(_writers_held(volumes))
            in_place = [target for target in targets if target.is_in_place]
            targets = [target for target in targets if not target.is_in_place]
            rows = [self._row_after(target, snapshot) for target in targets]
            traits = [
                self._traits(
                    row.volume_id,
                    self._file_id_after(target, row),
                    target.source_id,
                    snapshot,
                )
                for target, row in zip(targets, rows, strict=True)
            ]
            traits = [
                one if target.volume is None else one._replace(changelog_id=self._changelog_of(target.volume))
                for one, target in zip(traits, targets, strict=True)
            ]
            try:
                for target, row in zip(targets, rows, strict=True):
                    await self._note_counts(target.source_id, snapshot.instant, row.volume_id)
                for one in traits:
                    self._volumes.traits.put(one)
                restores = [
                    _Restore(target.volume, target.attributes, self._restorer(target.volume))
                    for target in in_place
                    if target.volume is not None
                ]
                undo = await self._commit(snapshot, volumes, rows, traits, restores)
            except BaseException:
                for one in traits:
                    self._volumes.traits.drop(one.volume_id)
                await self._volumes.forget_counts(one.volume_id for one in traits)
                raise
            for target, row in zip(targets, rows, strict=True):
                # It is durable: whoever writes now must write to what it is.
                await until_memory(partial(self._volumes.take_back, target.volume, row, Epoch(undo.instant + 1)))
            await self._restore(restores, snapshot.instant, undo)
        return RolledBack(undo, names)

    def _restorer(self, volume: Volume) -> Restorer:
        return Restorer(volume, self._processors, self._events)

    async def _restore(self, restores: Sequence[_Restore], instant: int, undo: Snapshot) -> None:
        """Put volumes that are written in place back: all of them, or none when one cannot be.

        They are marked as being restored by the commit that published ``undo``. All marks change in one commit:
        when all are copied; or, when one cannot be, before any is put back to the present. None opens before that.
        """
        presents = {one.volume: one.volume.attributes() for one in restores}
        with self._jobs.running("rollback", "what was preserved", 0) as job:
            try:
                for one in restores:
                    await one.restorer.copy_back(instant, one.attributes.size_bytes, job)
                await self._settle([(one, one.attributes) for one in restores])
            except BaseException as error:
                await self._put_presents_back(restores, presents, undo, error, job)
                raise
        self._reclaimer.wake()

    async def _put_presents_back(
        self,
        restores: Sequence[_Restore],
        presents: dict[Volume, Attributes],
        undo: Snapshot,
        error: BaseException,
        job: Job,
    ) -> None:
        if not isinstance(error, SnapfsError | OSError):
            for one in restores:
                one.restorer.give_up(error)
            return
        done = []
        try:
            await self._mark(restores, undo.instant)
            for one in restores:
                try:
                    await one.restorer.copy_back(undo.instant, presents[one.volume].size_bytes, job)
                except (SnapfsError, OSError) as worse:
                    one.restorer.give_up(worse)
                else:
                    done.append((one, presents[one.volume]))
            await self._settle(done)
        except (SnapfsError, OSError) as worse:
            for one in restores:
                one.restorer.give_up(worse)

    async def _mark(self, restores: Sequence[_Restore], instant: int) -> None:
        """Note, in one commit, to which instant these volumes are being restored; 0 for none."""
        traits = self._volumes.traits
        rows = [traits.get(one.volume.volume_id)._replace(restore_instant=instant) for one in restores]
        await self._volumes.catalog.save([], lambda: CatalogBatch(traits=rows))
        for row in rows:
            traits.put(row)

    async def _settle(self, restored: Sequence[tuple[_Restore, Attributes]]) -> None:
        """These volumes are what they are to be, durably: give them their attributes, in one commit, and open them."""
        traits = self._volumes.traits
        rows = [traits.get(one.volume.volume_id)._replace(restore_instant=0) for one, _ in restored]
        for one, attributes in restored:
            one.volume.put_back(attributes)
        await self._volumes.catalog.save([one.volume for one, _ in restored], lambda: CatalogBatch(traits=rows))
        for row in rows:
            traits.put(row)
        for one, _ in restored:
            one.restorer.open_now()

    async def finish_restores(self) -> None:
        """After opening: finish rollbacks in place that were cut off. One that cannot be leaves its volume closed."""
        traits = self._volumes.traits
        marked = [one for one in traits.rows.values() if one.restore_instant]
        gone = [one._replace(restore_instant=0) for one in marked if one.volume_id not in self._volumes.by_id]
        if gone:
            await self._volumes.catalog.save([], lambda: CatalogBatch(traits=gone))
            for row in gone:
                traits.put(row)
        for row in marked:
            volume = self._volumes.by_id.get(row.volume_id)
            snapshot = self._snapshots.of_instant(row.restore_instant)
            if volume is None:
                continue
            restorer = self._restorer(volume)
            restorer.hold()
            restorer.close_now()
            attributes = None
            if snapshot is not None and traits.get(row.volume_id).change_mode == COPY_ON_WRITE:
                attributes = (await self._snapshots.members(snapshot)).by_id.get(row.volume_id)
            if attributes is None:
                restorer.give_up(SnapfsError("there is no snapshot that holds what it is to be"))
                continue
            try:
                with self._jobs.running("rollback", show_name(volume.name), 0) as job:
                    await restorer.copy_back(row.restore_instant, attributes.size_bytes, job)
                await self._settle([(_Restore(volume, attributes, restorer), attributes)])
            except (SnapfsError, OSError) as error:
                restorer.give_up(error)
            else:
                self._events.note("rollback-finished", volume=show_name(volume.name))

    def give_up_restores(self) -> None:
        """Of a pool that is only read: volumes whose rollback in place was cut off stay closed."""
        for row in self._volumes.traits.rows.values():
            volume = self._volumes.by_id.get(row.volume_id)
            if row.restore_instant and volume is not None:
                restorer = self._restorer(volume)
                restorer.hold()
                restorer.close_now()
                restorer.give_up(SnapfsError("the pool is only read"))

    def _file_id_after(self, target: _Target, row: VolumeRow) -> VolumeId:
        """A file stays itself; one that comes back is again what it was, unless somebody has the removed one open."""
        if target.volume is not None:
            return target.volume.file_id
        before = self._volumes.traits.get(target.source_id).file_id
        return row.volume_id if before in self._volumes.by_file_id else before

    def _changelog_of(self, volume: Volume) -> int:
        return self._volumes.traits.get(volume.volume_id).changelog_id

    def _row_after(self, target: _Target, snapshot: Snapshot) -> VolumeRow:
        name = target.attributes.name if target.volume is None else target.volume.name
        row = self._volumes.new_row(target.attributes._replace(name=name, ctime_ns=time.time_ns()), snapshot.instant)
        return row if target.volume is None else row._replace(created_ns=target.volume.created_ns)

    async def _commit(
        self,
        snapshot: Snapshot,
        volumes: list[Volume],
        rows: list[VolumeRow],
        traits: list[VolumeTraits],
        restores: Sequence[_Restore],
    ) -> Snapshot:
        kept = [one.volume for one in restores]

        def change(batch: CatalogBatch, instant: int) -> None:
            for volume in volumes:
                if volume not in kept:
                    self._volumes.add_removal(batch, volume)
            for volume in kept:
                batch.traits.append(
                    self._volumes.traits.get(volume.volume_id)._replace(restore_instant=snapshot.instant)
                )
            batch.volumes += rows
            batch.traits += traits
            batch.meta["next_volume_id"] = self._volumes.next_volume_id

        name = self._snapshots.unused_name(utc_name(time.time_ns()).encode() + b"-before-rollback")
        # A note is text, and a name may be any bytes.
        note = f"before the rollback to {(snapshot.name or b'').decode(errors='backslashreplace')}"
        with _held(restores):
            undo = await self._snapshots.create_before(name, volumes, note, change, kept)
            for one in restores:
                one.restorer.close_now()
        for volume in kept:
            # It is durable, whatever becomes of this.
            await until_memory(partial(self._note_restoring, volume, snapshot.instant))
        return undo

    def _note_restoring(self, volume: Volume, instant: int) -> None:
        traits = self._volumes.traits
        traits.put(traits.get(volume.volume_id)._replace(restore_instant=instant))

    # -- independence ------------------------------------------------------------------------

    async def flatten(self, volume_name: bytes, job_name: str = "") -> int:
        """Copy what a clone shares into change logs of its own; how many bytes.

        It may be in use meanwhile. Stopped halfway, what is done is done. Raises NotFoundError,
        NoSpaceError, BusyVolumeError when it is rolled back meanwhile.
        """
        async with self._volumes.opened(volume_name) as volume:
            volume_id = volume.volume_id
            if self._volumes.traits.get(volume_id).change_mode == COPY_ON_WRITE:
                return 0
            total = volume.block_count << BLOCK_SHIFT
            with self._jobs.stoppable("flatten", show_name(volume_name), total, job_name) as job:
                for processor in self._processors:
                    await _Flattening(volume, processor, job).run()
            await volume.sync()
            if self._volumes.traits.get(volume_id).inherits:
                await self._reclaimer.stop_inheriting(volume_id)
        self._events.note("flattened", name=show_name(volume_name), copied_bytes=job.done)
        self._reclaimer.wake()
        return job.done


@contextmanager
def _held(restores: Sequence[_Restore]) -> Iterator[None]:
    """All that may fail of closing these volumes is done before; it is undone if what is done inside fails."""
    held_count = 0
    try:
        for one in restores:
            one.restorer.hold()
            held_count += 1
        yield
    except BaseException:
        for one in restores[:held_count]:
            one.restorer.let_go()
        raise


@asynccontextmanager
async def _writers_held(volumes: Sequence[Volume]) -> AsyncIterator[None]:
    """Writers of these volumes wait inside."""
    releases: list[Callable[[], None]] = []
    try:
        for volume in volumes:
            releases.append(volume.hold_writers())
        yield
    finally:
        for release in releases:
            release()


class _Flattening:
    """One processor's part of a clone being made independent, for as long as it is that volume."""

    def __init__(self, volume: Volume, processor: Processor, job: Job) -> None:
        self._volume = volume
        self._volume_id = volume.volume_id
        self._processor = processor
        self._job = job

    async def run(self) -> None:
        """Copy, object by object."""
        from_object = 0
        while objects := await self._processor.mapped_objects(self._volume_id, from_object, _FLATTEN_BATCH):
            for object_index in objects:
                await self._copy_object(object_index)
            await self._processor.commit([await when_resident(lambda _: self._portion_now())])
            from_object = objects[-1] + 1

    def _portion_now(self) -> Portion:
        """The portion to be written to, until the next await. Raises BusyVolumeError after a rollback."""
        if self._volume.volume_id != self._volume_id:
            raise BusyVolumeError(f"volume {show_name(self._volume.name)!r} was rolled back meanwhile", "Try again")
        self._volume.check_writers_now()
        return self._volume.portions[self._processor.index]

    async def _copy_object(self, object_index: int) -> None:
        old_blocks: OldBlocks = {}
        while True:
            try:
                portion = self._portion_now()
                runs = portion.shared_runs_now(object_index)
                if not runs:
                    # One of which nothing was copied is still to get a map of its own.
                    portion.settle_now(object_index)
                    return
                for some in _short_lots(runs):
                    await self._copy_runs(object_index, some, old_blocks)
            except NotResidentError as missing:
                await missing.fetch(old_blocks)

    async def _copy_runs(self, object_index: int, runs: list[_Run], old_blocks: OldBlocks) -> None:
        portion = self._portion_now()
        buffer = memoryview(bytearray(sum(count for _, count, _ in runs) << BLOCK_SHIFT))
        places = [0, *accumulate(count << BLOCK_SHIFT for _, count, _ in runs)]
        segments: list[Segment] = []
        for (block, count, log_id), place in zip(runs, places, strict=False):
            inside, length = block << BLOCK_SHIFT, count << BLOCK_SHIFT
            segments += portion.segments(log_id, object_index, inside, length, place)
        try:
            await portion.read_segments(segments, buffer)
        except DamagedBlockError as damage:
            if len(runs) > 1:
                # Each by itself: the sound ones are copied.
                for run in runs:
                    await self._copy_runs(object_index, [run], old_blocks)
                return
            if self._portion_now().names_now(damage):
                portion.report(damage)
                raise
            # Written anew meanwhile, and freed where it was.
            return
        # Logs of others do not change, so what was read holds for the blocks that still lie there.
        portion = self._portion_now()
        for (block, count, log_id), place in zip(runs, places, strict=False):
            for first, length, same in portion.runs_now(object_index, block, block + count):
                if same == log_id:
                    at = place + ((first - block) << BLOCK_SHIFT)
                    data = buffer[at : at + (length << BLOCK_SHIFT)]
                    portion.write_now(object_index, first << BLOCK_SHIFT, data, old_blocks)
                    self._job.done += len(data)


def _short_lots(runs: Sequence[_Run]) -> Iterator[list[_Run]]:
    """Runs in order, some at a time that are read together."""
    lot: list[_Run] = []
    block_count = 0
    for run in runs:
        if lot and block_count + run[1] > _LOT_BLOCKS:
            yield lot
            lot, block_count = [], 0
        lot.append(run)
        block_count += run[1]
    if lot:
        yield lot
