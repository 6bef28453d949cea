"""What a call that never awaits raises when it needs something that is not in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
# By processor, change log and place in its file: ids of logs are those of one processor.
OldBlocks = dict[tuple[int, int, int], bytes]
Fetch = Callable[[OldBlocks], Awaitable[None]]


class NotResidentError(Exception):
    """Something a ``_now`` call needs is not in memory. Await ``fetch``, then call again.

    ``fetch`` puts old contents of blocks into the dictionary it is given.
    """

    def __init__(self, fetch: Fetch) -> None:
        super().__init__()
        self.fetch = fetch


async def when_resident(call: Callable[[OldBlocks], T]) -> T:
    """Have a ``_now`` call go through: fetch what it names until it needs nothing more; what it gives.

    ``call`` gets the old contents of blocks that were fetched. One dictionary serves all tries, for it also tells
    what was looked for in vain, so that nothing is looked for without end.
    """
    old_blocks: OldBlocks = {}
    while True:
        try:
            return call(old_blocks)
        except NotResidentError as missing:
            await missing.fetch(old_blocks)
