"""Space of deleted snapshots and removed volumes comes back, in small steps.

A point-in-time copy is needed while a snapshot exists between its first and its last instant.
When it is not, it goes, and with it the blocks that neither the version before it nor the one after
it names: a block's names are always consecutive versions, because a log id that has left an
object's map never returns to it. Whether the version before names a block is seen from the block's
change log alone: it does if the log was begun at or before its instant.

Each step is one commit. Cancelled or crashed between two, the work starts again from what is left.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import trio

from . import blockmap
from .blockmap import BlockMap
from .blockmasks import mask_runs, named_masks
from .changelog import ChangeLog, in_use
from .errors import DamagedError
from .formats import CHANGE_LOG, IMAGE_LOG, SOURCE_LOG, CandidateRow, CopyRow, FreedRow, LogRow, MapRow, ShardBatch
from .geometry import BLOCK_SHIFT, Epoch, SnapshotId, VolumeId, log_offset
from .namedblocks import NamedBlocks
from .notresident import when_resident
from .portion import Portion
from .processor import Processor
from .shardstore import ShardStore
from .snapshotindex import SnapshotIndex

_BATCH = 256
# So long one step holds the lock that every sync needs, unless a single object takes longer.
_HELD_S = 0.02
# So many copies are dropped while the processor commits nothing else, ...
_COPIES_A_STEP = 128
# ... and so many without a look at who else waits: one takes some 50 µs.
_DROPPED_A_TURN = 8
_Place = tuple[int, int, int]
_CopySpan = tuple[_Place, int]  # the place before, and the first instant behind
Span = tuple[int, int]  # first epoch and last instant
# Rests between two steps.
Rest = Callable[[], Awaitable[None]]
_Freed = dict[int, tuple[ChangeLog, int]]  # by log id: how many of its blocks go


@dataclass(frozen=True, slots=True)
class _Unneeded:
    """A copy that can go, between the map of the next (None: the live one) and the instant before.

    ``begun_since`` has, by their ids, those of its logs that were begun after that instant.
    """

    portion: Portion
    copy: CopyRow
    later: BlockMap | None
    earlier: int
    begun_since: Mapping[int, LogRow]


@dataclass(slots=True)
class _Step:
    """Copies to be dropped in one step, in the order of their instants, and where to look for more.

    Not ``is_complete``: some are to be left where they are, for their volume failed.
    """

    unneeded: list[_Unneeded]
    rest: list[_CopySpan]
    is_complete: bool = True


class Deleted(NamedTuple):
    """A snapshot that goes; ``volume_ids`` is None for one of all volumes."""

    snapshot_id: SnapshotId
    instant: int
    volume_ids: Collection[VolumeId] | None = None


async def release_snapshots(
    processor: Processor, deleted: Sequence[Deleted], rest: Rest = trio.lowlevel.checkpoint
) -> bool:
    """Take one processor's part of deleted snapshots apart; see :func:`drop_unneeded_copies`.

    They have left the processor's index, so no copy is made for them any more.
    """
    is_complete = await drop_unneeded_copies(processor, unheld_spans(processor.snapshots, deleted), rest)
    idle = await _idle_logs(processor)
    ids = [one.snapshot_id for one in deleted]
    rows = [log.log_id for log in idle]
    await processor.commit([], ShardBatch(dropped_intermediates=ids, dropped_logs=rows))
    # Their files too: one that was begun for what took no blocks, a cut, say, has one.
    await processor.remove_logs(idle)
    processor.wake()
    return is_complete


def unheld_spans(index: SnapshotIndex, deleted: Iterable[Deleted]) -> list[tuple[int, int]]:
    """From the instant of each up to the next by which all that it held is held: spans that do not overlap.

    What none but these needed has its last instant in one of them.
    """
    spans: list[tuple[int, int]] = []
    for one in sorted(deleted, key=lambda one: one.instant):
        high = index.next_of(one.volume_ids, one.instant)
        if spans and one.instant < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], high))
        else:
            spans.append((one.instant, high))
    return spans


async def drop_unneeded_copies(
    processor: Processor, spans: Iterable[tuple[int, int]], rest: Rest = trio.lowlevel.checkpoint
) -> bool:
    """Drop the copies that no snapshot in the index needs, with instants from the first up to the second of a span.

    False when some are left: nothing of a volume that could not be synced changes until the pool is opened again.
    """
    is_complete = True
    places: list[_CopySpan] = [((low - 1, 0, 0), high) for low, high in spans]
    while places:
        with trio.CancelScope(shield=True):
            async with processor.access.commit_lock:
                # What is pending goes to the store first, so that the store knows every copy.
                await processor.commit_locked(processor.sound_portions())
                step = await _find(processor, places)
                try:
                    for number, one in enumerate(step.unneeded, 1):
                        await _drop(one)
                        if number % _DROPPED_A_TURN == 0:
                            await trio.lowlevel.checkpoint()
                    if step.unneeded:
                        await processor.commit_locked(processor.sound_portions())
                finally:
                    _let_go(processor, step)
        is_complete &= step.is_complete
        places = step.rest
        # So that their room is there soon, also when there is much more to do.
        processor.wake()
        await rest()
    return is_complete


async def _find(processor: Processor, places: list[_CopySpan]) -> _Step:
    """The first copies of these spans that no snapshot needs."""
    store = processor.access.store
    rows, left = await processor.access.ask(_some_copies, store, places)
    unneeded = [row for row in rows if not processor.snapshots.holds(row.volume_id, row.epoch, row.instant)]
    wanted = [row for row in unneeded if not _has_failed(processor, row.volume_id)]
    neighbours = await processor.access.ask(lambda: [store.neighbours(row) for row in wanted])
    step = _Step([], left, is_complete=len(wanted) == len(unneeded))
    between = list(_between(wanted, neighbours))
    logs = await processor.access.ask(lambda: [_begun_since(store, *one) for one in between])
    for (row, later, earlier), begun_since in zip(between, logs, strict=True):
        portion = processor.portion(row.volume_id)
        portion.users += 1
        step.unneeded.append(_Unneeded(portion, row, later, earlier, begun_since))
    return step


def _between(
    wanted: Iterable[CopyRow], neighbours: Iterable[tuple[BlockMap | None, int]]
) -> Iterator[tuple[CopyRow, BlockMap | None, int]]:
    """Copies with the map after each and the instant before it, as they are when those before them are gone."""
    # An object's copies go one after the other: the one before is then that before all of them.
    before: dict[tuple[int, int], tuple[int, int]] = {}
    for row, (later, earlier) in zip(wanted, neighbours, strict=True):
        key = (row.volume_id, row.object_index)
        dropped_instant, its_earlier = before.get(key, (0, 0))
        if earlier and earlier == dropped_instant:
            earlier = its_earlier
        before[key] = (row.instant, earlier)
        yield row, later, earlier


def _begun_since(store: ShardStore, copy: CopyRow, later: BlockMap | None, earlier: int) -> dict[int, LogRow]:
    """Of the logs in which blocks lie that may be the copy's alone, those that were begun after the copy before it.

    Told from the many of a map in many pieces in a thread: in the event loop that took a third of a millisecond a copy.
    Raises DamagedError for a log that is not on record: what lies in it is not to go unseen.
    """
    if later is None:
        entries = (copy.block_map,) if isinstance(copy.block_map, int) else copy.block_map
        log_ids = set(entries) - {blockmap.HOLE}
    else:
        log_ids = {log_id for _, _, log_id in blockmap.dropped_runs(copy.block_map, later)}
    rows = store.some_logs(list(log_ids)) if log_ids else []
    if lost := log_ids - {row.log_id for row in rows}:
        raise DamagedError(
            f"a map of volume {copy.volume_id} names change log {min(lost)}, which does not exist",
            "Unmount and run snapfs check",
        )
    return {row.log_id: row for row in rows if row.epoch > earlier}


def _some_copies(store: ShardStore, places: list[_CopySpan]) -> tuple[list[CopyRow], list[_CopySpan]]:
    """Copies for one step, and where the next one looks."""
    rows: list[CopyRow] = []
    for number, (place, high) in enumerate(places):
        rows += store.copies_between(place, high, _COPIES_A_STEP - len(rows))
        if len(rows) == _COPIES_A_STEP:
            last = rows[-1]
            return rows, [((last.instant, last.volume_id, last.object_index), high), *places[number + 1 :]]
    return rows, []


def _has_failed(processor: Processor, volume_id: VolumeId) -> bool:
    portion = processor.portions.get(volume_id)
    return portion is not None and portion.failure is not None


def _let_go(processor: Processor, step: _Step) -> None:
    for one in step.unneeded:
        one.portion.users -= 1
        processor.let_go(one.portion)


async def _drop(one: _Unneeded) -> None:
    await when_resident(lambda _: one.portion.drop_copy_now(one.copy, one.later, one.earlier, one.begun_since))


async def _idle_logs(processor: Processor) -> list[ChangeLog]:
    """Empty logs that are no snapshot's change log: none was made since the one before. Nothing is written to them."""
    rows = await processor.access.ask(processor.access.store.empty_logs)
    unneeded = [row for row, before in rows if not processor.snapshots.holds(row.volume_id, before, row.epoch - 1)]
    logs = [processor.logs.known.get(row.log_id) or processor.logs.made_of(row) for row in unneeded]
    return [log for log in logs if log.is_idle]


