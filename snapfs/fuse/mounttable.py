"""What is mounted where, by the kernel's table of mounts (proc(5), mountinfo): nobody's daemon is asked for it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

_LINKS_MAX = 40


class Mounted(NamedTuple):
    """A mount. ``device`` is the number that stat(2) tells of its files."""

    path: bytes
    device: int
    kind: bytes


def mounts() -> Iterator[Mounted]:
    """All of them; of several on one path the last is what is seen there."""
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            own, _, others = line.partition(b" - ")
            words = own.split(b" ")
            major, _, minor = words[2].partition(b":")
            path = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), words[4])
            yield Mounted(path, os.makedev(int(major), int(minor)), others.split(b" ", 1)[0])


def mounted_on(path: str) -> Mounted | None:
    """What is seen on a path, as :func:`real_mount_point` gives it; None if nothing is mounted there."""
    found = None
    for one in mounts():
        if one.path == os.fsencode(path):
            found = one
    return found


def real_mount_point(path: str) -> str:
    """A mount point without symbolic links. What is mounted there is not asked, which a stat would do."""
    path = os.path.abspath(path)
    for _ in range(_LINKS_MAX):
        folder, name = os.path.split(path)
        path = os.path.join(os.path.realpath(folder), name)
        try:
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        except OSError:
            break
    return path
