"""What the portions of one processor share: access to its store, its epoch, counts, and a bound on memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeVar

import trio

from .blockmap import BlockMap
from .formats import CopyRow
from .geometry import VolumeId
from .pending import PendingCalls
from .shardstore import ShardStore
from .tasks import in_thread
from .threads import Threads

T = TypeVar("T")

RESIDENT_OBJECTS_MAX = 12288


class ShardAccess:
    """A shard store, and the locks around it.

    ``store_lock``: one thread at a time uses the store; held for one query or one transaction.
    ``commit_lock``: commits and reclaiming steps follow one another; taken before the other, and
    never by a fetch, so its holder may fetch.
    """

    def __init__(self, store: ShardStore, pending: PendingCalls) -> None:
        self.store = store
        self.where = f"processor {store.processor_index}"
        self._pending = pending
        self.store_lock = trio.Lock()
        self.commit_lock = trio.Lock()
        self._limiter = trio.CapacityLimiter(8)
        self._readers = Threads(8)

    async def in_thread(self, call: Callable[..., T], *args: object) -> T:
        """Run a blocking call in a thread. It is not cancelled halfway."""
        with self._pending.running(self.where, call) as one:
            return await in_thread(one.run, call, *args, limiter=self._limiter)

    async def read_in_thread(self, call: Callable[..., T], *args: object) -> T:
        """Like :meth:`in_thread`, for reads of which many run at once."""
        with self._pending.running(self.where, call) as one:
            return await self._readers.run(one.run, call, *args)

    @property
    def is_stuck(self) -> bool:
        """Whether a call has been in its thread for so long that its device seems to hang."""
        return self._pending.is_stuck(self.where)

    async def ask(self, call: Callable[..., T], *args: object) -> T:
        """Run a call of the store in a thread, when it is free."""
        async with self.store_lock:
            return await self.in_thread(call, *args)


class EpochClock:
    """The epoch of all volumes on one processor: one more than the last instant of all."""

    __slots__ = ("epoch",)

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch


class Tally:
    """Mapped blocks of each volume on one processor, and of all that are not removed."""

    def __init__(self, counts: dict[VolumeId, int]) -> None:
        self.counts = counts
        self.total = sum(counts.values())
        self._hidden: set[VolumeId] = set()

    def add(self, volume_id: VolumeId, count: int) -> None:
        """Count blocks in, or out when negative."""
        before = self.counts.setdefault(volume_id, 0)
        # What a clone inherits of a copy-on-write volume was never counted in.
        after = max(0, before + count)
        total = self.total if volume_id in self._hidden else self.total + after - before
        # Both, or for want of memory neither.
        self.counts[volume_id] = after
        self.total = total

    def hide(self, volume_id: VolumeId) -> None:
        """Leave a removed volume out of the total."""
        if volume_id not in self._hidden:
            self._hidden.add(volume_id)
            self.total -= self.counts.get(volume_id, 0)

    def drop(self, volume_id: VolumeId) -> None:
        """Forget a volume."""
        self.hide(volume_id)
        self._hidden.discard(volume_id)
        self.counts.pop(volume_id, None)


class ObjectState:
    """An object in memory.

    ``epoch`` is the one in which the map last changed. ``copied`` is the instant of the object's
    latest point-in-time copy, 0 for none, None while that is not known. ``kept`` is that copy
    itself as it is durable, where it is used and known.
    """

    __slots__ = ("block_map", "copied", "epoch", "kept")

    def __init__(self, block_map: BlockMap, epoch: int, copied: int | None) -> None:
        self.block_map = block_map
        self.epoch = epoch
        self.copied = copied
        self.kept: CopyRow | None = None


class Lender(Protocol):
    """Who keeps objects in memory."""

    def let_go(self, object_index: int) -> bool:
        """Forget an object if it is clean; whether it is no longer kept."""
        ...


class Residency:
    """Bounds the objects in memory of one processor: those loaded first go first, if clean."""

    def __init__(self, object_count_max: int = RESIDENT_OBJECTS_MAX) -> None:
        self._object_count_max = object_count_max
        self._queue: deque[tuple[Lender, int]] = deque()

    def admit(self, portion: Lender, object_index: int) -> None:
        """An object was loaded."""
        self._queue.append((portion, object_index))
        for _ in range(4):
            if len(self._queue) <= self._object_count_max:
                return
            other, index = self._queue.popleft()
            if not other.let_go(index):
                self._queue.append((other, index))
