"""The verifier of a pool that nobody has open. It reads; only :func:`repair` changes anything.

It works on copies of the databases and looks at the devices' files, and holds the catalog against
the shard stores, the maps against the logs, the logs against the space they take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from . import blockmap
from .backends import Device, open_local_image
from .blockmasks import mask_runs, objects_with_data
from .catalog import Catalog
from .counting import inherited_count, stands_on_cow
from .database import Database, read_copy
from .descriptor import lock_pool, read_descriptor
from .errors import DamagedError, NoSpaceError, SnapfsError
from .folder import impossible_numbers
from .formats import (
    CATALOG_FILE,
    CHANGE_LOG,
    COPY_ON_WRITE,
    IMAGE_LOG,
    LEFTOVERS_FROM,
    POOL_FILE,
    SOURCE_LOG,
    CopyRow,
    LogRow,
    MapRow,
    PoolDescriptor,
    VolumeRow,
    log_file,
    log_folder,
    shard_file,
)
from .geometry import BLOCK_SHIFT, BLOCK_SIZE, OBJECT_SHIFT, VolumeId, log_offset, volume_size_bytes_max
from .ownership import OpenDevice
from .pool import check_generations, open_devices, running_pool
from .repair import repair_running
from .rowchecks import impossible_kinds, impossible_snapshots, impossible_versions, unreadable_rules
from .shardstore import ShardStore
from .snapshotindex import NEVER, SnapshotIndex
from .traits import TraitsTable, impossible_descent
from .units import MANIFEST_NAME, check_name, format_size, show_name

DAMAGE, LEAK, NOTE = "damage", "leak", "note"
_MAPS_A_STEP = 2048
_OBJECT_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be, in words.

    ``severity`` is ``damage`` (data or a snapshot is lost), ``leak`` (space is lost, ``--repair``
    gives it back) or ``note`` (nothing is: mostly left by a crash, which the next mount clears up by itself).
    """

    severity: str
    where: str
    what: str


