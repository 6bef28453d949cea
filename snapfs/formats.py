"""What is on disk: names of files, schemas of the stores, and their records. Pure.

``docs/on-disk-format.md`` tells the same in prose; golden pools of every format version prove it.
The comments of the schemas are the authority on what a column holds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import NamedTuple

from .blockmap import BlockMap
from .checksums import ObjectSums
from .errors import DamagedError, NotAPoolError, TooNewError
from .geometry import PROCESSOR_COUNT_MAX, Epoch, LogId, SnapshotId, VolumeId

FORMAT_VERSION = 4

# Of the catalog's meta table; without the row it is 0.
LEFTOVERS_FROM = "leftovers_from"

REDIRECT, COPY_ON_WRITE = 0, 1
# By the words of the command line.
CHANGE_MODES = {"redirect": REDIRECT, "cow": COPY_ON_WRITE}
POOL_CHANGE_LOGS = 0

POOL_FILE = "pool.json"
LOCK_FILE = "lock"
CATALOG_FILE = "catalog.sqlite"
RESERVE_FILE = "reserve"
DEVICE_FILE = "snapfs-device.json"
EMBEDDED_DEVICE_FOLDER = "device"
DAEMON_LOG_FILE = "daemon.log"


SHARD_FOLDER = "shards"


def shard_file(processor_index: int) -> str:
    """Name of a processor's shard store in the pool's directory."""
    return f"{SHARD_FOLDER}/{processor_index}.sqlite"


def log_folder(processor_index: int) -> str:
    """Folder of a processor's change logs on a device."""
    return f"logs/{processor_index}"


def told_key(device_id: int) -> str:
    """Where the catalog keeps how new it told a device to be, once that is durable there."""
    return f"told_device_{device_id}"


def log_id_of(name: str) -> int:
    """The number of the change log that a file is of. Raises ValueError for a name that none has."""
    return int(name.rpartition("/")[2], 16)


def log_file(processor_index: int, log_id: int) -> str:
    """Name of a change log's file on its device."""
    return f"logs/{processor_index}/{log_id:08x}"


@dataclass(frozen=True, slots=True)
class PoolDescriptor:
    """``pool.json``: what has to be known before anything else is opened."""

    pool_id: str
    processor_count: int
    created_ns: int
    format_version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        """The file's contents."""
        return _json(
            {
                "snapfs": "pool",
                "format_version": self.format_version,
                "pool_id": self.pool_id,
                "processor_count": self.processor_count,
                "created_ns": self.created_ns,
            }
        )

    @classmethod
    def from_json(cls, contents: bytes, where: str) -> PoolDescriptor:
        """Read it. Raises NotAPoolError, TooNewError or DamagedError."""
        fields = _read_json(contents, where, "pool")
        _check_version(fields, where)
        pool_id, count, created = fields.get("pool_id"), fields.get("processor_count"), fields.get("created_ns")
        if not (isinstance(pool_id, str) and isinstance(count, int) and isinstance(created, int)):
            raise DamagedError(f"{where}/{POOL_FILE} lacks a field", "Restore it from a copy")
        if not 1 <= count <= PROCESSOR_COUNT_MAX:
            raise DamagedError(f"{where}/{POOL_FILE} says {count} processors", "Restore it from a copy")
        return cls(pool_id, count, created, int(str(fields["format_version"])))


