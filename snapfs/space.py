"""Which snapshots hold which space, to the block: what deleting any set of them would free.

A block in a change log is named by consecutive versions of its object's map, and so by consecutive
snapshots; in a family of clones, by such a row of snapshots for each volume that names it. It is freed
when all of them are gone and no live volume names it. So blocks are counted by the rows of snapshots that hold
them (:class:`Holders`), once for all, and any question about any set is a sum over these counts. What lies in
sources and images is not counted: deleting snapshots frees nothing there.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import trio

from . import blockmap
from .blockmap import HOLE, BlockMap
from .formats import CHANGE_LOG, COPY_ON_WRITE, LogRow
from .geometry import BLOCKS_PER_OBJECT, VolumeId
from .processor import Processor
from .shardstore import ShardStore
from .snapshotindex import NEVER
from .traits import TraitsTable

_OBJECTS_A_STEP = 64
# Of each volume of a family, unless one object has more.
_COPIES_A_STEP = 4096
_ALL_BLOCKS = (1 << BLOCKS_PER_OBJECT) - 1


class Row(NamedTuple):
    """Consecutive snapshots that hold a volume: ``first`` to ``last`` in the group's list of instants."""

    group: int
    first: int
    last: int


class Holders(NamedTuple):
    """Who names a block: whether a live volume does, and which rows of snapshots."""

    is_live: bool
    rows: tuple[Row, ...]


@dataclass(slots=True)
class SpaceAccount:
    """Blocks by who holds them. ``instants`` has, by group, the instants of its snapshots in order.

    ``written`` has, by instant, the blocks that are in that snapshot and in none before of their volume.
    """

    instants: dict[int, list[int]]
    counts: dict[Holders, int] = field(default_factory=dict)
    written: dict[int, int] = field(default_factory=dict)

    def add(self, holders: Holders, count: int) -> None:
        """Count blocks in."""
        self.counts[holders] = self.counts.get(holders, 0) + count

    def freed_blocks(self, chosen: Collection[int]) -> int:
        """Blocks that deleting the snapshots of these instants would free."""
        return sum(count for _, count in self._freed(chosen))

    def first_needed(self, allowed: Iterable[int], needed_blocks: int) -> list[int]:
        """The first of these instants, as many as free so many blocks when they are deleted, or as many as free any.

        Without those whose deletion frees nothing, also with all the others.
        """
        ordered = sorted(allowed)
        useful = self._hold_any(holders for holders, _ in self._freed(ordered))
        ordered = [one for one in ordered if one in useful]
        enough = min(needed_blocks, self.freed_blocks(ordered))
        return ordered[: bisect_left(range(len(ordered)), enough, key=lambda count: self.freed_blocks(ordered[:count]))]

    def _freed(self, chosen: Collection[int]) -> Iterator[tuple[Holders, int]]:
        """The counts of what deleting the snapshots of these instants would free."""
        before = self._counted(chosen)

        def is_covered(row: Row) -> bool:
            return before[row.group][row.last + 1] - before[row.group][row.first] == row.last - row.first + 1

        for holders, count in self.counts.items():
            if not holders.is_live and holders.rows and all(is_covered(row) for row in holders.rows):
                yield holders, count

    def _hold_any(self, wanted: Iterable[Holders]) -> set[int]:
        """The instants in rows of these holders."""
        steps = {group: [0] * (len(instants) + 1) for group, instants in self.instants.items()}
        for holders in wanted:
            for row in holders.rows:
                steps[row.group][row.first] += 1
                steps[row.group][row.last + 1] -= 1
        return {
            instant
            for group, instants in self.instants.items()
            for instant, depth in zip(instants, accumulate(steps[group]), strict=False)
            if depth
        }

    def referenced_blocks(self, chosen: Collection[int]) -> int:
        """Blocks that any of the snapshots of these instants names."""
        before = self._counted(chosen)
        return sum(
            count
            for holders, count in self.counts.items()
            if any(before[row.group][row.last + 1] > before[row.group][row.first] for row in holders.rows)
        )

    def _counted(self, chosen: Collection[int]) -> dict[int, list[int]]:
        """By group: how many of the chosen are among its first so many."""
        wanted = set(chosen)
        found = {}
        for group, instants in self.instants.items():
            sums = [0]
            for instant in instants:
                sums.append(sums[-1] + (instant in wanted))
            found[group] = sums
        return found

    def exclusive_blocks(self) -> dict[int, int]:
        """By instant: blocks that only this one snapshot names."""
        found: dict[int, int] = {}
        for holders, count in self.counts.items():
            if holders.is_live or any(row.first != row.last for row in holders.rows):
                continue
            named = {self.instants[row.group][row.first] for row in holders.rows}
            if len(named) == 1:
                (instant,) = named
                found[instant] = found.get(instant, 0) + count
        return found


