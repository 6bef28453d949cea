"""``snapfs umount``."""

from __future__ import annotations

import errno
import json
import os
import re
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
    if lazy:
        # Not asked for anything: it may be a daemon that does not answer.
        _check_is_mounted(mount_point)
        unmount(mount_point, lazy=True)
        return
    pid = _daemon_pid(mount_point)
    unmount(mount_point)
    if pid is not None:
        _wait_for_end(pid)


def _check_is_mounted(mount_point: str) -> None:
    """Raises MountError when no snapfs is mounted there, by what the kernel's table of mounts says (proc(5))."""
    path = os.path.abspath(mount_point)
    # Not the mount point itself: to look at that is to ask the daemon.
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            own, _, others = line.partition(b" - ")
            shown = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), own.split(b" ")[4])
            if shown == os.fsencode(path) and others.startswith(b"fuse.snapfs "):
                return
    raise MountError(f"no snapfs is mounted on {mount_point}")


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
