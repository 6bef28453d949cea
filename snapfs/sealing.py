"""Sealing on one processor: checksums for change logs that take no more writes, and content hashes.

A log is closed once a snapshot was made since it was begun: whatever is written then goes to
another. Of a copy-on-write volume that is what was preserved; its source goes on changing and is not sealed.
What is durable in which order: the log's data (by the snapshot); its checksums; that it has them
all; only then are its reads held against them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

import trio

from . import blockmap
from .backends import DeviceFile
from .blockmap import HOLE, BlockMap
from .checksums import ZERO_DIGEST, ObjectSums, SumsMaker
from .contenthash import ContentHash, element_of
from .cowportion import CowPortion
from .errors import SnapfsError
from .formats import CHANGE_LOG, LogRow, ShardBatch, SumsRow
from .geometry import BLOCK_SHIFT, BLOCKS_PER_OBJECT, OBJECT_SHIFT, VolumeId
from .processor import Processor
from .shardstore import ShardStore
from .unnamed import mask_runs, objects_with_data

_STEP_BLOCKS = 16384
_RUN_BLOCKS_MAX = 256
_BATCH = 256
Pace = Callable[[int], Awaitable[None]]
OnFailure = Callable[[str, Exception], None]


class NotSealedError(SnapfsError):
    """Something of a snapshot has no checksums yet."""


async def at_full_pace(size_bytes: int) -> None:
    """As fast as it goes."""
    await trio.lowlevel.checkpoint()


def raise_failure(what: str, error: Exception) -> None:
    """A failure ends it."""
    raise error


async def seal_logs(processor: Processor, pace: Pace = at_full_pace, on_failure: OnFailure = raise_failure) -> bool:
    """Give all closed logs their checksums; whether all have them now.

    ``pace`` is told of bytes read, and may wait. ``on_failure`` is told of a log that cannot be read; then the others
    go on.
    """
    is_complete = True
    for row in await processor.access.ask(processor.access.store.unsummed_logs):
        with trio.CancelScope(shield=True):
            async with processor.access.commit_lock:
                state = _is_closed(processor, row)
        if state:
            try:
                await _seal_log(processor, row, pace)
            except (OSError, SnapfsError) as error:
                is_complete = False
                on_failure(f"change log {row.log_id} of processor {processor.index}", error)
        elif state is None:
            is_complete = False
    return is_complete


def _is_closed(processor: Processor, row: LogRow) -> bool | None:
    """Whether a log takes no more writes, all of it being durable; None: it will, but not yet.

    The caller holds the commit lock, so no commit is under way.
    """
    facts = processor.facts_of(row.volume_id)
    portion = processor.portions.get(row.volume_id)
    if not facts.is_gone:
        # Also one that is removed and still open goes on writing.
        named_epoch = max(facts.named_epoch, 0 if portion is None else portion.named_epoch)
        if row.epoch >= max(processor.clock.epoch, named_epoch):
            return False
    if portion is not None and portion.failure is not None:
        return None
    if isinstance(portion, CowPortion) and portion.is_preserving:
        return None
    log = processor.logs.known.get(row.log_id)
    is_in_use = log is not None and (log.dirty or log.pins or (portion is not None and portion.current_log is log))
    return None if is_in_use else True


async def _seal_log(processor: Processor, row: LogRow, pace: Pace) -> None:
    try:
        file = processor.logs.open_alone(row.log_id, row.device_id)
    except FileNotFoundError:
        # It died meanwhile, or is missing, which reads of it and the verifier tell.
        return
    try:
        extents = await processor.access.in_thread(file.data_extents)
        objects = objects_with_data(extents, processor.index, processor.processor_count)
        batch = ShardBatch()
        pending = 0
        for object_index, mask in objects:
            base = (object_index // processor.processor_count) << OBJECT_SHIFT
            sums = await processor.access.in_thread(read_sums, file, base, mask)
            batch.sums.append(SumsRow(row.log_id, object_index, sums))
            pending += mask.bit_count()
            await pace(mask.bit_count() << BLOCK_SHIFT)
            if pending >= _STEP_BLOCKS or len(batch.sums) >= _BATCH:
                await processor.commit([], batch)
                batch, pending = ShardBatch(), 0
        with trio.CancelScope(shield=True):
            async with processor.access.commit_lock:
                if not _is_closed(processor, row):
                    return
                batch.summed_logs.append(row.log_id)
                await processor.commit_locked([], batch)
                log = processor.logs.known.get(row.log_id)
                if log is not None:
                    processor.logs.note_summed(log)
    finally:
        file.close()


def read_sums(file: DeviceFile, base: int, mask: int) -> ObjectSums:
    """The checksums of an object's blocks, which lie from ``base`` on in a log's file. Blocks."""
    maker = SumsMaker()
    for first, count in _short_runs(mask):
        buffer = memoryview(bytearray(count << BLOCK_SHIFT))
        # Short at the end of the file: what is behind it is zeros.
        file.read_into(buffer, base + (first << BLOCK_SHIFT))
        for index in range(count):
            maker.add(first + index, buffer[index << BLOCK_SHIFT : (index + 1) << BLOCK_SHIFT])
    return maker.made()


def _short_runs(mask: int) -> Iterator[tuple[int, int]]:
    for first, count in mask_runs(mask):
        for start in range(0, count, _RUN_BLOCKS_MAX):
            yield first + start, min(_RUN_BLOCKS_MAX, count - start)


async def portion_content(processor: Processor, volume_id: VolumeId, instant: int) -> int:
    """The content hash of a volume's part here as it stood at an instant that a snapshot holds.

    From that of an earlier snapshot, if that one is still there: then the cost follows what
    changed. Raises NotSealedError when a log in it has no checksums.
    """
    store = processor.access.store
    index = processor.snapshots
    row = await processor.access.ask(store.content, volume_id)
    if row is None or row.instant > instant or not index.holds(volume_id, row.instant, row.instant):
        return await _whole_content(processor, volume_id, instant)
    if row.instant == instant or not await processor.access.ask(store.has_log_between, volume_id, row.instant, instant):
        return row.value
    content = ContentHash(row.value)
    place = -1
    while True:
        rows = await processor.access.ask(store.changed_maps, volume_id, row.instant, instant, place, _BATCH)
        old, new = await processor.access.ask(_elements_of_changes, store, rows)
        content.replace(old, new)
        if len(rows) < _BATCH:
            break
        place = rows[-1][0]
    if not index.holds(volume_id, row.instant, row.instant):
        # It was deleted meanwhile, and its copies may have gone before they were looked at.
        return await _whole_content(processor, volume_id, instant)
    return content.value


async def _whole_content(processor: Processor, volume_id: VolumeId, instant: int) -> int:
    content = ContentHash()
    from_object = 0
    with processor.borrowed(volume_id) as portion:
        while objects := await processor.mapped_objects(volume_id, from_object, _BATCH):
            maps = [(one, await portion.snapshot_map(one, instant)) for one in objects]
            content.replace([], await processor.access.ask(_elements, processor.access.store, maps))
            from_object = objects[-1] + 1
    return content.value


def _elements_of_changes(store: ShardStore, rows: list[tuple[int, BlockMap, BlockMap]]) -> tuple[list[int], list[int]]:
    return _elements(store, [(row[0], row[1]) for row in rows]), _elements(store, [(row[0], row[2]) for row in rows])


def _elements(store: ShardStore, maps: list[tuple[int, BlockMap]]) -> list[int]:
    """What stands for objects with these maps, from their blocks' digests. Blocks."""
    summed: dict[int, bool] = {}
    elements = []
    for object_index, block_map in maps:
        if block_map == HOLE:
            continue
        known: dict[int, ObjectSums] = {}
        parts = []
        for block, count, log_id in blockmap.runs(block_map, 0, BLOCKS_PER_OBJECT):
            if log_id == HOLE:
                parts.append(ZERO_DIGEST * count)
                continue
            if log_id not in summed:
                log = store.log(log_id)
                summed[log_id] = log is not None and log.kind == CHANGE_LOG and bool(log.summed)
            if not summed[log_id]:
                raise NotSealedError(f"change log {log_id} has no checksums yet")
            if log_id not in known:
                known[log_id] = store.sums(log_id, object_index)
            parts.append(known[log_id].digests_of(block, count))
        elements.append(element_of(object_index, b"".join(parts)))
    return elements
