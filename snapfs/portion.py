"""A processor's part of one volume: its objects' maps, and how a read and a write go through them.

Everything here that ends in ``_now`` runs without an await, so nothing else runs in between: a
write takes effect whole, in one epoch, and a snapshot's cut falls between writes. What such a call
needs and does not find in memory it names in a :class:`NotResidentError`, before it has changed
anything; the caller fetches that and calls again.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from . import blockmap
from .backends import Buffer, DeviceFile
from .blockmap import HOLE, BlockMap
from .changelog import ChangeLog, ChangeLogs, in_use
from .errors import DamagedError, NoRoomForSyncError, SnapfsError, SyncFailedError
from .formats import CHANGE_LOG, COPY_ON_WRITE, CandidateRow, CopyRow, FreedRow, LogRow, MapRow
from .geometry import (
    BLOCK_SHIFT,
    BLOCK_SIZE,
    BLOCKS_PER_OBJECT,
    OBJECT_SHIFT,
    OBJECT_SIZE,
    Epoch,
    VolumeId,
    blocks_of,
    log_offset,
)
from .notresident import Fetch, NotResidentError, OldBlocks
from .placement import Quota
from .prefetch import Prefetcher, fetch_checksums
from .reserve import Reserve
from .sealedfile import DamagedBlockError
from .shardstate import EpochClock, ObjectState, Residency, ShardAccess, Tally
from .snapshotindex import NEVER, SnapshotIndex
from .traits import TraitsTable
from .writeback import LARGE_BLOCKS_MIN, EarlyWriteback

Segment = tuple[ChangeLog | None, int, int, int]
_KeptRun = tuple[int, int, bool]

LOAD_WINDOW = 64
# A long read may lie in a log for each of its blocks: so many are open for it, with their checksums, at a time.
_SEGMENTS_AT_ONCE = 32
_WAS_MISSING = -1
_BLOCK_MASK = BLOCK_SIZE - 1
_ZEROS = memoryview(bytes(OBJECT_SIZE))
# Made beforehand: there is no memory for it when it is needed.
_FORGOTTEN = SyncFailedError(
    "there was no memory to note what is still to be committed",
    "The volume takes no more writes. Save what its writer still has, then unmount and mount the pool",
)


@dataclass(slots=True)
class PortionChanges:
    """What a portion has changed since its last commit, as taken by one."""

    logs_to_sync: list[ChangeLog]
    changed_logs: dict[int, ChangeLog]
    objects: set[int]
    maps: list[MapRow]
    copies: list[CopyRow]
    dropped_copies: list[tuple[int, int]]
    freed: list[FreedRow]
    candidates: list[CandidateRow]
    count_changed: bool
    is_taken: bool = False
    # What stands in their places from then on. Made before, for nothing may fail amid the exchange.
    fresh: tuple[
        list[ChangeLog],
        dict[int, ChangeLog],
        set[int],
        list[tuple[int, int]],
        list[FreedRow],
        list[CandidateRow],
    ] = field(default_factory=lambda: ([], {}, set(), [], [], []))


@dataclass(slots=True)
class _Replacement:
    """A planned redirected write: what to put where, and the log space it makes free."""

    payload: Buffer
    start: int
    freed: list[tuple[ChangeLog, int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What a portion may ask of its processor about other volumes, and on behalf of its own.

    ``sources`` has the log that stands for what a volume is written over. ``borrow`` gives the
    portion of another volume, for as long as it is used; ``commit`` makes one's changes durable.
    ``writeback`` is told of large writes. ``prefetcher`` brings in what reads need. ``reserve`` tells whether there is
    room for what is new.
    """

    traits: TraitsTable
    residency: Residency
    sources: Mapping[VolumeId, LogRow]
    borrow: Callable[[VolumeId], contextlib.AbstractContextManager[Portion]]
    commit: Callable[[Portion], Awaitable[None]]
    writeback: EarlyWriteback
    prefetcher: Prefetcher
    reserve: Reserve


