"""Why the daemon of a mount does not answer, as far as the kernel tells (proc(5)), which is more to root."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from ..errors import SilentDaemonError

T = TypeVar("T")

ANSWER_S = 5.0
_STATES = {"T": "it is stopped", "t": "it is being traced", "Z": "it has ended"}


class _Thread(NamedTuple):
    """The main thread of a daemon: what it does, and for how long it has not run."""

    doing: str
    age_s: float | None


def answered_soon(mount_point: str, ask: Callable[[], T]) -> T:
    """What a question to the daemon gives. Raises SilentDaemonError when there is no answer for 5 s."""
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(ask())
        except BaseException as error:  # noqa: BLE001 - it is raised below
            failed.append(error)

    # It may wait for ever; as a daemon thread it ends with the process.
    waiting = threading.Thread(target=run, daemon=True)
    waiting.start()
    waiting.join(ANSWER_S)
    if failed:
        raise failed[0]
    if not found:
        raise SilentDaemonError(
            f"the daemon of {mount_point} has not answered for {ANSWER_S:.0f} s{_told_of(mount_point)}",
            "Mend what it waits for; snapfs umount --lazy takes the mount away meanwhile",
        )
    return found[0]


def _told_of(mount_point: str) -> str:
    pid = _daemon_of(os.path.abspath(mount_point))
    if pid is None:
        return ""
    thread = _main_thread(pid)
    age = "" if thread.age_s is None else f" for {thread.age_s:.0f} s"
    return f": process {pid}, {thread.doing}{age}"


def _daemon_of(mount_point: str) -> int | None:
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            words = _contents(f"/proc/{name}/cmdline").split("\0")
            is_daemon = "mount" in words and any("snapfs" in word for word in words)
            # Not looked at, which might wait for the daemon.
            if is_daemon and mount_point in (os.path.abspath(word) for word in words if word):
                return int(name)
    return None


def _main_thread(pid: int) -> _Thread:
    folder = f"/proc/{pid}/task/{pid}"
    state = _contents(f"{folder}/stat").rpartition(") ")[2][:1]
    path = _file_of_call(pid)
    doing = _STATES.get(state) or (f"waits in a call to the system for {path}" if path else "waits for a request")
    last_ms, now_ms = _last_run_ms(folder), _last_run_ms("/proc/thread-self")
    return _Thread(doing, None if last_ms is None or now_ms is None else max(0.0, now_ms - last_ms) / 1000)


def _file_of_call(pid: int) -> str | None:
    """The file or folder that the main thread's call to the system is about, by its first argument."""
    words = _contents(f"/proc/{pid}/syscall").split()
    try:
        path = os.readlink(f"/proc/{pid}/fd/{int(words[1], 16)}")
    except (IndexError, ValueError, OSError):
        return None
    # A socket, say, or what it waits on for requests has no path.
    return path if path.startswith("/") else None


def _last_run_ms(folder: str) -> float | None:
    """When a thread was last given a processor, in milliseconds of the scheduler's clock."""
    for line in _contents(f"{folder}/sched").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "se.exec_start":
            return float(value)
    return None


def _contents(path: str) -> str:
    """What is told, nothing when it may not be."""
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""
