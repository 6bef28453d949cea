"""The pool: the façade over volumes, snapshots and processors. Making, opening, recovering, closing one."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

import trio

from .affected import DamageTeller
from .backends import Device, Space, open_local_image
from .catalog import Catalog
from .catalogaccess import CatalogAccess
from .changelogvolumes import ChangeLogVolumes
from .clones import Clones
from .damage import DamageLedger
from .database import read_copy
from .descriptor import claim_device, lock_pool, open_home, read_descriptor
from .errors import (
    ClosedError,
    DamagedError,
    DeviceMissingError,
    ExistsError,
    NoMemoryError,
    NoSpaceError,
    SnapfsError,
    UnreadableError,
)
from .events import EventLog
from .folder import Folder
from .formats import (
    CATALOG_FILE,
    COPY_ON_WRITE,
    DEVICE_FILE,
    EMBEDDED_DEVICE_FOLDER,
    FORMAT_VERSION,
    LEFTOVERS_FROM,
    POOL_FILE,
    CatalogBatch,
    DeviceDescriptor,
    PoolDescriptor,
    told_key,
)
from .freeing import OldestFreer
from .geometry import PROCESSOR_COUNT_MAX
from .hooks import HookTable
from .imagewatch import ImageWatch
from .jobs import Jobs
from .liveness import DeviceWatch, Room
from .making import VolumeMaker
from .ownership import OpenDevice, device_opener
from .pace import Demand
from .pending import PendingCalls
from .placement import OpenImage, Placement
from .processor import Processor
from .reclaimer import Reclaimer
from .reserve import Reserve, give_up, make_room
from .rowchecks import impossible_kinds
from .scheduler import Scheduler
from .sealer import Sealer
from .shardstate import EpochClock
from .shardstore import ShardStore
from .snapshotindex import SnapshotIndex
from .snapshots import SnapshotTable
from .tasks import Wakeup, in_thread, kept_up, side_by_side, within
from .traits import TraitsTable
from .volumes import VolumeTable

PROCESSOR_COUNT_DEFAULT = 4
SYNC_PERIOD_S = 5.0
_NOTE_S = 5.0
_STARTED = "init.started"


def create_pool(
    home: Device, devices: Mapping[str, Device], processor_count: int = PROCESSOR_COUNT_DEFAULT
) -> PoolDescriptor:
    """Make an empty pool in ``home``, with data on ``devices`` by path. Blocks.

    ``pool.json`` is written last: with it there is a pool, without it there is none.
    Raises ExistsError when ``home`` or a device holds something already.
    """
    if not 1 <= processor_count <= PROCESSOR_COUNT_MAX:
        raise SnapfsError(f"{processor_count} processors", f"Use 1 to {PROCESSOR_COUNT_MAX}")
    if POOL_FILE in home.names(""):
        raise ExistsError("there is a pool already", "Mount it, or choose another directory")
    descriptor = PoolDescriptor(str(uuid.uuid4()), processor_count, time.time_ns())
    for path, device in devices.items():
        if DEVICE_FILE in device.names(""):
            raise ExistsError(f"{path or 'the pool'} is a device of a pool already", "Choose another directory")
    home.write_file(_STARTED, b"")
    for device_id, device in enumerate(devices.values()):
        device.write_file(DEVICE_FILE, DeviceDescriptor(descriptor.pool_id, device_id).to_json())
    Catalog.create(home, descriptor.pool_id, processor_count, list(devices))
    for index in range(processor_count):
        ShardStore.create(home, index, descriptor.pool_id)
    Reserve(home).fill()
    home.write_file(POOL_FILE, descriptor.to_json())
    home.remove(_STARTED)
    return descriptor


def open_devices(catalog: Catalog, descriptor: PoolDescriptor, open_device: OpenDevice) -> dict[int, Device]:
    """Open the pool's devices, and lock them.

    Raises DeviceMissingError when one is not there or is another's; InUseError when a copy of the pool's directory has
    it; DamagedError when the pool's directory is an old copy, which would take newer data for what a crash has left.
    """
    devices: dict[int, Device] = {}
    try:
        for device_id, path in catalog.device_paths().items():
            device = devices[device_id] = open_device_of(descriptor, device_id, path, open_device)
            if path:
                # The one inside the pool's directory is copied and locked with that.
                claim_device(device, path)
                for words in wrong_generations(catalog, device, device_id, path):
                    raise DamagedError(words, "Use the latest of both, or restore the whole pool from one copy")
    except BaseException:
        for device in devices.values():
            device.close()
        raise
    return devices


def _check_devices(home: Device, descriptor: PoolDescriptor, open_device: OpenDevice) -> None:
    """See that the devices of a pool of an earlier version are there, before it is upgraded.

    Raises DeviceMissingError, DamagedError.
    """
    try:
        with read_copy(home, CATALOG_FILE, "the catalog", ["devices"]) as database:
            rows = database.rows("SELECT device_id, path FROM devices ORDER BY device_id")
    except FileNotFoundError:
        # Whoever opens it tells.
        return
    for device_id, path in cast("list[tuple[int, str]]", rows):
        open_device_of(descriptor, device_id, path, open_device).close()


def _upgrade_descriptor(home: Device, where: str, descriptor: PoolDescriptor) -> None:
    """Have a pool of an earlier version be one of this. Raises NoSpaceError, UnreadableError; then nothing changed."""
    try:
        make_room(home)
        try:
            home.write_file(POOL_FILE, descriptor.to_json())
        except OSError as error:
            # By a quota it may be full though there is room.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            give_up(home)
            home.write_file(POOL_FILE, descriptor.to_json())
    except OSError as error:
        reason = f"the pool cannot be upgraded, for {where}/{POOL_FILE} cannot be written: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(reason, "Make room there; it is as it was, but without its reserve") from error
        raise UnreadableError(reason, "It is as it was. Make it writable, or mount it with -o rescue") from error


def open_device_of(descriptor: PoolDescriptor, device_id: int, path: str, open_device: OpenDevice) -> Device:
    """Open one of the pool's devices. Raises DeviceMissingError, or DamagedError when it does not tell which it is."""
    shown = path or EMBEDDED_DEVICE_FOLDER
    try:
        device = open_device(path)
    except PermissionError as error:
        raise DeviceMissingError(
            f"device {device_id} of the pool, {shown}, cannot be used: {error.strerror}",
            "It has to be whoever's the pool is: chown it, with all that is in it",
        ) from error
    except OSError as error:
        raise _device_missing(device_id, shown, error) from error
    try:
        try:
            contents = device.read_file(DEVICE_FILE)
        except OSError as error:
            raise _device_missing(device_id, shown, error) from error
        found = DeviceDescriptor.from_json(contents, shown)
        if (found.pool_id, found.device_id) != (descriptor.pool_id, device_id):
            raise DeviceMissingError(
                f"{shown} is device {found.device_id} of pool {found.pool_id}, not device {device_id} of this one",
                "Put the right one there",
            )
        _keep_others_out(device, device_id, shown)
    except BaseException:
        device.close()
        raise
    return device


