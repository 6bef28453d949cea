"""Copy-on-write: a processor's part of a volume that is overwritten in place.

The volume's bytes lie in its source, an image outside the pool or a file of its own, and its live
maps name nothing else. A change log holds what the source held before it was overwritten. An object's
latest point-in-time copy names the source for each block that has not changed since; before such
a block is overwritten, what it holds is written to the change log, and the copy is pointed at that,
durably and in this order: the preserved data; the copy's map; then the write (Ceph, LVM and dm-snapshot
preserve alike; see https://docs.kernel.org/admin-guide/device-mapper/snapshot.html). So a crash in
between harms no snapshot.

An older copy that names the source for a block means what the next newer copy says of it, and the
latest copy means the source itself. When a copy goes, the one before it takes over what it preserved.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import trio

from . import blockmap
from .backends import Buffer, DeviceFile
from .blockmap import HOLE, BlockMap
from .changelog import ChangeLog
from .errors import DamagedError, NotFoundError, SnapfsError, SyncFailedError
from .formats import IMAGE_LOG, CopyRow, FreedRow, LogRow
from .geometry import BLOCK_SHIFT, BLOCK_SIZE, BLOCKS_PER_OBJECT, log_offset
from .notresident import NotResidentError, OldBlocks, when_resident
from .portion import Portion
from .shardstate import ObjectState

_BLOCK_MASK = BLOCK_SIZE - 1
_ZERO_BLOCK = bytes(BLOCK_SIZE)


@dataclass(slots=True)
class _Run:
    """A run of an object's blocks whose contents go to the change log of that number, and to no later one."""

    log_id: int
    object_index: int
    first: int
    count: int
    contents: bytearray


