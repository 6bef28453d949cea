"""Commands about schedules."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import BadCommandError
from ..schedule import make_schedule
from ..scheduler import shown
from ..units import check_tag, show_name
from .command import Answer, Command, CommandContext, CommandFunction, run_action


async def _schedule(context: CommandContext, command: Command) -> Answer:
    """schedule add NAME every=15m [at=hh:mm] [volume=V]... [keep=24h,30d] [hold=TAG]... [skip-unchanged=yes]

    schedule remove NAME | run NAME [dry-run=yes] | list: snapshots made by the daemon itself.
    """
    return await run_action(context, command, "schedule", _SCHEDULE_ACTIONS)


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
    for name in command.all_of("volume"):
        context.pool.volumes.get(name)
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


_SCHEDULE_ACTIONS: Mapping[str, CommandFunction] = {
    "add": _schedule_add,
    "remove": _schedule_remove,
    "run": _schedule_run,
    "list": _schedule_list,
}


COMMANDS: Mapping[str, CommandFunction] = {
    "schedule": _schedule,
}
