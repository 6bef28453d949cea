"""The pool's task that seals snapshots: checksums for their blocks, and a root over all.

It goes by the order of time, in the background, and pauses as long as it works, so that it takes at
most half of one core; longer while volumes are used (the slowest writes in a thousand took 1.4 ms
beside it, and 0.75 ms with these pauses), but for when many snapshots wait.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from .catalogaccess import CatalogAccess
from .contenthash import ContentHash, root_of
from .errors import SnapfsError
from .events import EventLog
from .formats import COPY_ON_WRITE, CatalogBatch, ContentRow, ShardBatch
from .geometry import VolumeId
from .pace import Demand, Pace
from .processor import Processor
from .sealing import NotSealedError, at_full_pace, portion_content, seal_logs
from .snapshot import Snapshot
from .snapshots import SnapshotTable
from .tasks import Wakeup
from .traits import TraitsTable
from .units import show_name

RETRY_S = 30.0
_CONTENT_KEPT_INSTANTS = 16
_TOLD_MAX = 256
_WAITING_MAX = 1024


@dataclass(slots=True)
class _Portion:
    """What a processor is to note of a volume's content, once the snapshot is sealed."""

    processor: Processor
    row: ContentRow


class Sealer:
    """Seals what is not sealed yet."""

    def __init__(
        self,
        catalog: CatalogAccess,
        traits: TraitsTable,
        snapshots: SnapshotTable,
        processors: Sequence[Processor],
        events: EventLog,
        wakeup: Wakeup,
        demand: Demand,
    ) -> None:
        self._catalog = catalog
        self._traits = traits
        self._snapshots = snapshots
        self._processors = processors
        self._events = events
        self._wakeup = wakeup
        self._turn = trio.Lock()
        self._pace = Pace(demand)
        self._is_behind = False
        self._told: set[str] = set()

    async def run(self) -> None:
        """Seal whenever a snapshot was made; until cancelled."""
        while True:
            try:
                is_complete = await self.seal_all(gently=True)
            except Exception as error:  # noqa: BLE001 - the pool goes on without it, and says so
                self._note_failure("sealing", error)
                is_complete = False
            with trio.move_on_after(float("inf") if is_complete else RETRY_S):
                await self._wakeup.wait()

    def waiting(self) -> list[Snapshot]:
        """Snapshots that are not sealed yet, oldest first."""
        found = [one for one in self._snapshots.by_id.values() if not one.root]
        return sorted(found, key=lambda one: one.instant)

    async def seal_all(self, *, gently: bool = False) -> bool:
        """Seal all that can be; whether nothing is left."""
        with self._pace.hurried(not gently):
            async with self._turn:
                return await self._seal_waiting(gently=gently)

    async def _seal_waiting(self, *, gently: bool) -> bool:
        self._pace.begin()
        self._is_behind = len(self.waiting()) > _WAITING_MAX
        is_complete = True
        for processor in self._processors:
            is_complete &= await seal_logs(processor, self._rest if gently else at_full_pace, self._note_failure)
        for snapshot in self.waiting():
            try:
                await self._seal(snapshot)
            except NotSealedError:
                continue
            except (SnapfsError, OSError) as error:
                if snapshot.snapshot_id in self._snapshots.by_id:
                    self._note_failure(f"snapshot {show_name(snapshot.name or b'')}", error)
        return is_complete and not self.waiting()

    def _note_failure(self, what: str, error: Exception) -> None:
        """Tell of a failure, once."""
        told = f"{what}: {error}"
        if told not in self._told:
            if len(self._told) >= _TOLD_MAX:
                self._told.clear()
            self._told.add(told)
            self._events.note("sealing-failed", logging.WARNING, what=what, reason=str(error))

    async def _rest(self, size_bytes: int) -> None:
        await self._pace.rest(is_pressed=self._is_behind)

    def is_covered(self, volume_id: VolumeId) -> bool:
        """Whether all that a volume is lies in change logs, and not in a source that goes on changing or is others'."""
        line = [volume_id, *(one.volume_id for one in self._traits.lineage(volume_id))]
        traits = [self._traits.get(one) for one in line]
        return not any(one.change_mode == COPY_ON_WRITE or one.source_path for one in traits)

    async def _seal(self, snapshot: Snapshot) -> None:
        members = await self._snapshots.members(snapshot)
        covered = [one for one in members.ordered_ids if self.is_covered(one)]
        volumes = []
        portions: list[_Portion] = []
        for volume_id in covered:
            content = ContentHash()
            for processor in self._processors:
                value = await portion_content(processor, volume_id, snapshot.instant)
                content.combine(value)
                portions.append(_Portion(processor, ContentRow(volume_id, snapshot.instant, value)))
            attributes = members.by_id[volume_id]
            volumes.append((attributes.name, attributes.size_bytes, content.value))
        if snapshot.snapshot_id not in self._snapshots.by_id:
            # Deleted meanwhile, so what was read of it may be another's.
            return
        root = root_of(volumes)
        previous_root = self._root_before(snapshot)
        unsealed_ids = frozenset(members.by_id) - set(covered)
        told = ",".join(str(one) for one in sorted(unsealed_ids))
        await self._note_contents(portions)
        await self._catalog.save([], lambda: CatalogBatch(roots=[(snapshot.snapshot_id, root, previous_root, told)]))
        snapshot.root, snapshot.previous_root, snapshot.unsealed_ids = root, previous_root, unsealed_ids
        self._events.note("snapshot-sealed", name=show_name(snapshot.name or b""), root=root)

    def _root_before(self, snapshot: Snapshot) -> str:
        earlier = [one for one in self._snapshots.by_id.values() if one.root and one.instant < snapshot.instant]
        return max(earlier, key=lambda one: one.instant).root if earlier else ""

    async def _note_contents(self, portions: list[_Portion]) -> None:
        """Keep content hashes for the next snapshots to start from; one that did not change is kept now and then."""
        for processor in self._processors:
            batch = ShardBatch()
            for one in portions:
                if one.processor is not processor:
                    continue
                known = await processor.access.ask(processor.access.store.content, one.row.volume_id)
                if known is None and one.row.value == 1:
                    continue
                age = _CONTENT_KEPT_INSTANTS if known is None else one.row.instant - known.instant
                if age >= _CONTENT_KEPT_INSTANTS or (known is not None and age > 0 and known.value != one.row.value):
                    batch.contents.append(one.row)
            if batch:
                await processor.commit([], batch)
