"""``snapfs umount``."""

from __future__ import annotations

import errno
import json
import os
import select

import click

from ..errors import MountError
from ..mountpoint import unmount


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.option("--lazy", "-l", is_flag=True, help="Take a busy mount away now; it ends when its last file is closed.")
def umount(mount_point: str, lazy: bool) -> None:
    """Unmount MOUNT, and wait until all is durable and the pool is closed."""
    take_away(mount_point, lazy=lazy)


def take_away(mount_point: str, *, lazy: bool = False) -> None:
    """Unmount, and wait for the daemon's end if not ``lazy``. Raises MountError."""
    pid = _daemon_pid(mount_point)
    unmount(mount_point, lazy=lazy)
    if pid is not None and not lazy:
        _wait_for_end(pid)


def _daemon_pid(mount_point: str) -> int | None:
    """The process behind a mount; None for a mount whose daemon is dead. Raises MountError if none is there."""
    try:
        with open(os.path.join(mount_point, ".snapfs", "status.json")) as status:
            return int(json.load(status)["pid"])
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return None
        raise MountError(f"no snapfs is mounted on {mount_point} ({error.strerror})") from error


def _wait_for_end(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([fd], [], [])
    finally:
        os.close(fd)