async def settle_volume(processor: Processor, volume_id: VolumeId, span: Span | None) -> bool:
    """Give the objects that a volume inherits on one processor maps of its own; whether all have one, durably.

    ``span`` is None for a volume that is there; for one that only snapshots hold it tells for which
    its point-in-time copies must hold. The data stays where it is. Not all have one when the volume
    is removed or rolled back meanwhile, or cannot be synced. Fetches, so without the commit lock.
    """
    from_object = 0
    while objects := await processor.mapped_objects(volume_id, from_object, _BATCH, own=False):
        with processor.borrowed(volume_id) as portion:
            if portion.failure is not None or (span is None and portion.is_gone):
                return False
            if span is None:
                for object_index in objects:
                    await _settle(portion, object_index)
                if portion.is_gone:
                    return False
                await processor.commit([portion])
            elif span[0] <= span[1]:
                await processor.commit([], await _inherited_copies(processor, portion, span, objects))
        from_object = objects[-1] + 1
    return True


async def _settle(portion: Portion, object_index: int) -> None:
    await when_resident(lambda _: portion.settle_now(object_index))


async def _inherited_copies(processor: Processor, portion: Portion, span: Span, objects: list[int]) -> ShardBatch:
    """Copies of what a volume that is gone inherits, for the snapshots that hold it."""
    store = processor.access.store
    batch = ShardBatch()
    for object_index in objects:
        if await processor.access.ask(store.latest_copy_instant, portion.volume_id, object_index):
            continue
        found = await portion.inherited_map(object_index)
        if found != blockmap.HOLE:
            batch.copies.append(CopyRow(portion.volume_id, object_index, Epoch(span[1]), Epoch(span[0]), found))
    return batch


