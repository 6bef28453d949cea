"""The attributes of the folder that volumes lie in: mode, owner and times, kept in the catalog's meta table."""

from __future__ import annotations

import os
import time

from .catalog import Catalog
from .formats import AttributeChange
from .units import storable_ns

MODE_MASK = 0o1777
_MODE_DEFAULT = 0o755
# Its owner always may: the daemon itself comes to its volumes through it.
_MODE_LEAST = 0o700
_ID_MAX = (1 << 32) - 2


class Folder:
    """The folder of one pool. It is the daemon's user's until root gives it to somebody else.

    What the catalog has of it and cannot be is taken for nothing, but for a mode, which then lets in its owner alone.
    """

    def __init__(self, catalog: Catalog) -> None:
        now_ns = time.time_ns()
        self.mode = _MODE_LEAST | _kept(catalog, "folder_mode", _MODE_DEFAULT, MODE_MASK, _MODE_LEAST)
        self.uid, self.gid = os.getuid(), os.getgid()
        if self.uid == 0:
            self.uid = _kept(catalog, "folder_uid", self.uid, _ID_MAX, self.uid)
            self.gid = _kept(catalog, "folder_gid", self.gid, _ID_MAX, self.gid)
        self.atime_ns = catalog.meta("folder_atime_ns", now_ns)
        self.mtime_ns = catalog.meta("folder_mtime_ns", now_ns)
        self.ctime_ns = catalog.meta("folder_ctime_ns", now_ns)

    def entries_changed(self) -> None:
        """A volume was made, removed or renamed."""
        self.mtime_ns = self.ctime_ns = time.time_ns()

    def change(self, change: AttributeChange) -> None:
        """Change attributes, in memory."""
        if change.mode is not None:
            self.mode = _MODE_LEAST | change.mode & MODE_MASK
        self.uid = self.uid if change.uid is None else change.uid
        self.gid = self.gid if change.gid is None else change.gid
        self.atime_ns = self.atime_ns if change.atime_ns is None else storable_ns(change.atime_ns)
        self.mtime_ns = self.mtime_ns if change.mtime_ns is None else storable_ns(change.mtime_ns)
        self.ctime_ns = time.time_ns() if change.ctime_ns is None else storable_ns(change.ctime_ns)

    def take_back(self, before: tuple[int, ...]) -> None:
        """Be what :meth:`now` gave before."""
        self.mode, self.uid, self.gid, self.atime_ns, self.mtime_ns, self.ctime_ns = before

    def now(self) -> tuple[int, ...]:
        """All attributes."""
        return self.mode, self.uid, self.gid, self.atime_ns, self.mtime_ns, self.ctime_ns

    def kept(self) -> dict[str, int]:
        """What the catalog is to keep."""
        names = ["mode", "atime_ns", "mtime_ns", "ctime_ns", *(["uid", "gid"] if os.getuid() == 0 else [])]
        return {f"folder_{name}": getattr(self, name) for name in names}


def impossible_numbers(catalog: Catalog) -> list[str]:
    """What a catalog has of the folder and cannot be, in words."""
    highest = {"folder_mode": MODE_MASK, "folder_uid": _ID_MAX, "folder_gid": _ID_MAX}
    found = {key: catalog.meta(key, 0) for key in highest}
    return [f"its {key} is {found[key]}" for key in highest if not 0 <= found[key] <= highest[key]]


def _kept(catalog: Catalog, key: str, default: int, highest: int, if_impossible: int) -> int:
    value = catalog.meta(key, default)
    return value if 0 <= value <= highest else if_impossible
