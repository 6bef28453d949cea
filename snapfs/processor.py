"""A processor: a task that owns a shard, every object placed on it with its maps and change logs.

Requests do not travel to the task. They call the portions' methods directly, which run without an
await; the task does the slow work: it commits when much is dirty, punches what was freed and takes
deleted snapshots apart.

What is durable in which order, at every commit: the data in the change logs and the logs' names;
then, in one transaction, the maps that name it (I5); then, outside, ranges that nothing names any
more are punched and files of empty logs removed (I8).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import trio

from .backends import Device
from .blockmasks import named_masks, objects_with_data
from .changelog import ChangeLog, ChangeLogs, in_use
from .cowportion import CowPortion
from .errors import DamagedError, NoMemoryError, SnapfsError, SyncFailedError
from .formats import CHANGE_LOG, COPY_ON_WRITE, SOURCE_LOG, FreedRow, IntermediateRow, LogRow, ShardBatch, log_id_of
from .geometry import BLOCK_SHIFT, Epoch, LogId, SnapshotId, VolumeId, object_count
from .liveness import SILENT, DeviceWatch
from .pending import PendingCalls
from .placement import Placement
from .portion import Neighbours, Portion, PortionChanges
from .prefetch import Prefetcher
from .reserve import Reserve
from .sealedfile import SumCache
from .shardstate import EpochClock, Residency, ShardAccess, Tally
from .shardstore import ShardStore
from .snapshotindex import NEVER, SnapshotIndex
from .tasks import Wakeup
from .traits import TraitsTable
from .writeback import EarlyWriteback

DIRTY_OBJECTS_MAX = 2048
COMMIT_CHECK_S = 1.0
_PUNCH_BATCH = 512


class _Punched(NamedTuple):
    """What came of a lot of ranges that were to be given back: how many, and the number of the last that failed."""

    row_count: int
    last_failed: int
    punched_count: int
    failure: OSError | None


class _DataSyncError(Exception):
    """The data of a volume could not be synced."""

    def __init__(self, volume_id: VolumeId, cause: OSError | SnapfsError) -> None:
        super().__init__(volume_id)
        self.volume_id = volume_id
        self.cause = cause


def _begin_writeback(logs: Iterable[ChangeLog]) -> None:
    for log in logs:
        with suppress(OSError):
            if log.file is not None:
                log.file.begin_writeback()


@dataclass(slots=True)
class _Commit:
    """A commit under way: the rows, and what they were made from."""

    batch: ShardBatch
    taken: list[tuple[Portion, PortionChanges]]
    catalog_generation: int
    dead_logs: list[ChangeLog] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PortionFacts:
    """What a processor has to know of a volume; see :class:`Portion`."""

    birth_epoch: int
    named_epoch: int
    last_instant: int = NEVER
    is_gone: bool = False


@dataclass(slots=True)
class ProcessorStatus:
    """Counts for status reports."""

    processor_index: int
    portion_count: int
    mapped_block_count: int
    dirty_object_count: int
    resident_object_count: int
    waiting_commit_count: int
    commit_count: int
    last_commit_ns: int
    last_commit_duration_ns: int
    epoch: int
    generation: int


class Processor:
    """One processor of a pool. ``run`` is its task; ``facts_of`` tells it what it must know of a volume."""

    def __init__(
        self,
        index: int,
        processor_count: int,
        store: ShardStore,
        devices: Mapping[int, Device],
        epoch: int,
        facts_of: Callable[[VolumeId], PortionFacts],
        traits: TraitsTable,
        placement: Placement,
        on_damage: Callable[[int, int, int, int], None],
        on_sync_failed: Callable[[VolumeId], None],
        pending: PendingCalls,
        watch: DeviceWatch,
        reserve: Reserve,
    ) -> None:
        self.index = index
        self.access = ShardAccess(store, pending)
        sums = SumCache(partial(self.access.ask, store.checksums), partial(on_damage, index), index, processor_count)
        self.logs = ChangeLogs(index, devices, placement, store.next_log_id, sums, watch, processor_count)
        self.sources = store.sources()
        self.snapshots = SnapshotIndex()
        self.clock = EpochClock(epoch)
        self.tally = Tally(store.block_counts())
        self.portions: dict[VolumeId, Portion] = {}
        self.commit_count = 0
        self.last_commit_ns = 0
        self.last_commit_duration_ns = 0
        self.processor_count = processor_count
        self.traits = traits
        self.facts_of = facts_of
        self._on_sync_failed = on_sync_failed
        self.writeback = EarlyWriteback(self.access.in_thread)
        prefetcher = Prefetcher(self.access, self.logs)
        self._neighbours = Neighbours(
            traits, Residency(), self.sources, self.borrowed, self._commit_one, self.writeback, prefetcher, reserve
        )
        self._wakeup = Wakeup()
        self._has_freed = True
        # Portions of removed volumes that were forgotten with what could not be synced: until which instant they were
        # there, and why. A snapshot that was cut before has lost something with them.
        self._lost: dict[VolumeId, tuple[int, SyncFailedError]] = {}
        # Those of which what was never stored is still to be given back.
        self.unsettled_ids: set[VolumeId] = set()

    # -- portions ----------------------------------------------------------------------------

    def portion(self, volume_id: VolumeId) -> Portion:
        """The volume's portion here; made if it is not in memory."""
        portion = self.portions.get(volume_id)
        if portion is None:
            facts = self.facts_of(volume_id)
            is_cow = self.traits.get(volume_id).change_mode == COPY_ON_WRITE
            # Of a lost store even its sources are not known; whatever is asked of it is an error.
            kind = CowPortion if is_cow and not self.access.store.is_lost else Portion
            portion = self.portions[volume_id] = kind(
                volume_id,
                self.access,
                self.logs,
                self.snapshots,
                self.clock,
                self.tally,
                self._neighbours,
                self.processor_count,
                birth_epoch=facts.birth_epoch,
                named_epoch=facts.named_epoch,
                last_instant=facts.last_instant,
                is_gone=facts.is_gone,
            )
        return portion

    @contextmanager
    def borrowed(self, volume_id: VolumeId) -> Iterator[Portion]:
        """The volume's portion here, in use until the block ends."""
        portion = self.portion(volume_id)
        portion.users += 1
        try:
            yield portion
        finally:
            portion.users -= 1
            self.let_go(portion)

    @property
    def is_short(self) -> bool:
        """Whether what room there is is kept for what gives some back; see :class:`Reserve`."""
        return self._neighbours.reserve.is_short

    def sound_portions(self) -> list[Portion]:
        """Those whose data could be synced; the others commit nothing more."""
        return [one for one in self.portions.values() if one.failure is None]

    async def begin_writeback(self, portion: Portion) -> None:
        """Have much that was written begin to go to its devices, while others may commit; it promises nothing."""
        logs = portion.dirty_logs()
        with in_use(logs), suppress(NoMemoryError):
            await self.access.in_thread(_begin_writeback, logs)

    async def _commit_one(self, portion: Portion) -> None:
        await self.commit([portion])

    async def add_source(self, volume_id: VolumeId, epoch: Epoch, kind: int) -> None:
        """Begin the log that stands for what a volume is to be written over, durably, before the volume is made."""
        row = await self.access.in_thread(self.logs.begin_source, self.logs.take_id(), volume_id, epoch, kind)
        await self.commit([], ShardBatch(logs=[row]))
        self.sources[volume_id] = row

    async def drop_source(self, volume_id: VolumeId) -> None:
        """Forget what a volume was written over, once nothing of the volume is left; a file in the pool goes."""
        row = self.sources.pop(volume_id, None)
        if row is None:
            return
        await self.commit([], ShardBatch(dropped_logs=[row.log_id]))
        log = self.logs.adopt(row)
        if row.kind == SOURCE_LOG:
            await self.remove_logs([log])
        else:
            self.logs.discard(log)

    async def until_answering(self, volume_id: VolumeId) -> None:
        """Wait until the devices answer that a change of a volume here would be written to."""
        portion = self.portions.get(volume_id)
        if portion is not None and portion.current_log is not None:
            await portion.current_log.liveness.renew()
        if volume_id in self.sources:
            await self.logs.adopt(self.sources[volume_id]).liveness.renew()
        for is_change in (False, True):
            await self.logs.liveness_for(volume_id, is_change=is_change).renew()

    async def changed_block_counts(self, epochs: Mapping[VolumeId, int]) -> dict[VolumeId, int]:
        """Blocks in the change logs that volumes began in these epochs or later: changed since their last snapshots."""
        stored = await self.access.ask(self.access.store.logs_since, epochs)
        counts = {row.log_id: (row.volume_id, row.epoch, row.block_count) for row in stored}
        for log in self.logs.known.values():
            if log.kind == CHANGE_LOG:
                counts[log.log_id] = (log.volume_id, log.epoch, log.block_count)
        found = dict.fromkeys(epochs, 0)
        for volume_id, epoch, count in counts.values():
            if volume_id in found and epoch >= epochs[volume_id]:
                found[volume_id] += count
        return found

    def source_block_count(self, volume_id: VolumeId) -> int:
        """Blocks that what a volume is written over takes, as far as its file is open or can be opened at once."""
        row = self.sources.get(volume_id)
        if row is None:
            return 0
        log = self.logs.adopt(row)
        if log.file is None and log.liveness.state == SILENT:
            return 0
        try:
            return self.logs.open_file(log).allocated() >> BLOCK_SHIFT
        except (OSError, SnapfsError):
            return 0

    async def source_extents(self, volume_id: VolumeId) -> list[tuple[int, int]]:
        """Ranges of what a volume is written over that hold data, in the layout of a change log."""
        log = self.logs.adopt(self.sources[volume_id])
        with in_use([log]):
            await log.liveness.renew()
            return await self.access.in_thread(self.logs.open_file(log).data_extents)

    async def mapped_objects(self, volume_id: VolumeId, from_object: int, limit: int, *, own: bool = True) -> list[int]:
        """Up to ``limit`` objects, from one on, of which the volume or an ancestor may map something, in order.

        Without ``own`` those of which only the volume itself has a map are left out.
        """
        ancestors = [one.volume_id for one in self.traits.ancestors(volume_id)]
        ids = [volume_id, *ancestors] if own else ancestors
        found = await self.access.ask(self.access.store.objects_from, ids, from_object, limit)
        root = ancestors[-1] if ancestors else volume_id
        if root not in self.sources:
            return found
        traits = self.traits.get(root)
        if traits.change_mode == COPY_ON_WRITE:
            extents = await self.source_extents(root)
            objects = [one for one, _ in objects_with_data(extents, self.index, self.processor_count)]
            based = [one for one in objects if one >= from_object][:limit]
        else:
            first = from_object + (self.index - from_object) % self.processor_count
            based = list(range(first, object_count(traits.source_size_bytes), self.processor_count))[:limit]
        return sorted({*found, *based})[:limit]

    def let_go(self, portion: Portion) -> None:
        """Forget a portion that nobody uses, if it is clean and sound."""
        is_lost = portion.failure is not None and portion.last_instant != NEVER
        is_clean = portion.failure is None and not portion.is_dirty and not portion.pending
        if portion.users == 0 and (is_clean or is_lost):
            if portion.failure is not None:
                self._lost[portion.volume_id] = portion.last_instant, portion.failure
                self.unsettled_ids.add(portion.volume_id)
            portion.release()
            if self.portions.get(portion.volume_id) is portion:
                del self.portions[portion.volume_id]

    # -- the task ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Commit when much is dirty, and punch what is free; until cancelled."""
        while True:
            with trio.move_on_after(COMMIT_CHECK_S):
                await self._wakeup.wait()
            try:
                portions = self.sound_portions()
                if sum(portion.dirty_object_count for portion in portions) >= DIRTY_OBJECTS_MAX:
                    await self.commit(portions)
                if self._has_freed:
                    await self.punch_freed()
            except (SnapfsError, OSError):
                # Whoever waits for the data learns of it from its own sync; it is tried again.
                continue

    def wake(self) -> None:
        """Have the task look for work now."""
        self._wakeup.set()

    # -- snapshots ---------------------------------------------------------------------------

    def cut(self, snapshot_id: SnapshotId, instant: int, volume_ids: Collection[VolumeId] | None) -> IntermediateRow:
        """Begin a new epoch after ``instant``. Runs without an await; costs the same at every size.

        Gives the intermediate snapshot, still to be prepared.
        """
        # Nothing is cut while another snapshot is still to be prepared.
        self._lost.clear()
        self.snapshots.add(instant, volume_ids)
        if volume_ids is None:
            self.clock.epoch = instant + 1
            block_count = self.tally.total
            portion_count = len(self.tally.counts)
        else:
            block_count = portion_count = 0
            for volume_id in volume_ids:
                count = self.tally.counts.get(volume_id, 0)
                block_count += count
                portion_count += count > 0
                portion = self.portions.get(volume_id)
                if portion is not None:
                    portion.name_snapshot(instant + 1)
        return IntermediateRow(
            snapshot_id,
            Epoch(instant),
            time.time_ns(),
            block_count,
            portion_count,
            LogId(self.logs.next_log_id),
        )

    async def prepare(
        self, row: IntermediateRow, volume_ids: Collection[VolumeId] | None, catalog_generation: int
    ) -> int:
        """Make everything of before the cut durable, with the intermediate snapshot.

        Gives the nanoseconds for which that kept all else from running. Raises what :meth:`commit` does.
        """
        if volume_ids is None:
            portions: Iterable[Portion] = self.portions.values()
        else:
            portions = [self.portions[one] for one in volume_ids if one in self.portions]
        return await self.commit(portions, ShardBatch(intermediates=[row]), catalog_generation)

    # -- committing --------------------------------------------------------------------------

    async def commit(
        self,
        portions: Iterable[Portion] | None = None,
        batch: ShardBatch | None = None,
        catalog_generation: int | None = None,
    ) -> int:
        """Make the dirty state of these portions (all: None) durable, with the rows of ``batch``.

        Gives the nanoseconds for which nothing else could run. Raises SyncFailedError when data could
        not be synced, NoSpaceError when the store's device
        is full (nothing is lost then; it is tried again at the next commit).
        """
        lock = self.access.commit_lock
        stall_ns = 0
        with trio.CancelScope(shield=True):
            try:
                # A free lock without a turn of the scheduler, which costs as much as the rest of it.
                lock.acquire_nowait()
            except trio.WouldBlock:
                await lock.acquire()
            try:
                stall_ns = await self.commit_locked(portions, batch, catalog_generation)
            finally:
                lock.release()
        return stall_ns

    async def commit_locked(
        self,
        portions: Iterable[Portion] | None = None,
        batch: ShardBatch | None = None,
        catalog_generation: int | None = None,
    ) -> int:
        """Like :meth:`commit`, by a holder of the commit lock, shielded from cancellation."""
        began = time.perf_counter_ns()
        commit = self._begin_commit(portions, batch, catalog_generation)
        try:
            started = time.perf_counter_ns()
            if not commit.taken and not commit.batch:
                return started - began
            # Data first, then the maps that name it. While the data's device takes its time, the store answers.
            syncing = [log for _, changes in commit.taken for log in changes.logs_to_sync]
            if syncing:
                with in_use(syncing):
                    await self.access.in_thread(self._sync_data, commit)
            if commit.batch:
                await self.access.ask(self._write_maps, commit)
        except _DataSyncError as failed:
            self._fail_commit(commit, failed.cause, failed.volume_id)
            raise self.portions[failed.volume_id].failure or failed.cause from failed.cause
        except BaseException as error:
            self._fail_commit(commit, error, None)
            raise
        self._end_commit(commit)
        self.commit_count += 1
        self.last_commit_ns = time.time_ns()
        self.last_commit_duration_ns = time.perf_counter_ns() - started
        if commit.dead_logs:
            await self.remove_logs(commit.dead_logs)
        return started - began

    def _begin_commit(
        self, portions: Iterable[Portion] | None, batch: ShardBatch | None, catalog_generation: int | None
    ) -> _Commit:
        store = self.access.store
        rows = batch if batch is not None else ShardBatch()
        if catalog_generation is None:
            catalog_generation = store.catalog_generation
        commit = _Commit(rows, [], catalog_generation)
        chosen = list(self.portions.values()) if portions is None else list(portions)
        self._check_synced(chosen, rows.intermediates)
        try:
            self._take_changes(commit, chosen)
            if rows:
                rows.next_log_id = LogId(self.logs.next_log_id)
                rows.epoch = Epoch(self.clock.epoch)
        except BaseException as error:
            # There may be no memory for all of it: what was taken is still to be committed.
            self._fail_commit(commit, error, None)
            raise
        return commit

    def _check_synced(self, portions: Iterable[Portion], intermediates: Iterable[IntermediateRow]) -> None:
        """Raises SyncFailedError when what is to be committed could not be synced.

        Of a removed volume that matters to a snapshot alone that was cut before, also when it is forgotten by now.
        """
        needed_at = min((one.instant for one in intermediates), default=NEVER)
        failures = [one.failure for one in portions if one.failure is not None and one.last_instant >= needed_at]
        for volume_id, (last_instant, failure) in self._lost.items():
            if last_instant >= needed_at and self.snapshots.holds(volume_id, needed_at, needed_at):
                failures.append(failure)
        for failure in failures:
            raise type(failure)(failure.reason, failure.fix)

    def _take_changes(self, commit: _Commit, portions: list[Portion]) -> None:
        rows = commit.batch
        for portion in portions:
            if not portion.is_dirty or portion.failure is not None:
                continue
            changes = portion.changes()
            commit.taken.append((portion, changes))
            portion.take(changes)
            rows.maps += changes.maps
            rows.copies += changes.copies
            rows.dropped_copies += [(portion.volume_id, *one) for one in changes.dropped_copies]  # type: ignore[misc]
            dead = {log.log_id for log in changes.changed_logs.values() if self._is_dead(log)}
            for log in changes.changed_logs.values():
                if log.log_id in dead:
                    commit.dead_logs.append(log)
                    rows.dropped_sums.append(log.log_id)
                    if not self.snapshots.holds(log.volume_id, 0, log.epoch - 1):
                        rows.dropped_logs.append(log.log_id)
                        continue
                rows.logs.append(log.row())
            rows.freed += [row for row in changes.freed if row.log_id not in dead]
            rows.candidates += changes.candidates
            if changes.count_changed:
                rows.portions.append((portion.volume_id, self.tally.counts.get(portion.volume_id, 0)))

    def _is_dead(self, log: ChangeLog) -> bool:
        """Nothing names a block of it, and it takes no more writes."""
        return log.block_count == 0 and log.sealed != 0 and not log.pins

    def _sync_data(self, commit: _Commit) -> None:
        dead = {log.log_id for log in commit.dead_logs}
        for portion, changes in commit.taken:
            logs = [log for log in changes.logs_to_sync if log.log_id not in dead]
            try:
                self.logs.sync(logs)
            except (OSError, SnapfsError) as error:
                raise _DataSyncError(portion.volume_id, error) from error

    def _write_maps(self, commit: _Commit) -> None:
        self.access.store.commit(commit.batch, commit.catalog_generation)

    def _fail_commit(self, commit: _Commit, error: BaseException, unsynced: VolumeId | None) -> None:
        cause = error if isinstance(error, SnapfsError | OSError) else SnapfsError(repr(error))
        for portion, changes in commit.taken:
            portion.changes_failed(changes, cause, sync_failed=portion.volume_id == unsynced)
        for portion, _ in commit.taken:
            if portion.failure is not None:
                self._on_sync_failed(portion.volume_id)

    def _end_commit(self, commit: _Commit) -> None:
        for portion, changes in commit.taken:
            portion.changes_done(changes)
            self.let_go(portion)
        if commit.batch.freed:
            self._has_freed = True

    async def remove_logs(self, logs: list[ChangeLog]) -> None:
        """Remove the files of logs that nothing names, now that this is durable."""
        for log in logs:
            self.logs.discard(log)
            try:
                await self.access.in_thread(self.logs.remove_file, log.log_id, log.device_id)
            except (OSError, NoMemoryError):
                # Left over; it is found again at the next opening of the pool.
                continue

    # -- freeing -----------------------------------------------------------------------------

    async def punch_freed(self) -> int:
        """Give what nothing names back to the devices; how many ranges.

        What cannot be punched of one log keeps no other's from coming back; the first reason is raised at the end.
        """
        done = after = 0
        failure: OSError | None = None
        # First: what is freed from here on is looked at here, or the next time.
        self._has_freed = False
        while True:
            with trio.CancelScope(shield=True):
                lot = await self.access.ask(self._punch_some, after)
            done += lot.punched_count
            failure = failure or lot.failure
            if lot.row_count < _PUNCH_BATCH:
                break
            # Behind those that failed. The others are gone, and new ones may have got their numbers.
            after = lot.last_failed or after
            await trio.lowlevel.checkpoint()
        if failure is not None:
            self._has_freed = True
            raise failure
        return done

    def _punch_some(self, after_row: int) -> _Punched:
        store = self.access.store
        rows = store.freed(_PUNCH_BATCH, after_row)
        of_logs: dict[int, list[tuple[int, FreedRow]]] = {}
        for number, row in rows:
            of_logs.setdefault(row.log_id, []).append((number, row))
        punched: list[int] = []
        last_failed = 0
        failure: OSError | None = None
        for log_id, of_log in of_logs.items():
            log = store.log(log_id)
            try:
                if log is not None:
                    self.logs.punch(log_id, log.device_id, [(row.offset, row.length) for _, row in of_log])
            except OSError as error:
                failure = failure or error
                last_failed = max(last_failed, of_log[-1][0])
            else:
                punched += [number for number, _ in of_log]
        if punched:
            store.forget_freed(punched)
        return _Punched(len(rows), last_failed, len(punched), failure)

    async def remove_strays(self) -> int:
        """After opening, before the first write: remove files of logs that the store does not know."""
        return await self.access.ask(self._remove_strays)

    def _remove_strays(self) -> int:
        store = self.access.store
        known = store.log_ids_with_blocks()
        strays = self.logs.stray_files(known)
        if not strays:
            return 0
        rows: dict[int, LogRow] = {row.log_id: row for row in store.some_logs([log_id_of(name) for _, name in strays])}
        count = 0
        for device_id, name in strays:
            row = rows.get(log_id_of(name))
            if row is None or not self._is_named(row):
                self.logs.remove_stray(device_id, name)
                count += 1
        return count

    def _is_named(self, log: LogRow) -> bool:
        """Whether anything names what lies in a log of which nothing is counted: the count may be what is damaged."""
        extents = self.logs.data_extents(log.log_id, log.device_id)
        family = self.traits.family_of(log.volume_id)
        try:
            return any(
                named_masks(self.access.store, family, object_index, {log.log_id}).get(log.log_id, 0) & mask
                for object_index, mask in objects_with_data(extents, self.index, self.processor_count)
            )
        except DamagedError:
            # It cannot be told, so its file stays.
            return True

    async def forget_unborn(self, known_ids: Collection[VolumeId]) -> None:
        """After opening: drop what was counted for volumes whose making failed or was cut off, and their sources."""
        for volume_id in [one for one in self.tally.counts if one not in known_ids]:
            await self.forget_count(volume_id)
        for volume_id in [one for one in self.sources if one not in known_ids]:
            await self.drop_source(volume_id)

    async def forget_count(self, volume_id: VolumeId) -> None:
        """Drop what was counted for a volume that is not to be."""
        self.tally.drop(volume_id)
        await self.commit([], ShardBatch(dropped_portions=[volume_id]))

    def block_count_at(self, volume_id: VolumeId, instant: int, stored: int | None) -> int:
        """Blocks that a volume had mapped here at an instant; ``stored`` is what the store tells of that.

        The first change log begun since tells it, also while only memory knows that log.
        """
        told = {} if stored is None else {volume_id: stored}
        return self.block_counts_at(instant, told).get(volume_id, 0)

    def block_counts_at(self, instant: int, stored: Mapping[VolumeId, int]) -> dict[VolumeId, int]:
        """Blocks that each volume had mapped here at an instant; see :meth:`block_count_at`."""
        begun: dict[VolumeId, tuple[int, int, int]] = {}
        for log in self.logs.known.values():
            if log.epoch > instant and log.kind == CHANGE_LOG:
                one = (log.epoch, log.log_id, log.live_before)
                begun[log.volume_id] = min(begun.get(log.volume_id, one), one)
        return {**self.tally.counts, **{volume_id: one[2] for volume_id, one in begun.items()}, **stored}

    async def recover_from_crash(self) -> None:
        """Before the first write: keep new writes out of logs that may hold what was never committed."""
        await self.access.ask(self.access.store.seal_latest_logs)

    def status(self) -> ProcessorStatus:
        """Counts, as they are now."""
        return ProcessorStatus(
            processor_index=self.index,
            portion_count=len(self.tally.counts),
            mapped_block_count=self.tally.total,
            dirty_object_count=sum(one.dirty_object_count for one in self.portions.values()),
            resident_object_count=sum(len(one.objects) for one in self.portions.values()),
            waiting_commit_count=self.access.commit_lock.statistics().tasks_waiting,
            commit_count=self.commit_count,
            last_commit_ns=self.last_commit_ns,
            last_commit_duration_ns=self.last_commit_duration_ns,
            epoch=self.clock.epoch,
            generation=self.access.store.generation,
        )

    async def close(self) -> None:
        """Close files and store; everything must be committed. What fails is raised, when all else is closed."""
        try:
            self.logs.close()
        finally:
            await self.access.ask(self.access.store.close)
