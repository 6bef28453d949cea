"""What rows of a pool's databases cannot say together, however sound SQLite finds each of them.

Whoever opens a pool refuses what would be taken apart by that; the verifier tells all of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from .errors import SnapfsError
from .formats import (
    CHANGE_LOG,
    COPY_ON_WRITE,
    IMAGE_LOG,
    SOURCE_LOG,
    LogRow,
    ScheduleRow,
    SnapshotRow,
    VersionRow,
    VolumeRow,
)
from .geometry import VolumeId
from .hook import Hook
from .schedule import Schedule
from .snapshotindex import SnapshotIndex
from .traits import TraitsTable
from .units import check_name, show_name


def impossible_kinds(logs: Iterable[LogRow], traits: TraitsTable, known_ids: Collection[VolumeId]) -> Iterator[str]:
    """Logs that stand for what a volume is written over, and cannot: as sources they would go with what lies in them.

    ``known_ids`` are volumes that are there, removed, or in snapshots; a source of another one is what a crash left
    of one whose making was cut off.
    """
    seen: set[VolumeId] = set()
    for log in logs:
        if log.kind == CHANGE_LOG:
            continue
        row = traits.get(log.volume_id)
        has_source = row.change_mode == COPY_ON_WRITE or bool(row.source_path)
        if log.kind not in (SOURCE_LOG, IMAGE_LOG):
            yield f"change log {log.log_id} is of a kind that there is not: {log.kind}"
        elif log.volume_id in known_ids and not has_source:
            yield f"change log {log.log_id} is said to be what volume {log.volume_id} is written over, and is not"
        elif log.volume_id in seen:
            yield f"volume {log.volume_id} is said to be written over several: change log {log.log_id} is one of them"
        seen.add(log.volume_id)


def unreadable_rules(schedules: Iterable[ScheduleRow], hooks: Iterable[tuple[bytes, bytes]]) -> Iterator[str]:
    """Schedules and hooks that are kept, and cannot be read: nothing is done by them."""
    for row in schedules:
        try:
            Schedule.from_json(row.name, row.rule)
        except SnapfsError as error:
            yield error.reason
    for name, rule in hooks:
        try:
            Hook.from_json(name.decode(errors="replace"), rule)
        except SnapfsError as error:
            yield error.reason


def impossible_versions(
    volumes: Mapping[VolumeId, VolumeRow], versions: Iterable[VersionRow], snapshots: SnapshotIndex
) -> Iterator[str]:
    """Snapshots that have lost what a volume was called then, or have it twice: the volume is not in them any more."""
    by_volume: dict[VolumeId, list[VersionRow]] = {volume_id: [] for volume_id in volumes}
    for version in versions:
        by_volume.setdefault(version.volume_id, []).append(version)
    for volume_id, of_volume in by_volume.items():
        volume = volumes.get(volume_id)
        covered = None if volume is None else volume.birth_epoch - 1
        for version in sorted(of_volume, key=lambda one: one.instant):
            if covered is not None and snapshots.holds(volume_id, covered + 1, version.epoch - 1):
                yield f"a snapshot before instant {version.epoch} has lost the attributes of volume {volume_id}"
            if covered is not None and version.epoch <= covered:
                yield f"attributes of volume {volume_id} are kept twice for instant {version.epoch}"
            covered = version.instant
        if volume is not None and covered is not None and snapshots.holds(volume_id, covered + 1, volume.epoch - 1):
            yield f"a snapshot before epoch {volume.epoch} has lost the attributes of volume {volume_id}"


def impossible_snapshots(
    snapshots: Iterable[SnapshotRow], volumes: Mapping[VolumeId, VolumeRow], versions: Iterable[VersionRow]
) -> Iterator[str]:
    """Snapshots with names that none can have, or of volumes that there never were."""
    known = {*volumes, *(version.volume_id for version in versions)}
    for row in snapshots:
        if row.name is None:
            continue
        try:
            check_name(row.name, "snapshot")
        except SnapfsError as error:
            yield f"snapshot {show_name(row.name)!r}: {error.reason}"
        for volume_id in sorted(set(row.volume_ids or ()) - known):
            yield f"snapshot {show_name(row.name)!r} is of volume {volume_id}, which is not known"
