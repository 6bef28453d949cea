"""A volume: objects spread over the processors, under one name, size and mode."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from functools import partial

import trio

from .backends import Buffer
from .blockmap import BlockMap
from .catalogaccess import CatalogAccess
from .closed import Closed
from .errors import BusyVolumeError, DamagedError, SnapfsError, SyncFailedError, TooLargeError
from .formats import COPY_ON_WRITE, Attributes, VersionRow, VolumeRow
from .geometry import (
    BLOCK_SHIFT,
    BLOCK_SIZE,
    BLOCKS_PER_OBJECT,
    OBJECT_MASK,
    OBJECT_SHIFT,
    OBJECT_SIZE,
    Epoch,
    VolumeId,
    pieces,
    volume_size_bytes_max,
)
from .notresident import NotResidentError, OldBlocks, when_resident
from .placement import Quota
from .portion import Portion, Segment
from .processor import Processor
from .sealedfile import DamagedBlockError
from .shardstate import EpochClock
from .snapshotindex import NEVER, SnapshotIndex
from .tasks import one_by_one, side_by_side
from .traits import TraitsTable
from .units import format_size, show_name

# What the kernel asks for at most. A read of more goes piece by piece.
READ_BYTES_MAX = 1 << 20
# Of so many changed objects on a processor on, their data is sent to the devices before others are kept from commits.
_EARLY_OBJECTS = 64
# So many take a commit long.
_MUCH_OBJECTS = 256
_TRIM_BATCH = 256
_TRIM_COMMIT_OBJECTS = 1024
_TRIM_NONE, _TRIM_DONE, _TRIM_RUNNING, _TRIM_DUE = 0, 1, 2, 3


class VolumeView(ABC):
    """Something to read like a file: a live volume, or one in a snapshot."""

    volume_id: VolumeId
    size_bytes: int

    def __init__(self, processors: Sequence[Processor]) -> None:
        self.processors = processors
        self.processor_count = len(processors)
        self.portions: list[Portion] = []

    @abstractmethod
    def map_now(self, object_index: int) -> BlockMap:
        """The map of an object. Raises NotResidentError."""

    def read_now(self, offset: int, buffer: memoryview) -> memoryview:
        """Read into ``buffer`` what lies at ``offset``, up to the end; the part of it that was filled.

        Raises NotResidentError or BlockingIOError when it would have to wait.
        """
        length = min(len(buffer), self.size_bytes - offset)
        if length <= 0:
            return buffer[:0]
        view = buffer[:length]
        object_index = offset >> OBJECT_SHIFT
        inside = offset & OBJECT_MASK
        if inside + length <= OBJECT_SIZE:
            portion = self.portions[object_index % self.processor_count]
            portion.read_now(self.map_now(object_index), object_index, inside, view)
            return view
        for object_index, inside, step, at in pieces(offset, length):
            portion = self.portions[object_index % self.processor_count]
            portion.read_now(self.map_now(object_index), object_index, inside, view[at : at + step])
        return view

    def contents_mark(self) -> int:
        """Another one once the contents were cut or put back: what was read over that is of both."""
        return 0

    async def read(self, offset: int, length: int) -> bytearray:
        """Read up to ``length`` bytes; fewer at the end."""
        if length > READ_BYTES_MAX:
            return await self._read_long(offset, length)
        old_blocks: OldBlocks = {}
        while True:
            # Anew each time: a volume may be another size after a wait.
            count = max(0, min(length, self.size_bytes - offset))
            buffer = bytearray(count)
            view = memoryview(buffer)
            mark = self.contents_mark()
            try:
                filled = self.read_now(offset, view)
                return buffer if len(filled) == count else buffer[: len(filled)]
            except NotResidentError as missing:
                await missing.fetch(old_blocks)
                continue
            except BlockingIOError:
                pass
            try:
                plan = self._segments(offset, count)
                for portion, segments in plan:
                    await portion.read_segments(segments, view)
                # Read from where the maps pointed before; if they do so still, nothing was freed.
                if self._segments(offset, count) == plan and mark == self.contents_mark():
                    return buffer
            except NotResidentError as missing:
                await missing.fetch(old_blocks)
            except DamagedError as damage:
                # What the maps name no more may be freed meanwhile, and is not damaged for that.
                if await when_resident(lambda _, count=count: self._segments(offset, count)) == plan:  # type: ignore[misc]
                    if isinstance(damage, DamagedBlockError):
                        self.portions[damage.object_index % self.processor_count].report(damage)
                    raise

    async def _read_long(self, offset: int, length: int) -> bytearray:
        """Read piece by piece: only a piece is read again when its maps change meanwhile."""
        while True:
            mark = self.contents_mark()
            found = bytearray()
            while len(found) < length:
                wanted = min(READ_BYTES_MAX, length - len(found))
                piece = await self.read(offset + len(found), wanted)
                found += piece
                if len(piece) < wanted:
                    break
            if mark == self.contents_mark():
                return found

    def _segments(self, offset: int, length: int) -> list[tuple[Portion, list[Segment]]]:
        found = []
        for object_index, inside, step, at in pieces(offset, length):
            portion = self.portions[object_index % self.processor_count]
            found.append((portion, portion.segments(self.map_now(object_index), object_index, inside, step, at)))
        return found


class Volume(VolumeView):
    """A live volume.

    ``opens`` counts who has it open; portions are in memory while it is above zero. ``when_unused`` is told of each
    last :meth:`close`, also that of trimming.
    ``is_emptied``: it was cut to nothing, durably, and not synced since.
    ``failed_write_count`` counts the writes that whoever serves them had to refuse, ``request_count`` the requests
    under way that wait for something: the kernel may hold the file's lock for each.
    ``last_instant`` is NEVER until it is removed, then the last that can hold it.
    ``versions`` are attributes kept for snapshots and not saved yet. ``file_id`` names it for as
    long as it is there; ``volume_id`` changes when a rollback gives it other contents.
    Concurrency: everything but ``truncate`` may run at any time; truncate needs the caller to keep
    cuts and other truncates of the volume out.
    """

    def __init__(
        self,
        row: VolumeRow,
        processors: Sequence[Processor],
        catalog: CatalogAccess,
        snapshots: SnapshotIndex,
        clock: EpochClock,
        *,
        traits: TraitsTable,
        is_saved: bool,
        needs_trim: bool = False,
        when_unused: Callable[[Volume], None] = lambda volume: None,
    ) -> None:
        super().__init__(processors)
        self._when_unused = when_unused
        self.file_id = traits.get(row.volume_id).file_id
        self.last_instant = NEVER
        self.opens = 0
        self.versions: list[VersionRow] = []
        self._trim_turn = trio.Lock()
        # Who waits for it only to have it stop: what is cleared is not waited for to its end.
        self._waiting_count = 0
        self._shrink_count = 0
        self._replaced_count = 0
        self.is_emptied = False
        self.failed_write_count = 0
        self.request_count = 0
        self._between: Closed | None = None
        self._catalog = catalog
        self._snapshots = snapshots
        self._clock = clock
        self._traits = traits
        self._truncated: trio.Event | None = None
        self._take(row, is_saved=is_saved, needs_trim=needs_trim)

    def _take(self, row: VolumeRow, *, is_saved: bool, needs_trim: bool) -> None:
        attributes = row.attributes
        self.volume_id = row.volume_id
        self.name = attributes.name
        self.size_bytes = attributes.size_bytes
        self.mode = attributes.mode
        self.uid = attributes.uid
        self.gid = attributes.gid
        self.atime_ns = attributes.atime_ns
        self.mtime_ns = attributes.mtime_ns
        self.ctime_ns = attributes.ctime_ns
        self.birth_epoch = row.birth_epoch
        self.epoch = row.epoch
        self.named_epoch = row.named_epoch
        self.created_ns = row.created_ns
        self._synced_size_bytes = attributes.size_bytes
        self._trim = _TRIM_DUE if row.trim or needs_trim else _TRIM_NONE
        self._saved = row if is_saved else None

    def map_now(self, object_index: int) -> BlockMap:
        """See :meth:`VolumeView.map_now`."""
        return self.portions[object_index % self.processor_count].map_now(object_index)

    def contents_mark(self) -> int:
        """See :meth:`VolumeView.contents_mark`."""
        return self._shrink_count

    async def wait_until_open(self) -> None:
        """While a rollback in place has it closed: wait. Raises SnapfsError when that could not be finished."""
        if self.portions:
            await when_resident(lambda _: self.portions[0].check_now())

    @property
    def is_removed(self) -> bool:
        """Whether its name is gone."""
        return self.last_instant != NEVER

    @property
    def is_unused(self) -> bool:
        """Whether it is removed and nobody has it open: only snapshots have what it held."""
        return self.is_removed and not self.opens

    @property
    def needs_trim(self) -> bool:
        """Whether maps may still name blocks behind the size, which nobody is clearing."""
        return self._trim == _TRIM_DUE

    @property
    def is_cut_short(self) -> bool:
        """Whether what lay behind its size has to be cleared before it can grow."""
        return self._trim >= _TRIM_RUNNING

    @property
    def is_clean(self) -> bool:
        """Whether all of it is durable."""
        return (
            self._synced_size_bytes == self.size_bytes
            and not self.versions
            and self.unsaved_row() is None
            and not any(portion.is_dirty for _, portion in self._loaded_portions())
        )

    @property
    def block_count(self) -> int:
        """Blocks that are mapped."""
        if self._traits.get(self.volume_id).change_mode == COPY_ON_WRITE:
            return sum(processor.source_block_count(self.volume_id) for processor in self.processors)
        return sum(processor.tally.counts.get(self.volume_id, 0) for processor in self.processors)

    @property
    def may_have_blocks(self) -> bool:
        """Whether anything may be mapped; what is not plain is not always counted."""
        return self.block_count > 0 or self.volume_id in self._traits.rows

    @property
    def failure(self) -> SnapfsError | None:
        """Why it takes no more writes, None if it does."""
        for _, portion in self._loaded_portions():
            if portion.failure is not None:
                return portion.failure
        # What stands there while a rollback in place has it closed is not among those.
        return self.portions[0].failure if self.portions else None

    def open(self) -> None:
        """Have its portions in memory until :meth:`close`."""
        if not self.opens:
            # All that may find no memory comes before it counts as open.
            self.portions = self._portions_held()
        self.opens += 1

    def _portions_held(self) -> list[Portion]:
        portions = [processor.portion(self.volume_id) for processor in self.processors]
        self.refuse_writes()
        for portion in portions:
            portion.users += 1
        return portions

    def close(self) -> None:
        """Undo one :meth:`open`."""
        self.opens -= 1
        if self.opens == 0:
            portions, self.portions = self.portions, []
            between, self._between = self._between, None
            if between is not None:
                between.open()
                portions = []
            for processor, portion in zip(self.processors, portions, strict=False):
                portion.users -= 1
                processor.let_go(portion)
            self._when_unused(self)

    @contextmanager
    def requested(self) -> Iterator[None]:
        """A request that may wait is under way inside."""
        self.request_count += 1
        try:
            yield
        finally:
            self.request_count -= 1

    # -- changing the contents for others ----------------------------------------------------

    @asynccontextmanager
    async def kept_from_trimming(self) -> AsyncIterator[None]:
        """Nothing behind its size is cleared inside. What was being cleared stops halfway, and is due again."""
        self._waiting_count += 1
        try:
            await self._trim_turn.acquire()
        finally:
            self._waiting_count -= 1
        try:
            yield
        finally:
            self._trim_turn.release()

    def hold_writers(self) -> Callable[[], None]:
        """Have writers wait, until what this gives is called. The caller keeps truncates out."""
        held = self._truncated = trio.Event()

        def let_go() -> None:
            self._truncated = None
            held.set()

        return let_go

    def check_writers_now(self) -> None:
        """Raises NotResidentError while writers are to wait."""
        if self._truncated is not None:
            raise NotResidentError(self._wait_for_truncate)

    def give_up(self) -> None:
        """Let go of the contents, to be others by :meth:`become`, until :meth:`resume`.

        Until then whoever uses it waits, so each read and write is of the one or of the other. The caller holds
        writers.
        """
        if self.opens and self._between is None:
            between = Closed(self.processor_count)
            portions, self.portions = self.portions, between.portions()
            self._between = between
            # May be called again, and is not to count down again: what finds no memory here is kept a little longer.
            for processor, portion in zip(self.processors, portions, strict=True):
                portion.users -= 1
                with suppress(MemoryError):
                    processor.let_go(portion)
        self.versions.clear()
        # A sync under way is of the old contents, and says nothing of these.
        self._shrink_count += 1
        self._replaced_count += 1

    def become(self, row: VolumeRow) -> None:
        """Be the volume of another row, which is saved."""
        self._take(row, is_saved=True, needs_trim=False)

    def put_back(self, attributes: Attributes) -> None:
        """Its contents are those of then, durably, and so are its attributes now; its name stays.

        What its source has behind the size is still to be cleared.
        """
        self.before_change()
        self.size_bytes = self._synced_size_bytes = attributes.size_bytes
        self._shrink_count += 1
        self._replaced_count += 1
        self._trim = _TRIM_DUE
        self.mode, self.uid, self.gid = attributes.mode, attributes.uid, attributes.gid
        self.atime_ns, self.mtime_ns = attributes.atime_ns, attributes.mtime_ns
        self.ctime_ns = time.time_ns()

    def resume(self) -> None:
        """After :meth:`become`: whoever has it open goes on. May be called again after it found no memory."""
        between = self._between
        if between is not None:
            self.portions = self._portions_held()
            self._between = None
            between.open()

    # -- writing -----------------------------------------------------------------------------

    def write_now(self, offset: int, data: Buffer, old_blocks: OldBlocks) -> None:
        """Write all of ``data``, in one epoch, if nothing has to be waited for.

        Raises NotResidentError with nothing changed; TooLargeError, SyncFailedError; OSError from
        the device, when a part of an overwrite may have been done.
        """
        length = len(data)
        end = offset + length
        if self._truncated is not None:
            raise NotResidentError(self._wait_for_truncate)
        if end > self.size_bytes:
            self._check_growth(end)
        object_index = offset >> OBJECT_SHIFT
        inside = offset & OBJECT_MASK
        # First: a part of what fails may have been done.
        if self.epoch < self._clock.epoch or self.epoch < self.named_epoch:
            self.before_change()
        if inside + length <= OBJECT_SIZE:
            portion = self.portions[object_index % self.processor_count]
            try:
                portion.write_now(object_index, inside, data, old_blocks)
            except (OSError, SnapfsError, MemoryError):
                self._note_failed_write(end)
                raise
        else:
            self._write_pieces_now(offset, data, old_blocks)
        if end > self.size_bytes:
            self.size_bytes = end
        self.mtime_ns = self.ctime_ns = time.time_ns()

    def _write_pieces_now(self, offset: int, data: Buffer, old_blocks: OldBlocks) -> None:
        view = memoryview(data)
        parts = [
            (self.portions[object_index % self.processor_count], object_index, inside, view[at : at + step])
            for object_index, inside, step, at in pieces(offset, len(view))
        ]
        # Logs of one volume may be in the pool and in a change log volume: begun before and after a snapshot went.
        block_counts: dict[Quota, int] = {}
        for portion, object_index, inside, part in parts:
            block_count = portion.ready_to_write_now(object_index, inside, part, old_blocks)
            if portion.quota is not None:
                block_counts[portion.quota] = block_counts.get(portion.quota, 0) + block_count
        for quota, block_count in block_counts.items():
            quota.check(block_count)
        try:
            for portion, object_index, inside, part in parts:
                portion.write_now(object_index, inside, part, old_blocks)
        except (OSError, SnapfsError, MemoryError):
            self._note_failed_write(offset + len(view))
            raise

    def _note_failed_write(self, end: int) -> None:
        if end > self.size_bytes:
            # A part of it may lie behind the size, which stays as it was.
            self._trim = _TRIM_DUE

    def _check_growth(self, size_bytes: int) -> None:
        if size_bytes > volume_size_bytes_max(self.processor_count):
            raise TooLargeError(
                f"volume {show_name(self.name)!r} cannot grow to {size_bytes} bytes",
                f"This pool's volumes go up to {format_size(volume_size_bytes_max(self.processor_count))}",
            )
        if self.is_cut_short:
            # What lay behind the size must be gone before it could be seen again.
            raise NotResidentError(self._trim_for_growth)

    async def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``. Raises what :meth:`write_now` does, but for NotResidentError."""
        if not len(data):
            return
        old_blocks: OldBlocks = {}
        while True:
            try:
                self.write_now(offset, data, old_blocks)
            except NotResidentError as missing:
                await missing.fetch(old_blocks)
            else:
                return

    async def _wait_for_truncate(self, old_blocks: OldBlocks) -> None:
        if self._truncated is not None:
            await self._truncated.wait()

    async def _trim_for_growth(self, old_blocks: OldBlocks) -> None:
        await self.trim()

    # -- attributes --------------------------------------------------------------------------

    def attributes(self) -> Attributes:
        """The attributes as they are now."""
        return Attributes(
            self.name,
            self.size_bytes,
            self.mode,
            self.uid,
            self.gid,
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
        )

    def before_change(self) -> None:
        """Call before an attribute changes: keeps the old ones if a snapshot holds them."""
        epoch = max(self._clock.epoch, self.named_epoch)
        if self.epoch >= epoch:
            return
        if not self.is_removed and self._snapshots.holds(self.volume_id, self.epoch, epoch - 1):
            self.versions.append(VersionRow(self.volume_id, Epoch(self.epoch), Epoch(epoch - 1), self.attributes()))
        self.epoch = Epoch(epoch)

    def row(self) -> VolumeRow:
        """The volume as the catalog is to keep it: with the size up to which data is durable."""
        return VolumeRow(
            self.volume_id,
            self.attributes()._replace(size_bytes=self._synced_size_bytes),
            self.birth_epoch,
            self.epoch,
            self.named_epoch,
            self.created_ns,
            int(self._trim != _TRIM_NONE),
        )

    def unsaved_row(self) -> VolumeRow | None:
        """See :class:`Recorded`."""
        row = self.row()
        return None if self.is_removed or row == self._saved else row

    def needed_versions(self) -> list[VersionRow]:
        """See :class:`Recorded`."""
        if self.is_removed:
            return []
        return [one for one in self.versions if self._snapshots.holds(self.volume_id, one.epoch, one.instant)]

    def saved(self, row: VolumeRow | None, version_count: int) -> None:
        """See :class:`Recorded`."""
        del self.versions[:version_count]
        if row is not None:
            self._saved = row

    def _only_times_unsaved(self) -> bool:
        if self._saved is None or self.versions:
            return False
        saved, attributes = self._saved, self._saved.attributes
        return (
            attributes.size_bytes == self._synced_size_bytes
            and (attributes.name, attributes.mode) == (self.name, self.mode)
            and (attributes.uid, attributes.gid) == (self.uid, self.gid)
            and (saved.epoch, saved.named_epoch) == (self.epoch, self.named_epoch)
            and saved.trim == int(self._trim != _TRIM_NONE)
        )

    # -- syncing -----------------------------------------------------------------------------

    async def sync(self, *, data_only: bool = False) -> None:
        """Make everything written before durable: data, then maps, then size.

        ``data_only`` leaves times unsaved, as fdatasync may. Raises SyncFailedError, NoSpaceError.
        """
        was_open = bool(self.opens)
        is_saved = False
        while not is_saved:
            trimmed = self._trim == _TRIM_DONE
            await self.sync_data()
            shrink_count = self._shrink_count
            if trimmed and self._trim == _TRIM_DONE:
                self._trim = _TRIM_NONE
            if not (data_only and self._only_times_unsaved()):
                await self._catalog.save([self])
            # A cut that was to be saved before this, and failed, has put the size back.
            is_saved = shrink_count == self._shrink_count
        # Who has it open may not have written all of it anew.
        self.is_emptied &= was_open or bool(self.opens)
        # Or a power cut may bring forth a removal that had failed.
        await self._catalog.settle()

    async def sync_data(self) -> None:
        """Make data durable, and then maps: all up to the size of now, which is for the catalog to save.

        Raises SyncFailedError, NoSpaceError.
        """
        early = [one for one in self._loaded_portions() if one[1].dirty_object_count >= _EARLY_OBJECTS]
        if early:
            await side_by_side([partial(processor.begin_writeback, portion) for processor, portion in early])
        is_known = False
        while not is_known:
            mark = self.size_mark()
            dirty = [one for one in self._loaded_portions() if one[1].is_dirty or one[1].failure is not None]
            # Each holds up the others' commits on its processor. Many maps are encoded by one processor of the machine
            # at a time anyway, for the interpreter has one lock.
            is_much = max((portion.dirty_object_count for _, portion in dirty), default=0) >= _MUCH_OBJECTS
            in_order = one_by_one if is_much else side_by_side
            await in_order([partial(processor.commit, [portion]) for processor, portion in dirty])
            # Cut meanwhile, or put back, it has another size up to which all is to be durable.
            is_known = self.data_synced(mark)

    def refuse_writes(self) -> None:
        """Have no processor take writes any more, if one of them could not sync what it has of it."""
        failure: SyncFailedError | None = None
        for processor in self.processors:
            portion = processor.portions.get(self.volume_id)
            if portion is not None and portion.failure is not None:
                failure = portion.failure
        for processor in self.processors:
            portion = processor.portions.get(self.volume_id)
            if portion is not None and portion.refusal is None:
                portion.refusal = failure

    def _loaded_portions(self) -> list[tuple[Processor, Portion]]:
        found = []
        for processor in self.processors:
            portion = processor.portions.get(self.volume_id)
            if portion is not None:
                found.append((processor, portion))
        return found

    def size_mark(self) -> tuple[int, int]:
        """The size now, for :meth:`data_synced` once the data of now is durable."""
        return self.size_bytes, self._shrink_count

    def data_synced(self, mark: tuple[int, int]) -> bool:
        """All data of when the mark was taken is durable; more may be by now, and stays so.

        False: the volume was cut meanwhile, or put back, so the mark says nothing of it.
        """
        size_bytes, shrink_count = mark
        if shrink_count != self._shrink_count:
            return False
        self._synced_size_bytes = min(max(size_bytes, self._synced_size_bytes), self.size_bytes)
        return True

    # -- changing the size -------------------------------------------------------------------

    async def truncate(self, size_bytes: int) -> None:
        """Set the size; what is gained reads as zeros. What is cut off is for :meth:`clear_cut` to free.

        A cut is durable when this returns. Until the maps are without what lay behind the size (:attr:`needs_trim`),
        the catalog's ``trim`` says so, and nobody sees that. Raises TooLargeError, NoSpaceError.
        """
        await self.wait_until_open()
        if size_bytes >= self.size_bytes:
            is_fitted = False
            while size_bytes > self.size_bytes:
                try:
                    self._check_growth(size_bytes)
                except NotResidentError as missing:
                    await missing.fetch({})
                    continue
                if not is_fitted:
                    # First, for it may not become so long; then what was looked at may be otherwise.
                    await self._fit_source(size_bytes)
                    is_fitted = True
                    continue
                self.before_change()
                self.size_bytes = size_bytes
            return
        self.open()
        try:
            let_writers_go = self.hold_writers()
            try:
                await self._shrink(size_bytes)
            finally:
                let_writers_go()
        finally:
            self.close()

    async def fit(self) -> None:
        """Clear what its source has behind its size, and give a source that is written over this size."""
        if self._trim == _TRIM_NONE:
            self._trim = _TRIM_DUE
        await self.trim()

    async def _fit_source(self, size_bytes: int) -> None:
        """An image that is written over is to have the size that the volume is to have."""
        self.open()
        try:
            await self.portions[0].fit_source(size_bytes, may_cut=False)
        finally:
            self.close()

    async def clear_cut(self) -> None:
        """After a truncate: free what was cut off, which may take long, and that without room or memory waits."""
        if self.needs_trim and self.may_have_blocks:
            with suppress(SnapfsError, OSError, MemoryError):
                await self.trim()

    async def _shrink(self, size_bytes: int) -> None:
        # Before the smaller size is durable nothing behind it may be cleared, by whomever.
        async with self.kept_from_trimming():
            await self._save_smaller(size_bytes)

    async def _save_smaller(self, size_bytes: int) -> None:
        before = (self.size_bytes, self._synced_size_bytes, self._trim)
        self.before_change()
        self.size_bytes = size_bytes
        self._shrink_count += 1
        self._synced_size_bytes = min(self._synced_size_bytes, size_bytes)
        if self.may_have_blocks:
            self._trim = _TRIM_DUE
        if not self.is_removed:
            try:
                await self._catalog.save([self])
            except BaseException:
                self.size_bytes, self._synced_size_bytes, self._trim = before
                self._shrink_count += 1
                raise
            self.is_emptied |= not size_bytes

    async def discard(self, offset: int, length: int) -> AsyncGenerator[int]:
        """Have a range read as zeros, up to the end at most: whole blocks become holes, the rest is written over.

        Lot by lot, each of which gives the bytes in blocks that became holes. Needs the caller to keep cuts and
        truncates out of each lot. Raises BusyVolumeError when there was a rollback between two.
        """
        await self.wait_until_open()
        replaced_count = self._replaced_count
        self.open()
        try:
            async with aclosing(self._discard_lots(offset, offset + length)) as lots:
                has_more = True
                while has_more:
                    if self._replaced_count != replaced_count:
                        raise BusyVolumeError(
                            f"volume {show_name(self.name)!r} was rolled back meanwhile",
                            "A part of what it held before was discarded; discard again what is to be",
                        )
                    before = self.block_count
                    try:
                        has_more = await anext(lots)
                    finally:
                        # Also when it stopped halfway.
                        self.before_change()
                        self.mtime_ns = self.ctime_ns = time.time_ns()
                    yield max(0, before - self.block_count) * BLOCK_SIZE
        finally:
            self.close()

    async def _discard_lots(self, offset: int, wanted_end: int) -> AsyncGenerator[bool]:
        """Discards lot by lot; gives for each whether there are more. Between two the volume may be cut."""
        end = min(wanted_end, self.size_bytes)
        first_whole, end_whole = -(-offset >> OBJECT_SHIFT), end >> OBJECT_SHIFT
        if end_whole - first_whole <= _TRIM_BATCH:
            await self._discard_all_of(offset, end)
            yield False
            return
        await self._discard_all_of(offset, first_whole << OBJECT_SHIFT)
        for processor, portion in list(zip(self.processors, self.portions, strict=True)):
            from_object: int | None = first_whole
            while from_object is not None and from_object < end_whole:
                # Of a sparse volume of terabytes there are few that have blocks.
                objects, from_object = await self._some_objects(processor, portion, from_object)
                for object_index in objects:
                    if object_index < end_whole:
                        start = object_index << OBJECT_SHIFT
                        await self._discard_all_of(start, start + OBJECT_SIZE)
                yield True
        await self._discard_all_of(end_whole << OBJECT_SHIFT, min(end, self.size_bytes))
        yield False

    async def _discard_all_of(self, offset: int, end: int) -> None:
        position = offset
        while position < end:
            object_index, inside = position >> OBJECT_SHIFT, position & OBJECT_MASK
            stop = min(end, (object_index + 1) << OBJECT_SHIFT)
            aligned = -(-inside // BLOCK_SIZE) * BLOCK_SIZE
            last_inside = inside + stop - position
            if inside % BLOCK_SIZE:
                await self.write(position, bytes(min(stop - position, aligned - inside)))
            first = aligned // BLOCK_SIZE
            last = await when_resident(partial(self._unmap_up_to_now, stop, object_index, first, last_inside))
            if last_inside > last * BLOCK_SIZE >= aligned:
                await self.write(stop - (last_inside - last * BLOCK_SIZE), bytes(last_inside - last * BLOCK_SIZE))
            position = stop

    async def trim(self) -> None:
        """Clear what lies behind the size: zero the rest of its last block, unmap all after it.

        Left to be done by a truncate, or by writes behind the size that a crash has cut off from
        it. The volume does not grow meanwhile, so nothing new is cleared. Stops halfway for whoever waits for that.
        """
        async with self._trim_turn:
            if self._trim != _TRIM_DUE or self.is_unused:
                return
            self.open()
            self._trim = _TRIM_RUNNING
            size_bytes = self.size_bytes
            try:
                for processor, portion in zip(self.processors, self.portions, strict=True):
                    if processor.tally.counts.get(self.volume_id) or self.volume_id in self._traits.rows:
                        await self._trim_portion(processor, portion)
                    if self._waiting_count:
                        return
                # Last, for it may take a block: on a full device the rest gives room back.
                await self._zero_tail()
                # Behind this size all is cleared. It neither shrinks nor grows before this is over.
                await self.portions[0].fit_source(size_bytes, may_cut=True)
                if self._trim == _TRIM_RUNNING:
                    self._trim = _TRIM_DONE
            finally:
                if self._trim == _TRIM_RUNNING:
                    self._trim = _TRIM_DUE
                self.close()

    async def _zero_tail(self) -> None:
        size_bytes = self.size_bytes
        length = -size_bytes % BLOCK_SIZE
        if length == 0:
            return
        object_index, inside = size_bytes >> OBJECT_SHIFT, size_bytes & OBJECT_MASK
        portion = self.portions[object_index % self.processor_count]
        old_blocks: OldBlocks = {}
        while True:
            try:
                block_map = portion.map_now(object_index)
                tail = memoryview(bytearray(length))
                try:
                    portion.read_now(block_map, object_index, inside, tail)
                except BlockingIOError:
                    await portion.read_segments(portion.segments(block_map, object_index, inside, length, 0), tail)
                # Nearly always it is zeros, and stays where it is.
                if any(tail):
                    portion.write_now(object_index, inside, bytes(length), old_blocks)
            except NotResidentError as missing:
                await missing.fetch(old_blocks)
            except DamagedBlockError as damage:
                if portion.names_now(damage):
                    portion.report(damage)
                    raise
            else:
                return

    async def _trim_portion(self, processor: Processor, portion: Portion) -> None:
        size_bytes = self.size_bytes
        partly = size_bytes >> OBJECT_SHIFT
        from_object: int | None = partly
        while from_object is not None and not self._waiting_count:
            objects, from_object = await self._some_objects(processor, portion, from_object)
            for object_index in objects:
                inside = size_bytes & OBJECT_MASK if object_index == partly else 0
                await self._unmap(portion, object_index, (inside + BLOCK_SIZE - 1) >> BLOCK_SHIFT)
            if portion.dirty_object_count >= _TRIM_COMMIT_OBJECTS:
                await processor.commit([portion])

    async def _some_objects(
        self, processor: Processor, portion: Portion, from_object: int
    ) -> tuple[list[int], int | None]:
        """Objects of a processor that may have blocks, in order from one on; and where to go on, None for the end."""
        rows = await processor.access.ask(processor.access.store.some_maps, self.volume_id, from_object, _TRIM_BATCH)
        stored = [row.object_index for row in rows]
        resident = [index for index in list(portion.objects) if index >= from_object]
        if self._traits.ancestors(self.volume_id) or self.volume_id in processor.sources:
            # Objects that are inherited, or lie in an image, have no row of their own.
            stored = await processor.mapped_objects(self.volume_id, from_object, _TRIM_BATCH)
            if portion.is_in_place:
                resident = []
        if len(stored) < _TRIM_BATCH:
            return sorted({*stored, *resident}), None
        return sorted({*stored, *(index for index in resident if index <= stored[-1])}), stored[-1] + 1

    def _unmap_up_to_now(
        self, stop: int, object_index: int, first: int, last_inside: int, old_blocks: OldBlocks
    ) -> int:
        """Make holes of an object's blocks from ``first`` on, up to byte ``last_inside``; before which block it ended.

        A block that ``stop``, the same byte of the volume, cuts goes too if nothing follows: now, for an append may.
        """
        last = last_inside // BLOCK_SIZE
        if stop == self.size_bytes:
            last = -(-last_inside // BLOCK_SIZE)
        if last > first:
            self.portions[object_index % self.processor_count].unmap_now(object_index, first, last)
        return last

    async def _unmap(self, portion: Portion, object_index: int, first: int, last: int = BLOCKS_PER_OBJECT) -> None:
        await when_resident(lambda _: portion.unmap_now(object_index, first, last))
