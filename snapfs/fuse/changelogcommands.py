"""Commands about change log volumes."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import BadCommandError
from ..tasks import in_thread
from ..units import check_path, parse_size, show_name
from .command import Answer, Command, CommandContext, CommandFunction, run_action


async def _changelog(context: CommandContext, command: Command) -> Answer:
    """changelog create NAME capacity=SIZE device=PATH... [free-oldest=yes] | resize NAME SIZE | remove NAME | list."""
    return await run_action(context, command, "changelog", _CHANGELOG_ACTIONS)


async def _changelog_create(context: CommandContext, command: Command) -> Answer:
    command.word_count(1, 1, "the name of a change log volume")
    command.known_options("capacity", "device", "free-oldest")
    context.for_owner("giving a device")
    capacity = command.one_of("capacity")
    paths = [show_name(path) for path in command.all_of("device")]
    if capacity is None or not paths:
        raise BadCommandError("a change log volume needs a capacity and a device", "Write capacity=50G device=/path")
    for path in paths:
        if not path.startswith("/"):
            raise BadCommandError(f"the device {path} is not an absolute path", "Write it from / on")
        check_path(path)
        # In a thread: to look at the mount is to ask the loop that this runs in.
        if await in_thread(context.pool.maker.is_own_path, path):
            raise BadCommandError(
                f"{path} lies in the pool or its mount, or on a loop device over that",
                "Take a folder that lies outside",
            )
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


_CHANGELOG_ACTIONS: Mapping[str, CommandFunction] = {
    "create": _changelog_create,
    "resize": _changelog_resize,
    "remove": _changelog_remove,
    "list": _changelog_list,
}


COMMANDS: Mapping[str, CommandFunction] = {
    "changelog": _changelog,
}
