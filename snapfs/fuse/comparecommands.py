"""Commands that tell what changed, and those of which streams are made."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..diff import VolumeChange, blame, content_of, diff, names_gone
from ..errors import BadCommandError
from ..formats import CatalogBatch
from ..status import snapshot_entry
from ..units import is_text, parse_size, show_name
from .command import Answer, Command, CommandContext, CommandFunction
from .snapshotcommands import guid_of, snapshot_of


async def _diff(context: CommandContext, command: Command) -> Answer:
    """diff A [B]: what is other in snapshot B, or now, than in A: extents with offset, length and kind."""
    command.word_count(1, 2, "the name of a snapshot, or of two")
    command.known_options()
    snapshots = [snapshot_of(context.pool, name) for name in command.words]
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
    snapshot = snapshot_of(pool, command.words[0])
    base_name = command.one_of("base")
    base = None if base_name is None else snapshot_of(pool, base_name.encode("utf-8", "surrogateescape"))
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


def _no_constant(name: str) -> object:
    """NaN and Infinity are Python's, and not JSON."""
    raise ValueError(name)


async def _receive_state(context: CommandContext, command: Command) -> Answer:
    """receive-state put GUID STATE | drop GUID | list | claim GUID | let-go: streams' progress: for snapfs receive.

    What is claimed nobody else can claim as long as this control file is open, or until it is let go.
    """
    command.known_options()
    # What it keeps is believed by whoever goes on with a stream.
    context.for_owner("receiving")
    catalog = context.pool.catalog
    action, *words = [show_name(word) for word in command.words] or [""]
    if not all(is_text(word) for word in words):
        raise BadCommandError("a word is not text in UTF-8", "It is for snapfs receive")
    if action == "put" and len(words) == 2:
        try:
            json.loads(words[1], parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise BadCommandError("the state is not JSON", "It is for snapfs receive") from None
        await catalog.save([], lambda: CatalogBatch(receives=[(guid_of(words[0]), words[1])]))
        return {}
    if action == "drop" and len(words) == 1:
        await catalog.save([], lambda: CatalogBatch(dropped_receives=words))
        return {}
    if action == "list" and not words:
        states = await catalog.ask(catalog.catalog.receives)
        return {"states": {guid: json.loads(state) for guid, state in states.items()}}
    if action == "claim" and len(words) == 1:
        context.claims.claim(guid_of(words[0]), context)
        return {}
    if action == "let-go" and not words:
        context.claims.let_go(context)
        return {}
    raise BadCommandError("receive-state takes put, drop, list, claim or let-go", "It is for snapfs receive")


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


COMMANDS: Mapping[str, CommandFunction] = {
    "diff": _diff,
    "extents": _extents,
    "receive-state": _receive_state,
    "blame": _blame,
}
