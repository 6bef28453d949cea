"""A process that freezes applications for a snapshot, and thaws them whatever happens.

Run as a file, beside the daemon and in a session of its own, with nothing of snapfs imported. It reads its
plan, a line of JSON, from standard input; runs the programs that freeze; tells so on standard output;
waits for a word of the daemon, for the end of its input (which the kernel brings also when the daemon
was killed), or until the longest time is over; runs those that thaw, in turned order; and tells what came of it. Each
program is told of as it begins and ends, so that the daemon can go on where this process is killed.

It touches no file once something is frozen, for that may be the filesystem the file is on, and it waits for no
program for ever: one that does not even end when it is killed is left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import time
from typing import Any

_OUTPUT_BYTES_MAX = 1000
_KILLED_WAIT_S = 1.0
_LOCK_PERIOD_S = 0.02


def tell(**document: Any) -> None:
    """Tell the daemon, if it is still there."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(document).encode() + b"\n")


def run(hook: dict[str, Any], phase: str, plan: dict[str, Any], limit_s: float) -> tuple[str, str]:
    """Run one program of a hook; why it failed, empty if it did not, and what it said then."""
    if not hook[phase]:
        return "", ""
    try:
        return _run(hook, phase, plan, limit_s)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other programs are still to be run
        # What the program is, which an error of the system may tell, is not for everyone: it goes with what it says.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        return f"{phase} cannot be run: {reason}", str(error)
    finally:
        tell(ended=hook["name"], phase=phase)


def _run(hook: dict[str, Any], phase: str, plan: dict[str, Any], limit_s: float) -> tuple[str, str]:
    command = hook[phase]
    reading, writing = os.pipe()
    try:
        # First, for whoever kills this process right behind the start leaves it to the daemon to have it thawed.
        tell(begun=hook["name"], phase=phase, pid=0)
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command] if hook["shell"] else command,
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                cwd="/",
                env={**plan["environment"], "SNAPFS_PHASE": phase, "SNAPFS_HOOK": hook["name"]},
                start_new_session=True,
            )
        finally:
            os.close(writing)
        tell(begun=hook["name"], phase=phase, pid=process.pid)
        output = bytearray()
        if not _has_ended(process, reading, output, limit_s):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not _has_ended(process, reading, output, _KILLED_WAIT_S):
                return f"{phase} took longer than {limit_s:.3g} s and could not even be killed", ""
            return f"{phase} took longer than {limit_s:.3g} s and was ended", ""
    finally:
        os.close(reading)
    code = process.wait()
    if code == 0:
        return "", ""
    said = "".join(one if one.isprintable() else " " for one in bytes(output).decode(errors="replace")).strip()
    return f"{phase} ended with {code}", said


def _has_ended(process: subprocess.Popen[bytes], reading: int, output: bytearray, limit_s: float) -> bool:
    """Whether a program ends in time; what it says is kept up to a bound, and all of it is taken."""
    until = time.monotonic() + max(0.0, limit_s)
    ended = os.pidfd_open(process.pid)
    try:
        waiting = [ended, reading]
        while True:
            ready, _, _ = select.select(waiting, [], [], max(0.0, until - time.monotonic()))
            if reading in ready:
                part = os.read(reading, 65536)
                output += part[: max(0, _OUTPUT_BYTES_MAX - len(output))]
                if not part:
                    waiting = [ended]
            elif ended in ready:
                return True
            if not ready or time.monotonic() > until:
                return process.poll() is not None
    finally:
        os.close(ended)


def is_only_guard(lock_fd: int, until: float) -> bool:
    """Be the only guard of a pool, once one that a daemon left behind has ended; whether it does in time.

    The lock is that of a file which only the daemon's user can open, and goes with the process.
    """
    while True:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > until:
                return False
            time.sleep(_LOCK_PERIOD_S)
        else:
            return True


def wait_for_word(until: float) -> str:
    """Wait for a word of the daemon, its end, or the time; which it was."""
    ready, _, _ = select.select([0], [], [], max(0.0, until - time.monotonic()))
    if not ready:
        return "limit"
    return "word" if os.read(0, 1) else "end"


def read_plan() -> dict[str, Any] | None:
    """The plan; None when the daemon is gone before it has told it."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 65536)
        if not part:
            return None
        line += part
    plan: dict[str, Any] = json.loads(line)
    return plan


def freeze(plan: dict[str, Any], until: float) -> tuple[list[dict[str, Any]], list[str], bool]:
    """Run the programs that freeze: the hooks that were begun, why one failed, what it said, whether time ran out."""
    begun: list[dict[str, Any]] = []
    for hook in plan["hooks"]:
        left_s = until - time.monotonic()
        if left_s <= 0:
            return begun, ["no time is left", ""], True
        begun.append(hook)
        failure, said = run(hook, "before", plan, min(hook["time_limit_s"], left_s))
        if failure:
            return begun, [f"hook {hook['name']!r}: {failure}", said], time.monotonic() > until
    return begun, ["", ""], False


def thaw(begun: list[dict[str, Any]], plan: dict[str, Any]) -> list[list[str]]:
    """Run the programs that thaw, in turned order; what failed, each with what it said."""
    failures = [(hook, *run(hook, "after", plan, hook["time_limit_s"])) for hook in reversed(begun)]
    return [[f"hook {hook['name']!r}: {failure}", said] for hook, failure, said in failures if failure]


def main() -> None:
    """Freeze, wait, thaw."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A handler, and not SIG_IGN, which the programs would inherit.
        signal.signal(number, lambda number, frame: None)
    plan = read_plan()
    if plan is None:
        return
    is_only = is_only_guard(plan["lock_fd"], time.monotonic() + plan["lock_wait_s"])
    started = time.monotonic()
    if plan["only_thaw"]:
        tell(ended_by="end", failures=thaw(plan["hooks"], plan), frozen_ns=0)
        return
    if not is_only:
        tell(failure=["the programs of an earlier snapshot are still running", ""], is_late=False)
        tell(ended_by="failure", failures=[], frozen_ns=0)
        return
    until = started + plan["freeze_limit_s"]
    begun, failure, is_late = freeze(plan, until)
    tell(failure=failure, is_late=is_late)
    ended_by = "failure" if failure[0] else wait_for_word(until + plan["grace_s"])
    failures = thaw(begun, plan)
    tell(ended_by=ended_by, failures=failures, frozen_ns=int((time.monotonic() - started) * 1e9))


if __name__ == "__main__":
    main()
