"""Commands about snapshots."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from ..errors import BadCommandError, HeldError, NoSpaceError, NotFoundError
from ..geometry import BLOCK_SIZE
from ..pool import Pool
from ..smallest import smallest_choice
from ..snapshot import Snapshot
from ..snapshots import check_not_held
from ..status import snapshot_entries_with_space, snapshot_entry
from ..tasks import in_thread
from ..units import format_size, parse_moment, parse_size, show_name
from .command import Answer, Command, CommandContext, CommandFunction

_STALL = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s)")


async def _snapshot(context: CommandContext, command: Command) -> Answer:
    """snapshot [NAME] [volume=V]... [hold=TAG]... [note=TEXT] [hooks=no] [max-stall=50ms]: of all volumes, or some."""
    command.word_count(0, 1, "one name or none")
    command.known_options("volume", "note", "hold", "guid", "hooks", "max-stall")
    if command.one_of("guid"):
        context.for_owner("giving a guid")
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


def snapshot_of(pool: Pool, name: bytes) -> Snapshot:
    """The snapshot of a name, or the last one at or before a moment, as ``@1h``. Raises NotFoundError, BadNameError."""
    if name[:1] == b"@":
        return pool.snapshots.at(parse_moment(show_name(name[1:]), time.time_ns()))
    return pool.snapshots.get(name)


def _named(pool: Pool, name: bytes) -> bytes:
    """The name of the snapshot that a name or a moment says. Raises NotFoundError, BadNameError."""
    return snapshot_of(pool, name).name or b""


async def _delete(context: CommandContext, command: Command) -> Answer:
    """delete NAME... [dry-run=yes]: delete snapshots, or say what that would free; it comes back in the background."""
    if not command.words:
        raise BadCommandError("delete takes the name of a snapshot, or of several", "Write help for all commands")
    command.known_options("dry-run")
    snapshots = context.pool.snapshots
    chosen = [snapshots.get(name) for name in dict.fromkeys(command.words)]
    if not command.flag("dry-run"):
        for one in chosen:
            check_not_held(one)
        names = list(dict.fromkeys(command.words))
        for name in names:
            await snapshots.delete(name)
        return {"name": show_name(names[0]), "deleted": [show_name(name) for name in names]}
    account = await snapshots.account()
    exclusive = account.exclusive_blocks()
    return {
        "would_delete": [
            {
                "name": show_name(one.name or b""),
                "would_free_bytes": exclusive.get(one.instant, 0) * BLOCK_SIZE,
                "holds": sorted(one.hold_tags),
            }
            for one in chosen
        ],
        "would_free_bytes": account.freed_blocks([one.instant for one in chosen]) * BLOCK_SIZE,
        "referenced_bytes": account.referenced_blocks([one.instant for one in chosen]) * BLOCK_SIZE,
    }


async def _reclaim(context: CommandContext, command: Command) -> Answer:
    """reclaim need=SIZE [dry-run=yes]: delete the fewest snapshots that free so much; none that is held or open."""
    command.word_count(0, 0, "no name")
    command.known_options("need", "dry-run")
    need = command.one_of("need")
    if need is None:
        raise BadCommandError("reclaim has to know how much is needed", "Write need=20G")
    need_bytes = parse_size(need)
    pool = context.pool
    # What is on its way back already is no merit of those that are to be deleted.
    await pool.reclaimer.reclaim_all()
    account = await pool.snapshots.account()
    free_to_go = {int(one.instant): one for one in pool.snapshots.by_id.values() if not one.hold_tags and not one.opens}
    choice = await in_thread(smallest_choice, account, list(free_to_go), -(-need_bytes // BLOCK_SIZE))
    if choice is None:
        most = account.freed_blocks(list(free_to_go)) * BLOCK_SIZE
        raise NoSpaceError(
            f"all snapshots that nothing holds or has open would free {format_size(most)} together,"
            f" and {format_size(need_bytes)} are needed",
            "Nothing was deleted. Release holds, or remove volumes",
        )
    chosen = [free_to_go[instant] for instant in choice.instants]
    shown = [show_name(one.name or b"") for one in chosen]
    size_bytes = choice.freed_blocks * BLOCK_SIZE
    if command.flag("dry-run"):
        return {"would_delete": shown, "would_free_bytes": size_bytes, "is_smallest": choice.is_smallest}
    deleted: list[str] = []
    held: list[str] = []
    for one, name in zip(chosen, shown, strict=True):
        try:
            await pool.snapshots.delete_this(one)
            deleted.append(name)
        except NotFoundError:
            # Deleted by somebody else, its space comes back as well.
            continue
        except HeldError:
            held.append(name)
    await pool.reclaimer.reclaim_all()
    if held:
        raise HeldError(
            f"somebody came to hold {', '.join(held)} meanwhile, so less is freed than was asked for",
            f"Deleted: {', '.join(deleted) or 'none'}. Ask again for the rest",
        )
    # One that was opened since it was chosen gives its space back when it is closed.
    is_freed = not any(one.snapshot_id in pool.snapshots.deleted for one in chosen)
    return {"deleted": deleted, "freed_bytes": size_bytes, "is_freed": is_freed, "is_smallest": choice.is_smallest}


async def _rename(context: CommandContext, command: Command) -> Answer:
    """rename OLD NEW: give a snapshot another name."""
    command.word_count(2, 2, "the old name and the new")
    command.known_options()
    old, new = command.words
    await context.pool.snapshots.rename(_named(context.pool, old), new)
    return {"name": show_name(new)}


async def _hold(context: CommandContext, command: Command) -> Answer:
    """hold NAME TAG: keep a snapshot from being deleted until the tag is released."""
    command.word_count(2, 2, "the name of a snapshot and a tag")
    command.known_options()
    name, tag = _named(context.pool, command.words[0]), command.words[1]
    await context.pool.snapshots.hold(name, show_name(tag))
    return {"name": show_name(name), "holds": sorted(context.pool.snapshots.get(name).hold_tags)}


async def _release(context: CommandContext, command: Command) -> Answer:
    """release NAME TAG: take a tag away."""
    command.word_count(2, 2, "the name of a snapshot and a tag")
    command.known_options()
    name, tag = _named(context.pool, command.words[0]), command.words[1]
    await context.pool.snapshots.release(name, show_name(tag))
    return {"name": show_name(name), "holds": sorted(context.pool.snapshots.get(name).hold_tags)}


async def _list(context: CommandContext, command: Command) -> Answer:
    """list [NAME]... [space=no]: snapshots, with what each references, what was written, what it alone holds."""
    command.known_options("space")
    snapshots = context.pool.snapshots
    chosen = [snapshot_of(context.pool, name) for name in command.words] or list(snapshots.by_name.values())
    chosen.sort(key=lambda one: one.instant)
    if command.all_of("space") == [b"no"]:
        return {"snapshots": [snapshot_entry(context.pool_id, one) for one in chosen]}
    return {"snapshots": await snapshot_entries_with_space(context.pool, chosen)}


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
    "reclaim": _reclaim,
    "rename": _rename,
    "hold": _hold,
    "release": _release,
    "list": _list,
    "sync": _sync,
}
