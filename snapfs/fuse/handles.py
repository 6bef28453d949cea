"""Open files, by kind: each reads and writes in its own way."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod

import trio

from ..errors import ReadOnlyError
from ..events import EventLog
from ..notresident import NotResidentError, OldBlocks
from ..snapshot import SnapshotVolume
from ..volume import Volume, VolumeView
from .control import ControlSession

_NOTHING_FETCHED: OldBlocks = {}


class Handle(ABC):
    """An open file. ``direct`` keeps the kernel's page cache out."""

    direct = True

    def read_now(self, offset: int, buffer: memoryview) -> memoryview | bytes:
        """Read without waiting, or raise NotResidentError or BlockingIOError."""
        raise NotResidentError(_nothing)

    @abstractmethod
    async def read(self, offset: int, length: int) -> bytes | bytearray:
        """Read up to ``length`` bytes."""

    def write_now(self, offset: int, data: bytes) -> int:
        """Write without waiting, or raise NotResidentError with nothing changed; how much was taken."""
        raise NotResidentError(_nothing)

    async def write(self, offset: int, data: bytes) -> int:
        """Write; how much was taken."""
        raise ReadOnlyError("this file cannot be written", "Copy it, and change the copy")

    def note_failed_write(self) -> None:  # noqa: B027 - only what the kernel may write back later is of interest
        """A write has failed."""

    async def fsync(self, *, data_only: bool) -> None:  # noqa: B027 - most kinds have nothing to sync
        """Make what was written durable."""

    def flush(self) -> None:  # noqa: B027 - nor anything to tell
        """A descriptor is being closed; raise what its user must still hear of."""


async def _nothing(old_blocks: OldBlocks) -> None:
    """Text has nothing to fetch."""


class ViewHandle(Handle):
    """A file of blocks, open for reading."""

    direct = False

    def __init__(self, view: VolumeView) -> None:
        self.view = view
        self.read_now = view.read_now  # type: ignore[method-assign] # one call less on the hot path

    async def read(self, offset: int, length: int) -> bytearray:
        """See :meth:`Handle.read`."""
        return await self.view.read(offset, length)


class _Sync:
    """A sync that several wait for, and what became of it."""

    def __init__(self) -> None:
        self.is_over = trio.Event()
        self.is_done = False
        self.failure: Exception | None = None

    async def wait(self) -> None:
        """Until it is over. Raises what it met, or OSError when whoever made it was cancelled."""
        await self.is_over.wait()
        if not self.is_done:
            raise self.failure or OSError(errno.EINTR, os.strerror(errno.EINTR))


class VolumeHandle(ViewHandle):
    """A live volume. ``is_writer``: it can leave dirty pages in the kernel.

    ``is_flusher``: the daemon's own, opened only to have the kernel write its pages back. ``is_synced``: each write is
    to be durable when it is answered (O_DSYNC, O_SYNC); after asynchronous direct ones the kernel asks for no sync.
    ``lost_by`` is what the kernel told the flusher in this one's place, and its user must still hear of.
    """

    def __init__(self, volume: Volume, *, is_writer: bool, is_flusher: bool, is_synced: bool) -> None:
        super().__init__(volume)
        self.volume = volume
        self.told_block_count = volume.block_count
        self.is_writer = is_writer
        self.is_flusher = is_flusher
        self.is_synced = is_synced
        self.lost_by: Exception | None = None
        self._next_sync: _Sync | None = None
        self._sync_turn = trio.Lock()

    def write_now(self, offset: int, data: bytes) -> int:
        """See :meth:`Handle.write_now`."""
        if self.is_synced:
            raise NotResidentError(_nothing)
        self.volume.write_now(offset, data, _NOTHING_FETCHED)
        return len(data)

    async def write(self, offset: int, data: bytes) -> int:
        """See :meth:`Handle.write`."""
        with self.volume.requested():
            await self.volume.write(offset, data)
            if self.is_synced:
                await self._sync_together()
        return len(data)

    def note_failed_write(self) -> None:
        """See :meth:`Handle.note_failed_write`."""
        self.volume.failed_write_count += 1

    async def fsync(self, *, data_only: bool) -> None:
        """See :meth:`Handle.fsync`."""
        if not self.is_flusher:
            # The kernel tells whoever asks for a sync what was lost before.
            self.lost_by = None
            with self.volume.requested():
                await self.volume.sync(data_only=data_only)

    async def _sync_together(self) -> None:
        """Have what was written to the volume by now durable, in one sync with all who come before that begins.

        The kernel's own write-back may come by this file too, in many requests at a time.
        """
        following = self._next_sync
        if following is not None:
            await following.wait()
            return
        mine = self._next_sync = _Sync()
        try:
            async with self._sync_turn:
                # Who comes from here on may have written what this one misses.
                self._next_sync = None
                await self.volume.sync(data_only=True)
            mine.is_done = True
        except Exception as error:
            mine.failure = error
            raise
        finally:
            if self._next_sync is mine:
                self._next_sync = None
            mine.is_over.set()

    def has_new_block_count(self) -> bool:
        """Whether the blocks that ``du`` is told have changed since this was last asked."""
        before, self.told_block_count = self.told_block_count, self.volume.block_count
        return self.is_writer and before != self.told_block_count

    def flush(self) -> None:
        """See :meth:`Handle.flush`."""
        # To each copy of the descriptor that is closed, for one of them may be a child's that does not look.
        if self.lost_by is not None:
            raise self.lost_by
        failure = self.volume.failure
        if failure is not None and self.is_writer:
            raise failure


class SnapshotHandle(ViewHandle):
    """A volume in a snapshot."""

    def __init__(self, view: SnapshotVolume) -> None:
        super().__init__(view)
        self.snapshot_volume = view


class TextHandle(Handle):
    """Text made when the file was opened."""

    def __init__(self, text: bytes) -> None:
        self._text = text

    async def read(self, offset: int, length: int) -> bytes:
        """See :meth:`Handle.read`."""
        return self._text[offset : offset + length]


class EventsHandle(Handle):
    """The events, which grow while the file is open."""

    def __init__(self, events: EventLog) -> None:
        self._events = events

    async def read(self, offset: int, length: int) -> bytes:
        """See :meth:`Handle.read`."""
        return bytes(self._events.contents[offset : offset + length])


class ControlHandle(Handle):
    """The control file: what is written is run, what is read are the answers. Offsets do not count."""

    def __init__(self, session: ControlSession, inode: int) -> None:
        self.inode = inode
        self._session = session

    async def read(self, offset: int, length: int) -> bytes:
        """See :meth:`Handle.read`."""
        return self._session.read(length)

    async def write(self, offset: int, data: bytes) -> int:
        """See :meth:`Handle.write`."""
        return await self._session.write(data)

    def close(self) -> None:
        """Nobody has it open any more."""
        self._session.close()
