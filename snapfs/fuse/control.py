"""The control file's commands: one a line, words quoted as in a shell, options as ``key=value``.

A command is a function in :data:`COMMANDS`. It gives the fields of its answer, or raises.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping

from ..errors import BadCommandError, SnapfsError
from ..units import show_name
from . import (
    changelogcommands,
    comparecommands,
    hookcommands,
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


def encode_answer(answer: Answer) -> bytes:
    """An answer as a line of JSON."""
    return json.dumps(answer).encode() + b"\n"


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
    "help": _help,
}


class ControlSession:
    """One open control file: commands in, answers out.

    A line counts when its newline has come, so half a line never runs as another command. Lines of
    one write run in order up to the first that fails.
    """

    ANSWER_BYTES_MAX = 64 << 20

    def __init__(self, context: CommandContext) -> None:
        self._context = context
        self._answers = bytearray()

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
                self._answer(failure(line, error))
                raise
            if answer is not None:
                self._answer(answer)
            taken = end + 1
        return taken

    def _answer(self, answer: Answer) -> None:
        self._answers += encode_answer(answer)
        if len(self._answers) > self.ANSWER_BYTES_MAX:
            del self._answers[: self._answers.index(b"\n") + 1]

    def read(self, length: int) -> bytes:
        """Answers not read yet."""
        part = bytes(self._answers[:length])
        del self._answers[:length]
        return part
