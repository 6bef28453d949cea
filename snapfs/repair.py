"""Repairs of a pool that need no guess. Runs on an open pool that nobody else uses."""

from __future__ import annotations

from functools import partial

from . import blockmap, reclaim
from .pool import Pool
from .processor import Processor
from .snapshotindex import NEVER
from .unnamed import named_masks

_EVERY_OBJECT = 1 << 60


async def repair_running(pool: Pool) -> list[str]:
    """Repair; what was done, as sentences."""
    done: list[str] = []
    for volume in pool.volumes.to_trim():
        await volume.trim()
        await volume.sync()
        done.append(f"cleared what lay behind the size of volume {volume.volume_id}")
    await pool.reclaimer.reclaim_all()
    for processor in pool.processors:
        await reclaim.drop_unneeded_copies(processor, 0, NEVER)
        await processor.punch_freed()
        done += await processor.access.ask(partial(_recount, processor))
        freed = await processor.scrub_logs(await processor.access.ask(processor.access.store.all_logs))
        if freed:
            done.append(f"processor {processor.index}: freed {freed} blocks that no map named")
    return done


def _recount(processor: Processor) -> list[str]:
    """Set counts to what maps and copies name. Blocks."""
    store = processor.access.store
    done = []
    for volume_id in sorted(store.volume_ids()):
        counts: dict[int, int] = {}
        for masks in named_masks(store, processor.traits.family_of(volume_id), 0, _EVERY_OBJECT).values():
            for log_id, mask in masks.items():
                counts[log_id] = counts.get(log_id, 0) + mask.bit_count()
        mapped = sum(blockmap.mapped_count(row.block_map) for row in store.some_maps(volume_id, 0, _EVERY_OBJECT))
        with store.database.transaction():
            if store.block_counts().get(volume_id, 0) != mapped:
                store.set_block_count(volume_id, mapped)
                done.append(f"processor {processor.index}: counted {mapped} blocks of volume {volume_id}")
            for log in store.logs_of(volume_id):
                count = counts.get(log.log_id, 0)
                if count != log.block_count:
                    store.set_log_count(log.log_id, count)
                    done.append(f"processor {processor.index}: counted {count} blocks of change log {log.log_id}")
    return done