class CowPortion(Portion):
    """One copy-on-write volume on one processor."""

    is_in_place = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        source = self._neighbours.sources.get(self.volume_id)
        if source is None:
            raise DamagedError(
                f"a shard store has lost the record of what volume {self.volume_id} is written over",
                "Restore the pool from a copy; nothing of it was removed",
            )
        self._source_id = source.log_id
        self._preserve_turn = trio.Lock()
        self._wanted: list[tuple[int, int, int]] = []
        self._older: dict[tuple[int, int], CopyRow | None] = {}

    def base_map(self, object_index: int) -> BlockMap:
        """See :meth:`Portion.base_map`: all of it, as it grows where it is."""
        return self._source_id

    # -- writing -----------------------------------------------------------------------------

    def write_now(self, object_index: int, inside: int, data: Buffer, old_blocks: OldBlocks) -> None:
        """Overwrite the source at byte ``inside`` of an object, once all that snapshots need is preserved."""
        self.ready_to_write_now(object_index, inside, data, old_blocks)
        self._source_file().write(data, log_offset(object_index, self._processor_count) + inside)

    def ready_to_write_now(self, object_index: int, inside: int, data: Buffer, old_blocks: OldBlocks) -> int:
        """See :meth:`Portion.ready_to_write_now`; what goes into the log is there by then."""
        first = inside >> BLOCK_SHIFT
        self._check_preserved(object_index, first, (inside + len(data) + _BLOCK_MASK) >> BLOCK_SHIFT)
        return 0

    def _known_state(self, object_index: int) -> ObjectState:
        """An object with its latest copy known, as it is durable. Raises NotResidentError."""
        state = self._state_with_instant(object_index)
        if state.copied and state.kept is None:
            is_pending = any(row.instant == state.copied for row in self.pending.get(object_index, ()))
            if is_pending and self.failure is not None:
                # It will never be durable.
                raise SyncFailedError(self.failure.reason, self.failure.fix)
            raise NotResidentError(self._commit_kept if is_pending else partial(self._look_up_kept, object_index))
        return state

    def _state_with_instant(self, object_index: int) -> ObjectState:
        """An object of which it is known when its latest copy was made. Raises NotResidentError."""
        state = self.objects.get(object_index)
        if state is None:
            raise NotResidentError(partial(self._load, object_index))
        if state.copied is None:
            raise NotResidentError(partial(self._look_up_kept, object_index))
        return state

    def _check_preserved(self, object_index: int, first: int, last: int) -> None:
        """Raises NotResidentError when something is still to be preserved before these blocks are overwritten."""
        if self.is_gone:
            raise NotFoundError(f"volume {self.volume_id} was removed", "Its source is its snapshots' alone")
        state = self._known_state(object_index)
        source = self._logs.known.get(self._source_id)
        if source is None or source.file is None:
            raise NotResidentError(partial(self._open_log, self._source_id))
        source.liveness.check_now()
        if self._needs_copy(state) or (state.kept is not None and self._names_source(state.kept, first, last)):
            raise NotResidentError(partial(self._preserve, object_index, first, last))

    def _needs_copy(self, state: ObjectState) -> bool:
        epoch = max(self._clock.epoch, self.named_epoch)
        instant = min(epoch - 1, self.last_instant)
        return state.epoch < epoch and self._snapshots.holds(self.volume_id, state.epoch, instant)

    def _names_source(self, copy: CopyRow, first: int, last: int) -> bool:
        block_map = copy.block_map
        if isinstance(block_map, int):
            return block_map == self._source_id
        if last - first == 1:
            return bool(block_map[first] == self._source_id)
        return self._source_id in block_map[first:last]

    def is_shared(self, log: ChangeLog) -> bool:
        """See :meth:`Portion.is_shared`: a clone may come to name what is preserved long after it was made."""
        return log.volume_id != self.volume_id or self._traits.is_origin(self.volume_id)

    def _source_file(self) -> DeviceFile:
        """The source, about to be written to.

        Raises SyncFailedError when it must not be, NotResidentError while its device has to answer first.
        """
        self._check_refusal()
        source = self._logs.known[self._source_id]
        source.liveness.check_now()
        self._mark_dirty(source)
        assert source.file is not None, "_check_preserved has seen to it"
        return source.file

    def unmap_now(self, object_index: int, first: int, last: int = BLOCKS_PER_OBJECT) -> None:
        """Make holes of an object's blocks from ``first`` up to ``last``, once what they hold is preserved."""
        if first >= last:
            return
        self._check_preserved(object_index, first, last)
        offset = log_offset(object_index, self._processor_count) + (first << BLOCK_SHIFT)
        self._source_file().punch(offset, (last - first) << BLOCK_SHIFT)

    async def fit_source(self, size_bytes: int, *, may_cut: bool) -> None:
        """See :meth:`Portion.fit_source`."""
        source = self._neighbours.sources[self.volume_id]
        if source.kind != IMAGE_LOG:
            return
        await self._open_log(self._source_id, {})
        log = self._logs.known[self._source_id]
        await self._with_logs([log], partial(_fit, log, size_bytes, may_cut))
        self._source_file()

    @property
    def is_preserving(self) -> bool:
        """Whether something may be on its way to a change log, also to one of before the last snapshot."""
        return self._preserve_turn.locked()

    # -- preserving --------------------------------------------------------------------------

    async def _look_up_kept(self, object_index: int, old_blocks: OldBlocks) -> None:
        """Learn an object's latest copy. One that is pending is not durable, and no writer may rely on it."""
        before = (self.commits, self.generation)
        row = await self._access.ask(self._access.store.latest_copy, self.volume_id, object_index)
        state = self.objects.get(object_index)
        if state is None or (self.commits, self.generation) != before or self.in_commit:
            await trio.lowlevel.checkpoint()
            return
        instants = [one.instant for one in self.pending.get(object_index, ())]
        stored = 0 if row is None else row.instant
        state.copied = max([stored, *instants])
        if state.kept is None and state.copied not in instants:
            state.kept = row

    async def _commit_kept(self, old_blocks: OldBlocks) -> None:
        """Make pending copies durable: before that nothing is overwritten that they name elsewhere."""
        await self._neighbours.commit(self)

    async def _preserve(self, object_index: int, first: int, last: int, old_blocks: OldBlocks) -> None:
        """Preserve a range of blocks, durably. Those that come meanwhile are served together."""
        mine = (object_index, first, last)
        self._wanted.append(mine)
        with trio.CancelScope(shield=True):
            async with self._preserve_turn:
                wanted, self._wanted = self._wanted, []
                try:
                    if wanted:
                        await self._preserve_all(wanted)
                except (OSError, SnapfsError):
                    # There may be room for this one, if not for all, or it is another's that cannot be read. Whoever
                    # is not served looks again, and asks again.
                    if len(wanted) == 1 and mine in wanted:
                        raise
                    if mine in wanted:
                        await self._preserve_all([mine])

    async def _preserve_all(self, wanted: list[tuple[int, int, int]]) -> None:
        await self._neighbours.reserve.check()
        runs: list[_Run] = []
        for object_index, first, last in _joined(wanted):
            runs += await self._planned(object_index, first, last)
        log = self._log
        if log is None or log.sealed or not runs or any(run.log_id != log.log_id for run in runs):
            # A snapshot was cut meanwhile, perhaps while the next object was planned, or all is preserved: whoever
            # asked looks again. Two copies of an object must not name one place.
            return
        # Again: the log that was begun may have been one open file too many.
        source = self._logs.adopt(self._neighbours.sources[self.volume_id])
        file = self._logs.open_file(source)
        log.pins += 1
        reserved = 0
        try:
            await self._with_logs([source], partial(_read_runs, file, runs, self._processor_count))
            if log.quota is not None:
                wanted_count = sum(_stored_count(run) for run in runs)
                log.quota.check(wanted_count)
                log.quota.add(wanted_count)
                reserved = wanted_count
            await self._with_logs([log], partial(_write_runs, log, runs, self._processor_count))
        except BaseException:
            if log.quota is not None:
                log.quota.add(-reserved)
            self._give_back_runs(log, runs)
            raise
        finally:
            log.pins -= 1
        # Only now: a commit under way may have synced it before all was written.
        self._mark_dirty(log)
        named_before = log.block_count
        changed = {run.object_index: self._point_copy_at(log, run) for run in runs}
        if log.quota is not None:
            log.quota.add(log.block_count - named_before - reserved)
        try:
            await self._neighbours.commit(self)
        except BaseException:
            # Whether the copies are durable is not known, and what is known of them no longer true.
            for object_index in changed:
                if (state := self.objects.get(object_index)) is not None:
                    state.kept = None
            raise
        for object_index, copy in changed.items():
            state = self.objects.get(object_index)
            if state is not None and copy is not None and state.copied == copy.instant:
                state.kept = copy

    def _give_back_runs(self, log: ChangeLog, runs: list[_Run]) -> None:
        """After a failure: what was written of these is named by nothing but what was preserved before."""
        for run in runs:
            copy = self._latest_copy_now(run.object_index)
            entries = blockmap.expanded(HOLE if copy is None else copy.block_map)
            unnamed = [index for index in range(run.count) if entries[run.first + index] != log.log_id]
            self._give_back_blocks(log, run, unnamed)

    def _give_back_blocks(self, log: ChangeLog, run: _Run, indexes: Iterable[int]) -> None:
        base = log_offset(run.object_index, self._processor_count)
        for index in indexes:
            self._freed.append(FreedRow(log.log_id, base + ((run.first + index) << BLOCK_SHIFT), BLOCK_SIZE))
        self._seal(log)

    async def _planned(self, object_index: int, first: int, last: int) -> list[_Run]:
        return await when_resident(lambda _: self._plan_now(object_index, first, last))

    def _plan_now(self, object_index: int, first: int, last: int) -> list[_Run]:
        """The runs to be preserved of an object, its copy made and the change log begun."""
        state = self._known_state(object_index)
        source = self._logs.known.get(self._source_id)
        if source is None or source.file is None:
            raise NotResidentError(partial(self._open_log, self._source_id))
        if not self._needs_copy(state) and (state.kept is None or not self._names_source(state.kept, first, last)):
            return []
        if self._log is None or self._log.sealed or self._epoch < max(self._clock.epoch, self.named_epoch):
            self._enter_epoch()
        self._keep_copy(object_index, state)
        if state.kept is None:
            return []
        assert self._log is not None
        return [
            _Run(self._log.log_id, object_index, block, count, bytearray())
            for block, count, log_id in blockmap.runs(state.kept.block_map, first, last)
            if log_id == self._source_id
        ]

    def _keep_copy(self, object_index: int, state: ObjectState) -> None:
        """See :meth:`Portion._keep_copy`."""
        before = state.copied
        if state.epoch < self._epoch:
            self._dirty_objects.add(object_index)
        super()._keep_copy(object_index, state)
        if state.copied != before:
            state.kept = self.pending[object_index][-1]
            self.generation += 1

    def _point_copy_at(self, log: ChangeLog, run: _Run) -> CopyRow | None:
        """Have the latest copy name what was preserved of a run; blocks of zeros become holes of it.

        None when the copy went meanwhile; then what was preserved goes too.
        """
        copy = self._latest_copy_now(run.object_index)
        entries = blockmap.expanded(HOLE if copy is None else copy.block_map)[:]
        stored = 0
        leftover = []
        for index in range(run.count):
            is_zero = run.contents.startswith(_ZERO_BLOCK, index << BLOCK_SHIFT)
            if entries[run.first + index] == self._source_id:
                entries[run.first + index] = HOLE if is_zero else log.log_id
                stored += not is_zero
            elif not is_zero and entries[run.first + index] != log.log_id:
                leftover.append(index)
        self._note_changed(log)
        # The quota counts them already. More counted than named is given back; fewer is damage.
        log.block_count += stored
        try:
            if leftover:
                self._give_back_blocks(log, run, leftover)
            if copy is None:
                return None
            copy = copy._replace(block_map=blockmap.simplified(entries))
            self._put_pending(copy)
        except BaseException:
            log.block_count -= stored
            raise
        return copy

    def _latest_copy_now(self, object_index: int) -> CopyRow | None:
        """The latest copy, as it is to be stored: pending ones are newer than what is known to be durable."""
        state = self.objects.get(object_index)
        if state is None or not state.copied:
            return None
        for row in self.pending.get(object_index, ()):
            if row.instant == state.copied:
                return row
        return state.kept

    def _put_pending(self, copy: CopyRow) -> None:
        rows = self.pending.setdefault(copy.object_index, [])
        rows[:] = sorted([row for row in rows if row.instant != copy.instant] + [copy], key=lambda row: row.instant)
        self._dirty_objects.add(copy.object_index)
        self.generation += 1

    # -- reading snapshots -------------------------------------------------------------------

    async def snapshot_map(self, object_index: int, instant: int) -> BlockMap:
        """See :meth:`Portion.snapshot_map`; for as long as ``generation`` stays as it is."""
        while True:
            state = self.objects.get(object_index)
            if state is None:
                await self._load(object_index, {})
                continue
            if state.epoch <= instant:
                return state.block_map
            before = (self.commits, self.generation, self.in_commit)
            rows = await self._access.ask(self._access.store.copies_from, self.volume_id, object_index, instant)
            if before != (self.commits, self.generation, self.in_commit):
                continue
            chain = {row.instant: row for row in rows}
            chain.update({row.instant: row for row in self.pending.get(object_index, ()) if row.instant >= instant})
            ordered = [chain[one] for one in sorted(chain)]
            if ordered and ordered[0].epoch <= instant:
                return self._folded(ordered)
            if self.is_gone:
                return await self.inherited_map(object_index)
            raise DamagedError(
                f"object {object_index} of volume {self.volume_id} has no point-in-time copy for instant {instant}",
                "Unmount and run snapfs check",
            )

    def _folded(self, chain: list[CopyRow]) -> BlockMap:
        """The map of the first of these copies: where it names the source, the next one tells."""
        found = chain[0].block_map
        for row in chain[1:]:
            if isinstance(found, int):
                if found != self._source_id:
                    return found
                found = row.block_map
                continue
            newer = blockmap.expanded(row.block_map)
            source_id = self._source_id
            found = array("I", [later if one == source_id else one for one, later in zip(found, newer, strict=True)])
        return blockmap.simplified(found)

    async def lasting_map(self, object_index: int, instant: int) -> BlockMap:
        """See :meth:`Portion.lasting_map`: what a clone looks at is preserved whole, durably.

        The clone's own commit has its map, and neither the rows of this volume's logs nor what lies in them.
        """
        while True:
            found = await self.snapshot_map(object_index, instant)
            if self.pending.get(object_index):
                if self.failure is not None:
                    raise SyncFailedError(self.failure.reason, self.failure.fix)
                # Also where what noted them found no memory: what is pending goes with its object.
                if object_index in self.objects:
                    self._dirty_objects.add(object_index)
                await self._neighbours.commit(self)
                continue
            entries = (found,) if isinstance(found, int) else found
            if self.is_gone or self._source_id not in entries:
                return found
            await self._preserve(object_index, 0, BLOCKS_PER_OBJECT, {})

    # -- dropping copies ---------------------------------------------------------------------

    def drop_copy_now(
        self, copy: CopyRow, later: BlockMap | None, earlier: int, begun_since: Mapping[int, LogRow]
    ) -> None:
        """Forget a copy that no snapshot needs; the one before it takes over what that needs of it."""
        object_index = copy.object_index
        state, current, older = self._drop_plan(copy, earlier)
        freed = self._not_taken_over(current, older)
        self._older.pop((object_index, earlier), None)
        rows = self.pending.get(object_index, [])
        rows[:] = [row for row in rows if row.instant != copy.instant]
        if older is not None:
            older = older._replace(block_map=self._folded([older, current]))
            self._put_pending(older)
        if not self.pending.get(object_index):
            self.pending.pop(object_index, None)
        if state.copied == copy.instant:
            # What took over from it is not durable before the next commit.
            state.copied, state.kept = earlier, None
        self._dropped_copies.append((object_index, copy.instant))
        self._dirty_objects.add(object_index)
        self.generation += 1
        for log, offset, length in freed:
            self._free(log, object_index, offset, length)

    def _drop_plan(self, copy: CopyRow, earlier: int) -> tuple[ObjectState, CopyRow, CopyRow | None]:
        """The object, the copy as it is now, and the one before it. Raises NotResidentError."""
        state = self._state_with_instant(copy.object_index)
        # Blocks may have been preserved in them since they were stored, also in one that is not the latest any more.
        pending: dict[int, CopyRow] = {row.instant: row for row in self.pending.get(copy.object_index, ())}
        # What is known of the latest may be older than what is stored: a commit has ended, and its task goes on later.
        current = pending.get(copy.instant) or copy
        if not earlier:
            return state, current, None
        key = (copy.object_index, earlier)
        if earlier in pending:
            return state, current, pending[earlier]
        if key not in self._older:
            raise NotResidentError(partial(self._look_up_older, *key))
        return state, current, self._older[key]

    async def _look_up_older(self, object_index: int, instant: int, old_blocks: OldBlocks) -> None:
        store = self._access.store
        self._older[(object_index, instant)] = await self._access.ask(
            store.copy_at, self.volume_id, object_index, instant
        )

    def _not_taken_over(self, current: CopyRow, older: CopyRow | None) -> list[tuple[ChangeLog, int, int]]:
        """Runs of what a copy preserved that the one before it has no need of."""
        base = log_offset(current.object_index, self._processor_count)
        before = blockmap.expanded(HOLE if older is None else older.block_map)
        now = blockmap.expanded(current.block_map)
        found = []
        block = 0
        for (log_id, is_taken), group in groupby(
            zip(now, before, strict=True), key=lambda pair: (pair[0], pair[1] == self._source_id)
        ):
            count = sum(1 for _ in group)
            if log_id not in (HOLE, self._source_id) and not is_taken:
                log = self._logs.known.get(log_id)
                if log is None:
                    raise NotResidentError(partial(self._look_at_log, log_id))
                found.append((log, base + (block << BLOCK_SHIFT), count << BLOCK_SHIFT))
            block += count
        return found


