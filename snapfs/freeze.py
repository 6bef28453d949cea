"""Having applications hold still for one snapshot, by a guard beside the daemon that outlives it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import trio

from .errors import HookFailedError, StallError
from .events import EventLog
from .hook import Hook

GUARD_FILE = os.path.join(os.path.dirname(__file__), "hookguard.py")
FREEZE_LIMIT_S = 60.0
GRACE_S = 0.25
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_log = logging.getLogger("snapfs")
_LOCK_WAIT_S = 30.0
_SLACK_S = 5.0
_THAW_TRIES = 30
_Told = dict[str, object]


class _Guard:
    """The process that runs the programs, and what it told of them.

    ``begun`` are hooks whose freezing program was started, ``thawed`` those whose thawing one has ended. It has the
    file by which guards lock each other out open by the number ``lock_fd``.
    """

    def __init__(self, process: trio.Process, lock_fd: int) -> None:
        self.process = process
        self.lock_fd = lock_fd
        self.begun: list[str] = []
        self.thawed: set[str] = set()
        self._running_pid = 0
        self._unread = bytearray()

    @classmethod
    async def start(cls, lock_path: str | None) -> _Guard:
        """Start one. Raises OSError."""
        name = "snapfs-hooks"
        lock_fd = os.memfd_create(name) if lock_path is None else os.open(lock_path, os.O_RDWR | os.O_CLOEXEC)
        try:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-I", "-S", GUARD_FILE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": PATH, "LANG": "C.UTF-8"},
                start_new_session=True,
                pass_fds=(lock_fd,),
            )
        finally:
            os.close(lock_fd)
        return cls(process, lock_fd)

    async def send(self, plan: _Told) -> None:
        """Give it its plan. One that has ended already tells nothing, which is seen by whoever waits for its answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(trio.BrokenResourceError):
            await self.process.stdin.send_all(json.dumps(plan).encode() + b"\n")

    def say_now(self) -> None:
        """Have it thaw."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            os.write(self.process.stdin.fileno(), b"t")  # type: ignore[attr-defined]

    async def answer(self, key: str, limit_s: float) -> _Told | None:
        """The next thing it tells with this key; None when it has ended, or says nothing for so long."""
        with trio.move_on_after(limit_s):
            while True:
                line = await self._line()
                if line is None:
                    return None
                told: _Told = json.loads(line)
                self._note(told)
                if key in told:
                    return told
        return None

    async def _line(self) -> bytes | None:
        assert self.process.stdout is not None
        while b"\n" not in self._unread:
            part = await self.process.stdout.receive_some(65536)
            if not part:
                return None
            self._unread += part
        line, _, rest = bytes(self._unread).partition(b"\n")
        self._unread[:] = rest
        return line

    def _note(self, told: _Told) -> None:
        if "begun" in told:
            self._running_pid = int(str(told["pid"]))
            if told["phase"] == "before" and told["begun"] not in self.begun:
                self.begun.append(str(told["begun"]))
        elif "ended" in told:
            self._running_pid = 0
            if told["phase"] == "after":
                self.thawed.add(str(told["ended"]))

    async def end(self, *, kill: bool) -> None:
        """See it, and with ``kill`` what it runs, to its end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        await self.process.stdin.aclose()
        if kill:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            # It leads a session of its own, so its number cannot be another's group while any of it is left.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if self._running_pid and os.getsid(self._running_pid) == self._running_pid:
                    os.killpg(self._running_pid, signal.SIGKILL)
        await self.process.stdout.aclose()
        await self.process.wait()


