"""Blocks that were read, or scrubbed, and are not what was sealed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from .tasks import Wakeup

KNOWN_MAX = 4096


class DamagedBlock(NamedTuple):
    """A block of an object in a change log of a processor."""

    processor_index: int
    log_id: int
    object_index: int
    block: int


class DamageLedger:
    """What is known to be damaged, until a scrub finds it no more. Some thousands at most are kept.

    ``known`` has for each block who has it, as far as that is worked out; ``found`` is set when there
    are new ones.
    """

    def __init__(self) -> None:
        self.known: dict[DamagedBlock, dict[str, object] | None] = {}
        self._told_before: set[DamagedBlock] = set()
        self.found = Wakeup()

    def note(self, processor_index: int, log_id: int, object_index: int, block: int) -> None:
        """A block turned out to be damaged. Runs on the hot path of those that do."""
        damaged = DamagedBlock(processor_index, log_id, object_index, block)
        if damaged not in self.known and len(self.known) < KNOWN_MAX:
            self.known[damaged] = None
            self.found.set()

    def replace(
        self,
        found: Iterable[DamagedBlock],
        known_before: Collection[DamagedBlock],
        unread: Collection[tuple[int, int]] = (),
    ) -> None:
        """All was looked at, and this is what is damaged, with what readers met since ``known_before`` was known.

        But for logs that could not be read, ``unread`` by processor and log: what is known of those stays known.
        """
        before = self.known
        met = [one for one in before if one not in known_before or (one.processor_index, one.log_id) in unread]
        self.known = {one: before.get(one) for one in list(dict.fromkeys([*found, *met]))[:KNOWN_MAX]}
        # Who has them may be others by now, by other names: it is worked out anew.
        self._told_before = {one for one, named in self.known.items() if named is not None}
        self.found.set()

    def untold(self) -> list[DamagedBlock]:
        """Those of which nobody knows yet who has them, or only who had them before the last scrub."""
        return [one for one, named in self.known.items() if named is None or one in self._told_before]

    def tell(self, damaged: DamagedBlock, named: dict[str, object]) -> bool:
        """Who has a block is worked out; whether that is news."""
        is_news = self.known.get(damaged) != named
        self._told_before.discard(damaged)
        if damaged in self.known:
            self.known[damaged] = named
        return is_news

    def entries(self) -> list[dict[str, object]]:
        """All of which it is known who has them, for status."""
        return [named for named in self.known.values() if named is not None]