@dataclass(frozen=True, slots=True)
class DeviceDescriptor:
    """``snapfs-device.json`` in a device's directory: whose it is.

    ``generation`` is that of the catalog when the pool was last opened or closed: one that is behind it is an old copy.
    """

    pool_id: str
    device_id: int
    generation: int = 0

    def to_json(self) -> bytes:
        """The file's contents."""
        return _json(
            {
                "snapfs": "device",
                "format_version": FORMAT_VERSION,
                "pool_id": self.pool_id,
                "device_id": self.device_id,
                "generation": self.generation,
            }
        )

    @classmethod
    def from_json(cls, contents: bytes, where: str) -> DeviceDescriptor:
        """Read it. Raises NotAPoolError, TooNewError or DamagedError."""
        fields = _read_json(contents, where, "device")
        _check_version(fields, where)
        pool_id, device_id = fields.get("pool_id"), fields.get("device_id")
        # Those of before 0.8.0 have none.
        generation = fields.get("generation", 0)
        if not (isinstance(pool_id, str) and isinstance(device_id, int) and isinstance(generation, int)):
            raise DamagedError(f"{where}/{DEVICE_FILE} lacks a field", "Restore it from a copy")
        return cls(pool_id, device_id, generation)


def _json(fields: dict[str, object]) -> bytes:
    return (json.dumps(fields, indent=2) + "\n").encode()


def _read_json(contents: bytes, where: str, kind: str) -> dict[str, object]:
    try:
        fields = json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"the {kind} descriptor in {where} is not JSON", "Restore it from a copy") from error
    if not isinstance(fields, dict) or fields.get("snapfs") != kind:
        raise NotAPoolError(f"{where} holds something else than a snapfs {kind}", "Make a pool with snapfs init")
    return fields


def _check_version(fields: dict[str, object], where: str) -> None:
    version = fields.get("format_version")
    # True is an int to Python.
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise DamagedError(f"{where} has no format version", "Restore its descriptor from a copy")
    if version > FORMAT_VERSION:
        raise TooNewError(
            f"{where} has format version {version}, this snapfs knows up to {FORMAT_VERSION}",
            "Use the snapfs that wrote it, or a later one",
        )