async def dismantle_volume(
    processor: Processor, volume_id: VolumeId, last_instant: int, rest: Rest = trio.lowlevel.checkpoint
) -> None:
    """Take one processor's part of a removed volume apart; nobody has it open for writing.

    Live maps that a snapshot needs become point-in-time copies of ``last_instant``, the instant
    before the removal; all else is freed.
    """
    portion = processor.portions.get(volume_id)
    is_held = processor.snapshots.holds(
        volume_id, await _first_instant(processor, volume_id, last_instant), last_instant
    )
    if not is_held and len(processor.traits.family_of(volume_id)) == 1:
        await _forget(processor, volume_id)
        return
    if portion is not None and portion.failure is None:
        await processor.commit([portion])
    if is_held:
        await _note_removal(processor, volume_id, last_instant)
    if portion is not None:
        portion.is_gone = True
    place: int | None = 0
    while place is not None:
        with trio.CancelScope(shield=True):
            async with processor.access.commit_lock:
                place = await _dismantle_some(processor, volume_id, last_instant, place)
        processor.wake()
        await rest()
    processor.tally.drop(volume_id)
    await processor.commit([], ShardBatch(dropped_portions=[volume_id]))
    if portion is not None:
        processor.let_go(portion)
    processor.wake()


async def _first_instant(processor: Processor, volume_id: VolumeId, last_instant: int) -> int:
    """Before which instants nothing of a removed volume was here: a snapshot from then holds nothing of it."""
    if volume_id in processor.traits.rows:
        # What it inherits, or is written over, was there before.
        return 0
    stored = await processor.access.ask(processor.access.store.first_epoch, volume_id)
    known = [log.epoch for log in processor.logs.known.values() if log.volume_id == volume_id]
    return min([*known, last_instant + 1] if stored is None else [*known, stored])


