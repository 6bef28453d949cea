"""What the pool tells of itself, as plain values for JSON."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from .errors import SnapfsError
from .formats import COPY_ON_WRITE, IntermediateRow
from .geometry import BLOCK_SIZE, VolumeId
from .liveness import SILENT, Room
from .pool import Pool, space_in
from .processor import Processor
from .snapshot import Snapshot
from .tasks import within
from .units import iso_time, show_name
from .volume import Volume

T = TypeVar("T")

_VOLUMES_SHOWN_MAX = 256
# For what a device that hangs keeps from answering.
_WAIT_S = 2.0


def _device_entry(pool: Pool, device_id: int, room: Room | OSError | None) -> dict[str, object]:
    """A device, whether it answers, and its room, or why it cannot tell."""
    device = pool.devices.get(device_id)
    entry: dict[str, object] = {
        "device_id": device_id,
        "path": None if device is None else device.local_path(""),
        "state": SILENT if room is None else pool.watch.of(device_id).state,
    }
    if not isinstance(room, Room):
        failure = None if room is None else room.strerror
        return {**entry, "total_bytes": None, "free_bytes": None, "failure": failure}
    space = room.space
    return {**entry, "total_bytes": space.total_bytes, "free_bytes": space.free_bytes, "failure": None}


async def _answer(ask: Callable[[], Awaitable[T]]) -> tuple[T | None, str | None]:
    """What a database says, if it does so soon; or why it cannot be read. Status never fails for that."""
    try:
        return await within(_WAIT_S, ask), None
    except (SnapfsError, OSError) as error:
        return None, str(error)


def _moment(when_ns: int) -> str | None:
    return iso_time(when_ns) if when_ns else None


async def pool_status(pool: Pool, mount_point: str | None = None) -> dict[str, object]:
    """Health, devices, space, dirty data, last commit."""
    stuck = pool.pending.stuck()
    rooms = await pool.watch.rooms()
    space = space_in(rooms)
    processors = [one.status() for one in pool.processors]
    failed = [
        {"volume": show_name(volume.name), "reason": str(volume.failure)}
        for volume in pool.volumes.by_name.values()
        if volume.failure is not None
    ]
    devices = [_device_entry(pool, device_id, room) for device_id, room in rooms.items()]
    volumes, unreadable = None, None
    if len(pool.volumes.by_name) <= _VOLUMES_SHOWN_MAX:
        changed, unreadable = (None, None) if stuck else await _answer(partial(_changed_block_counts, pool))
        volumes = [volume_status(pool, one, changed or {}) for one in pool.volumes.by_name.values()]
    states = {
        "failed": failed or unreadable or any(one["failure"] for one in devices),
        "damaged": pool.damage.known or pool.lost,
        "stuck": stuck,
        "schedule-failed": pool.scheduler.failing(),
    }
    return {
        "health": next((name for name, is_so in states.items() if is_so), "ok"),
        "lost": list(pool.lost),
        "stuck_calls": stuck,
        "failed_volumes": failed,
        "metadata_failure": unreadable,
        "damaged_blocks": pool.damage.entries(),
        "unsealed_snapshot_count": len(pool.sealer.waiting()),
        "pool_id": pool.descriptor.pool_id,
        "format_version": pool.descriptor.format_version,
        "mount_point": mount_point,
        "pid": os.getpid(),
        "time": iso_time(time.time_ns()),
        "volume_count": len(pool.volumes.by_name),
        "snapshot_count": len(pool.snapshots.by_name),
        "space": {
            "total_bytes": space.total_bytes,
            "free_bytes": space.free_bytes,
            "mapped_bytes": sum(one.mapped_block_count for one in processors) * BLOCK_SIZE,
            "reserve_spent": pool.reserve.is_spent,
        },
        "devices": devices,
        "schedules": pool.scheduler.entries(),
        # Everyone may read this, and the programs' words may hold secrets.
        "hooks": [{"name": one["name"], "is_damaged": one["is_damaged"]} for one in pool.hooks.entries()],
        "changed_images": pool.images.changed,
        "change_log_volumes": pool.changelogs.entries(),
        "volumes": volumes,
        "dirty_object_count": sum(one.dirty_object_count for one in processors),
        "last_commit": _moment(max(one.last_commit_ns for one in processors)),
        "commit_count": sum(one.commit_count for one in processors),
        "reclaim_waiting_count": pool.reclaimer.waiting_count,
        "is_reclaiming": pool.reclaimer.is_at_work,
        "processor_count": len(processors),
        "jobs": [
            {
                "name": job.name,
                "kind": job.kind,
                "what": job.what,
                "done": job.done,
                "total": job.total,
                "started": iso_time(job.started_ns),
                "is_stoppable": job.is_stoppable,
            }
            for job in pool.jobs.now
        ],
    }


def volume_status(pool: Pool, volume: Volume, changed: Mapping[VolumeId, int]) -> dict[str, object]:
    """One volume: how it logs changes, where, how full that is, how many blocks changed since the last snapshot."""
    traits = pool.volumes.traits.get(volume.volume_id)
    quota = pool.placement.quotas.get(traits.changelog_id)
    return {
        "name": show_name(volume.name),
        "volume_id": volume.volume_id,
        "size_bytes": volume.size_bytes,
        "mapped_bytes": volume.block_count * BLOCK_SIZE,
        "mode": "cow" if traits.change_mode == COPY_ON_WRITE else "redirect",
        "source": traits.source_path or None,
        "clone_of": {"volume_id": traits.origin_id, "instant": traits.origin_instant} if traits.origin_id else None,
        "change_log_volume": None if quota is None else quota.name,
        "change_log_percent": None if quota is None else quota.percent,
        # None while a device hangs, for which status does not wait, or its database cannot be read.
        "blocks_since_snapshot": changed.get(volume.volume_id),
    }


async def _changed_block_counts(pool: Pool) -> dict[VolumeId, int]:
    """Blocks of each volume that changed since the last snapshot."""
    volumes = list(pool.volumes.by_name.values())
    found = {volume.volume_id: 0 for volume in volumes}
    for processor in pool.processors:
        epochs = {one.volume_id: max(processor.clock.epoch, one.named_epoch) for one in volumes}
        for volume_id, count in (await processor.changed_block_counts(epochs)).items():
            found[volume_id] += count
    return found


async def _stored_counts(processor: Processor) -> tuple[int, int, list[IntermediateRow]]:
    access = processor.access
    logs = await access.ask(access.store.log_count)
    return logs, await access.ask(access.store.object_count), await access.ask(access.store.intermediates)


async def processor_status(processor: Processor) -> dict[str, object]:
    """One processor: objects, change logs, intermediate snapshots, queue."""
    counts = processor.status()
    stored, failure = (None, None) if processor.access.is_stuck else await _answer(partial(_stored_counts, processor))
    logs, objects, parts = stored or (None, None, None)
    return {
        "processor": counts.processor_index,
        "epoch": counts.epoch,
        "generation": counts.generation,
        "volume_count": counts.portion_count,
        "object_count": objects,
        "mapped_bytes": counts.mapped_block_count * BLOCK_SIZE,
        "change_log_count": logs,
        "current_change_logs": [
            {
                "volume_id": portion.volume_id,
                "log_id": log.log_id,
                "device_id": log.device_id,
                "block_count": log.block_count,
                "mode": "cow" if processor.traits.get(portion.volume_id).change_mode == COPY_ON_WRITE else "redirect",
                "change_log_volume": None if log.quota is None else log.quota.name,
                "change_log_percent": None if log.quota is None else log.quota.percent,
            }
            for portion in processor.portions.values()
            if (log := portion.current_log) is not None
        ],
        "is_stuck": processor.access.is_stuck,
        "metadata_failure": failure,
        "intermediate_snapshot_count": None if parts is None else len(parts),
        "latest_intermediate_snapshots": [
            {
                "snapshot_id": part.snapshot_id,
                "instant": part.instant,
                "prepared": iso_time(part.prepared_ns),
                "mapped_bytes": part.block_count * BLOCK_SIZE,
            }
            for part in (parts or [])[-16:]
        ],
        "dirty_object_count": counts.dirty_object_count,
        "resident_object_count": counts.resident_object_count,
        "queue": {"waiting_commits": counts.waiting_commit_count},
        "commit_count": counts.commit_count,
        "last_commit": _moment(counts.last_commit_ns),
        "last_commit_ms": counts.last_commit_duration_ns / 1e6,
    }


def snapshot_entry(pool_id: str, snapshot: Snapshot) -> dict[str, object]:
    """A line of a list of snapshots."""
    return {
        "name": show_name(snapshot.name or b""),
        "snapshot_id": snapshot.snapshot_id,
        "instant": snapshot.instant,
        "created": iso_time(snapshot.created_ns),
        "of_all_volumes": snapshot.volume_ids is None,
        "stall_us": snapshot.stall_ns / 1000,
        "frozen_ms": snapshot.frozen_ns / 1e6,
        "note": snapshot.note,
        "schedule": snapshot.schedule or None,
        "guid": snapshot.guid or f"{pool_id}:{snapshot.snapshot_id}",
        "holds": sorted(snapshot.hold_tags),
        "root": snapshot.root or None,
    }


async def snapshot_entries_with_space(pool: Pool, snapshots: Sequence[Snapshot]) -> list[dict[str, object]]:
    """The same, with what each references, what was written since the one before, and what it alone holds."""
    account = await pool.snapshots.account()
    exclusive = account.exclusive_blocks()
    return [
        {
            **snapshot_entry(pool.descriptor.pool_id, one),
            "referenced_bytes": await pool.snapshots.referenced_bytes(one),
            "written_bytes": account.written.get(one.instant, 0) * BLOCK_SIZE,
            "exclusive_bytes": exclusive.get(one.instant, 0) * BLOCK_SIZE,
        }
        for one in snapshots
    ]