class Portion:
    """One volume on one processor.

    ``is_in_place``: what is written goes over what was there.

    ``last_instant`` bounds the instants that can hold the volume: NEVER for a live one, the one
    before its removal for a removed one. ``is_gone``: it has no live maps any more, only copies that
    snapshots need. ``users`` counts who has it open. ``failure`` is set when a
    sync failed; then it takes no more writes. ``generation`` grows when point-in-time copies come
    to point elsewhere: what was found out about them before is to be found out again.
    """

    is_in_place = False
    # Of the class, where it stays: an instance of more than 30 attributes is slower in each access.
    generation = 0

    def __init__(
        self,
        volume_id: VolumeId,
        access: ShardAccess,
        logs: ChangeLogs,
        snapshots: SnapshotIndex,
        clock: EpochClock,
        tally: Tally,
        neighbours: Neighbours,
        processor_count: int,
        *,
        birth_epoch: int,
        named_epoch: int,
        last_instant: int,
        is_gone: bool,
    ) -> None:
        self.volume_id = volume_id
        self._processor_index = access.store.processor_index
        self.birth_epoch = birth_epoch
        self.named_epoch = named_epoch
        self.last_instant = last_instant
        self.is_gone = is_gone
        self.users = 0
        self.failure: SyncFailedError | None = None
        # Why it takes no more writes: its own failure, or that of the same volume's portion on another processor.
        self.refusal: SyncFailedError | None = None
        self.objects: dict[int, ObjectState] = {}
        self.pending: dict[int, list[CopyRow]] = {}
        self.commits = 0
        self.in_commit = False
        self._access = access
        self._logs = logs
        self._snapshots = snapshots
        self._clock = clock
        self._tally = tally
        self._neighbours = neighbours
        self._processor_count = processor_count
        self._epoch = 0
        self._log: ChangeLog | None = None
        self._log_looked_up = False
        self._log_known: LogRow | None = None
        self._sealed_in_epoch = True
        self._dirty_logs: list[ChangeLog] = []
        self._changed_logs: dict[int, ChangeLog] = {}
        self._dirty_objects: set[int] = set()
        self._dropped_copies: list[tuple[int, int]] = []
        self._freed: list[FreedRow] = []
        self._candidates: list[CandidateRow] = []
        self._count_changed = False

    def check_now(self) -> None:
        """Whether it may be used: it may. What stands for it while it may not raises."""

    # -- reading -----------------------------------------------------------------------------

    def map_now(self, object_index: int) -> BlockMap:
        """The live map of an object; it may change after the next await."""
        state = self.objects.get(object_index)
        if state is None:
            raise NotResidentError(partial(self._load, object_index))
        return state.block_map

    def read_now(self, block_map: BlockMap, object_index: int, inside: int, view: memoryview) -> None:
        """Fill ``view`` from an object at byte ``inside``, if the device need not wait.

        Raises BlockingIOError when it would have to.
        """
        if isinstance(block_map, int):
            log_id = block_map
        else:
            first = inside >> BLOCK_SHIFT
            last = (inside + len(view) + _BLOCK_MASK) >> BLOCK_SHIFT
            log_id = block_map[first]
            if last - first > 1 and block_map[first:last].count(log_id) != last - first:
                self._read_runs_now(block_map, object_index, inside, view)
                return
        if log_id == HOLE:
            view[:] = _ZEROS[: len(view)]
            return
        log = self._logs.known.get(log_id)
        if log is None or log.file is None:
            fetch: Fetch = partial(self._open_log, log_id)
        else:
            try:
                log.file.try_read_into(view, (object_index // self._processor_count) * OBJECT_SIZE + inside)
            except NotResidentError as missing:
                fetch = missing.fetch
            else:
                return
        raise NotResidentError(partial(self._fetch_for_reads, block_map, object_index, inside >> BLOCK_SHIFT, fetch))

    def _read_runs_now(self, block_map: BlockMap, object_index: int, inside: int, view: memoryview) -> None:
        for log, offset, length, at in self.segments(block_map, object_index, inside, len(view), 0):
            part = view[at : at + length]
            if log is None:
                part[:] = _ZEROS[:length]
                continue
            if log.file is None:
                # Not fetched one by one until all are there: so many may not be kept open, nor their checksums.
                raise BlockingIOError
            try:
                log.file.try_read_into(part, offset)
            except NotResidentError:
                raise BlockingIOError from None

    def segments(self, block_map: BlockMap, object_index: int, inside: int, length: int, at: int) -> list[Segment]:
        """Where a range of an object lies: ``(log or None for zeros, file offset, length, buffer offset)``.

        Raises NotResidentError for a log that is not known. Their files need not be open.
        """
        base = log_offset(object_index, self._processor_count)
        found: list[Segment] = []
        end = inside + length
        for block, count, log_id in blockmap.runs(block_map, inside >> BLOCK_SHIFT, (end + _BLOCK_MASK) >> BLOCK_SHIFT):
            low = max(block << BLOCK_SHIFT, inside)
            high = min((block + count) << BLOCK_SHIFT, end)
            log = None
            if log_id != HOLE:
                log = self._logs.known.get(log_id)
                if log is None:
                    fetch = partial(self._look_at_log, log_id)
                    raise NotResidentError(partial(self._fetch_for_reads, block_map, object_index, block, fetch))
            found.append((log, base + low, high - low, at + low - inside))
        return found

    def snapshot_map_now(self, object_index: int, instant: int) -> BlockMap:
        """The map of an object as it stood at an instant that a snapshot holds.

        The point-in-time copy with the smallest instant at or after it, else the live map.
        """
        state = self.objects.get(object_index)
        if state is None:
            raise NotResidentError(partial(self._load, object_index))
        if state.epoch <= instant:
            return state.block_map
        for copy in self.pending.get(object_index, ()):
            if copy.epoch <= instant <= copy.instant:
                return copy.block_map
        raise KeyError(object_index)

    async def snapshot_map(self, object_index: int, instant: int) -> BlockMap:
        """Like :meth:`snapshot_map_now`, from the store if need be."""
        while True:
            try:
                return self.snapshot_map_now(object_index, instant)
            except NotResidentError as missing:
                await missing.fetch({})
                continue
            except KeyError:
                commits = self.commits
            copy = await self._access.ask(self._access.store.copy_at, self.volume_id, object_index, instant)
            if copy is not None and copy.epoch <= instant:
                return copy.block_map
            if self.commits == commits:
                # Nothing moved from memory to the store meanwhile, so there is none. A volume that
                # is gone has no live map to fall back on: what has no copy is its ancestors' or was a hole.
                if self.is_gone:
                    return await self.inherited_map(object_index)
                raise DamagedError(
                    f"object {object_index} of volume {self.volume_id} has no point-in-time copy for instant {instant}",
                    "Unmount and run snapfs check",
                )

    # -- writing -----------------------------------------------------------------------------

    def write_now(self, object_index: int, inside: int, data: Buffer, old_blocks: OldBlocks) -> None:
        """Write to an object at byte ``inside``.

        A block that lies in the current change log is overwritten in place; any other goes there
        whole, completed from where it lay, and then the map points at it. Raises OSError from the
        device, with the maps unchanged.
        """
        state = self.objects.get(object_index)
        if state is None:
            raise NotResidentError(partial(self._load, object_index))
        log = self._log
        if log is None or self._epoch < self._clock.epoch:
            log = self._enter_epoch()
        first = inside >> BLOCK_SHIFT
        last = (inside + len(data) + _BLOCK_MASK) >> BLOCK_SHIFT
        base = (object_index // self._processor_count) * OBJECT_SIZE
        if blockmap.is_uniform(state.block_map, first, last, log.log_id):
            self._touch(log).write(data, base + inside)
            return
        if _is_zero(inside, data) and not blockmap.any_in(state.block_map, first, last, log.log_id):
            # Blocks of zeros become holes; one that the current log has is overwritten, so that it stays open.
            self._check_refusal()
            self.unmap_now(object_index, first, last)
            return
        if self._neighbours.reserve.is_short:
            self._neighbours.reserve.check_now()
        replacement = self._plan(state, object_index, inside, data, log, old_blocks)
        kept = _kept_runs(state.block_map, inside, data, first, last, log.log_id)
        if log.quota is not None:
            log.quota.check(_added_count(state.block_map, kept, log.log_id))
        try:
            if len(kept) == 1:
                self._touch(log).write_new(replacement.payload, base + replacement.start)
            else:
                self._write_kept(log, replacement, base, kept)
        except OSError:
            self._give_back(log, state, base, first, last)
            raise
        self._keep_copy(object_index, state)
        for low, high, is_kept in kept:
            if is_kept:
                self._point_at(log, object_index, state, low, high)
            else:
                self._make_holes(object_index, state, low, high)
        for old_log, offset, length in replacement.freed:
            self._free(old_log, object_index, offset, length)

    def _write_kept(self, log: ChangeLog, replacement: _Replacement, base: int, runs: Sequence[_KeptRun]) -> None:
        """Write the runs of a payload that are kept."""
        payload = memoryview(replacement.payload)
        for low, high, is_kept in runs:
            if is_kept:
                at = max(0, (low << BLOCK_SHIFT) - replacement.start)
                end = (high << BLOCK_SHIFT) - replacement.start
                self._touch(log).write_new(payload[at:end], base + replacement.start + at)

    def _make_holes(self, object_index: int, state: ObjectState, first: int, last: int) -> None:
        """Have blocks that read as zeros take no space; what only they named is the caller's to free."""
        count = blockmap.mapped_count(state.block_map, first, last)
        block_map = blockmap.with_range(state.block_map, first, last, HOLE)
        self._dirty_objects.add(object_index)
        if count:
            self._count_changed = True
            self._tally.add(self.volume_id, -count)
        state.block_map = block_map

    def ready_to_write_now(self, object_index: int, inside: int, data: Buffer, old_blocks: OldBlocks) -> int:
        """Raise what would keep :meth:`write_now` from going through, and change nothing.

        Gives the blocks that it would put into the change log.
        """
        state = self.objects.get(object_index)
        if state is None:
            raise NotResidentError(partial(self._load, object_index))
        log = self._log
        if log is None or self._epoch < self._clock.epoch:
            log = self._enter_epoch()
        log.liveness.check_now()
        first, last = inside >> BLOCK_SHIFT, (inside + len(data) + _BLOCK_MASK) >> BLOCK_SHIFT
        if _is_zero(inside, data) and not blockmap.any_in(state.block_map, first, last, log.log_id):
            self._check_refusal()
            self._unpinned(state, object_index, first, last, None)
            return 0
        if not blockmap.is_uniform(state.block_map, first, last, log.log_id):
            self._neighbours.reserve.check_now()
        self._plan(state, object_index, inside, data, log, old_blocks)
        kept = _kept_runs(state.block_map, inside, data, first, last, log.log_id)
        return _added_count(state.block_map, kept, log.log_id)

    def _touch(self, log: ChangeLog) -> DeviceFile:
        """The file of a log that is about to be written to.

        Raises SyncFailedError when it must not be, NotResidentError while its device has to answer first.
        """
        if self.refusal is not None:
            # Not asked by a call: every write comes by here.
            self._check_refusal()
        if log.liveness.is_over:
            raise NotResidentError(log.liveness.fetch)
        if not log.dirty:
            self._mark_dirty(log)
        assert log.file is not None, "the current change log is open"
        return log.file

    def _mark_dirty(self, log: ChangeLog) -> None:
        """Have a log synced by the next commit."""
        if not log.dirty:
            # In this order: one that is called dirty and stands in no list would never be synced.
            self._dirty_logs.append(log)
            log.dirty = True

    def _check_refusal(self) -> None:
        if self.refusal is not None:
            raise type(self.refusal)(self.refusal.reason, self.refusal.fix)

    def _give_back(self, log: ChangeLog, state: ObjectState, base: int, first: int, last: int) -> None:
        """After a failed write: free what it left in the log where no map points."""
        assert log.file is not None
        for block, count, log_id in blockmap.runs(state.block_map, first, last):
            if log_id != log.log_id:
                with contextlib.suppress(OSError):
                    log.file.punch(base + (block << BLOCK_SHIFT), count << BLOCK_SHIFT)

    def _enter_epoch(self) -> ChangeLog:
        """Make the volume's current epoch this portion's, and give the log that takes its writes."""
        epoch = max(self._clock.epoch, self.named_epoch)
        if not self._log_looked_up:
            raise NotResidentError(partial(self._look_up_log, epoch))
        log: ChangeLog | None = None
        if self._log_known is not None and self._log_known.epoch == epoch:
            log = self._logs.adopt(self._log_known)
            if log.sealed or log.summed or log.block_count == 0:
                log = None
            elif log.file is None:
                raise NotResidentError(partial(self._open_log, log.log_id))
        elif 0 < self._epoch < epoch:
            # Entered while in memory, so no log of this epoch can be sealed yet.
            self._sealed_in_epoch = False
        self._log_known = None
        if log is None:
            live = self._tally.counts.get(self.volume_id, 0)
            is_change = self._snapshots.holds(self.volume_id, 0, epoch - 1)
            log = self._logs.begin(self.volume_id, Epoch(epoch), live, is_change=is_change)
            self._note_changed(log)
        if self._log is not None:
            self._log.held -= 1
        log.held += 1
        self._log = log
        self._epoch = epoch
        return log

    def _plan(
        self,
        state: ObjectState,
        object_index: int,
        inside: int,
        data: Buffer,
        log: ChangeLog,
        old_blocks: OldBlocks,
    ) -> _Replacement:
        """What a write must put into the current log, with partial blocks completed."""
        end = inside + len(data)
        first = inside >> BLOCK_SHIFT
        last = (end + _BLOCK_MASK) >> BLOCK_SHIFT
        freed = self._unpinned(state, object_index, first, last, log)
        head: Buffer = b""
        tail: Buffer = b""
        if inside & _BLOCK_MASK and blockmap.entry(state.block_map, first) != log.log_id:
            head = self._old_block(state, object_index, first, old_blocks)[: inside & _BLOCK_MASK]
        if end & _BLOCK_MASK and blockmap.entry(state.block_map, last - 1) != log.log_id:
            tail = self._old_block(state, object_index, last - 1, old_blocks)[end & _BLOCK_MASK :]
        payload = b"".join((head, data, tail)) if head or tail else data
        return _Replacement(payload, inside - len(head), freed)

    def _old_block(self, state: ObjectState, object_index: int, block: int, old_blocks: OldBlocks) -> bytes:
        log_id = blockmap.entry(state.block_map, block)
        if log_id == HOLE:
            return bytes(BLOCK_SIZE)
        offset = log_offset(object_index, self._processor_count) + (block << BLOCK_SHIFT)
        known = old_blocks.get((self._processor_index, log_id, offset))
        if known is not None:
            return known
        log = self._logs.known.get(log_id)
        if log is None or log.file is None:
            raise NotResidentError(partial(self._open_log, log_id))
        buffer = bytearray(BLOCK_SIZE)
        try:
            log.file.try_read_into(buffer, offset)
        except BlockingIOError:
            raise NotResidentError(partial(self._fetch_block, log, offset)) from None
        return bytes(buffer)

    def _keep_copy(self, object_index: int, state: ObjectState) -> None:
        """Before the first change after a snapshot: keep the map as the point-in-time copy."""
        if state.epoch >= self._epoch:
            return
        # First: a copy is never committed without the map that it is older than.
        self._dirty_objects.add(object_index)
        instant = min(self._epoch - 1, self.last_instant)
        if self._snapshots.holds(self.volume_id, state.epoch, instant):
            copy = CopyRow(
                self.volume_id,
                object_index,
                Epoch(instant),
                Epoch(state.epoch),
                state.block_map,
            )
            self.pending.setdefault(object_index, []).append(copy)
            state.copied = instant
        state.epoch = self._epoch

    def _point_at(self, log: ChangeLog, object_index: int, state: ObjectState, first: int, last: int) -> None:
        """Point blocks at the current log, and count."""
        gained = holes = 0
        for _, count, log_id in blockmap.runs(state.block_map, first, last):
            if log_id != log.log_id:
                gained += count
                if log_id == HOLE:
                    holes += count
        # First what may find no memory and counts nothing, then the counts, then the map: it may be tried again.
        block_map = blockmap.with_range(state.block_map, first, last, log.log_id)
        self._note_changed(log)
        self._dirty_objects.add(object_index)
        log.add_blocks(gained)
        if holes:
            self._count_changed = True
            try:
                self._tally.add(self.volume_id, holes)
            except MemoryError:
                log.add_blocks(-gained)
                raise
        state.block_map = block_map
        if gained >= LARGE_BLOCKS_MIN:
            self._neighbours.writeback.note(log, gained)

    def unmap_now(self, object_index: int, first: int, last: int = BLOCKS_PER_OBJECT) -> None:
        """Make holes of an object's blocks from ``first`` up to ``last``; free those that no copy names.

        A log that has blocks freed takes no more writes, so a range is never punched that was
        written anew.
        """
        state = self.objects.get(object_index)
        if state is None:
            raise NotResidentError(partial(self._load, object_index))
        count = blockmap.mapped_count(state.block_map, first, last)
        if count == 0:
            return
        if self._log is None or self._epoch < self._clock.epoch:
            self._enter_epoch()
        freed = self._unpinned(state, object_index, first, last, None)
        self._keep_copy(object_index, state)
        self._make_holes(object_index, state, first, last)
        for log, offset, length in freed:
            self._free(log, object_index, offset, length)

    async def fit_source(self, size_bytes: int, *, may_cut: bool) -> None:
        """Give the image that the volume is written over this size; without ``may_cut`` at least this."""

    def _unpinned(
        self, state: ObjectState, object_index: int, first: int, last: int, current: ChangeLog | None
    ) -> list[tuple[ChangeLog, int, int]]:
        """Runs of blocks about to lose the live map's name that no point-in-time copy names either.

        The latest copy names a block exactly if the block's log was begun at or before its instant.
        """
        newest = self._snapshots.newest(self.volume_id)
        if (
            current is not None
            and newest == self._epoch - 1
            and not self._sealed_in_epoch
            and self.last_instant == NEVER
            and (self._epoch > self.birth_epoch or not self._traits.get(self.volume_id).origin_id)
        ):
            # The usual case: the last snapshot is still there, so its copies name every older block.
            return []
        base = log_offset(object_index, self._processor_count)
        found = []
        for block, count, log_id in blockmap.runs(state.block_map, first, last):
            if log_id == HOLE or (current is not None and log_id == current.log_id):
                continue
            log = self._logs.known.get(log_id)
            if log is None:
                raise NotResidentError(partial(self._look_at_log, log_id))
            if log.epoch > self._copied_after(state, object_index):
                found.append((log, base + (block << BLOCK_SHIFT), count << BLOCK_SHIFT))
        return found

    def _copied_after(self, state: ObjectState, object_index: int) -> int:
        """Instant of the object's latest copy, once the change that is being planned has kept its own."""
        instant = min(self._epoch - 1, self.last_instant)
        if state.epoch < self._epoch and self._snapshots.holds(self.volume_id, state.epoch, instant):
            return instant
        if state.copied is None:
            raise NotResidentError(partial(self._look_up_copied, object_index))
        return state.copied

    def _free(self, log: ChangeLog, object_index: int, offset: int, length: int) -> None:
        """Free a run of blocks that this volume names no more, or leave it to be looked at if its family may."""
        if log.kind != CHANGE_LOG:
            return
        if self.is_shared(log):
            block, count = (offset & (OBJECT_SIZE - 1)) >> BLOCK_SHIFT, length >> BLOCK_SHIFT
            self._candidates.append(CandidateRow(log.log_id, object_index, block, count))
        else:
            log.add_blocks(-(length >> BLOCK_SHIFT))
            self._freed.append(FreedRow(log.log_id, offset, length))
        if log.volume_id == self.volume_id:
            self._seal(log)

    def _seal(self, log: ChangeLog) -> None:
        """Keep new writes out of a log that has ranges freed, or may have."""
        self._note_changed(log)
        if not log.sealed:
            log.sealed = 1
            if log.epoch == max(self._clock.epoch, self.named_epoch):
                self._sealed_in_epoch = True
        if log is self._log:
            self.leave_log()

    def leave_log(self) -> None:
        """The current change log takes no more writes: the next one begins another, or finds that of its epoch."""
        if self._log is not None:
            self._log.held -= 1
            self._log = None

    def is_shared(self, log: ChangeLog) -> bool:
        """Whether maps of another volume may name blocks of a log."""
        return log.volume_id != self.volume_id or log.epoch <= self._traits.shared_until(self.volume_id)

    def _note_changed(self, log: ChangeLog) -> None:
        if log.log_id not in self._changed_logs:
            self._changed_logs[log.log_id] = log
            log.held += 1

    def name_snapshot(self, epoch: int) -> None:
        """A snapshot that names this volume was cut; its next write is of this epoch."""
        self.named_epoch = epoch
        self.leave_log()

    def drop_copy_now(
        self, copy: CopyRow, later: BlockMap | None, earlier: int, begun_since: Mapping[int, LogRow]
    ) -> None:
        """Forget a point-in-time copy that no snapshot needs, and free what only it names.

        ``later`` is the map of the object's next copy, None if the live map is next; ``earlier`` is
        the instant of the copy before, 0 for none. ``begun_since`` has those of the copy's logs that were begun
        after that, by their ids: blocks that lie in any other the copy before names as well.
        """
        object_index = copy.object_index
        state = self.objects.get(object_index)
        if state is None:
            raise NotResidentError(partial(self._load, object_index))
        newer = self.pending.get(object_index)
        is_latest = later is None and not newer
        if later is None:
            later = newer[0].block_map if newer else state.block_map
        freed: list[tuple[ChangeLog, int, int]] = []
        try:
            self._hold_named_only_by(copy, later, begun_since, freed)
            if is_latest:
                state.copied = earlier
            self._dropped_copies.append((object_index, copy.instant))
            self._dirty_objects.add(object_index)
            for log, offset, length in freed:
                self._free(log, object_index, offset, length)
        finally:
            for log, _, _ in freed:
                log.held -= 1

    def runs_now(self, object_index: int, first: int, last: int) -> list[tuple[int, int, int]]:
        """Runs of a range of an object's live map, as ``(first block, block count, log id)``."""
        return blockmap.runs(self.map_now(object_index), first, last)

    def shared_runs_now(self, object_index: int) -> list[tuple[int, int, int]]:
        """Runs of an object's blocks that lie in logs of other volumes, or in an image."""
        found = []
        for block, count, log_id in self.runs_now(object_index, 0, BLOCKS_PER_OBJECT):
            if log_id == HOLE:
                continue
            log = self._logs.known.get(log_id)
            if log is None:
                raise NotResidentError(partial(self._look_at_log, log_id))
            if log.volume_id != self.volume_id or log.kind != CHANGE_LOG:
                found.append((block, count, log_id))
        return found

    def settle_now(self, object_index: int) -> None:
        """Have an object keep its map in the store, also if that is still its ancestors'."""
        state = self.objects.get(object_index)
        if state is None:
            raise NotResidentError(partial(self._load, object_index))
        if state.block_map != HOLE:
            self._dirty_objects.add(object_index)

    def _hold_named_only_by(
        self,
        copy: CopyRow,
        later: BlockMap,
        begun_since: Mapping[int, LogRow],
        found: list[tuple[ChangeLog, int, int]],
    ) -> None:
        """Find what only a copy names. Each log is held: else the next might have it forgotten, and be counted anew."""
        base = log_offset(copy.object_index, self._processor_count)
        for block, count, log_id in blockmap.dropped_runs_of(begun_since.keys(), copy.block_map, later):
            log = self._logs.adopt(begun_since[log_id])
            found.append((log, base + (block << BLOCK_SHIFT), count << BLOCK_SHIFT))
            log.held += 1

    # -- fetching ----------------------------------------------------------------------------

    async def _load(self, object_index: int, old_blocks: OldBlocks) -> None:
        """Bring a window of maps around an object into memory."""
        stride = self._processor_count
        width = LOAD_WINDOW * stride
        lowest = object_index - object_index % width
        first = lowest + object_index % stride
        ancestors = self._traits.ancestors(self.volume_id)
        if any(self._traits.get(one.volume_id).change_mode == COPY_ON_WRITE for one in ancestors):
            # What is looked at of such a volume is preserved first, so no more than is asked for.
            await self._load_alone(object_index)
            return
        rows, inherited = await self._access.ask(
            self._access.store.maps_with_ancestors, self.volume_id, ancestors, first, lowest + width - 1
        )
        found = {row.object_index: row for row in rows}
        for index in range(first, lowest + width, stride):
            self._admit(index, found.get(index), inherited.get(index))

    async def _load_alone(self, object_index: int) -> None:
        store = self._access.store
        inherited = None
        rows = await self._access.ask(store.maps, self.volume_id, object_index, object_index)
        if not rows and not self.is_gone:
            inherited = await self.inherited_map(object_index)
            # It may have got a map of its own meanwhile, and have left memory again.
            rows = await self._access.ask(store.maps, self.volume_id, object_index, object_index)
        self._admit(object_index, rows[0] if rows else None, inherited)

    def _admit(self, object_index: int, row: MapRow | None, inherited: BlockMap | None) -> None:
        if object_index in self.objects:
            return
        state = self._unwritten(object_index) if row is None else ObjectState(row.block_map, row.epoch, None)
        if row is None and inherited is not None and not self.is_gone:
            state.block_map = inherited
        self.objects[object_index] = state
        self._neighbours.residency.admit(self, object_index)

    async def inherited_map(self, object_index: int) -> BlockMap:
        """The map of an object that this volume never had one of."""
        store = self._access.store
        for ancestor in self._traits.ancestors(self.volume_id):
            if self._traits.get(ancestor.volume_id).change_mode == COPY_ON_WRITE:
                with self._neighbours.borrow(ancestor.volume_id) as portion:
                    return await portion.lasting_map(object_index, ancestor.instant)
            found = await self._access.ask(store.inherited_map, [ancestor], object_index)
            if found is not None:
                return found
        return self.base_map(object_index)

    async def lasting_map(self, object_index: int, instant: int) -> BlockMap:
        """The map of an object at an instant, of which no block will ever be overwritten."""
        return await self.snapshot_map(object_index, instant)

    def base_map(self, object_index: int) -> BlockMap:
        """What an object is that neither this volume nor an ancestor ever wrote: holes, or what it stands on."""
        ancestors = self._traits.ancestors(self.volume_id)
        root = ancestors[-1].volume_id if ancestors else self.volume_id
        source = self._neighbours.sources.get(root)
        if source is None:
            return HOLE
        size_bytes = self._traits.get(root).source_size_bytes
        return blockmap.partial_map(source.log_id, blocks_of(size_bytes) - object_index * BLOCKS_PER_OBJECT)

    def _unwritten(self, object_index: int) -> ObjectState:
        """An object without a live map: one that was never written, or of a volume that is gone."""
        if self.is_gone:
            return ObjectState(HOLE, NEVER, None)
        return ObjectState(self.base_map(object_index), self.birth_epoch, 0)

    def forget_live_maps(self, object_indexes: Iterable[int]) -> None:
        """The live maps of these objects were taken apart."""
        for object_index in object_indexes:
            if object_index in self.objects:
                self.objects[object_index] = self._unwritten(object_index)

    async def _look_up_copied(self, object_index: int, old_blocks: OldBlocks) -> None:
        """Learn the instant of an object's latest copy."""
        newest = await self._access.ask(self._access.store.latest_copy_instant, self.volume_id, object_index)
        state = self.objects.get(object_index)
        if state is not None and state.copied is None:
            pending = self.pending.get(object_index)
            state.copied = pending[-1].instant if pending else newest

    async def _fetch_for_reads(
        self, block_map: BlockMap, object_index: int, block: int, fetch: Fetch, old_blocks: OldBlocks
    ) -> None:
        """Fetch what a read of an object needs; before that, what reads of its other blocks will."""
        place = object_index // self._processor_count
        await self._neighbours.prefetcher.bring_in(self.volume_id, block_map, block, place)
        await fetch(old_blocks)

    async def _look_at_log(self, log_id: int, old_blocks: OldBlocks) -> None:
        """Bring a log's row into memory, unless others did already."""
        if log_id in self._logs.known:
            return
        row = await self._access.ask(self._access.store.log, log_id)
        if row is None and (self._processor_index, log_id, _WAS_MISSING) not in old_blocks:
            # It may have died since its map was looked at; the caller looks again, once.
            old_blocks[(self._processor_index, log_id, _WAS_MISSING)] = b""
            return
        if row is None:
            raise DamagedError(
                f"a map of volume {self.volume_id} names change log {log_id}, which does not exist",
                "Unmount and run snapfs check",
            )
        self._logs.adopt(row)

    async def _open_log(self, log_id: int, old_blocks: OldBlocks) -> None:
        """Open a log's file."""
        log = self._logs.known.get(log_id)
        if log is None:
            await self._look_at_log(log_id, old_blocks)
            log = self._logs.known.get(log_id)
        if log is None:
            return
        await log.liveness.renew()
        if self._logs.known.get(log_id) is not log:
            return
        try:
            self._logs.open_file(log)
        except DamagedError:
            if (self._processor_index, log_id, _WAS_MISSING) in old_blocks:
                raise
            old_blocks[(self._processor_index, log_id, _WAS_MISSING)] = b""

    async def _look_up_log(self, epoch: int, old_blocks: OldBlocks) -> None:
        """Learn whether the store has a log that takes this volume's writes."""
        row = await self._access.ask(self._access.store.open_log, self.volume_id, epoch)
        if not self._log_looked_up:
            self._log_known = row
            self._log_looked_up = True

    async def _fetch_block(self, log: ChangeLog, offset: int, old_blocks: OldBlocks) -> None:
        """Read the old contents of a block, for a partial write to complete it."""
        buffer = bytearray(BLOCK_SIZE)
        try:
            await self.read_segments([(log, offset, BLOCK_SIZE, 0)], memoryview(buffer))
        except NotResidentError:
            # The log has gone: whoever writes finds where the block lies now.
            return
        except DamagedBlockError as damage:
            if self.names_now(damage):
                self.report(damage)
                raise
            return
        old_blocks[(self._processor_index, log.log_id, offset)] = bytes(buffer)

    def report(self, damage: DamagedBlockError) -> None:
        """Tell whoever keeps track of damage."""
        self._logs.sums.report(damage)

    def names_now(self, damage: DamagedBlockError) -> bool:
        """Whether the live map names a block still; what it no longer names may be freed."""
        state = self.objects.get(damage.object_index)
        return state is not None and blockmap.entry(state.block_map, damage.block) == damage.log_id

    async def read_segments(self, segments: list[Segment], view: memoryview) -> None:
        """Read segments of this processor's logs in threads, a batch at a time.

        Raises NotResidentError when a log has gone since the segments were worked out; DamagedError, also when a
        log's file is missing, which may have gone since the first batch: whoever reads what can change looks again.
        """
        for first in range(0, len(segments), _SEGMENTS_AT_ONCE):
            await self._read_batch(segments[first : first + _SEGMENTS_AT_ONCE], view)

    async def _read_batch(self, segments: list[Segment], view: memoryview) -> None:
        used = [log for log, _, _, _ in segments if log is not None]
        if any(log.is_discarded or self._logs.known.get(log.log_id) is not log for log in used):
            raise NotResidentError(_look_again)
        with in_use(used):
            while any(one.liveness.is_over for one in used):
                for one in used:
                    await one.liveness.renew()
            if any(one.is_discarded and one.file is None for one in used):
                raise NotResidentError(_look_again)
            files: list[tuple[DeviceFile, int, memoryview, bool]] = []
            for log, offset, length, at in segments:
                part = view[at : at + length]
                if log is None:
                    part[:] = _ZEROS[:length]
                else:
                    files.append((self._logs.open_file(log), offset, part, log.kind != CHANGE_LOG))
            await self._fetch_checksums(segments)
            while files:
                try:
                    await self._access.read_in_thread(_read_all, files)
                except NotResidentError as missing:
                    # Checksums, of a log that is sealed.
                    await missing.fetch({})
                else:
                    return

    async def _fetch_checksums(self, segments: list[Segment]) -> None:
        """Bring in those that segments of one object are held against."""
        log_ids = [log.log_id for log, _, _, _ in segments if log is not None]
        if len(log_ids) > 1:
            place = segments[0][1] >> OBJECT_SHIFT
            await fetch_checksums(self._access, self._logs, list(dict.fromkeys(log_ids)), place)

    async def _with_logs(self, used: Sequence[ChangeLog], call: Callable[[], None]) -> None:
        """Run a blocking call in a thread; the files of these logs stay open meanwhile."""
        with in_use(used):
            await self._access.in_thread(call)

    # -- committing --------------------------------------------------------------------------

    @property
    def _traits(self) -> TraitsTable:
        return self._neighbours.traits

    @property
    def is_dirty(self) -> bool:
        """Whether anything is not committed, or a commit of it is under way."""
        return bool(
            self.in_commit
            or self._dirty_logs
            or self._dirty_objects
            or self._changed_logs
            or self._freed
            or self._candidates
            or self._dropped_copies
        )

    @property
    def current_log(self) -> ChangeLog | None:
        """The log that takes writes, if there was one since the last snapshot."""
        return self._log

    @property
    def quota(self) -> Quota | None:
        """What counts the blocks that writes put into the current change log."""
        return None if self._log is None else self._log.quota

    def dirty_logs(self) -> list[ChangeLog]:
        """Logs with data that is still to be synced."""
        return list(self._dirty_logs)

    @property
    def dirty_object_count(self) -> int:
        """Objects whose maps are not committed."""
        return len(self._dirty_objects)

    def changes(self) -> PortionChanges:
        """What is to be committed, to be taken by :meth:`take`."""
        return PortionChanges(
            logs_to_sync=self._dirty_logs,
            changed_logs=self._changed_logs,
            objects=self._dirty_objects,
            maps=[
                MapRow(self.volume_id, index, Epoch(state.epoch), state.block_map)
                for index in self._dirty_objects
                if (state := self.objects[index]).epoch != NEVER
            ],
            copies=[copy for copies in self.pending.values() for copy in copies],
            dropped_copies=self._dropped_copies,
            freed=self._freed,
            candidates=self._candidates,
            count_changed=self._count_changed,
        )

    def take(self, changes: PortionChanges) -> None:
        """What changes from now on is for the next commit. All of it or, for want of memory, nothing."""
        for log in self._dirty_logs:
            log.dirty = False
        changes.is_taken = True
        (
            self._dirty_logs,
            self._changed_logs,
            self._dirty_objects,
            self._dropped_copies,
            self._freed,
            self._candidates,
        ) = changes.fresh
        self._count_changed = False
        self.in_commit = True

    def changes_done(self, changes: PortionChanges) -> None:
        """What was taken is durable."""
        self.in_commit = False
        self.commits += 1
        for copy in changes.copies:
            kept = self.pending.get(copy.object_index, [])
            if copy in kept:
                kept.remove(copy)
            if not kept:
                self.pending.pop(copy.object_index, None)
        for log in changes.changed_logs.values():
            log.held -= 1

    def changes_failed(self, changes: PortionChanges, error: SnapfsError | OSError, *, sync_failed: bool) -> None:
        """What was taken is not durable; it is still to be committed.

        After a failed sync of data it never will be: what the device kept is not known. Nor when there is no memory to
        note what was taken.
        """
        if not changes.is_taken:
            return
        self.in_commit = False
        try:
            self._take_back(changes)
            if sync_failed:
                kind = NoRoomForSyncError if error.errno in (errno.ENOSPC, errno.EDQUOT) else SyncFailedError
                self.failure = self.refusal = kind(
                    f"a sync of volume {self.volume_id} failed ({error})",
                    "It takes no more writes. Save what its writer still has, then unmount and mount the pool",
                )
        except MemoryError:
            self.failure = self.refusal = _FORGOTTEN

    def _take_back(self, changes: PortionChanges) -> None:
        for log in changes.logs_to_sync:
            self._mark_dirty(log)
        for log_id, log in changes.changed_logs.items():
            if log_id in self._changed_logs:
                log.held -= 1
            else:
                self._changed_logs[log_id] = log
        self._dirty_objects |= changes.objects
        self._dropped_copies = changes.dropped_copies + self._dropped_copies
        self._freed = changes.freed + self._freed
        self._candidates = changes.candidates + self._candidates
        self._count_changed = self._count_changed or changes.count_changed

    def let_go(self, object_index: int) -> bool:
        """Forget an object's map if it is clean; whether it is no longer kept."""
        if object_index in self._dirty_objects or object_index in self.pending or self.in_commit:
            return False
        self.objects.pop(object_index, None)
        return True

    def release(self) -> None:
        """Let go of everything. What was not committed is lost: it is clean, or its volume is gone."""
        self.leave_log()
        self._log_looked_up = False
        self._log_known = None
        self._sealed_in_epoch = True
        self.objects.clear()
        self.pending.clear()
        for log in self._dirty_logs:
            log.dirty = False
        self._dirty_logs.clear()
        for log in self._changed_logs.values():
            log.held -= 1
        self._changed_logs.clear()
        self._dirty_objects.clear()
        self._dropped_copies.clear()
        self._freed.clear()
        self._candidates.clear()
        self._count_changed = False


def _zero_blocks(inside: int, data: Buffer) -> list[int]:
    """Whole blocks of zeros in a write, by their number in the object. Nearly always their first bytes tell."""
    skip = -inside & _BLOCK_MASK
    count = (len(data) - skip) >> BLOCK_SHIFT
    if count <= 0:
        return []
    view = memoryview(data)
    heads = bytes(view[skip : skip + (count << BLOCK_SHIFT) : BLOCK_SIZE])
    if 0 not in heads:
        return []
    first = (inside + skip) >> BLOCK_SHIFT
    found = []
    for index, head in enumerate(heads):
        at = skip + (index << BLOCK_SHIFT)
        if head == 0 and view[at : at + BLOCK_SIZE] == _ZEROS[:BLOCK_SIZE]:
            found.append(first + index)
    return found


def _kept_runs(
    block_map: BlockMap, inside: int, data: Buffer, first: int, last: int, log_id: int
) -> Sequence[_KeptRun]:
    """A write in runs of blocks that are to be written, and that become holes for being of zeros."""
    zeros = _zero_blocks(inside, data)
    return _runs_besides(zeros, block_map, first, last, log_id) if zeros else ((first, last, True),)


def _added_count(block_map: BlockMap, kept: Sequence[_KeptRun], log_id: int) -> int:
    """How many blocks a log gains by a write in these runs."""
    return sum(blockmap.other_count(block_map, low, high, log_id) for low, high, is_kept in kept if is_kept)


def _runs_besides(zeros: list[int], block_map: BlockMap, first: int, last: int, log_id: int) -> list[_KeptRun]:
    """A range in runs that are to be written and runs that become holes.

    A block of zeros that lies in the current log is written too, so that the log stays open.
    """
    holes = {block for block in zeros if blockmap.entry(block_map, block) != log_id}
    runs: list[_KeptRun] = []
    for block in range(first, last):
        is_kept = block not in holes
        if runs and runs[-1][2] == is_kept:
            runs[-1] = (runs[-1][0], block + 1, is_kept)
        else:
            runs.append((block, block + 1, is_kept))
    return runs


def _is_zero(inside: int, data: Buffer) -> bool:
    """Whether a write is of whole blocks, and of zeros alone. Nearly always its first bytes tell."""
    if data[0] or inside & _BLOCK_MASK or len(data) & _BLOCK_MASK:
        return False
    contents = data if isinstance(data, bytes) else bytes(data)
    return contents.count(0) == len(contents)


async def _look_again(old_blocks: OldBlocks) -> None:
    """Nothing to fetch: the maps point elsewhere by now."""
    await trio.lowlevel.checkpoint()


def _read_all(files: list[tuple[DeviceFile, int, memoryview, bool]]) -> None:
    for file, offset, part, is_source in files:
        count = file.read_into(part, offset)
        if count != len(part) and is_source:
            # A source is as long as what was written to it.
            part[count:] = bytes(len(part) - count)
        elif count != len(part):
            raise DamagedError(
                "a change log is shorter than its map says", "Unmount and run snapfs check, it names the blocks"
            )