async def settle_lost(processor: Processor) -> None:
    """Give back what was never stored of volumes whose sync failed and that are gone, and of which nobody reads."""
    for volume_id in [one for one in processor.unsettled_ids if one not in processor.portions]:
        await _settle_lost(processor, volume_id)


async def _settle_lost(processor: Processor, volume_id: VolumeId) -> None:
    """Of a volume whose sync failed, once it is taken apart: forget what was written to its logs and never stored."""
    with trio.CancelScope(shield=True):
        async with processor.access.commit_lock:
            rows = await processor.access.ask(processor.access.store.logs_of, volume_id)
            stored = {row.log_id: row for row in rows}
            known = [
                one for one in processor.logs.known.values() if one.volume_id == volume_id and one.kind == CHANGE_LOG
            ]
            unstored = [log for log in known if log.log_id not in stored]
            processor.logs.release_quota(log.row() for log in unstored)
            await processor.remove_logs(unstored)
            for log in known:
                if log.log_id in stored:
                    log.add_blocks(stored[log.log_id].block_count - log.block_count)
            # In their files lies more than maps name.
            suspect = [row._replace(sealed=2) for row in rows if row.block_count and row.kind == CHANGE_LOG]
            await processor.commit_locked([], ShardBatch(logs=suspect))
            changed = [log for log in known if log.log_id in stored]
            for log in changed:
                log.sealed = 2
            # What a volume was written over is its snapshots', and counts no blocks.
            await processor.remove_logs([log for log in changed if not log.block_count])
    processor.unsettled_ids.discard(volume_id)


async def _note_removal(processor: Processor, volume_id: VolumeId, last_instant: int) -> None:
    """Leave an empty change log behind, which tells how much was mapped when the volume was removed."""
    after = await processor.access.ask(processor.access.store.log_after, volume_id, last_instant)
    count = processor.tally.counts.get(volume_id, 0)
    if after is None and count:
        row = processor.logs.empty_row(volume_id, Epoch(last_instant + 1), count)
        await processor.commit([], ShardBatch(logs=[row]))


async def _dismantle_some(processor: Processor, volume_id: VolumeId, last_instant: int, from_object: int) -> int | None:
    store = processor.access.store
    rows = await processor.access.ask(store.some_maps, volume_id, from_object, _BATCH)
    if not rows:
        return None
    batch = ShardBatch()
    with _freeing() as changed:
        for row in rows:
            batch.dropped_maps.append((volume_id, row.object_index))
            if processor.snapshots.holds(volume_id, row.epoch, last_instant):
                batch.copies.append(CopyRow(volume_id, row.object_index, Epoch(last_instant), row.epoch, row.block_map))
            else:
                await _free_map(processor, row, batch, changed)
        dead = await _commit_freed(processor, batch, changed)
    portion = processor.portions.get(volume_id)
    if portion is not None:
        # A snapshot's reader may have it open; its maps are copies now.
        portion.forget_live_maps(row.object_index for row in rows)
    await processor.remove_logs(dead)
    return rows[-1].object_index + 1


@contextlib.contextmanager
def _freeing() -> Iterator[_Freed]:
    """What is noted in it stays known until the block ends: another log of the same row would count for itself."""
    changed: _Freed = {}
    try:
        yield changed
    finally:
        for log, _ in changed.values():
            log.held -= 1


