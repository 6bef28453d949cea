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
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from ..errors import BusyVolumeError, NotFoundError, SnapfsError
from ..geometry import VolumeId
from ..units import show_name
from ..volume import Volume
from . import helper, names
from .mounttable import mounted_on, real_mount_point
from .namespace import Namespace

_HELPER_FILE = os.path.abspath(helper.__file__)
# A call that waits for so long, and for no request here, waits for whoever holds the file's lock: a program whose write
# waits for the memory it writes from, say.
SILENT_S = 3.0
_NAMED_MAX = 5


class FlushError(SnapfsError):
    """The kernel could not write a volume's pages back: there is no snapshot. The pages may be lost.

    With EFBIG a program wrote through the page cache behind the largest size of a volume.
    """


class MountMovedError(SnapfsError):
    """The mount is not where it was made any more, and what was asked for goes through it. Nothing was changed."""

    errno = errno.ESTALE


class _GoneError(Exception):
    """A volume is there no more."""


class _HelperGoneError(OSError):
    """The helper process has ended; whether it may have begun what it was asked for."""

    def __init__(self, *, was_under_way: bool) -> None:
        super().__init__(errno.EIO, "the helper process is gone")
        self.was_under_way = was_under_way


class OwnMount:
    """Calls on the daemon's own mount, one at a time. To be started, and made, before the mount is.

    ``invalidate`` has the kernel forget the pages and attributes of an inode, what is dirty of them written back first.
    ``request_mark`` is another each time a request was served; None while one is under way for which the kernel may
    hold a file's lock.
    """

    def __init__(
        self,
        namespace: Namespace,
        mount_point: str,
        invalidate: Callable[[int], Awaitable[None]],
        request_mark: Callable[[], int | None],
    ) -> None:
        self._invalidate = invalidate
        self._request_mark = request_mark
        self._namespace = namespace
        self._mount_point = mount_point
        self._real_mount_point = real_mount_point(mount_point)
        self._device = 0
        self._left: list[trio.Process] = []
        self._folder = os.path.join(mount_point, os.fsdecode(names.META_NAME))
        self._turn = trio.Lock()
        self._process: trio.Process | None = None
        self._is_over = False
        self._unread = bytearray()

    async def start(self) -> None:
        """Start the helper."""
        self._process = await trio.lowlevel.open_process(
            [sys.executable, "-I", "-S", _HELPER_FILE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
        )
        self._namespace.helper_pid = self._process.pid

    async def stop(self) -> None:
        """Let the helper end. No other is started then."""
        self._is_over = True
        await self._end_helper()

    async def _end_helper(self) -> None:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()
            await process.stdout.aclose()
            await process.wait()
        self._process = None
        self._namespace.helper_pid = 0
        self._unread.clear()

    async def _call(self, call: str, *arguments: object) -> object:
        """One call; OSError as the helper met it."""
        return await self._call_with(call, lambda: arguments)

    async def _call_with(self, call: str, arguments_now: Callable[[], Sequence[object]]) -> object:
        """One call, with arguments that are worked out when its turn has come."""
        with trio.CancelScope(shield=True):
            async with self._turn:
                request = json.dumps({"call": call, "arguments": arguments_now()}).encode() + b"\n"
                try:
                    line = await self._answer_to(request)
                except _HelperGoneError as gone:
                    # Somebody has killed it, or the kernel, for want of memory.
                    if self._is_over:
                        raise
                    await self._end_helper()
                    await self.start()
                    if call == "fsync" and gone.was_under_way:
                        # An error of the one that has gone is not told again (fsync(2)); others may be made twice.
                        raise
                    line = await self._answer_to(request)
        answer = json.loads(line)
        if "errno" in answer:
            raise OSError(answer["errno"], answer["words"], answer["path"])
        return answer["result"]

    async def _answer_to(self, request: bytes) -> bytes:
        process = self._process
        if process is None:
            raise _HelperGoneError(was_under_way=False)
        assert process.stdin is not None and process.stdout is not None
        try:
            await process.stdin.send_all(request)
        except trio.BrokenResourceError:
            raise _HelperGoneError(was_under_way=False) from None
        while b"\n" not in self._unread:
            part = await self._part_from(process.stdout)
            if not part:
                raise _HelperGoneError(was_under_way=True)
            self._unread += part
        line, _, rest = bytes(self._unread).partition(b"\n")
        self._unread[:] = rest
        return line

    async def _part_from(self, stdout: trio.abc.ReceiveStream) -> bytes:
        """The next bytes of an answer. Raises TimeoutError when none come and no request is what they wait for."""
        while True:
            mark = self._request_mark()
            with trio.move_on_after(SILENT_S):
                return bytes(await stdout.receive_some(65536))
            if mark is not None and mark == self._request_mark():
                await self._leave_helper()
                raise TimeoutError(errno.ETIMEDOUT, f"a program holds the file's lock, for {SILENT_S:.0f} s now")

    async def _leave_helper(self) -> None:
        """Go on with another one: this one cannot even be killed before it has what it waits for."""
        process, self._process = self._process, None
        self._namespace.helper_pid = 0
        self._unread.clear()
        if process is not None and process.stdin is not None and process.stdout is not None:
            process.kill()
            self._left.append(process)
            await process.stdin.aclose()
            await process.stdout.aclose()
        await self.start()

    def _path_of(self, volume_id: VolumeId) -> str:
        """Where the helper finds a volume whatever its name is."""
        return os.path.join(self._folder, str(volume_id))

    async def flush(self, volumes: Sequence[Volume]) -> None:
        """Have the kernel write back the pages of those volumes that have a writer. Raises FlushError."""
        wanted = {self._path_of(one.file_id): one for one in volumes if one.file_id in self._namespace.writer_counts}
        if not wanted:
            return
        try:
            unopened = list(wanted) if self._is_one_waiting() else await self._call("fsync", self._device, list(wanted))
        except TimeoutError:
            unopened = list(wanted)
        except OSError as error:
            volume = wanted.get(str(error.filename))
            named = list(wanted.values()) if volume is None else [volume]
            raise _flush_error(named, error.errno or errno.EIO, error.strerror or str(error)) from error
        assert isinstance(unopened, list)
        for path in unopened:
            await self._write_back(wanted[path])

    def _is_one_waiting(self) -> bool:
        """Whether a helper that was left waits for a file's lock still; another would come to wait there too."""
        self._left = [one for one in self._left if one.poll() is None]
        return bool(self._left)

    async def _write_back(self, volume: Volume) -> None:
        """Have a volume's pages written back past the helper. Raises FlushError."""
        failed_count = volume.failed_write_count
        await self._invalidate(names.of_volume(volume.file_id))
        if volume.failed_write_count != failed_count:
            raise _flush_error([volume], errno.EIO, "a write failed")

    async def resize(self, name: bytes, size_bytes: int) -> None:
        """Set a volume's size through the kernel, which trusts its own idea of it. Raises OSError."""
        volume = self._namespace.pool.volumes.by_name.get(name)
        if volume is None:
            raise NotFoundError("the volume is gone")
        self.check_in_place()
        await self._call("truncate", self._device, self._path_of(volume.file_id), size_bytes)

    async def check_refreshable(self, volumes: Sequence[Volume]) -> None:
        """Before a rollback: whether :meth:`refresh` will be possible. Raises MountMovedError, BusyVolumeError."""
        self.check_in_place()
        for volume in volumes:
            try:
                await self._call("check_writable", self._device, [self._path_of(volume.file_id)])
            except FileNotFoundError:
                # It was removed meanwhile.
                continue
            except OSError as error:
                if error.errno == errno.ETXTBSY:
                    raise BusyVolumeError(
                        f"volume {show_name(volume.name)!r} is a program that runs", "End it, then try again"
                    ) from error
                raise

    async def refresh(self, file_ids: Sequence[VolumeId]) -> dict[VolumeId, str]:
        """After a rollback: the kernel is to keep nothing of what these files were, their sizes included.

        Those for which that failed are given with the reason; all others are done.
        """
        failed = {}
        for file_id in file_ids:
            await self._invalidate(names.of_volume(file_id))
            try:
                await self._call_with("set_size_and_times", partial(self._as_it_is, file_id))
            except _GoneError:
                continue
            except OSError as error:
                if self._is_there(file_id):
                    failed[file_id] = error.strerror or str(error)
        return failed

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
        await self._call("device_of", os.path.join(self._folder, "control"))
        found = await self._call("device_of", self._mount_point)
        assert isinstance(found, int)
        self._device = found
        return found

    @property
    def is_in_place(self) -> bool:
        """Whether the mount is seen on the path on which it was made."""
        found = mounted_on(self._real_mount_point)
        return found is not None and self._device in (0, found.device)

    def check_in_place(self) -> None:
        """Raises MountMovedError if the mount is seen elsewhere, if at all."""
        if not self.is_in_place:
            raise MountMovedError(
                f"{self._mount_point} is not this pool's mount any more",
                "It was unmounted lazily, or something else is mounted over it: undo that, or unmount and mount again",
            )

    async def unmount(self) -> None:
        """Unmount; the kernel writes all pages back. Raises OSError, EBUSY while something is open."""
        await self._call("unmount", self._mount_point, False)

    async def detach(self) -> None:
        """Unmount although files are open, and write back what they hold. Raises OSError, FlushError."""
        volumes = self._namespace.pool.volumes.by_file_id
        wanted = {self._path_of(one): volumes[one] for one in self._namespace.writer_counts if one in volumes}
        unopened: object = list(wanted)
        try:
            if self.is_in_place:
                unopened = await self._call("detach", self._device, self._mount_point, list(wanted))
        finally:
            assert isinstance(unopened, list)
            for path in unopened:
                await self._write_back(wanted[path])


def _flush_error(volumes: Sequence[Volume], code: int, reason: str) -> FlushError:
    named = ", ".join(repr(show_name(volume.name)) for volume in volumes[:_NAMED_MAX])
    failed = FlushError(
        f"the kernel could not write back what was written to volume {named} ({reason})",
        "Mend or truncate that volume, or name others for the snapshot",
    )
    failed.errno = code
    return failed
