"""Opening a damaged pool to copy out what is whole. Nothing of it is changed.

The databases are read from copies. A shard store that is missing, damaged or an old copy counts as lost, as does a
device that is not there: whatever would be read by their help gives an error, and never zeros. All else reads as
ever. Without the catalog nothing has a name or a size, so that one must be sound, but for what only commands need.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from typing import cast

from .backends import AbsentDevice, Device, ReadOnlyDevice, open_local_image
from .catalog import Catalog
from .database import Database, read_copy
from .descriptor import lock_pool, open_home, read_descriptor
from .errors import DamagedError, DeviceMissingError, NoSpaceError, NotAPoolError, SnapfsError, UnreadableError
from .formats import (
    CATALOG_FILE,
    FORMAT_VERSION,
    POOL_FILE,
    SHARD_FOLDER,
    LogRow,
    PoolDescriptor,
    ScheduleRow,
    VersionRow,
    VolumeRow,
    VolumeTraits,
    shard_file,
)
from .geometry import LogId, VolumeId
from .ownership import OpenDevice, device_opener
from .placement import OpenImage
from .pool import (
    Pool,
    check_catalog_generation,
    check_store_generation,
    open_device_of,
    wrong_generations,
)
from .shardstore import ShardStore
from .tasks import in_thread
from .traits import impossible_descent

_CATALOG_TABLES = (
    "meta", "devices", "shards", "volumes", "versions", "removed", "snapshots", "members", "holds", "traits",
    "changelogs",
)  # fmt: skip
_SHARD_TABLES = ("meta", "maps", "copies", "logs", "portions", "intermediates")


class _Catalog(Catalog):
    """A catalog of which only names, sizes and what reading needs is asked."""

    @cached_property
    def left_out(self) -> dict[VolumeId, str]:
        """Volumes that cannot be read, for it is not known whose clones they are: what they inherit would be zeros."""
        return impossible_descent(super().traits())

    def traits(self) -> list[VolumeTraits]:
        """See :meth:`Catalog.traits`."""
        return [row for row in super().traits() if row.volume_id not in self.left_out]

    def volumes(self) -> list[VolumeRow]:
        """See :meth:`Catalog.volumes`."""
        return [row for row in super().volumes() if row.volume_id not in self.left_out]

    def _versions(self, where: str, bindings: Sequence[int]) -> list[VersionRow]:
        return [row for row in super()._versions(where, bindings) if row.volume_id not in self.left_out]

    def schedules(self) -> list[ScheduleRow]:
        """None: nothing runs."""
        return []

    def hooks(self) -> list[tuple[bytes, bytes]]:
        """None: no snapshot is made."""
        return []


_STORE = re.compile(r"\d+\.sqlite")


class LostStore:
    """Stands for a shard store that is lost. It knows of nothing, and every question about something is an error."""

    is_lost = True
    generation = 0
    catalog_generation = 0
    next_log_id = LogId(1)

    def __init__(self, processor_index: int, failure: SnapfsError) -> None:
        self.processor_index = processor_index
        self.failure = failure

    def epoch_max(self) -> int:
        """Of no row."""
        return 0

    def sources(self) -> dict[VolumeId, LogRow]:
        """None is known; nobody comes to need one, who has to ask for a map first."""
        return {}

    def block_counts(self) -> dict[VolumeId, int]:
        """Counts are for reports, and what is lost counts as nothing there."""
        return {}

    def block_counts_by_device(self) -> dict[int, int]:
        """See :meth:`block_counts`."""
        return {}

    def live_counts_at(self, instant: int) -> dict[VolumeId, int]:
        """See :meth:`block_counts`."""
        return {}

    def close(self) -> None:
        """Nothing is open."""

    def __getattr__(self, question: str) -> Callable[..., object]:
        def fail(*_: object) -> object:
            raise DamagedError(self.failure.reason, self.failure.fix)

        return fail


class _Devices(dict[int, Device]):
    """A pool's devices. One that the catalog does not know any more is not there."""

    def __missing__(self, device_id: int) -> Device:
        return AbsentDevice()


