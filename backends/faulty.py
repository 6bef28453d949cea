"""Any device with faults: calls that fail as they are told to. Stacks on every device."""

from __future__ import annotations

import os
from collections.abc import Callable

from .base import Buffer, Device, DeviceFile, Space
from .stacked import StackedDevice, StackedFile

Hook = Callable[[str, str], None]


class FailNth:
    """A hook that fails the ``nth`` call of a kind (``write``, ``sync``, …) with an errno, and those after it.

    ``times`` bounds how many fail. ``only`` limits it to files whose name has this in it.
    """

    def __init__(self, kind: str, nth: int, code: int, *, times: int = 1, only: str = "") -> None:
        self.kind = kind
        self.remaining = nth
        self.code = code
        self.times = times
        self.only = only
        self.failed_count = 0

    def __call__(self, kind: str, name: str) -> None:
        """Be asked before a call; raise if it is one that is to fail."""
        if kind != self.kind or self.only not in name or self.failed_count >= self.times:
            return
        self.remaining -= 1
        if self.remaining <= 0:
            self.failed_count += 1
            raise OSError(self.code, os.strerror(self.code), name)


class FaultyDevice(StackedDevice):
    """A device that asks ``hook(kind, name)`` before each call; what the hook raises, the call raises."""

    def __init__(self, inner: Device, hook: Hook | None = None) -> None:
        self.inner = inner
        self.hook = hook

    def ask(self, kind: str, name: str) -> None:
        """Give the hook its say."""
        if self.hook is not None:
            self.hook(kind, name)

    def probe(self) -> None:
        """See :meth:`Device.probe`."""
        self.ask("probe", "")
        self.inner.probe()

    def open(self, name: str) -> DeviceFile:
        """See :meth:`Device.open`."""
        self.ask("open", name)
        return _FaultyFile(self, name, self.inner.open(name))

    def create(self, name: str) -> DeviceFile:
        """See :meth:`Device.create`."""
        self.ask("create", name)
        return _FaultyFile(self, name, self.inner.create(name))

    def remove(self, name: str) -> None:
        """See :meth:`Device.remove`."""
        self.ask("remove", name)
        self.inner.remove(name)

    def rename(self, old: str, new: str) -> None:
        """See :meth:`Device.rename`."""
        self.ask("rename", old)
        self.inner.rename(old, new)

    def space(self) -> Space:
        """See :meth:`Device.space`."""
        self.ask("space", "")
        return self.inner.space()

    def names(self, folder: str) -> list[str]:
        """See :meth:`Device.names`."""
        self.ask("names", folder)
        return self.inner.names(folder)

    def sync_names(self, folder: str) -> None:
        """See :meth:`Device.sync_names`."""
        self.ask("sync_names", folder)
        self.inner.sync_names(folder)


class _FaultyFile(StackedFile):
    """A file of a :class:`FaultyDevice`."""

    def __init__(self, device: FaultyDevice, name: str, inner: DeviceFile) -> None:
        self._device = device
        self._name = name
        self.inner = inner

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        self._device.ask("read", self._name)
        return self.inner.read_into(buffer, offset)

    def try_read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        self._device.ask("try_read", self._name)
        return self.inner.try_read_into(buffer, offset)

    def write(self, data: Buffer, offset: int) -> None:
        self._device.ask("write", self._name)
        self.inner.write(data, offset)

    def write_new(self, data: Buffer, offset: int) -> None:
        self._device.ask("write", self._name)
        self.inner.write_new(data, offset)

    def begin_writeback(self) -> None:
        self._device.ask("begin_writeback", self._name)
        self.inner.begin_writeback()

    def sync(self) -> None:
        self._device.ask("sync", self._name)
        self.inner.sync()

    def punch(self, offset: int, length: int) -> None:
        self._device.ask("punch", self._name)
        self.inner.punch(offset, length)

    def truncate(self, size_bytes: int) -> None:
        self._device.ask("truncate", self._name)
        self.inner.truncate(size_bytes)

    def reserve(self, length: int) -> None:
        self._device.ask("reserve", self._name)
        self.inner.reserve(length)
