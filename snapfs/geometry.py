"""How a volume is cut into objects and blocks, and where they lie. Pure arithmetic.

A volume is cut into objects of 4 MiB; object ``i`` belongs to processor ``i mod P`` and is its
``i div P``-th. An object is cut into 1024 blocks of 4096 bytes. In a change log's file, object
``i`` lies at ``(i div P) * 4 MiB``, so neighbours in a volume stay neighbours on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NewType

VolumeId = NewType("VolumeId", int)
SnapshotId = NewType("SnapshotId", int)
LogId = NewType("LogId", int)
Epoch = NewType("Epoch", int)

BLOCK_SHIFT = 12
BLOCK_SIZE = 1 << BLOCK_SHIFT
OBJECT_SHIFT = 22
OBJECT_SIZE = 1 << OBJECT_SHIFT
OBJECT_MASK = OBJECT_SIZE - 1
BLOCKS_PER_OBJECT = OBJECT_SIZE // BLOCK_SIZE

# An inode of a mount is ``snapshot_id << INODE_ITEM_BITS | item``: see fuse/names.py.
INODE_ITEM_BITS = 32

# A file of ext4 holds 16 TiB less a block, so a processor's part of a volume stays at half of that.
PORTION_SIZE_BYTES_MAX = 1 << 43
PROCESSOR_COUNT_MAX = 64


def snapshot_id_of(inode: int) -> SnapshotId:
    """The snapshot that an inode lies in, 0 for none."""
    return SnapshotId(inode >> INODE_ITEM_BITS)


def volume_size_bytes_max(processor_count: int) -> int:
    """The largest volume: 8 TiB for each processor."""
    return PORTION_SIZE_BYTES_MAX * processor_count


def object_count(size_bytes: int) -> int:
    """Objects that a volume of this size has."""
    return (size_bytes + OBJECT_MASK) >> OBJECT_SHIFT


def blocks_of(size_bytes: int) -> int:
    """Blocks that hold so many bytes."""
    return (size_bytes + BLOCK_SIZE - 1) >> BLOCK_SHIFT


def log_offset(object_index: int, processor_count: int) -> int:
    """Where an object begins in a change log's file."""
    return (object_index // processor_count) << OBJECT_SHIFT


def pieces(offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a range of a volume by object: ``(object_index, offset in it, length, offset in the range)``."""
    done = 0
    while done < length:
        object_index, inside = divmod(offset + done, OBJECT_SIZE)
        step = min(OBJECT_SIZE - inside, length - done)
        yield object_index, inside, step, done
        done += step
