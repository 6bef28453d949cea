"""A snapshot's manifest: the references of the overall snapshot, for a user to look at.

For each processor the intermediate snapshot, with the state recorded at the instant; in it, for each
volume, the objects, their point-in-time copies, and the change log that took what changed
afterwards. Objects in a row with the same references are told as one range.
"""

from __future__ import annotations

from collections.abc import Sequence

from .blockmap import HOLE, all_runs, mapped_count
from .formats import CopyRow, MapRow
from .geometry import BLOCK_SIZE, OBJECT_SIZE, VolumeId
from .jsontext import indented
from .pool import Pool
from .processor import Processor
from .snapshot import Snapshot, SnapshotMembers
from .tasks import in_thread
from .units import iso_time, show_name


async def manifest_of(pool: Pool, snapshot: Snapshot) -> bytes:
    """The manifest as JSON. References are as they stand now: a copy is made when its object is first changed."""
    members = await pool.snapshots.members(snapshot)
    document = {
        "snapshot": {
            "snapshot_id": snapshot.snapshot_id,
            "name": show_name(snapshot.name or b""),
            "instant": snapshot.instant,
            "created": iso_time(snapshot.created_ns),
            "stall_us": snapshot.stall_ns / 1000,
            "frozen_ms": snapshot.frozen_ns / 1e6,
            "of_all_volumes": snapshot.volume_ids is None,
            "note": snapshot.note,
            "pool_id": pool.descriptor.pool_id,
        },
        "checksums": _checksums(pool, snapshot, members),
        "volumes": [
            {
                "volume_id": volume_id,
                "name": show_name(attributes.name),
                "size_bytes": attributes.size_bytes,
                "mode": f"{attributes.mode:04o}",
                "uid": attributes.uid,
                "gid": attributes.gid,
                "modified": iso_time(attributes.mtime_ns),
            }
            for volume_id, attributes in members.by_id.items()
        ],
        "intermediate_snapshots": [await _intermediate(processor, snapshot, members) for processor in pool.processors],
    }
    return await in_thread(indented, document) + b"\n"


def _checksums(pool: Pool, snapshot: Snapshot, members: SnapshotMembers) -> dict[str, object]:
    """What proves the contents: the root, and that of the snapshot before. What has none is named."""
    unsealed = (
        snapshot.unsealed_ids if snapshot.root else {one for one in members.by_id if not pool.sealer.is_covered(one)}
    )
    return {
        "is_sealed": bool(snapshot.root),
        "root": snapshot.root or None,
        "previous_root": snapshot.previous_root or None,
        "not_covered": [
            {
                "volume": show_name(members.by_id[one].name),
                "reason": "it lies in a source that is overwritten in place, or is an image outside the pool",
            }
            for one in sorted(unsealed)
            if one in members.by_id
        ],
    }


async def _intermediate(processor: Processor, snapshot: Snapshot, members: SnapshotMembers) -> dict[str, object]:
    # What is pending goes to the store first, so that its rows tell all.
    await processor.commit(processor.sound_portions())
    store = processor.access.store
    if store.is_lost:
        return {"processor": processor.index, "state": None, "volumes": [], "lost": True}
    part = await processor.access.ask(store.intermediate, snapshot.snapshot_id)
    portions = []
    for volume_id in members.ordered_ids:
        portions.append(await _portion(processor, snapshot, volume_id))
    return {
        "processor": processor.index,
        "state": None
        if part is None
        else {
            "instant": part.instant,
            "prepared": iso_time(part.prepared_ns),
            "mapped_bytes": part.block_count * BLOCK_SIZE,
            "volume_count": part.portion_count,
            "next_log_id": part.next_log_id,
        },
        "volumes": [portion for portion in portions if portion["objects"]],
    }


async def _portion(processor: Processor, snapshot: Snapshot, volume_id: VolumeId) -> dict[str, object]:
    store = processor.access.store
    found = await processor.access.ask(store.maps_at, volume_id, snapshot.instant)
    log = await processor.access.ask(store.log_after, volume_id, snapshot.instant)
    return {
        "volume_id": volume_id,
        "object_size_bytes": OBJECT_SIZE,
        "object_stride": processor.processor_count,
        "change_log": None
        if log is None
        else {"log_id": log.log_id, "device_id": log.device_id, "epoch": log.epoch, "begun": iso_time(log.created_ns)},
        # It takes a while, with many objects.
        "objects": await in_thread(_ranges, found, processor.processor_count) if found else [],
    }


def _ranges(rows: Sequence[MapRow | CopyRow], stride: int) -> list[dict[str, object]]:
    """The references of objects, those in a row with the same ones together."""
    ranges: list[dict[str, object]] = []
    previous: tuple[int, dict[str, object]] | None = None
    for row in rows:
        told = _references(row)
        if previous is not None and previous[0] + stride == row.object_index and previous[1] == told:
            ranges[-1]["last_object"] = row.object_index
        else:
            ranges.append({"first_object": row.object_index, "last_object": row.object_index, **told})
        previous = (row.object_index, told)
    return ranges


def _references(row: MapRow | CopyRow) -> dict[str, object]:
    """Where an object's point-in-time state is kept, and what the state is."""
    logs = sorted({log_id for _, _, log_id in all_runs(row.block_map) if log_id != HOLE})
    return {
        "point_in_time_copy": {"instant": row.instant} if isinstance(row, CopyRow) else "live map, unchanged since",
        "changed_in_epoch": row.epoch,
        "mapped_bytes": mapped_count(row.block_map) * BLOCK_SIZE,
        "data_in_logs": logs,
    }
