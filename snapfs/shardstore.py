"""A processor's shard store: its maps, point-in-time copies, change logs and intermediate snapshots.

A SQLite database. Every call blocks; the processor calls it from a thread, one call at a time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from xxhash import xxh3_64_digest

from . import blockmap
from .backends import Device
from .checksums import ObjectSums
from .contenthash import VALUE_BYTES
from .database import Database
from .errors import DamagedError
from .formats import (
    SHARD_SCHEMAS,
    CandidateRow,
    ContentRow,
    CopyRow,
    FreedRow,
    IntermediateRow,
    LogRow,
    MapRow,
    ShardBatch,
    shard_file,
)
from .geometry import Epoch, LogId, SnapshotId, VolumeId
from .traits import Ancestor

_STRAY_CONTENTS = "WHERE volume_id NOT IN (SELECT volume_id FROM portions)"
_STRAY_SUMS = "WHERE log_id NOT IN (SELECT log_id FROM logs WHERE block_count > 0)"


# A map as it is stored; see blockmap.encode.
StoredMap = int | bytes

# Instants; see ShardStore.changed_objects.
_SHORT_SPAN = 16


class ShardStore:
    """An open shard store. ``generation`` grows by one with every commit. ``is_lost``: see rescue.py."""

    is_lost = False

    def __init__(self, database: Database, processor_index: int) -> None:
        self.database = database
        self.processor_index = processor_index
        self.generation = self._meta("generation")
        self.catalog_generation = self._meta("catalog_generation")
        self.next_log_id = LogId(self._meta("next_log_id"))

    @classmethod
    def create(cls, device: Device, processor_index: int, pool_id: str) -> None:
        """Make an empty store."""
        database = Database(device, shard_file(processor_index), _what(processor_index), create_schemas=SHARD_SCHEMAS)
        meta: dict[str, int | str] = {
            "pool_id": pool_id,
            "processor_index": processor_index,
            "generation": 0,
            "catalog_generation": 0,
            "next_log_id": 1,
        }
        with database.transaction():
            database.each("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
        database.close()

    @classmethod
    def open(cls, device: Device, processor_index: int, pool_id: str) -> ShardStore:
        """Open it. Raises DamagedError when it is missing or another pool's."""
        what = _what(processor_index)
        try:
            database = Database(device, shard_file(processor_index), what)
        except FileNotFoundError:
            raise DamagedError(f"{what} is missing", "Restore it from a copy of the whole pool") from None
        try:
            store = cls.over(database, processor_index, pool_id)
            store.check_counter()
            return store
        except BaseException:
            database.abandon()
            raise

    @classmethod
    def over(cls, database: Database, processor_index: int, pool_id: str) -> ShardStore:
        """A store over an open database, once it is known to be the right one."""
        owner = database.row("SELECT value FROM meta WHERE key = 'pool_id'")
        place = database.row("SELECT value FROM meta WHERE key = 'processor_index'")
        if owner != (pool_id,) or place != (processor_index,):
            raise DamagedError(
                f"{_what(processor_index)} belongs to another pool or processor", "Put the right one back"
            )
        database.upgrade(SHARD_SCHEMAS)
        return cls(database, processor_index)

    def check_counter(self) -> None:
        """Raises DamagedError when the next log would have the file of another."""
        taken = self.database.number("SELECT coalesce(max(log_id), 0) FROM logs")
        if self.next_log_id <= taken:
            raise DamagedError(
                f"{self.database.what} is damaged: the next change log is to be {self.next_log_id}, which is taken",
                "Restore it from a copy",
            )

    def _meta(self, key: str) -> int:
        row = self.database.row("SELECT value FROM meta WHERE key = ?", (key,))
        if row is None or not isinstance(row[0], int):
            raise DamagedError(f"{self.database.what} lacks its {key}", "Restore it from a copy")
        return row[0]

    def maps(self, volume_id: VolumeId, first_object: int, last_object: int) -> list[MapRow]:
        """Live maps of a volume's objects ``first_object`` to ``last_object``, in order."""
        rows = self.database.rows(
            "SELECT volume_id, object_index, epoch, map FROM maps"
            " WHERE volume_id = ? AND object_index BETWEEN ? AND ? ORDER BY object_index",
            (volume_id, first_object, last_object),
        )
        return [MapRow(row[0], row[1], row[2], blockmap.decode(row[3])) for row in rows]

    def some_maps(self, volume_id: VolumeId, from_object: int, limit: int) -> list[MapRow]:
        """Up to ``limit`` live maps of a volume from an object on, in order."""
        rows = self.database.rows(
            "SELECT volume_id, object_index, epoch, map FROM maps"
            " WHERE volume_id = ? AND object_index >= ? ORDER BY object_index LIMIT ?",
            (volume_id, from_object, limit),
        )
        return [MapRow(row[0], row[1], row[2], blockmap.decode(row[3])) for row in rows]

    def maps_with_ancestors(
        self, volume_id: VolumeId, ancestors: Sequence[Ancestor], first_object: int, last_object: int
    ) -> tuple[list[MapRow], dict[int, blockmap.BlockMap]]:
        """Live maps of a range of objects; and of those without one, what the nearest ancestor has, if any.

        One look at the store, so nothing is taken apart in between.
        """
        rows = self.maps(volume_id, first_object, last_object)
        found = {row.object_index for row in rows}
        inherited: dict[int, blockmap.BlockMap] = {}
        for ancestor in ancestors:
            for object_index, block_map in self._maps_at(ancestor, first_object, last_object):
                if object_index not in found:
                    found.add(object_index)
                    inherited[object_index] = block_map
        return rows, inherited

    def inherited_map(self, ancestors: Sequence[Ancestor], object_index: int) -> blockmap.BlockMap | None:
        """The map of an object as the nearest ancestor that has one has it."""
        for ancestor in ancestors:
            for _, block_map in self._maps_at(ancestor, object_index, object_index):
                return block_map
        return None

    def _maps_at(self, at: Ancestor, first_object: int, last_object: int) -> list[tuple[int, blockmap.BlockMap]]:
        rows = self.database.rows(
            "SELECT object_index, map FROM maps"
            " WHERE volume_id = ?1 AND object_index BETWEEN ?3 AND ?4 AND epoch <= ?2"
            " UNION ALL SELECT object_index, map FROM copies"
            " WHERE volume_id = ?1 AND object_index BETWEEN ?3 AND ?4 AND instant >= ?2 AND epoch <= ?2",
            (at.volume_id, at.instant, first_object, last_object),
        )
        return [(row[0], blockmap.decode(row[1])) for row in rows]

    def objects_from(self, volume_ids: Sequence[VolumeId], from_object: int, limit: int) -> list[int]:
        """Up to ``limit`` objects from one on of which any of these volumes has a live map or a copy, in order."""
        found: set[int] = set()
        for volume_id in volume_ids:
            for table in ("maps", "copies"):
                rows = self.database.rows(
                    f"SELECT DISTINCT object_index FROM {table} WHERE volume_id = ? AND object_index >= ?"
                    " ORDER BY object_index LIMIT ?",
                    (volume_id, from_object, limit),
                )
                found.update(row[0] for row in rows)
        return sorted(found)[:limit]

    def has_anything_of(self, volume_id: VolumeId) -> bool:
        """Whether a volume has a map, a copy of one, or a change log here."""
        tables = " UNION ALL ".join(f"SELECT 1 FROM {one} WHERE volume_id = ?1" for one in ("maps", "copies", "logs"))
        return self.database.row(f"{tables} LIMIT 1", (volume_id,)) is not None

    def candidates(self, pair_count_max: int) -> list[tuple[int, CandidateRow]]:
        """All candidates of some objects in some logs, each with the number of its row."""
        rows = self.database.rows(
            "SELECT rowid, log_id, object_index, block, block_count FROM candidates"
            " WHERE (log_id, object_index) IN (SELECT DISTINCT log_id, object_index FROM candidates LIMIT ?)",
            (pair_count_max,),
        )
        return [(row[0], CandidateRow(*row[1:])) for row in rows]

    def candidate_volumes(self) -> list[VolumeId]:
        """The volumes in whose change logs candidates lie."""
        rows = self.database.rows(
            "SELECT DISTINCT volume_id FROM logs WHERE log_id IN (SELECT log_id FROM candidates) ORDER BY volume_id"
        )
        return [VolumeId(row[0]) for row in rows]

    def settle_candidates(self, volume_id: VolumeId, counts: Mapping[int, int]) -> None:
        """Have logs of a volume that have candidates count so many blocks, take no writes, and have none of these."""
        with self.database.transaction():
            for log in self.logs_of(volume_id):
                bindings = (log.log_id,)
                if self.database.row("SELECT 1 FROM candidates WHERE log_id = ? LIMIT 1", bindings) is None:
                    continue
                self.set_log_count(log.log_id, counts.get(log.log_id, 0))
                self.database.execute("UPDATE logs SET sealed = 2 WHERE log_id = ?", bindings)
                self.database.execute("DELETE FROM candidates WHERE log_id = ?", bindings)

    def all_candidates(self) -> list[CandidateRow]:
        """All blocks that are still to be looked at."""
        rows = self.database.rows("SELECT log_id, object_index, block, block_count FROM candidates")
        return [CandidateRow(*row) for row in rows]

    def copy_at(self, volume_id: VolumeId, object_index: int, instant: int) -> CopyRow | None:
        """The point-in-time copy with the smallest instant at or after ``instant``."""
        row = self.database.row(
            "SELECT volume_id, object_index, instant, epoch, map FROM copies"
            " WHERE volume_id = ? AND object_index = ? AND instant >= ? ORDER BY instant LIMIT 1",
            (volume_id, object_index, instant),
        )
        return None if row is None else _copy(row)

    def copies_between(self, after: tuple[int, int, int], high: int, limit: int) -> list[CopyRow]:
        """Copies after ``(instant, volume_id, object_index)`` with instants below ``high``, in that order."""
        rows = self.database.rows(
            "SELECT volume_id, object_index, instant, epoch, map FROM copies"
            " WHERE instant < ? AND (instant, volume_id, object_index) > (?, ?, ?)"
            " ORDER BY instant, volume_id, object_index LIMIT ?",
            (high, *after, limit),
        )
        return [_copy(row) for row in rows]

    def copies_in(self, volume_id: VolumeId, first_object: int, last_object: int) -> list[CopyRow]:
        """All copies of a range of a volume's objects, by object and instant."""
        rows = self.database.rows(
            "SELECT volume_id, object_index, instant, epoch, map FROM copies"
            " WHERE volume_id = ? AND object_index BETWEEN ? AND ? ORDER BY object_index, instant",
            (volume_id, first_object, last_object),
        )
        return [_copy(row) for row in rows]

    def some_copies(
        self, volume_id: VolumeId, first_object: int, last_object: int, row_count_max: int
    ) -> tuple[list[CopyRow], int]:
        """All copies of the first of a range of a volume's objects, by object and instant; and the last of them.

        As many objects as have so many copies together, but at least one.
        """
        rows = self.database.rows(
            "SELECT volume_id, object_index, instant, epoch, map FROM copies"
            " WHERE volume_id = ? AND object_index BETWEEN ? AND ? ORDER BY object_index, instant LIMIT ?",
            (volume_id, first_object, last_object, row_count_max + 1),
        )
        if len(rows) <= row_count_max:
            return [_copy(row) for row in rows], last_object
        first, cut = cast("int", rows[0][1]), cast("int", rows[-1][1])
        if first == cut:
            return self.copies_in(volume_id, first, first), first
        return [_copy(row) for row in rows if row[1] != cut], cut - 1

    def maps_at(self, volume_id: VolumeId, instant: int) -> list[MapRow | CopyRow]:
        """Each object's map as it stood at an instant: its copy, or the live map if that has not changed since."""
        live = self.database.rows(
            "SELECT volume_id, object_index, epoch, map FROM maps WHERE volume_id = ? AND epoch <= ?",
            (volume_id, instant),
        )
        copies = self.database.rows(
            "SELECT volume_id, object_index, instant, epoch, map FROM copies"
            " WHERE volume_id = ? AND instant >= ? AND epoch <= ?",
            (volume_id, instant, instant),
        )
        found: list[MapRow | CopyRow] = [MapRow(row[0], row[1], row[2], blockmap.decode(row[3])) for row in live]
        found += [_copy(row) for row in copies]
        return sorted(found, key=lambda row: row.object_index)

    def neighbours(self, copy: CopyRow) -> tuple[blockmap.BlockMap | None, int]:
        """The map of the object's next copy, None if there is none, and the instant of the one before, else 0."""
        key = (copy.volume_id, copy.object_index, copy.instant)
        later = self.database.row(
            "SELECT map FROM copies WHERE volume_id = ? AND object_index = ? AND instant > ? ORDER BY instant LIMIT 1",
            key,
        )
        earlier = self.database.row(
            "SELECT max(instant) FROM copies WHERE volume_id = ? AND object_index = ? AND instant < ?", key
        )
        return (
            None if later is None else blockmap.decode(later[0]),
            0 if earlier is None or earlier[0] is None else int(earlier[0]),
        )

    def latest_copy_instant(self, volume_id: VolumeId, object_index: int) -> int:
        """Instant of an object's latest copy, 0 for none."""
        row = self.database.row(
            "SELECT max(instant) FROM copies WHERE volume_id = ? AND object_index = ?",
            (volume_id, object_index),
        )
        return 0 if row is None or row[0] is None else int(row[0])

    def log(self, log_id: int) -> LogRow | None:
        """One change log."""
        row = self.database.row("SELECT * FROM logs WHERE log_id = ?", (log_id,))
        return None if row is None else LogRow(*row)

    def some_logs(self, log_ids: Sequence[int]) -> list[LogRow]:
        """Those of these change logs that there are."""
        rows = self.database.rows(
            "SELECT * FROM logs WHERE log_id IN (SELECT value FROM json_each(?))", (json.dumps(log_ids),)
        )
        return [LogRow(*row) for row in rows]

    def open_log(self, volume_id: VolumeId, epoch: int) -> LogRow | None:
        """The log that takes a volume's writes in an epoch, if it was begun."""
        row = self.database.row(
            "SELECT * FROM logs WHERE volume_id = ? AND epoch = ? AND sealed = 0 AND summed = 0 AND kind = 0"
            " ORDER BY log_id DESC LIMIT 1",
            (volume_id, epoch),
        )
        return None if row is None else LogRow(*row)

    def logs_of(self, volume_id: VolumeId) -> list[LogRow]:
        """A volume's change logs, oldest first."""
        rows = self.database.rows("SELECT * FROM logs WHERE volume_id = ? ORDER BY epoch, log_id", (volume_id,))
        return [LogRow(*row) for row in rows]

    def empty_logs(self) -> list[tuple[LogRow, int]]:
        """Logs in which nothing is named any more, each with the epoch of its volume's log before it, 0 for none."""
        rows = self.database.rows(
            "SELECT coalesce((SELECT epoch FROM logs AS earlier WHERE earlier.volume_id = logs.volume_id"
            " AND (earlier.epoch, earlier.log_id) < (logs.epoch, logs.log_id) AND earlier.kind = 0"
            " ORDER BY earlier.epoch DESC, earlier.log_id DESC LIMIT 1), 0), *"
            " FROM logs WHERE block_count = 0 AND kind = 0"
        )
        return [(LogRow(*row[1:]), row[0]) for row in rows]

    def first_epoch(self, volume_id: VolumeId) -> int | None:
        """The epoch of a volume's first change log; None when it has none."""
        row = self.database.row("SELECT min(epoch) FROM logs WHERE volume_id = ? AND kind = 0", (volume_id,))
        return None if row is None else row[0]

    def all_logs(self) -> list[LogRow]:
        """Every change log."""
        return [LogRow(*row) for row in self.database.rows("SELECT * FROM logs")]

    def seal_latest_logs(self) -> None:
        """After a crash: the last log of each volume may hold blocks that no map names; it is closed to writes."""
        with self.database.transaction():
            self.database.execute(
                "UPDATE logs SET sealed = 2 WHERE log_id IN"
                " (SELECT max(log_id) FROM logs WHERE kind = 0 GROUP BY volume_id)"
            )

    def suspect_logs(self) -> list[LogRow]:
        """Sealed logs that may hold blocks that no map names."""
        return [LogRow(*row) for row in self.database.rows("SELECT * FROM logs WHERE sealed = 2")]

    def clear_suspicion(self, log_id: LogId) -> None:
        """The log holds nothing unnamed any more."""
        with self.database.transaction():
            self.database.execute("UPDATE logs SET sealed = 1 WHERE log_id = ?", (log_id,))

    def versions_of(
        self, volume_ids: Iterable[VolumeId], ranges: Sequence[tuple[int, int]]
    ) -> list[tuple[int, StoredMap]]:
        """Live maps and copies of ranges of objects (first and last) of some volumes: ``(object_index, stored map)``.

        The maps are for :func:`blockmap.decode`, which takes longer than to read them and needs no store.
        """
        found: list[tuple[int, StoredMap]] = []
        for volume_id in volume_ids:
            for first, last in ranges:
                rows = self.database.rows(
                    "SELECT object_index, map FROM maps WHERE volume_id = ?1 AND object_index BETWEEN ?2 AND ?3"
                    " UNION ALL"
                    " SELECT object_index, map FROM copies WHERE volume_id = ?1 AND object_index BETWEEN ?2 AND ?3",
                    (volume_id, first, last),
                )
                found += cast("list[tuple[int, StoredMap]]", rows)
        return found

    def some_versions(
        self, volume_ids: Iterable[VolumeId], ranges: Sequence[tuple[int, int]], row_count_max: int
    ) -> tuple[list[tuple[int, StoredMap]], int]:
        """Like :meth:`versions_of`, of the first objects of these ranges alone; and the last of those looked at.

        As many objects as have so many versions together, but at least one. The ranges are in order.
        """
        found: list[tuple[int, StoredMap]] = []
        last = ranges[-1][1]
        for volume_id in volume_ids:
            for first, end in ranges:
                if first > last:
                    break
                rows, last = self._first_versions(volume_id, first, min(end, last), last, row_count_max)
                found += rows
            if len(found) > 2 * row_count_max:
                found, last = _whole_objects(found, last, row_count_max)
        return _whole_objects(found, last, row_count_max)

    def _first_versions(
        self, volume_id: VolumeId, first: int, end: int, last: int, row_count_max: int
    ) -> tuple[list[tuple[int, StoredMap]], int]:
        """The versions of the first of a volume's objects; and the last of which all are there, else ``last``."""
        rows = cast(
            "list[tuple[int, StoredMap]]",
            self.database.rows(
                "SELECT object_index, map FROM maps WHERE volume_id = ?1 AND object_index BETWEEN ?2 AND ?3"
                " UNION ALL"
                " SELECT object_index, map FROM copies WHERE volume_id = ?1 AND object_index BETWEEN ?2 AND ?3"
                " ORDER BY object_index LIMIT ?4",
                (volume_id, first, end, row_count_max + 1),
            ),
        )
        if len(rows) <= row_count_max:
            return rows, last
        first_found, cut = rows[0][0], rows[-1][0]
        if first_found == cut:
            return self.versions_of([volume_id], [(cut, cut)]), cut
        return [row for row in rows if row[0] != cut], cut - 1

    def set_block_count(self, volume_id: VolumeId, count: int) -> None:
        """Correct a portion's count; inside a transaction."""
        self.database.execute("INSERT OR REPLACE INTO portions VALUES (?, ?)", (volume_id, count))

    def set_log_count(self, log_id: LogId, count: int) -> None:
        """Correct a log's count to the blocks that are named, and seal it; inside a transaction.

        Blocks of it that were still to be looked at are not, or they would be counted out once more: it is suspect,
        so that what of them nothing names is given back.
        """
        self.database.execute("UPDATE logs SET block_count = ?, sealed = 2 WHERE log_id = ?", (count, log_id))
        self.database.execute("DELETE FROM candidates WHERE log_id = ?", (log_id,))

    def sources(self) -> dict[VolumeId, LogRow]:
        """By volume: the log that stands for what it is written over."""
        return {row.volume_id: row for row in self.source_rows()}

    def source_rows(self) -> list[LogRow]:
        """All logs that stand for what a volume is written over."""
        return [LogRow(*row) for row in self.database.rows("SELECT * FROM logs WHERE kind != 0")]

    def block_counts_by_device(self) -> dict[int, int]:
        """Blocks in change logs that anything names, by device."""
        rows = self.database.rows("SELECT device_id, sum(block_count) FROM logs WHERE kind = 0 GROUP BY device_id")
        return cast("dict[int, int]", dict(rows))

    def changed_objects(self, volume_id: VolumeId, after: int, until: int) -> list[int]:
        """Objects that changed after one instant and before or at another, in order."""
        # By the index on instants all volumes' copies in the span are looked at; else all of this one's copies.
        index = "INDEXED BY copies_by_instant" if until - after <= _SHORT_SPAN else "NOT INDEXED"
        rows = self.database.rows(
            f"SELECT object_index FROM copies {index}"
            " WHERE volume_id = ?1 AND instant >= ?2 AND instant < ?3 AND epoch <= ?2",
            (volume_id, after, until),
        )
        return sorted(row[0] for row in rows)

    def changed_objects_of_all(self, after: int, until: int) -> dict[VolumeId, list[int]]:
        """By volume: objects that changed after one instant and before or at another, in order."""
        rows = self.database.rows(
            "SELECT volume_id, object_index FROM copies INDEXED BY copies_by_instant"
            " WHERE instant >= ?1 AND instant < ?2 AND epoch <= ?1 ORDER BY volume_id, object_index",
            (after, until),
        )
        found: dict[VolumeId, list[int]] = {}
        for volume_id, object_index in rows:
            found.setdefault(volume_id, []).append(object_index)
        return found

    def changed_maps(
        self, volume_id: VolumeId, after: int, until: int, objects: Sequence[int]
    ) -> list[tuple[int, blockmap.BlockMap, blockmap.BlockMap]]:
        """Objects that the volume itself has maps or copies of, with their maps at two instants."""
        return [(one, self._map_at(volume_id, one, after), self._map_at(volume_id, one, until)) for one in objects]

    def _map_at(self, volume_id: VolumeId, object_index: int, instant: int) -> blockmap.BlockMap:
        """An object's map at an instant: its next copy, or the live map, if that is as old; else a hole."""
        row = self.database.row(
            "SELECT epoch, map FROM copies WHERE volume_id = ? AND object_index = ? AND instant >= ?"
            " ORDER BY instant LIMIT 1",
            (volume_id, object_index, instant),
        ) or self.database.row(
            "SELECT epoch, map FROM maps WHERE volume_id = ? AND object_index = ?", (volume_id, object_index)
        )
        return blockmap.decode(row[1]) if row is not None and row[0] <= instant else blockmap.HOLE

    def logs_since(self, epochs: Mapping[VolumeId, int]) -> list[LogRow]:
        """Change logs that volumes began in these epochs or later."""
        sql = "SELECT * FROM logs WHERE volume_id = ? AND epoch >= ? AND kind = 0"
        return [LogRow(*row) for one in epochs.items() for row in self.database.rows(sql, one)]

    def copies_from(self, volume_id: VolumeId, object_index: int, instant: int) -> list[CopyRow]:
        """The copies of an object with instants from one on, in order."""
        rows = self.database.rows(
            "SELECT volume_id, object_index, instant, epoch, map FROM copies"
            " WHERE volume_id = ? AND object_index = ? AND instant >= ? ORDER BY instant",
            (volume_id, object_index, instant),
        )
        return [_copy(row) for row in rows]

    def stored_versions(self, volume_id: VolumeId, object_index: int) -> list[tuple[int, int | None, StoredMap]]:
        """``(epoch, instant, stored map)`` of an object's copies in order, and of its live map, without an instant.

        The maps are for :func:`blockmap.decode`.
        """
        where = "WHERE volume_id = ? AND object_index = ?"
        place = (volume_id, object_index)
        copies = self.database.rows(f"SELECT epoch, instant, map FROM copies {where} ORDER BY instant", place)
        live = self.database.rows(f"SELECT epoch, NULL, map FROM maps {where}", place)
        return cast("list[tuple[int, int | None, StoredMap]]", copies + live)

    def latest_copy(self, volume_id: VolumeId, object_index: int) -> CopyRow | None:
        """The latest copy of an object."""
        row = self.database.row(
            "SELECT volume_id, object_index, instant, epoch, map FROM copies"
            " WHERE volume_id = ? AND object_index = ? ORDER BY instant DESC LIMIT 1",
            (volume_id, object_index),
        )
        return None if row is None else _copy(row)

    def log_ids_with_blocks(self) -> set[int]:
        """Logs that have a file."""
        return {row[0] for row in self.database.rows("SELECT log_id FROM logs WHERE block_count > 0 OR kind = 1")}

    def object_count(self) -> int:
        """How many objects have a live map."""
        return self.database.number("SELECT count(*) FROM maps")

    def log_count(self) -> int:
        """How many change logs there are."""
        return self.database.number("SELECT count(*) FROM logs")

    def log_after(self, volume_id: VolumeId, instant: int) -> LogRow | None:
        """The change log that belongs to a snapshot: the first begun after its instant."""
        row = self.database.row(
            "SELECT * FROM logs WHERE volume_id = ? AND epoch > ? AND kind = 0 ORDER BY epoch, log_id LIMIT 1",
            (volume_id, instant),
        )
        return None if row is None else LogRow(*row)

    def live_count_at(self, volume_id: VolumeId, instant: int) -> int | None:
        """The blocks that a volume had mapped here at an instant; None if it has not changed since."""
        row = self.log_after(volume_id, instant)
        return None if row is None else row.live_before

    def live_counts_at(self, instant: int) -> dict[VolumeId, int]:
        """For each volume that changed after an instant, the blocks it had mapped here then."""
        rows = self.database.rows(
            "SELECT volume_id, live_before, min(epoch * 4294967296 + log_id) FROM logs WHERE epoch > ?"
            " GROUP BY volume_id",
            (instant,),
        )
        return {row[0]: row[1] for row in rows}

    def volume_ids(self) -> set[VolumeId]:
        """Every volume of which the store has a map, a copy, a log or a count."""
        rows = self.database.rows(
            "SELECT volume_id FROM maps UNION SELECT volume_id FROM copies"
            " UNION SELECT volume_id FROM logs UNION SELECT volume_id FROM portions"
        )
        return {row[0] for row in rows}

    def block_counts(self) -> dict[VolumeId, int]:
        """Mapped blocks of each volume here."""
        rows = self.database.rows("SELECT volume_id, block_count FROM portions")
        return cast("dict[VolumeId, int]", dict(rows))

    def intermediates(self) -> list[IntermediateRow]:
        """All intermediate snapshots, oldest first."""
        return [IntermediateRow(*row) for row in self.database.rows("SELECT * FROM intermediates ORDER BY instant")]

    def intermediate(self, snapshot_id: SnapshotId) -> IntermediateRow | None:
        """One intermediate snapshot."""
        row = self.database.row("SELECT * FROM intermediates WHERE snapshot_id = ?", (snapshot_id,))
        return None if row is None else IntermediateRow(*row)

    def unsummed_logs(self) -> list[LogRow]:
        """Change logs with blocks, not all of which have their checksums yet, oldest first."""
        rows = self.database.rows(
            "SELECT * FROM logs INDEXED BY logs_unsummed WHERE summed = 0 AND kind = 0 AND block_count > 0"
            " ORDER BY log_id"
        )
        return [LogRow(*row) for row in rows]

    def summed_logs(self) -> list[LogRow]:
        """Change logs with blocks, all of which have their checksums, oldest first."""
        rows = self.database.rows("SELECT * FROM logs WHERE summed = 1 AND block_count > 0 ORDER BY log_id")
        return [LogRow(*row) for row in rows]

    def checksums(self, log_id: int, object_index: int) -> ObjectSums:
        """The checksums of an object's blocks in a log, without digests; of zeros alone when there are none."""
        row = self.database.row(
            "SELECT blocks, checksums, ranges, guards, NULL FROM sums WHERE log_id = ? AND object_index = ?",
            (log_id, object_index),
        )
        return ObjectSums(0, b"") if row is None else ObjectSums.decode((log_id, object_index), *row)

    def some_checksums(self, log_ids: Sequence[int], object_index: int) -> list[tuple[int, ObjectSums]]:
        """Like :meth:`checksums`, in several logs; without those that there are none of, or that are damaged."""
        rows = self.database.rows(
            "SELECT log_id, blocks, checksums, ranges, guards, NULL FROM json_each(?)"
            " CROSS JOIN sums ON log_id = value AND object_index = ?",
            (json.dumps(log_ids), object_index),
        )
        found = []
        for log_id, *encoded in rows:
            with contextlib.suppress(DamagedError):
                found.append((log_id, ObjectSums.decode((log_id, object_index), *encoded)))
        return found

    def sums(self, log_id: int, object_index: int) -> ObjectSums:
        """The checksums and digests of an object's blocks in a log; of zeros alone when there are none."""
        row = self.database.row(
            "SELECT blocks, checksums, ranges, guards, digests FROM sums WHERE log_id = ? AND object_index = ?",
            (log_id, object_index),
        )
        return ObjectSums(0, b"") if row is None else ObjectSums.decode((log_id, object_index), *row)

    def stray_sums_count(self) -> int:
        """How many objects have checksums in logs of which nothing is named."""
        return self.database.number(f"SELECT count(*) FROM sums {_STRAY_SUMS}")

    def drop_stray_sums(self) -> None:
        """Forget checksums in logs of which nothing is named."""
        with self.database.transaction():
            self.database.execute(f"DELETE FROM sums {_STRAY_SUMS}")

    def stray_contents_count(self) -> int:
        """How many content hashes are of volumes that are not counted here."""
        return self.database.number(f"SELECT count(*) FROM contents {_STRAY_CONTENTS}")

    def drop_stray_contents(self) -> None:
        """Forget content hashes of volumes that are not counted here."""
        with self.database.transaction():
            self.database.execute(f"DELETE FROM contents {_STRAY_CONTENTS}")

    def summed_objects(self, log_id: int) -> list[int]:
        """Objects that have checksums in a log, in order."""
        rows = self.database.rows("SELECT object_index FROM sums WHERE log_id = ? ORDER BY object_index", (log_id,))
        return [row[0] for row in rows]

    def content(self, volume_id: VolumeId) -> ContentRow | None:
        """The content hash of a portion as a sealed snapshot has it; None also when it is damaged."""
        row = self.database.row("SELECT * FROM contents WHERE volume_id = ?", (volume_id,))
        return None if row is None else _content(row)

    def content_volume_ids(self) -> list[VolumeId]:
        """Volumes that have a content hash."""
        return [row[0] for row in self.database.rows("SELECT volume_id FROM contents")]

    def has_log_between(self, volume_id: VolumeId, after: int, until: int) -> bool:
        """Whether a volume began a log after one instant and before or at another: only then it may have changed."""
        return (
            self.database.row(
                "SELECT 1 FROM logs WHERE volume_id = ? AND epoch > ? AND epoch <= ? LIMIT 1", (volume_id, after, until)
            )
            is not None
        )

    def epoch_max(self) -> int:
        """The largest epoch that a commit was made in, or that any row speaks of."""
        return max(
            self._epoch_reached(),
            self.database.number(
                "SELECT max(coalesce((SELECT max(epoch) FROM logs), 0),"
                " coalesce((SELECT max(instant) + 1 FROM copies), 0),"
                " coalesce((SELECT max(instant) + 1 FROM intermediates), 0))"
            ),
        )

    def _epoch_reached(self) -> int:
        """The epoch of the last commit. Maps may speak of it alone: a log of which nothing is left is gone."""
        noted = self.database.row("SELECT value FROM meta WHERE key = 'epoch_generation'")
        if noted != (self.generation,):
            # The last commit was an earlier version's, which does not note it; from the next one on it is there.
            return self.database.number("SELECT coalesce(max(epoch), 0) FROM maps")
        return self._meta("epoch")

    def freed(self, limit: int, after_row: int = 0) -> list[tuple[int, FreedRow]]:
        """Ranges still to be punched, each with the number of its row, in the order of these, behind one of them."""
        rows = self.database.rows(
            "SELECT rowid, log_id, offset, length FROM freed WHERE rowid > ? ORDER BY rowid LIMIT ?", (after_row, limit)
        )
        return [(row[0], FreedRow(*row[1:])) for row in rows]

    def forget_freed(self, row_numbers: Iterable[int]) -> None:
        """Take ranges off the list once they are punched, durably enough: punching twice does no harm."""
        with self.database.transaction():
            self.database.each("DELETE FROM freed WHERE rowid = ?", [(number,) for number in row_numbers])

    def commit(self, batch: ShardBatch, catalog_generation: int) -> None:
        """Make a batch durable, all or nothing.

        ``catalog_generation`` is one that the catalog is known to have reached durably.
        """
        database = self.database
        with database.transaction():
            if batch.maps:
                database.each(
                    "INSERT OR REPLACE INTO maps VALUES (?, ?, ?, ?)",
                    [(*row[:3], blockmap.encode(row.block_map)) for row in batch.maps],
                )
            if batch.copies:
                database.each(
                    "INSERT OR REPLACE INTO copies VALUES (?, ?, ?, ?, ?)",
                    [(*row[:4], blockmap.encode_compactly(row.block_map)) for row in batch.copies],
                )
            for sql, rows in (
                ("DELETE FROM maps WHERE volume_id = ? AND object_index = ?", batch.dropped_maps),
                (
                    "DELETE FROM copies WHERE volume_id = ? AND object_index = ? AND instant = ?",
                    batch.dropped_copies,
                ),
                ("INSERT OR REPLACE INTO logs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", batch.logs),
                ("DELETE FROM logs WHERE log_id = ?", [(log_id,) for log_id in batch.dropped_logs]),
                ("DELETE FROM sums WHERE log_id = ?", [(one,) for one in batch.dropped_logs + batch.dropped_sums]),
                (
                    # Not of a log that went while it was read.
                    "INSERT OR REPLACE INTO sums SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7"
                    " WHERE EXISTS (SELECT 1 FROM logs WHERE log_id = ?1 AND block_count > 0)",
                    [(*row[:2], *row.sums.encoded(row[:2])) for row in batch.sums],
                ),
                ("UPDATE logs SET summed = 1 WHERE log_id = ?", [(log_id,) for log_id in batch.summed_logs]),
                (
                    # Not of a volume that was taken apart while it was sealed.
                    "INSERT OR REPLACE INTO contents SELECT ?1, ?2, ?3"
                    " WHERE EXISTS (SELECT 1 FROM portions WHERE volume_id = ?1)",
                    [(*row[:2], _guarded(row)) for row in batch.contents],
                ),
                ("INSERT INTO freed VALUES (?, ?, ?)", batch.freed),
                ("INSERT INTO candidates VALUES (?, ?, ?, ?)", batch.candidates),
                ("DELETE FROM candidates WHERE rowid = ?", [(one,) for one in batch.dropped_candidates]),
                ("INSERT OR REPLACE INTO portions VALUES (?, ?)", batch.portions),
                ("DELETE FROM portions WHERE volume_id = ?", [(one,) for one in batch.dropped_portions]),
                ("DELETE FROM contents WHERE volume_id = ?", [(one,) for one in batch.dropped_portions]),
                ("INSERT INTO intermediates VALUES (?, ?, ?, ?, ?, ?)", batch.intermediates),
                (
                    "DELETE FROM intermediates WHERE snapshot_id = ?",
                    [(one,) for one in batch.dropped_intermediates],
                ),
            ):
                if rows:
                    database.each(sql, cast("list[tuple[int, ...]]", rows))
            meta = [(self.generation + 1, "generation"), (catalog_generation, "catalog_generation")]
            if batch.next_log_id is not None:
                meta.append((batch.next_log_id, "next_log_id"))
            if batch.epoch is not None:
                meta += [(batch.epoch, "epoch"), (self.generation + 1, "epoch_generation")]
            database.each(
                "INSERT INTO meta VALUES (?2, ?1) ON CONFLICT (key) DO UPDATE SET value = excluded.value", meta
            )
        self.generation += 1
        self.catalog_generation = catalog_generation

    def forget_volume(self, volume_id: VolumeId) -> None:
        """Drop every row of a volume that no snapshot holds, all or nothing. Its files are the caller's."""
        with self.database.transaction():
            self.database.execute(
                "DELETE FROM freed WHERE log_id IN (SELECT log_id FROM logs WHERE volume_id = ?)", (volume_id,)
            )
            self.database.execute(
                "DELETE FROM sums WHERE log_id IN (SELECT log_id FROM logs WHERE volume_id = ?)", (volume_id,)
            )
            for table in ("maps", "copies", "logs", "portions", "contents"):
                self.database.execute(f"DELETE FROM {table} WHERE volume_id = ?", (volume_id,))
            self.database.execute("UPDATE meta SET value = value + 1 WHERE key IN ('generation', 'epoch_generation')")
        self.generation += 1

    def close(self) -> None:
        """Close the store."""
        self.database.close()