class Attributes(NamedTuple):
    """What a volume's file shows besides its bytes. Times are nanoseconds since 1970, UTC."""

    name: bytes
    size_bytes: int
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class AttributeChange:
    """New values of attributes; None leaves one as it is."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None

    @property
    def only_times(self) -> bool:
        """Whether it may wait for the next sync."""
        return self.mode is None and self.uid is None and self.gid is None


class VolumeRow(NamedTuple):
    """A volume as the catalog keeps it.

    ``epoch`` is the one in which the attributes last changed: they hold for every snapshot of
    that epoch or later. ``named_epoch`` follows the last snapshot that named this volume.
    ``trim`` is 1 while maps may still name blocks behind the size.
    """

    volume_id: VolumeId
    attributes: Attributes
    birth_epoch: Epoch
    epoch: Epoch
    named_epoch: Epoch
    created_ns: int
    trim: int


class VolumeTraits(NamedTuple):
    """What sets a volume apart from a plain one, for as long as anything of it is left.

    ``file_id`` is the id under which users know it: a rollback gives a file a new volume.
    ``change_mode`` is REDIRECT or COPY_ON_WRITE. ``origin_id`` and ``origin_instant`` tell of which
    volume it is a clone, as that stood when; 0 for none. While ``inherits`` is 1, objects without a
    map of their own are the origin's, and the snapshot ``origin_snapshot_id`` is kept.
    ``changelog_id`` is its change log volume, POOL_CHANGE_LOGS for none. ``source_path`` is the
    image it stands on, empty for none, which had ``source_size_bytes`` and ``source_mtime_ns``
    when snapfs last had it open. ``restore_instant``: a rollback in place to this instant is under
    way, 0 for none.
    """

    volume_id: VolumeId
    file_id: VolumeId
    change_mode: int = REDIRECT
    origin_id: VolumeId = VolumeId(0)
    origin_instant: int = 0
    origin_snapshot_id: SnapshotId = SnapshotId(0)
    inherits: int = 0
    changelog_id: int = POOL_CHANGE_LOGS
    source_path: str = ""
    source_size_bytes: int = 0
    source_mtime_ns: int = 0
    restore_instant: int = 0


class ChangeLogVolumeRow(NamedTuple):
    """A change log volume. ``frees_oldest``: full, it has the oldest snapshots deleted that nothing holds."""

    changelog_id: int
    name: bytes
    capacity_bytes: int
    frees_oldest: int


class ScheduleRow(NamedTuple):
    """A schedule as the catalog keeps it; see schedule.py. ``rule`` is JSON."""

    name: str
    rule: str
    last_run_ns: int


class VersionRow(NamedTuple):
    """Attributes as they stood for the snapshots of epochs ``epoch`` to ``instant``."""

    volume_id: VolumeId
    epoch: Epoch
    instant: Epoch
    attributes: Attributes


class SnapshotRow(NamedTuple):
    """A snapshot in the catalog. ``name`` is None once it is deleted and its space is being freed.

    ``volume_ids`` is None for a snapshot of all volumes. ``stall_ns`` is the longest time for
    which it kept the daemon from serving. ``schedule`` names the schedule that made it, empty for
    one made by hand. ``guid`` is that of the snapshot it was received from. ``hold_tags`` keep it from being deleted.
    ``root`` is over its sealed contents, empty before it is sealed; ``previous_root`` was that of the
    snapshot before; ``unsealed_ids`` are volumes that it is not over. ``frozen_ns``: for how long
    hooks kept applications still.
    """

    snapshot_id: SnapshotId
    name: bytes | None
    instant: Epoch
    created_ns: int
    volume_ids: frozenset[VolumeId] | None
    stall_ns: int
    note: str
    schedule: str = ""
    guid: str = ""
    hold_tags: frozenset[str] = frozenset()
    root: str = ""
    previous_root: str = ""
    unsealed_ids: frozenset[VolumeId] = frozenset()
    frozen_ns: int = 0


CATALOG_SCHEMA_1 = """
CREATE TABLE meta (             -- one row a key
  key TEXT PRIMARY KEY,         -- pool_id, format_version, generation (grows with every commit),
  value ANY NOT NULL            -- epoch (instant + 1 of the last snapshot of all volumes), next_instant,
                                -- next_volume_id, next_snapshot_id, clean (1: closed, nothing is to be recovered)
) STRICT, WITHOUT ROWID;
CREATE TABLE devices (
  device_id INTEGER PRIMARY KEY,  -- 0 and up
  path TEXT NOT NULL              -- absolute; empty for the one inside the pool
) STRICT;
CREATE TABLE shards (           -- what each shard store must at least have reached
  processor_index INTEGER PRIMARY KEY,
  generation INTEGER NOT NULL   -- a lower one in the store: it is an old copy
) STRICT;
CREATE TABLE volumes (          -- the live ones
  volume_id INTEGER PRIMARY KEY,  -- 256 and up; never used again
  name BLOB NOT NULL UNIQUE,
  size_bytes INTEGER NOT NULL,    -- as far as data behind it is durable
  mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
  atime_ns INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
  birth_epoch INTEGER NOT NULL,
  epoch INTEGER NOT NULL,         -- in which the attributes last changed
  named_epoch INTEGER NOT NULL,   -- instant + 1 of the last snapshot that named it, 0 for none
  created_ns INTEGER NOT NULL,
  trim INTEGER NOT NULL           -- 1: maps may still name blocks behind the size
) STRICT;
CREATE TABLE versions (         -- attributes that snapshots hold and the volume no longer has
  volume_id INTEGER NOT NULL,
  instant INTEGER NOT NULL,       -- the last snapshot they hold for
  epoch INTEGER NOT NULL,         -- the first
  name BLOB NOT NULL,
  size_bytes INTEGER NOT NULL,
  mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL,
  atime_ns INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
  PRIMARY KEY (volume_id, instant)
) STRICT, WITHOUT ROWID;
CREATE INDEX versions_by_instant ON versions (instant);
CREATE TABLE removed (          -- removed volumes whose maps are still to be taken apart
  volume_id INTEGER PRIMARY KEY,
  epoch INTEGER NOT NULL          -- the volume's epoch when it was removed
) STRICT;
CREATE TABLE snapshots (
  snapshot_id INTEGER PRIMARY KEY,  -- 1 and up
  name BLOB UNIQUE,                 -- NULL: deleted, its space is being freed
  instant INTEGER NOT NULL UNIQUE,
  created_ns INTEGER NOT NULL,
  named INTEGER NOT NULL,           -- 1: of the volumes in members; 0: of all
  stall_ns INTEGER NOT NULL,
  note TEXT NOT NULL
) STRICT;
CREATE TABLE members (
  snapshot_id INTEGER NOT NULL,
  volume_id INTEGER NOT NULL,
  PRIMARY KEY (snapshot_id, volume_id)
) STRICT, WITHOUT ROWID;
"""

CATALOG_SCHEMA_2 = """
ALTER TABLE devices ADD COLUMN
  changelog_id INTEGER NOT NULL DEFAULT 0;  -- the change log volume it is of, 0: it holds the volumes' own data
