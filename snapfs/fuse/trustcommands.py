"""Commands that prove what is stored: scrub and verify."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import BadCommandError
from ..scrub import scrub, verify
from ..units import format_size, parse_size
from .command import Answer, Command, CommandContext, CommandFunction
from .snapshotcommands import snapshot_of

RATE_MIN = 64 << 10


async def _scrub(context: CommandContext, command: Command) -> Answer:
    """scrub [rate=SIZE] [job=NAME]: read what is sealed, at most so much a second, against its checksums."""
    command.word_count(0, 0, "no words")
    command.known_options("rate", "job")
    rate = command.one_of("rate")
    bytes_per_s = None if rate is None else parse_size(rate)
    if bytes_per_s is not None and bytes_per_s < RATE_MIN:
        raise BadCommandError(f"a rate of {bytes_per_s}", f"Give {format_size(RATE_MIN)} at least, or leave it out")
    report = await scrub(context.pool, bytes_per_s, command.one_of("job") or "")
    return {
        "checked_bytes": report.checked_bytes,
        "unsealed_bytes": report.unsealed_bytes,
        "damaged_block_count": len(report.damaged),
        "damaged_blocks": context.pool.damage.entries(),
        "unreadable_logs": report.unreadable_logs,
        "duration_ms": report.duration_ms,
    }


async def _verify(context: CommandContext, command: Command) -> Answer:
    """verify NAME [job=NAME]: read all that a snapshot holds, and hold it against the root it was sealed with."""
    command.word_count(1, 1, "the name of a snapshot")
    command.known_options("job")
    snapshot = snapshot_of(context.pool, command.words[0])
    report = await verify(context.pool, snapshot, command.one_of("job") or "")
    return {
        "root": report.root,
        "computed_root": report.computed_root or None,
        "is_proven": report.is_proven,
        "checked_bytes": report.checked_bytes,
        "damaged": [{"volume": name, "offset": offset} for name, offset in report.damaged],
        "unsealed_volumes": report.unsealed,
    }


COMMANDS: Mapping[str, CommandFunction] = {"scrub": _scrub, "verify": _verify}
