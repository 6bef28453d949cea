"""A line of the control file: words and options, and what commands work on."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import trio

from ..errors import BadCommandError, NotPermittedError
from ..pool import Pool
from ..units import show_name
from ..volume import Volume
from .claims import Claims

LINE_BYTES_MAX = 1 << 20
OPTION_KEYS = frozenset(
    {
        "volume",
        "inode",
        "note",
        "space",
        "hold",
        "force",
        "size",
        "mode",
        "source",
        "change-log",
        "capacity",
        "device",
        "free-oldest",
        "every",
        "at",
        "keep",
        "skip-unchanged",
        "dry-run",
        "guid",
        "rate",
        "hooks",
        "max-stall",
        "before",
        "after",
        "time-limit",
        "shell",
        "need",
        "base",
        "sync",
        "job",
    }
)
Answer = dict[str, object]
ResizeFile = Callable[[bytes, int], Awaitable[None]]
ForgetPages = Callable[[Volume, int, int], Awaitable[None]]


async def nothing_to_forget(volume: Volume, offset: int, length: int) -> None:
    """Without a mount nobody keeps pages."""


@dataclass(frozen=True, slots=True)
class CommandContext:
    """What commands work on.

    ``resize_file`` goes through the kernel, which keeps sizes of its own; ``forget_pages`` has it forget
    what it keeps of a range of a volume. ``claims`` are those of all open control files; each has its own context.
    ``is_owner``: it is the daemon's own user, or root, who asks,
    and not one of the control file's group. Commands that
    change what the pool has one after the other have the ``turn``.
    """

    pool: Pool
    resize_file: ResizeFile
    forget_pages: ForgetPages = nothing_to_forget
    is_owner: bool = True
    claims: Claims = field(default_factory=Claims)
    turn: trio.Lock = field(default_factory=trio.Lock)

    def for_owner(self, what: str) -> None:
        """Refuse what reaches beyond the pool with the daemon's rights. Raises NotPermittedError."""
        if not self.is_owner:
            raise NotPermittedError(f"{what} is for the daemon's own user", "Ask whoever mounted it")

    @property
    def pool_id(self) -> str:
        """The pool's id."""
        return self.pool.descriptor.pool_id


@dataclass(frozen=True, slots=True)
class Command:
    """A parsed line: its words as bytes, and its options."""

    words: list[bytes]
    options: list[tuple[str, bytes]]

    def word_count(self, low: int, high: int, usage: str) -> None:
        """Refuse too few or too many words."""
        if not low <= len(self.words) <= high:
            raise BadCommandError(f"the command takes {usage}", "Write help for all commands")

    def known_options(self, *keys: str) -> None:
        """Refuse options that the command does not have."""
        for key, _ in self.options:
            if key not in keys:
                raise BadCommandError(f"there is no option {key!r} here", "Write help for all commands")

    def all_of(self, key: str) -> list[bytes]:
        """Every value given for an option."""
        return [value for one, value in self.options if one == key]

    def one_of(self, key: str) -> str | None:
        """The value of an option that may be given once. Raises BadCommandError."""
        values = self.all_of(key)
        if len(values) > 1:
            raise BadCommandError(f"{key} is given more than once", "Give it once")
        return show_name(values[0]) if values else None

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Whether an option is given as yes, or is not given and that is the default.

        Raises BadCommandError for anything but yes and no.
        """
        values = self.all_of(key)
        if any(value not in (b"yes", b"no") for value in values):
            raise BadCommandError(f"{key} is yes or no", f"Write {key}=yes, or leave it out")
        return values[-1] == b"yes" if values else default


_PIECE = r"""[^ \t\r\n'"\\#]+|'[^']*'|"(?:[^"\\]|\\.)*"|\\."""
_WORD = re.compile(rf"(?P<space>[ \t\r\n]+)|(?P<comment>#[^\n]*)|(?P<word>(?:{_PIECE})+)", re.DOTALL)
_PIECES = re.compile(_PIECE, re.DOTALL)
_ESCAPED = re.compile(r"""\\(["\\])""")


def split_words(text: str) -> list[str]:
    """The words of a line, quoted as in a shell, up to a comment. Raises BadCommandError.

    As :func:`shlex.split` does, but in a time that grows with the line and not with its square.
    """
    words = []
    place = 0
    while place < len(text):
        match = _WORD.match(text, place)
        if match is None:
            raise BadCommandError(
                f"the line cannot be read from {text[place : place + 32]!r} on", "Close each quote; quote as in a shell"
            )
        if match["word"]:
            words.append("".join(_plain(piece) for piece in _PIECES.findall(match["word"])))
        place = match.end()
    return words


def _plain(piece: str) -> str:
    """What a piece of a word means."""
    if piece[0] == "'":
        return piece[1:-1]
    if piece[0] == '"':
        return _ESCAPED.sub(r"\1", piece[1:-1])
    return piece[1:] if piece[0] == "\\" else piece


def parse(line: bytes) -> tuple[str, Command] | None:
    """A line as name and command; None for an empty line or a comment. Raises BadCommandError."""
    if len(line) > LINE_BYTES_MAX:
        raise BadCommandError(f"a line of {len(line)} bytes", f"Lines go up to {LINE_BYTES_MAX}")
    if b"\0" in line:
        raise BadCommandError("the line has a NUL byte", "Write text: one command a line")
    parts = split_words(show_name(line))
    if not parts:
        return None
    words: list[bytes] = []
    options: list[tuple[str, bytes]] = []
    only_words = False
    for part in parts[1:]:
        if part == "--" and not only_words:
            only_words = True
            continue
        key, equals, value = part.partition("=")
        if equals and key in OPTION_KEYS and not only_words:
            options.append((key, value.encode("utf-8", "surrogateescape")))
        else:
            words.append(part.encode("utf-8", "surrogateescape"))
    return parts[0], Command(words, options)


CommandFunction = Callable[[CommandContext, Command], Awaitable[Answer]]


async def run_action(
    context: CommandContext, command: Command, name: str, actions: Mapping[str, CommandFunction]
) -> Answer:
    """Run a command whose first word says what it is to do. Raises BadCommandError for a word that it does not know."""
    action = show_name(command.words[0]) if command.words else ""
    function = actions.get(action)
    if function is None:
        raise BadCommandError(f"{name} cannot {action[:64]!r}", f"It can {', '.join(actions)}")
    return await function(context, Command(command.words[1:], command.options))
