"""The control file's commands: one a line, words quoted as in a shell, options as ``key=value``.

A command is a function in :data:`COMMANDS`. It gives the fields of its answer, or raises.
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from ..diff import VolumeChange, blame, content_of, diff, names_gone
from ..errors import BadCommandError, SnapfsError, TooLargeError
from ..formats import CatalogBatch
from ..geometry import volume_size_bytes_max
from ..making import CHANGE_MODES, VolumeWish
from ..pool import Pool
from ..schedule import make_schedule
from ..scheduler import shown
from ..snapshot import Snapshot
from ..status import snapshot_entry, snapshot_entry_with_space
from ..units import check_tag, format_size, parse_moment, parse_size, show_name
from ..volume import Volume

LINE_BYTES_MAX = 1 << 20
OPTION_KEYS = frozenset(
    {
        "volume",
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
        "base",
    }
)
Answer = dict[str, object]
ResizeFile = Callable[[bytes, int], Awaitable[None]]
ForgetPages = Callable[[Sequence[Volume]], Awaitable[None]]


async def nothing_to_forget(volumes: Sequence[Volume]) -> None:
    """Without a mount nobody keeps pages."""


@dataclass(frozen=True, slots=True)
class CommandContext:
    """What commands work on.

    ``resize_file`` goes through the kernel, which keeps sizes of its own; ``forget_pages`` has it forget
    what it keeps of volumes.
    """

    pool: Pool
    resize_file: ResizeFile
    forget_pages: ForgetPages = nothing_to_forget

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

    def flag(self, key: str) -> bool:
        """Whether an option is given as yes. Raises BadCommandError for anything but yes and no."""
        values = self.all_of(key)
        if any(value not in (b"yes", b"no") for value in values):
            raise BadCommandError(f"{key} is yes or no", f"Write {key}=yes, or leave it out")
        return bool(values) and values[-1] == b"yes"


def parse(line: bytes) -> tuple[str, Command] | None:
    """A line as name and command; None for an empty line or a comment. Raises BadCommandError."""
    if len(line) > LINE_BYTES_MAX:
        raise BadCommandError(f"a line of {len(line)} bytes", f"Lines go up to {LINE_BYTES_MAX}")
    if b"\0" in line:
        raise BadCommandError("the line has a NUL byte", "Write text: one command a line")
    try:
        parts = shlex.split(show_name(line), comments=True)
    except ValueError as error:
        raise BadCommandError(f"the line cannot be read: {error}", "Close each quote; quote as in a shell") from None
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


async def _snapshot(context: CommandContext, command: Command) -> Answer:
    """snapshot [NAME] [volume=V]... [hold=TAG]... [note=TEXT] [guid=GUID]: make one of all volumes, or of some."""
    command.word_count(0, 1, "one name or none")
    command.known_options("volume", "note", "hold", "guid")
    volumes = command.all_of("volume")
    try:
        note = b" ".join(command.all_of("note")).decode()
    except UnicodeDecodeError:
        raise BadCommandError("the note is not text in UTF-8", "Write it in UTF-8") from None
    snapshot = await context.pool.snapshots.create(
        command.words[0] if command.words else None,
        volumes or None,
        note,
        hold_tags=[show_name(tag) for tag in command.all_of("hold")],
        guid=_guid(command.one_of("guid") or ""),
    )
    return snapshot_entry(context.pool_id, snapshot)


def _guid(text: str) -> str:
    if len(text) > 128 or not text.isascii() or not text.isprintable():
        raise BadCommandError(f"{text[:64]!r} is no guid", "It is for snapfs receive")
    return text


async def _create(context: CommandContext, command: Command) -> Answer:
    """create VOLUME [size=SIZE] [mode=redirect|cow] [source=PATH] [change-log=NAME]: make a volume."""
    command.word_count(1, 1, "the name of a volume")
    command.known_options("size", "mode", "source", "change-log")
    size, mode = command.one_of("size"), command.one_of("mode") or "redirect"
    if mode not in CHANGE_MODES:
        raise BadCommandError(f"there is no mode {mode!r}", f"Modes: {', '.join(CHANGE_MODES)}")
    size_bytes = None if size is None else parse_size(size)
    _check_size(context, size_bytes or 0)
    wish = VolumeWish(
        command.words[0],
        size_bytes,
        CHANGE_MODES[mode],
        command.one_of("source") or "",
        (command.one_of("change-log") or "").encode("utf-8", "surrogateescape"),
        uid=os.getuid(),
        gid=os.getgid(),
    )
    volume = await context.pool.maker.create(wish)
    return {"volume": show_name(wish.name), "volume_id": volume.volume_id, "size_bytes": volume.size_bytes}


async def _changelog(context: CommandContext, command: Command) -> Answer:
    """changelog create NAME capacity=SIZE device=PATH... [free-oldest=yes] | resize NAME SIZE | remove NAME | list."""
    action = show_name(command.words[0]) if command.words else ""
    function = _CHANGELOG_ACTIONS.get(action)
    if function is None:
        raise BadCommandError(f"changelog cannot {action!r}", f"It can {', '.join(_CHANGELOG_ACTIONS)}")
    return await function(context, Command(command.words[1:], command.options))


async def _changelog_create(context: CommandContext, command: Command) -> Answer:
    command.word_count(1, 1, "the name of a change log volume")
    command.known_options("capacity", "device", "free-oldest")
    capacity = command.one_of("capacity")
    paths = [show_name(path) for path in command.all_of("device")]
    if capacity is None or not paths:
        raise BadCommandError("a change log volume needs a capacity and a device", "Write capacity=50G device=/path")
    for path in paths:
        if not path.startswith("/"):
            raise BadCommandError(f"the device {path} is not an absolute path", "Write it from / on")
    capacity_bytes = parse_size(capacity)
    frees_oldest = command.flag("free-oldest")
    await context.pool.changelogs.create(command.words[0], paths, capacity_bytes, frees_oldest=frees_oldest)
    return {"name": show_name(command.words[0]), "capacity_bytes": capacity_bytes}


async def _changelog_resize(context: CommandContext, command: Command) -> Answer:
    command.word_count(2, 2, "the name of a change log volume and a size")
    command.known_options()
    capacity_bytes = parse_size(show_name(command.words[1]))
    await context.pool.changelogs.resize(command.words[0], capacity_bytes)
    return {"name": show_name(command.words[0]), "capacity_bytes": capacity_bytes}


async def _changelog_remove(context: CommandContext, command: Command) -> Answer:
    command.word_count(1, 1, "the name of a change log volume")
    command.known_options()
    await context.pool.changelogs.remove(command.words[0])
    return {"name": show_name(command.words[0])}


async def _changelog_list(context: CommandContext, command: Command) -> Answer:
    command.word_count(0, 0, "no name")
    command.known_options()
    return {"change_log_volumes": context.pool.changelogs.entries()}


async def _schedule(context: CommandContext, command: Command) -> Answer:
    """schedule add NAME every=15m [at=hh:mm] [volume=V]... [keep=24h,30d] [hold=TAG]... [skip-unchanged=yes]

    schedule remove NAME | run NAME [dry-run=yes] | list: snapshots made by the daemon itself.
    """
    action = show_name(command.words[0]) if command.words else ""
    function = _SCHEDULE_ACTIONS.get(action)
    if function is None:
        raise BadCommandError(f"schedule cannot {action!r}", f"It can {', '.join(_SCHEDULE_ACTIONS)}")
    return await function(context, Command(command.words[1:], command.options))


async def _schedule_add(context: CommandContext, command: Command) -> Answer:
    command.word_count(1, 1, "the name of a schedule")
    command.known_options("every", "at", "volume", "keep", "hold", "skip-unchanged", "dry-run")
    every = command.one_of("every")
    if every is None:
        raise BadCommandError("a schedule needs a period", "Write every=15m")
    schedule = make_schedule(
        show_name(command.words[0]),
        every,
        command.one_of("at"),
        [show_name(name) for name in command.all_of("volume")],
        command.one_of("keep") or "",
        [check_tag(show_name(tag)) for tag in command.all_of("hold")],
        skips_unchanged=command.flag("skip-unchanged"),
    )
    scheduler = context.pool.scheduler
    would_delete = shown(scheduler.would_delete(schedule))
    if not command.flag("dry-run"):
        await scheduler.add(schedule)
    return {"name": schedule.name, "would_delete": would_delete}


async def _schedule_remove(context: CommandContext, command: Command) -> Answer:
    command.word_count(1, 1, "the name of a schedule")
    command.known_options()
    await context.pool.scheduler.remove(show_name(command.words[0]))
    return {"name": show_name(command.words[0])}


async def _schedule_run(context: CommandContext, command: Command) -> Answer:
    command.word_count(1, 1, "the name of a schedule")
    command.known_options("dry-run")
    scheduler = context.pool.scheduler
    schedule = scheduler.get(show_name(command.words[0]))
    would_delete = shown(scheduler.would_delete(schedule))
    if command.flag("dry-run"):
        return {"name": schedule.name, "would_delete": would_delete}
    made = await scheduler.run_now(schedule.name)
    return {"name": schedule.name, "made": None if made is None else show_name(made.name or b"")}


async def _schedule_list(context: CommandContext, command: Command) -> Answer:
    command.word_count(0, 0, "no name")
    command.known_options()
    return {"schedules": context.pool.scheduler.entries()}


async def _rollback(context: CommandContext, command: Command) -> Answer:
    """rollback NAME [volume=V]... [force=yes]: put volumes back to a snapshot; the present is kept as another one."""
    command.word_count(1, 1, "the name of a snapshot")
    command.known_options("volume", "force")
    undo = await context.pool.clones.rollback(
        command.words[0], command.all_of("volume") or None, force=command.flag("force")
    )
    return {"name": show_name(command.words[0]), "undo": show_name(undo.name or b"")}


async def _clone(context: CommandContext, command: Command) -> Answer:
    """clone NAME/VOLUME NEW: make a writable volume of what a snapshot holds."""
    command.word_count(2, 2, "NAME/VOLUME and the name of the new volume")
    command.known_options()
    source, new = command.words
    snapshot, slash, volume = source.partition(b"/")
    if not slash:
        raise BadCommandError(f"{show_name(source)!r} names no volume of a snapshot", "Write it as NAME/VOLUME")
    made = await context.pool.clones.clone(snapshot, volume, new)
    return {"volume": show_name(new), "volume_id": made.volume_id, "size_bytes": made.size_bytes}


async def _flatten(context: CommandContext, command: Command) -> Answer:
    """flatten VOLUME: copy what a clone shares with others, so that it depends on none."""
    command.word_count(1, 1, "the name of a volume")
    command.known_options()
    copied_bytes = await context.pool.clones.flatten(command.words[0])
    return {"volume": show_name(command.words[0]), "copied_bytes": copied_bytes}


async def _hold(context: CommandContext, command: Command) -> Answer:
    """hold NAME TAG: keep a snapshot from being deleted until the tag is released."""
    command.word_count(2, 2, "the name of a snapshot and a tag")
    command.known_options()
    name, tag = command.words
    await context.pool.snapshots.hold(name, show_name(tag))
    return {"name": show_name(name), "holds": sorted(context.pool.snapshots.get(name).hold_tags)}


async def _release(context: CommandContext, command: Command) -> Answer:
    """release NAME TAG: take a tag away."""
    command.word_count(2, 2, "the name of a snapshot and a tag")
    command.known_options()
    name, tag = command.words
    await context.pool.snapshots.release(name, show_name(tag))
    return {"name": show_name(name), "holds": sorted(context.pool.snapshots.get(name).hold_tags)}


async def _delete(context: CommandContext, command: Command) -> Answer:
    """delete NAME: delete a snapshot; its space comes back in the background."""
    command.word_count(1, 1, "the name of a snapshot")
    command.known_options()
    await context.pool.snapshots.delete(command.words[0])
    return {"name": show_name(command.words[0])}


async def _rename(context: CommandContext, command: Command) -> Answer:
    """rename OLD NEW: give a snapshot another name."""
    command.word_count(2, 2, "the old name and the new")
    command.known_options()
    await context.pool.snapshots.rename(*command.words)
    return {"name": show_name(command.words[1])}


async def _resize(context: CommandContext, command: Command) -> Answer:
    """resize VOLUME SIZE: set a volume's size; what is gained reads as zeros."""
    command.word_count(2, 2, "a volume and a size")
    command.known_options()
    name, size = command.words
    context.pool.volumes.get(name)
    size_bytes = parse_size(show_name(size))
    _check_size(context, size_bytes)
    await context.resize_file(name, size_bytes)
    return {"volume": show_name(name), "size_bytes": size_bytes}


