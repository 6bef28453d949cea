"""The file of a change log that takes no more writes and has its checksums: what is read of it is proven.

Also what the page cache gives is, so that a page that went bad there, or was written to by others, is
found too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from xxhash import xxh3_64_digest

from .backends import Buffer, DeviceFile
from .checksums import CHECKSUM_BYTES, FULL_MASK, ObjectSums
from .errors import DamagedError
from .geometry import BLOCK_SHIFT, BLOCK_SIZE, OBJECT_MASK, OBJECT_SHIFT
from .notresident import NotResidentError, OldBlocks

# Of all processors together.
CACHED_BYTES_MAX = 32 << 20
# So many stay however large they are: each of the reads under way at a time needs those of a batch of its logs.
_KEPT_MIN = 512
_BLOCK_MASK = BLOCK_SIZE - 1
# From a place in an object to that of its block's checksum.
_CHECKSUM_SHIFT = BLOCK_SHIFT - 3


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

    ``known`` has them by log and, inside, by the object's place in the log's file.
    ``on_damage`` is called with log, object and block of what was read and is not what was sealed.
    """

    def __init__(
        self,
        load: Callable[[int, int], Awaitable[ObjectSums]],
        on_damage: Callable[[int, int, int], None],
        processor_index: int,
        processor_count: int,
        bytes_max: int = CACHED_BYTES_MAX,
    ) -> None:
        self.known: dict[int, dict[int, ObjectSums]] = {}
        self.on_damage = on_damage
        self._load = load
        self._processor_index = processor_index
        self._processor_count = processor_count
        self._bytes_max = bytes_max // processor_count
        self._size_bytes = 0
        self._queue: deque[tuple[int, int]] = deque()

    def of_log(self, log_id: int) -> dict[int, ObjectSums]:
        """Those of one log, now and later."""
        return self.known.setdefault(log_id, {})

    def forget_log(self, log_id: int) -> None:
        """A log is gone."""
        gone = self.known.pop(log_id, None)
        if gone:
            self._queue = deque(one for one in self._queue if one[0] != log_id)
            self._size_bytes -= sum(sums.size_bytes for sums in gone.values())
            gone.clear()

    def object_index(self, place: int) -> int:
        """The object that has a place in the logs' files."""
        return place * self._processor_count + self._processor_index

    async def fetch(self, of_log: dict[int, ObjectSums], log_id: int, place: int, old_blocks: OldBlocks) -> None:
        """Bring the checksums of an object in a log into memory."""
        if place not in of_log:
            self._keep(of_log, log_id, place, await self._load(log_id, self.object_index(place)))

    def missing(self, log_ids: Iterable[int], place: int) -> list[int]:
        """Sealed logs, of these, whose checksums of this object are not here; none while there is no room."""
        if not self.has_room:
            return []
        return [one for one in log_ids if (of_log := self.known.get(one)) is not None and place not in of_log]

    @property
    def has_room(self) -> bool:
        """Whether more may be kept before others have to go."""
        return self._size_bytes < self._bytes_max

    def admit(self, log_id: int, place: int, sums: ObjectSums) -> None:
        """Keep what was brought in together with others, if the log is still there and there is room."""
        of_log = self.known.get(log_id)
        if of_log is not None and self._size_bytes + sums.size_bytes <= self._bytes_max:
            self._keep(of_log, log_id, place, sums)

    def put(self, log_id: int, object_index: int, sums: ObjectSums) -> None:
        """Keep what was just found of an object in a log that is sealed: what was written last is read soon."""
        self._keep(self.of_log(log_id), log_id, object_index // self._processor_count, sums.without_digests())

    def _keep(self, of_log: dict[int, ObjectSums], log_id: int, place: int, sums: ObjectSums) -> None:
        if place in of_log:
            return
        of_log[place] = sums
        if self.known.get(log_id) is not of_log:
            # The log is gone, and this one reader is still at it.
            return
        self._queue.append((log_id, place))
        self._size_bytes += sums.size_bytes
        while self._size_bytes > self._bytes_max and len(self._queue) > _KEPT_MIN:
            old_log_id, old_place = self._queue.popleft()
            gone = self.known.get(old_log_id, {}).pop(old_place, None)
            self._size_bytes -= 0 if gone is None else gone.size_bytes

    def report(self, damage: DamagedBlockError) -> None:
        """Tell whoever keeps track."""
        self.on_damage(damage.log_id, damage.object_index, damage.block)


class SealedFile(DeviceFile):
    """A log's file whose reads are held against its checksums.

    Reads raise DamagedBlockError, and NotResidentError while the checksums are not in memory. A range
    that is being punched meanwhile reads as damaged: a reader that waits looks again at what its map says.
    """

    __slots__ = ("_cache", "_file", "_known", "_log_id")

    def __init__(self, file: DeviceFile, log_id: int, cache: SumCache) -> None:
        self._file = file
        self._log_id = log_id
        self._cache = cache
        self._known = cache.of_log(log_id)

    def try_read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """See :meth:`DeviceFile.try_read_into`. A range lies in one object."""
        if len(buffer) == BLOCK_SIZE and not offset & _BLOCK_MASK:
            # The hot path, written out: a call costs more than the checksum.
            sums = self._known.get(offset >> OBJECT_SHIFT)
            if sums is not None and sums.mask is FULL_MASK:
                count = self._file.try_read_into(buffer, offset)
                at = (offset & OBJECT_MASK) >> _CHECKSUM_SHIFT
                if count == BLOCK_SIZE and xxh3_64_digest(buffer) == sums.checksums[at : at + CHECKSUM_BYTES]:
                    return count
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
        sums = self._known.get(offset >> OBJECT_SHIFT)
        if sums is None:
            raise NotResidentError(partial(self._cache.fetch, self._known, self._log_id, offset >> OBJECT_SHIFT))
        length = len(buffer)
        if (offset | length) & _BLOCK_MASK:
            return self._read_unaligned(sums, buffer, offset, read)
        view = buffer if isinstance(buffer, memoryview) else memoryview(buffer)
        _read_all_of(view, offset, read)
        first = (offset & OBJECT_MASK) >> BLOCK_SHIFT
        if not sums.matches(first, view):
            self._fail(sums, offset >> OBJECT_SHIFT, first, view)
        return length

    def _read_unaligned(
        self,
        sums: ObjectSums,
        buffer: bytearray | memoryview,
        offset: int,
        read: Callable[[bytearray | memoryview, int], int],
    ) -> int:
        start = offset & ~_BLOCK_MASK
        whole = memoryview(bytearray(-(-(offset + len(buffer)) // BLOCK_SIZE) * BLOCK_SIZE - start))
        _read_all_of(whole, start, read)
        first = (start & OBJECT_MASK) >> BLOCK_SHIFT
        if not sums.matches(first, whole):
            self._fail(sums, offset >> OBJECT_SHIFT, first, whole)
        memoryview(buffer)[:] = whole[offset - start : offset - start + len(buffer)]
        return len(buffer)

    def _fail(self, sums: ObjectSums, place: int, first: int, view: memoryview) -> None:
        wrong = sums.first_wrong(first, view)
        if wrong is not None:
            raise DamagedBlockError(self._log_id, self._cache.object_index(place), wrong)

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

    def data_extents(self) -> list[tuple[int, int]]:
        """See :meth:`DeviceFile.data_extents`."""
        return self._file.data_extents()

    def close(self) -> None:
        """See :meth:`DeviceFile.close`."""
        self._file.close()


def _read_all_of(view: memoryview, offset: int, read: Callable[[bytearray | memoryview, int], int]) -> None:
    """Fill a view; what is behind the end of a file reads as zeros, which are damage unless they were sealed."""
    count = read(view, offset)
    if count < len(view):
        view[count:] = bytes(len(view) - count)