@dataclass(slots=True)
class Report:
    """What a check found, and how much it looked at."""

    findings: list[Finding] = field(default_factory=list)
    volume_count: int = 0
    snapshot_count: int = 0
    object_count: int = 0
    copy_count: int = 0
    log_count: int = 0

    @property
    def is_damaged(self) -> bool:
        """Whether something is lost."""
        return any(finding.severity == DAMAGE for finding in self.findings)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is lost and no space leaks; what a crash left to clear up does not count."""
        return all(finding.severity == NOTE for finding in self.findings)

    def add(self, severity: str, where: str, what: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(severity, where, what))

    def to_json(self) -> dict[str, object]:
        """The report as plain values."""
        return asdict(self)


HasImage = Callable[[str], bool]


def has_local_image(path: str) -> bool:
    """Whether an image on the host can be read."""
    try:
        open_local_image(path, False).close()
    except OSError:
        return False
    return True


def _has_file(device: Device, name: str) -> bool:
    folder, _, last = name.rpartition("/")
    return last in device.names(folder)


@dataclass(slots=True)
class _Context:
    """What the checks of a shard hold it against."""

    descriptor: PoolDescriptor
    devices: Mapping[int, Device]
    volumes: dict[VolumeId, VolumeRow]
    removed: Mapping[VolumeId, int]
    snapshots: SnapshotIndex
    snapshot_instants: dict[int, int]
    all_instants: set[int]
    kept_instants: set[int]
    leftovers_from: int
    next_instant: int
    was_clean: bool
    traits: TraitsTable
    versioned_ids: set[VolumeId]
    has_image: HasImage
    report: Report


def check_pool(home: Device, where: str, open_device: OpenDevice, has_image: HasImage = has_local_image) -> Report:
    """Verify a pool. Blocks. ``home`` is locked meanwhile, and not changed.

    Raises NotAPoolError, TooNewError, InUseError, DeviceMissingError, when there is nothing to verify.
    """
    descriptor = read_descriptor(home, where)
    lock_pool(home, where, "check")
    report = Report()
    with contextlib.ExitStack() as stack:
        try:
            database = _verified(stack, home, CATALOG_FILE, "the catalog", report)
            catalog = Catalog.over(database, descriptor.pool_id)
        except (FileNotFoundError, _TooDamagedError, DamagedError):
            report.add(DAMAGE, CATALOG_FILE, "the catalog is missing or unreadable; restore the pool from a copy")
            return report
        devices = open_devices(catalog, descriptor, open_device)
        stack.callback(lambda: [device.close() for device in devices.values()])
        try:
            _check_catalog(catalog, descriptor, devices, report, home, stack, has_image)
        except DamagedError as error:
            report.add(DAMAGE, CATALOG_FILE, str(error))
    return report


class _TooDamagedError(Exception):
    """A database cannot be looked into."""


def _verified(stack: contextlib.ExitStack, home: Device, name: str, what: str, report: Report) -> Database:
    """A copy of a database, until the stack is closed. Raises FileNotFoundError or _TooDamagedError."""
    try:
        database = stack.enter_context(read_copy(home, name, what))
        for (line,) in database.rows("PRAGMA integrity_check(20)"):
            if line != "ok":
                report.add(DAMAGE, name, f"SQLite says: {line}")
    except FileNotFoundError:
        raise
    except NoSpaceError:
        # Of what is there nothing is known by that.
        raise
    except OSError as error:
        report.add(DAMAGE, name, f"{what} cannot be read: {error.strerror}")
        raise _TooDamagedError from error
    except SnapfsError as error:
        report.add(DAMAGE, name, str(error))
        raise _TooDamagedError from error
    return database


def _check_catalog(
    catalog: Catalog,
    descriptor: PoolDescriptor,
    devices: Mapping[int, Device],
    report: Report,
    home: Device,
    stack: contextlib.ExitStack,
    has_image: HasImage,
) -> None:
    volumes = {row.volume_id: row for row in catalog.volumes()}
    index = SnapshotIndex()
    instants: dict[int, int] = {}
    kept: set[int] = set()
    rows = catalog.traits()
    impossible = impossible_descent(rows)
    for words in impossible.values():
        report.add(DAMAGE, CATALOG_FILE, words)
    traits = TraitsTable(row for row in rows if row.volume_id not in impossible)
    for row in catalog.snapshots():
        instants[row.snapshot_id] = row.instant
        if row.name is None and traits.inheritors(row.snapshot_id):
            kept.add(row.instant)
            index.add(row.instant, row.volume_ids)
        if row.name is None:
            report.add(NOTE, CATALOG_FILE, f"deleted snapshot {row.snapshot_id} still has space to free")
        else:
            kept.add(row.instant)
            index.add(row.instant, row.volume_ids)
            report.snapshot_count += 1
    report.volume_count = len(volumes)
    context = _Context(
        descriptor=descriptor,
        devices=devices,
        volumes=volumes,
        removed=catalog.removed(),
        snapshots=index,
        snapshot_instants=instants,
        all_instants=set(instants.values()),
        kept_instants=kept,
        leftovers_from=catalog.meta(LEFTOVERS_FROM, 0) or NEVER,
        next_instant=catalog.meta("next_instant"),
        was_clean=bool(catalog.meta("clean")),
        traits=traits,
        versioned_ids=catalog.version_volume_ids(),
        has_image=has_image,
        report=report,
    )
    _check_volumes(context, catalog)
    versions = catalog.versions()
    for words in (
        *impossible_snapshots(catalog.snapshots(), volumes, versions),
        *impossible_versions(volumes, versions, index),
        *unreadable_rules(catalog.schedules(), catalog.hooks()),
    ):
        report.add(DAMAGE, CATALOG_FILE, words)
    try:
        catalog.epoch_max()
    except SnapfsError as error:
        report.add(DAMAGE, CATALOG_FILE, str(error))
    if sorted(catalog.shard_generations()) != list(range(descriptor.processor_count)):
        report.add(DAMAGE, CATALOG_FILE, f"it tells of other processors than {POOL_FILE}")
    stores = []
    for processor_index in range(descriptor.processor_count):
        name = shard_file(processor_index)
        try:
            database = _verified(stack, home, name, f"shard store {processor_index}", report)
            stores.append(ShardStore.over(database, processor_index, descriptor.pool_id))
        except FileNotFoundError:
            report.add(DAMAGE, name, "the shard store is missing; restore the pool from a copy")
        except _TooDamagedError:
            continue
        except SnapfsError as error:
            report.add(DAMAGE, name, str(error))
    try:
        check_generations(catalog, stores)
    except SnapfsError as error:
        report.add(DAMAGE, CATALOG_FILE, str(error))
    for store in stores:
        try:
            _ShardCheck(context, store).run()
        except SnapfsError as error:
            report.add(DAMAGE, shard_file(store.processor_index), str(error))


def _check_name(report: Report, name: bytes, where: str) -> None:
    if name == MANIFEST_NAME:
        # Earlier versions made such a volume.
        report.add(NOTE, where, "in snapshots its name stands for the manifest: rename it")
        return
    try:
        check_name(name, "volume")
    except SnapfsError as error:
        report.add(DAMAGE, where, str(error))


def _check_volumes(context: _Context, catalog: Catalog) -> None:
    report = context.report
    for row in context.volumes.values():
        where = f"volume {show_name(row.attributes.name)!r}"
        _check_name(report, row.attributes.name, where)
        if not 0 <= row.attributes.size_bytes <= volume_size_bytes_max(context.descriptor.processor_count):
            report.add(DAMAGE, where, f"its size is {row.attributes.size_bytes}")
        if row.trim:
            report.add(NOTE, where, "what lies behind its size is still to be cleared")
    for key, taken in (
        ("next_volume_id", [*context.volumes, *context.removed, *context.traits.rows]),
        ("next_snapshot_id", list(context.snapshot_instants)),
        ("next_instant", list(context.snapshot_instants.values())),
    ):
        if catalog.meta(key) <= max(taken, default=0):
            report.add(DAMAGE, CATALOG_FILE, f"its {key} is {catalog.meta(key)}, which is taken")
    for words in impossible_numbers(catalog):
        report.add(DAMAGE, CATALOG_FILE, words)
    for traits in context.traits.rows.values():
        if traits.restore_instant:
            report.add(NOTE, CATALOG_FILE, f"a rollback in place of volume {traits.volume_id} is still to be finished")
            is_held = context.snapshots.holds(traits.volume_id, traits.restore_instant, traits.restore_instant)
            if traits.change_mode != COPY_ON_WRITE or not is_held:
                report.add(DAMAGE, CATALOG_FILE, f"and no snapshot holds what volume {traits.volume_id} is to be then")
    for volume_id in context.removed:
        report.add(NOTE, CATALOG_FILE, f"removed volume {volume_id} still has maps to take apart")
    for version in catalog.versions():
        if version.epoch > version.instant:
            report.add(DAMAGE, CATALOG_FILE, f"attributes of volume {version.volume_id} hold for no instant")
        elif not context.snapshots.holds(version.volume_id, version.epoch, version.instant):
            is_due = len(context.kept_instants) != len(context.snapshot_instants)
            if version.instant < min(context.next_instant, context.leftovers_from) and not is_due:
                report.add(
                    LEAK,
                    CATALOG_FILE,
                    f"attributes of volume {version.volume_id} are kept for no snapshot",
                )


@dataclass(slots=True)
class _NamedBlocks:
    """Blocks of one log that maps and copies name: by object, as a bit mask; and whose maps those are."""

    masks: dict[int, int] = field(default_factory=dict)
    live: set[VolumeId] = field(default_factory=set)
    kept: set[VolumeId] = field(default_factory=set)
    count: int = 0


class _ShardCheck:
    """The checks of one shard store."""

    def __init__(self, context: _Context, store: ShardStore) -> None:
        self.context = context
        self.store = store
        self.where = shard_file(store.processor_index)
        self.report = context.report
        self.named: dict[int, _NamedBlocks] = {}
        self.logs: dict[int, LogRow] = {row.log_id: row for row in store.all_logs()}
        # By log and object: the mask of blocks that are still to be looked at. They are counted until they were.
        self.waiting: dict[int, dict[int, int]] = {}
        for row in store.all_candidates():
            masks = self.waiting.setdefault(row.log_id, {})
            mask = ((1 << row.block_count) - 1) << row.block
            masks[row.object_index] = masks.get(row.object_index, 0) | mask

    def run(self) -> None:
        """Run all of them."""
        self.store.epoch_max()
        if self.store.next_log_id <= max(self.logs, default=0):
            what = f"the next change log is to be {self.store.next_log_id}, which is taken"
            self.report.add(DAMAGE, self.where, what)
        self._check_intermediates()
        self._check_sources()
        for volume_id in sorted(self.store.volume_ids()):
            self._check_volume(volume_id)
        self._check_logs()

    def _check_intermediates(self) -> None:
        parts = {part.snapshot_id: part for part in self.store.intermediates()}
        for snapshot_id, instant in self.context.snapshot_instants.items():
            part = parts.pop(snapshot_id, None)  # type: ignore[call-overload]
            if part is None:
                if instant in self.context.kept_instants:
                    self.report.add(DAMAGE, self.where, f"snapshot {snapshot_id} has no intermediate snapshot here")
            elif part.instant != instant:
                self.report.add(
                    DAMAGE,
                    self.where,
                    f"snapshot {snapshot_id} is of instant {instant}, its intermediate of {part.instant}",
                )
        for snapshot_id in parts:
            self.report.add(NOTE, self.where, f"intermediate snapshot {snapshot_id} was prepared and never combined")

    def _check_sources(self) -> None:
        """Whether each volume that is written over something, or stands on an image, has a record of that here."""
        known_ids = {*self.context.volumes, *self.context.removed, *self.context.versioned_ids}
        for words in impossible_kinds(self.logs.values(), self.context.traits, known_ids):
            self.report.add(DAMAGE, self.where, words)
        known = {log.volume_id for log in self.logs.values() if log.kind != CHANGE_LOG}
        for volume_id in self.context.volumes:
            traits = self.context.traits.get(volume_id)
            if (traits.change_mode == COPY_ON_WRITE or traits.source_path) and volume_id not in known:
                what = f"{self._shown(volume_id)} has lost the record of what it is written over"
                self.report.add(DAMAGE, self.where, what)

    def _check_volume(self, volume_id: VolumeId) -> None:
        own: set[int] = set()
        mapped = from_object = 0
        has_copies = False
        while from_object <= _OBJECT_MAX:
            # Some thousand maps in memory at a time, however many snapshots there are.
            some = self.store.some_maps(volume_id, from_object, _MAPS_A_STEP)
            last = some[-1].object_index if len(some) == _MAPS_A_STEP else _OBJECT_MAX
            rows, last = self.store.some_copies(volume_id, from_object, last, _MAPS_A_STEP)
            copies: dict[int, list[CopyRow]] = {}
            for copy in rows:
                copies.setdefault(copy.object_index, []).append(copy)
            live = {row.object_index: row for row in some if row.object_index <= last}
            for object_index in sorted(live.keys() | copies.keys()):
                self._check_object(volume_id, object_index, copies.get(object_index, []), live.get(object_index))
            for row in live.values():
                mapped += blockmap.mapped_count(row.block_map)
                self._check_end(volume_id, row)
            own.update(live)
            has_copies = has_copies or bool(copies)
            from_object = last + 1
        self.report.object_count += len(own)
        if stands_on_cow(self.context.traits, volume_id):
            return
        if volume_id in self.context.volumes:
            count = self.context.descriptor.processor_count
            mapped += inherited_count(self.store, self.context.traits, volume_id, own, count)
        counted = self.store.block_counts().get(volume_id, 0)
        is_known = volume_id in self.context.volumes or bool(own) or has_copies
        if counted != mapped and volume_id not in self.context.removed:
            # A clone that a crash cut off before the catalog knew it: the next mount drops the count.
            self.report.add(
                LEAK if is_known else NOTE,
                self.where,
                f"volume {volume_id} has {mapped} blocks mapped, {counted} are counted",
            )

    def _check_object(self, volume_id: VolumeId, object_index: int, copies: list[CopyRow], live: MapRow | None) -> None:
        where = f"{self.where}: volume {volume_id}, object {object_index}"
        snapshots = self.context.snapshots
        if object_index % self.context.descriptor.processor_count != self.store.processor_index:
            self.report.add(DAMAGE, where, "it belongs to another processor")
        volume = self.context.volumes.get(volume_id)
        covered = volume.birth_epoch - 1 if volume is not None else NEVER
        for copy in copies:
            self.report.copy_count += 1
            if copy.epoch > copy.instant or (covered != NEVER and copy.epoch <= covered):
                self.report.add(DAMAGE, where, f"the copy of instant {copy.instant} overlaps another")
            if snapshots.holds(volume_id, covered + 1, copy.epoch - 1):
                self.report.add(DAMAGE, where, f"no copy covers a snapshot before instant {copy.epoch}")
            if copy.instant in self.context.kept_instants and not snapshots.holds(
                volume_id, copy.instant, copy.instant
            ):
                what = f"the copy of instant {copy.instant} is for a snapshot that has lost this volume"
                self.report.add(DAMAGE, where, what)
            elif not snapshots.holds(volume_id, copy.epoch, copy.instant):
                is_due = copy.instant not in self.context.kept_instants and (
                    copy.instant in self.context.all_instants
                    or copy.instant >= min(self.context.next_instant, self.context.leftovers_from)
                )
                deleting = len(self.context.kept_instants) != len(self.context.snapshot_instants)
                severity = NOTE if is_due or deleting else LEAK
                self.report.add(severity, where, f"the copy of instant {copy.instant} is for no snapshot")
            covered = copy.instant
            self._name_blocks(where, copy.block_map, object_index, volume_id, copy.epoch, is_live=False)
        if live is not None:
            # Who had a removed volume open may have written to it since; no snapshot holds that.
            last_instant = self.context.removed.get(volume_id, NEVER) - 1
            if snapshots.holds(volume_id, covered + 1, min(live.epoch - 1, last_instant)):
                self.report.add(DAMAGE, where, f"no copy covers a snapshot before epoch {live.epoch}")
            if copies and live.epoch <= covered:
                self.report.add(DAMAGE, where, f"its map of epoch {live.epoch} is older than its copies")
            self._name_blocks(where, live.block_map, object_index, volume_id, live.epoch, is_live=True)
            if volume is None and volume_id not in self.context.removed:
                self.report.add(DAMAGE, where, "it has a live map, but the catalog knows no such volume")
        elif volume is not None and copies:
            self.report.add(DAMAGE, where, "it has copies, and its live map is lost")

    def _name_blocks(
        self,
        where: str,
        block_map: blockmap.BlockMap,
        object_index: int,
        volume_id: VolumeId,
        epoch: int,
        *,
        is_live: bool,
    ) -> None:
        for block, count, log_id in blockmap.all_runs(block_map):
            if log_id == blockmap.HOLE:
                continue
            log = self.logs.get(log_id)
            if log is None:
                self.report.add(DAMAGE, where, f"{count} blocks lie in change log {log_id}, which is not known")
            elif log.kind != CHANGE_LOG and log.volume_id in self.context.traits.family_of(volume_id):
                continue
            elif log.volume_id not in self.context.traits.family_of(volume_id):
                self.report.add(DAMAGE, where, f"{count} blocks lie in a change log of volume {log.volume_id}")
            elif log.epoch > epoch and not stands_on_cow(self.context.traits, log.volume_id):
                self.report.add(DAMAGE, where, f"a map of epoch {epoch} names log {log_id} of {log.epoch}")
            named = self.named.setdefault(log_id, _NamedBlocks())
            named.masks[object_index] = named.masks.get(object_index, 0) | ((1 << count) - 1) << block
            (named.live if is_live else named.kept).add(volume_id)

    def _check_end(self, volume_id: VolumeId, row: MapRow) -> None:
        volume = self.context.volumes.get(volume_id)
        if volume is None or volume.trim or self.context.traits.get(volume_id).change_mode == COPY_ON_WRITE:
            return
        last = 0
        for block, count, log_id in blockmap.all_runs(row.block_map):
            log = self.logs.get(log_id)
            # What lies in a source is not kept for this volume: it takes no space, and was zeros if it was not cleared.
            if log_id != blockmap.HOLE and (log is None or log.kind == CHANGE_LOG):
                last = block + count
        end = (row.object_index << OBJECT_SHIFT) + (last << BLOCK_SHIFT)
        if last and end - BLOCK_SIZE >= volume.attributes.size_bytes:
            self.report.add(
                LEAK if self.context.was_clean else NOTE,
                f"{self.where}: volume {volume_id}, object {row.object_index}",
                "blocks are mapped behind the volume's size",
            )

    def _check_logs(self) -> None:
        pending = self._check_freed()
        if pending:
            self.report.add(NOTE, self.where, f"{len(pending)} change logs have freed ranges still to be punched")
        for log_id, log in sorted(self.logs.items()):
            self.report.log_count += 1
            named = self.named.get(log_id, _NamedBlocks())
            if log.kind != CHANGE_LOG:
                self._check_source(log)
                continue
            count = sum(mask.bit_count() for mask in named.masks.values())
            where = f"{self.where}: change log {log_id}"
            due = self._due_count(log_id, named)
            if count + due != log.block_count and log.volume_id not in self.context.removed:
                # Counted down with what is freed, it would go with blocks that are named; no repair begins then.
                severity = DAMAGE if count + due > log.block_count else LEAK
                what = f"{count} of its blocks are named, {log.block_count} are counted"
                self.report.add(severity, where, what + f", and {due} are to be counted out" * bool(due))
            if count:
                self._check_file(where, log, named, has_pending=log_id in pending)
        self._check_strays()
        self._check_sums()

    def _due_count(self, log_id: int, named: _NamedBlocks) -> int:
        """Blocks of a log that nothing names and that are counted, for they are still to be looked at."""
        masks = self.waiting.get(log_id, {})
        return sum((mask & ~named.masks.get(one, 0)).bit_count() for one, mask in masks.items())

    def _check_freed(self) -> set[int]:
        """Whether nothing that is still to be punched is named; the logs with such ranges."""
        pending: set[int] = set()
        count = self.context.descriptor.processor_count
        for _, row in self.store.freed(1 << 40):
            pending.add(row.log_id)
            masks = self.named.get(row.log_id, _NamedBlocks()).masks
            extent = [(row.offset, row.offset + row.length)]
            for object_index, mask in objects_with_data(extent, self.store.processor_index, count):
                named = masks.get(object_index, 0) & mask
                if named:
                    where = f"{self.where}: change log {row.log_id}, object {object_index}"
                    self.report.add(DAMAGE, where, f"{named.bit_count()} blocks that are named are to be punched")
        return pending

    def _check_sums(self) -> None:
        for log in self.logs.values():
            if log.summed and log.block_count:
                self._check_sums_of(log)
        for volume_id in self.store.content_volume_ids():
            if self.store.content(volume_id) is None:
                # It is worked out anew.
                self.report.add(NOTE, self.where, f"the content hash of volume {volume_id} is damaged")
        count = self.store.stray_contents_count()
        if count:
            self.report.add(LEAK, self.where, f"{count} content hashes are of volumes that are not there")
        count = self.store.stray_sums_count()
        if count:
            self.report.add(LEAK, self.where, f"{count} objects have checksums in change logs that hold nothing")

    def _check_sums_of(self, log: LogRow) -> None:
        """Whether each named block of a sealed log has its checksum, or is zeros."""
        where = f"{self.where}: change log {log.log_id}"
        named = dict(self.named.get(log.log_id, _NamedBlocks()).masks)
        for object_index in self.store.summed_objects(log.log_id):
            try:
                sums = self.store.sums(log.log_id, object_index)
            except DamagedError as error:
                self.report.add(DAMAGE, where, error.reason)
                named.pop(object_index, None)
                continue
            named[object_index] = named.get(object_index, 0) & ~sums.mask
        without = sum(self._data_count(log, object_index, mask) for object_index, mask in named.items() if mask)
        if without:
            self.report.add(DAMAGE, where, f"{without} of its blocks are not zeros and have no checksum")

    def _data_count(self, log: LogRow, object_index: int, mask: int) -> int:
        """Blocks of an object in a log that are not zeros."""
        try:
            file = self.context.devices[log.device_id].open(log_file(self.store.processor_index, log.log_id))
        except (OSError, KeyError):
            # That it is missing is told elsewhere.
            return 0
        base = log_offset(object_index, self.context.descriptor.processor_count)
        found = 0
        try:
            for first, count in mask_runs(mask):
                for block in range(first, first + count):
                    contents = bytearray(BLOCK_SIZE)
                    file.read_into(contents, base + (block << BLOCK_SHIFT))
                    found += contents != bytes(BLOCK_SIZE)
        except OSError as error:
            self.report.add(DAMAGE, self.where, f"change log {log.log_id} cannot be read: {error.strerror}")
        finally:
            file.close()
        return found

    def _check_source(self, log: LogRow) -> None:
        """Whether what a volume is written over is there."""
        where = f"{self.where}: the source of volume {log.volume_id}"
        traits = self.context.traits.get(log.volume_id)
        device = self.context.devices.get(log.device_id)
        name = log_file(self.store.processor_index, log.log_id)
        if log.kind == IMAGE_LOG:
            if log.volume_id in self.context.volumes and not self.context.has_image(traits.source_path):
                self.report.add(DAMAGE, where, f"the image {traits.source_path} cannot be opened")
        elif device is None or not _has_file(device, name):
            self.report.add(DAMAGE, where, f"its file {name} is missing")

    def _losers(self, named: _NamedBlocks) -> str:
        """Who loses data with a log, in words."""
        users = [
            f"{self._shown(one)}{' and its snapshots' if one in named.kept else ''}"
            for one in sorted(named.live & self.context.volumes.keys())
        ]
        users += [f"snapshots of {self._shown(one)}" for one in sorted(named.kept - named.live)]
        return f"; what lies there is of {', '.join(users)}" if users else ""

    def _shown(self, volume_id: VolumeId) -> str:
        volume = self.context.volumes.get(volume_id)
        return f"a former volume {volume_id}" if volume is None else f"volume {show_name(volume.attributes.name)!r}"

    def _check_file(self, where: str, log: LogRow, named: _NamedBlocks, *, has_pending: bool) -> None:
        device = self.context.devices.get(log.device_id)
        if device is None:
            self.report.add(DAMAGE, where, f"it lies on device {log.device_id}, which the pool does not have")
            return
        name = log_file(self.store.processor_index, log.log_id)
        try:
            file = device.open(name)
        except FileNotFoundError:
            self.report.add(DAMAGE, where, f"its file {name} is missing{self._losers(named)}")
            return
        except OSError as error:
            reason = f"its file {name} cannot be opened: {error.strerror}"
            self.report.add(DAMAGE, where, reason + self._losers(named))
            return
        try:
            extents = file.data_extents()
            size_bytes = file.size()
        except OSError as error:
            self.report.add(DAMAGE, where, f"its file {name} cannot be read: {error.strerror}{self._losers(named)}")
            return
        finally:
            file.close()
        _, unnamed = _compare(self._named_ranges(named.masks), extents)
        missing, _ = _compare(self._named_ranges(self._not_zeros(log, named.masks)), extents)
        if missing:
            reason = f"{format_size(missing)} that maps name are not in {name} ({size_bytes} bytes)"
            self.report.add(DAMAGE, where, reason + self._losers(named))
        if unnamed:
            # A crash leaves blocks that were written and never named; they are written over or go
            # with the log.
            is_due = has_pending or log.sealed == 2 or log.log_id in self.waiting
            severity = LEAK if self.context.was_clean and not is_due else NOTE
            self.report.add(severity, where, f"{format_size(unnamed)} in {name} are not named by any map")

    def _not_zeros(self, log: LogRow, masks: Mapping[int, int]) -> Mapping[int, int]:
        """Of a sealed log the blocks that have a checksum: others are zeros, which a copy may have as holes."""
        if not log.summed:
            return masks
        found = {}
        for object_index, mask in masks.items():
            # What is damaged of them is told elsewhere.
            with contextlib.suppress(DamagedError):
                mask &= self.store.sums(log.log_id, object_index).mask
            found[object_index] = mask
        return found

    def _named_ranges(self, masks: Mapping[int, int]) -> list[tuple[int, int]]:
        ranges: list[tuple[int, int]] = []
        count = self.context.descriptor.processor_count
        for object_index, mask in sorted(masks.items()):
            base = log_offset(object_index, count)
            for block, run in mask_runs(mask):
                start = base + (block << BLOCK_SHIFT)
                end = start + (run << BLOCK_SHIFT)
                if ranges and ranges[-1][1] == start:
                    ranges[-1] = (ranges[-1][0], end)
                else:
                    ranges.append((start, end))
        return ranges

    def _check_strays(self) -> None:
        index = self.store.processor_index
        with_file = {one for one, log in self.logs.items() if log.block_count or log.kind == SOURCE_LOG}
        for device_id, device in self.context.devices.items():
            try:
                names = device.names(log_folder(index))
            except OSError as error:
                where = f"device {device_id}: {log_folder(index)}"
                self.report.add(DAMAGE, where, f"it cannot be listed: {error.strerror}")
                continue
            for name in names:
                try:
                    log_id = int(name, 16)
                except ValueError:
                    where = f"device {device_id}: {log_folder(index)}/{name}"
                    self.report.add(NOTE, where, "it is no change log's file; it is left alone")
                    continue
                if log_id not in with_file:
                    self.report.add(
                        NOTE,
                        f"device {device_id}: {log_folder(index)}/{name}",
                        "no change log has this file; the next mount removes it",
                    )


def _compare(named: list[tuple[int, int]], extents: list[tuple[int, int]]) -> tuple[int, int]:
    """Bytes that are named and lie in holes, and bytes of data that are not named."""
    missing = unnamed = 0
    place = 0
    position = 0
    for start, end in named:
        position = start
        while place < len(extents) and extents[place][1] <= start:
            place += 1
        walk = place
        while position < end:
            if walk >= len(extents) or extents[walk][0] >= end:
                missing += end - position
                break
            low, high = extents[walk]
            if low > position:
                missing += low - position
            position = min(end, high)
            walk += 1
    covered = sum(end - start for start, end in named) - missing
    present = sum(_block_up(end) - start for start, end in extents)
    unnamed = max(0, present - covered)
    return missing, unnamed


def _block_up(size_bytes: int) -> int:
    return (size_bytes + BLOCK_SIZE - 1) & ~(BLOCK_SIZE - 1)


async def repair(home: Device, where: str, open_device: OpenDevice) -> list[str]:
    """Repair what can be repaired without guessing, as words on what was done.

    Opening the pool finishes what a crash left; then copies that no snapshot needs are dropped,
    counts are set to what the maps say, and unnamed blocks are given back. Lost data is not
    invented: damage stays damage.
    """
    async with running_pool(home, where, open_device, "repair") as pool:
        return await repair_running(pool)
