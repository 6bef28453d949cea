"""Digests of the blocks of objects, from the checksums of the change logs that the blocks lie in."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from . import blockmap
from .blockmap import HOLE, BlockMap
from .checksums import DIGEST_BYTES, ZERO_DIGEST, ObjectSums
from .errors import SnapfsError
from .formats import CHANGE_LOG
from .geometry import BLOCKS_PER_OBJECT, VolumeId
from .shardstore import ShardStore

# 16 KiB each, and the map.
KEPT_OBJECTS_MAX = 512


class NotSealedError(SnapfsError):
    """Something of a snapshot has no checksums yet."""


@dataclass(slots=True)
class _Look:
    """What was read of the store for one object."""

    object_index: int
    sums: dict[int, ObjectSums] = field(default_factory=dict)


class ObjectDigests:
    """Tells an object's digests, and keeps those of the objects looked at last with the maps they were of.

    An object of which a few blocks are written between snapshots comes to lie in as many change logs, all of which
    would be read for each snapshot; with this only those are that hold what changed. What a log holds at a place
    never changes once it has checksums, and its number is never given to another.
    """

    def __init__(self, store: ShardStore, kept_objects_max: int = KEPT_OBJECTS_MAX) -> None:
        self._store = store
        self._kept_objects_max = kept_objects_max
        self._kept: OrderedDict[tuple[VolumeId, int], tuple[BlockMap, bytes]] = OrderedDict()

    def of(self, volume_id: VolumeId, object_index: int, block_map: BlockMap) -> bytes:
        """The digests of all blocks of an object with this map. Blocks. Raises NotSealedError."""
        key = (volume_id, object_index)
        old_map, old = self._kept.pop(key, (HOLE, ZERO_DIGEST * BLOCKS_PER_OBJECT))
        digests = bytearray(old)
        look = _Look(object_index)
        for block, count, log_id in blockmap.changed_runs(old_map, block_map):
            digests[block * DIGEST_BYTES : (block + count) * DIGEST_BYTES] = self._of_run(look, block, count, log_id)
        found = bytes(digests)
        self._kept[key] = block_map, found
        while len(self._kept) > self._kept_objects_max:
            self._kept.popitem(last=False)
        return found

    def _of_run(self, look: _Look, block: int, count: int, log_id: int) -> bytes:
        if log_id == HOLE:
            return ZERO_DIGEST * count
        if log_id not in look.sums:
            log = self._store.log(log_id)
            if log is None or log.kind != CHANGE_LOG or not log.summed:
                raise NotSealedError(f"change log {log_id} has no checksums yet")
            look.sums[log_id] = self._store.sums(log_id, look.object_index)
        return look.sums[log_id].digests_of(block, count)
