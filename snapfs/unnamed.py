"""Blocks in a change log that no map names: what a crash leaves of writes that were never committed.

A log that may hold some is sealed first, so it takes no more writes and what is unnamed stays so.
All calls block; the processor runs them in a thread, some objects at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

from . import blockmap
from .changelog import ChangeLogs
from .formats import LogRow
from .geometry import BLOCK_SHIFT, BLOCK_SIZE, OBJECT_SHIFT, OBJECT_SIZE, VolumeId
from .shardstore import ShardStore

OBJECTS_A_STEP = 256


def objects_with_data(
    extents: Sequence[tuple[int, int]], processor_index: int, processor_count: int
) -> list[tuple[int, int]]:
    """From a log file's extents: ``(object_index, mask of its blocks that hold data)``, in order."""
    masks: dict[int, int] = {}
    for start, end in extents:
        position = start
        while position < end:
            ordinal = position >> OBJECT_SHIFT
            stop = min(end, (ordinal + 1) << OBJECT_SHIFT)
            first = (position & (OBJECT_SIZE - 1)) >> BLOCK_SHIFT
            last = ((stop - 1) & (OBJECT_SIZE - 1)) >> BLOCK_SHIFT
            object_index = ordinal * processor_count + processor_index
            masks[object_index] = masks.get(object_index, 0) | ((1 << (last - first + 1)) - 1) << first
            position = stop
    return sorted(masks.items())


def named_masks(
    store: ShardStore, volume_ids: Sequence[VolumeId], first: int, last: int, log_ids: Set[int] | None = None
) -> dict[int, dict[int, int]]:
    """By object and log: the mask of blocks that a live map or a copy of these volumes names there.

    ``log_ids``: of these logs alone.
    """
    named: dict[int, dict[int, int]] = {}
    for object_index, block_map in store.versions_of(volume_ids, first, last):
        # Of the many versions of an object few name these logs, and a look at the ids alone is fast.
        if log_ids is not None and log_ids.isdisjoint((block_map,) if isinstance(block_map, int) else block_map):
            continue
        masks = named.setdefault(object_index, {})
        for block, count, log_id in blockmap.all_runs(block_map):
            if log_id != blockmap.HOLE and (log_ids is None or log_id in log_ids):
                masks[log_id] = masks.get(log_id, 0) | ((1 << count) - 1) << block
    return named


def mask_runs(mask: int) -> Iterator[tuple[int, int]]:
    """Runs of set bits, as ``(first bit, count)``."""
    block = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        block += skip
        count = (~mask & (mask + 1)).bit_length() - 1
        yield block, count
        mask >>= count
        block += count


def punch_unnamed(
    store: ShardStore,
    logs: ChangeLogs,
    log: LogRow,
    family: Sequence[VolumeId],
    objects: Sequence[tuple[int, int]],
    processor_count: int,
) -> int:
    """Give back the blocks of some objects in a sealed log that no volume of the family names; how many."""
    if not objects:
        return 0
    named = named_masks(store, family, objects[0][0], objects[-1][0], {log.log_id})
    freed = 0
    ranges = []
    for object_index, present in objects:
        unnamed = present & ~named.get(object_index, {}).get(log.log_id, 0)
        base = (object_index // processor_count) << OBJECT_SHIFT
        for block, count in mask_runs(unnamed):
            ranges.append((base + (block << BLOCK_SHIFT), count * BLOCK_SIZE))
            freed += count
    if ranges:
        logs.punch(log.log_id, log.device_id, ranges)
    return freed