ALTER TABLE snapshots ADD COLUMN
  schedule TEXT NOT NULL DEFAULT '';        -- that made it; empty: made by hand
ALTER TABLE snapshots ADD COLUMN
  guid TEXT NOT NULL DEFAULT '';            -- of the snapshot it was received from, in another pool; empty: made here
CREATE TABLE receives (         -- streams that are being received, or were cut off
  guid TEXT PRIMARY KEY,          -- of the snapshot they bring
  state TEXT NOT NULL             -- JSON, see receive.py
) STRICT, WITHOUT ROWID;
CREATE TABLE holds (            -- tags that keep a snapshot from being deleted
  snapshot_id INTEGER NOT NULL,
  tag TEXT NOT NULL,
  PRIMARY KEY (snapshot_id, tag)
) STRICT, WITHOUT ROWID;
CREATE TABLE traits (           -- of volumes that are not plain; kept while anything of them is left
  volume_id INTEGER PRIMARY KEY,
  file_id INTEGER NOT NULL,       -- the volume id under which users first knew the file
  change_mode INTEGER NOT NULL,   -- 0: redirecting; 1: copy-on-write
  origin_id INTEGER NOT NULL,     -- the volume it was cloned from, 0 for none
  origin_instant INTEGER NOT NULL,      -- as it stood when
  origin_snapshot_id INTEGER NOT NULL,
  inherits INTEGER NOT NULL,      -- 1: objects without a map of their own are the origin's
  changelog_id INTEGER NOT NULL,  -- its change log volume, 0: its change logs lie with the data
  source_path TEXT NOT NULL,      -- the image it stands on, empty for none
  source_size_bytes INTEGER NOT NULL,   -- of the image, when snapfs last had it open
  source_mtime_ns INTEGER NOT NULL
) STRICT;
CREATE TABLE changelogs (       -- change log volumes
  changelog_id INTEGER PRIMARY KEY,     -- 1 and up; never used again
  name BLOB NOT NULL UNIQUE,
  capacity_bytes INTEGER NOT NULL,
  frees_oldest INTEGER NOT NULL   -- 1: full, it has the oldest snapshots deleted that nothing holds
) STRICT;
CREATE TABLE schedules (
  name TEXT PRIMARY KEY,
  rule TEXT NOT NULL,             -- JSON, see schedule.py
  last_run_ns INTEGER NOT NULL    -- the last moment that was due and is done with
) STRICT, WITHOUT ROWID;
"""

SHARD_SCHEMA_1 = """
CREATE TABLE meta (             -- one row a key
  key TEXT PRIMARY KEY,         -- pool_id, processor_index, generation (grows with every commit),
  value ANY NOT NULL            -- catalog_generation (one the catalog has reached), next_log_id
) STRICT, WITHOUT ROWID;
CREATE TABLE maps (             -- the live map of each object that was ever written
  volume_id INTEGER NOT NULL,
  object_index INTEGER NOT NULL,
  epoch INTEGER NOT NULL,         -- in which it last changed
  map ANY NOT NULL,               -- see blockmap.py
  PRIMARY KEY (volume_id, object_index)
) STRICT, WITHOUT ROWID;
CREATE TABLE copies (           -- point-in-time copies of maps
  volume_id INTEGER NOT NULL,
  object_index INTEGER NOT NULL,
  instant INTEGER NOT NULL,       -- the last snapshot it holds for
  epoch INTEGER NOT NULL,         -- the first
  map ANY NOT NULL,
  PRIMARY KEY (volume_id, object_index, instant)
) STRICT, WITHOUT ROWID;
CREATE INDEX copies_by_instant ON copies (instant, volume_id, object_index);
CREATE TABLE logs (             -- change logs
  log_id INTEGER PRIMARY KEY,     -- 1 to 2^32 - 1; never used again
  volume_id INTEGER NOT NULL,
  epoch INTEGER NOT NULL,         -- of the volume, when it was begun: it belongs to the snapshot before
  device_id INTEGER NOT NULL,
  block_count INTEGER NOT NULL,   -- blocks in it that any map or copy names; 0: it has no file
  live_before INTEGER NOT NULL,   -- blocks of the volume here that were mapped when it was begun
  sealed INTEGER NOT NULL,        -- 1: takes no more writes; 2: and may hold blocks that nothing names
  created_ns INTEGER NOT NULL
) STRICT;
CREATE INDEX logs_by_volume ON logs (volume_id, epoch);
CREATE TABLE freed (            -- ranges that nothing names any more, still to be punched
  log_id INTEGER NOT NULL,
  offset INTEGER NOT NULL,
  length INTEGER NOT NULL
) STRICT;
CREATE TABLE portions (         -- this processor's part of each volume
  volume_id INTEGER PRIMARY KEY,
  block_count INTEGER NOT NULL    -- blocks mapped in its live maps
) STRICT;
CREATE TABLE intermediates (    -- intermediate snapshots; prepared until the catalog knows the snapshot
  snapshot_id INTEGER PRIMARY KEY,
  instant INTEGER NOT NULL UNIQUE,
  prepared_ns INTEGER NOT NULL,
  block_count INTEGER NOT NULL,   -- blocks mapped at the instant, of the volumes in it
  portion_count INTEGER NOT NULL, -- volumes of which this processor held blocks
  next_log_id INTEGER NOT NULL    -- logs from this one on hold what changed afterwards
) STRICT;
"""

SHARD_SCHEMA_2 = """
ALTER TABLE logs ADD COLUMN
  kind INTEGER NOT NULL DEFAULT 0;  -- 0: a change log; 1: a source, which copy-on-write volumes overwrite in place;
                                    -- 2: an image outside the pool