def _whole_objects(
    rows: list[tuple[int, StoredMap]], last: int, row_count_max: int
) -> tuple[list[tuple[int, StoredMap]], int]:
    """Of versions of objects up to ``last`` those of the first that have so many together; and the last of these."""
    counts: dict[int, int] = {}
    for object_index, _ in rows:
        counts[object_index] = counts.get(object_index, 0) + 1
    total = 0
    for object_index in sorted(counts):
        total += counts[object_index]
        if object_index > last:
            break
        if total > row_count_max:
            last = object_index if total == counts[object_index] else object_index - 1
            break
    return [row for row in rows if row[0] <= last], last


def _what(processor_index: int) -> str:
    return f"the shard store of processor {processor_index}"


def _copy(row: tuple[object, ...]) -> CopyRow:
    volume_id, object_index, instant, epoch, stored = row
    return CopyRow(
        VolumeId(cast("int", volume_id)),
        cast("int", object_index),
        Epoch(cast("int", instant)),
        Epoch(cast("int", epoch)),
        blockmap.decode(stored),
    )


def _guarded(row: ContentRow) -> bytes:
    """A content hash as a store keeps it, with a checksum over the row."""
    value = row.value.to_bytes(VALUE_BYTES, "little")
    return value + xxh3_64_digest(b"%d %d " % row[:2] + value)


def _content(row: tuple[object, ...]) -> ContentRow | None:
    volume_id, instant, stored = row
    value = cast("bytes", stored)
    found = ContentRow(
        VolumeId(cast("int", volume_id)), cast("int", instant), int.from_bytes(value[:VALUE_BYTES], "little")
    )
    return found if found.value and value == _guarded(found) else None
