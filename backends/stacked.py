"""A device upon another one: what a test's device does not change goes through."""

from __future__ import annotations

from collections.abc import Iterable

from .base import Device, DeviceFile, Space


class StackedDevice(Device):
    """All of :class:`Device` that does not touch contents, passed on to ``inner``."""

    inner: Device

    @property
    def may_hang(self) -> bool:  # type: ignore[override]
        """See :class:`Device`."""
        return self.inner.may_hang

    def probe(self) -> None:
        """See :meth:`Device.probe`."""
        self.inner.probe()

    def names(self, folder: str) -> list[str]:
        """See :meth:`Device.names`."""
        return self.inner.names(folder)

    def space(self) -> Space:
        """See :meth:`Device.space`."""
        return self.inner.space()

    def lock(self, name: str, holder: str) -> None:
        """See :meth:`Device.lock`."""
        self.inner.lock(name, holder)

    def claim(self) -> None:
        """See :meth:`Device.claim`."""
        self.inner.claim()

    def foreign_uid(self, names: Iterable[str]) -> int | None:
        """See :meth:`Device.foreign_uid`."""
        return self.inner.foreign_uid(names)

    def local_path(self, name: str) -> str | None:
        """See :meth:`Device.local_path`; none, so that nothing goes round this device."""
        return None

    def close(self) -> None:
        """See :meth:`Device.close`."""
        self.inner.close()


class StackedFile(DeviceFile):
    """All of :class:`DeviceFile` that changes nothing of what is read, passed on to ``inner``."""

    inner: DeviceFile

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """See :meth:`DeviceFile.read_into`."""
        return self.inner.read_into(buffer, offset)

    def begin_writeback(self) -> None:
        """See :meth:`DeviceFile.begin_writeback`."""
        self.inner.begin_writeback()

    def size(self) -> int:
        """See :meth:`DeviceFile.size`."""
        return self.inner.size()

    def allocated(self) -> int:
        """See :meth:`DeviceFile.allocated`."""
        return self.inner.allocated()

    def data_extents(self) -> list[tuple[int, int]]:
        """See :meth:`DeviceFile.data_extents`."""
        return self.inner.data_extents()

    def close(self) -> None:
        """See :meth:`DeviceFile.close`."""
        self.inner.close()
