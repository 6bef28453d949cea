"""Making volumes that are not plain: copy-on-write, over an image, with a change log volume of their own."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from .backends import DeviceFile
from .errors import BadCommandError, InUseError, NotFoundError, SnapfsError, TooLargeError, UnreadableError
from .events import EventLog
from .formats import (
    CHANGE_MODES,
    COPY_ON_WRITE,
    IMAGE_LOG,
    POOL_CHANGE_LOGS,
    REDIRECT,
    SOURCE_LOG,
    Attributes,
    ShardBatch,
    VolumeTraits,
)
from .geometry import BLOCKS_PER_OBJECT, OBJECT_SIZE, Epoch, VolumeId, blocks_of, object_count
from .placement import OpenImage, Placement
from .processor import Processor
from .reclaimer import Reclaimer
from .tasks import in_thread
from .units import check_path, show_name
from .volume import Volume
from .volumes import VolumeTable

IsOwnPath = Callable[[str], bool]


def nothing_is_own(path: str) -> bool:
    """Without a mount no path is the pool's own."""
    return False


@dataclass(frozen=True, slots=True)
class VolumeWish:
    """What a volume is to be. ``size_bytes`` None: as large as its source, or empty."""

    name: bytes
    size_bytes: int | None = None
    change_mode: int = REDIRECT
    source_path: str = ""
    changelog_name: bytes = b""
    mode: int = 0o600
    uid: int = 0
    gid: int = 0


