"""Change log volumes: making, resizing, removing and listing them.

A change log volume is where the change logs of the volumes that name it are kept: a set of devices,
with a capacity. Each processor keeps its part of the logs there.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Mapping, Sequence

import trio

from .backends import Device
from .catalogaccess import CatalogAccess
from .descriptor import claim_device
from .errors import BusyVolumeError, ExistsError, NotFoundError, SnapfsError, UnreadableError
from .events import EventLog
from .formats import DEVICE_FILE, CatalogBatch, ChangeLogVolumeRow, DeviceDescriptor, told_key
from .geometry import BLOCK_SHIFT
from .ownership import OpenDevice, make_private
from .placement import Placement, Quota
from .processor import Processor
from .tasks import Wakeup, in_thread
from .traits import TraitsTable
from .units import check_name, show_name

FULL_PERCENT = 95


_LEFTOVERS = {DEVICE_FILE, f"{DEVICE_FILE}.new"}


class ChangeLogVolumes:
    """The change log volumes of a pool. ``nearly_full`` is set when one that frees the oldest gets full."""

    def __init__(
        self,
        catalog: CatalogAccess,
        placement: Placement,
        devices: dict[int, Device],
        processors: Sequence[Processor],
        traits: TraitsTable,
        open_device: OpenDevice,
        pool_id: str,
        events: EventLog,
        volumes_lock: trio.Lock,
    ) -> None:
        self.nearly_full = Wakeup()
        self._catalog = catalog
        self._placement = placement
        self._devices = devices
        self._processors = processors
        self._traits = traits
        self._open_device = open_device
        self._pool_id = pool_id
        self._events = events
        self._lock = trio.Lock()
        self._volumes_lock = volumes_lock

    async def load(self) -> None:
        """Count what is in use. What recovery freed before is left out of the stores already."""
        for known in self._placement.quotas.values():
            known.used_blocks = 0
        for processor in self._processors:
            counts = await processor.access.ask(processor.access.store.block_counts_by_device)
            for device_id, count in counts.items():
                quota = self._placement.quota_of(device_id)
                if quota is not None:
                    quota.used_blocks += count
        for known in self._placement.quotas.values():
            known.on_level = self._on_level

    def _on_level(self, quota: Quota, percent: int) -> None:
        self._events.note(
            "change-log-full" if percent >= 100 else "change-log-filling",
            logging.WARNING,
            name=quota.name,
            percent=percent,
            used_bytes=quota.used_blocks << BLOCK_SHIFT,
            capacity_bytes=quota.row.capacity_bytes,
        )
        if percent >= FULL_PERCENT and quota.row.frees_oldest:
            self.nearly_full.set()

    def get(self, name: bytes) -> Quota:
        """The change log volume of that name. Raises NotFoundError."""
        for quota in self._placement.quotas.values():
            if quota.row.name == name:
                return quota
        raise NotFoundError(f"there is no change log volume {show_name(name)!r}", "See snapfs changelog list")

    def entries(self) -> list[dict[str, object]]:
        """All of them, for lists and status."""
        return [
            {
                "name": quota.name,
                "capacity_bytes": quota.row.capacity_bytes,
                "used_bytes": quota.used_blocks << BLOCK_SHIFT,
                "percent": quota.percent,
                "frees_oldest": bool(quota.row.frees_oldest),
                "devices": [
                    {"device_id": device_id, "path": self._devices[device_id].local_path("")}
                    for device_id in self._placement.devices_of(changelog_id)
                ],
            }
            for changelog_id, quota in sorted(self._placement.quotas.items())
        ]

    async def create(
        self, name: bytes, paths: Sequence[str], capacity_bytes: int, *, frees_oldest: bool = False
    ) -> None:
        """Make one, on empty directories; it is durable. Raises ExistsError, NotFoundError, BadNameError."""
        check_name(name, "change log volume")
        async with self._lock:
            if any(quota.row.name == name for quota in self._placement.quotas.values()):
                raise ExistsError(f"there is a change log volume {show_name(name)!r} already", "Choose another name")
            known = set((await self._catalog.ask(self._catalog.catalog.device_paths)).values())
            next_device_id, changelog_id = await self._catalog.ask(self._catalog.catalog.next_changelog_ids)
            opened: dict[int, Device] = {}
            with trio.CancelScope(shield=True):
                try:
                    for path in dict.fromkeys(paths):
                        if path in known:
                            raise ExistsError(f"{path} is a device of the pool already", "Give an empty directory")
                        device_id = next_device_id + len(opened)
                        opened[device_id] = await in_thread(self._prepare_device, path, device_id)
                    row = ChangeLogVolumeRow(changelog_id, name, capacity_bytes, int(frees_oldest))
                    rows = [
                        (device_id, path, changelog_id)
                        for device_id, path in zip(opened, dict.fromkeys(paths), strict=True)
                    ]
                    # A device of before may have had the number, and have been told more.
                    meta = {told_key(device_id): 0 for device_id in opened}
                    await self._catalog.save([], lambda: CatalogBatch(changelogs=[row], devices=rows, meta=dict(meta)))
                except BaseException:
                    for device in opened.values():
                        if self._catalog.is_settled:
                            _give_back(device)
                        else:
                            # A power cut may bring it forth, and then it needs its descriptor.
                            device.close()
                    raise
            self._devices.update(opened)
            quota = self._placement.quotas[changelog_id] = Quota(row)
            quota.on_level = self._on_level
            for device_id in opened:
                self._placement.add_device(device_id, changelog_id)
            # The catalog has them: nothing that fails from here on makes them any less the pool's.
            with contextlib.suppress(SnapfsError, OSError, MemoryError):
                await in_thread(self._note_generation, opened)
        self._events.note("change-log-volume-created", name=show_name(name), capacity_bytes=capacity_bytes)

    def _prepare_device(self, path: str, device_id: int) -> Device:
        try:
            if path and os.path.isdir(path) and not set(os.listdir(path)) <= _LEFTOVERS:
                raise ExistsError(f"the device directory {path} is not empty", "Give an empty one")
            device = self._open_device(path)
        except FileNotFoundError:
            raise NotFoundError(f"the device directory {path} is not there", "Make it with mkdir") from None
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise NotFoundError(f"the device directory {path} is not there", "Make it with mkdir") from None
            raise UnreadableError(
                f"{path} cannot be used: {error.strerror}", "Give an empty one of your own"
            ) from error
        try:
            claim_device(device, path)
            if DEVICE_FILE in device.names("") and not self._is_left_over(device, path):
                raise ExistsError(f"{path} is a device of a pool already", "Give an empty directory")
            # Nobody puts anything there from here on.
            make_private(device, path)
            if path and os.path.isdir(path) and not set(os.listdir(path)) <= _LEFTOVERS:
                raise ExistsError(f"the device directory {path} is not empty", "Give an empty one")
            device.write_file(DEVICE_FILE, DeviceDescriptor(self._pool_id, device_id).to_json())
        except BaseException:
            device.close()
            raise
        return device

    def _is_left_over(self, device: Device, path: str) -> bool:
        """Whether a directory was being made a device of this pool when that was cut off: the catalog has none such."""
        try:
            found = DeviceDescriptor.from_json(device.read_file(DEVICE_FILE), path)
        except SnapfsError:
            return False
        return found.pool_id == self._pool_id and found.device_id not in self._devices

    def _note_generation(self, devices: Mapping[int, Device]) -> None:
        """Have new devices tell how new the pool's directory must be that knows them. Blocks."""
        for device_id, device in devices.items():
            descriptor = DeviceDescriptor(self._pool_id, device_id, self._catalog.catalog.generation)
            with contextlib.suppress(OSError):
                device.write_file(DEVICE_FILE, descriptor.to_json())

    async def resize(self, name: bytes, capacity_bytes: int) -> None:
        """Give one another capacity, durably. Less than is in use is allowed: then nothing more goes in."""
        async with self._lock:
            quota = self.get(name)
            row = quota.row._replace(capacity_bytes=capacity_bytes)
            await self._catalog.save([], lambda: CatalogBatch(changelogs=[row]))
            quota.resize(row)
        self._events.note("change-log-volume-resized", name=show_name(name), capacity_bytes=capacity_bytes)

    async def remove(self, name: bytes) -> None:
        """Remove one that no volume names and that is empty, durably. Raises BusyVolumeError."""
        # A volume that is being made may come to name it.
        async with self._lock, self._volumes_lock:
            quota = self.get(name)
            changelog_id = quota.row.changelog_id
            if quota.used_blocks or any(row.changelog_id == changelog_id for row in self._traits.rows.values()):
                raise BusyVolumeError(
                    f"change log volume {show_name(name)!r} is in use",
                    "Remove the volumes and snapshots that have their change logs there",
                )
            device_ids = self._placement.devices_of(changelog_id)
            batch = CatalogBatch(dropped_changelogs=[changelog_id], dropped_devices=device_ids)
            await self._catalog.save([], lambda: batch)
            self._placement.remove_changelog(changelog_id)
            for device_id in device_ids:
                _give_back(self._devices.pop(device_id))
        self._events.note("change-log-volume-removed", name=show_name(name))


def _give_back(device: Device) -> None:
    """A device that is none of the pool's any more."""
    try:
        device.remove(DEVICE_FILE)
    except OSError:
        return
    finally:
        device.close()