def _check_size(context: CommandContext, size_bytes: int) -> None:
    size_bytes_max = volume_size_bytes_max(len(context.pool.processors))
    if size_bytes > size_bytes_max:
        raise TooLargeError(f"volumes of this pool go up to {format_size(size_bytes_max)}", "Give a smaller size")


async def _diff(context: CommandContext, command: Command) -> Answer:
    """diff A [B]: what is other in snapshot B, or now, than in A: extents with offset, length and kind."""
    command.word_count(1, 2, "the name of a snapshot, or of two")
    command.known_options()
    snapshots = [context.pool.snapshots.get(name) for name in command.words]
    changes = await diff(context.pool, snapshots[0], snapshots[1] if len(snapshots) == 2 else None)
    return {"volumes": [_change_entry(one) for one in changes]}


def _change_entry(change: VolumeChange) -> dict[str, object]:
    return {
        "name": show_name(change.name),
        "renamed_from": show_name(change.before.name)
        if change.before is not None and change.before.name != change.name
        else None,
        "change": "added" if change.before is None else "removed" if change.after is None else "changed",
        "size_bytes_before": None if change.before is None else change.before.size_bytes,
        "size_bytes": None if change.after is None else change.after.size_bytes,
        "changed_bytes": change.changed_bytes,
        "extents": [
            {"offset": one.offset, "length": one.length, "kind": "data" if one.is_data else "zero"}
            for one in change.extents
        ],
    }