class VolumeMaker:
    """Makes volumes. ``is_own_path`` tells which files are the mount's or the pool's own, and so no image."""

    def __init__(
        self,
        volumes: VolumeTable,
        processors: Sequence[Processor],
        placement: Placement,
        open_image: OpenImage,
        reclaimer: Reclaimer,
        events: EventLog,
    ) -> None:
        self.is_own_path: IsOwnPath = nothing_is_own
        self._identities: dict[str, tuple[int, ...] | None] = {}
        self._volumes = volumes
        self._processors = processors
        self._placement = placement
        self._open_image = open_image
        self._reclaimer = reclaimer
        self._events = events

    async def create(self, wish: VolumeWish) -> Volume:
        """Make a volume as wished; it is durable.

        A source is adopted where it lies, at once. Raises ExistsError, NotFoundError, BadNameError,
        BadCommandError, InUseError for a source that another volume has, NoSpaceError.
        """
        changelog_id = self._changelog_id(wish.changelog_name)
        with trio.CancelScope(shield=True):
            source = await self._look_at_source(wish) if wish.source_path else None
            size_bytes = wish.size_bytes if source is None or wish.size_bytes is not None else source.source_size_bytes
            now = time.time_ns()
            attributes = Attributes(
                wish.name, size_bytes or 0, stat.S_IMODE(wish.mode), wish.uid, wish.gid, now, now, now
            )
            is_plain = source is None and wish.change_mode == REDIRECT and changelog_id == POOL_CHANGE_LOGS
            made: list[VolumeId] = []

            def traits_of(volume_id: VolumeId) -> VolumeTraits | None:
                if is_plain:
                    return None
                # Again, with others kept out: they may have changed something since it was looked at.
                self._check_unused(source, wish)
                if self._changelog_id(wish.changelog_name) != changelog_id:
                    raise NotFoundError(
                        f"change log volume {show_name(wish.changelog_name)!r} was removed meanwhile", "Try again"
                    )
                base = source if source is not None else VolumeTraits(volume_id, volume_id)
                return base._replace(
                    volume_id=volume_id,
                    file_id=volume_id,
                    change_mode=wish.change_mode,
                    changelog_id=changelog_id,
                )

            async def prepare(volume_id: VolumeId) -> None:
                made.append(volume_id)
                await self._prepare(volume_id, wish, source)

            needs_source = source is not None or wish.change_mode == COPY_ON_WRITE
            try:
                volume = await self._volumes.create_as(attributes, traits_of, prepare if needs_source else None)
            except BaseException:
                # While a power cut may still bring it forth, it needs them.
                if self._volumes.catalog.is_settled:
                    for volume_id in made:
                        for processor in self._processors:
                            await processor.drop_source(volume_id)
                raise
            if source is not None and size_bytes != source.source_size_bytes:
                try:
                    await self._volumes.fit(volume)
                except BaseException as error:
                    # Not another, to which the name was given meanwhile.
                    if self._volumes.by_name.get(volume.name) is volume:
                        await self._volumes.remove(volume.name)
                    if isinstance(error, OSError) and error.errno == errno.EFBIG:
                        raise TooLargeError(
                            f"{wish.source_path} cannot be {size_bytes} bytes long", "Give a smaller size"
                        ) from error
                    raise
        self._events.note(
            "volume-created",
            name=show_name(wish.name),
            mode=next(word for word, mode in CHANGE_MODES.items() if mode == wish.change_mode),
            source=wish.source_path or None,
        )
        return volume

    def _changelog_id(self, name: bytes) -> int:
        if not name:
            return POOL_CHANGE_LOGS
        for changelog_id, quota in self._placement.quotas.items():
            if quota.row.name == name:
                return changelog_id
        raise NotFoundError(
            f"there is no change log volume {show_name(name)!r}", "Make one with snapfs changelog create"
        )

    async def _look_at_source(self, wish: VolumeWish) -> VolumeTraits:
        """The source as it is. Raises what keeps it from being one."""
        path = wish.source_path
        if not path.startswith("/"):
            raise BadCommandError(f"the source {path} is not an absolute path", "Write it from / on")
        check_path(path)
        # In a thread: to look at the mount is to ask the loop that this runs in.
        if await in_thread(self.is_own_path, path):
            raise BadCommandError(
                f"{path} lies in the pool or its mount, or on a loop device over that",
                "Take an image that lies outside",
            )

        def look() -> tuple[str, int, int]:
            real = os.path.realpath(path)
            file: DeviceFile = self._open_image(real, wish.change_mode == COPY_ON_WRITE)
            try:
                for one in {real, *known}:
                    self._identities[one] = _identity(one)
                return real, file.size(), source_mtime_ns(real)
            finally:
                file.close()

        known = {row.source_path for row in self._volumes.traits.rows.values() if row.source_path}
        try:
            real, size_bytes, mtime_ns = await in_thread(look)
        except FileNotFoundError:
            raise NotFoundError(f"there is no image {path}", "Give the path of a raw image or a block device") from None
        except OSError as error:
            raise UnreadableError(f"{path} cannot be opened: {error.strerror}", "Give a raw image") from error
        none = VolumeId(0)
        found = VolumeTraits(none, none, source_path=real, source_size_bytes=size_bytes, source_mtime_ns=mtime_ns)
        if self._is_of_removed_alone(found, wish):
            # What was just removed may be gone for good; if not, or not now, the user is told whose image it is.
            with contextlib.suppress(SnapfsError, OSError):
                await self._reclaimer.reclaim_all()
        self._check_unused(found, wish)
        if wish.change_mode == COPY_ON_WRITE and wish.size_bytes is not None and wish.size_bytes < size_bytes:
            raise BadCommandError(
                f"{path} has {size_bytes} bytes, and would be cut to {wish.size_bytes}: what is behind would be lost",
                "Leave the size out, and truncate the volume later",
            )
        return found

    def _users_of(self, source: VolumeTraits | None, wish: VolumeWish) -> list[VolumeTraits]:
        """Volumes, removed ones among them, that keep a new one from an image; none if all of them only read it."""
        path = "" if source is None else source.source_path
        known = [row for row in self._volumes.traits.rows.values() if path and self._is_same(row.source_path, path)]
        return known if any(not row.change_mode == REDIRECT == wish.change_mode for row in known) else []

    def _is_of_removed_alone(self, source: VolumeTraits | None, wish: VolumeWish) -> bool:
        users = self._users_of(source, wish)
        return bool(users) and all(row.volume_id not in self._volumes.by_id for row in users)

    def _check_unused(self, source: VolumeTraits | None, wish: VolumeWish) -> None:
        """Raises InUseError for an image of another volume, unless all of its volumes only read it."""
        if self._is_of_removed_alone(source, wish):
            raise InUseError(
                f"{wish.source_path} is the source of a volume that was removed, of which snapshots or clones are left",
                "Delete those snapshots, and make the clones independent with snapfs flatten",
            )
        if self._users_of(source, wish):
            raise InUseError(
                f"{wish.source_path} is the source of another volume", "An image can be written by one only"
            )

    def _is_same(self, one: str, other: str) -> bool:
        """Whether two paths are of one image, as of when the last of them was looked at: a link is another path."""
        identity = self._identities.get(one)
        return one == other or (identity is not None and identity == self._identities.get(other))

    async def _prepare(self, volume_id: VolumeId, wish: VolumeWish, source: VolumeTraits | None) -> None:
        epoch = Epoch(self._volumes.epoch)
        kind = SOURCE_LOG if source is None else IMAGE_LOG
        for processor in self._processors:
            await processor.add_source(volume_id, epoch, kind)
            if source is not None and wish.change_mode == REDIRECT:
                count = _blocks_on(processor.index, len(self._processors), source.source_size_bytes)
                await processor.commit([], ShardBatch(portions=[(volume_id, count)]))
                processor.tally.add(volume_id, count)


def _identity(path: str) -> tuple[int, ...] | None:
    """What a file is by whatever path: its device and inode, or the block device that it stands for."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_rdev,) if stat.S_ISBLK(found.st_mode) else (found.st_dev, found.st_ino)


def source_mtime_ns(path: str) -> int:
    """When an image last changed; 0 for one that is not on the host's filesystem, and for block devices."""
    try:
        found = os.stat(path)
    except OSError:
        return 0
    return found.st_mtime_ns if stat.S_ISREG(found.st_mode) else 0


def _blocks_on(processor_index: int, processor_count: int, size_bytes: int) -> int:
    """Blocks of an image that belong to one processor."""
    whole, rest = divmod(size_bytes, OBJECT_SIZE)
    objects = len(range(processor_index, whole, processor_count))
    last = blocks_of(rest) if object_count(size_bytes) > whole and whole % processor_count == processor_index else 0
    return objects * BLOCKS_PER_OBJECT + last
