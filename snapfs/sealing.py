"""Sealing on one processor: checksums for change logs that take no more writes, and content hashes.

A log is closed once a snapshot was made since it was begun: whatever is written then goes to
another. Of a copy-on-write volume that is what was preserved; its source goes on changing and is not sealed.
What is durable in which order: the log's data (by the snapshot); its checksums; that it has them
all; only then are its reads held against them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import trio

from .backends import DeviceFile
from .blockmap import HOLE, BlockMap
from .blockmasks import mask_runs, objects_with_data
from .checksums import ObjectSums, SumsMaker
from .contenthash import ContentHash, element_of
from .cowportion import CowPortion
from .errors import NoSpaceError, SnapfsError
from .formats import ContentRow, LogRow, ShardBatch, SumsRow
from .geometry import BLOCK_SHIFT, BLOCKS_PER_OBJECT, OBJECT_SHIFT, LogId, VolumeId
from .objectdigests import ObjectDigests
from .processor import Processor
from .shardstore import ShardStore

_STEP_BLOCKS = 16384
_RUN_BLOCKS_MAX = 256
_BATCH = 256
_LOT_LOGS = 64
Pace = Callable[[], Awaitable[None]]
OnFailure = Callable[[str, Exception], None]


async def at_full_pace() -> None:
    """As fast as it goes."""
    await trio.lowlevel.checkpoint()


def raise_failure(what: str, error: Exception) -> None:
    """A failure ends it."""
    raise error


@dataclass(slots=True)
class _Lot:
    """Logs whose checksums were read, to be noted in one commit; of a large log some have been already.

    ``is_lost``: some of the checksums could not be kept.
    """

    rows: list[LogRow] = field(default_factory=list)
    batch: ShardBatch = field(default_factory=ShardBatch)
    block_count: int = 0
    is_lost: bool = False

    def add(self, sums: list[SumsRow], block_count: int) -> None:
        self.batch.sums += sums
        self.block_count += block_count

    async def keep_some(self, processor: Processor) -> None:
        """Keep the checksums so far, when there are many."""
        if self.block_count < _STEP_BLOCKS and len(self.batch.sums) < _BATCH:
            return
        _check_room(processor)
        taken, self.batch, self.block_count = self.batch, ShardBatch(), 0
        self.is_lost = True
        await processor.commit([], taken)
        self.is_lost = False


async def seal_logs(processor: Processor, pace: Pace = at_full_pace, on_failure: OnFailure = raise_failure) -> bool:
    """Give all closed logs their checksums; whether all have them now.

    ``pace`` is awaited after each step. ``on_failure`` is told of a log that cannot be read; then the others go on.
    """
    is_complete = True
    lot = _Lot()
    for row in await processor.access.ask(processor.access.store.unsummed_logs):
        if processor.is_short:
            return False
        with trio.CancelScope(shield=True):
            async with processor.access.commit_lock:
                state = _is_closed(processor, row)
        if state:
            try:
                await _read_log(processor, row, lot, pace)
            except (OSError, SnapfsError) as error:
                # What was read of it stays in the lot, and proves nothing.
                is_complete = False
                on_failure(f"change log {row.log_id} of processor {processor.index}", error)
            if len(lot.rows) >= _LOT_LOGS:
                is_complete &= await _note_summed(processor, lot, on_failure)
                lot = _Lot()
            elif lot.is_lost:
                # All of it is read again at the next pass.
                lot = _Lot()
        elif state is None:
            is_complete = False
    return await _note_summed(processor, lot, on_failure) and is_complete


def _is_closed(processor: Processor, row: LogRow) -> bool | None:
    """Whether a log takes no more writes, all of it being durable; None: it will, but not yet.

    The caller holds the commit lock, so no commit is under way.
    """
    facts = processor.facts_of(row.volume_id)
    portion = processor.portions.get(row.volume_id)
    if not facts.is_gone:
        # Also one that is removed and still open goes on writing.
        named_epoch = max(facts.named_epoch, 0 if portion is None else portion.named_epoch)
        if row.epoch >= max(processor.clock.epoch, named_epoch):
            return False
    if portion is not None and portion.failure is not None:
        return None
    if isinstance(portion, CowPortion) and portion.is_preserving:
        return None
    log = processor.logs.known.get(row.log_id)
    if log is not None and (log.dirty or log.pins):
        return None
    if log is not None and portion is not None and portion.current_log is log:
        # A volume that is open and not written to would keep all snapshots since from being sealed.
        portion.leave_log()
    return True


async def _read_log(processor: Processor, row: LogRow, lot: _Lot, pace: Pace) -> None:
    """Read the checksums of a log's blocks into a lot. One that died meanwhile, or is missing, is left out."""
    try:
        file, objects = await processor.access.in_thread(_look_at_log, processor, row)
    except FileNotFoundError:
        # Reads of it and the verifier tell, if it is missing.
        return
    try:
        for some in _short_steps(objects):
            sums, block_count = await processor.access.in_thread(_read_some, processor, row.log_id, file, some)
            lot.add(sums, block_count)
            await pace()
            await lot.keep_some(processor)
    finally:
        file.close()
    lot.rows.append(row)


