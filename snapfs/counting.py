"""How many blocks a volume has mapped on one processor, told from the store alone. Blocks.

The verifier and the repair count alike, so that neither takes the other's result for wrong.
"""

from __future__ import annotations

from collections.abc import Collection

from . import blockmap
from .formats import COPY_ON_WRITE
from .geometry import BLOCKS_PER_OBJECT, VolumeId, blocks_of
from .shardstore import ShardStore
from .traits import TraitsTable

_STEP = 4096


def stands_on_cow(traits: TraitsTable, volume_id: VolumeId) -> bool:
    """Whether its blocks are not counted: how much of a copy-on-write volume's source holds data is not known."""
    return any(traits.get(one).change_mode == COPY_ON_WRITE for one in traits.family_of(volume_id))


def inherited_count(
    store: ShardStore, traits: TraitsTable, volume_id: VolumeId, own: Collection[int], processor_count: int
) -> int:
    """Mapped blocks of the objects that a volume has no map of, and its ancestors or its image have."""
    ancestors = traits.ancestors(volume_id)
    ids = [one.volume_id for one in ancestors]
    count = from_object = 0
    seen = set(own)
    while objects := store.objects_from(ids, from_object, _STEP):
        for object_index in objects:
            found = None if object_index in own else store.inherited_map(ancestors, object_index)
            if found is not None:
                seen.add(object_index)
                count += blockmap.mapped_count(found)
        from_object = objects[-1] + 1
    root = ids[-1] if ids else volume_id
    image_blocks = blocks_of(traits.get(root).source_size_bytes)
    for object_index in range(store.processor_index, -(-image_blocks // BLOCKS_PER_OBJECT), processor_count):
        if object_index not in seen:
            count += min(BLOCKS_PER_OBJECT, image_blocks - object_index * BLOCKS_PER_OBJECT)
    return count