async def _extents(context: CommandContext, command: Command) -> Answer:
    """extents NAME [base=BASE]: what a snapshot holds, or what is other in it than in another: for snapfs send."""
    command.word_count(1, 1, "the name of a snapshot")
    command.known_options("base")
    pool = context.pool
    snapshot = _snapshot_of(pool, command.words[0])
    base_name = command.one_of("base")
    base = None if base_name is None else pool.snapshots.get(base_name.encode("utf-8", "surrogateescape"))
    volumes = []
    for one in await content_of(pool, base, snapshot):
        assert one.after is not None
        volumes.append(
            {
                **one.after._asdict(),
                "name": show_name(one.after.name),
                "base_name": None if one.before is None else show_name(one.before.name),
                "extents": [[extent.offset, extent.length, int(extent.is_data)] for extent in one.extents],
            }
        )
    return {
        "snapshot": snapshot_entry(context.pool_id, snapshot),
        "base": None if base is None else snapshot_entry(context.pool_id, base),
        "gone": [show_name(name) for name in await names_gone(pool, base, snapshot)],
        "volumes": volumes,
    }


def _snapshot_of(pool: Pool, name: bytes) -> Snapshot:
    """The snapshot of a name, or of a moment."""
    if name[:1] == b"@":
        return pool.snapshots.at(parse_moment(show_name(name[1:]), time.time_ns()))
    return pool.snapshots.get(name)