class Freeze:
    """Applications that hold still for one snapshot.

    ``frozen_ns`` is for how long they did, once they no longer do; ``guard_pids`` are those of guards at work.
    """

    def __init__(
        self,
        hooks: Sequence[Hook],
        environment: dict[str, str],
        lock_path: str | None,
        max_stall_s: float | None,
        events: EventLog,
        guard_pids: set[int],
    ) -> None:
        self.frozen_ns = 0
        self.is_active = bool(hooks)
        self._hooks = hooks
        self._environment = environment
        self._lock_path = lock_path
        self._limit_s = FREEZE_LIMIT_S if max_stall_s is None else max_stall_s
        self._events = events
        self._guard_pids = guard_pids
        self._guard: _Guard | None = None
        self._since = 0.0

    async def begin(self) -> None:
        """Freeze. Raises HookFailedError, or StallError when that took too long; then all are thawed."""
        with trio.CancelScope(shield=True):
            # From before the plan is sent: the guard begins no earlier.
            guard = self._guard = await _Guard.start(self._lock_path)
            self._guard_pids.add(guard.process.pid)
            self._since = time.monotonic()
            await guard.send(self._plan(guard, self._hooks, only_thaw=False))
        longest_s = _LOCK_WAIT_S + sum(hook.time_limit_s for hook in self._hooks) + _SLACK_S
        told = await guard.answer("failure", longest_s)
        if told is None:
            await self.end()
            raise HookFailedError("the process that runs the hooks ended", "No snapshot was made. Try again")
        failure, said = _failure_in(told["failure"])
        if failure:
            await self.end()
            if told["is_late"]:
                raise StallError(
                    f"the hooks alone took longer than the {self._limit_s:g} s that were allowed ({failure})",
                    "No snapshot was made. Allow more with max-stall, or go without: hooks=no",
                )
            raise HookFailedError(
                failure, "No snapshot was made. Mend the hook, remove it, or go without: hooks=no", said
            )

    def _plan(self, guard: _Guard, hooks: Sequence[Hook], *, only_thaw: bool) -> _Told:
        return {
            "hooks": [hook.plan() for hook in hooks],
            "environment": self._environment,
            "freeze_limit_s": self._limit_s,
            "grace_s": GRACE_S,
            "lock_fd": guard.lock_fd,
            "lock_wait_s": _LOCK_WAIT_S,
            "only_thaw": only_thaw,
        }

    def check_now(self) -> None:
        """Right before the cut: raises StallError when applications have held still for too long, or no longer do."""
        if self.is_active and time.monotonic() > self._since + self._limit_s:
            raise StallError(
                f"applications were to hold still for {self._limit_s:g} s at most; the snapshot was not cut by then",
                "No snapshot was made. Try again, or allow more with max-stall",
            )

    def thaw_now(self) -> None:
        """Right after the cut: have applications go on, without waiting for it. Raises StallError."""
        if self.is_active and time.monotonic() > self._since + self._limit_s + GRACE_S:
            # This process was stopped in between, and the guard has thawed them by itself.
            raise StallError("applications no longer held still when the snapshot was cut", "Try again")
        if self._guard is not None:
            self._guard.say_now()

    async def end(self) -> None:
        """Wait until applications go on again. Does nothing the second time."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        with trio.CancelScope(shield=True):
            assert guard.process.stdin is not None
            await guard.process.stdin.aclose()
            longest_s = _LOCK_WAIT_S + 2 * sum(hook.time_limit_s for hook in self._hooks) + _SLACK_S
            told = await guard.answer("ended_by", longest_s)
            await guard.end(kill=told is None)
            self._guard_pids.discard(guard.process.pid)
            if told is None:
                # It was killed, or hangs. What it froze is thawed by another.
                told = await self._thaw_alone(guard)
                self.frozen_ns = int((time.monotonic() - self._since) * 1e9)
            else:
                self.frozen_ns = int(str(told["frozen_ns"]))
            failures = told["failures"]
            assert isinstance(failures, list)
            for failure, said in map(_failure_in, failures):
                self._events.note("hook-failed", logging.ERROR, reason=failure)
                if said:
                    # For the log alone: everyone may read the events.
                    _log.error("%s: %s", failure, said)

    async def _thaw_alone(self, lost: _Guard) -> _Told:
        """Thaw what a guard that is gone had begun to freeze, and had not thawed yet."""
        hooks = [hook for hook in self._hooks if hook.name in lost.begun and hook.name not in lost.thawed]
        self._events.note("hook-guard-lost", logging.ERROR, thawing=[hook.name for hook in hooks])
        for _ in range(_THAW_TRIES):
            try:
                guard = await _Guard.start(self._lock_path)
            except OSError as error:
                self._events.note("hook-failed", logging.ERROR, reason=f"thawing is tried again: {error}")
                await trio.sleep(1)
                continue
            self._guard_pids.add(guard.process.pid)
            await guard.send(self._plan(guard, hooks, only_thaw=True))
            told = await guard.answer("ended_by", _LOCK_WAIT_S + sum(one.time_limit_s for one in hooks) + _SLACK_S)
            await guard.end(kill=told is None)
            self._guard_pids.discard(guard.process.pid)
            if told is not None:
                return told
            hooks = [hook for hook in hooks if hook.name not in guard.thawed]
        return {"failures": [[f"hook {hook.name!r}: it could not be thawed", ""] for hook in hooks]}


def _failure_in(told: object) -> tuple[str, str]:
    """Why a program of a hook failed, empty if none did, and what it said."""
    assert isinstance(told, list)
    failure, said = told
    return str(failure), str(said)
