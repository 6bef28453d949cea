"""The files that a file or a block device lies on in the end: through loop devices, partitions and stacked devices.

As sysfs tells (https://www.kernel.org/doc/Documentation/ABI/testing/sysfs-block, and ``sysfs-devices`` for slaves).
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator

_SYS = "/sys/dev/block"
# What the kernel writes behind the path of a file whose name is gone.
_DELETED = " (deleted)"


def files_beneath(path: str, sys_folder: str = _SYS) -> set[str]:
    """The paths of the files that loop devices under a path stand on. What cannot be looked at has none."""
    found: set[str] = set()
    with contextlib.suppress(OSError):
        _collect(path, sys_folder, found)
    return found


def _collect(path: str, sys_folder: str, found: set[str]) -> None:
    status = os.stat(path)
    # A block device itself; or the one that the file's filesystem lies on.
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    folder = os.path.join(sys_folder, f"{os.major(device)}:{os.minor(device)}")
    if os.path.isdir(folder):
        beneath = list(_backing_files(os.path.realpath(folder), set()))
    else:
        # A filesystem of several devices, or over others, as btrfs and overlay.
        beneath = _under_mount(os.path.realpath(path))
    for one in beneath:
        if one not in found:
            found.add(one)
            with contextlib.suppress(OSError):
                _collect(one, sys_folder, found)


def _under_mount(path: str) -> list[str]:
    """What the mount that a file is on was made of: a device, or the folders that lie over each other (proc(5))."""
    best: list[str] = []
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        for line in file:
            fields = line.split()
            mount_point = _unescaped(fields[4])
            if (path + os.sep).startswith(mount_point.rstrip("/") + os.sep) and (
                not best or len(mount_point) >= len(_unescaped(best[4]))
            ):
                # The last of several on one folder is the one that is seen.
                best = fields
    if not best:
        return []
    source, options = best[best.index("-") + 2 :][:2]
    folders = [
        folder
        for option in options.split(",")
        if option.startswith(("lowerdir=", "upperdir="))
        for folder in option.partition("=")[2].split(":")
    ]
    return [one for one in map(_unescaped, [source, *folders]) if one.startswith("/")]


def _unescaped(text: str) -> str:
    """A path as the kernel wrote it there: blanks and the like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _backing_files(folder: str, seen: set[str]) -> Iterator[str]:
    """Of a device by its folder in sysfs: its own backing file, its disk's if it is a partition, those of its parts."""
    if folder in seen or not os.path.isdir(folder):
        return
    seen.add(folder)
    backing_file = os.path.join(folder, "loop", "backing_file")
    with contextlib.suppress(OSError), open(backing_file, errors="surrogateescape") as told:
        yield told.read().rstrip("\n").removesuffix(_DELETED)
    if os.path.exists(os.path.join(folder, "partition")):
        yield from _backing_files(os.path.dirname(folder), seen)
    with contextlib.suppress(FileNotFoundError):
        for one in os.listdir(os.path.join(folder, "slaves")):
            yield from _backing_files(os.path.realpath(os.path.join(folder, "slaves", one)), seen)
