"""A snapshot, and a volume as it stood in one. Neither can be changed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from .blockmap import BlockMap
from .errors import NotFoundError
from .formats import Attributes, SnapshotRow
from .geometry import SnapshotId, VolumeId
from .notresident import NotResidentError, OldBlocks
from .processor import Processor
from .units import show_name
from .volume import VolumeView

_MAPS_MAX = 1024


class Snapshot:
    """The overall snapshot: a name and an instant.

    ``volume_ids`` is None for one of all volumes. ``opens`` counts files of it that are open.
    ``is_kept``: copies are made for it; no longer once it is deleted, nobody has it open and no
    clone looks into it. ``hold_tags`` keep it from being deleted. ``root`` is empty until it is sealed.
    ``cut_ns`` is known to whoever made it.
    """

    def __init__(self, row: SnapshotRow) -> None:
        self.snapshot_id: SnapshotId = row.snapshot_id
        self.name = row.name
        self.instant = row.instant
        self.created_ns = row.created_ns
        self.volume_ids = row.volume_ids
        self.stall_ns = row.stall_ns
        self.note = row.note
        self.schedule = row.schedule
        self.guid = row.guid
        self.hold_tags = row.hold_tags
        self.root = row.root
        self.previous_root = row.previous_root
        self.unsealed_ids = row.unsealed_ids
        self.frozen_ns = row.frozen_ns
        self.opens = 0
        self.cut_ns = 0
        self.is_kept = row.name is not None

    def holds(self, volume_id: VolumeId) -> bool:
        """Whether it is of this volume, as far as the names it was made with tell."""
        return self.volume_ids is None or volume_id in self.volume_ids


class SnapshotMembers:
    """The volumes of a snapshot with their attributes and mapped blocks at its instant, by name."""

    def __init__(
        self, snapshot: Snapshot, members: dict[VolumeId, Attributes], block_counts: dict[VolumeId, int]
    ) -> None:
        self.snapshot = snapshot
        self.by_id = members
        self.block_counts = block_counts
        self.by_name = {attributes.name: volume_id for volume_id, attributes in members.items()}
        self.ordered_ids = sorted(members)

    def get(self, name: bytes) -> tuple[VolumeId, Attributes]:
        """One volume. Raises NotFoundError."""
        volume_id = self.by_name.get(name)
        if volume_id is None:
            raise NotFoundError(
                f"snapshot {show_name(self.snapshot.name or b'')!r} holds no volume {show_name(name)!r}"
            )
        return volume_id, self.by_id[volume_id]


class SnapshotVolume(VolumeView):
    """A volume as it stood at a snapshot's instant; open until :meth:`close`."""

    def __init__(
        self,
        snapshot: Snapshot,
        volume_id: VolumeId,
        attributes: Attributes,
        processors: Sequence[Processor],
    ) -> None:
        super().__init__(processors)
        self.snapshot = snapshot
        self.volume_id = volume_id
        self.attributes = attributes
        self.size_bytes = attributes.size_bytes
        self._maps: dict[int, tuple[int, BlockMap]] = {}
        self.portions = [processor.portion(volume_id) for processor in processors]
        for portion in self.portions:
            portion.users += 1
        # Last: one that is not made is not closed.
        snapshot.opens += 1

    def map_now(self, object_index: int) -> BlockMap:
        """See :meth:`VolumeView.map_now`. What a snapshot holds never changes, so a map found once is kept.

        Where it lies may change in a copy-on-write volume; then the portion's generation does.
        """
        found = self._maps.get(object_index)
        if found is None or found[0] != self.portions[object_index % self.processor_count].generation:
            raise NotResidentError(partial(self._resolve, object_index))
        return found[1]

    async def _resolve(self, object_index: int, old_blocks: OldBlocks) -> None:
        portion = self.portions[object_index % self.processor_count]
        while True:
            generation = portion.generation
            found = await portion.snapshot_map(object_index, self.snapshot.instant)
            if generation == portion.generation:
                break
        while len(self._maps) >= _MAPS_MAX:
            del self._maps[next(iter(self._maps))]
        self._maps[object_index] = (generation, found)

    def close(self) -> None:
        """Let go of it."""
        portions, self.portions = self.portions, []
        for processor, portion in zip(self.processors, portions, strict=False):
            portion.users -= 1
            processor.let_go(portion)
        self.snapshot.opens -= 1
