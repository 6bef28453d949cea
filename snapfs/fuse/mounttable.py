"""What is mounted where, by the kernel's table of mounts (proc(5), mountinfo): nobody's daemon is asked for it."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from . import helper


class Mounted(NamedTuple):
    """A mount. ``device`` is the number that stat(2) tells of its files."""

    mount_id: int
    path: str
    device: int
    kind: bytes
    source: bytes


def mounts(process: str = "self") -> Iterator[Mounted]:
    """All of them, as a process sees them. Raises OSError."""
    with open(f"/proc/{process}/mountinfo", "rb") as table:
        for line in table:
            own, _, others = line.partition(b" - ")
            words = own.split(b" ")
            path = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), words[4])
            kind, source, _ = others.split(b" ", 2)
            yield Mounted(int(words[0]), os.fsdecode(path), helper.device_in(words), kind, source)


def mounted_at(path: str) -> Mounted | None:
    """The mount that is seen on a path, or that the path lies in. Raises OSError."""
    mount_id = helper.mount_id_at(path)
    return next((one for one in mounts() if one.mount_id == mount_id), None)


def is_same(one: Mounted, other: Mounted) -> bool:
    """Whether two mounts are of one filesystem. The number of one that has gone may be the next one's, of any kind."""
    return one.device == other.device and one.kind == other.kind and one.source == other.source


def process_elsewhere(found: Mounted) -> int | None:
    """A process in another mount namespace that sees the filesystem of a mount, as far as one may know."""
    own = os.stat("/proc/self/ns/mnt").st_ino
    looked_at = {own}
    for process in filter(str.isdigit, os.listdir("/proc")):
        # It may end meanwhile, or be somebody else's.
        with contextlib.suppress(OSError):
            namespace = os.stat(f"/proc/{process}/ns/mnt").st_ino
            if namespace not in looked_at:
                looked_at.add(namespace)
                if any(is_same(one, found) for one in mounts(process)):
                    return int(process)
    return None
