"""A device upon another one that changes nothing of it, and one that is not there."""

from __future__ import annotations

import errno
import os
from typing import NoReturn

from .base import Buffer, Device, DeviceFile, Space
from .stacked import StackedDevice, StackedFile


def _refuse(code: int) -> NoReturn:
    raise OSError(code, os.strerror(code))


class ReadOnlyFile(StackedFile):
    """A file of which everything that would change it raises OSError with EROFS."""

    __slots__ = ("inner",)

    def __init__(self, inner: DeviceFile) -> None:
        self.inner = inner

    def try_read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """See :meth:`DeviceFile.try_read_into`."""
        return self.inner.try_read_into(buffer, offset)

    def write(self, data: Buffer, offset: int) -> None:
        """Refused."""
        _refuse(errno.EROFS)

    def sync(self) -> None:
        """Refused: something would have been written."""
        _refuse(errno.EROFS)

    def punch(self, offset: int, length: int) -> None:
        """Refused."""
        _refuse(errno.EROFS)

    def truncate(self, size_bytes: int) -> None:
        """Refused."""
        _refuse(errno.EROFS)

    def reserve(self, length: int) -> None:
        """Refused."""
        _refuse(errno.EROFS)


class ReadOnlyDevice(StackedDevice):
    """A device of which everything that would change it raises OSError with EROFS. Its lock is the other's."""

    # To see whether it answers it would be written to.
    may_hang = False

    def __init__(self, inner: Device) -> None:
        self.inner = inner

    def open(self, name: str) -> ReadOnlyFile:
        """See :meth:`Device.open`."""
        return ReadOnlyFile(self.inner.open(name))

    def create(self, name: str) -> DeviceFile:
        """Refused."""
        _refuse(errno.EROFS)

    def remove(self, name: str) -> None:
        """Refused."""
        _refuse(errno.EROFS)

    def rename(self, old: str, new: str) -> None:
        """Refused."""
        _refuse(errno.EROFS)

    def sync_names(self, folder: str) -> None:
        """Refused: something would have been changed."""
        _refuse(errno.EROFS)


class AbsentDevice(Device):
    """What stands for a device that is not there: everything but :meth:`close` raises OSError with ENODEV."""

    def open(self, name: str) -> DeviceFile:
        """Not there."""
        _refuse(errno.ENODEV)

    def create(self, name: str) -> DeviceFile:
        """Not there."""
        _refuse(errno.ENODEV)

    def remove(self, name: str) -> None:
        """Not there."""
        _refuse(errno.ENODEV)

    def rename(self, old: str, new: str) -> None:
        """Not there."""
        _refuse(errno.ENODEV)

    def names(self, folder: str) -> list[str]:
        """Not there."""
        _refuse(errno.ENODEV)

    def sync_names(self, folder: str) -> None:
        """Not there."""
        _refuse(errno.ENODEV)

    def space(self) -> Space:
        """Not there."""
        _refuse(errno.ENODEV)

    def lock(self, name: str, holder: str) -> None:
        """Not there."""
        _refuse(errno.ENODEV)

    def claim(self) -> None:
        """Not there."""
        _refuse(errno.ENODEV)

    def local_path(self, name: str) -> str | None:
        """None."""
        return None

    def close(self) -> None:
        """Nothing is open."""