CREATE TABLE candidates (       -- blocks that a clone's family may have no name for any more; still to be looked at
  log_id INTEGER NOT NULL,
  object_index INTEGER NOT NULL,
  block INTEGER NOT NULL,
  block_count INTEGER NOT NULL
) STRICT;
"""

CATALOG_SCHEMA_3 = """
ALTER TABLE snapshots ADD COLUMN
  root TEXT NOT NULL DEFAULT '';            -- over its sealed contents, see contenthash.py; empty: not sealed yet
ALTER TABLE snapshots ADD COLUMN
  previous_root TEXT NOT NULL DEFAULT '';   -- that of the snapshot before, when this one was sealed
ALTER TABLE snapshots ADD COLUMN
  unsealed TEXT NOT NULL DEFAULT '';        -- ids of volumes that the root is not over, with commas between
ALTER TABLE snapshots ADD COLUMN
  frozen_ns INTEGER NOT NULL DEFAULT 0;     -- for how long hooks kept applications still, 0 for no hooks
ALTER TABLE traits ADD COLUMN
  restore_instant INTEGER NOT NULL DEFAULT 0;   -- a rollback in place to this instant is under way, 0 for none
CREATE TABLE hooks (            -- programs that run before and after snapshots
  name TEXT PRIMARY KEY,
  rule TEXT NOT NULL              -- JSON, see hook.py
) STRICT, WITHOUT ROWID;
"""

SHARD_SCHEMA_3 = """
ALTER TABLE logs ADD COLUMN
  summed INTEGER NOT NULL DEFAULT 0;    -- 1: every block in it has its checksums in sums
