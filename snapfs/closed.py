"""What stands for the portions of a volume while nobody may use them."""

from __future__ import annotations

from typing import NoReturn, cast

import trio

from .errors import SnapfsError
from .notresident import NotResidentError, OldBlocks
from .portion import Portion


class Closed:
    """Stands for a volume's portions while it is between two contents: whoever uses one waits, or is told why not."""

    def __init__(self, portion_count: int) -> None:
        self._opened = trio.Event()
        self._failure: SnapfsError | None = None
        self._portions = [self] * portion_count

    def portions(self) -> list[Portion]:
        """As many of them as it was made for, which needs no memory."""
        return cast("list[Portion]", self._portions)

    def __getattr__(self, name: str) -> NoReturn:
        if self._failure is not None:
            raise type(self._failure)(self._failure.reason, self._failure.fix)
        raise NotResidentError(self._wait)

    @property
    def failure(self) -> SnapfsError | None:
        """Why it stays closed, if it does."""
        return self._failure

    async def _wait(self, old_blocks: OldBlocks) -> None:
        await self._opened.wait()

    def open(self) -> None:
        """Have all who wait look again."""
        self._opened.set()

    def fail(self, failure: SnapfsError) -> None:
        """Have all who use it be told."""
        self._failure = failure
        self._opened.set()
