"""Commands about work that takes a while."""

from __future__ import annotations

from collections.abc import Mapping

from ..units import show_name
from .command import Answer, Command, CommandContext, CommandFunction


async def _stop(context: CommandContext, command: Command) -> Answer:
    """stop JOB: have a scrub, verify or flatten end; what it did so far stays. status.json names those under way."""
    command.word_count(1, 1, "the name of a job")
    command.known_options()
    job = context.pool.jobs.stop_named(show_name(command.words[0]))
    return {"job": job.name, "kind": job.kind}


COMMANDS: Mapping[str, CommandFunction] = {"stop": _stop}
