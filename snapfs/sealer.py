"""The pool's task that seals snapshots: checksums for their blocks, and a root over all.

It goes by the order of time, in the background, and pauses as long as it works, so that it takes at
most half of one core; longer while volumes are used (the slowest writes in a thousand took 1.4 ms
beside it, and 0.75 ms with these pauses), but for when many snapshots wait.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import trio

from .catalogaccess import CatalogAccess
from .contenthash import ContentHash, root_of
from .errors import SnapfsError
from .events import EventLog
from .formats import COPY_ON_WRITE, CatalogBatch, ContentRow, ShardBatch
from .geometry import VolumeId
from .objectdigests import NotSealedError
from .pace import Demand, Pace
from .processor import Processor
from .sealing import Lookups, at_full_pace, portion_content, seal_logs
from .sealing import Pace as LogPace
from .snapshot import Snapshot
from .snapshots import SnapshotTable
from .tasks import Wakeup
from .traits import TraitsTable
from .units import show_name

RETRY_S = 30.0
_CONTENT_KEPT_INSTANTS = 16
_TOLD_MAX = 256
_WAITING_MAX = 1024
_SEALED_AT_ONCE = 16
_CONTENTS_MAX = 8192


@dataclass(slots=True)
class _Sealed:
    """A snapshot whose root is known, and is to be noted."""

    snapshot: Snapshot
    root: str
    unsealed_ids: frozenset[VolumeId]


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
        self._lookups = {one.index: Lookups.of(one.access.store) for one in processors}
        self._events = events
        self._wakeup = wakeup
        self._turn = trio.Lock()
        self._pace = Pace(demand)
        self._is_behind = False
        # By processor and volume: the content hashes that were found last, and which are not stored yet.
        self._contents: OrderedDict[tuple[int, VolumeId], ContentRow] = OrderedDict()
        self._unkept: set[tuple[int, VolumeId]] = set()
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
        waiting = self.waiting()
        self._is_behind = len(waiting) > _WAITING_MAX
        rest = self._rest if gently else at_full_pace
        is_complete = True
        for processor in self._processors:
            is_complete &= await seal_logs(processor, rest, self._note_failure)
        for start in range(0, len(waiting), _SEALED_AT_ONCE):
            if any(one.is_short for one in self._processors):
                return False
            self._is_behind = len(waiting) - start > _WAITING_MAX
            await self._seal_lot(waiting[start : start + _SEALED_AT_ONCE], rest)
        return is_complete and not self.waiting()

    async def _seal_lot(self, snapshots: list[Snapshot], rest: LogPace) -> None:
        """Seal some snapshots, the oldest first: their roots are noted in one commit."""
        lot: list[_Sealed] = []
        for snapshot in snapshots:
            with self._noting_failure(snapshot):
                sealed = await self._look_at(snapshot)
                if sealed is not None:
                    lot.append(sealed)
            await rest()
        if lot:
            with self._noting_failure(lot[0].snapshot):
                await self._note_contents()
                await self._note_roots([one for one in lot if one.snapshot.snapshot_id in self._snapshots.by_id])

    @contextmanager
    def _noting_failure(self, snapshot: Snapshot) -> Iterator[None]:
        try:
            yield
        except NotSealedError:
            return
        except (SnapfsError, OSError) as error:
            if snapshot.snapshot_id in self._snapshots.by_id:
                self._note_failure(f"snapshot {show_name(snapshot.name or b'')}", error)

    def _note_failure(self, what: str, error: Exception) -> None:
        """Tell of a failure, once."""
        told = f"{what}: {error}"
        if told not in self._told:
            if len(self._told) >= _TOLD_MAX:
                self._told.clear()
            self._told.add(told)
            self._events.note("sealing-failed", logging.WARNING, what=what, reason=str(error))

    async def _rest(self) -> None:
        await self._pace.rest(is_pressed=self._is_behind)

    def is_covered(self, volume_id: VolumeId) -> bool:
        """Whether all that a volume is lies in change logs, and not in a source that goes on changing or is others'."""
        line = [volume_id, *(one.volume_id for one in self._traits.lineage(volume_id))]
        traits = [self._traits.get(one) for one in line]
        return not any(one.change_mode == COPY_ON_WRITE or one.source_path for one in traits)

    async def _look_at(self, snapshot: Snapshot) -> _Sealed | None:
        """What a snapshot is to be sealed with; None when it is deleted meanwhile. Raises NotSealedError."""
        if snapshot.snapshot_id not in self._snapshots.by_id:
            return None
        members = await self._snapshots.attributes_of(snapshot)
        covered = [one for one in sorted(members) if self.is_covered(one)]
        volumes = []
        contents: dict[tuple[int, VolumeId], ContentRow] = {}
        for volume_id in covered:
            content = ContentHash()
            for processor in self._processors:
                key = (processor.index, volume_id)
                lookups = self._lookups[processor.index]
                known = self._contents.get(key)
                value = await portion_content(processor, lookups, volume_id, snapshot.instant, known)
                content.combine(value)
                contents[key] = ContentRow(volume_id, snapshot.instant, value)
            attributes = members[volume_id]
            volumes.append((attributes.name, attributes.size_bytes, content.value))
        if snapshot.snapshot_id not in self._snapshots.by_id:
            # What was read of it may be another's.
            return None
        self._remember(contents)
        return _Sealed(snapshot, root_of(volumes), frozenset(members) - set(covered))

    def _remember(self, contents: dict[tuple[int, VolumeId], ContentRow]) -> None:
        for key, row in contents.items():
            self._contents[key] = row
            self._contents.move_to_end(key)
            self._unkept.add(key)

    async def _note_roots(self, lot: list[_Sealed]) -> None:
        if not lot:
            return
        previous_roots = self._previous_roots(lot)
        rows = []
        for one, previous_root in zip(lot, previous_roots, strict=True):
            told = ",".join(str(volume_id) for volume_id in sorted(one.unsealed_ids))
            rows.append((one.snapshot.snapshot_id, one.root, previous_root, told))
        await self._catalog.save([], lambda: CatalogBatch(roots=rows))
        for one, previous_root in zip(lot, previous_roots, strict=True):
            snapshot = one.snapshot
            snapshot.root, snapshot.previous_root, snapshot.unsealed_ids = one.root, previous_root, one.unsealed_ids
            self._events.note("snapshot-sealed", name=show_name(snapshot.name or b""), root=one.root)

    def _previous_roots(self, lot: list[_Sealed]) -> list[str]:
        """For each the root of the snapshot before it that is there and sealed, or among these."""
        last = lot[-1].snapshot.instant
        roots = {one.instant: one.root for one in self._snapshots.by_id.values() if one.root and one.instant < last}
        roots |= {one.snapshot.instant: one.root for one in lot}
        instants = sorted(roots)
        before = {instant: roots[earlier] for earlier, instant in pairwise(instants)}
        return [before.get(one.snapshot.instant, "") for one in lot]

    async def _note_contents(self) -> None:
        """Keep content hashes for the next snapshots to start from, once the daemon was stopped."""
        for processor in self._processors:
            rows = [self._contents[key] for key in self._unkept if key[0] == processor.index]
            kept = await processor.access.ask(_worth_keeping, processor, rows)
            if kept:
                await processor.commit([], ShardBatch(contents=kept))
        self._unkept.clear()
        # None that is not stored, or too old a one: it would have to be worked out from all of its volume again.
        while len(self._contents) > _CONTENTS_MAX:
            self._contents.popitem(last=False)


def _worth_keeping(processor: Processor, rows: list[ContentRow]) -> list[ContentRow]:
    """Those of which the stored one is no start for the next snapshot any more, or becomes an expensive one."""
    found = []
    for row in rows:
        stored = processor.access.store.content(row.volume_id)
        if stored is None:
            is_due = row.value != 1
        else:
            is_start = processor.snapshots.holds(row.volume_id, stored.instant, stored.instant)
            age = row.instant - stored.instant
            is_due = age >= _CONTENT_KEPT_INSTANTS or (not is_start and age > 0)
        if is_due:
            found.append(row)
    return found
