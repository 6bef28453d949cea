"""Who has a damaged block: the volumes and snapshots in which it is, by name and offset."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import trio

from . import blockmap
from .blockmap import BlockMap
from .damage import DamagedBlock, DamageLedger
from .errors import SnapfsError
from .events import EventLog
from .formats import VersionRow
from .geometry import BLOCK_SHIFT, OBJECT_SHIFT, VolumeId
from .processor import Processor
from .shardstore import ShardStore
from .snapshotindex import NEVER
from .snapshots import SnapshotTable
from .traits import TraitsTable
from .units import show_name
from .volumes import VolumeTable

SNAPSHOTS_NAMED_MAX = 64


class DamageTeller:
    """The pool's task that works out who has what is damaged, and tells it as an event."""

    def __init__(
        self,
        ledger: DamageLedger,
        volumes: VolumeTable,
        snapshots: SnapshotTable,
        processors: Sequence[Processor],
        events: EventLog,
    ) -> None:
        self._ledger = ledger
        self._volumes = volumes
        self._snapshots = snapshots
        self._processors = processors
        self._events = events
        # One at a time, so that nothing is told twice.
        self._turn = trio.Lock()

    async def run(self) -> None:
        """Tell whatever is found; until cancelled."""
        while True:
            await self._ledger.found.wait()
            await self.tell_all()

    async def tell_all(self) -> None:
        """Tell all that nobody was told of yet."""
        async with self._turn:
            await self._tell_all()

    async def _tell_all(self) -> None:
        for _, group in groupby(sorted(self._ledger.untold()), key=lambda one: one[:3]):
            blocks = list(group)
            try:
                histories = await self._histories(blocks[0])
            except (SnapfsError, OSError) as error:
                for damaged in blocks:
                    self._tell(damaged, [{"reason": f"who has it is not known: {error}"}])
                continue
            for damaged in blocks:
                self._tell(damaged, [one for history in histories for one in self._in_volume(history, damaged)])

    def _tell(self, damaged: DamagedBlock, named: list[dict[str, object]]) -> None:
        told: dict[str, object] = {
            "offset": (damaged.object_index << OBJECT_SHIFT) + (damaged.block << BLOCK_SHIFT),
            "processor": damaged.processor_index,
            "log_id": damaged.log_id,
            "volumes": named,
        }
        self._ledger.tell(damaged, told)
        self._events.note("damaged-block", logging.ERROR, **told)

    async def _histories(self, damaged: DamagedBlock) -> list[_History]:
        """What all volumes that may name a block say of its object, and have said."""
        processor = self._processors[damaged.processor_index]
        await processor.commit([one for one in processor.portions.values() if one.failure is None])
        store = processor.access.store
        log = await processor.access.ask(store.log, damaged.log_id)
        if log is None:
            return []
        traits = self._volumes.traits
        spans: dict[VolumeId, list[_Span]] = {}
        for volume_id in traits.family_of(log.volume_id):
            await processor.access.ask(_spans, store, traits, volume_id, damaged.object_index, spans)
        return [_History(one, spans[one], await self._snapshots.attributes_over_time(one)) for one in spans]

    def _in_volume(self, history: _History, damaged: DamagedBlock) -> list[dict[str, object]]:
        """By the name that it has or had: whether it is in the live volume, and in which snapshots."""
        volume_id = history.volume_id
        spans = sorted(
            (one.first, one.last)
            for one in history.spans
            if blockmap.entry(one.block_map, damaged.block) == damaged.log_id
        )
        if not spans:
            return []
        by_name: dict[bytes, list[str]] = {}
        live = self._volumes.by_id.get(volume_id)
        if live is not None and not live.is_removed and any(last == NEVER for _, last in spans):
            by_name[live.name] = []
        is_live = set(by_name)
        for snapshot in sorted(self._snapshots.by_id.values(), key=lambda one: -one.instant):
            if snapshot.holds(volume_id) and _is_within(spans, snapshot.instant):
                name = history.name_at(snapshot.instant)
                if name is not None:
                    by_name.setdefault(name, []).append(show_name(snapshot.name or b""))
        return [
            {
                "volume": show_name(name),
                "is_live": name in is_live,
                "snapshots": names[:SNAPSHOTS_NAMED_MAX],
                "snapshot_count": len(names),
            }
            for name, names in by_name.items()
        ]


class _Span(NamedTuple):
    """The instants for which an object has had a map; NEVER is now."""

    first: int
    last: int
    block_map: BlockMap


@dataclass(frozen=True, slots=True)
class _History:
    """The maps of an object of a volume, and the volume's attributes, over time."""

    volume_id: VolumeId
    spans: list[_Span]
    attributes: list[VersionRow]

    def name_at(self, instant: int) -> bytes | None:
        """The volume's name at an instant; None when it was not there."""
        place = bisect_right(self.attributes, instant, key=lambda one: one.epoch) - 1
        found = self.attributes[place] if place >= 0 else None
        return found.attributes.name if found is not None and instant <= found.instant else None


def _is_within(spans: list[tuple[int, int]], instant: int) -> bool:
    """Whether an instant is in one of some spans, which are in order and do not overlap."""
    place = bisect_right(spans, instant, key=lambda one: one[0]) - 1
    return place >= 0 and instant <= spans[place][1]


def _spans(
    store: ShardStore, traits: TraitsTable, volume_id: VolumeId, object_index: int, known: dict[VolumeId, list[_Span]]
) -> list[_Span]:
    """The maps that an object of a volume has had, into ``known`` with those of its ancestors. Blocks."""
    if volume_id in known:
        return known[volume_id]
    spans = [_Span(copy.epoch, copy.instant, copy.block_map) for copy in store.copies_from(volume_id, object_index, 0)]
    spans += [_Span(row.epoch, NEVER, row.block_map) for row in store.maps(volume_id, object_index, object_index)]
    row = traits.get(volume_id)
    if row.inherits:
        last = min((one.first for one in spans), default=NEVER)
        for origin in _spans(store, traits, row.origin_id, object_index, known):
            if origin.first <= row.origin_instant <= origin.last:
                # Until its own first map, it has what the origin had when it was cloned.
                spans.append(_Span(row.origin_instant, last if last == NEVER else last - 1, origin.block_map))
                break
    known[volume_id] = spans
    return spans
