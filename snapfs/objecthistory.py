"""Which blocks of an object lie in one change log, in each volume of a family, from when to when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from . import blockmap
from .formats import COPY_ON_WRITE
from .geometry import VolumeId
from .processor import Processor
from .shardstore import StoredMap
from .snapshotindex import NEVER
from .traits import TraitsTable


class Stretch(NamedTuple):
    """The first and the last instant for which something holds; NEVER is now."""

    first: int
    last: int


class _Span(NamedTuple):
    """The instants for which an object has had a map, and the mask of its blocks that this has in the change log."""

    first: int
    last: int
    mask: int


class ObjectHistory:
    """One object of a family of volumes, as to one change log."""

    def __init__(self, processor: Processor, traits: TraitsTable, object_index: int, log_id: int) -> None:
        self._processor = processor
        self._traits = traits
        self._object_index = object_index
        self._log_id = log_id
        self._known: dict[VolumeId, list[_Span]] = {}

    async def stretches(self, volume_id: VolumeId, wanted: int) -> dict[Stretch, int]:
        """From when to when a volume has had which of the blocks of a mask in the log. Raises DamagedError."""
        for ancestor in reversed(self._traits.ancestors(volume_id)):
            await self._look_at(ancestor.volume_id)
        await self._look_at(volume_id)
        return await self._processor.access.in_thread(_stretches, self._known[volume_id], wanted)

    async def _look_at(self, volume_id: VolumeId) -> None:
        if volume_id in self._known:
            return
        access = self._processor.access
        versions = await access.ask(access.store.stored_versions, volume_id, self._object_index)
        row = self._traits.get(volume_id)
        source = self._processor.sources.get(volume_id) if row.change_mode == COPY_ON_WRITE else None
        source_id = None if source is None else int(source.log_id)
        spans = await access.in_thread(_spans, versions, self._log_id, source_id)
        if row.inherits:
            last = min((one.first for one in spans), default=NEVER)
            for origin in self._known.get(row.origin_id, ()):
                if origin.first <= row.origin_instant <= origin.last:
                    # Until its own first map, it has what the origin had when it was cloned.
                    spans.insert(0, _Span(row.origin_instant, last if last == NEVER else last - 1, origin.mask))
                    break
        self._known[volume_id] = spans


def _spans(versions: Sequence[tuple[int, int | None, StoredMap]], log_id: int, source_id: int | None) -> list[_Span]:
    """What the versions of an object name in a log, oldest first. Raises DamagedError. Blocks.

    Where a copy names the source, the next newer copy tells, and the newest means the source itself.
    """
    found: list[_Span] = []
    newer = 0
    for epoch, instant, stored in reversed(versions):
        mask = in_source = 0
        for block, count, named_id in blockmap.all_runs(blockmap.decode(stored)):
            run = ((1 << count) - 1) << block
            if named_id == log_id:
                mask |= run
            elif source_id is not None and named_id == source_id:
                in_source |= run
        if instant is not None:
            mask |= in_source & newer
            newer = mask
        found.append(_Span(epoch, NEVER if instant is None else instant, mask))
    return found[::-1]


def _stretches(spans: Sequence[_Span], wanted: int) -> dict[Stretch, int]:
    """From when to when a mask's blocks are in spans, which are in order. Blocks."""
    found: dict[Stretch, int] = {}
    begun: dict[int, int] = {}
    before = last = 0

    def end(gone: int) -> None:
        for first in [first for first, mask in begun.items() if mask & gone]:
            stretch = Stretch(first, last)
            found[stretch] = found.get(stretch, 0) | begun[first] & gone
            begun[first] &= ~gone
            if not begun[first]:
                del begun[first]

    for span in spans:
        now = span.mask & wanted
        if before & ~now:
            end(before & ~now)
        if now & ~before:
            begun[span.first] = now & ~before
        before, last = now, span.last
    end(before)
    return found
