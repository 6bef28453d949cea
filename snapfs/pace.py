"""How work in the background makes room for those who use the volumes.

Each of its steps has threads, and with them the interpreter and the device, busy for some milliseconds, and a request
that comes meanwhile waits: the slowest writes in a thousand beside the sealing of snapshots took 1.4 ms without these
rests, and 0.75 ms with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from .tasks import Wakeup

_REST_FACTOR = 1
_REST_FACTOR_IN_USE = 9
# Also after work that had no place to rest in.
_REST_S_MAX = 1.0


class Demand:
    """How many reads and writes there were so far; a mount sets ``count``."""

    def __init__(self) -> None:
        self.count: Callable[[], int] = lambda: 0


class Pace:
    """When one task rests, and for how long: as long as it worked, nine times as long while volumes are used.

    A second at most, for what is pressing is found out about between two rests.
    """

    def __init__(self, demand: Demand) -> None:
        self._demand = demand
        self._seen_count = 0
        self._since_ns = 0
        self._hurried_count = 0
        self._hurry = Wakeup()

    def begin(self) -> None:
        """Work begins."""
        self._since_ns = time.perf_counter_ns()

    @contextmanager
    def hurried(self, is_hurried: bool = True) -> Iterator[None]:
        """Somebody waits for the work to be done: until the block ends there are no rests."""
        self._hurried_count += is_hurried
        if is_hurried:
            self._hurry.set()
        try:
            yield
        finally:
            self._hurried_count -= is_hurried

    async def rest(self, *, is_pressed: bool = False) -> None:
        """Rest after some work. ``is_pressed``: the work is needed more than those who use the volumes are kept up."""
        worked_s = (time.perf_counter_ns() - self._since_ns) / 1e9
        rest_s = min(_REST_S_MAX, self._factor(is_pressed) * worked_s)
        if self._hurried_count:
            await trio.lowlevel.checkpoint()
        else:
            with trio.move_on_after(rest_s):
                await self._hurry.wait()
        self._since_ns = time.perf_counter_ns()

    def _factor(self, is_pressed: bool) -> int:
        count = self._demand.count()
        is_in_use = count - self._seen_count > 1
        self._seen_count = count
        return _REST_FACTOR_IN_USE if is_in_use and not is_pressed else _REST_FACTOR
