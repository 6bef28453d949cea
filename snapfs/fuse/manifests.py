"""The manifests of snapshots as files, whose contents change: a process that looks at one and opens it gets one file.

With the write-back cache the kernel takes a file's size only with a new inode, so a manifest of another size
has another number. ``cp`` looks at a file, opens it, and refuses one that is another by then.
"""

from __future__ import annotations

from collections import OrderedDict

import trio

from ..geometry import SnapshotId
from ..manifest import manifest_of
from ..pool import Pool
from ..snapshot import Snapshot
from . import names

_TEXTS_KEPT = 4
_LOOKS_KEPT = 64
# From a process's look at a file to its opening it, on a machine that is short of everything.
_LOOK_S = 10.0


class Manifests:
    """The texts of manifests that were looked up, until they are opened."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._texts: OrderedDict[int, bytes] = OrderedDict()
        # By snapshot: the latest variant of its number, and the size it stands for.
        self._variants: dict[SnapshotId, tuple[int, int]] = {}
        # By process and snapshot: what it was shown, and when.
        self._looks: OrderedDict[tuple[int, SnapshotId], tuple[int, int, float]] = OrderedDict()

    async def look_up(self, snapshot: Snapshot, pid: int) -> tuple[int, int]:
        """The inode and the size in bytes of a snapshot's manifest as it is now.

        What a process is shown it is shown again for a while, unless it opened it meanwhile: one call of the system
        may look a file up twice, when the kernel has it in mind by another number.
        """
        key = (pid, snapshot.snapshot_id)
        inode, size_bytes, looked_s = self._looks.get(key, (0, 0, 0.0))
        if inode and trio.current_time() - looked_s <= _LOOK_S:
            return inode, size_bytes
        self._looks.pop(key, None)
        inode, size_bytes = await self._make(snapshot)
        self._looks[key] = (inode, size_bytes, trio.current_time())
        while len(self._looks) > _LOOKS_KEPT:
            self._looks.popitem(last=False)
        return inode, size_bytes

    async def _make(self, snapshot: Snapshot) -> tuple[int, int]:
        text = await manifest_of(self._pool, snapshot)
        variant, size_bytes = self._variants.get(snapshot.snapshot_id, (1, -1))
        if size_bytes != len(text):
            variant = variant % (names.MANIFEST_VARIANT_MAX - 1) + 2
            self._variants[snapshot.snapshot_id] = (variant, len(text))
        inode = names.of_manifest(snapshot.snapshot_id, variant)
        self._texts[inode] = text
        while len(self._texts) > _TEXTS_KEPT:
            self._texts.popitem(last=False)
        return inode, len(text)

    def size_bytes(self, snapshot: Snapshot) -> int:
        """The size as it was looked up last, 0 for one that was not."""
        return self._variants.get(snapshot.snapshot_id, (1, 0))[1]

    async def opened(self, snapshot: Snapshot, inode: int, pid: int) -> bytes:
        """The text that the process looked at, or that of now."""
        self._looks.pop((pid, snapshot.snapshot_id), None)
        text = self._texts.pop(inode, None)
        return text if text is not None else await manifest_of(self._pool, snapshot)
