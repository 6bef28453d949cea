"""Commands about snapshots."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import BadCommandError
from ..status import snapshot_entry, snapshot_entry_with_space
from ..units import show_name
from .command import Answer, Command, CommandContext, CommandFunction

_STALL = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)(ms|s)")


async def _snapshot(context: CommandContext, command: Command) -> Answer:
    """snapshot [NAME] [volume=V]... [hold=TAG]... [note=TEXT] [hooks=no] [max-stall=50ms]: of all volumes, or some."""
    command.word_count(0, 1, "one name or none")
    command.known_options("volume", "note", "hold", "guid", "hooks", "max-stall")
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
        guid=guid_of(command.one_of("guid") or ""),
        # What is received holds no application's present.
        with_hooks=command.flag("hooks", default=command.one_of("guid") is None),
        max_stall_ms=_max_stall_ms(command),
    )
    return {**snapshot_entry(context.pool_id, snapshot), "cut_us": snapshot.cut_ns / 1000}


def _max_stall_ms(command: Command) -> float | None:
    text = command.one_of("max-stall")
    if text is None:
        return None
    match = _STALL.fullmatch(text)
    if match is None or not float(match[1]):
        raise BadCommandError(f"{text[:64]!r} is no bound for a stall", "Write max-stall=50ms, 0.2ms or 1s")
    return float(match[1]) * (1000 if match[2] == "s" else 1)


def guid_of(text: str) -> str:
    """The guid that a text is. Raises BadCommandError."""
    if len(text) > 128 or not text.isascii() or not text.isprintable():
        raise BadCommandError(f"{text[:64]!r} is no guid", "It is for snapfs receive")
    return text


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


async def _sync(context: CommandContext, command: Command) -> Answer:
    """sync: make everything that was written durable."""
    command.word_count(0, 0, "no words")
    command.known_options()
    await context.pool.snapshots.before_cut(context.pool.volumes.unsaved())
    await context.pool.sync()
    return {}


COMMANDS: Mapping[str, CommandFunction] = {
    "snapshot": _snapshot,
    "delete": _delete,
    "rename": _rename,
    "hold": _hold,
    "release": _release,
    "list": _list,
    "sync": _sync,
}
