"""What sets volumes apart: of which they are clones, how they log changes, on what they stand. In memory.

Clones, the volumes they come from and what rollbacks left behind form families: their maps may
name blocks in each other's change logs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .errors import DamagedError
from .formats import VolumeTraits
from .geometry import SnapshotId, VolumeId


class Ancestor(NamedTuple):
    """A volume as it stood at an instant."""

    volume_id: VolumeId
    instant: int


def impossible_descent(rows: Iterable[VolumeTraits]) -> dict[VolumeId, str]:
    """Clones of what was made after them, in words: their lines of descent might have no end."""
    return {
        row.volume_id: f"volume {row.volume_id} is said to be a clone of {row.origin_id}"
        for row in rows
        if row.origin_id >= row.volume_id
    }


class _Family:
    """Volumes that belong together, and the same in order once that was asked for."""

    __slots__ = ("members", "ordered")

    def __init__(self, member: VolumeId) -> None:
        self.members = {member}
        self.ordered: tuple[VolumeId, ...] | None = None


class TraitsTable:
    """The traits of all volumes that are not plain.

    A clone more joins two families, in a time that does not grow with them. One less, or of another origin, has
    all of them worked out anew when they are asked for next.
    """

    def __init__(self, rows: Iterable[VolumeTraits]) -> None:
        self.rows = {row.volume_id: row for row in rows}
        for words in impossible_descent(self.rows.values()).values():
            raise DamagedError(f"the catalog is damaged: {words}", "Restore it from a copy")
        self._families: dict[VolumeId, _Family] = {}
        self._shared_until: dict[VolumeId, int] = {}
        self._is_worked_out = False

    def get(self, volume_id: VolumeId) -> VolumeTraits:
        """The traits of a volume, plain or not."""
        return self.rows.get(volume_id) or VolumeTraits(volume_id, volume_id)

    def put(self, row: VolumeTraits) -> None:
        """Add or change a volume's traits."""
        before = self.get(row.volume_id)
        was_worked_out = self._is_worked_out
        if (before.origin_id, before.origin_instant) == (row.origin_id, row.origin_instant):
            self.rows[row.volume_id] = row
            return
        # Until all of it is done: there may be no memory.
        self._is_worked_out = False
        self.rows[row.volume_id] = row
        if was_worked_out and not before.origin_id:
            self._join(row)
            self._is_worked_out = True

    def drop(self, volume_id: VolumeId) -> None:
        """Nothing of a volume is left."""
        row = self.rows.pop(volume_id, None)
        if row is not None and row.origin_id:
            self._is_worked_out = False

    def _work_out(self) -> None:
        if self._is_worked_out:
            return
        self._families = {}
        self._shared_until = {}
        for row in self.rows.values():
            self._join(row)
        self._is_worked_out = True

    def _join(self, row: VolumeTraits) -> None:
        """A clone and what it was made of belong together, with all that belongs to them."""
        if not row.origin_id:
            return
        small, large = self._family(row.volume_id), self._family(row.origin_id)
        if small is not large:
            if len(small.members) > len(large.members):
                small, large = large, small
            large.ordered = None
            large.members |= small.members
            for member in small.members:
                self._families[member] = large
        self._shared_until[row.origin_id] = max(row.origin_instant, self._shared_until.get(row.origin_id, 0))

    def _family(self, volume_id: VolumeId) -> _Family:
        family = self._families.get(volume_id)
        if family is None:
            family = self._families[volume_id] = _Family(volume_id)
        return family

    def family_of(self, volume_id: VolumeId) -> tuple[VolumeId, ...]:
        """The volumes whose maps may name blocks of this one's change logs, itself among them."""
        self._work_out()
        family = self._families.get(volume_id)
        if family is None:
            return (volume_id,)
        if family.ordered is None:
            family.ordered = tuple(sorted(family.members))
        return family.ordered

    def families_of(self, volume_ids: Iterable[VolumeId]) -> tuple[VolumeId, ...]:
        """The volumes of the families of all of these."""
        return tuple(sorted({member for one in volume_ids for member in self.family_of(one)}))

    def shared_until(self, volume_id: VolumeId) -> int:
        """The latest instant as of which a clone was made of a volume, 0 for none.

        What was written to it later only its own maps can name.
        """
        self._work_out()
        return self._shared_until.get(volume_id, 0)

    def inheritors(self, snapshot_id: SnapshotId) -> list[VolumeTraits]:
        """Volumes that still look into a snapshot for objects they have no map of."""
        return [row for row in self.rows.values() if row.inherits and row.origin_snapshot_id == snapshot_id]

    def ancestors(self, volume_id: VolumeId) -> list[Ancestor]:
        """Where to look for the map of an object that a volume has none of: nearest first."""
        found = []
        row = self.rows.get(volume_id)
        while row is not None and row.inherits:
            found.append(Ancestor(row.origin_id, row.origin_instant))
            row = self.rows.get(row.origin_id)
        return found

    def lineage(self, volume_id: VolumeId) -> list[Ancestor]:
        """Of what a volume was cloned, nearest first, whether it still looks there or not."""
        found = []
        row = self.rows.get(volume_id)
        while row is not None and row.origin_id:
            found.append(Ancestor(row.origin_id, row.origin_instant))
            row = self.rows.get(row.origin_id)
        return found

    def clones_of(self, volume_id: VolumeId) -> list[VolumeTraits]:
        """The volumes that were cloned from it, snapshots' volumes among them."""
        return [row for row in self.rows.values() if row.origin_id == volume_id]

    def is_origin(self, volume_id: VolumeId) -> bool:
        """Whether a clone was made of it that is still known."""
        self._work_out()
        return volume_id in self._shared_until