def _note_freed(changed: _Freed, log: ChangeLog, count: int) -> None:
    if log.log_id not in changed:
        log.held += 1
    changed[log.log_id] = (log, changed.get(log.log_id, (log, 0))[1] + count)


async def _commit_freed(processor: Processor, batch: ShardBatch, changed: _Freed) -> list[ChangeLog]:
    """Commit a batch that frees blocks of these logs; the logs that are empty now, whose files can go."""
    dead = []
    # By the counts of the store: what a volume has counted out and not committed is named by maps there still.
    rows = await processor.access.ask(processor.access.store.some_logs, list(changed)) if changed else []
    stored = {row.log_id: row for row in rows}
    for log, block_count in changed.values():
        # At once, so that nothing goes into it any more.
        log.sealed = log.sealed or 1
        row = stored.get(log.log_id, log.row())
        row_after = row._replace(block_count=row.block_count - block_count, sealed=row.sealed or 1)
        if row_after.block_count < 0:
            raise DamagedError(
                f"processor {processor.index}: change log {log.log_id} holds more than the {row.block_count} blocks"
                " that are counted",
                "Nothing of it was freed. Unmount and run snapfs check",
            )
        is_dead = row_after.block_count == 0 and log.block_count == block_count and not log.pins
        if is_dead:
            dead.append(log)
            batch.dropped_sums.append(log.log_id)
        if not is_dead or processor.snapshots.holds(log.volume_id, 0, log.epoch - 1):
            batch.logs.append(row_after)
        else:
            batch.dropped_logs.append(log.log_id)
    dead_ids = {log.log_id for log in dead}
    batch.freed = [freed for freed in batch.freed if freed.log_id not in dead_ids]
    await processor.commit_locked([], batch)
    for log, block_count in changed.values():
        log.add_blocks(-block_count)
    return dead


async def count_anew(processor: Processor, volume_id: VolumeId) -> None:
    """Count what a volume, which has no family, names in its logs with candidates, and look at none of these any more.

    What nothing names there is given back as after a crash. Nothing is written to the volume meanwhile.
    """
    counts: dict[int, int] = {}
    walk = NamedBlocks(processor.access, lambda: (volume_id,))
    while (named := await walk.step()) is not None:
        for masks in named.values():
            for log_id, mask in masks.items():
                counts[log_id] = counts.get(log_id, 0) + mask.bit_count()
    await processor.access.ask(processor.access.store.settle_candidates, volume_id, counts)


async def free_candidates(processor: Processor, rest: Rest = trio.lowlevel.checkpoint) -> int:
    """Free the candidates that no volume of their family names any more; how many blocks."""
    freed = 0
    while True:
        with trio.CancelScope(shield=True):
            async with processor.access.commit_lock:
                found = await _free_some_candidates(processor)
        if found is None:
            return freed
        freed += found
        await rest()


async def _free_some_candidates(processor: Processor) -> int | None:
    """One step of :func:`free_candidates`; None when there was nothing to look at."""
    store = processor.access.store
    # What is pending goes to the store first, so that the store knows every name. A block that
    # nobody names is never named again, so what is found holds.
    await processor.commit_locked(processor.sound_portions())
    rows = await processor.access.ask(store.candidates, _BATCH)
    if not rows:
        return None
    batch = ShardBatch()
    total = 0
    with _freeing() as changed:
        began_s = time.perf_counter()
        for object_index, of_object in _by_object(rows).items():
            batch.dropped_candidates += [number for number, _ in of_object]
            for log, mask in await _unnamed_of(processor, object_index, [row for _, row in of_object]):
                base = log_offset(object_index, processor.processor_count)
                for block, count in mask_runs(mask):
                    _note_freed(changed, log, count)
                    batch.freed.append(FreedRow(log.log_id, base + (block << BLOCK_SHIFT), count << BLOCK_SHIFT))
                    total += count
            if time.perf_counter() - began_s >= _HELD_S:
                # Whoever waits for a commit comes first.
                break
        dead = await _commit_freed(processor, batch, changed)
    await processor.remove_logs(dead)
    processor.wake()
    return total