def _keep_others_out(device: Device, device_id: int, shown: str) -> None:
    """Those given before 0.8.9 are as they were made. Raises DeviceMissingError when others can write there."""
    try:
        device.make_private()
    except OSError:
        # Root's are root's to change; that others can read their names does no harm.
        if device.foreign_uid([]) is not None:
            raise DeviceMissingError(
                f"others may write to device {device_id} of the pool, {shown}",
                "See that nobody has put anything there, then: chmod go-w",
            ) from None


def wrong_generations(catalog: Catalog, device: Device, device_id: int, path: str) -> list[str]:
    """That the pool's directory or a device is an older copy than the other knows of, in words. Raises DamagedError."""
    generation = DeviceDescriptor.from_json(device.read_file(DEVICE_FILE), path).generation
    told = catalog.meta(told_key(device_id), 0)
    if generation > catalog.generation:
        return [
            f"the pool's directory is an old copy: its catalog is at {catalog.generation}, device {path} was last used"
            f" at {generation}"
        ]
    if generation < told:
        return [f"device {path} is an old copy: it was last used at {generation}, the catalog knows of {told}"]
    return []


def _device_missing(device_id: int, shown: str, error: OSError) -> DeviceMissingError:
    return DeviceMissingError(
        f"device {device_id} of the pool is not at {shown}: {error.strerror}",
        "Mount or attach it there, then try again; nothing was changed",
    )


