"""What a call that never awaits raises when it needs something that is not in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

OldBlocks = dict[tuple[int, int], bytes]


class NotResidentError(Exception):
    """Something a ``_now`` call needs is not in memory. Await ``fetch``, then call again.

    ``fetch`` puts old contents of blocks into the dictionary it is given.
    """

    def __init__(self, fetch: Callable[[OldBlocks], Awaitable[None]]) -> None:
        super().__init__()
        self.fetch = fetch
