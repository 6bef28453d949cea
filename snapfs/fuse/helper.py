"""A process beside the daemon that makes the system calls the daemon needs made on its own mount.

Made by the daemon itself, such a call could not be given up when the daemon is killed: the thread
would wait for an answer of its own process, which could not end, and the mount would hang for ever.

Run as a file, with nothing of snapfs imported, so that it is small and there at once. It reads
requests from standard input and answers on standard output, a line of JSON each; it ends when the
daemon does.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

MNT_DETACH = 2


# So long something is tried again that may be over soon.
PATIENCE_S = 1.0
_RETRY_S = 0.005
# Somebody else has looked at a file since the kernel was told that the helper may open it; a lease is given up.
_MAY_BE_OVER_SOON = (errno.EACCES, errno.EPERM, errno.EAGAIN)


def patiently(call: Callable[..., T]) -> Callable[..., T]:
    """The same call, made again while what keeps it from being done may be over soon."""

    def run(*arguments: object) -> T:
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return call(*arguments)
            except OSError as error:
                if error.errno not in _MAY_BE_OVER_SOON or time.monotonic() > end:
                    raise
            time.sleep(_RETRY_S)

    return run


def opened(device: int, path: str, flags: int, folder: int | None = None) -> int:
    """A file of the daemon's mount, which has this device number. Raises OSError, ESTALE for one of another."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    if os.fstat(fd).st_dev != device:
        os.close(fd)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
    return fd


def fsync(device: int, paths: list[str]) -> list[str]:
    """Have the kernel write back the pages of these files; those that cannot be opened are given back."""
    unopened = []
    for path in paths:
        try:
            fd = patiently(opened)(device, path, os.O_RDONLY)
        except OSError:
            unopened.append(path)
            continue
        try:
            os.fsync(fd)
        except OSError as error:
            error.filename = path
            raise
        finally:
            os.close(fd)
    return unopened


def check_writable(device: int, path: str) -> None:
    """Raises OSError when a file cannot be written to: ETXTBSY for a program that runs."""
    os.close(opened(device, path, os.O_WRONLY))


def truncate(device: int, path: str, size_bytes: int) -> None:
    """Set a file's size."""
    fd = opened(device, path, os.O_WRONLY)
    try:
        os.ftruncate(fd, size_bytes)
    finally:
        os.close(fd)


def set_size_and_times(device: int, path: str, size_bytes: int, atime_ns: int, mtime_ns: int) -> None:
    """Have the kernel, which trusts its own, take a file's size and times from the daemon."""
    fd = opened(device, path, os.O_RDONLY)
    try:
        if os.fstat(fd).st_size != size_bytes:
            truncate(device, path, size_bytes)
        os.utime(fd, ns=(atime_ns, mtime_ns))
    finally:
        os.close(fd)


def device_of(path: str) -> int:
    """The device number of the filesystem that a path is on."""
    return os.stat(path).st_dev


def mount_id_at(path: str) -> int:
    """The mount that is seen on a path, by its number in proc(5), mountinfo. Its daemon is not asked, as by a stat."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
            return next(int(line[7:]) for line in info if line.startswith(b"mnt_id:"))
    finally:
        os.close(fd)


def device_in(words: list[bytes]) -> int:
    """The device number in the words of a line of mountinfo."""
    major, _, minor = words[2].partition(b":")
    return os.makedev(int(major), int(minor))


def is_seen_on(device: int, path: str) -> bool:
    """Whether the mount with this device number is what is seen on a path."""
    try:
        mount_id = mount_id_at(path)
    except OSError:
        return False
    with open("/proc/self/mountinfo", "rb") as table:
        lines = (line.split(b" ", 3) for line in table)
        return any(int(words[0]) == mount_id and device_in(words) == device for words in lines)


def unmount(path: str, lazy: bool, device: int | None = None) -> None:
    """Take a mount away. Raises OSError, ESTALE when another than that with the device number is seen there."""
    if device is not None and not is_seen_on(device, path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(path), MNT_DETACH if lazy else 0) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)
        return
    done = subprocess.run(
        ["fusermount3", "-u", *(["-z"] if lazy else []), "--", path], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OSError(16 if "busy" in done.stderr else 22, done.stderr.strip(), path)


def detach(device: int, path: str, folder: str, files: list[str]) -> list[str]:
    """Take a busy mount away so that nothing new is opened, and then write back what these files of a folder hold.

    One after the other, so that the daemon knows at which it is; the folder is held open meanwhile. Those that cannot
    be opened are given back. Raises OSError, when all others are written back; ESTALE, with nothing done, when the
    mount is not seen there.
    """
    if not is_seen_on(device, path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
    unopened = []
    failure = None
    folder_fd = opened(device, folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        unmount(path, True, device)
        for file in files:
            try:
                fd = patiently(opened)(device, file, os.O_RDONLY, folder_fd)
            except OSError:
                unopened.append(file)
                continue
            try:
                os.fsync(fd)
            except OSError as error:
                failure = error
            finally:
                os.close(fd)
    finally:
        os.close(folder_fd)
    if failure is not None:
        raise failure
    return unopened


CALLS: dict[str, Callable[..., int | bool | list[str] | None]] = {
    "is_seen_on": is_seen_on,
    "fsync": fsync,
    "check_writable": patiently(check_writable),
    "truncate": patiently(truncate),
    # Not patiently: the size and the times may be others by then.
    "set_size_and_times": set_size_and_times,
    "device_of": device_of,
    "unmount": unmount,
    "detach": detach,
}


def main() -> None:
    """Serve until the daemon closes its end.

    Signals for a whole group are the daemon's: it still needs the helper to write all back.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        answer: dict[str, object]
        try:
            answer = {"result": CALLS[request["call"]](*request["arguments"])}
        except OSError as error:
            answer = {"errno": error.errno, "words": error.strerror, "path": error.filename}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
