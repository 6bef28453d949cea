"""Room kept back so that deleting still works on a full device (I10)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from .backends import Device
from .errors import NoSpaceError
from .formats import RESERVE_FILE
from .tasks import in_thread

RESERVE_BYTES_MAX = 16 << 20
_SHARE = 64


class Reserve:
    """A file of allocated blocks in the pool's directory, given up when a deletion finds no room.

    It holds 16 MiB, or a 64th of a device that is smaller than 1 GiB.
    """

    def __init__(self, home: Device) -> None:
        self._home = home
        self._turn = trio.Lock()
        self.is_spent = not self._is_full()

    def _wanted_bytes(self) -> int:
        return min(RESERVE_BYTES_MAX, self._home.space().total_bytes // _SHARE) & ~4095

    def _is_full(self) -> bool:
        try:
            file = self._home.open(RESERVE_FILE)
        except FileNotFoundError:
            return False
        try:
            return file.allocated() >= self._wanted_bytes()
        finally:
            file.close()

    def fill(self) -> None:
        """Set the room aside, in a new pool or again. Raises OSError when there is none. Blocks."""
        file = self._home.create(RESERVE_FILE)
        try:
            file.reserve(self._wanted_bytes())
            file.sync()
        finally:
            file.close()
        self.is_spent = False

    def _spend(self) -> None:
        file = self._home.open(RESERVE_FILE)
        try:
            file.truncate(0)
            file.sync()
        finally:
            file.close()
        self.is_spent = True

    async def helped(self, call: Callable[[], Awaitable[object]]) -> None:
        """Run something that frees room; if it finds none, run it once more with the reserve given up."""
        was_spent = self.is_spent
        try:
            await call()
        except NoSpaceError:
            if was_spent:
                raise
            async with self._turn:
                # Another one may have given it up meanwhile: there is room for this one too.
                if not self.is_spent:
                    await in_thread(self._spend)
            await call()

    async def refill(self) -> None:
        """Set the room aside again if it was given up and there is some now."""
        if self.is_spent and self._home.space().free_bytes > 2 * RESERVE_BYTES_MAX:
            try:
                await in_thread(self.fill)
            except OSError:
                self.is_spent = True