def _check_sources(catalog: Catalog, stores: Sequence[ShardStore]) -> None:
    """Raises DamagedError for a change log that is taken for a source: it would be removed with what lies in it."""
    rows = [store.source_rows() for store in stores]
    if not any(rows):
        return
    traits = TraitsTable(catalog.traits())
    known_ids = {*(row.volume_id for row in catalog.volumes()), *catalog.removed(), *catalog.version_volume_ids()}
    for store, of_store in zip(stores, rows, strict=True):
        for words in impossible_kinds(of_store, traits, known_ids):
            raise DamagedError(
                f"the shard store of processor {store.processor_index} is damaged: {words}",
                "Restore the pool from a copy; snapfs check tells more",
            )


def check_generations(catalog: Catalog, stores: Sequence[ShardStore]) -> None:
    """Refuse an old copy of one database beside newer others. Raises DamagedError."""
    for store in stores:
        check_store_generation(catalog, store)
        check_catalog_generation(catalog, store)


def check_store_generation(catalog: Catalog, store: ShardStore) -> None:
    """Raises DamagedError for a store that is older than the catalog knows."""
    at_least = catalog.shard_generations().get(store.processor_index, 0)
    if store.generation < at_least:
        raise DamagedError(
            f"the shard store of processor {store.processor_index} is an old copy: it is at"
            f" {store.generation}, the catalog knows of {at_least}",
            "Restore the whole pool from one copy, not single files",
        )


def check_catalog_generation(catalog: Catalog, store: ShardStore) -> None:
    """Raises DamagedError for a catalog that is older than a store knows."""
    if catalog.generation < store.catalog_generation:
        raise DamagedError(
            f"the catalog is an old copy: it is at {catalog.generation}, processor"
            f" {store.processor_index} knows of {store.catalog_generation}",
            "Restore the whole pool from one copy, not single files",
        )


