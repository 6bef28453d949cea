"""What changed between two snapshots, or a snapshot and now: extents of each volume. And when a block changed.

The cost follows what changed, not the size: an object that changed after a snapshot has a
point-in-time copy that ends before the other one, and only such objects are looked at. Blocks are
compared by where they lie; one that was written again with the same contents counts as changed.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import pairwise

from . import blockmap
from .blockmap import HOLE, BlockMap
from .errors import BadCommandError
from .formats import COPY_ON_WRITE, Attributes
from .geometry import BLOCK_SHIFT, BLOCK_SIZE, BLOCKS_PER_OBJECT, OBJECT_SHIFT, OBJECT_SIZE, VolumeId
from .notresident import when_resident
from .pool import Pool
from .portion import Portion
from .processor import Processor
from .snapshot import Snapshot
from .snapshotindex import NEVER
from .traits import Ancestor

_SLICE = 64
_BATCH = 512


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of bytes that differs. ``is_data``: else it reads as zeros now."""

    offset: int
    length: int
    is_data: bool


@dataclass(frozen=True, slots=True)
class VolumeChange:
    """A volume that is in one of two states, or in both; ``before`` or ``after`` is None where it is not.

    ``extents`` are relative to nothing where ``before`` is None: all that is mapped.
    """

    file_id: VolumeId
    before: Attributes | None
    after: Attributes | None
    extents: list[Extent]

    @property
    def name(self) -> bytes:
        """Its name after, or before if it is gone."""
        one = self.after or self.before
        assert one is not None
        return one.name

    @property
    def changed_bytes(self) -> int:
        """Bytes in all extents."""
        return sum(one.length for one in self.extents)


@dataclass(frozen=True, slots=True)
class State:
    """What a volume was at an instant; NEVER is now."""

    volume_id: VolumeId
    instant: int
    attributes: Attributes


async def states_at(pool: Pool, snapshot: Snapshot | None) -> dict[VolumeId, State]:
    """By file: every volume as a snapshot has it, or as it is now (None)."""
    traits = pool.volumes.traits
    if snapshot is None:
        return {
            volume.file_id: State(volume.volume_id, NEVER, volume.attributes())
            for volume in pool.volumes.by_name.values()
        }
    members = await pool.snapshots.members(snapshot)
    return {
        traits.get(volume_id).file_id: State(volume_id, snapshot.instant, attributes)
        for volume_id, attributes in members.by_id.items()
    }


async def diff(pool: Pool, before: Snapshot, after: Snapshot | None) -> list[VolumeChange]:
    """What is other in ``after`` (None: now) than in ``before``, volume by volume, by name.

    A volume counts as the same one for as long as its file was there, also through renames and
    rollbacks. Of a snapshot of some volumes only those are compared. Raises BadCommandError when
    ``after`` is the older one.
    """
    if after is not None and after.instant < before.instant:
        raise BadCommandError("the second snapshot is older than the first", "Give them in the order of time")
    with pool.snapshots.looked_into([before, after]):
        return await _diff(pool, before, after)


async def _diff(pool: Pool, before: Snapshot, after: Snapshot | None) -> list[VolumeChange]:
    if after is None:
        await pool.snapshots.before_cut(pool.volumes.unsaved())
    await _commit_all(pool)
    old, new = await states_at(pool, before), await states_at(pool, after)
    changes = []
    for file_id in old.keys() | new.keys():
        one, other = old.get(file_id), new.get(file_id)
        if one is None and other is not None and not before.holds(other.volume_id):
            continue
        if other is None and one is not None and after is not None and not after.holds(one.volume_id):
            continue
        changes.append(
            VolumeChange(
                file_id,
                None if one is None else one.attributes,
                None if other is None else other.attributes,
                [] if other is None else await changed_extents(pool, one, other),
            )
        )
    changes = [one for one in changes if one.extents or one.before is None or _differ(one.before, one.after)]
    return sorted(changes, key=lambda one: one.name)


