"""Who has a damaged block: the volumes and snapshots in which it is, by name and offset."""

from __future__ import annotations

import logging
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import trio

from .damage import DamagedBlock, DamageLedger
from .errors import SnapfsError
from .events import EventLog
from .geometry import BLOCK_SHIFT, OBJECT_SHIFT, VolumeId
from .objecthistory import ObjectHistory, Stretch
from .processor import Processor
from .snapshotindex import NEVER
from .snapshots import SnapshotTable
from .tasks import in_thread
from .units import show_name
from .volumes import VolumeTable

SNAPSHOTS_NAMED_MAX = 64
# Volumes whose names over all snapshots are in memory at a time.
_VOLUMES_MAX = 16


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
            names: dict[VolumeId, _Names] = {}
            for _, group in groupby(sorted(self._ledger.untold()), key=lambda one: one[:3]):
                await self._tell_object(list(group), names)

    async def _tell_object(self, blocks: Sequence[DamagedBlock], names: dict[VolumeId, _Names]) -> None:
        """Tell who has these blocks of one object in one change log."""
        try:
            histories = await self._histories(blocks)
            if len(names) + len(histories) > _VOLUMES_MAX:
                names.clear()
            for volume_id in histories:
                await self._note_names(volume_id, names)
        except (SnapfsError, OSError) as error:
            for damaged in blocks:
                self._tell(damaged, [{"reason": f"who has it is not known: {error}"}])
            return
        # Most blocks of an object have been in the same snapshots.
        worked_out: dict[tuple[tuple[VolumeId, Stretch], ...], list[dict[str, object]]] = {}
        for damaged in blocks:
            key = tuple(
                (volume_id, stretch)
                for volume_id, stretches in histories.items()
                for stretch, mask in stretches.items()
                if mask >> damaged.block & 1
            )
            if key not in worked_out:
                await trio.lowlevel.checkpoint()
                worked_out[key] = [
                    one
                    for volume_id, of_volume in groupby(key, key=lambda pair: pair[0])
                    for one in names[volume_id].told([stretch for _, stretch in of_volume])
                ]
            self._tell(damaged, worked_out[key])

    def _tell(self, damaged: DamagedBlock, named: list[dict[str, object]]) -> None:
        told: dict[str, object] = {
            "offset": (damaged.object_index << OBJECT_SHIFT) + (damaged.block << BLOCK_SHIFT),
            "processor": damaged.processor_index,
            "log_id": damaged.log_id,
            "volumes": named,
        }
        if self._ledger.tell(damaged, told):
            self._events.note("damaged-block", logging.ERROR, **told)

    async def _histories(self, blocks: Sequence[DamagedBlock]) -> dict[VolumeId, dict[Stretch, int]]:
        """By volume and from when to when: the mask of those of an object's damaged blocks that it has, or had."""
        damaged = blocks[0]
        processor = self._processors[damaged.processor_index]
        await processor.commit(processor.sound_portions())
        log = await processor.access.ask(processor.access.store.log, damaged.log_id)
        if log is None:
            return {}
        history = ObjectHistory(processor, self._volumes.traits, damaged.object_index, damaged.log_id)
        wanted = sum(1 << one.block for one in blocks)
        found: dict[VolumeId, dict[Stretch, int]] = {}
        for volume_id in self._volumes.traits.family_of(log.volume_id):
            stretches = await history.stretches(volume_id, wanted)
            if stretches:
                found[volume_id] = stretches
        return found

    async def _note_names(self, volume_id: VolumeId, names: dict[VolumeId, _Names]) -> None:
        """The names that a volume has, and has had in snapshots, into ``names``."""
        if volume_id in names:
            return
        versions = await self._snapshots.attributes_over_time(volume_id)
        named = [(one.epoch, one.instant, one.attributes.name) for one in versions]
        holding = [(one.instant, one.name) for one in self._snapshots.by_id.values() if one.holds(volume_id)]
        live = self._volumes.by_id.get(volume_id)
        live_name = None if live is None or live.is_removed else live.name
        names[volume_id] = await in_thread(_names_of, live_name, holding, named)


@dataclass(frozen=True, slots=True)
class _Names:
    """A volume's name now, and by each that it has had the snapshots in which it had it: instants and names."""

    live_name: bytes | None
    snapshots: dict[bytes, tuple[list[int], list[bytes]]]

    def told(self, stretches: Iterable[Stretch]) -> list[dict[str, object]]:
        """By its names: whether it has something now that it has had for these stretches, and in which snapshots."""
        ordered = sorted(stretches, reverse=True)
        is_live = self.live_name is not None and any(one.last == NEVER for one in ordered)
        found: list[tuple[bool, int, dict[str, object]]] = []
        for name, (instants, snapshot_names) in self.snapshots.items():
            places = [(bisect_left(instants, one.first), bisect_right(instants, one.last)) for one in ordered]
            count = sum(high - low for low, high in places)
            is_name_live = is_live and name == self.live_name
            if not count and not is_name_live:
                continue
            newest = islice((one for low, high in places for one in range(high - 1, low - 1, -1)), SNAPSHOTS_NAMED_MAX)
            shown = list(newest)
            told: dict[str, object] = {
                "volume": show_name(name),
                "is_live": is_name_live,
                "snapshots": [show_name(snapshot_names[one]) for one in shown],
                "snapshot_count": count,
            }
            found.append((is_name_live, instants[shown[0]] if shown else NEVER, told))
        return [told for _, _, told in sorted(found, key=lambda one: one[:2], reverse=True)]


def _names_of(
    live_name: bytes | None,
    holding: Iterable[tuple[int, bytes | None]],
    named: Sequence[tuple[int, int, bytes]],
) -> _Names:
    """From the instants and names of snapshots, and a volume's names: first and last instant, and name. Blocks."""
    found: dict[bytes, tuple[list[int], list[bytes]]] = {} if live_name is None else {live_name: ([], [])}
    begins = [first for first, _, _ in named]
    for instant, snapshot_name in sorted(holding):
        place = bisect_right(begins, instant) - 1
        if place < 0 or instant > named[place][1]:
            # It was not there then.
            continue
        instants, snapshot_names = found.setdefault(named[place][2], ([], []))
        instants.append(instant)
        snapshot_names.append(snapshot_name or b"")
    return _Names(live_name, found)