CREATE INDEX logs_unsummed ON logs (log_id) WHERE summed = 0 AND kind = 0;
CREATE TABLE sums (             -- checksums of the blocks of logs that take no more writes, see checksums.py
  log_id INTEGER NOT NULL,
  object_index INTEGER NOT NULL,
  blocks BLOB NOT NULL,           -- 1024 bits, the lowest first: which blocks have any; the others are zeros
  checksums BLOB NOT NULL,        -- 8 bytes a block
  ranges BLOB NOT NULL,           -- 8 bytes for each 32 blocks, zeros included; empty: too few blocks to pay
  guards BLOB NOT NULL,           -- 8 bytes over the three before, 8 over the digests
  digests BLOB NOT NULL,          -- 16 bytes a block
  PRIMARY KEY (log_id, object_index)
) STRICT, WITHOUT ROWID;
CREATE TABLE contents (         -- the content hash of a portion as a sealed snapshot has it, see contenthash.py
  volume_id INTEGER PRIMARY KEY,
  instant INTEGER NOT NULL,
  value BLOB NOT NULL             -- 384 bytes, and 8 over the row
) STRICT;
"""

# By the version of a database (SQLite's user_version, and 1): what makes it one of the next.
CATALOG_SCHEMAS = (CATALOG_SCHEMA_1, CATALOG_SCHEMA_2, CATALOG_SCHEMA_3)
SHARD_SCHEMAS = (SHARD_SCHEMA_1, SHARD_SCHEMA_2, SHARD_SCHEMA_3)

CHANGE_LOG, SOURCE_LOG, IMAGE_LOG = 0, 1, 2


class MapRow(NamedTuple):
    """The live map of an object."""

    volume_id: VolumeId
    object_index: int
    epoch: Epoch
    block_map: BlockMap


class CopyRow(NamedTuple):
    """A point-in-time copy: the map as it stood for snapshots of epochs ``epoch`` to ``instant``."""

    volume_id: VolumeId
    object_index: int
    instant: Epoch
    epoch: Epoch
    block_map: BlockMap


class LogRow(NamedTuple):
    """A change log."""

    log_id: LogId
    volume_id: VolumeId
    epoch: Epoch
    device_id: int
    block_count: int
    live_before: int
    sealed: int
    created_ns: int
    kind: int = CHANGE_LOG
    summed: int = 0


class SumsRow(NamedTuple):
    """The checksums of one object's blocks in one change log."""

    log_id: LogId
    object_index: int
    sums: ObjectSums


class ContentRow(NamedTuple):
    """The content hash of a portion, as a snapshot of this instant has it."""

    volume_id: VolumeId
    instant: int
    value: int


class CandidateRow(NamedTuple):
    """A run of an object's blocks in a log of a family of clones that one of its volumes no longer names."""

    log_id: LogId
    object_index: int
    block: int
    block_count: int


class FreedRow(NamedTuple):
    """A range of a change log's file, in bytes, that nothing names any more."""

    log_id: LogId
    offset: int
    length: int


class IntermediateRow(NamedTuple):
    """One processor's part of a snapshot; see the schema."""

    snapshot_id: SnapshotId
    instant: Epoch
    prepared_ns: int
    block_count: int
    portion_count: int
    next_log_id: LogId