class Pool:
    """An open pool.

    ``volumes`` and ``snapshots`` are what users see. ``lost`` says in words what of a damaged one is not there (see
    rescue.py). ``after_crash``: it was not closed in order. Made by :func:`open_pool`; a script under trio
    uses it directly, a mount is one more user of it.
    """

    def __init__(
        self,
        home: Device,
        descriptor: PoolDescriptor,
        catalog: Catalog,
        stores: Sequence[ShardStore],
        devices: dict[int, Device],
        open_device: OpenDevice,
        open_image: OpenImage,
    ) -> None:
        self.home = home
        self.descriptor = descriptor
        self.devices = devices
        self.events = EventLog()
        self.pending = PendingCalls(self.events)
        self.catalog = CatalogAccess(catalog, self.pending)
        self.reserve = Reserve(home)
        self.is_closing = False
        self.lost: Sequence[str] = ()
        self._is_recovered = False
        # Devices that are being told how new the pool's directory is.
        self._told: set[int] = set()
        self.after_crash = not catalog.meta("clean")
        self._published_instant = catalog.meta("next_instant")
        seen = max(catalog.epoch_max(), *(store.epoch_max() for store in stores))
        # An unpublished cut may have begun an epoch; then all begin one after it.
        epoch = seen if seen > self._published_instant else catalog.meta("epoch")
        index = SnapshotIndex()
        clock = EpochClock(epoch)
        wakeup = Wakeup()
        sealer_wakeup = Wakeup()
        self.damage = DamageLedger()
        self.volumes = VolumeTable(
            self.catalog,
            index,
            clock,
            catalog.meta("next_volume_id"),
            catalog.removed(),
            TraitsTable(catalog.traits()),
            self.reserve,
            wakeup,
            Folder(catalog),
        )
        self.placement = Placement(
            catalog.changelog_ids(), catalog.changelogs(), self.volumes.traits, open_image, len(stores)
        )
        self.demand = Demand()
        self.watch = DeviceWatch(devices, self.pending, self.demand)
        self.processors = [
            Processor(
                store.processor_index,
                len(stores),
                store,
                devices,
                epoch,
                self.volumes.facts_of,
                self.volumes.traits,
                self.placement,
                self.damage.note,
                self.volumes.refuse_writes,
                self.pending,
                self.watch,
                self.reserve,
            )
            for store in stores
        ]
        self.volumes.processors = self.processors
        self.hooks = HookTable(self.catalog, self.events, home.local_path(POOL_FILE), catalog.hooks())
        self.snapshots = SnapshotTable(
            self.catalog,
            self.volumes,
            index,
            clock,
            max(self._published_instant, seen),
            catalog.meta("next_snapshot_id"),
            self.reserve,
            self.events,
            self.hooks,
            wakeup,
            sealer_wakeup,
        )
        self.snapshots.processors = self.processors
        self.reclaimer = Reclaimer(
            self.catalog,
            self.volumes,
            self.snapshots,
            index,
            self.processors,
            self.reserve,
            self.events,
            wakeup,
            self.demand,
            self.used_percent,
        )
        self.changelogs = ChangeLogVolumes(
            self.catalog,
            self.placement,
            devices,
            self.processors,
            self.volumes.traits,
            open_device,
            descriptor.pool_id,
            self.events,
            self.volumes.lock,
        )
        self.maker = VolumeMaker(self.volumes, self.processors, self.placement, open_image, self.reclaimer, self.events)
        self.freer = OldestFreer(
            self.changelogs, self.placement, self.snapshots, self.reclaimer, self.reserve, self.events
        )
        self.images = ImageWatch(self.catalog, self.volumes.traits, self.placement, self.events)
        self.scheduler = Scheduler(self.catalog, self.snapshots, self.events, catalog.schedules())
        self.jobs = Jobs()
        self.sealer = Sealer(
            self.catalog, self.volumes.traits, self.snapshots, self.processors, self.events, sealer_wakeup, self.demand
        )
        self.damage_teller = DamageTeller(self.damage, self.volumes, self.snapshots, self.processors, self.events)
        self.clones = Clones(self.volumes, self.snapshots, self.processors, self.reclaimer, self.events, self.jobs)
        self.volumes.load(catalog.volumes(), after_crash=self.after_crash)
        self.snapshots.load(catalog.snapshots(), catalog.meta(LEFTOVERS_FROM, 0))
        for volume_id in self.volumes.removed:
            for processor in self.processors:
                processor.tally.hide(volume_id)

    @classmethod
    def open(
        cls,
        home: Device,
        where: str,
        open_device: OpenDevice,
        purpose: str = "open",
        open_image: OpenImage = open_local_image,
    ) -> Pool:
        """Open the parts of a pool. Blocks. Raises what its parts raise; then nothing stays open."""
        descriptor = read_descriptor(home, where)
        lock_pool(home, where, purpose)
        if descriptor.format_version < FORMAT_VERSION:
            _check_devices(home, descriptor, open_device)
            # First of all, so that no older snapfs opens databases of this version.
            descriptor = dataclasses.replace(descriptor, format_version=FORMAT_VERSION)
            _upgrade_descriptor(home, where, descriptor)
        catalog = Catalog.open(home, descriptor.pool_id)
        stores: list[ShardStore] = []
        devices: dict[int, Device] = {}
        try:
            if catalog.processor_count() != descriptor.processor_count:
                raise DamagedError(
                    f"{where}/{POOL_FILE} tells of {descriptor.processor_count} processors, the catalog of another"
                    " number",
                    "Restore it from a copy",
                )
            devices = open_devices(catalog, descriptor, open_device)
            for index in range(descriptor.processor_count):
                stores.append(ShardStore.open(home, index, descriptor.pool_id))
            check_generations(catalog, stores)
            _check_sources(catalog, stores)
            return cls(home, descriptor, catalog, stores, devices, open_device, open_image)
        except BaseException:
            for store in stores:
                store.database.abandon()
            catalog.database.abandon()
            for device in devices.values():
                device.close()
            raise

    async def recover(self) -> None:
        """Finish what a crash left: unpublished snapshots, and files of logs that no store knows.

        From here until :meth:`close` the catalog says that the pool was not stopped cleanly."""
        await self.reserve.helped(self._recover_rows)
        told = await self._note_generation()
        if told:
            # Now that it is there: a copy of the device from before is not to be taken for it.
            # For want of room for it nothing else is to wait: it is a note.
            with contextlib.suppress(NoSpaceError):
                await self.reserve.helped(partial(self.catalog.save, [], lambda: CatalogBatch(meta=dict(told))))
        await self.changelogs.load()
        await self.images.look(after_crash=self.after_crash)
        await self.clones.finish_restores()
        for processor in self.processors:
            if self._lacks_sources(processor):
                # What looks stray may be all that there is of a volume.
                self.events.note("source-lost", logging.ERROR, processor=processor.index)
                continue
            count = await processor.remove_strays()
            if count:
                self.events.note("strays-removed", processor=processor.index, file_count=count)

    def _lacks_sources(self, processor: Processor) -> bool:
        """Whether a processor's store has lost the record of what a copy-on-write volume is written over."""
        traits = self.volumes.traits
        return any(
            traits.get(one).change_mode == COPY_ON_WRITE and one not in processor.sources for one in self.volumes.by_id
        )

    async def _recover_rows(self) -> None:
        # What lies behind the volumes' sizes is cleared later; that it is due must outlive this run.
        marks = CatalogBatch(meta={"clean": 0}, trim_all=self.after_crash)
        await self.catalog.save([], lambda: marks)
        known = {*self.volumes.by_id, *self.volumes.removed, *self.volumes.traits.rows}
        for processor in self.processors:
            await processor.forget_unborn(known)
        await self.reclaimer.drop_unpublished(self._published_instant)
        await self.reclaimer.free_orphans()
        if self.after_crash:
            for processor in self.processors:
                await processor.recover_from_crash()
        self._is_recovered = True

    async def _note_generation(self) -> dict[str, int]:
        """Have each device tell how new the pool's directory must be at least; what those that do were told.

        One that does not answer soon, or has no room, tells what it told before.
        """
        paths = await self.catalog.ask(self.catalog.catalog.device_paths)
        generation = self.catalog.catalog.generation
        # The one inside the pool's directory is copied with that.
        asked = [one for one, path in paths.items() if path and one in self.devices and one not in self._told]
        told: dict[str, int] = {}
        await side_by_side([partial(self._tell_generation_soon, one, generation, told) for one in asked])
        return told

    async def _tell_generation_soon(self, device_id: int, generation: int, told: dict[str, int]) -> None:
        call = partial(self._tell_generation, device_id, generation, told)
        await (within(_NOTE_S, call) if self.devices[device_id].may_hang else call())

    async def _tell_generation(self, device_id: int, generation: int, told: dict[str, int]) -> None:
        device, descriptor = self.devices[device_id], DeviceDescriptor(self.descriptor.pool_id, device_id, generation)
        self._told.add(device_id)
        with contextlib.suppress(OSError, NoMemoryError):
            await in_thread(device.write_file, DEVICE_FILE, descriptor.to_json())
            told[told_key(device_id)] = generation
        self._told.discard(device_id)

    async def run(self) -> None:
        """The pool's tasks; until cancelled."""
        async with trio.open_nursery() as nursery:
            own = (
                self._sync_periodically,
                self.volumes.sync_emptied,
                self.reclaimer.run,
                self.freer.run,
                self.sealer.run,
                self.damage_teller.run,
                self.watch.run,
            )
            of_processors = [task for one in self.processors for task in (one.run, one.writeback.run)]
            for task in (*of_processors, *own):
                nursery.start_soon(kept_up, task, self.note_no_memory)

    def note_no_memory(self) -> None:
        """Tell that a task found no memory, and begins again."""
        self.events.note("out-of-memory", logging.ERROR)

    async def _sync_periodically(self) -> None:
        while True:
            await trio.sleep(SYNC_PERIOD_S)
            try:
                await self.reserve.refill()
                await self.sync()
            except (SnapfsError, OSError) as error:
                self.events.note("sync-failed", logging.ERROR, reason=str(error))

    async def sync(self) -> None:
        """Make everything that was written durable. Raises the first error."""
        await self.reserve.helped(self.volumes.sync_all)

    async def used_percent(self) -> int:
        """How full the fullest device or change log volume is, of those that tell."""
        percents = [quota.percent for quota in self.placement.quotas.values()]
        for room in (await self.watch.rooms()).values():
            if isinstance(room, Room):
                percents.append(100 - 100 * room.space.free_bytes // max(1, room.space.total_bytes))
        return max(percents, default=0)

    async def _trim_images(self) -> None:
        """Images that are written over are left with their volumes' sizes."""
        for volume in self.volumes.to_trim():
            if self.volumes.traits.get(volume.volume_id).source_path:
                with contextlib.suppress(SnapfsError, OSError):
                    await volume.trim()
                    await volume.sync()

    async def _make_all_durable(self) -> None:
        """What each processor still has in memory, too. Raises the first error, when all that can be is done."""
        errors: list[SnapfsError | OSError] = []
        try:
            await self.sync()
        except (SnapfsError, OSError) as error:
            errors.append(error)
        for processor in self.processors:
            try:
                await self.reserve.helped(partial(processor.commit, processor.sound_portions()))
            except (SnapfsError, OSError) as error:
                errors.append(error)
        if errors:
            raise errors[0]

    async def close(self) -> None:
        """Make everything durable and close. What fails is raised, when all else is closed."""
        if self.is_closing:
            raise ClosedError("the pool is closed already")
        self.is_closing = True
        with trio.CancelScope(shield=True):
            try:
                await self._make_all_durable()
                generations = [(one.index, one.access.store.generation) for one in self.processors]
                if self._is_recovered:
                    await self._trim_images()
                    await self.images.note()
                    meta = {**self.volumes.folder.kept(), "clean": 1}
                    last = CatalogBatch(meta=meta, shard_generations=generations)
                    await self.reserve.helped(partial(self.catalog.save, [], lambda: last))
                    await self._note_generation()
            finally:
                # The last that was pushed is closed first, and each is whatever becomes of the others.
                async with contextlib.AsyncExitStack() as stack:
                    for device_id, device in self.devices.items():
                        # What hangs in a thread still has its directory open.
                        if device_id not in self._told:
                            stack.callback(device.close)
                    stack.push_async_callback(self.catalog.close)
                    stack.push_async_callback(side_by_side, [processor.close for processor in self.processors])


def space_in(rooms: Mapping[int, Room | OSError | None]) -> Space:
    """Room on all devices that tell, together; devices on one filesystem count once."""
    seen: dict[object, Space] = {}
    for device_id, room in rooms.items():
        if isinstance(room, Room):
            seen[("device", device_id) if room.filesystem is None else room.filesystem] = room.space
    if not seen:
        return Space(0, 0, 0, 0)
    return Space(*(sum(values) for values in zip(*(_as_tuple(one) for one in seen.values()), strict=True)))


def _as_tuple(space: Space) -> tuple[int, int, int, int]:
    return space.total_bytes, space.free_bytes, space.total_files, space.free_files


@asynccontextmanager
async def running_pool(home: Device, where: str, open_device: OpenDevice, purpose: str = "open") -> AsyncIterator[Pool]:
    """A pool over any devices, open and with its tasks running. ``home`` is closed with it."""
    try:
        pool = await in_thread(Pool.open, home, where, open_device, purpose)
        try:
            await pool.recover()
            failure: Exception | None = None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.run)
                try:
                    yield pool
                except Exception as error:  # noqa: BLE001 - raised again outside, where no group wraps it
                    failure = error
                nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure
        finally:
            await pool.close()
    finally:
        home.close()


@asynccontextmanager
async def open_pool(path: str | os.PathLike[str], purpose: str = "script") -> AsyncIterator[Pool]:
    """The pool in a directory, open and with its tasks running, until the block ends.

    >>> async with snapfs.open_pool("/srv/pool") as pool:
    ...     await pool.snapshots.create(b"before-upgrade")

    Raises NotAPoolError, TooNewError, DamagedError, InUseError or DeviceMissingError.
    """
    where = os.fspath(path)
    home = open_home(where)
    async with running_pool(home, where, device_opener(home), purpose) as pool:
        yield pool
