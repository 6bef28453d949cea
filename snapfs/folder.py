"""The attributes of the folder that volumes lie in: mode, owner and times, kept in the catalog's meta table."""

from __future__ import annotations

import os
import time
from typing import TypeVar

from .catalog import Catalog
from .errors import DamagedError
from .formats import AttributeChange
from .units import storable_ns

T = TypeVar("T")

MODE_MASK = 0o3777
_MODE_DEFAULT = 0o755
# Its owner always may: the daemon itself comes to its volumes through it.
_MODE_LEAST = 0o700
_ID_MAX = (1 << 32) - 2
_LIMITS = {
    "folder_mode": (0, MODE_MASK),
    "folder_uid": (0, _ID_MAX),
    "folder_gid": (0, _ID_MAX),
    **dict.fromkeys(("folder_atime_ns", "folder_mtime_ns", "folder_ctime_ns"), (-(1 << 63), (1 << 63) - 1)),
}


class Folder:
    """The folder of one pool. It is the daemon's user's until root gives it to somebody else, or its user to a group.

    What the catalog has of it and cannot be is taken for nothing, but for a mode, which then lets in its owner alone.
    """

    def __init__(self, catalog: Catalog) -> None:
        now_ns = time.time_ns()
        self.mode = _MODE_LEAST | _kept(catalog, "folder_mode", _MODE_DEFAULT, _MODE_LEAST)
        self.uid, self.gid = os.getuid(), os.getgid()
        if self.uid == 0:
            self.uid = _kept(catalog, "folder_uid", self.uid, self.uid)
        gid = _kept(catalog, "folder_gid", self.gid, self.gid)
        if os.getuid() == 0 or gid in os.getgroups():
            self.gid = gid
        self.atime_ns = _kept(catalog, "folder_atime_ns", now_ns, now_ns)
        self.mtime_ns = _kept(catalog, "folder_mtime_ns", now_ns, now_ns)
        self.ctime_ns = _kept(catalog, "folder_ctime_ns", now_ns, now_ns)

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
        names = ["mode", "gid", "atime_ns", "mtime_ns", "ctime_ns", *(["uid"] if os.getuid() == 0 else [])]
        return {f"folder_{name}": getattr(self, name) for name in names}


def impossible_numbers(catalog: Catalog) -> list[str]:
    """What a catalog has of the folder and cannot be, in words."""
    return [f"its {key} cannot be" for key in _LIMITS if _kept(catalog, key, 0, None) is None]


def _kept(catalog: Catalog, key: str, default: int, if_impossible: T) -> int | T:
    try:
        value = catalog.meta(key, default)
    except DamagedError:
        # It is no number.
        return if_impossible
    low, high = _LIMITS[key]
    return value if low <= value <= high else if_impossible
