"""Who a pool is, before it is opened: its directory, its descriptor, and its lock.

Imports little: a command that looks whether there is a pool, and whose, takes no longer for all that a pool is made of.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time

from .backends import Device, DirectoryDevice, LockHolder
from .errors import InUseError, NotAPoolError, UnreadableError
from .formats import LOCK_FILE, POOL_FILE, PoolDescriptor
from .ownership import check_own
from .units import check_path, iso_time


def open_home(where: str, *, writable: bool = True) -> DirectoryDevice:
    """The pool's directory. Raises NotAPoolError when it is not there, UnreadableError when it cannot be read.

    BadNameError for a path that is not text in UTF-8, which SQLite does not open; ForeignPoolError.
    """
    check_path(where)
    try:
        home = DirectoryDevice(where, writable=writable)
        try:
            check_own(home, where)
        except BaseException:
            home.close()
            raise
        return home
    except (FileNotFoundError, NotADirectoryError):
        raise NotAPoolError(f"there is no directory {where}", "Make a pool with snapfs init") from None
    except OSError as error:
        raise UnreadableError(f"{where} cannot be opened: {error.strerror}") from error


def read_descriptor(home: Device, where: str) -> PoolDescriptor:
    """The pool's descriptor. Raises NotAPoolError, TooNewError, DamagedError or UnreadableError."""
    try:
        contents = home.read_file(POOL_FILE)
    except FileNotFoundError:
        raise NotAPoolError(f"{where} holds no pool", "Make one with snapfs init") from None
    except OSError as error:
        if error.errno == errno.EROFS:
            raise UnreadableError(
                f"{where} lies on a filesystem that takes no writes",
                "Mount that for writing; or look at the pool with mount -o rescue, or check",
            ) from error
        raise UnreadableError(f"{where}/{POOL_FILE} cannot be read: {error}") from error
    return PoolDescriptor.from_json(contents, where)


def lock_pool(home: Device, where: str, purpose: str) -> None:
    """Take the pool's lock. Raises InUseError, which names the process that has it."""
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "purpose": purpose, "since": iso_time(time.time_ns())}
    try:
        home.lock(LOCK_FILE, json.dumps(holder))
    except LockHolder as busy:
        raise InUseError(
            f"{where} is in use by {_describe(busy.holder)}", "Unmount it there first, with snapfs umount"
        ) from None


def claim_device(device: Device, where: str) -> None:
    """Keep other processes out of a device that lies outside of the pool's directory. Raises InUseError."""
    try:
        device.claim()
    except LockHolder:
        raise InUseError(
            f"the device {where} is in use by another process, which has a copy of the pool's directory",
            "Unmount that one first; mount the one that was used last",
        ) from None


def _describe(holder: str) -> str:
    try:
        fields = json.loads(holder)
        if fields["host"] == socket.gethostname() and not _is_running(int(fields["pid"])):
            # It was killed; who has the pool now only reads it, and leaves no name.
            return "another process, which does not say which"
        return f"process {fields['pid']} on {fields['host']} ({fields['purpose']}, since {fields['since']})"
    except (ValueError, TypeError, KeyError, OverflowError):
        return "another process"


def _is_running(pid: int) -> bool:
    try:
        # Asks alone. Not by /proc, which may hide those of others.
        os.kill(max(1, pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
