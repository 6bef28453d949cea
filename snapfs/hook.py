"""A hook: programs that run before and after snapshots, to have an application hold still meanwhile. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from .errors import BadCommandError, DamagedError, SnapfsError
from .units import check_name, is_text, parse_duration

TIME_LIMIT_S = 10
TIME_LIMIT_S_MAX = 3600
COMMAND_LENGTH_MAX = 8192


@dataclass(frozen=True, slots=True)
class Hook:
    """What runs before and after the snapshots of some volumes, or of any (none named).

    ``before`` freezes and ``after`` thaws; an empty one does nothing. Each may take ``time_limit_s``
    seconds. With ``shell`` they are lines for /bin/sh, else words that are split as a shell would.
    """

    name: str
    before: str
    after: str
    time_limit_s: int = TIME_LIMIT_S
    volumes: tuple[str, ...] = ()
    shell: bool = False

    def concerns(self, volume_names: Iterable[str] | None) -> bool:
        """Whether it runs for a snapshot of these volumes, or of all (None)."""
        return not self.volumes or volume_names is None or not set(self.volumes).isdisjoint(volume_names)

    def plan(self) -> dict[str, object]:
        """What the guard is told of it."""
        return {
            "name": self.name,
            "before": self.before if self.shell else shlex.split(self.before),
            "after": self.after if self.shell else shlex.split(self.after),
            "time_limit_s": self.time_limit_s,
            "shell": self.shell,
        }

    def to_json(self) -> str:
        """The hook as the catalog keeps it."""
        fields = asdict(self)
        del fields["name"]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, name: str, text: bytes) -> Hook:
        """Read it. Raises DamagedError."""
        try:
            fields = json.loads(text.decode())
            before, after, limit = fields["before"], fields["after"], fields["time_limit_s"]
            volumes, shell = fields["volumes"], fields["shell"]
            if not (
                isinstance(before, str)
                and isinstance(after, str)
                and type(limit) is int
                and isinstance(volumes, list)
                and all(isinstance(one, str) for one in volumes)
                and isinstance(shell, bool)
            ):
                raise ValueError("a field is of another type")
            return make_hook(name, before, after, f"{limit}s", volumes, shell=shell)
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError, SnapfsError) as error:
            raise DamagedError(f"hook {name!r} is damaged", "Remove it and add it again") from error


def make_hook(
    name: str, before: str, after: str, time_limit: str | None = None, volumes: Iterable[str] = (), *, shell: bool
) -> Hook:
    """A hook as a user writes it. Raises BadCommandError, BadNameError."""
    check_name(name.encode("utf-8", "surrogateescape"), "hook")
    if not is_text(name):
        raise BadCommandError(f"the name {name[:64]!r} is not text in UTF-8", "Write it in UTF-8")
    if not before and not after:
        raise BadCommandError("a hook needs a program", "Give one to run before snapshots, after them, or both")
    for phase, command in (("before", before), ("after", after)):
        if len(command) > COMMAND_LENGTH_MAX:
            raise BadCommandError(
                f"the program to run {phase} has {len(command)} characters", f"Use at most {COMMAND_LENGTH_MAX}"
            )
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise BadCommandError(f"the program to run {phase} cannot be read: {error}", "Close each quote") from None
        if command and not shell and not (words and words[0].startswith("/")):
            raise BadCommandError(
                f"the program to run {phase} has no absolute path", "Write it from / on, or ask for a shell"
            )
        if "\0" in command or not is_text(command):
            raise BadCommandError(f"the program to run {phase} is not text in UTF-8", "Write it in UTF-8")
    time_limit_s = TIME_LIMIT_S if time_limit is None else parse_duration(time_limit)
    if not 1 <= time_limit_s <= TIME_LIMIT_S_MAX:
        raise BadCommandError(
            f"a time limit of {time_limit_s} s", f"Give 1 to {TIME_LIMIT_S_MAX} seconds: applications stand still"
        )
    return Hook(name, before, after, time_limit_s, tuple(volumes), shell)