@dataclass(frozen=True, slots=True)
class _Version:
    """A map of an object as snapshots of instants ``epoch`` to ``instant`` see it; NEVER: as it is now."""

    epoch: int
    instant: int
    block_map: BlockMap


@dataclass(frozen=True, slots=True)
class VolumeSpan:
    """From which epoch to which instant a volume has been there; NEVER: it still is."""

    birth_epoch: int
    last_instant: int


SpanOf = Callable[[VolumeId], VolumeSpan]


async def account_of(
    processors: Sequence[Processor],
    traits: TraitsTable,
    of_all: Iterable[int],
    of_volumes: dict[VolumeId, list[int]],
    span_of: SpanOf,
    device_ids: Collection[int] | None = None,
) -> SpaceAccount:
    """Count all blocks in change logs by who holds them; with ``device_ids`` those on these devices.

    ``of_all`` are the instants of snapshots of all volumes; ``of_volumes`` has those of snapshots that name
    volumes, by volume. Everything must be committed.
    """
    base = sorted(of_all)
    instants = {0: base, **{int(one): sorted({*base, *named}) for one, named in of_volumes.items()}}
    account = SpaceAccount(instants)
    for processor in processors:
        store = processor.access.store
        logs = {
            int(row.log_id): row
            for row in await processor.access.ask(store.all_logs)
            if row.kind == CHANGE_LOG and (device_ids is None or row.device_id in device_ids)
        }
        sources = {volume_id: int(row.log_id) for volume_id, row in processor.sources.items()}
        counting = _Counting(account, store, traits, logs, span_of, sources)
        done: set[VolumeId] = set()
        for volume_id in sorted(await processor.access.ask(store.volume_ids)):
            if volume_id in done:
                continue
            family = traits.family_of(volume_id)
            done.update(family)
            from_object: int | None = 0
            while from_object is not None:
                from_object = await processor.access.ask(counting.count_some, family, from_object)
                await trio.lowlevel.checkpoint()
    return account


