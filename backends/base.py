"""What every device can do.

All calls block; the caller decides what runs in a thread. All of them raise :class:`OSError`
with the errno of the cause, and nothing else for a failing device. Durability follows POSIX:
contents are durable after :meth:`DeviceFile.sync`, names after :meth:`Device.sync_names`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

Buffer = bytes | bytearray | memoryview
# In place of a user: more than one of them.
ANYBODY = -1


@dataclass(frozen=True, slots=True)
class Space:
    """Room on a device, in bytes, and its file nodes.

    ``total_bytes`` and ``free_bytes`` are what an unprivileged writer could use.
    """

    total_bytes: int
    free_bytes: int
    total_files: int
    free_files: int


class LockHolder(OSError):  # noqa: N818 - it names who holds the lock
    """Somebody else holds a device's lock. ``holder`` is what the holder wrote about itself."""

    def __init__(self, holder: str) -> None:
        super().__init__(errno.EBUSY, os.strerror(errno.EBUSY))
        self.holder = holder


class DeviceFile(ABC):
    """One open file of a device: sparse, byte-addressed."""

    @abstractmethod
    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill ``buffer`` from ``offset``; return the count, which is short only at the end of the file."""

    def try_read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Like :meth:`read_into`, but raise :class:`BlockingIOError` when the device would have to wait.

        A device that cannot tell reads at once.
        """
        return self.read_into(buffer, offset)

    @abstractmethod
    def write(self, data: Buffer, offset: int) -> None:
        """Write all of ``data``; after an error any part of it may have been written."""

    def write_new(self, data: Buffer, offset: int) -> None:
        """Write where nothing was before; a device may lay that out for the overwrites to come."""
        self.write(data, offset)

    def begin_writeback(self) -> None:  # noqa: B027 - one that keeps nothing back has nothing to begin
        """Have the device begin to write what was written to the file, and do not wait for it. Promises nothing.

        An error here takes none from :meth:`sync`, which tells of it as if this had not been called.
        """

    @abstractmethod
    def sync(self) -> None:
        """Make contents and size durable (fdatasync).

        After an error nothing is known of what was written since the last success, and a
        second call proves nothing ("Can Applications Recover from fsync Failures?", USENIX ATC 2020).
        """

    @abstractmethod
    def punch(self, offset: int, length: int) -> None:
        """Free a range; it reads as zeros. The size stays. Durable after :meth:`sync`."""

    @abstractmethod
    def truncate(self, size_bytes: int) -> None:
        """Set the size; what is gained reads as zeros."""

    @abstractmethod
    def size(self) -> int:
        """Bytes up to the end of the file, holes included."""

    @abstractmethod
    def allocated(self) -> int:
        """Bytes that the file takes on the device."""

    @abstractmethod
    def reserve(self, length: int) -> None:
        """Allocate room for the first ``length`` bytes, so that it can be given up later."""

    @abstractmethod
    def data_extents(self) -> list[tuple[int, int]]:
        """Ranges ``(start, end)`` that hold data, in order; all else is a hole. Blocks."""

    def forget_cached(self, offset: int, length: int) -> None:  # noqa: B027 - one without a cache has none to forget
        """Have the next read of a range come from where it is kept, and not from a cache before it."""

    @abstractmethod
    def close(self) -> None:
        """Release the file. Closing twice does nothing."""


class Device(ABC):
    """A store of named sparse files. A name is one or more parts joined by ``/``.

    ``may_hang``: a call may take for ever, and :meth:`probe` finds that out.
    """

    may_hang = False

    def probe(self) -> None:  # noqa: B027 - one that never hangs has nothing to find out
        """Return as soon as the device answers: what takes the page cache alone, and what does not. Blocks.

        Raises OSError, which is an answer.
        """

    @abstractmethod
    def open(self, name: str) -> DeviceFile:
        """Open a file for reading and writing. Raises FileNotFoundError if there is none."""

    @abstractmethod
    def create(self, name: str) -> DeviceFile:
        """Make an empty file, in place of any of that name, and open it. Folders of the name are made."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file. Raises FileNotFoundError if there is none."""

    @abstractmethod
    def rename(self, old: str, new: str) -> None:
        """Give a file another name, atomically in place of what had it."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, without the folder's; empty when there is no such folder."""

    @abstractmethod
    def sync_names(self, folder: str) -> None:
        """Make creations, removals and renames in a folder durable, and the folder itself."""

    @abstractmethod
    def space(self) -> Space:
        """How much room there is."""

    @abstractmethod
    def lock(self, name: str, holder: str) -> None:
        """Take the device's exclusive lock until :meth:`close`, or raise :class:`LockHolder`.

        It is the kernel's, on an inode: a holder that was killed locks nobody out.
        """

    @abstractmethod
    def claim(self) -> None:
        """Be the only user of the device until :meth:`close`, or raise :class:`LockHolder`, which tells nobody's name.

        Nothing is written for that. Where the filesystem has no locks for directories nobody is kept out.
        """

    @abstractmethod
    def local_path(self, name: str) -> str | None:
        """Path of the file in the host's filesystem, where there is such a thing."""

    def foreign_uid(self, names: Iterable[str]) -> int | None:
        """A user, other than root and whoever runs this, whose the device or one of these files is; None for none.

        ANYBODY when others than its user may write to it. Whoever runs this is root or that user.
        """
        return None

    def make_private(self) -> None:
        """Let nobody in but its user. Raises PermissionError when that is not whoever runs this."""
        return

    def has_open(self, name: str) -> bool:
        """Whether this process has that very file open; True also where that cannot be told.

        What opens a file by its path may have been led to another one.
        """
        return True

    @abstractmethod
    def close(self) -> None:
        """Release the device and its lock. Files opened from it stay open."""

    def read_file(self, name: str) -> bytes:
        """Whole contents of a file."""
        file = self.open(name)
        try:
            contents = bytearray(file.size())
            count = file.read_into(contents, 0)
            return bytes(contents[:count])
        finally:
            file.close()

    def write_file(self, name: str, contents: bytes) -> None:
        """Put a file there durably, whole or not at all: written aside, synced, renamed."""
        aside = name + ".new"
        file = self.create(aside)
        try:
            try:
                file.write(contents, 0)
                file.sync()
            finally:
                file.close()
            self.rename(aside, name)
        except OSError:
            with contextlib.suppress(OSError):
                self.remove(aside)
            raise
        self.sync_names(name.rpartition("/")[0])
