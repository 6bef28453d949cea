"""An image outside of the pool, as one processor sees it: laid out like a change log's file.

The image itself is plain: byte ``x`` of the volume is byte ``x`` of the image. Behind its end it
reads as zeros.
"""

from __future__ import annotations

from .backends import Buffer, DeviceFile
from .geometry import OBJECT_MASK, OBJECT_SHIFT, OBJECT_SIZE


class ImageFile(DeviceFile):
    """The objects of an image that belong to one processor. No call reaches over an object's end."""

    def __init__(self, image: DeviceFile, processor_index: int, processor_count: int) -> None:
        self._image = image
        self._index = processor_index
        self._count = processor_count

    def _place(self, offset: int) -> int:
        object_index = (offset >> OBJECT_SHIFT) * self._count + self._index
        return (object_index << OBJECT_SHIFT) + (offset & OBJECT_MASK)

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """See :meth:`DeviceFile.read_into`; the count is never short."""
        count = self._image.read_into(buffer, self._place(offset))
        if count < len(buffer):
            memoryview(buffer)[count:] = bytes(len(buffer) - count)
        return len(buffer)

    def try_read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """See :meth:`DeviceFile.try_read_into`."""
        count = self._image.try_read_into(buffer, self._place(offset))
        if count < len(buffer):
            memoryview(buffer)[count:] = bytes(len(buffer) - count)
        return len(buffer)

    def write(self, data: Buffer, offset: int) -> None:
        """See :meth:`DeviceFile.write`."""
        self._image.write(data, self._place(offset))

    def sync(self) -> None:
        """See :meth:`DeviceFile.sync`."""
        self._image.sync()

    def punch(self, offset: int, length: int) -> None:
        """See :meth:`DeviceFile.punch`."""
        place = self._place(offset)
        length = min(length, self._image.size() - place)
        if length > 0:
            self._image.punch(place, length)

    def truncate(self, size_bytes: int) -> None:
        """Set the size of the whole image."""
        self._image.truncate(size_bytes)

    def size(self) -> int:
        """The size of the whole image."""
        return self._image.size()

    def allocated(self) -> int:
        """This processor's share of what the image takes."""
        return self._image.allocated() // self._count

    def reserve(self, length: int) -> None:
        """An image is as large as it is."""

    def data_extents(self) -> list[tuple[int, int]]:
        """Ranges of this processor's objects that hold data, in the layout of a change log."""
        extents: list[tuple[int, int]] = []
        for start, end in self._image.data_extents():
            position = start
            while position < end:
                object_index = position >> OBJECT_SHIFT
                stop = min(end, (object_index + 1) << OBJECT_SHIFT)
                if object_index % self._count == self._index:
                    base = (object_index // self._count) * OBJECT_SIZE
                    extents.append((base + (position & OBJECT_MASK), base + ((stop - 1) & OBJECT_MASK) + 1))
                position = stop
        return extents

    def close(self) -> None:
        """See :meth:`DeviceFile.close`."""
        self._image.close()
