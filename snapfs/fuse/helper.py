"""A process beside the daemon that makes the system calls the daemon needs made on its own mount.

Made by the daemon itself, such a call could not be given up when the daemon is killed: the thread
would wait for an answer of its own process, which could not end, and the mount would hang for ever.

Run as a file, with nothing of snapfs imported, so that it is small and there at once. It reads
requests from standard input and answers on standard output, a line of JSON each; it ends when the
daemon does.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

MNT_DETACH = 2


def fsync(paths: list[str]) -> None:
    """Have the kernel write back the pages of these files; one that is not there has none."""
    for path in paths:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            os.fsync(fd)
        except OSError as error:
            error.filename = path
            raise
        finally:
            os.close(fd)


def truncate(path: str, size_bytes: int) -> None:
    """Set a file's size."""
    os.truncate(path, size_bytes)


def set_size_and_times(path: str, size_bytes: int, atime_ns: int, mtime_ns: int) -> None:
    """Have the kernel, which trusts its own, take a file's size and times from the daemon."""
    if os.stat(path).st_size != size_bytes:
        os.truncate(path, size_bytes)
    os.utime(path, ns=(atime_ns, mtime_ns))


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


def detach(path: str, files: list[str]) -> None:
    """Take a busy mount away so that nothing new is opened, and then write back what these files hold."""
    fds = []
    for file in files:
        try:
            fds.append(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            continue
    try:
        unmount(path, True)
        for fd in fds:
            os.fsync(fd)
    finally:
        for fd in fds:
            os.close(fd)


CALLS: dict[str, Callable[..., int | None]] = {
    "fsync": fsync,
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
