"""What sets volumes apart: of which they are clones, how they log changes, on what they stand. In memory.

Clones, the volumes they come from and what rollbacks left behind form families: their maps may
name blocks in each other's change logs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .formats import VolumeTraits
from .geometry import SnapshotId, VolumeId


class Ancestor(NamedTuple):
    """A volume as it stood at an instant."""

    volume_id: VolumeId
    instant: int


class TraitsTable:
    """The traits of all volumes that are not plain."""

    def __init__(self, rows: Iterable[VolumeTraits]) -> None:
        self.rows = {row.volume_id: row for row in rows}
        self._families: dict[VolumeId, tuple[VolumeId, ...]] = {}
        self._shared_until: dict[VolumeId, int] = {}
        self._work_out()

    def get(self, volume_id: VolumeId) -> VolumeTraits:
        """The traits of a volume, plain or not."""
        return self.rows.get(volume_id) or VolumeTraits(volume_id, volume_id)

    def put(self, row: VolumeTraits) -> None:
        """Add or change a volume's traits."""
        self.rows[row.volume_id] = row
        self._work_out()

    def drop(self, volume_id: VolumeId) -> None:
        """Nothing of a volume is left."""
        self.rows.pop(volume_id, None)
        self._work_out()

    def _work_out(self) -> None:
        families: dict[VolumeId, set[VolumeId]] = {}
        self._shared_until = {}
        for row in self.rows.values():
            if not row.origin_id:
                continue
            joined = families.get(row.volume_id, {row.volume_id}) | families.get(row.origin_id, {row.origin_id})
            for member in joined:
                families[member] = joined
            self._shared_until[row.origin_id] = max(row.origin_instant, self._shared_until.get(row.origin_id, 0))
        self._families = {member: tuple(sorted(family)) for member, family in families.items()}

    def family_of(self, volume_id: VolumeId) -> tuple[VolumeId, ...]:
        """The volumes whose maps may name blocks of this one's change logs, itself among them."""
        return self._families.get(volume_id) or (volume_id,)

    def families_of(self, volume_ids: Iterable[VolumeId]) -> tuple[VolumeId, ...]:
        """The volumes of the families of all of these."""
        return tuple(sorted({member for one in volume_ids for member in self.family_of(one)}))

    def shared_until(self, volume_id: VolumeId) -> int:
        """The latest instant as of which a clone was made of a volume, 0 for none.

        What was written to it later only its own maps can name.
        """
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
        return volume_id in self._shared_until