class _Counting:
    """Counting one processor's blocks."""

    def __init__(
        self,
        account: SpaceAccount,
        store: ShardStore,
        traits: TraitsTable,
        logs: dict[int, LogRow],
        span_of: SpanOf,
        source_ids: dict[VolumeId, int],
    ) -> None:
        self._source_ids = source_ids
        self._account = account
        self._store = store
        self._traits = traits
        self._logs = logs
        self._span_of = span_of

    def count_some(self, family: Sequence[VolumeId], from_object: int) -> int | None:
        """Count some objects of a family; from which to go on, None at the end. Blocks."""
        objects = self._store.objects_from(family, from_object, _OBJECTS_A_STEP)
        if not objects:
            return None
        versions, last = self._versions(family, objects[0], objects[-1])
        objects = [one for one in objects if one <= last]
        is_plain = len(family) == 1 and self._traits.get(family[0]).change_mode != COPY_ON_WRITE
        for object_index in objects:
            of_object = {one: versions.get((one, object_index), []) for one in family}
            if is_plain:
                self._count_plain(family[0], of_object[family[0]])
            else:
                self._count_family(of_object)
        return objects[-1] + 1

    def _versions(
        self, family: Sequence[VolumeId], first: int, last: int
    ) -> tuple[dict[tuple[VolumeId, int], list[_Version]], int]:
        """What there is of a range of objects, as far as is looked at in one step; and the last object of that."""
        found: dict[tuple[VolumeId, int], list[_Version]] = {}
        for volume_id in family:
            copies, last = self._store.some_copies(volume_id, first, last, _COPIES_A_STEP)
            for copy in copies:
                version = _Version(copy.epoch, copy.instant, copy.block_map)
                found.setdefault((volume_id, copy.object_index), []).append(version)
            last_instant = self._span_of(volume_id).last_instant
            for row in self._store.maps(volume_id, first, last):
                version = _Version(row.epoch, last_instant, row.block_map)
                found.setdefault((volume_id, row.object_index), []).append(version)
        return found, last

    def _list_of(self, volume_id: VolumeId) -> tuple[int, list[int]]:
        group = int(volume_id) if int(volume_id) in self._account.instants else 0
        return group, self._account.instants[group]

    # -- a volume without relatives ----------------------------------------------------------

    def _count_plain(self, volume_id: VolumeId, versions: list[_Version]) -> None:
        """Each version against the next: a block that the next no longer names was held up to this one.

        From when on is seen from its log: a block is written before the next snapshot.
        """
        group, instants = self._list_of(volume_id)
        is_live = bool(versions) and versions[-1].instant == NEVER
        for place, version in enumerate(versions):
            is_last = place == len(versions) - 1
            later = HOLE if is_last else versions[place + 1].block_map
            for _, count, log_id in blockmap.dropped_runs(version.block_map, later):
                log = self._logs.get(log_id)
                if log is None:
                    continue
                first = bisect_left(instants, log.epoch)
                last = bisect_right(instants, version.instant) - 1
                rows = (Row(group, first, last),) if first <= last else ()
                self._account.add(Holders(is_last and is_live, rows), count)
                if rows:
                    self._note_written(instants[first], count)

    def _note_written(self, instant: int, count: int) -> None:
        self._account.written[instant] = self._account.written.get(instant, 0) + count

    # -- clones, and what is written in place ------------------------------------------------

    def _count_family(self, of_object: dict[VolumeId, list[_Version]]) -> None:
        by_log: dict[int, list[tuple[int, bool, Row | None]]] = {}
        # Of an origin with many clones, and many copies, once.
        known: dict[VolumeId, list[_Version]] = {}
        for volume_id in of_object:
            for log_id, mask, is_live, row in self._stretches(volume_id, self._resolved(of_object, volume_id, known)):
                by_log.setdefault(log_id, []).append((mask, is_live, row))
                if row is not None and self._logs[log_id].volume_id == volume_id:
                    self._note_written(self._account.instants[row.group][row.first], mask.bit_count())
        for stretches in by_log.values():
            for holders, mask in _joined(stretches).items():
                self._account.add(holders, mask.bit_count())

    def _resolved(
        self,
        of_object: dict[VolumeId, list[_Version]],
        volume_id: VolumeId,
        known: dict[VolumeId, list[_Version]],
    ) -> list[_Version]:
        """The versions of an object in a volume, with what they mean by their source or their origin.

        ``known`` keeps those that were asked for.
        """
        if volume_id not in known:
            known[volume_id] = self._resolve(of_object, volume_id, known)
        return known[volume_id]

    def _resolve(
        self,
        of_object: dict[VolumeId, list[_Version]],
        volume_id: VolumeId,
        known: dict[VolumeId, list[_Version]],
    ) -> list[_Version]:
        versions = of_object.get(volume_id, [])
        traits = self._traits.get(volume_id)
        if traits.change_mode == COPY_ON_WRITE:
            # Of one that is gone the source may be too.
            return _without_source(versions, self._source_ids[volume_id]) if versions else []
        if versions or not traits.inherits:
            return versions
        span = self._span_of(volume_id)
        for version in self._resolved(of_object, traits.origin_id, known):
            if version.epoch <= traits.origin_instant <= version.instant:
                return [_Version(span.birth_epoch, span.last_instant, version.block_map)]
        return []

    def _stretches(self, volume_id: VolumeId, versions: list[_Version]) -> list[tuple[int, int, bool, Row | None]]:
        """Which blocks of which logs a volume names, from which snapshot to which.

        As ``(log id, mask of blocks, is_live, row)``; the row is None where no snapshot holds them.
        """
        group, instants = self._list_of(volume_id)
        found: list[tuple[int, int, bool, Row | None]] = []
        begun: dict[int, list[tuple[int, int]]] = {}
        end = -1

        def close(log_id: int, gone: int, *, is_live: bool = False) -> None:
            left = []
            for mask, first in begun.get(log_id, ()):
                if mask & gone:
                    row = Row(group, first, end) if first <= end else None
                    found.append((log_id, mask & gone, is_live, row))
                if mask & ~gone:
                    left.append((mask & ~gone, first))
            begun[log_id] = left

        named: dict[int, int] = {}
        for version in versions:
            now = self._masks(version.block_map)
            for log_id in [one for one in named if named[one] & ~now.get(one, 0)]:
                close(log_id, named[log_id] & ~now.get(log_id, 0))
            first = bisect_left(instants, version.epoch)
            for log_id, mask in now.items():
                if mask & ~named.get(log_id, 0):
                    begun.setdefault(log_id, []).append((mask & ~named.get(log_id, 0), first))
            named = now
            end = bisect_right(instants, version.instant) - 1
        is_live = bool(versions) and versions[-1].instant == NEVER
        for log_id in named:
            close(log_id, _ALL_BLOCKS, is_live=is_live)
        return found

    def _masks(self, block_map: BlockMap) -> dict[int, int]:
        masks: dict[int, int] = {}
        for block, count, log_id in blockmap.all_runs(block_map):
            if log_id in self._logs:
                masks[log_id] = masks.get(log_id, 0) | ((1 << count) - 1) << block
        return masks


