"""Whose pool it is: root does for another user's pool nothing that this user could not do.

What a pool's databases say of programs to run, and of images and devices anywhere on the host, its owner can have them
say; and so can whoever may write to the pool's directory.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

from .backends import ANYBODY, Device, DirectoryDevice, open_local_image
from .formats import CATALOG_FILE, EMBEDDED_DEVICE_FOLDER, POOL_FILE
from .placement import OpenImage

OpenDevice = Callable[[str], Device]


def other_owner(home: Device) -> int | None:
    """The user whose pool it is; None if that is whoever runs this, or root, or cannot be told.

    ANYBODY when others than its user may write to its directory.
    """
    return home.foreign_uid([POOL_FILE, CATALOG_FILE])


def words_for(owner_uid: int) -> str:
    """That of :func:`other_owner`, in words."""
    if owner_uid == ANYBODY:
        return "others than its owner may write to the pool's directory"
    return f"the pool belongs to another user, {owner_uid}"


def image_opener(home: Device) -> OpenImage:
    """What opens the images of a pool: of another user's pool only those that are that user's own."""
    return partial(open_local_image, owner_uid=other_owner(home))


def device_opener(home: DirectoryDevice, *, writable: bool = True) -> OpenDevice:
    """Opens devices by path; the empty path is the one inside the pool.

    For another user's pool only those that are that user's own: others' pools lie on the others.
    """
    owner_uid = other_owner(home)
    allowed_uid = home.uid if owner_uid == ANYBODY else owner_uid

    def open_device(path: str) -> Device:
        device = DirectoryDevice(path or home.local_path(EMBEDDED_DEVICE_FOLDER), writable=writable)
        if allowed_uid not in (None, device.uid):
            device.close()
            raise PermissionError(errno.EPERM, "it is not its pool's owner's", path)
        return device

    return open_device