def _joined(wanted: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Ranges of blocks by object, those that overlap as one."""
    found: list[tuple[int, int, int]] = []
    for object_index, first, last in sorted(wanted):
        if found and found[-1][0] == object_index and first <= found[-1][2]:
            found[-1] = (object_index, found[-1][1], max(last, found[-1][2]))
        else:
            found.append((object_index, first, last))
    return found


def _read_runs(source: DeviceFile, runs: list[_Run], processor_count: int) -> None:
    """Read what the source holds. It is as long as what was written to it; behind that it holds zeros. Blocks."""
    for run in runs:
        offset = log_offset(run.object_index, processor_count) + (run.first << BLOCK_SHIFT)
        run.contents = bytearray(run.count << BLOCK_SHIFT)
        source.read_into(run.contents, offset)


def _zero_groups(run: _Run) -> Iterator[tuple[bool, int]]:
    """Blocks of zeros and others in turn, with how many there are in a row."""
    for is_zero, group in groupby(
        range(run.count), key=lambda index: run.contents.startswith(_ZERO_BLOCK, index << BLOCK_SHIFT)
    ):
        yield is_zero, sum(1 for _ in group)


def _stored_count(run: _Run) -> int:
    return sum(count for is_zero, count in _zero_groups(run) if not is_zero)


def _write_runs(log: ChangeLog, runs: list[_Run], processor_count: int) -> None:
    """Write to the log all that is not zero. Blocks."""
    assert log.file is not None
    for run in runs:
        offset = log_offset(run.object_index, processor_count) + (run.first << BLOCK_SHIFT)
        view = memoryview(run.contents)
        at = 0
        for is_zero, count in _zero_groups(run):
            end = at + (count << BLOCK_SHIFT)
            if not is_zero:
                log.file.write_new(view[at:end], offset + at)
            at = end


def _fit(log: ChangeLog, size_bytes: int, may_cut: bool) -> None:
    assert log.file is not None
    if log.file.size() < size_bytes or (may_cut and log.file.size() > size_bytes):
        log.file.truncate(size_bytes)
