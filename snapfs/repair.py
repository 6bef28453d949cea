"""Repairs of a pool that need no guess. Runs on an open pool that nobody else uses."""

from __future__ import annotations

from functools import partial

from . import blockmap, reclaim
from .counting import inherited_count, stands_on_cow
from .errors import SnapfsError
from .formats import CHANGE_LOG
from .geometry import VolumeId
from .pool import Pool
from .processor import Processor
from .snapshotindex import NEVER
from .unnamed import named_masks

_EVERY_OBJECT = 1 << 60


async def repair_running(pool: Pool) -> list[str]:
    """Repair; what was done, as sentences."""
    done: list[str] = []
    for volume in pool.volumes.to_trim():
        try:
            await pool.reserve.helped(volume.trim)
            await pool.reserve.helped(volume.sync)
        except (SnapfsError, OSError) as error:
            # One whose change log is full, say, keeps nothing else from being repaired.
            done.append(f"could not clear what lies behind the size of volume {volume.volume_id}: {error}")
        else:
            done.append(f"cleared what lay behind the size of volume {volume.volume_id}")
    try:
        await pool.reclaimer.reclaim_all()
    except (SnapfsError, OSError) as error:
        done.append(f"could not give back all that deleted snapshots and removed volumes held: {error}")
    for processor in pool.processors:
        await reclaim.drop_unneeded_copies(processor, [(0, NEVER)])
        await processor.punch_freed()
        done += await processor.access.ask(partial(_recount, processor, set(pool.volumes.by_id)))
        await processor.access.ask(processor.access.store.drop_stray_contents)
        strays = await processor.access.ask(processor.access.store.stray_sums_count)
        if strays:
            await processor.access.ask(processor.access.store.drop_stray_sums)
            done.append(f"processor {processor.index}: forgot checksums of {strays} objects that are not there")
        freed = await processor.scrub_logs(await processor.access.ask(processor.access.store.all_logs))
        if freed:
            done.append(f"processor {processor.index}: freed {freed} blocks that no map named")
    return done


def _recount(processor: Processor, live_ids: set[VolumeId]) -> list[str]:
    """Set counts to what maps and copies name. Blocks."""
    store = processor.access.store
    done = []
    for volume_id in sorted(store.volume_ids()):
        counts: dict[int, int] = {}
        for masks in named_masks(store, processor.traits.family_of(volume_id), 0, _EVERY_OBJECT).values():
            for log_id, mask in masks.items():
                counts[log_id] = counts.get(log_id, 0) + mask.bit_count()
        live = {row.object_index: row for row in store.some_maps(volume_id, 0, _EVERY_OBJECT)}
        mapped = sum(blockmap.mapped_count(row.block_map) for row in live.values())
        if volume_id in live_ids:
            mapped += inherited_count(store, processor.traits, volume_id, live, processor.processor_count)
        with store.database.transaction():
            is_counted = not stands_on_cow(processor.traits, volume_id)
            if is_counted and store.block_counts().get(volume_id, 0) != mapped:
                store.set_block_count(volume_id, mapped)
                done.append(f"processor {processor.index}: counted {mapped} blocks of volume {volume_id}")
            for log in store.logs_of(volume_id):
                count = counts.get(log.log_id, 0)
                if log.kind == CHANGE_LOG and count != log.block_count:
                    store.set_log_count(log.log_id, count)
                    done.append(f"processor {processor.index}: counted {count} blocks of change log {log.log_id}")
    return done
