"""Room kept back so that deleting still works on a full device (I10)."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import trio

from .backends import Device
from .errors import DatabaseFullError, NoMemoryError, NoSpaceError
from .formats import RESERVE_FILE
from .notresident import NotResidentError, OldBlocks
from .tasks import in_thread

RESERVE_BYTES_MAX = 16 << 20
_SHARE = 64
# Schemas of a later version take a few pages of each database.
_UPGRADE_BYTES = 4 << 20


class Reserve:
    """A file of allocated blocks in the pool's directory, given up when what must go through finds no room.

    It holds 16 MiB, or a 64th of a device that is smaller than 1 GiB. It must go through that what was written is
    committed, and that what is deleted gives its room back. So that this room lasts for them, ``is_short`` from when it
    was given up until there is twice as much: then nobody else may take any.
    """

    def __init__(self, home: Device) -> None:
        self._home = home
        self._turn = trio.Lock()
        self.is_spent = not self._is_full()
        self.is_short = self.is_spent and not self._has_room()

    def check_now(self) -> None:
        """Raises NoSpaceError while what room there is is kept for others, NotResidentError while it is set aside."""
        if self.is_short:
            if self._has_room():
                raise NotResidentError(self._refill)
            raise _full()

    async def check(self) -> None:
        """Raises NoSpaceError while what room there is is kept for others."""
        await self.refill()
        if self.is_short:
            raise _full()

    def _has_room(self) -> bool:
        return self._home.space().free_bytes > 2 * self._wanted_bytes()

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

    async def helped(self, call: Callable[[], Awaitable[object]]) -> None:
        """Run something that must go through; if it finds no room, run it once more with the reserve given up."""
        was_spent = self.is_spent
        try:
            await call()
        except DatabaseFullError:
            if was_spent:
                raise
            async with self._turn:
                # Another one may have given it up meanwhile: there is room for this one too.
                if not self.is_spent:
                    await self._give_up()
            await call()

    async def _give_up(self) -> None:
        # First: nobody else is to take what is about to be free.
        self.is_short = True
        try:
            # Cancelled halfway it would not be known whether it is there.
            with trio.CancelScope(shield=True):
                await in_thread(give_up, self._home)
        except BaseException:
            self.is_short = False
            raise
        self.is_spent = True

    async def refill(self) -> None:
        """Set the room aside again if it was given up and there is some now."""
        if self.is_spent or self.is_short:
            async with self._turn:
                await self._refill_once()

    async def _refill_once(self) -> None:
        # Another one may have done it meanwhile.
        if (self.is_spent or self.is_short) and self._has_room():
            with contextlib.suppress(OSError, NoMemoryError):
                await in_thread(self.fill)
                self.is_spent = False
            # Also where it cannot be set aside: there is some.
            self.is_short = False

    async def _refill(self, old_blocks: OldBlocks) -> None:
        # It may have been done by then; whoever asks again must not keep it from being known.
        await trio.lowlevel.checkpoint()
        await self.refill()


def make_room(home: Device) -> None:
    """Give the reserve of a pool up that is to be upgraded, if there is hardly any other room. Blocks."""
    if home.space().free_bytes < _UPGRADE_BYTES:
        give_up(home)


def give_up(home: Device) -> None:
    """Give the room back that a pool's reserve holds. Blocks."""
    try:
        file = home.open(RESERVE_FILE)
    except FileNotFoundError:
        # Whoever removed it has given it up.
        return
    try:
        file.truncate(0)
        file.sync()
    finally:
        file.close()


def _full() -> NoSpaceError:
    return NoSpaceError("the device that holds the pool's directory is full", "Delete snapshots or free space on it")
