"""Where the change logs of each volume lie: with the data, or in a change log volume of its own.

A change log volume is a named set of devices with a capacity. Each processor keeps its part of the
logs on them. The capacity counts blocks that maps and point-in-time copies name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from .backends import DeviceFile
from .errors import DamagedError, DeviceMissingError, NoSpaceError
from .formats import COPY_ON_WRITE, POOL_CHANGE_LOGS, ChangeLogVolumeRow
from .geometry import BLOCK_SHIFT, VolumeId
from .image import ImageFile
from .traits import TraitsTable
from .units import format_size, show_name

WARNING_PERCENTS = (80, 95)

OpenImage = Callable[[str, bool], DeviceFile]
OnLevel = Callable[["Quota", int], None]


def say_nothing(quota: Quota, percent: int) -> None:
    """Nobody listens yet."""


class Quota:
    """How much of a change log volume is used. ``on_level`` hears of each warning level that is reached.

    ``freed_blocks`` are all that were ever given back.
    """

    def __init__(self, row: ChangeLogVolumeRow) -> None:
        self.row = row
        self.used_blocks = 0
        self.freed_blocks = 0
        self.on_level: OnLevel = say_nothing
        self._warned = 0

    @property
    def name(self) -> str:
        """Its name, for people."""
        return show_name(self.row.name)

    @property
    def percent(self) -> int:
        """How full it is."""
        return (self.used_blocks << BLOCK_SHIFT) * 100 // max(1, self.row.capacity_bytes)

    def check(self, block_count: int) -> None:
        """Raises NoSpaceError when so many more blocks have no room.

        None always have some, also where more is in use: it may have been made smaller.
        """
        if block_count and (self.used_blocks + block_count) << BLOCK_SHIFT > self.row.capacity_bytes:
            self._tell(100)
            raise NoSpaceError(
                f"change log volume {self.name!r} is full: {format_size(self.row.capacity_bytes)}",
                "Delete snapshots, or make it larger with snapfs changelog resize",
            )

    def add(self, block_count: int) -> None:
        """Count blocks in, or out when negative."""
        self.used_blocks += block_count
        # Whatever else there is no memory for: it is counted.
        with contextlib.suppress(MemoryError):
            if block_count < 0:
                self.freed_blocks -= block_count
            self._warn()

    def _warn(self) -> None:
        percent = self.percent
        if percent >= WARNING_PERCENTS[0] or self._warned:
            for level in WARNING_PERCENTS:
                if percent >= level:
                    self._tell(level)
            # Each is told again once it has been left.
            self._warned = min(self._warned, percent)

    def resize(self, row: ChangeLogVolumeRow) -> None:
        """It has another capacity now."""
        self.row = row
        self._warned = 0
        self.add(0)

    def _tell(self, level: int) -> None:
        if level > self._warned:
            self._warned = level
            self.on_level(self, level)


class Placement:
    """Where logs lie. ``changelog_ids`` tells of each device of which change log volume it is."""

    def __init__(
        self,
        changelog_ids: Mapping[int, int],
        changelogs: list[ChangeLogVolumeRow],
        traits: TraitsTable,
        open_image: OpenImage,
        processor_count: int,
    ) -> None:
        self.quotas = {row.changelog_id: Quota(row) for row in changelogs}
        self._device_ids: dict[int, list[int]] = {}
        self._changelog_ids: dict[int, int] = {}
        for device_id in sorted(changelog_ids):
            self.add_device(device_id, changelog_ids[device_id])
        self._traits = traits
        self._open_image = open_image
        self._processor_count = processor_count

    def add_device(self, device_id: int, changelog_id: int) -> None:
        """A device of a change log volume, or of the volumes' data."""
        self._changelog_ids[device_id] = changelog_id
        self._device_ids.setdefault(changelog_id, []).append(device_id)

    def remove_changelog(self, changelog_id: int) -> list[int]:
        """Forget a change log volume; its devices."""
        self.quotas.pop(changelog_id, None)
        devices = self._device_ids.pop(changelog_id, [])
        for device_id in devices:
            del self._changelog_ids[device_id]
        return devices

    def devices_of(self, changelog_id: int) -> list[int]:
        """The devices of a change log volume."""
        return list(self._device_ids.get(changelog_id, ()))

    def device_for(self, volume_id: VolumeId, processor_index: int, *, is_change: bool) -> int:
        """The device for a new log.

        ``is_change``: it logs changes since a snapshot, so it goes to the change log volume. Raises DamagedError when
        no device is known of that.
        """
        changelog_id = self._traits.get(volume_id).changelog_id if is_change else POOL_CHANGE_LOGS
        device_ids = self._device_ids.get(changelog_id)
        if not device_ids:
            raise DamagedError(
                f"the catalog has no device for what is written to volume {volume_id}", "Unmount and run snapfs check"
            )
        return device_ids[(volume_id + processor_index) % len(device_ids)]

    def quota_of(self, device_id: int) -> Quota | None:
        """What counts the blocks on a device; None on those of the volumes' data."""
        return self.quotas.get(self._changelog_ids.get(device_id, POOL_CHANGE_LOGS))

    def open_image(self, volume_id: VolumeId, processor_index: int) -> DeviceFile:
        """The image that a volume stands on. Raises DeviceMissingError when it is not there."""
        traits = self._traits.get(volume_id)
        try:
            image = self._open_image(traits.source_path, traits.change_mode == COPY_ON_WRITE)
        except OSError as error:
            raise DeviceMissingError(
                f"the image {traits.source_path} cannot be opened: {error.strerror}",
                "Put it back where it was, then open the volume again",
            ) from error
        wanted = traits.source_size_bytes
        if traits.change_mode != COPY_ON_WRITE and image.size() < wanted:
            size_bytes = image.size()
            image.close()
            raise DeviceMissingError(
                f"the image {traits.source_path} has {size_bytes} bytes, it had {wanted}",
                "Attach it again as it was, then open the volume again",
            )
        return ImageFile(image, processor_index, self._processor_count)
