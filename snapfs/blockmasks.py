"""Which blocks of change logs maps name, as bit masks, and which hold data. All calls block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set

from . import blockmap
from .geometry import BLOCK_SHIFT, OBJECT_SHIFT, OBJECT_SIZE, VolumeId
from .shardstore import ShardStore


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
    store: ShardStore, volume_ids: Sequence[VolumeId], object_index: int, log_ids: Set[int] | None = None
) -> dict[int, int]:
    """By log: the mask of blocks that a live map or a copy of one object of these volumes names there.

    ``log_ids``: of these logs alone.
    """
    versions = store.versions_of(volume_ids, [(object_index, object_index)])
    return masks_of(versions, log_ids).get(object_index, {})


def masks_of(versions: Iterable[tuple[int, object]], log_ids: Set[int] | None = None) -> dict[int, dict[int, int]]:
    """By object and log: the mask of blocks that stored maps (:meth:`ShardStore.versions_of`) name there.

    ``log_ids``: of these logs alone. Raises DamagedError.
    """
    named: dict[int, dict[int, int]] = {}
    for object_index, stored in versions:
        block_map = blockmap.decode(stored)
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
