"""The file of a change log that takes no more writes and has its checksums: what is read of it is proven.

Also what the page cache gives is, so that a page that went bad there, or was written to by others, is
found too. It costs 0.3 µs for 4 KiB and 40 µs for 1 MiB.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

from .backends import Buffer, DeviceFile
from .checksums import ObjectSums
from .errors import DamagedError
from .geometry import BLOCK_SHIFT, BLOCK_SIZE, OBJECT_MASK, OBJECT_SHIFT
from .notresident import NotResidentError, OldBlocks

CACHED_BYTES_MAX = 32 << 20
_BLOCK_MASK = BLOCK_SIZE - 1


class DamagedBlockError(DamagedError):
    """A block is not what was sealed. It is never given to a reader."""

    def __init__(self, log_id: int, object_index: int, block: int) -> None:
        offset = (object_index << OBJECT_SHIFT) + (block << BLOCK_SHIFT)
        super().__init__(
            f"the block at offset {offset} is not what was written there (change log {log_id})",
            "status.json names the volumes and snapshots that have it; write it again, or restore it from a copy",
        )
        self.log_id = log_id
        self.object_index = object_index
        self.block = block


class SumCache:
    """Checksums in memory of one processor's sealed logs, those loaded first going first.

    ``on_damage`` is called with log, object and block of what was read and is not what was sealed.
    """

    def __init__(
        self,
        load: Callable[[int, int], Awaitable[ObjectSums]],
        on_damage: Callable[[int, int, int], None],
        bytes_max: int = CACHED_BYTES_MAX,
    ) -> None:
        self.known: OrderedDict[tuple[int, int], ObjectSums] = OrderedDict()
        self.on_damage = on_damage
        self._load = load
        self._bytes_max = bytes_max
        self._size_bytes = 0

    async def fetch(self, log_id: int, object_index: int, old_blocks: OldBlocks) -> None:
        """Bring the checksums of an object in a log into memory."""
        sums = await self._load(log_id, object_index)
        if (log_id, object_index) in self.known:
            return
        self.known[(log_id, object_index)] = sums
        self._size_bytes += sums.size_bytes
        while self._size_bytes > self._bytes_max and len(self.known) > 1:
            _, gone = self.known.popitem(last=False)
            self._size_bytes -= gone.size_bytes

    def report(self, damage: DamagedBlockError) -> None:
        """Tell whoever keeps track."""
        self.on_damage(damage.log_id, damage.object_index, damage.block)


class SealedFile(DeviceFile):
    """A log's file whose reads are held against its checksums.

    Reads raise DamagedBlockError, and NotResidentError while the checksums are not in memory. A range
    that is being punched meanwhile reads as damaged: a reader that waits looks again at what its map says.
    """

    __slots__ = ("_cache", "_file", "_log_id", "_processor_count", "_processor_index")

    def __init__(
        self, file: DeviceFile, log_id: int, cache: SumCache, processor_index: int, processor_count: int
    ) -> None:
        self._file = file
        self._log_id = log_id
        self._cache = cache
        self._processor_index = processor_index
        self._processor_count = processor_count

    def try_read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """See :meth:`DeviceFile.try_read_into`. A range lies in one object."""
        try:
            return self._read(buffer, offset, self._file.try_read_into)
        except DamagedBlockError as damage:
            self._cache.report(damage)
            raise

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """See :meth:`DeviceFile.read_into`. A range lies in one object."""
        return self._read(buffer, offset, self._file.read_into)

    def _read(
        self, buffer: bytearray | memoryview, offset: int, read: Callable[[bytearray | memoryview, int], int]
    ) -> int:
        object_index = (offset >> OBJECT_SHIFT) * self._processor_count + self._processor_index
        sums = self._cache.known.get((self._log_id, object_index))
        if sums is None:
            raise NotResidentError(partial(self._cache.fetch, self._log_id, object_index))
        length = len(buffer)
        inside = offset & OBJECT_MASK
        if (inside | length) & _BLOCK_MASK:
            return self._read_unaligned(sums, buffer, offset, read)
        count = read(buffer, offset)
        view = buffer if isinstance(buffer, memoryview) else memoryview(buffer)
        if count == length and not sums.matches(inside >> BLOCK_SHIFT, view):
            self._fail(sums, object_index, inside >> BLOCK_SHIFT, view)
        return count

    def _read_unaligned(
        self,
        sums: ObjectSums,
        buffer: bytearray | memoryview,
        offset: int,
        read: Callable[[bytearray | memoryview, int], int],
    ) -> int:
        start = offset & ~_BLOCK_MASK
        whole = memoryview(bytearray(-(-(offset + len(buffer)) // BLOCK_SIZE) * BLOCK_SIZE - start))
        count = read(whole, start)
        object_index = (offset >> OBJECT_SHIFT) * self._processor_count + self._processor_index
        first = (start & OBJECT_MASK) >> BLOCK_SHIFT
        if count == len(whole) and not sums.matches(first, whole):
            self._fail(sums, object_index, first, whole)
        memoryview(buffer)[:] = whole[offset - start : offset - start + len(buffer)]
        return len(buffer) if count == len(whole) else max(0, min(len(buffer), count - (offset - start)))

    def _fail(self, sums: ObjectSums, object_index: int, first: int, view: memoryview) -> None:
        wrong = sums.first_wrong(first, view)
        if wrong is not None:
            raise DamagedBlockError(self._log_id, object_index, wrong)

    def write(self, data: Buffer, offset: int) -> None:
        """A sealed log is not written to."""
        raise AssertionError("a log that has its checksums takes no more writes")

    def sync(self) -> None:
        """See :meth:`DeviceFile.sync`."""
        self._file.sync()

    def punch(self, offset: int, length: int) -> None:
        """See :meth:`DeviceFile.punch`."""
        self._file.punch(offset, length)

    def truncate(self, size_bytes: int) -> None:
        """A sealed log keeps its size."""
        raise AssertionError("a log that has its checksums keeps its size")

    def size(self) -> int:
        """See :meth:`DeviceFile.size`."""
        return self._file.size()

    def allocated(self) -> int:
        """See :meth:`DeviceFile.allocated`."""
        return self._file.allocated()

    def reserve(self, length: int) -> None:
        """See :meth:`DeviceFile.reserve`."""
        self._file.reserve(length)

    def data_extents(self) -> Iterator[tuple[int, int]]:
        """See :meth:`DeviceFile.data_extents`."""
        return self._file.data_extents()

    def close(self) -> None:
        """See :meth:`DeviceFile.close`."""
        self._file.close()