def _look_at_log(processor: Processor, row: LogRow) -> tuple[DeviceFile, list[tuple[int, int]]]:
    """A log's file, and its objects with masks of the blocks that hold data. Blocks."""
    file = processor.logs.open_alone(row.log_id, row.device_id)
    try:
        return file, objects_with_data(file.data_extents(), processor.index, processor.processor_count)
    except BaseException:
        file.close()
        raise


def _short_steps(objects: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Objects with few blocks together, so that each step takes a few milliseconds at most."""
    some: list[tuple[int, int]] = []
    block_count = 0
    for object_index, mask in objects:
        if some and block_count + mask.bit_count() > BLOCKS_PER_OBJECT:
            yield some
            some, block_count = [], 0
        some.append((object_index, mask))
        block_count += mask.bit_count()
    if some:
        yield some


def _read_some(
    processor: Processor, log_id: LogId, file: DeviceFile, objects: list[tuple[int, int]]
) -> tuple[list[SumsRow], int]:
    """Checksums of these objects' blocks, and how many blocks they are of. Blocks."""
    sums = [
        SumsRow(log_id, one, read_sums(file, (one // processor.processor_count) << OBJECT_SHIFT, mask))
        for one, mask in objects
    ]
    return sums, sum(mask.bit_count() for _, mask in objects)


async def _note_summed(processor: Processor, lot: _Lot, on_failure: OnFailure) -> bool:
    """Keep the checksums of a lot, and that its logs have them all, if they still take no more writes; whether it is.

    A lot that cannot be kept is given up: its logs are read again at the next pass.
    """
    if lot.rows:
        try:
            _check_room(processor)
            await _keep_sums(processor, lot)
        except (OSError, SnapfsError) as error:
            on_failure(f"change logs of processor {processor.index}", error)
            return False
    return True


def _check_room(processor: Processor) -> None:
    """Raises NoSpaceError while the reserve is given up: deleting needs it more than checksums do."""
    if processor.is_short:
        raise NoSpaceError("what room is left is kept for deleting", "Delete snapshots or free space")


async def _keep_sums(processor: Processor, lot: _Lot) -> None:
    with trio.CancelScope(shield=True):
        async with processor.access.commit_lock:
            closed = [row.log_id for row in lot.rows if _is_closed(processor, row)]
            lot.batch.summed_logs += closed
            await processor.commit_locked([], lot.batch)
            known = {log_id: processor.logs.known[log_id] for log_id in closed if log_id in processor.logs.known}
            for log in known.values():
                processor.logs.note_summed(log)
            for row in lot.batch.sums:
                if row.log_id in known:
                    processor.logs.sums.put(row.log_id, row.object_index, row.sums)


def read_sums(file: DeviceFile, base: int, mask: int) -> ObjectSums:
    """The checksums of an object's blocks, which lie from ``base`` on in a log's file. Blocks."""
    maker = SumsMaker()
    for first, count in _short_runs(mask):
        buffer = memoryview(bytearray(count << BLOCK_SHIFT))
        # Short at the end of the file: what is behind it is zeros.
        file.read_into(buffer, base + (first << BLOCK_SHIFT))
        for index in range(count):
            maker.add(first + index, buffer[index << BLOCK_SHIFT : (index + 1) << BLOCK_SHIFT])
    return maker.made()


def _short_runs(mask: int) -> Iterator[tuple[int, int]]:
    for first, count in mask_runs(mask):
        for start in range(0, count, _RUN_BLOCKS_MAX):
            yield first + start, min(_RUN_BLOCKS_MAX, count - start)


class ChangedObjects:
    """Objects that changed between two instants, by volume: looked up once for all that are sealed together."""

    def __init__(self, store: ShardStore) -> None:
        self._store = store
        self._span = (0, 0)
        self._by_volume: dict[VolumeId, list[int]] = {}

    def between(self, volume_id: VolumeId, after: int, until: int) -> list[int]:
        """Those of one volume, in order. Blocks."""
        if self._span != (after, until):
            self._by_volume = self._store.changed_objects_of_all(after, until)
            self._span = after, until
        return self._by_volume.get(volume_id, [])


@dataclass(frozen=True, slots=True)
class Lookups:
    """What is kept of one processor's store from one snapshot to the next."""

    digests: ObjectDigests
    changed: ChangedObjects

    @classmethod
    def of(cls, store: ShardStore) -> Lookups:
        """Those of a store, with nothing kept yet."""
        return cls(ObjectDigests(store), ChangedObjects(store))


async def portion_content(
    processor: Processor, lookups: Lookups, volume_id: VolumeId, instant: int, known: ContentRow | None = None
) -> int:
    """The content hash of a volume's part here as it stood at an instant that a snapshot holds.

    From that of an earlier snapshot, ``known`` or stored, if that one is still there: then the cost follows what
    changed. ``lookups`` are the processor's. Raises NotSealedError when a log in it has no checksums.
    """
    store = processor.access.store
    index = processor.snapshots
    row, is_same = await processor.access.ask(_content_before, processor, volume_id, instant, known)
    if row is None:
        return await _whole_content(processor, lookups.digests, volume_id, instant)
    if is_same:
        return row.value
    content = ContentHash(row.value)
    objects = await processor.access.ask(lookups.changed.between, volume_id, row.instant, instant)
    for start in range(0, len(objects), _BATCH):
        span = (row.instant, instant)
        some = objects[start : start + _BATCH]
        old, new = await processor.access.ask(_elements_of_changes, store, lookups.digests, volume_id, span, some)
        content.replace(old, new)
    if not index.holds(volume_id, row.instant, row.instant):
        # It was deleted meanwhile, and its copies may have gone before they were looked at.
        return await _whole_content(processor, lookups.digests, volume_id, instant)
    return content.value


def _content_before(
    processor: Processor, volume_id: VolumeId, instant: int, known: ContentRow | None
) -> tuple[ContentRow | None, bool]:
    """A content hash to start from, and whether nothing has changed since."""
    store = processor.access.store
    for row in (known, store.content(volume_id)):
        if row is not None and row.instant <= instant:
            if row.instant == instant:
                return row, True
            if processor.snapshots.holds(volume_id, row.instant, row.instant):
                return row, not store.has_log_between(volume_id, row.instant, instant)
    return None, False


async def _whole_content(processor: Processor, digests: ObjectDigests, volume_id: VolumeId, instant: int) -> int:
    content = ContentHash()
    from_object = 0
    with processor.borrowed(volume_id) as portion:
        while objects := await processor.mapped_objects(volume_id, from_object, _BATCH):
            maps = [(one, await portion.snapshot_map(one, instant)) for one in objects]
            content.replace([], await processor.access.ask(_elements, digests, volume_id, maps))
            from_object = objects[-1] + 1
    return content.value


def _elements_of_changes(
    store: ShardStore, digests: ObjectDigests, volume_id: VolumeId, span: tuple[int, int], objects: list[int]
) -> tuple[list[int], list[int]]:
    """What stands for objects at the first and at the last instant of a span."""
    old, new = [], []
    for object_index, old_map, new_map in store.changed_maps(volume_id, *span, objects):
        # One object after the other: its digests are still known when its next map is looked at.
        old += _elements(digests, volume_id, [(object_index, old_map)])
        new += _elements(digests, volume_id, [(object_index, new_map)])
    return old, new


def _elements(digests: ObjectDigests, volume_id: VolumeId, maps: list[tuple[int, BlockMap]]) -> list[int]:
    """What stands for objects with these maps, from their blocks' digests. Blocks."""
    return [
        element_of(object_index, digests.of(volume_id, object_index, block_map))
        for object_index, block_map in maps
        if block_map != HOLE
    ]
