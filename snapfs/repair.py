"""Repairs of a pool that need no guess. Runs on an open pool that nobody else uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import trio

from . import blockmap, reclaim
from .counting import inherited_count, stands_on_cow
from .errors import SnapfsError
from .formats import CHANGE_LOG, LogRow
from .geometry import VolumeId
from .namedblocks import NamedBlocks
from .pool import Pool
from .processor import Processor
from .shardstore import ShardStore
from .snapshotindex import NEVER
from .unnamed import free_unnamed
from .volume import Volume

_MAPS_A_STEP = 1024


async def repair_running(pool: Pool) -> list[str]:
    """Repair; what was done, as sentences."""
    done: list[str] = []
    for volume in [one for one in pool.volumes.by_name.values() if not pool.volumes.is_restoring(one)]:
        done += await _clear_behind(pool, volume)
    try:
        await pool.reclaimer.reclaim_all()
    except (SnapfsError, OSError) as error:
        done.append(f"could not give back all that deleted snapshots and removed volumes held: {error}")
    idle = await pool.reclaimer.drop_idle_versions()
    if idle:
        done.append(f"forgot attributes that were kept for no snapshot, {idle} times")
    for processor in pool.processors:
        await reclaim.drop_unneeded_copies(processor, [(0, NEVER)])
        await processor.punch_freed()
        done += await _recount(processor, set(pool.volumes.by_id))
        await processor.access.ask(processor.access.store.drop_stray_contents)
        strays = await processor.access.ask(processor.access.store.stray_sums_count)
        if strays:
            await processor.access.ask(processor.access.store.drop_stray_sums)
            done.append(f"processor {processor.index}: forgot checksums of {strays} objects that are not there")
        freed = await free_unnamed(processor, await processor.access.ask(processor.access.store.all_logs))
        if freed:
            done.append(f"processor {processor.index}: freed {freed} blocks that no map named")
    return done


async def _clear_behind(pool: Pool, volume: Volume) -> list[str]:
    """Clear what lies behind the size of a volume, also where nothing says that there is something."""
    is_due, before = volume.needs_trim, volume.block_count
    try:
        await pool.reserve.helped(volume.fit)
        await pool.reserve.helped(volume.sync)
    except (SnapfsError, OSError) as error:
        # One whose change log is full, say, keeps nothing else from being repaired.
        return [f"could not clear what lies behind the size of volume {volume.volume_id}: {error}"]
    has_cleared = is_due or volume.block_count != before
    return [f"cleared what lay behind the size of volume {volume.volume_id}"] if has_cleared else []


async def _recount(processor: Processor, live_ids: set[VolumeId]) -> list[str]:
    """Set counts to what maps and copies name. The pool's tasks commit nothing between the look and that."""
    access = processor.access
    done = []
    counted: set[VolumeId] = set()
    async with access.commit_lock:
        with trio.CancelScope(shield=True):
            await processor.commit_locked(processor.sound_portions())
        for volume_id in sorted(await access.ask(access.store.volume_ids)):
            if volume_id not in counted:
                family = processor.traits.family_of(volume_id)
                counted.update(family)
                done += await _correct_logs(processor, family, await _named_counts(processor, family))
            done += await _correct_volume(processor, volume_id, volume_id in live_ids)
    return done


async def _named_counts(processor: Processor, family: Sequence[VolumeId]) -> dict[int, int]:
    """By change log: the blocks that anything of a family names there."""
    counts: dict[int, int] = {}
    walk = NamedBlocks(processor.access, lambda: family)
    while (named := await walk.step()) is not None:
        for masks in named.values():
            for log_id, mask in masks.items():
                counts[log_id] = counts.get(log_id, 0) + mask.bit_count()
    return counts


async def _correct_logs(processor: Processor, family: Sequence[VolumeId], counts: Mapping[int, int]) -> list[str]:
    corrected = await processor.access.ask(_set_log_counts, processor.access.store, family, counts)
    done = []
    for row in corrected:
        count = counts.get(row.log_id, 0)
        known = processor.logs.known.get(row.log_id)
        if known is not None:
            known.sealed = known.sealed or 1
            known.add_blocks(count - row.block_count)
        done.append(f"processor {processor.index}: counted {count} blocks of change log {row.log_id}")
    return done


def _set_log_counts(store: ShardStore, family: Sequence[VolumeId], counts: Mapping[int, int]) -> list[LogRow]:
    """Count what was found in the logs of a family; those that had another count, with that. Blocks."""
    wrong = [
        log
        for volume_id in family
        for log in store.logs_of(volume_id)
        if log.kind == CHANGE_LOG and log.block_count != counts.get(log.log_id, 0)
    ]
    with store.database.transaction():
        for log in wrong:
            store.set_log_count(log.log_id, counts.get(log.log_id, 0))
    return wrong


async def _correct_volume(processor: Processor, volume_id: VolumeId, is_live: bool) -> list[str]:
    if stands_on_cow(processor.traits, volume_id):
        return []
    mapped, counted = await processor.access.ask(_mapped_and_counted, processor, volume_id, is_live)
    if mapped == counted:
        return []
    await processor.access.ask(_set_block_count, processor.access.store, volume_id, mapped)
    processor.tally.add(volume_id, mapped - counted)
    return [f"processor {processor.index}: counted {mapped} blocks of volume {volume_id}"]


def _mapped_and_counted(processor: Processor, volume_id: VolumeId, is_live: bool) -> tuple[int, int]:
    """How many blocks of a volume are mapped, and for how many the store counts them. Blocks."""
    store = processor.access.store
    own: set[int] = set()
    mapped = from_object = 0
    while rows := store.some_maps(volume_id, from_object, _MAPS_A_STEP):
        own.update(row.object_index for row in rows)
        mapped += sum(blockmap.mapped_count(row.block_map) for row in rows)
        from_object = rows[-1].object_index + 1
    if is_live:
        mapped += inherited_count(store, processor.traits, volume_id, own, processor.processor_count)
    return mapped, store.block_counts().get(volume_id, 0)


def _set_block_count(store: ShardStore, volume_id: VolumeId, count: int) -> None:
    with store.database.transaction():
        store.set_block_count(volume_id, count)
