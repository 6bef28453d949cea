"""Whose pool it is: root does for another user's pool nothing that this user could not do.

What a pool's databases say of programs to run, and of images anywhere on the host, its owner can have them say.
"""

from __future__ import annotations

import os
from functools import partial

from .backends import Device, open_local_image
from .placement import OpenImage


def other_owner(home: Device) -> int | None:
    """The user whose pool it is; None if that is whoever runs this, or root, or cannot be told."""
    path = home.local_path("")
    if path is None:
        return None
    uid = os.stat(path).st_uid
    return None if uid in (0, os.geteuid()) else uid


def image_opener(home: Device) -> OpenImage:
    """What opens the images of a pool: of another user's pool only those that are that user's own."""
    return partial(open_local_image, owner_uid=other_owner(home))