async def content_of(pool: Pool, base: Snapshot | None, snapshot: Snapshot) -> list[VolumeChange]:
    """Every volume of a snapshot, by name, with all that it holds, or with what is other than in ``base``."""
    if base is not None and base.instant >= snapshot.instant:
        raise BadCommandError("the base is not older than the snapshot", "Give an older one")
    found = []
    with pool.snapshots.looked_into([base, snapshot]):
        await _commit_all(pool)
        old = {} if base is None else await states_at(pool, base)
        for file_id, state in (await states_at(pool, snapshot)).items():
            before = old.get(file_id)
            extents = await changed_extents(pool, before, state)
            attributes = None if before is None else before.attributes
            found.append(VolumeChange(file_id, attributes, state.attributes, extents))
    return sorted(found, key=lambda one: one.name)


async def names_gone(pool: Pool, base: Snapshot | None, snapshot: Snapshot) -> list[bytes]:
    """Volumes that a base holds and a snapshot does not, though it would; by their names in the base."""
    if base is None:
        return []
    now = await states_at(pool, snapshot)
    return sorted(
        state.attributes.name
        for file_id, state in (await states_at(pool, base)).items()
        if file_id not in now and snapshot.volume_ids is None
    )


def _differ(before: Attributes, after: Attributes | None) -> bool:
    """Whether more than times is other."""
    return after is None or before[:5] != after[:5]


async def _commit_all(pool: Pool) -> None:
    """Have the stores know all."""
    for processor in pool.processors:
        await processor.commit(processor.sound_portions())


async def changed_extents(pool: Pool, before: State | None, after: State) -> list[Extent]:
    """Extents of a volume that differ between two states of it; all that is mapped for None. In order."""
    found: list[tuple[int, int, bool]] = []
    for processor in pool.processors:
        async for object_index, runs in _changed_objects(processor, before, after):
            base = object_index << OBJECT_SHIFT
            found += [(base + (first << BLOCK_SHIFT), count << BLOCK_SHIFT, is_data) for first, count, is_data in runs]
    return list(_merged(sorted(found), after.attributes.size_bytes))


def _merged(runs: list[tuple[int, int, bool]], size_bytes: int) -> Iterator[Extent]:
    """Runs in order, joined where they touch, up to the size."""
    start = end = 0
    kind = False
    for offset, length, is_data in runs:
        stop = min(offset + length, size_bytes)
        if stop <= offset:
            continue
        if offset == end and is_data == kind and end > start:
            end = stop
            continue
        if end > start:
            yield Extent(start, end - start, kind)
        start, end, kind = offset, stop, is_data
    if end > start:
        yield Extent(start, end - start, kind)


async def _changed_objects(
    processor: Processor, before: State | None, after: State
) -> AsyncIterator[tuple[int, list[tuple[int, int, bool]]]]:
    """Objects that differ, each with runs ``(first block, count, is_data)`` of what differs."""
    store = processor.access.store
    traits = processor.traits
    plain = before is not None and before.volume_id == after.volume_id
    if plain and traits.get(after.volume_id).change_mode != COPY_ON_WRITE:
        assert before is not None
        # Both maps come from the store, many at once.
        objects = await _candidates(processor, before, after)
        for start in range(0, len(objects), _BATCH):
            some = objects[start : start + _BATCH]
            for object_index, old, new in await processor.access.ask(
                store.changed_maps, after.volume_id, before.instant, after.instant, some
            ):
                runs = differing_runs(old, new)
                if runs:
                    yield object_index, runs
        return
    for object_index in await _candidates(processor, before, after):
        new = await _map_of(processor, after, object_index)
        old = HOLE if before is None else await _map_of(processor, before, object_index)
        runs = differing_runs(old, new)
        if runs:
            yield object_index, runs


async def _candidates(processor: Processor, before: State | None, after: State) -> list[int]:
    """Objects that may differ: those that any volume between the two states has maps of."""
    store = processor.access.store
    if before is None:
        return await _all_objects(processor, after.volume_id)
    if before.volume_id == after.volume_id:
        return await processor.access.ask(store.changed_objects, after.volume_id, before.instant, after.instant)
    one = [Ancestor(before.volume_id, before.instant), *processor.traits.lineage(before.volume_id)]
    other = [Ancestor(after.volume_id, after.instant), *processor.traits.lineage(after.volume_id)]
    shared = {step.volume_id: step.instant for step in one}
    meeting = next((step for step in other if step.volume_id in shared), None)
    found: set[int] = set()
    for line in (one, other):
        for step in line:
            if meeting is not None and step.volume_id == meeting.volume_id:
                break
            found.update(await _all_objects(processor, step.volume_id))
    if meeting is not None:
        low, high = sorted((meeting.instant, shared[meeting.volume_id]))
        if not processor.snapshots.holds(meeting.volume_id, low, low):
            # Its copies may be gone, and with them what has changed since.
            return sorted(found.union(await _all_objects(processor, meeting.volume_id)))
        found.update(await processor.access.ask(store.changed_objects, meeting.volume_id, low, high))
    return sorted(found)