async def _receive_state(context: CommandContext, command: Command) -> Answer:
    """receive-state put GUID STATE | drop GUID | list: how far streams have come: for snapfs receive."""
    command.known_options()
    catalog = context.pool.catalog
    action, *words = [show_name(word) for word in command.words] or [""]
    if action == "put" and len(words) == 2:
        try:
            json.loads(words[1])
        except ValueError:
            raise BadCommandError("the state is not JSON", "It is for snapfs receive") from None
        await catalog.save([], lambda: CatalogBatch(receives=[(_guid(words[0]), words[1])]))
        return {}
    if action == "drop" and len(words) == 1:
        await catalog.save([], lambda: CatalogBatch(dropped_receives=words))
        return {}
    if action == "list" and not words:
        states = await catalog.ask(catalog.catalog.receives)
        return {"states": {guid: json.loads(state) for guid, state in states.items()}}
    raise BadCommandError("receive-state takes put GUID STATE, drop GUID, or list", "It is for snapfs receive")


async def _discard(context: CommandContext, command: Command) -> Answer:
    """discard VOLUME OFFSET LENGTH: a range is to read as zeros; whole blocks of it take no space any more."""
    command.word_count(3, 3, "a volume, an offset and a length")
    command.known_options()
    offset, length = (parse_size(show_name(word)) for word in command.words[1:])
    volume = context.pool.volumes.get(command.words[0])
    await context.pool.snapshots.before_cut([volume])
    freed_bytes = await context.pool.volumes.discard(volume, offset, length)
    await context.forget_pages([volume])
    return {"volume": show_name(command.words[0]), "freed_bytes": freed_bytes}


