"""The pool's catalog: devices, volumes and snapshots.

A SQLite database in the pool's directory. What it says of a snapshot makes it exist: a snapshot is
there from the commit that puts its row here, whole or not at all. Every call blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, cast

from .backends import Device
from .database import Database, Row
from .errors import DamagedError
from .formats import (
    CATALOG_FILE,
    CATALOG_SCHEMAS,
    FORMAT_VERSION,
    Attributes,
    CatalogBatch,
    ChangeLogVolumeRow,
    ScheduleRow,
    SnapshotRow,
    VersionRow,
    VolumeRow,
    VolumeTraits,
)
from .geometry import Epoch, SnapshotId, VolumeId

_WHAT = "the catalog"
_RESTORE = "Restore it from a copy"
FIRST_VOLUME_ID = 256


class Catalog:
    """An open catalog. ``generation`` grows by one with every commit."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.generation = self.meta("generation")

    @classmethod
    def create(cls, device: Device, pool_id: str, processor_count: int, device_paths: Sequence[str]) -> None:
        """Make the catalog of an empty pool."""
        database = Database(device, CATALOG_FILE, _WHAT, create_schemas=CATALOG_SCHEMAS)
        with database.transaction():
            meta: dict[str, int | str] = {
                "pool_id": pool_id,
                "format_version": FORMAT_VERSION,
                "generation": 0,
                "epoch": 1,
                "next_instant": 1,
                "clean": 1,
                "next_volume_id": FIRST_VOLUME_ID,
                "next_snapshot_id": 1,
            }
            database.each("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
            database.each("INSERT INTO devices VALUES (?, ?, 0)", enumerate(device_paths))
            database.each("INSERT INTO shards VALUES (?, 0)", [(index,) for index in range(processor_count)])
        database.close()

    @classmethod
    def open(cls, device: Device, pool_id: str) -> Catalog:
        """Open it. Raises DamagedError when it is missing or another pool's."""
        try:
            database = Database(device, CATALOG_FILE, _WHAT)
        except FileNotFoundError:
            raise DamagedError(f"{_WHAT} is missing", "Restore it from a copy of the whole pool") from None
        try:
            catalog = cls.over(database, pool_id)
            catalog.check_counters()
            return catalog
        except BaseException:
            database.abandon()
            raise

    @classmethod
    def over(cls, database: Database, pool_id: str) -> Self:
        """A catalog over an open database, once it is known to be the right one."""
        if database.row("SELECT value FROM meta WHERE key = 'pool_id'") != (pool_id,):
            raise DamagedError(f"{_WHAT} belongs to another pool", "Put the right one back")
        database.upgrade(CATALOG_SCHEMAS)
        return cls(database)

    def check_counters(self) -> None:
        """Raises DamagedError when the next volume or snapshot would take another's place."""
        for key, taken in (
            (
                "next_volume_id",
                "SELECT max(coalesce((SELECT max(volume_id) FROM volumes), 0),"
                " coalesce((SELECT max(volume_id) FROM removed), 0),"
                " coalesce((SELECT max(volume_id) FROM traits), 0))",
            ),
            ("next_snapshot_id", "SELECT coalesce(max(snapshot_id), 0) FROM snapshots"),
        ):
            if self.meta(key) <= self.database.number(taken):
                raise DamagedError(f"{_WHAT} is damaged: its {key} is {self.meta(key)}, which is taken", _RESTORE)

    def meta(self, key: str, default: int | None = None) -> int:
        """A number of the meta table. One without a default is there, or the catalog is damaged."""
        row = self.database.row("SELECT value FROM meta WHERE key = ?", (key,))
        if row is None and default is not None:
            return default
        if row is None or not isinstance(row[0], int):
            raise DamagedError(f"{_WHAT} lacks its {key}", "Restore it from a copy")
        return row[0]

    def epoch_max(self) -> int:
        """The largest epoch, or instant and one, that any row but a snapshot's speaks of."""
        return self.database.number(
            "SELECT max(coalesce((SELECT max(max(birth_epoch, epoch, named_epoch)) FROM volumes), 0),"
            " coalesce((SELECT max(epoch) FROM removed), 0),"
            " coalesce((SELECT max(instant) + 1 FROM versions), 0))"
        )

    def device_paths(self) -> dict[int, str]:
        """Path of each device by its id; empty for the one inside the pool."""
        rows = self.database.rows("SELECT device_id, path FROM devices ORDER BY device_id")
        return dict(cast("list[tuple[int, str]]", rows))

    def changelog_ids(self) -> dict[int, int]:
        """By device: the change log volume it is of, POOL_CHANGE_LOGS for those with the volumes' data."""
        rows = self.database.rows("SELECT device_id, changelog_id FROM devices")
        return dict(cast("list[tuple[int, int]]", rows))

    def changelogs(self) -> list[ChangeLogVolumeRow]:
        """All change log volumes."""
        return [ChangeLogVolumeRow(*row) for row in self.database.rows("SELECT * FROM changelogs")]

    def next_changelog_ids(self) -> tuple[int, int]:
        """Ids for a new device and a new change log volume."""
        row = self.database.row(
            "SELECT coalesce((SELECT max(device_id) FROM devices), -1) + 1,"
            " coalesce((SELECT max(changelog_id) FROM changelogs), 0) + 1"
        )
        assert row is not None
        return int(row[0]), int(row[1])

    def schedules(self) -> list[ScheduleRow]:
        """All schedules."""
        return [ScheduleRow(*row) for row in self.database.rows("SELECT * FROM schedules ORDER BY name")]

    def hooks(self) -> list[tuple[bytes, bytes]]:
        """All hooks, each as its name and its rule; as bytes, for what is damaged may be no text."""
        rows = self.database.rows("SELECT CAST(name AS BLOB), CAST(rule AS BLOB) FROM hooks ORDER BY name")
        return cast("list[tuple[bytes, bytes]]", rows)

    def receives(self) -> dict[str, str]:
        """By guid: the states of streams that are being received, or were cut off."""
        return dict(cast("list[tuple[str, str]]", self.database.rows("SELECT * FROM receives")))

    def traits(self) -> list[VolumeTraits]:
        """Traits of all volumes that are not plain."""
        return [VolumeTraits(*row) for row in self.database.rows("SELECT * FROM traits")]

    def version_span(self, volume_id: VolumeId) -> tuple[int, int]:
        """First epoch and last instant for which attributes of a volume are kept; (0, -1) for none."""
        row = self.database.row("SELECT min(epoch), max(instant) FROM versions WHERE volume_id = ?", (volume_id,))
        return (0, -1) if row is None or row[0] is None else (int(row[0]), int(row[1]))

    def version_volume_ids(self) -> set[VolumeId]:
        """Volumes of which attributes are kept."""
        return {row[0] for row in self.database.rows("SELECT DISTINCT volume_id FROM versions")}

    def processor_count(self) -> int:
        """How many processors the pool has. Raises DamagedError when the rows do not tell."""
        indexes = sorted(self.shard_generations())
        if not indexes or indexes != list(range(len(indexes))):
            raise DamagedError(f"{_WHAT} does not tell how many processors there are", "Restore it from a copy")
        return len(indexes)

    def shard_generations(self) -> dict[int, int]:
        """What each shard store must at least have reached."""
        return dict(cast("list[tuple[int, int]]", self.database.rows("SELECT * FROM shards")))

    def volumes(self) -> list[VolumeRow]:
        """All live volumes."""
        rows = self.database.rows(
            "SELECT volume_id, name, size_bytes, mode, uid, gid, atime_ns, mtime_ns, ctime_ns,"
            " birth_epoch, epoch, named_epoch, created_ns, trim FROM volumes"
        )
        return [VolumeRow(row[0], Attributes(*row[1:9]), *row[9:]) for row in rows]

    def removed(self) -> dict[VolumeId, Epoch]:
        """Removed volumes whose maps are still to be taken apart, with their epochs."""
        rows = self.database.rows("SELECT volume_id, epoch FROM removed")
        return dict(cast("list[tuple[VolumeId, Epoch]]", rows))

    def snapshots(self) -> list[SnapshotRow]:
        """All snapshots, deleted ones that still have space to free among them."""
        members: dict[int, set[VolumeId]] = {}
        for snapshot_id, volume_id in self.database.rows("SELECT snapshot_id, volume_id FROM members"):
            members.setdefault(snapshot_id, set()).add(volume_id)
        tags: dict[int, set[str]] = {}
        for snapshot_id, tag in self.database.rows("SELECT snapshot_id, tag FROM holds"):
            tags.setdefault(snapshot_id, set()).add(tag)
        rows = self.database.rows(
            "SELECT snapshot_id, name, instant, created_ns, named, stall_ns, note, schedule, guid, root, previous_root,"
            " unsealed, frozen_ns FROM snapshots ORDER BY instant"
        )
        return [
            SnapshotRow(
                SnapshotId(row[0]),
                name=row[1],
                instant=row[2],
                created_ns=row[3],
                volume_ids=frozenset(members.get(row[0], ())) if row[4] else None,
                stall_ns=row[5],
                note=row[6],
                schedule=row[7],
                guid=row[8],
                hold_tags=frozenset(tags.get(row[0], ())),
                root=row[9],
                previous_root=row[10],
                unsealed_ids=_volume_ids(row[11]),
                frozen_ns=row[12],
            )
            for row in rows
        ]

    def versions_at(self, instant: int) -> list[VersionRow]:
        """Kept attributes that hold for a snapshot."""
        return self._versions("WHERE instant >= ? AND epoch <= ?", (instant, instant))

    def versions_of(self, volume_id: VolumeId) -> list[VersionRow]:
        """Kept attributes of a volume, oldest first."""
        return self._versions("WHERE volume_id = ? ORDER BY instant", (volume_id,))

    def versions_between(self, low: int, high: int) -> list[VersionRow]:
        """Kept attributes with instants from ``low`` up to, not including, ``high``."""
        return self._versions("WHERE instant >= ? AND instant < ?", (low, high))

    def versions(self) -> list[VersionRow]:
        """All kept attributes."""
        return self._versions("", ())

    def _versions(self, where: str, bindings: Sequence[int]) -> list[VersionRow]:
        rows = self.database.rows(
            "SELECT volume_id, epoch, instant, name, size_bytes, mode, uid, gid, atime_ns, mtime_ns, ctime_ns"
            f" FROM versions {where}",
            bindings,
        )
        return [_version(row) for row in rows]

    def commit(self, batch: CatalogBatch) -> None:
        """Make a batch durable, all or nothing."""
        database = self.database
        with database.transaction():
            # Drops come first: a name may pass from one volume or snapshot to another in one batch.
            for sql, rows in (
                ("DELETE FROM volumes WHERE volume_id = ?", [(one,) for one in batch.dropped_volumes]),
                (
                    "UPDATE snapshots SET name = NULL WHERE snapshot_id = ?",
                    [row[:1] for row in batch.renamed_snapshots],
                ),
                ("DELETE FROM snapshots WHERE snapshot_id = ?", [(one,) for one in batch.dropped_snapshots]),
                ("DELETE FROM members WHERE snapshot_id = ?", [(one,) for one in batch.dropped_snapshots]),
                ("DELETE FROM holds WHERE snapshot_id = ?", [(one,) for one in batch.dropped_snapshots]),
                ("DELETE FROM holds WHERE snapshot_id = ? AND tag = ?", batch.dropped_holds),
                ("DELETE FROM traits WHERE volume_id = ?", [(one,) for one in batch.dropped_traits]),
                ("DELETE FROM changelogs WHERE changelog_id = ?", [(one,) for one in batch.dropped_changelogs]),
                ("DELETE FROM devices WHERE device_id = ?", [(one,) for one in batch.dropped_devices]),
                ("DELETE FROM receives WHERE guid = ?", [(one,) for one in batch.dropped_receives]),
                ("INSERT OR REPLACE INTO receives VALUES (?, ?)", batch.receives),
                ("DELETE FROM schedules WHERE name = ?", [(one,) for one in batch.dropped_schedules]),
                ("DELETE FROM versions WHERE volume_id = ? AND instant = ?", batch.dropped_versions),
                ("DELETE FROM removed WHERE volume_id = ?", [(one,) for one in batch.dropped_removed]),
                ("DELETE FROM volumes WHERE volume_id = ?", [(row.volume_id,) for row in batch.volumes]),
                (
                    "INSERT INTO volumes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [(row.volume_id, *row.attributes, *row[2:]) for row in batch.volumes],
                ),
                (
                    "INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [(row.volume_id, row.instant, row.epoch, *row.attributes) for row in batch.versions],
                ),
                ("INSERT OR REPLACE INTO removed VALUES (?, ?)", batch.removed),
                (
                    "INSERT INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    [
                        (
                            *row[:4],
                            int(row.volume_ids is not None),
                            row.stall_ns,
                            row.note,
                            row.schedule,
                            row.guid,
                            row.root,
                            row.previous_root,
                            ",".join(str(one) for one in sorted(row.unsealed_ids)),
                            row.frozen_ns,
                        )
                        for row in batch.snapshots
                    ],
                ),
                (
                    "INSERT OR REPLACE INTO holds VALUES (?, ?)",
                    [(row.snapshot_id, tag) for row in batch.snapshots for tag in row.hold_tags] + batch.holds,
                ),
                ("INSERT OR REPLACE INTO traits VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", batch.traits),
                ("INSERT OR REPLACE INTO changelogs VALUES (?, ?, ?, ?)", batch.changelogs),
                ("INSERT OR REPLACE INTO devices VALUES (?, ?, ?)", batch.devices),
                ("INSERT OR REPLACE INTO schedules VALUES (?, ?, ?)", batch.schedules),
                ("DELETE FROM hooks WHERE CAST(name AS BLOB) = ?", [(one,) for one in batch.dropped_hooks]),
                ("INSERT OR REPLACE INTO hooks VALUES (?, ?)", batch.hooks),
                (
                    "UPDATE snapshots SET root = ?2, previous_root = ?3, unsealed = ?4 WHERE snapshot_id = ?1",
                    batch.roots,
                ),
                (
                    "INSERT INTO members VALUES (?, ?)",
                    [(row.snapshot_id, one) for row in batch.snapshots for one in row.volume_ids or ()],
                ),
                (
                    "UPDATE snapshots SET name = ?2 WHERE snapshot_id = ?1",
                    [row for row in batch.renamed_snapshots if row[1] is not None],
                ),
                ("UPDATE shards SET generation = ?2 WHERE processor_index = ?1", batch.shard_generations),
            ):
                if rows:
                    database.each(sql, cast("list[Row]", rows))
            if batch.trim_all:
                database.execute("UPDATE volumes SET trim = 1")
            meta = {**batch.meta, "generation": self.generation + 1}
            database.each(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", meta.items()
            )
        self.generation += 1

    def close(self) -> None:
        """Close the catalog."""
        self.database.close()


def _volume_ids(text: object) -> frozenset[VolumeId]:
    """Ids with commas between. Raises DamagedError."""
    try:
        return frozenset(VolumeId(int(one)) for one in str(text).split(",") if one)
    except ValueError:
        raise DamagedError(
            f"{_WHAT} says of a snapshot that its volumes {text!r} are not sealed", "Restore it from a copy"
        ) from None


def _version(row: Row) -> VersionRow:
    return VersionRow(VolumeId(row[0]), Epoch(row[1]), Epoch(row[2]), Attributes(*row[3:]))


__all__ = ["FIRST_VOLUME_ID", "Catalog", "SnapshotId"]
