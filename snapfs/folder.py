"""The attributes of the folder that volumes lie in: mode, owner and times, kept in the catalog's meta table."""

from __future__ import annotations

import os
import time

from .catalog import Catalog
from .errors import DamagedError
from .formats import CATALOG_FILE, AttributeChange
from .units import storable_ns

MODE_MASK = 0o1777
_MODE_DEFAULT = 0o755
# Its owner always may: the daemon itself comes to its volumes through it.
_MODE_LEAST = 0o700
_ID_MAX = (1 << 32) - 2


class Folder:
    """The folder of one pool. It is the daemon's user's until root gives it to somebody else.

    Raises DamagedError when what the catalog has of it is not what was put there.
    """

    def __init__(self, catalog: Catalog) -> None:
        now_ns = time.time_ns()
        self.mode = _MODE_LEAST | _between(catalog.meta("folder_mode", _MODE_DEFAULT), MODE_MASK)
        self.uid, self.gid = os.getuid(), os.getgid()
        if self.uid == 0:
            self.uid = _between(catalog.meta("folder_uid", self.uid), _ID_MAX)
            self.gid = _between(catalog.meta("folder_gid", self.gid), _ID_MAX)
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

    def take_back(self, kept: dict[str, int]) -> None:
        """Be what :meth:`kept` gave before."""
        for key, value in kept.items():
            setattr(self, key.removeprefix("folder_"), value)

    def kept(self) -> dict[str, int]:
        """What the catalog is to keep."""
        names = ["mode", "atime_ns", "mtime_ns", "ctime_ns", *(["uid", "gid"] if os.getuid() == 0 else [])]
        return {f"folder_{name}": getattr(self, name) for name in names}


def _between(value: int, highest: int) -> int:
    if not 0 <= value <= highest:
        raise DamagedError(f"{CATALOG_FILE} has {value} for the volumes' folder", "Restore it from a copy")
    return value
