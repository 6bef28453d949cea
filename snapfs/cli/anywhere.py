"""Commands for a pool whether it is mounted or not."""

from __future__ import annotations

import os

import trio

from ..formats import POOL_FILE
from ..fuse.command import CommandContext
from ..fuse.control import run_line
from ..pool import open_pool
from .control import Answer, ask, command_line


def is_pool(where: str) -> bool:
    """Whether a pool's directory is there, and not a mount, in which a volume may have any name but ``.snapfs``."""
    has_descriptor = os.path.exists(os.path.join(where, POOL_FILE))
    return has_descriptor and not os.path.lexists(os.path.join(where, ".snapfs"))


def ask_anywhere(where: str, *words: str, options: list[tuple[str, str]] | None = None) -> Answer:
    """Like :func:`ask`, of a mount or of a pool that is not mounted, which is opened for it."""
    if not is_pool(where):
        return ask(where, *words, options=options)
    line = command_line(words, options)

    async def run() -> Answer:
        async with open_pool(where, f"snapfs {words[0]}") as pool:

            async def resize(name: bytes, size_bytes: int) -> None:
                await pool.volumes.truncate(pool.volumes.get(name), size_bytes)

            return await run_line(CommandContext(pool, resize), line) or {}

    return trio.run(run)
