"""Where a pool is to be mounted and how, before the daemon is there; and how a mount is taken away.

Imports little, as a command does that only starts a daemon or ends one.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import BadCommandError, DamagedError, DeviceMissingError, MountError
from .fuse import helper

KNOWN_OPTIONS = frozenset(
    {"allow_other", "allow_root", "ro", "rw", "auto_unmount", "noexec", "exec", "noatime", "rescue"}
)
# What mount(8) and fstab(5) say to any filesystem, and what is so anyway: set-id bits and devices never count.
_OF_NO_EFFECT = frozenset(
    {"defaults", "relatime", "nosuid", "nodev", "suid", "dev", "auto", "noauto", "nofail", "_netdev", "user", "users"}
)
_CONTROL_GROUP = "control_group="
_RESCUE = "copy out what is left, from snapfs mount -o rescue"
# (gid_t)-1, which stands for none.
_GID_NONE = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class MountRequest:
    """What to mount where. ``options`` are those of ``-o``."""

    pool_path: str
    mount_point: str
    options: frozenset[str] = field(default_factory=frozenset)

    @property
    def is_rescue(self) -> bool:
        """Whether what is left of a damaged pool is to be read."""
        return "rescue" in self.options


def check_options(options: frozenset[str]) -> None:
    """Raises BadCommandError for options that snapfs does not have, MountError for groups that are not there."""
    control_gid(options)
    unknown = sorted(one for one in options - KNOWN_OPTIONS - _OF_NO_EFFECT if not one.startswith(_CONTROL_GROUP))
    if unknown:
        known = ", ".join([*sorted(KNOWN_OPTIONS), f"{_CONTROL_GROUP}GROUP"])
        raise BadCommandError(f"there is no mount option {unknown[0]!r}", f"Options: {known}")


def control_gid(options: frozenset[str]) -> int | None:
    """The group that may write the control file, by name or number; None without. Raises MountError."""
    given = [one.removeprefix(_CONTROL_GROUP) for one in options if one.startswith(_CONTROL_GROUP)]
    if not given:
        return None
    if len(given) > 1:
        raise MountError("control_group is given more than once", "Give one group")
    try:
        return grp.getgrnam(given[0]).gr_gid
    except (KeyError, ValueError):
        if given[0].isascii() and given[0].isdigit() and len(given[0]) <= 10 and int(given[0]) < _GID_NONE:
            return int(given[0])
        raise MountError(f"there is no group {given[0][:64]!r}", "Give a group's name or number") from None


def check_mount_point(request: MountRequest) -> None:
    """Raises MountError when nothing can be mounted there. A dead mount that is there is taken away."""
    path = request.mount_point
    try:
        # Asks the daemon, where a stat would be answered from the kernel's cache.
        os.statvfs(path)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise MountError(
                f"{path} is not a directory to mount on: {error.strerror}", "Make it with mkdir"
            ) from error
        # Left by a daemon that was killed.
        unmount(path, lazy=True)
    if not os.path.isdir(path):
        raise MountError(f"{path} is not a directory", "Mount on a directory")
    if os.path.ismount(path):
        raise MountError(f"something is mounted on {path} already", "Unmount it, or choose another directory")
    if os.listdir(path):
        raise MountError(f"{path} is not empty", "Mount on an empty directory, so that nothing is hidden")
    inside = os.path.realpath(request.pool_path) + os.sep
    if (os.path.realpath(path) + os.sep).startswith(inside):
        raise MountError(f"{path} lies inside the pool", "Mount outside of it")


def unmount(path: str, *, lazy: bool = False) -> None:
    """Take a mount away. Raises MountError, with the errno of a busy one."""
    path = os.path.abspath(path)
    try:
        helper.unmount(path, lazy)
    except OSError as error:
        busy = error.errno == errno.EBUSY
        fix = "Close what uses it (see with: fuser -m), or unmount with --lazy" if busy else ""
        failed = MountError(f"{path} cannot be unmounted: {error.strerror}", fix)
        failed.errno = error.errno or failed.errno
        raise failed from error


@contextlib.contextmanager
def offering_rescue(request: MountRequest) -> Iterator[None]:
    """Whoever learns inside that something of the pool is lost is told how to have the rest of it."""
    try:
        yield
    except (DamagedError, DeviceMissingError) as error:
        if not request.is_rescue:
            error.fix = "; or ".join([*filter(None, [error.fix]), _RESCUE])
        raise
