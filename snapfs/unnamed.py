"""Giving back blocks in change logs that no map names: what a crash leaves of writes that were never committed.

A log that may hold some is sealed first, so it takes no more writes: what is not named once never is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from .blockmasks import mask_runs, objects_with_data
from .formats import CHANGE_LOG, LogRow
from .geometry import BLOCK_SHIFT, VolumeId, log_offset
from .namedblocks import NamedBlocks
from .processor import Processor

# Objects of logs whose masks are in memory at a time.
_MASKS_MAX = 100_000
# And logs; what is known of one without data takes memory too.
_LOGS_MAX = 8192


class _LogData(NamedTuple):
    """A change log, and by object the mask of its blocks that hold data."""

    log: LogRow
    masks: dict[int, int]


async def free_suspect_logs(processor: Processor) -> int:
    """Give back what a crash left unnamed in change logs; how many blocks."""
    return await free_unnamed(processor, await processor.access.ask(processor.access.store.suspect_logs))


async def free_unnamed(processor: Processor, logs: Sequence[LogRow]) -> int:
    """Give back blocks of these logs, which take no writes, that nothing names; how many."""
    families: dict[tuple[VolumeId, ...], list[LogRow]] = {}
    for log in logs:
        # What a source holds no map need name.
        if log.kind == CHANGE_LOG:
            families.setdefault(processor.traits.family_of(log.volume_id), []).append(log)
    freed = 0
    for of_family in families.values():
        waiting: list[_LogData] = []
        mask_count = 0
        for log in of_family:
            waiting.append(_LogData(log, await _data_in(processor, log)))
            mask_count += len(waiting[-1].masks)
            if mask_count >= _MASKS_MAX or len(waiting) >= _LOGS_MAX:
                freed += await _free_in(processor, waiting)
                waiting = []
                mask_count = 0
        if waiting:
            freed += await _free_in(processor, waiting)
    return freed


async def _data_in(processor: Processor, log: LogRow) -> dict[int, int]:
    """By object: the mask of blocks of a log that hold data."""
    extents = await processor.access.in_thread(processor.logs.data_extents, log.log_id, log.device_id)
    return dict(objects_with_data(extents, processor.index, processor.processor_count))


async def _free_in(processor: Processor, waiting: Sequence[_LogData]) -> int:
    """Give back what no volume of their family names of the data in these logs; how many blocks."""
    by_id: dict[int, dict[int, int]] = {data.log.log_id: data.masks for data in waiting}
    objects = sorted({one for masks in by_id.values() for one in masks})
    family = partial(processor.traits.families_of, {data.log.volume_id for data in waiting})
    walk = NamedBlocks(processor.access, family, by_id.keys(), objects)
    while (named := await walk.step()) is not None:
        for object_index, masks in named.items():
            for log_id, mask in masks.items():
                if object_index in by_id[log_id]:
                    by_id[log_id][object_index] &= ~mask
    return sum([await _free_in_log(processor, data) for data in waiting])


async def _free_in_log(processor: Processor, data: _LogData) -> int:
    """Give back these blocks of a log; how many."""
    ranges = [
        (log_offset(object_index, processor.processor_count) + (block << BLOCK_SHIFT), count << BLOCK_SHIFT)
        for object_index, mask in data.masks.items()
        for block, count in mask_runs(mask)
    ]
    if ranges:
        await processor.access.in_thread(processor.logs.punch, data.log.log_id, data.log.device_id, ranges)
    if data.log.sealed == 2:
        await processor.access.ask(processor.access.store.clear_suspicion, data.log.log_id)
    return sum(length for _, length in ranges) >> BLOCK_SHIFT