async def _all_objects(processor: Processor, volume_id: VolumeId) -> list[int]:
    found: list[int] = []
    while part := await processor.mapped_objects(volume_id, found[-1] + 1 if found else 0, 4096):
        found += part
    return found


async def _map_of(processor: Processor, state: State, object_index: int) -> BlockMap:
    with processor.borrowed(state.volume_id) as portion:
        if state.instant != NEVER:
            return await portion.snapshot_map(object_index, state.instant)
        return await _live_map(portion, object_index)


async def _live_map(portion: Portion, object_index: int) -> BlockMap:
    return await when_resident(lambda _: portion.map_now(object_index))


def differing_runs(old: BlockMap, new: BlockMap) -> list[tuple[int, int, bool]]:
    """Runs of blocks that two maps have elsewhere: ``(first, count, is_data in the new one)``."""
    if isinstance(old, int) and isinstance(new, int):
        return [] if old == new else [(0, BLOCKS_PER_OBJECT, new != HOLE)]
    before, after = blockmap.expanded(old), blockmap.expanded(new)
    if before == after:
        return []
    found: list[tuple[int, int, bool]] = []
    for start in range(0, BLOCKS_PER_OBJECT, _SLICE):
        # Most of an object did not change: looked at in strides first.
        if before[start : start + _SLICE] != after[start : start + _SLICE]:
            _add_runs(found, before, after, start)
    return found


def _add_runs(found: list[tuple[int, int, bool]], before: array[int], after: array[int], start: int) -> None:
    for block in range(start, start + _SLICE):
        if before[block] == after[block]:
            continue
        is_data = after[block] != HOLE
        if found and found[-1][0] + found[-1][1] == block and found[-1][2] == is_data:
            found[-1] = (found[-1][0], found[-1][1] + 1, is_data)
        else:
            found.append((block, 1, is_data))


@dataclass(frozen=True, slots=True)
class BlockChange:
    """A block changed between two snapshots; None for the making of the volume, and for the present."""

    after: Snapshot | None
    before: Snapshot | None


async def blame(pool: Pool, volume_name: bytes, offset: int) -> list[BlockChange]:
    """The snapshots between which the block at an offset of a volume changed, newest change first.

    Raises NotFoundError, and BadCommandError for an offset behind the end.
    """
    volume = pool.volumes.get(volume_name)
    if not 0 <= offset < volume.size_bytes:
        raise BadCommandError(
            f"offset {offset} is not inside the volume, which has {volume.size_bytes} bytes", "Give one that is"
        )
    await pool.snapshots.before_cut([volume])
    await _commit_all(pool)
    object_index, block = offset >> OBJECT_SHIFT, (offset & (OBJECT_SIZE - 1)) // BLOCK_SIZE
    processor = pool.processors[object_index % len(pool.processors)]
    seen: list[tuple[Snapshot | None, tuple[VolumeId, int]]] = []
    snapshots = sorted(pool.snapshots.by_id.values(), key=lambda one: one.instant)
    with pool.snapshots.looked_into(snapshots):
        for snapshot in snapshots:
            state = (await states_at(pool, snapshot)).get(volume.file_id)
            if state is not None:
                entry = blockmap.entry(await _map_of(processor, state, object_index), block)
                seen.append((snapshot, (volume.file_id, entry)))
    now = State(volume.volume_id, NEVER, volume.attributes())
    seen.append((None, (volume.file_id, blockmap.entry(await _map_of(processor, now, object_index), block))))
    changes = []
    if seen[0][1][1] != HOLE:
        changes.append(BlockChange(None, seen[0][0]))
    for (earlier, old), (later, new) in pairwise(seen):
        if old != new:
            changes.append(BlockChange(earlier, later))
    return changes[::-1]