async def _blame(context: CommandContext, command: Command) -> Answer:
    """blame VOLUME OFFSET: the snapshots between which the block at an offset changed, newest first."""
    command.word_count(2, 2, "a volume and an offset")
    command.known_options()
    changes = await blame(context.pool, command.words[0], parse_size(show_name(command.words[1])))
    return {
        "changes": [
            {
                "after": None if one.after is None else snapshot_entry(context.pool_id, one.after),
                "before": None if one.before is None else snapshot_entry(context.pool_id, one.before),
            }
            for one in changes
        ]
    }


async def _sync(context: CommandContext, command: Command) -> Answer:
    """sync: make everything that was written durable."""
    command.word_count(0, 0, "no words")
    command.known_options()
    await context.pool.snapshots.before_cut(context.pool.volumes.unsaved())
    await context.pool.sync()
    return {}


async def _list(context: CommandContext, command: Command) -> Answer:
    """list [NAME]... [space=no]: snapshots, with what each references and what only it holds."""
    command.known_options("space")
    snapshots = context.pool.snapshots
    chosen = [snapshots.get(name) for name in command.words] or list(snapshots.by_name.values())
    chosen.sort(key=lambda one: one.instant)
    if command.all_of("space") == [b"no"]:
        return {"snapshots": [snapshot_entry(context.pool_id, one) for one in chosen]}
    found = []
    for snapshot in chosen:
        if snapshot.snapshot_id in snapshots.by_id:
            found.append(await snapshot_entry_with_space(context.pool, snapshot))
    return {"snapshots": found}


async def _help(context: CommandContext, command: Command) -> Answer:
    """help: this list."""
    return {"commands": [inspect.getdoc(function) for function in COMMANDS.values()]}


CommandFunction = Callable[[CommandContext, Command], Awaitable[Answer]]
_SCHEDULE_ACTIONS: Mapping[str, CommandFunction] = {
    "add": _schedule_add,
    "remove": _schedule_remove,
    "run": _schedule_run,
    "list": _schedule_list,
}
_CHANGELOG_ACTIONS: Mapping[str, CommandFunction] = {
    "create": _changelog_create,
    "resize": _changelog_resize,
    "remove": _changelog_remove,
    "list": _changelog_list,
}
COMMANDS: Mapping[str, CommandFunction] = {
    "snapshot": _snapshot,
    "create": _create,
    "changelog": _changelog,
    "schedule": _schedule,
    "delete": _delete,
    "rename": _rename,
    "rollback": _rollback,
    "clone": _clone,
    "flatten": _flatten,
    "hold": _hold,
    "diff": _diff,
    "blame": _blame,
    "discard": _discard,
    "extents": _extents,
    "receive-state": _receive_state,
    "release": _release,
    "resize": _resize,
    "sync": _sync,
    "list": _list,
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
