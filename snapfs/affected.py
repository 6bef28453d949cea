"""Who has a damaged block: the volumes and snapshots in which it is, by name and offset."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from . import blockmap
from .damage import DamagedBlock, DamageLedger
from .errors import SnapfsError
from .events import EventLog
from .geometry import BLOCK_SHIFT, OBJECT_SHIFT, VolumeId
from .processor import Processor
from .shardstore import ShardStore
from .snapshotindex import NEVER
from .snapshots import SnapshotTable
from .traits import TraitsTable
from .units import show_name
from .volumes import VolumeTable

SNAPSHOTS_NAMED_MAX = 64
Span = tuple[int, int]


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
        for damaged in self._ledger.untold():
            try:
                named = await self._named(damaged)
            except (SnapfsError, OSError) as error:
                named = [{"reason": f"who has it is not known: {error}"}]
            offset = (damaged.object_index << OBJECT_SHIFT) + (damaged.block << BLOCK_SHIFT)
            told: dict[str, object] = {
                "offset": offset,
                "processor": damaged.processor_index,
                "log_id": damaged.log_id,
                "volumes": named,
            }
            self._ledger.tell(damaged, told)
            self._events.note("damaged-block", logging.ERROR, **told)

    async def _named(self, damaged: DamagedBlock) -> list[dict[str, object]]:
        processor = self._processors[damaged.processor_index]
        await processor.commit([one for one in processor.portions.values() if one.failure is None])
        log = await processor.access.ask(processor.access.store.log, damaged.log_id)
        if log is None:
            return []
        traits = self._volumes.traits
        found = []
        for volume_id in traits.family_of(log.volume_id):
            spans = await processor.access.ask(_spans, processor.access.store, traits, volume_id, damaged)
            found += await self._in_volume(volume_id, spans)
        return found

    async def _in_volume(self, volume_id: VolumeId, spans: list[Span]) -> list[dict[str, object]]:
        """By the name that it has or had: whether it is in the live volume, and in which snapshots."""
        by_name: dict[bytes, list[str]] = {}
        live = self._volumes.by_id.get(volume_id)
        if live is not None and not live.is_removed and any(last == NEVER for _, last in spans):
            by_name[live.name] = []
        is_live = set(by_name)
        for snapshot in sorted(self._snapshots.by_id.values(), key=lambda one: -one.instant):
            if not snapshot.holds(volume_id) or not any(low <= snapshot.instant <= high for low, high in spans):
                continue
            attributes = (await self._snapshots.members(snapshot)).by_id.get(volume_id)
            if attributes is not None:
                by_name.setdefault(attributes.name, []).append(show_name(snapshot.name or b""))
        return [
            {
                "volume": show_name(name),
                "is_live": name in is_live,
                "snapshots": names[:SNAPSHOTS_NAMED_MAX],
                "snapshot_count": len(names),
            }
            for name, names in by_name.items()
        ]


def _spans(store: ShardStore, traits: TraitsTable, volume_id: VolumeId, damaged: DamagedBlock) -> list[Span]:
    """The instants at which a volume names a damaged block; NEVER is now. Blocks."""
    spans: list[Span] = []
    index = damaged.object_index
    first_own = NEVER
    for copy in store.copies_from(volume_id, index, 0):
        first_own = min(first_own, copy.epoch)
        if blockmap.entry(copy.block_map, damaged.block) == damaged.log_id:
            spans.append((copy.epoch, copy.instant))
    for row in store.maps(volume_id, index, index):
        first_own = min(first_own, row.epoch)
        if blockmap.entry(row.block_map, damaged.block) == damaged.log_id:
            spans.append((row.epoch, NEVER))
    row_of = traits.get(volume_id)
    if row_of.inherits:
        origin = _spans(store, traits, row_of.origin_id, damaged)
        if any(low <= row_of.origin_instant <= high for low, high in origin):
            spans.append((row_of.origin_instant, NEVER if first_own == NEVER else first_own - 1))
    return spans
