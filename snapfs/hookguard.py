"""A process that freezes applications for a snapshot, and thaws them whatever happens.

Run as a file, beside the daemon and in a session of its own, with nothing of snapfs imported. It reads its
plan, a line of JSON, from standard input; runs the programs that freeze; tells so on standard output;
waits for a word of the daemon, for the end of its input (which the kernel brings also when the daemon
was killed), or until the longest time is over; runs those that thaw, in turned order; and tells what came of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from typing import Any

_OUTPUT_BYTES_MAX = 2000


def run(hook: dict[str, Any], phase: str, plan: dict[str, Any], limit_s: float) -> str:
    """Run one program of a hook; why it failed, empty if it did not. Its whole group is ended at the limit."""
    command = hook[phase]
    if not command:
        return ""
    environment = {**plan["environment"], "SNAPFS_PHASE": phase, "SNAPFS_HOOK": hook["name"]}
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command] if hook["shell"] else command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            return f"{phase} cannot be run: {error.strerror}"
        try:
            code = process.wait(max(0.0, limit_s))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"{phase} took longer than {limit_s:g} s and was ended"
        if code == 0:
            return ""
        output.seek(0)
        told = output.read(_OUTPUT_BYTES_MAX).decode(errors="replace").strip()
        return f"{phase} ended with {code}" + (f": {told}" if told else "")


def tell(document: dict[str, Any]) -> None:
    """Tell the daemon, if it is still there."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(document).encode() + b"\n")


def wait_for_word(until: float) -> str:
    """Wait for a word of the daemon, its end, or the time; which it was."""
    ready, _, _ = select.select([0], [], [], max(0.0, until - time.monotonic()))
    if not ready:
        return "limit"
    return "word" if os.read(0, 1) else "end"


def main() -> None:
    """Freeze, wait, thaw."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # A handler, and not SIG_IGN, which the programs would inherit.
        signal.signal(number, lambda number, frame: None)
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 65536)
        if not part:
            return
        line += part
    plan = json.loads(line)
    started = time.monotonic()
    until = started + plan["freeze_limit_s"]
    begun: list[dict[str, Any]] = []
    failure = ""
    for hook in [] if plan["only_thaw"] else plan["hooks"]:
        begun.append(hook)
        limit_s = min(hook["time_limit_s"], until - time.monotonic())
        failure = run(hook, "before", plan, limit_s)
        if failure:
            failure = f"hook {hook['name']!r}: {failure}"
            break
    if plan["only_thaw"]:
        begun = plan["hooks"]
    tell({"failure": failure})
    ended_by = "failure" if failure else "end" if plan["only_thaw"] else wait_for_word(until + plan["grace_s"])
    failures = []
    for hook in reversed(begun):
        told = run(hook, "after", plan, hook["time_limit_s"])
        if told:
            failures.append(f"hook {hook['name']!r}: {told}")
    tell({"ended_by": ended_by, "failures": failures, "frozen_ns": int((time.monotonic() - started) * 1e9)})


if __name__ == "__main__":
    main()