@dataclass(slots=True)
class ShardBatch:
    """One commit of a processor: rows that become durable together.

    It is a plain value, so that it could as well be appended to a log object on a distributed
    device. ``next_log_id`` and ``epoch`` are of the processor at that time, and kept in the meta table.
    """

    maps: list[MapRow] = field(default_factory=list)
    dropped_maps: list[tuple[VolumeId, int]] = field(default_factory=list)
    copies: list[CopyRow] = field(default_factory=list)
    dropped_copies: list[tuple[VolumeId, int, Epoch]] = field(default_factory=list)
    logs: list[LogRow] = field(default_factory=list)
    dropped_logs: list[LogId] = field(default_factory=list)
    freed: list[FreedRow] = field(default_factory=list)
    candidates: list[CandidateRow] = field(default_factory=list)
    dropped_candidates: list[int] = field(default_factory=list)
    portions: list[tuple[VolumeId, int]] = field(default_factory=list)
    dropped_portions: list[VolumeId] = field(default_factory=list)
    sums: list[SumsRow] = field(default_factory=list)
    dropped_sums: list[LogId] = field(default_factory=list)
    summed_logs: list[LogId] = field(default_factory=list)
    contents: list[ContentRow] = field(default_factory=list)
    intermediates: list[IntermediateRow] = field(default_factory=list)
    dropped_intermediates: list[SnapshotId] = field(default_factory=list)
    next_log_id: LogId | None = None
    epoch: Epoch | None = None

    def __bool__(self) -> bool:
        return any(
            (
                self.maps,
                self.dropped_maps,
                self.copies,
                self.dropped_copies,
                self.logs,
                self.dropped_logs,
                self.freed,
                self.candidates,
                self.dropped_candidates,
                self.portions,
                self.dropped_portions,
                self.sums,
                self.summed_logs,
                self.contents,
                self.intermediates,
                self.dropped_intermediates,
            )
        )


@dataclass(slots=True)
class CatalogBatch:
    """One commit of the catalog: rows that become durable together."""

    volumes: list[VolumeRow] = field(default_factory=list)
    dropped_volumes: list[VolumeId] = field(default_factory=list)
    versions: list[VersionRow] = field(default_factory=list)
    dropped_versions: list[tuple[VolumeId, Epoch]] = field(default_factory=list)
    removed: list[tuple[VolumeId, Epoch]] = field(default_factory=list)
    dropped_removed: list[VolumeId] = field(default_factory=list)
    snapshots: list[SnapshotRow] = field(default_factory=list)
    renamed_snapshots: list[tuple[SnapshotId, bytes | None]] = field(default_factory=list)
    dropped_snapshots: list[SnapshotId] = field(default_factory=list)
    roots: list[tuple[SnapshotId, str, str, str]] = field(default_factory=list)
    hooks: list[tuple[str, str]] = field(default_factory=list)
    dropped_hooks: list[bytes] = field(default_factory=list)
    holds: list[tuple[SnapshotId, str]] = field(default_factory=list)
    dropped_holds: list[tuple[SnapshotId, str]] = field(default_factory=list)
    traits: list[VolumeTraits] = field(default_factory=list)
    dropped_traits: list[VolumeId] = field(default_factory=list)
    changelogs: list[ChangeLogVolumeRow] = field(default_factory=list)
    dropped_changelogs: list[int] = field(default_factory=list)
    devices: list[tuple[int, str, int]] = field(default_factory=list)
    dropped_devices: list[int] = field(default_factory=list)
    schedules: list[ScheduleRow] = field(default_factory=list)
    dropped_schedules: list[str] = field(default_factory=list)
    receives: list[tuple[str, str]] = field(default_factory=list)
    dropped_receives: list[str] = field(default_factory=list)
    shard_generations: list[tuple[int, int]] = field(default_factory=list)
    trim_all: bool = False
    meta: dict[str, int] = field(default_factory=dict)
