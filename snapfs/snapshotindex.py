"""Which instants hold a volume. In memory; each processor keeps one of its own."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable

from .geometry import VolumeId

NEVER = 1 << 62


class SnapshotIndex:
    """The instants of the snapshots that exist, of all volumes and of those named.

    A snapshot is in here from its cut, before it is published, until it is deleted.
    """

    def __init__(self) -> None:
        self._of_all: list[int] = []
        self._of_volume: dict[VolumeId, list[int]] = {}

    def add(self, instant: int, volume_ids: Iterable[VolumeId] | None) -> None:
        """A snapshot of these volumes, or of all (None)."""
        if volume_ids is None:
            insort(self._of_all, instant)
            return
        for volume_id in volume_ids:
            insort(self._of_volume.setdefault(volume_id, []), instant)

    def remove(self, instant: int, volume_ids: Iterable[VolumeId] | None) -> None:
        """The snapshot is deleted; nothing is kept for it from now on. It may be in here in part, or not at all."""
        if volume_ids is None:
            _leave_out(self._of_all, instant)
            return
        for volume_id in volume_ids:
            instants = self._of_volume.get(volume_id, [])
            _leave_out(instants, instant)
            if not instants:
                self._of_volume.pop(volume_id, None)

    def holds(self, volume_id: VolumeId, low: int, high: int) -> bool:
        """Whether a snapshot holds the volume with an instant from ``low`` to ``high``, both included."""
        if _any_between(self._of_all, low, high):
            return True
        named = self._of_volume.get(volume_id)
        return named is not None and _any_between(named, low, high)

    def newest(self, volume_id: VolumeId) -> int:
        """The latest instant that holds the volume, 0 for none."""
        newest = self._of_all[-1] if self._of_all else 0
        named = self._of_volume.get(volume_id)
        return max(newest, named[-1]) if named else newest

    def next_of_all(self, instant: int) -> int:
        """The first instant of a snapshot of all volumes after this one, NEVER for none."""
        place = bisect_right(self._of_all, instant)
        return self._of_all[place] if place < len(self._of_all) else NEVER

    def next_of(self, volume_ids: Iterable[VolumeId] | None, instant: int) -> int:
        """The first instant after this one by which each of these volumes, or all, is held; NEVER for none."""
        following = self.next_of_all(instant)
        if volume_ids is None:
            return following
        return max((min(following, self._next_named(one, instant)) for one in volume_ids), default=instant + 1)

    def _next_named(self, volume_id: VolumeId, instant: int) -> int:
        instants = self._of_volume.get(volume_id, [])
        place = bisect_right(instants, instant)
        return instants[place] if place < len(instants) else NEVER


def _leave_out(instants: list[int], instant: int) -> None:
    place = bisect_left(instants, instant)
    if instants[place : place + 1] == [instant]:
        del instants[place]


def _any_between(instants: list[int], low: int, high: int) -> bool:
    place = bisect_left(instants, low)
    # A slice, for threads ask too: an instant may go between two looks.
    found = instants[place : place + 1]
    return bool(found) and found[0] <= high