class _Opening:
    """What is open so far, and what was found to be lost."""

    def __init__(self, stack: contextlib.ExitStack, home: Device, open_device: OpenDevice) -> None:
        self._stack = stack
        self._home = home
        self._open_device = open_device
        self.lost: list[str] = []

    def database(self, name: str, what: str, tables: tuple[str, ...], stack: contextlib.ExitStack) -> Database:
        """A copy of a database of which these tables are sound, until ``stack`` is closed.

        Raises DamagedError, UnreadableError, NoSpaceError.
        """
        try:
            return stack.enter_context(read_copy(self._home, name, what, tables))
        except FileNotFoundError:
            raise DamagedError(f"{what} is missing", "Restore the pool from a copy") from None
        except OSError as error:
            raise DamagedError(f"{what} cannot be read: {error.strerror}", "Mend its device") from error

    def pool(self, where: str, purpose: str, open_image: OpenImage) -> Pool:
        """All that can be had. Raises what keeps everything from being had."""
        lock_pool(self._home, where, purpose)
        database = self.database(CATALOG_FILE, "the catalog", _CATALOG_TABLES, self._stack)
        descriptor = self._descriptor(where, database)
        catalog = _Catalog.over(database, descriptor.pool_id)
        for words in catalog.left_out.values():
            self._note_lost(f"the catalog is damaged: {words}, which is left out")
        stores = [self._store(catalog, index, descriptor.pool_id) for index in range(descriptor.processor_count)]
        return Pool(
            self._home,
            dataclasses.replace(descriptor, format_version=FORMAT_VERSION),
            catalog,
            cast("list[ShardStore]", stores),
            self._devices(catalog, descriptor),
            lambda path: ReadOnlyDevice(self._open_device(path)),
            open_image,
        )

    def _descriptor(self, where: str, database: Database) -> PoolDescriptor:
        """The pool's descriptor, where it agrees with the catalog; else what that knows. Raises DamagedError."""
        row = database.row("SELECT value FROM meta WHERE key = 'pool_id'")
        if row is None or not isinstance(row[0], str):
            raise DamagedError("the catalog does not tell which pool it is of", "Restore the pool from a copy")
        catalog = _Catalog.over(database, row[0])
        known = PoolDescriptor(row[0], catalog.processor_count(), 0)
        # What else may lie there (a copy by hand, a file manager's) says nothing of how many there are.
        stored = {one for one in self._home.names(SHARD_FOLDER) if _STORE.fullmatch(one)}
        if more := stored - {os.path.basename(shard_file(index)) for index in range(known.processor_count)}:
            raise DamagedError(
                f"the catalog tells of {known.processor_count} processors, but there is {SHARD_FOLDER}/{min(more)}",
                "Restore the pool from a copy",
            )
        try:
            found = read_descriptor(self._home, where)
        except (NotAPoolError, DamagedError, UnreadableError) as error:
            self._note_lost(error.reason)
            return known
        if (found.pool_id, found.processor_count) != (known.pool_id, known.processor_count):
            self._note_lost(f"{where}/{POOL_FILE} does not agree with the catalog, which is believed")
            return known
        return found

    def _store(self, catalog: Catalog, index: int, pool_id: str) -> ShardStore | LostStore:
        """A shard store, or what stands for a lost one. Raises DamagedError when it tells that the catalog is old."""
        with contextlib.ExitStack() as until_known:
            try:
                name, what = shard_file(index), f"shard store {index}"
                database = self.database(name, what, _SHARD_TABLES, until_known)
                store = ShardStore.over(database, index, pool_id)
                check_store_generation(catalog, store)
                # What a pool asks first: a store that does not answer is lost, and not the pool.
                store.epoch_max(), store.sources(), store.block_counts()
            except NoSpaceError:
                raise
            except SnapfsError as error:
                self._note_lost(f"{error.reason}; what processor {index} keeps cannot be read")
                return LostStore(index, error)
            check_catalog_generation(catalog, store)
            self._stack.push(until_known.pop_all())
        return store

    def _note_lost(self, words: str) -> None:
        self.lost.append(" ".join(words.split()))

    def _note_time(self, catalog: Catalog, device: Device, device_id: int, path: str) -> None:
        """Tell of a device that is not of the catalog's time.

        What was freed there since reads as zeros, and what was written over as what it is now.
        """
        try:
            found = wrong_generations(catalog, device, device_id, path)
        except (SnapfsError, OSError) as error:
            found = [f"it is not known of which time device {path} is ({error})"]
        for words in found:
            self._note_lost(f"{words}; what lies there may read as it was or is at another time")

    def _devices(self, catalog: Catalog, descriptor: PoolDescriptor) -> dict[int, Device]:
        devices = _Devices()
        for device_id, path in catalog.device_paths().items():
            try:
                device = open_device_of(descriptor, device_id, path, self._open_device)
            except (DeviceMissingError, NotAPoolError, DamagedError) as error:
                self._note_lost(f"{error.reason}; what lies there cannot be read")
                device = AbsentDevice()
            else:
                if path:
                    self._note_time(catalog, device, device_id, path)
            devices[device_id] = ReadOnlyDevice(device)
            self._stack.callback(device.close)
        return devices


@asynccontextmanager
async def open_damaged_pool(path: str) -> AsyncIterator[Pool]:
    """The pool in a directory, see :func:`rescued_pool`. Raises NotAPoolError also when it is not there."""
    home = open_home(path, writable=False)
    async with rescued_pool(
        home, path, device_opener(home, writable=False), lambda path, writable: open_local_image(path, False)
    ) as pool:
        yield pool


@asynccontextmanager
async def rescued_pool(
    home: Device, where: str, open_device: OpenDevice, open_image: OpenImage, purpose: str = "rescue"
) -> AsyncIterator[Pool]:
    """A pool to be read only, with none of its tasks running. Its ``lost`` says what cannot be read.

    Raises DamagedError when the catalog is lost, InUseError when somebody has the pool open.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(home.close)
        opening = _Opening(stack, ReadOnlyDevice(home), open_device)
        pool = await in_thread(opening.pool, where, purpose, open_image)
        for processor in pool.processors:
            stack.callback(processor.logs.close)
        pool.lost = opening.lost
        for words in opening.lost:
            pool.events.note("lost", logging.ERROR, what=words)
        await pool.changelogs.load()
        # What is to be noted of them goes to the copy of the catalog.
        await pool.images.look(after_crash=pool.after_crash)
        pool.clones.give_up_restores()
        yield pool
