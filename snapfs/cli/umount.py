"""``snapfs umount``."""

from __future__ import annotations

import errno
import json
import os
import select
from typing import Any

import click

from ..errors import MountError, SnapfsError
from ..fuse.mounttable import Mounted, is_same, mounted_at, mounts, process_elsewhere
from ..mountpoint import unmount
from .control import ask

_LOOK_S = 1.0
_LOOKS = 3


@click.command()
# No path to click, which looks at it, and waits for a daemon that does not answer.
@click.argument("mount_point", metavar="MOUNT")
@click.option("--lazy", "-l", is_flag=True, help="Take a busy mount away now; it ends when its last file is closed.")
def umount(mount_point: str, lazy: bool) -> None:
    """Unmount MOUNT, and wait until all is durable and the pool is closed."""
    take_away(mount_point, lazy=lazy)


def take_away(mount_point: str, *, lazy: bool = False) -> None:
    """Unmount, and wait for the daemon's end if not ``lazy``. Raises MountError."""
    if lazy:
        # Not asked for anything: it may be a daemon that does not answer.
        _check_is_mounted(mount_point)
        unmount(mount_point, lazy=True)
        return
    status = _daemon_status(mount_point)
    pid = None if status is None else int(status["pid"])
    found = mounted_at(mount_point)
    if status is not None and status["space"]["reserve_spent"]:
        _make_durable(mount_point)
    unmount(mount_point)
    if pid is not None:
        _wait_for_end(pid, mount_point, found)


def _make_durable(mount_point: str) -> None:
    """As long as something can be done about it: the daemon does the same at its end. Raises MountError for no room.

    Where the reserve is there, the daemon needs no more than that; and a device that hangs would be waited for.
    """
    try:
        ask(mount_point, "sync")
    except (SnapfsError, OSError) as error:
        # One that takes no commands has nothing to write, and what a failed sync has lost stays so.
        if error.errno != errno.ENOSPC:
            return
        failed = MountError(
            f"{mount_point} stays mounted: not all that was written can be made durable ({error})",
            "Delete snapshots or free space on the device, then try again; unmounted with --lazy it is lost",
        )
        failed.errno = errno.ENOSPC
        raise failed from error


def _check_is_mounted(mount_point: str) -> None:
    """Raises MountError when no snapfs is mounted there, by what the kernel's table of mounts says."""
    try:
        found = mounted_at(mount_point)
    except OSError as error:
        raise MountError(f"no snapfs is mounted on {mount_point} ({error.strerror})") from error
    if found is None or found.kind != b"fuse.snapfs":
        raise MountError(f"no snapfs is mounted on {mount_point}")


def _daemon_status(mount_point: str) -> dict[str, Any] | None:
    """What a mount tells of itself; None for one whose daemon is dead. Raises MountError if none is there."""
    try:
        with open(os.path.join(mount_point, ".snapfs", "status.json")) as status:
            return dict(json.load(status))
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return None
        raise MountError(f"no snapfs is mounted on {mount_point} ({error.strerror})") from error


def _wait_for_end(pid: int, mount_point: str, found: Mounted | None) -> None:
    """Raises MountError when the daemon does not end, for its filesystem is mounted elsewhere too."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    looks = 0
    try:
        while not select.select([fd], [], [], _LOOK_S)[0]:
            looks += 1
            # A namespace may be on its way out.
            place = None if found is None else _seen_elsewhere(found, also_by_others=looks >= _LOOKS)
            if place is not None:
                raise MountError(
                    f"{mount_point} is unmounted, but the pool stays open: it is seen {place} too",
                    "Unmount that as well, and the daemon ends by itself; or end the daemon with SIGTERM, which has all"
                    f" written back (process {pid})",
                )
    finally:
        os.close(fd)


def _seen_elsewhere(found: Mounted, *, also_by_others: bool) -> str | None:
    """Where else a filesystem is seen, in words; ``also_by_others``: by processes of other mount namespaces too."""
    places = [one.path for one in mounts() if is_same(one, found) and one.mount_id != found.mount_id]
    if places:
        return f"on {min(places)!r}"
    if not also_by_others:
        return None
    process = process_elsewhere(found)
    return None if process is None else f"in the mount namespace of process {process}"
