"""Whose a pool is: nobody opens a pool that another user could have made what it is.

Whoever may write to a pool's directory can have its databases name programs to run, and images and devices anywhere on
the host, which root would run and open. As ssh(1) does with its files, and git(1) with repositories (safe.directory).
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from .backends import ANYBODY, Device, DirectoryDevice
from .errors import ForeignPoolError, UnreadableError
from .formats import CATALOG_FILE, EMBEDDED_DEVICE_FOLDER, POOL_FILE

OpenDevice = Callable[[str], Device]


def check_own(home: Device, where: str) -> None:
    """Raises ForeignPoolError for a pool that is neither root's nor that of whoever runs this, or not theirs alone."""
    uid = home.foreign_uid([POOL_FILE, CATALOG_FILE])
    if uid == ANYBODY:
        raise ForeignPoolError(
            f"others than its owner may write to {where}, and could have the pool do anything",
            f"See that nobody has put anything there, then: chmod -R go-w {where}",
        )
    if uid is not None:
        raise ForeignPoolError(
            f"the pool in {where} is another user's, {uid}, who could have it do anything",
            f"Run this as that user; or give the pool to root, with its devices: chown -R root {where}",
        )


def make_private(device: Device, path: str) -> None:
    """Let nobody else into a directory that is to be a pool's. Raises UnreadableError when it is not one's own."""
    try:
        device.make_private()
    except OSError as error:
        raise UnreadableError(f"{path} cannot be used: {error.strerror}", "Give a directory of your own") from error


def device_opener(home: DirectoryDevice, *, writable: bool = True) -> OpenDevice:
    """Opens devices by path; the empty path is the one inside the pool. Others' are refused."""

    def open_device(path: str) -> Device:
        device = DirectoryDevice(path or home.local_path(EMBEDDED_DEVICE_FOLDER), writable=writable)
        try:
            uid = device.foreign_uid([])
            if uid not in (None, ANYBODY):
                raise PermissionError(errno.EPERM, f"it is another user's, {uid}", path)
        except BaseException:
            device.close()
            raise
        return device

    return open_device
