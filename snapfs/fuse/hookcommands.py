"""Commands about hooks."""

from __future__ import annotations

from collections.abc import Mapping

from ..hook import make_hook
from ..units import show_name
from .command import Answer, Command, CommandContext, CommandFunction, run_action


async def _hook(context: CommandContext, command: Command) -> Answer:
    """hook add NAME [before=PROGRAM] [after=PROGRAM] [time-limit=10s] [volume=V]... [shell=yes]

    hook remove NAME | list: programs that freeze and thaw applications around snapshots.
    """
    return await run_action(context, command, "hook", _ACTIONS)


async def _add(context: CommandContext, command: Command) -> Answer:
    command.word_count(1, 1, "the name of a hook")
    command.known_options("before", "after", "time-limit", "volume", "shell")
    context.for_owner("having programs run")
    hook = make_hook(
        show_name(command.words[0]),
        command.one_of("before") or "",
        command.one_of("after") or "",
        command.one_of("time-limit"),
        [show_name(name) for name in command.all_of("volume")],
        shell=command.flag("shell"),
    )
    await context.pool.hooks.add(hook)
    return {"name": hook.name}


async def _remove(context: CommandContext, command: Command) -> Answer:
    command.word_count(1, 1, "the name of a hook")
    command.known_options()
    context.for_owner("having programs run no more")
    await context.pool.hooks.remove(show_name(command.words[0]))
    return {"name": show_name(command.words[0])}


async def _list(context: CommandContext, command: Command) -> Answer:
    command.word_count(0, 0, "no name")
    command.known_options()
    return {"hooks": context.pool.hooks.entries()}


_ACTIONS: Mapping[str, CommandFunction] = {"add": _add, "remove": _remove, "list": _list}
COMMANDS: Mapping[str, CommandFunction] = {"hook": _hook}