def _without_source(versions: list[_Version], source_id: int) -> list[_Version]:
    """Copies of an object that is written in place: where one names the source, the next newer one tells."""
    found: list[_Version] = []
    later: array[int] | None = None
    for version in reversed([one for one in versions if one.instant != NEVER]):
        entries = blockmap.expanded(version.block_map)
        if later is not None:
            pairs = zip(entries, later, strict=True)
            entries = array("I", [newer if own == source_id else own for own, newer in pairs])
        later = entries
        found.append(_Version(version.epoch, version.instant, blockmap.simplified(entries)))
    return found[::-1]


def _joined(stretches: list[tuple[int, bool, Row | None]]) -> dict[Holders, int]:
    """Blocks of one object in one log, as masks, by all who hold them."""
    parts: dict[Holders, int] = {Holders(False, ()): _ALL_BLOCKS}
    for mask, is_live, row in stretches:
        split: dict[Holders, int] = {}
        for holders, part in parts.items():
            if part & ~mask:
                split[holders] = split.get(holders, 0) | part & ~mask
            if part & mask:
                rows = holders.rows if row is None else _with_row(holders.rows, row)
                both = Holders(holders.is_live or is_live, rows)
                split[both] = split.get(both, 0) | part & mask
        parts = split
    named = 0
    for mask, _, _ in stretches:
        named |= mask
    return {holders: part & named for holders, part in parts.items() if part & named}


def _with_row(rows: tuple[Row, ...], row: Row) -> tuple[Row, ...]:
    """Rows with one more; those of one group that touch become one."""
    apart = []
    first, last = row.first, row.last
    for other in rows:
        if other.group == row.group and other.first <= last + 1 and first <= other.last + 1:
            first, last = min(first, other.first), max(last, other.last)
        else:
            apart.append(other)
    return tuple(sorted([*apart, Row(row.group, first, last)]))