def _by_object(rows: Iterable[tuple[int, CandidateRow]]) -> dict[int, list[tuple[int, CandidateRow]]]:
    found: dict[int, list[tuple[int, CandidateRow]]] = {}
    for number, row in rows:
        found.setdefault(row.object_index, []).append((number, row))
    return found


async def _unnamed_of(
    processor: Processor, object_index: int, candidates: Iterable[CandidateRow]
) -> list[tuple[ChangeLog, int]]:
    """By log: the mask of an object's candidates there that no volume of the log's family names."""
    wanted: dict[int, int] = {}
    for row in candidates:
        wanted[row.log_id] = wanted.get(row.log_id, 0) | ((1 << row.block_count) - 1) << row.block
    families: dict[tuple[VolumeId, ...], list[ChangeLog]] = {}
    found = []
    with contextlib.ExitStack() as stack:
        for log_id in wanted:
            log = await _log(processor, log_id)
            if log is not None:
                stack.enter_context(in_use([log]))
                families.setdefault(tuple(processor.traits.family_of(log.volume_id)), []).append(log)
        for family, logs in families.items():
            log_ids = {log.log_id for log in logs}
            # All logs together, for it is looking at all versions of the object that takes long.
            named = await processor.access.ask(named_masks, processor.access.store, family, object_index, log_ids)
            found += [(log, wanted[log.log_id] & ~named.get(log.log_id, 0)) for log in logs]
    return found


async def _log(processor: Processor, log_id: int) -> ChangeLog | None:
    """A log by its number; None when there is none."""
    log = processor.logs.known.get(log_id)
    if log is None:
        row = await processor.access.ask(processor.access.store.log, log_id)
        log = None if row is None else processor.logs.adopt(row)
    return log


async def _free_map(processor: Processor, row: MapRow, batch: ShardBatch, changed: _Freed) -> None:
    """Free the blocks of a live map that goes, but those that the latest copy names."""
    store = processor.access.store
    latest = await processor.access.ask(store.latest_copy_instant, row.volume_id, row.object_index)
    base = log_offset(row.object_index, processor.processor_count)
    for block, count, log_id in blockmap.all_runs(row.block_map):
        log = await _log(processor, log_id) if log_id != blockmap.HOLE else None
        if log is None or log.kind != CHANGE_LOG or log.epoch <= latest:
            continue
        if log.volume_id != row.volume_id or log.epoch <= processor.traits.shared_until(row.volume_id):
            batch.candidates.append(CandidateRow(log.log_id, row.object_index, block, count))
        else:
            _note_freed(changed, log, count)
            batch.freed.append(FreedRow(log.log_id, base + (block << BLOCK_SHIFT), count << BLOCK_SHIFT))


async def _forget(processor: Processor, volume_id: VolumeId) -> None:
    """A removed volume that no snapshot holds: all of it goes at once."""
    with trio.CancelScope(shield=True):
        async with processor.access.commit_lock:
            store = processor.access.store
            logs = await processor.access.ask(store.logs_of, volume_id)
            await processor.access.ask(store.forget_volume, volume_id)
            processor.sources.pop(volume_id, None)
            known = [log for log in processor.logs.known.values() if log.volume_id == volume_id]
            listed = {row.log_id for row in logs}
            # Of a volume whose sync failed some were never stored.
            processor.logs.release_quota([*logs, *(log.row() for log in known if log.log_id not in listed)])
            portion = processor.portions.pop(volume_id, None)
            if portion is not None:
                portion.release()
            processor.tally.drop(volume_id)
            processor.unsettled_ids.discard(volume_id)
            stored = {log.log_id for log in known}
            await processor.remove_logs(
                [log for log in known if log.kind != IMAGE_LOG]
                + [
                    processor.logs.made_of(row)
                    for row in logs
                    if row.log_id not in stored and (row.block_count or row.kind == SOURCE_LOG)
                ]
            )
