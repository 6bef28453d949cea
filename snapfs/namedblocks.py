"""All that a family of volumes names in its change logs, some objects at a time.

Every version of an object is looked at once, for all logs together: what there is to do grows with the versions, not
with snapshots times snapshots. The store is held for the rows of one step; taking maps apart needs it no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set

from .blockmasks import masks_of
from .geometry import VolumeId
from .shardstate import ShardAccess

_OBJECTS_A_STEP_MAX = 256
_FIRST_STEP_OBJECTS = 16
# What a step is to look at: versions of objects, and places of the store.
_LOOKS_A_STEP = 4096
# Objects less far from one another are read in one go, with what lies between.
_GAP_MAX = 64


class NamedBlocks:
    """A walk over the objects of a family on one processor, in order.

    ``log_ids``: of these logs alone. ``objects``: these alone, in order; else all of which there is a map or a copy.
    """

    def __init__(
        self,
        access: ShardAccess,
        family: Sequence[VolumeId],
        log_ids: Set[int] | None = None,
        objects: Sequence[int] | None = None,
    ) -> None:
        self._access = access
        self._family = family
        self._log_ids = log_ids
        self._objects = objects
        self._from = 0
        self._limit = _FIRST_STEP_OBJECTS

    async def step(self) -> dict[int, dict[int, int]] | None:
        """By object and log the mask of blocks that anything names, of the next objects; None at the end.

        Raises DamagedError.
        """
        objects = await self._next_objects()
        if not objects:
            return None
        store = self._access.store
        ranges = [(objects[0], objects[-1])] if self._objects is None else list(_ranges(objects))
        versions = await self._access.ask(store.versions_of, self._family, ranges)
        looks = len(versions) + len(ranges) * len(self._family)
        self._limit = max(1, min(_OBJECTS_A_STEP_MAX, _LOOKS_A_STEP * len(objects) // looks))
        return await self._access.in_thread(masks_of, versions, self._log_ids)

    async def _next_objects(self) -> Sequence[int]:
        if self._objects is not None:
            objects = self._objects[self._from : self._from + self._limit]
            self._from += len(objects)
            return objects
        store = self._access.store
        found = await self._access.ask(store.objects_from, self._family, self._from, self._limit)
        self._from = found[-1] + 1 if found else self._from
        return found


def _ranges(objects: Sequence[int]) -> Iterator[tuple[int, int]]:
    first = last = objects[0]
    for one in objects[1:]:
        if one - last > _GAP_MAX:
            yield first, last
            first = one
        last = one
    yield first, last
