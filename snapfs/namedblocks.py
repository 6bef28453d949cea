"""All that a family of volumes names in its change logs, some objects at a time.

Every version of an object is looked at once, for all logs together: what there is to do grows with the versions, not
with snapshots times snapshots. The store is held for the rows of one step; taking maps apart needs it no more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence, Set

from .blockmasks import masks_of
from .geometry import VolumeId
from .shardstate import ShardAccess

# Versions of objects that are in memory at a time, unless one object has more.
_ROWS_A_STEP = 4096
# So many are asked for of objects that are listed, of one volume; of more volumes fewer.
_OBJECTS_A_STEP = 256
# Objects less far from one another are read in one go, with what lies between.
_GAP_MAX = 8
_OBJECT_MAX = (1 << 63) - 1


class NamedBlocks:
    """A walk over the objects of a family on one processor, in order.

    ``family`` tells who is in it and is asked at each step: a clone that is made meanwhile names what its origin did.
    ``log_ids``: of these logs alone. ``objects``: these alone, in order; else all of which there is a map or a copy,
    ``from_object`` on.
    """

    def __init__(
        self,
        access: ShardAccess,
        family: Callable[[], Sequence[VolumeId]],
        log_ids: Set[int] | None = None,
        objects: Sequence[int] | None = None,
        from_object: int = 0,
    ) -> None:
        self._access = access
        self._family = family
        self._log_ids = log_ids
        self._objects = objects
        # Of listed objects: how many were looked at.
        self._from = from_object if objects is None else 0

    async def step(self) -> dict[int, dict[int, int]] | None:
        """By object and log the mask of blocks that anything names, of the next objects; None at the end.

        Raises DamagedError.
        """
        family = self._family()
        ranges = self._next_ranges(len(family))
        if not ranges:
            return None
        versions, last = await self._access.ask(self._access.store.some_versions, family, ranges, _ROWS_A_STEP)
        if self._objects is None:
            if not versions:
                return None
            self._from = last + 1
        else:
            self._from = bisect_right(self._objects, last)
        return await self._access.in_thread(masks_of, versions, self._log_ids)

    def _next_ranges(self, family_size: int) -> list[tuple[int, int]]:
        if self._objects is None:
            return [(self._from, _OBJECT_MAX)] if self._from <= _OBJECT_MAX else []
        count = max(1, _OBJECTS_A_STEP // family_size)
        return list(_ranges(self._objects[self._from : self._from + count]))


def _ranges(objects: Sequence[int]) -> Iterator[tuple[int, int]]:
    if not objects:
        return
    first = last = objects[0]
    for one in objects[1:]:
        if one - last > _GAP_MAX:
            yield first, last
            first = one
        last = one
    yield first, last
