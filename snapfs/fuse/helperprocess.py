"""The helper process: started, asked, started anew when it was killed, and left behind when it waits for ever.

A call on a file waits for whoever holds the file's lock in the kernel: a program whose write waits for the memory it
writes from, say, for which it may wait for ever. Such a helper cannot even be killed before it has the lock.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import trio

from . import helper

_HELPER_FILE = os.path.abspath(helper.__file__)
# So often in a row nothing comes for so long, and no request is what it waits for: then it waits for a lock.
SILENT_S = 1.5
_SILENCES = 2


class HelperGoneError(OSError):
    """The helper process has ended; whether it may have begun what it was asked for."""

    def __init__(self, *, was_under_way: bool) -> None:
        super().__init__(errno.EIO, "the helper process is gone")
        self.was_under_way = was_under_way


class HelperProcess:
    """The process, one call at a time.

    ``note_pid`` is told which process it is, 0 for none. ``begin_call`` is called before each call; ``progress`` is
    another value whenever the file that the call is at was written to, and None while it is at none, or a request for
    that file is under way here.
    """

    def __init__(
        self, note_pid: Callable[[int], None], begin_call: Callable[[], None], progress: Callable[[], object]
    ) -> None:
        self._note_pid = note_pid
        self._begin_call = begin_call
        self._progress = progress
        self._turn = trio.Lock()
        self._process: trio.Process | None = None
        self._left: list[trio.Process] = []
        self._is_over = False
        self._unread = bytearray()

    async def start(self) -> None:
        """Start it."""
        self._process = await trio.lowlevel.open_process(
            [sys.executable, "-I", "-S", _HELPER_FILE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            start_new_session=True,
        )
        self._note_pid(self._process.pid)

    async def stop(self) -> None:
        """Let it end. No other is started then."""
        self._is_over = True
        await self._end()

    async def _end(self) -> None:
        process = await self._let_go()
        if process is not None:
            with trio.CancelScope(shield=True):
                await process.wait()

    async def _let_go(self) -> trio.Process | None:
        process, self._process = self._process, None
        self._note_pid(0)
        self._unread.clear()
        if process is not None and process.stdin is not None and process.stdout is not None:
            with trio.CancelScope(shield=True):
                await process.stdin.aclose()
                await process.stdout.aclose()
        return process

    async def call(self, name: str, arguments_now: Callable[[], Sequence[object]]) -> object:
        """One call, with arguments that are worked out when its turn has come.

        Raises OSError as the helper met it, TimeoutError when it waits for a file's lock.
        """
        with trio.CancelScope(shield=True):
            async with self._turn:
                request = json.dumps({"call": name, "arguments": arguments_now()}).encode() + b"\n"
                self._begin_call()
                try:
                    line = await self._answer_to(request)
                except HelperGoneError as gone:
                    # Somebody has killed it, or the kernel, for want of memory.
                    if self._is_over:
                        raise
                    await self._end()
                    await self.start()
                    if name == "fsync" and gone.was_under_way:
                        # An error of the one that has gone is not told again (fsync(2)); others may be made twice.
                        raise
                    line = await self._answer_to(request)
        answer = json.loads(line)
        if "errno" in answer:
            raise OSError(answer["errno"], answer["words"], answer["path"])
        return answer["result"]

    def is_one_waiting(self) -> bool:
        """Whether one that was left behind waits still; another would come to wait there too."""
        self._left = [one for one in self._left if one.poll() is None]
        return bool(self._left)

    async def _answer_to(self, request: bytes) -> bytes:
        process = self._process
        if process is None:
            raise HelperGoneError(was_under_way=False)
        assert process.stdin is not None
        try:
            await process.stdin.send_all(request)
        except trio.BrokenResourceError:
            raise HelperGoneError(was_under_way=False) from None
        while b"\n" not in self._unread:
            part = await self._part_from(process)
            if not part:
                raise HelperGoneError(was_under_way=True)
            self._unread += part
        line, _, rest = bytes(self._unread).partition(b"\n")
        self._unread[:] = rest
        return line

    async def _part_from(self, process: trio.Process) -> bytes:
        """The next bytes of an answer. Raises TimeoutError."""
        assert process.stdout is not None
        silences = 0
        while silences < _SILENCES:
            before = self._progress()
            with trio.move_on_after(SILENT_S):
                return bytes(await process.stdout.receive_some(65536))
            is_silent = before is not None and before == self._progress() and _waits_in_kernel(process.pid)
            silences = silences + 1 if is_silent else 0
        left = await self._let_go()
        if left is not None:
            left.kill()
            self._left.append(left)
        await self.start()
        raise TimeoutError(errno.ETIMEDOUT, "a program holds the file's lock")


def _waits_in_kernel(pid: int) -> bool:
    """Whether a process sleeps so that no signal wakes it (proc(5))."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2].startswith(b"D")
    except OSError:
        return False
