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
from collections.abc import Callable

MNT_DETACH = 2


def opened(device: int, path: str, flags: int) -> int:
    """A file of the daemon's mount, which has this device number. Raises OSError, ESTALE for one of another."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    if os.fstat(fd).st_dev != device:
        os.close(fd)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
    return fd


def fsync(device: int, paths: list[str]) -> list[str]:
    """Have the kernel write back the pages of these files; those that cannot be opened are given back."""
    unopened = []
    for path in paths:
        try:
            fd = opened(device, path, os.O_RDONLY)
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


def check_writable(device: int, paths: list[str]) -> None:
    """Raises OSError when one of these files cannot be written to: ETXTBSY for a program that runs."""
    for path in paths:
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


def unmount(path: str, lazy: bool) -> None:
    """Take a mount away."""
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


def detach(device: int, path: str, files: list[str]) -> list[str]:
    """Take a busy mount away so that nothing new is opened, and then write back what these files hold.

    Those that cannot be opened are given back. Raises OSError, when all others are written back.
    """
    fds, unopened = [], []
    for file in files:
        try:
            fds.append(opened(device, file, os.O_RDONLY))
        except OSError:
            unopened.append(file)
    failure = None
    try:
        unmount(path, True)
        for fd in fds:
            try:
                os.fsync(fd)
            except OSError as error:
                failure = error
    finally:
        for fd in fds:
            os.close(fd)
    if failure is not None:
        raise failure
    return unopened


CALLS: dict[str, Callable[..., int | list[str] | None]] = {
    "fsync": fsync,
    "check_writable": check_writable,
    "truncate": truncate,
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
