"""The control file's commands: one a line, words quoted as in a shell, options as ``key=value``.

A command is a function in :data:`COMMANDS`. It gives the fields of its answer, or raises.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections import deque
from collections.abc import Mapping

from ..errors import AnswerTooLongError, BadCommandError, SnapfsError
from ..jsontext import encoded, is_small
from ..tasks import in_thread
from ..units import format_size, show_name
from . import (
    changelogcommands,
    comparecommands,
    hookcommands,
    jobcommands,
    schedulecommands,
    snapshotcommands,
    trustcommands,
    volumecommands,
)
from .command import Answer, Command, CommandContext, CommandFunction, parse


async def run_line(context: CommandContext, line: bytes) -> Answer | None:
    """Run one line; its answer, None for an empty line. Raises SnapfsError or OSError."""
    parsed = parse(line)
    if parsed is None:
        return None
    name, command = parsed
    function = COMMANDS.get(name)
    if function is None:
        raise BadCommandError(
            f"there is no command {name[:64]!r}", f"Commands: {' '.join(sorted(COMMANDS))}; write help for more"
        )
    async with context.turn if name in _ONE_BY_ONE else contextlib.nullcontext():
        return {"ok": True, "command": name, **await function(context, command)}


def failure(line: bytes, error: SnapfsError | OSError) -> Answer:
    """The answer of a line that failed."""
    return {
        "ok": False,
        "line": show_name(line[:256]),
        "errno": error.errno,
        "exit_code": error.exit_code if isinstance(error, SnapfsError) else 1,
        "error": error.reason if isinstance(error, SnapfsError) else str(error),
        "fix": error.fix if isinstance(error, SnapfsError) else "",
    }


async def encode_answer(answer: Answer, bytes_max: int) -> bytes:
    """An answer as a line of JSON. Raises AnswerTooLongError."""
    if is_small(answer):
        return json.dumps(answer).encode() + b"\n"
    text = await in_thread(encoded, answer, bytes_max)
    if text is None:
        raise AnswerTooLongError(
            f"the answer is longer than {format_size(bytes_max)}",
            "The command itself was done. Ask for less, as for what changed between snapshots that lie closer together",
        )
    return text + b"\n"


async def _help(context: CommandContext, command: Command) -> Answer:
    """help: this list."""
    return {"commands": [inspect.getdoc(function) for function in COMMANDS.values()]}


COMMANDS: Mapping[str, CommandFunction] = {
    **snapshotcommands.COMMANDS,
    **volumecommands.COMMANDS,
    **comparecommands.COMMANDS,
    **changelogcommands.COMMANDS,
    **schedulecommands.COMMANDS,
    **trustcommands.COMMANDS,
    **hookcommands.COMMANDS,
    **jobcommands.COMMANDS,
    "help": _help,
}


# Those that change what the pool has, and do it at once. The others only look, or take as long as it takes.
_ONE_BY_ONE = frozenset(
    {"changelog", "clone", "create", "delete", "hold", "hook", "release", "rename", "resize", "schedule"}
)


class ControlSession:
    """One open control file: commands in, answers out.

    A line counts when its newline has come, so half a line never runs as another command. Lines of
    one write run in order up to the first that fails. Of answers that nobody reads the older ones go, beyond
    ANSWER_BYTES_MAX; the newest stays, which may have up to ONE_ANSWER_BYTES_MAX.
    """

    ANSWER_BYTES_MAX = 64 << 20
    ONE_ANSWER_BYTES_MAX = 512 << 20

    def __init__(self, context: CommandContext) -> None:
        self._context = context
        self._answers: deque[bytes] = deque()
        self._read_bytes = 0

    async def write(self, data: bytes) -> int:
        """Run the whole lines of ``data``; the count of bytes that were taken.

        Raises the error of the first line if that fails; a later one stops the count before it, so
        that the caller's next write begins with it.
        """
        taken = 0
        while taken < len(data):
            end = data.find(b"\n", taken)
            line = data[taken:] if end < 0 else data[taken:end]
            try:
                if end < 0:
                    raise BadCommandError("the line has no end", "End each command with a newline")
                answer = await run_line(self._context, line)
            except (SnapfsError, OSError) as error:
                if taken:
                    return taken
                await self._answer(line, failure(line, error))
                raise
            if answer is not None:
                await self._answer(line, answer)
            taken = end + 1
        return taken

    def close(self) -> None:
        """The file is closed: what was claimed by it is free."""
        self._context.claims.let_go(self._context)

    async def _answer(self, line: bytes, answer: Answer) -> None:
        try:
            text = await encode_answer(answer, self.ONE_ANSWER_BYTES_MAX)
        except AnswerTooLongError as error:
            # Told in place of the answer, and not raised: the line was run, and is not to be written again.
            text = await encode_answer(failure(line, error), self.ONE_ANSWER_BYTES_MAX)
        self._answers.append(text)
        while len(self._answers) > 1 and sum(map(len, self._answers)) > self.ANSWER_BYTES_MAX:
            self._drop_first()

    def _drop_first(self) -> None:
        self._answers.popleft()
        self._read_bytes = 0

    def read(self, length: int) -> bytes:
        """Answers not read yet."""
        found = bytearray()
        while self._answers and len(found) < length:
            first = self._answers[0]
            part = first[self._read_bytes : self._read_bytes + length - len(found)]
            found += part
            self._read_bytes += len(part)
            if self._read_bytes == len(first):
                self._drop_first()
        return bytes(found)
