"""The daemon's own use of its mount, through the helper process; see helper.py for why.

With the write-back cache a write that returned may be in the kernel only. Before a snapshot's cut an
fsync has it hand over its dirty pages, while the daemon goes on serving. Only volumes that are open
for writing can have any. The helper opens them by id, and its fsync is not taken for a wish that data
be durable: the snapshot does that. A helper that was killed is started anew.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from ..errors import NotFoundError, SnapfsError
from ..geometry import VolumeId
from ..units import show_name
from ..volume import Volume
from . import helper, names
from .namespace import Namespace

_HELPER_FILE = os.path.abspath(helper.__file__)


class FlushError(SnapfsError):
    """The kernel could not write a volume's pages back: there is no snapshot. The pages may be lost.

    With EFBIG a program wrote through the page cache behind the largest size of a volume.
    """


class _HelperGoneError(OSError):
    """The helper process has ended; whether it may have begun what it was asked for."""

    def __init__(self, *, was_under_way: bool) -> None:
        super().__init__(errno.EIO, "the helper process is gone")
        self.was_under_way = was_under_way


class OwnMount:
    """Calls on the daemon's own mount, one at a time. To be started before the mount is made.

    ``invalidate`` has the kernel forget the pages and attributes of an inode.
    """

    def __init__(self, namespace: Namespace, mount_point: str, invalidate: Callable[[int], Awaitable[None]]) -> None:
        self._invalidate = invalidate
        self._namespace = namespace
        self._mount_point = mount_point
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
            part = await process.stdout.receive_some(65536)
            if not part:
                raise _HelperGoneError(was_under_way=True)
            self._unread += part
        line, _, rest = bytes(self._unread).partition(b"\n")
        self._unread[:] = rest
        return line

    def _path_of(self, volume_id: VolumeId) -> str:
        """Where the helper finds a volume whatever its name is."""
        return os.path.join(self._folder, str(volume_id))

    async def flush(self, volumes: Sequence[Volume]) -> None:
        """Have the kernel write back the pages of those volumes that have a writer. Raises FlushError."""
        wanted = {self._path_of(one.file_id): one for one in volumes if one.file_id in self._namespace.writer_counts}
        if not wanted:
            return
        try:
            await self._call("fsync", list(wanted))
        except OSError as error:
            volume = wanted.get(str(error.filename))
            name = show_name(volume.name) if volume is not None else "?"
            failed = FlushError(
                f"the kernel could not write back what was written to volume {name!r} ({error.strerror})",
                "Mend or truncate that volume, or name others for the snapshot",
            )
            failed.errno = error.errno or errno.EIO
            raise failed from error

    async def resize(self, name: bytes, size_bytes: int) -> None:
        """Set a volume's size through the kernel, which trusts its own idea of it. Raises OSError."""
        volume = self._namespace.pool.volumes.by_name.get(name)
        if volume is None:
            raise NotFoundError("the volume is gone")
        await self._call("truncate", self._path_of(volume.file_id), size_bytes)

    async def refresh(self, file_ids: Sequence[VolumeId]) -> None:
        """After a rollback: the kernel is to keep nothing of what these files were, their sizes included."""
        for file_id in file_ids:
            await self._invalidate(names.of_volume(file_id))
            with contextlib.suppress(FileNotFoundError):
                await self._call_with("set_size_and_times", partial(self._as_it_is, file_id))

    def _as_it_is(self, file_id: VolumeId) -> Sequence[object]:
        """For the helper: a file, and the size and the times it has now. Raises FileNotFoundError for one that is gone.

        Now, and not when it was rolled back: it may have been written to since, or its name stand for another volume.
        """
        volume = self._namespace.pool.volumes.by_file_id.get(file_id)
        if volume is None or volume.is_removed:
            raise FileNotFoundError
        return self._path_of(file_id), volume.size_bytes, volume.atime_ns, volume.mtime_ns

    async def cut_events(self, size_bytes: int) -> None:
        """Tell the kernel that the events have become shorter. Raises OSError."""
        await self._call("truncate", os.path.join(self._folder, "events"), size_bytes)

    async def device_number(self) -> int:
        """The mount's device number; the mount answers when this returns. Raises OSError."""
        await self._call("device_of", os.path.join(self._folder, "control"))
        found = await self._call("device_of", self._mount_point)
        assert isinstance(found, int)
        return found

    async def unmount(self) -> None:
        """Unmount; the kernel writes all pages back. Raises OSError, EBUSY while something is open."""
        await self._call("unmount", self._mount_point, False)

    async def detach(self) -> None:
        """Unmount although files are open, and write back what they hold. Raises OSError."""
        await self._call("detach", self._mount_point, [self._path_of(one) for one in self._namespace.writer_counts])
