"""Inode numbers: what each names, in one 64-bit number. Pure.

A number is ``snapshot_id << 32 | item``. Neither snapshot nor volume ids are ever used again, so no
inode number ever names something else than it did, and the kernel's caches stay true.
"""

from __future__ import annotations

from collections import Counter

from ..catalog import FIRST_VOLUME_ID
from ..geometry import INODE_ITEM_BITS, SnapshotId, VolumeId
from ..geometry import snapshot_id_of as snapshot_id_of

ROOT = 1
SNAPSHOTS = 2
META = 3
CONTROL = 4
STATUS = 5
EVENTS = 6
PROCESSORS = 7
OWNER = 8
FIRST_PROCESSOR = 16
_FIRST_CONTROL, _CONTROL_COUNT = 96, 128
_ITEM_MASK = (1 << INODE_ITEM_BITS) - 1
_SNAPSHOT_FOLDER = 0
_MOMENT_FOLDER = FIRST_VOLUME_ID - 1
MANIFEST_VARIANT_MAX = FIRST_VOLUME_ID - 2

SNAPSHOTS_NAME = b".snapshots"
META_NAME = b".snapfs"
OWNER_NAME = b"owner"


def of_volume(volume_id: VolumeId) -> int:
    """A live volume."""
    return volume_id


def of_snapshot(snapshot_id: SnapshotId) -> int:
    """A snapshot's folder."""
    return snapshot_id << INODE_ITEM_BITS | _SNAPSHOT_FOLDER


def of_moment(snapshot_id: SnapshotId) -> int:
    """A snapshot's folder under the name of a moment: of its own, since the kernel has a folder in one place only."""
    return snapshot_id << INODE_ITEM_BITS | _MOMENT_FOLDER


def of_manifest(snapshot_id: SnapshotId, variant: int = 1) -> int:
    """A snapshot's manifest.

    A variant is 1 to MANIFEST_VARIANT_MAX: with the write-back cache the kernel takes a file's size
    only with a new inode, so a manifest of another size gets another number.
    """
    return snapshot_id << INODE_ITEM_BITS | variant


def of_snapshot_volume(snapshot_id: SnapshotId, volume_id: VolumeId) -> int:
    """A volume in a snapshot."""
    return snapshot_id << INODE_ITEM_BITS | volume_id


def of_processor(processor_index: int) -> int:
    """A processor's status file."""
    return FIRST_PROCESSOR + processor_index


def is_control(inode: int) -> bool:
    """Whether it is the control file, by any of its numbers."""
    return inode == CONTROL or _FIRST_CONTROL <= inode < _FIRST_CONTROL + _CONTROL_COUNT


class ControlNumbers:
    """The control file has another number at each look-up.

    The kernel locks an inode while it writes to it, so that a command would wait for the one before it, in a sleep that
    no signal ends, and be that a scrub of hours.
    """

    def __init__(self) -> None:
        self._last = 0
        self._open_counts: Counter[int] = Counter()

    def another(self) -> int:
        """One that nobody has open, if there is any."""
        for _ in range(_CONTROL_COUNT):
            self._last = (self._last + 1) % _CONTROL_COUNT
            if not self._open_counts[_FIRST_CONTROL + self._last]:
                break
        return _FIRST_CONTROL + self._last

    def opened(self, inode: int) -> None:
        """It was opened by this number."""
        self._open_counts[inode] += 1

    def closed(self, inode: int) -> None:
        """What was opened by this number is closed."""
        self._open_counts[inode] -= 1


def volume_id_of(inode: int) -> VolumeId | None:
    """The volume that an inode is, live or in a snapshot; None for anything else."""
    item = inode & _ITEM_MASK
    return VolumeId(item) if item >= FIRST_VOLUME_ID else None


def is_snapshot_folder(inode: int) -> bool:
    """Whether it is a snapshot's folder."""
    return inode > _ITEM_MASK and inode & _ITEM_MASK in (_SNAPSHOT_FOLDER, _MOMENT_FOLDER)


def is_manifest(inode: int) -> bool:
    """Whether it is a snapshot's manifest."""
    return inode > _ITEM_MASK and 1 <= inode & _ITEM_MASK <= MANIFEST_VARIANT_MAX


def processor_index_of(inode: int) -> int | None:
    """The processor whose status file an inode is, None for anything else."""
    return inode - FIRST_PROCESSOR if FIRST_PROCESSOR <= inode < FIRST_VOLUME_ID else None
