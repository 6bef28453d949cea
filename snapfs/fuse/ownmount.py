"""The daemon's own use of its mount, through the helper process; see helper.py for why.

With the write-back cache a write that returned may be in the kernel only. Before a snapshot's cut an
fsync has it hand over its dirty pages, while the daemon goes on serving. Only volumes that are open
for writing can have any. The helper opens them by id, and its fsync is not taken for a wish that data
be durable: the snapshot does that. A helper that was killed is started anew.

The path on which the mount was made may lead elsewhere by now: it was unmounted lazily, or something lies over it, and
its users reach it by files that are open or by another path. So each file is compared with the mount's device number,
and what the helper cannot reach is written back by way of the session, page by page.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial

import trio

from ..errors import BusyVolumeError, NotFoundError, SnapfsError
from ..geometry import VolumeId
from ..units import show_name
from ..volume import Volume
from . import names
from .helperprocess import HelperProcess
from .namespace import Namespace

# So long a volume is written back by way of the session that grows meanwhile, or of which nothing comes.
_WRITE_BACK_S = 60.0
# With progress at each look. After that a device seems to hang.
_WRITE_BACKS = 60
_NAMED_MAX = 5
# So long the kernel may take to forget a file's pages after a rollback.
_FORGET_S = 10.0
_TRIES, _RETRY_S = 200, 0.005
# What keeps everybody from opening a file for writing.
_KEPT_BY = {errno.ETXTBSY: "is a program that runs", errno.EAGAIN: "is open in a program that has a lease on it"}


NoteLost = Callable[[Collection[VolumeId], Exception], None]


def nothing_lost(file_ids: Collection[VolumeId], error: Exception) -> None:
    """Where nobody has a file open there is nobody to be told."""


class FlushError(SnapfsError):
    """The kernel could not write a volume's pages back: there is no snapshot. The pages may be lost.

    With EFBIG a program wrote through the page cache behind the largest size of a volume.
    """


class MountMovedError(SnapfsError):
    """The mount is not where it was made any more, and what was asked for goes through it. Nothing was changed."""

    errno = errno.ESTALE


class _GoneError(Exception):
    """A volume is there no more."""


class OwnMount:
    """Calls on the daemon's own mount. To be started before the mount is made.

    ``note_lost`` hears of volumes whose pages the kernel could not write back: it tells that once, to who asks first.

    ``invalidate`` has the kernel forget the pages and attributes of an inode, what is dirty of them written back first.
    """

    def __init__(self, namespace: Namespace, mount_point: str, invalidate: Callable[[int], Awaitable[None]]) -> None:
        self.note_lost: NoteLost = nothing_lost
        self._invalidate = invalidate
        self._namespace = namespace
        self._mount_point = mount_point
        self._folder = os.path.join(mount_point, os.fsdecode(names.META_NAME), os.fsdecode(names.OWNER_NAME))
        self._device: int | None = None
        self._told_failures: dict[VolumeId, int] = {}
        self._helper = HelperProcess(namespace.note_helper, namespace.begin_help, namespace.help_progress)

    async def start(self) -> None:
        """Start the helper."""
        await self._helper.start()

    async def stop(self) -> None:
        """Let the helper end. No other is started then."""
        await self._helper.stop()

    async def _call(self, call: str, *arguments: object) -> object:
        """One call; OSError as the helper met it."""
        return await self._helper.call(call, lambda: arguments)

    def _path_of(self, volume_id: VolumeId) -> str:
        """Where the helper finds a volume whatever its name is."""
        return os.path.join(self._folder, str(volume_id))

    async def flush(self, volumes: Sequence[Volume]) -> None:
        """Have the kernel write back the pages of those volumes that have a writer. Raises FlushError."""
        wanted = {self._path_of(one.file_id): one for one in volumes if one.file_id in self._namespace.writer_counts}
        if not wanted:
            return
        try:
            is_one_waiting = self._helper.is_one_waiting()
            unopened = list(wanted) if is_one_waiting else await self._call("fsync", self._device, list(wanted))
        except TimeoutError:
            unopened = list(wanted)
        except OSError as error:
            volume = wanted.get(str(error.filename))
            named = list(wanted.values()) if volume is None else [volume]
            self.note_lost({one.file_id for one in named}, error)
            raise _flush_error(named, error.errno or errno.EIO, error.strerror or str(error)) from error
        assert isinstance(unopened, list)
        await self._write_back([wanted[path] for path in unopened])

    async def _write_back(self, volumes: Sequence[Volume]) -> None:
        """Have volumes' pages written back past the helper. Raises FlushError, when all that can be is."""
        failures = []
        for volume in volumes:
            try:
                await self._write_one_back(volume)
            except FlushError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    async def _write_one_back(self, volume: Volume) -> None:
        is_over = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._invalidate_all_of, volume, is_over)
            reason = await self._while_it_goes_on(volume, is_over)
            # What was given up goes on, and is not waited for.
            nursery.cancel_scope.cancel()
        if reason is not None:
            raise _flush_error([volume], errno.ETIMEDOUT, reason)
        # Of a write that the kernel made before nobody may have heard yet.
        told_count = self._told_failures.get(volume.file_id, 0)
        self._told_failures[volume.file_id] = volume.failed_write_count
        if volume.failed_write_count != told_count:
            raise _flush_error([volume], errno.EIO, "a write failed")

    async def _invalidate_all_of(self, volume: Volume, is_over: trio.Event) -> None:
        await self._invalidate(names.of_volume(volume.file_id))
        is_over.set()

    async def _while_it_goes_on(self, volume: Volume, is_over: trio.Event) -> str | None:
        """Wait until a volume is written back; why it was given up, or None."""
        for _ in range(_WRITE_BACKS):
            size_bytes, progress = volume.size_bytes, self._namespace.progress_of(volume)
            with trio.move_on_after(_WRITE_BACK_S):
                await is_over.wait()
                return None
            if volume.size_bytes > size_bytes:
                # There is always one more page of a file that grows.
                return "a program writes to it without a pause"
            if progress is not None and progress == self._namespace.progress_of(volume):
                return "the kernel hands nothing more over"
        return "it takes too long"

    async def resize(self, name: bytes, size_bytes: int) -> None:
        """Set a volume's size through the kernel, which trusts its own idea of it. Raises OSError, MountMovedError."""
        volume = self._namespace.pool.volumes.by_name.get(name)
        if volume is None:
            raise NotFoundError("the volume is gone")
        try:
            await self._call("truncate", self._device, self._path_of(volume.file_id), size_bytes)
        except OSError as error:
            self._check_moved(volume.file_id, error)
            raise

    async def check_refreshable(self, volumes: Sequence[Volume]) -> None:
        """Before a rollback: whether :meth:`refresh` will be possible. Raises MountMovedError, BusyVolumeError."""
        for volume in volumes:
            try:
                await self._call("check_writable", self._device, self._path_of(volume.file_id))
            except OSError as error:
                self._check_moved(volume.file_id, error)
                what = _KEPT_BY.get(error.errno or 0)
                if what is not None:
                    raise BusyVolumeError(
                        f"volume {show_name(volume.name)!r} {what}", "End that, then try again"
                    ) from error
                if self._is_there(volume.file_id):
                    raise

    def _check_moved(self, file_id: VolumeId, error: OSError) -> None:
        """Raises MountMovedError if a volume was not found where the mount was made, though there is one."""
        if self._is_there(file_id) and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
            raise MountMovedError(
                f"{self._mount_point} is not this pool's mount any more",
                "It was unmounted lazily, or something else is mounted over it: undo that, or unmount and mount again",
            ) from error

    async def refresh(self, file_ids: Sequence[VolumeId]) -> dict[VolumeId, str]:
        """After a rollback: the kernel is to keep nothing of what these files were, their sizes included.

        Those for which that failed are given with the reason; all others are done.
        """
        failed = {}
        for file_id in file_ids:
            try:
                with trio.move_on_after(_FORGET_S) as limit:
                    await self._invalidate(names.of_volume(file_id))
                if limit.cancelled_caught:
                    failed[file_id] = "a program writes to it without a pause"
                    continue
                await self._set_as_it_is(file_id)
            except _GoneError:
                continue
            except (OSError, SnapfsError, MemoryError) as error:
                if self._is_there(file_id):
                    failed[file_id] = getattr(error, "strerror", None) or str(error) or "there was no memory"
        return failed

    async def _set_as_it_is(self, file_id: VolumeId) -> None:
        """Tell the kernel a file's size and times, again while what keeps it from that may be over soon.

        With what they are then, each time: whoever gives a lease up may write to the file first.
        """
        for _ in range(_TRIES):
            try:
                await self._helper.call("set_size_and_times", partial(self._as_it_is, file_id))
                return
            except PermissionError:
                await trio.sleep(_RETRY_S)
        await self._helper.call("set_size_and_times", partial(self._as_it_is, file_id))

    def _is_there(self, file_id: VolumeId) -> bool:
        volume = self._namespace.pool.volumes.by_file_id.get(file_id)
        return volume is not None and not volume.is_removed

    def _as_it_is(self, file_id: VolumeId) -> Sequence[object]:
        """For the helper: a file, and the size and the times it has now. Raises _GoneError for one that is gone.

        Now, and not when it was rolled back: it may have been written to since, or its name stand for another volume.
        """
        if not self._is_there(file_id):
            raise _GoneError
        volume = self._namespace.pool.volumes.by_file_id[file_id]
        return self._device, self._path_of(file_id), volume.size_bytes, volume.atime_ns, volume.mtime_ns

    async def cut_events(self, size_bytes: int) -> None:
        """Tell the kernel that the events have become shorter. Raises OSError."""
        await self._call("truncate", self._device, os.path.join(self._folder, "events"), size_bytes)

    async def device_number(self) -> int:
        """The mount's device number; the mount answers when this returns. Raises OSError."""
        found = await self._call("device_of", os.path.join(self._folder, "control"))
        assert isinstance(found, int)
        self._device = found
        return found

    async def is_in_place(self) -> bool:
        """Whether the mount is seen on the path on which it was made, as far as one knows."""
        if self._device is None:
            return True
        try:
            return bool(await self._call("is_seen_on", self._device, self._mount_point))
        except OSError:
            return True

    async def unmount(self) -> None:
        """Unmount; the kernel writes all pages back. Raises OSError: EBUSY while it is used, ESTALE when elsewhere."""
        await self._call("unmount", self._mount_point, False, self._device)

    async def detach(self) -> None:
        """Unmount although files are open, and write back what they hold. Raises OSError or FlushError after that."""
        volumes = self._namespace.pool.volumes.by_file_id
        wanted = {str(one): volumes[one] for one in self._namespace.writer_counts if one in volumes}
        failure = None
        try:
            unopened = await self._call("detach", self._device, self._mount_point, self._folder, list(wanted))
        except OSError as error:
            failure, unopened = error, list(wanted)
        assert isinstance(unopened, list)
        await self._write_back([wanted[file] for file in unopened])
        if failure is not None and failure.errno not in (errno.ESTALE, errno.ETIMEDOUT):
            raise failure


def _flush_error(volumes: Sequence[Volume], code: int, reason: str) -> FlushError:
    named = ", ".join(repr(show_name(volume.name)) for volume in volumes[:_NAMED_MAX])
    failed = FlushError(
        f"the kernel could not write back what was written to volume {named} ({reason})",
        "Mend or truncate that volume, or name others for the snapshot",
    )
    failed.errno = code
    return failed
