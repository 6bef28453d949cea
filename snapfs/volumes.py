"""The table of live volumes: creating, finding, renaming and removing them.

Concurrency: changes of names and attributes, truncates and snapshots' cuts follow one another under
``lock``, so that a cut sees each change whole or not at all. What a change does in memory is undone
if its commit fails.
"""

from __future__ import annotations

import contextlib
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager

import trio

from .catalogaccess import CatalogAccess
from .errors import DatabaseFullError, ExistsError, NotFoundError, SnapfsError, UnfinishedError
from .folder import Folder
from .formats import AttributeChange, Attributes, CatalogBatch, VersionRow, VolumeRow, VolumeTraits
from .geometry import Epoch, VolumeId
from .processor import PortionFacts, Processor
from .reserve import Reserve
from .shardstate import EpochClock
from .snapshotindex import NEVER, SnapshotIndex
from .tasks import Wakeup
from .traits import TraitsTable
from .units import check_name, show_name, storable_ns
from .volume import Volume

# How long it rests after files that were written anew have been made durable.
EMPTIED_REST_S = 0.1
_CLOSING_CHECK_S = 0.1


class VolumeTable:
    """The live volumes by name and by id, and those removed whose maps are still to be taken apart."""

    def __init__(
        self,
        catalog: CatalogAccess,
        snapshots: SnapshotIndex,
        clock: EpochClock,
        next_volume_id: int,
        removed: dict[VolumeId, Epoch],
        traits: TraitsTable,
        reserve: Reserve,
        reclaim_wakeup: Wakeup,
        folder: Folder,
    ) -> None:
        self.by_name: dict[bytes, Volume] = {}
        self.by_id: dict[VolumeId, Volume] = {}
        self.by_file_id: dict[VolumeId, Volume] = {}
        self.removed = removed
        self.traits = traits
        self.folder = folder
        self.lock = trio.Lock()
        self.processors: Sequence[Processor] = ()
        self.catalog = catalog
        self._snapshots = snapshots
        self._clock = clock
        self._next_volume_id = next_volume_id
        self._reserve = reserve
        self._reclaim_wakeup = reclaim_wakeup
        # In the order in which they came, so that the same is done in the same order again.
        self._unsaved: dict[Volume, None] = {}
        self._open: dict[Volume, None] = {}
        self._closings = trio.lowlevel.ParkingLot()
        self._emptied_wakeup = Wakeup()

    def load(self, rows: Sequence[VolumeRow], *, after_crash: bool) -> None:
        """Fill the table from the catalog.

        ``after_crash``: what was written behind a volume's durable size may still be there.
        """
        for row in rows:
            self._add(self._volume(row, is_saved=True, needs_trim=after_crash))

    def _volume(self, row: VolumeRow, *, is_saved: bool, needs_trim: bool) -> Volume:
        return Volume(
            row,
            self.processors,
            self.catalog,
            self._snapshots,
            self._clock,
            traits=self.traits,
            is_saved=is_saved,
            needs_trim=needs_trim,
            when_unused=self._note_unused,
        )

    def _add(self, volume: Volume) -> None:
        self.by_name[volume.name] = volume
        self.by_id[volume.volume_id] = volume
        self.by_file_id[volume.file_id] = volume

    def facts_of(self, volume_id: VolumeId) -> PortionFacts:
        """What a processor has to know of a volume."""
        volume = self.by_id.get(volume_id)
        if volume is not None:
            return PortionFacts(volume.birth_epoch, volume.named_epoch, volume.last_instant)
        removed_epoch = self.removed.get(volume_id)
        # One that is in snapshots only: nothing of it changes, and it has no live maps.
        return PortionFacts(0, 0, NEVER - 1 if removed_epoch is None else removed_epoch - 1, is_gone=True)

    def refuse_writes(self, volume_id: VolumeId) -> None:
        """A sync of a volume's data failed on one processor: from now on none takes writes to it."""
        volume = self.by_id.get(volume_id)
        if volume is not None:
            volume.refuse_writes()

    def get(self, name: bytes) -> Volume:
        """The volume of that name. Raises NotFoundError."""
        volume = self.by_name.get(name)
        if volume is None:
            raise NotFoundError(f"there is no volume {show_name(name)!r}", "See the names with ls")
        return volume

    # -- open volumes ------------------------------------------------------------------------

    def open(self, volume: Volume) -> None:
        """Have a volume ready for reads and writes until :meth:`close`."""
        volume.open()
        self._open[volume] = None

    def close(self, volume: Volume) -> None:
        """Undo one :meth:`open`. What was written is made durable soon; a removed volume is freed."""
        volume.close()

    def _note_unused(self, volume: Volume) -> None:
        """Nobody has a volume open any more, nor is it being trimmed."""
        self._open.pop(volume, None)
        self._closings.unpark_all()
        if volume.is_removed:
            self._drop(volume)
            self._reclaim_wakeup.set()
            return
        self._unsaved[volume] = None
        if volume.is_emptied:
            self._emptied_wakeup.set()

    async def sync_emptied(self) -> None:
        """Have what was cut to nothing, written anew and closed be durable at once; until cancelled.

        The cut is durable already, and of what it had in place of before a crash would leave nothing. As on ext4, which
        begins to write such a file when it is closed (mount option ``auto_da_alloc``).
        """
        while True:
            await self._emptied_wakeup.wait()
            for volume in self.unsaved():
                if volume.is_emptied and not volume.opens:
                    # What fails is tried again with all others.
                    with contextlib.suppress(SnapfsError, OSError):
                        await volume.sync()
            # Those of an archive that is unpacked, say, are taken together.
            await trio.sleep(EMPTIED_REST_S)

    async def wait_until_closed(self, volume: Volume) -> None:
        """Wait until nobody has a volume open."""
        while volume.opens:
            # Trimming, which has it open, stops halfway for that; but it may begin anew, so it is looked again.
            async with volume.kept_from_trimming():
                pass
            if not volume.opens:
                return
            with trio.move_on_after(_CLOSING_CHECK_S):
                await self._closings.park()

    def _drop(self, volume: Volume) -> None:
        self.by_id.pop(volume.volume_id, None)
        self.by_file_id.pop(volume.file_id, None)

    @asynccontextmanager
    async def opened(self, name: bytes) -> AsyncIterator[Volume]:
        """The volume of that name, open. Raises NotFoundError."""
        volume = self.get(name)
        self.open(volume)
        try:
            yield volume
        finally:
            self.close(volume)

    def unsaved(self) -> list[Volume]:
        """Volumes that may have something to be saved."""
        return [volume for volume in self._open | self._unsaved if not volume.is_removed]

    async def sync_all(self) -> None:
        """Make all volumes durable. Raises the first error, when all that can be is done.

        For want of room before any other: against that there may be a remedy, and then it is tried again.
        """

        async def sync(volume: Volume) -> None:
            await volume.sync()
            # It may have been opened, written and closed meanwhile.
            if volume.opens == 0 and volume.is_clean:
                self._unsaved.pop(volume, None)

        errors: list[SnapfsError | OSError] = []
        for volume in self.unsaved():
            try:
                await sync(volume)
            except (SnapfsError, OSError) as error:
                errors.append(error)
        if errors:
            raise next((one for one in errors if isinstance(one, DatabaseFullError)), errors[0])

    # -- names -------------------------------------------------------------------------------

    async def create(self, name: bytes, mode: int = 0o600, uid: int = 0, gid: int = 0) -> Volume:
        """Make an empty volume; it is durable. Raises ExistsError, BadNameError, NoSpaceError."""
        now = time.time_ns()
        attributes = Attributes(name, 0, stat.S_IMODE(mode), uid, gid, now, now, now)
        return await self.create_as(attributes, lambda volume_id: None)

    async def create_as(
        self,
        attributes: Attributes,
        traits_of: Callable[[VolumeId], VolumeTraits | None],
        prepare: Callable[[VolumeId], Awaitable[None]] | None = None,
        origin_instant: int | None = None,
    ) -> Volume:
        """Make a volume with these attributes, and traits if there are any; it is durable.

        ``prepare`` makes durable, beforehand, what the processors must know of it.
        ``origin_instant`` is that of the snapshot of which it is a clone.
        """
        check_name(attributes.name, "volume")
        await self._reserve.check()
        async with self.lock:
            self.check_free(attributes.name)
            row = self.new_row(attributes, origin_instant)
            next_id = self._next_volume_id
            traits = traits_of(row.volume_id)
            batch = CatalogBatch(meta={"next_volume_id": next_id}, traits=[traits] if traits is not None else [])
            try:
                if prepare is not None:
                    await prepare(row.volume_id)
                if traits is not None:
                    self.traits.put(traits)
                volume = self._volume(row, is_saved=False, needs_trim=False)
                await self.catalog.save([volume], lambda: batch)
            except BaseException:
                self.traits.drop(row.volume_id)
                if prepare is not None:
                    await self.forget_counts([row.volume_id])
                raise
            self._add(volume)
            self.folder.entries_changed()
            return volume

    async def forget_counts(self, volume_ids: Iterable[VolumeId]) -> None:
        """Drop what processors counted for volumes that could not be made, or have the next opening do it."""
        if not self.catalog.is_settled:
            # A power cut may still bring them forth.
            return
        for volume_id in volume_ids:
            for processor in self.processors:
                with contextlib.suppress(SnapfsError, OSError):
                    await processor.forget_count(volume_id)

    def check_free(self, name: bytes) -> None:
        """Raises ExistsError when a volume has that name."""
        if name in self.by_name:
            raise ExistsError(f"there is a volume {show_name(name)!r} already", "Choose another name")

    @property
    def next_volume_id(self) -> int:
        """The id that the next volume gets."""
        return self._next_volume_id

    def new_row(self, attributes: Attributes, origin_instant: int | None = None) -> VolumeRow:
        """The row of a volume to be born now, perhaps as a clone of what a snapshot holds.

        A clone is born after its snapshot, also where that named some volumes and so left the
        epoch of the others as it was. What it inherits may reach behind its size.
        """
        epoch = Epoch(max(self._clock.epoch, 0 if origin_instant is None else origin_instant + 1))
        volume_id = VolumeId(self._next_volume_id)
        self._next_volume_id += 1
        return VolumeRow(
            volume_id,
            attributes,
            birth_epoch=epoch,
            epoch=epoch,
            named_epoch=epoch if epoch > self._clock.epoch else Epoch(0),
            created_ns=time.time_ns(),
            trim=int(origin_instant is not None),
        )

    def take_back(self, volume: Volume | None, row: VolumeRow, epoch: Epoch) -> None:
        """Memory follows a rollback that is durable: the volume is that of ``row`` now, what it was is removed.

        None: one that was gone has come back. May be called again after it found no memory.
        """
        if volume is None:
            self.folder.entries_changed()
            self._add(self._volume(row, is_saved=True, needs_trim=False))
            return
        old_id = volume.volume_id
        if old_id != row.volume_id:
            self.removed[old_id] = epoch
            for processor in self.processors:
                processor.tally.hide(old_id)
                portion = processor.portions.get(old_id)
                if portion is not None:
                    portion.last_instant = epoch - 1
            self.by_id[row.volume_id] = volume
            volume.give_up()
            volume.become(row)
            del self.by_id[old_id]
        volume.resume()
        self._unsaved[volume] = None
        self._reclaim_wakeup.set()

    async def rename(self, old: bytes, new: bytes, *, replace: bool = True, exchange: bool = False) -> None:
        """Give a volume another name, in place of the volume that has it if ``replace``, durably.

        With ``exchange`` the two swap names. What was written to one that takes another's place is durable before that
        goes: programs that write a new file and rename it leave the one or the other, as on ext4 (mount option
        ``auto_da_alloc``) and btrfs. Raises NotFoundError, ExistsError, BadNameError, and what a sync does.
        """
        check_name(new, "volume")
        if exchange:
            check_name(old, "volume")
        synced: Volume | None = None
        while True:
            async with self.lock:
                volume = self.get(old)
                other = self.get(new) if exchange else self.by_name.get(new)
                if other is volume:
                    return None
                if other is not None and not replace and not exchange:
                    raise ExistsError(f"there is a volume {show_name(new)!r} already", "Choose another name")
                if other is None or exchange or volume is synced or volume.is_clean:
                    return await self._rename(volume, other, new, exchange=exchange)
            # Not with the lock held, which all others need.
            await volume.sync()
            synced = volume

    async def _rename(self, volume: Volume, other: Volume | None, new: bytes, *, exchange: bool) -> None:
        old = volume.name

        def renamed() -> CatalogBatch:
            # Only now that the catalog's turn has come: a sync before it must not save half of this.
            batch = CatalogBatch()
            if other is not None and exchange:
                other.before_change()
                other.name = old
            elif other is not None:
                self.add_removal(batch, other)
            volume.before_change()
            volume.name = new
            return batch

        try:
            await self.catalog.save([volume, other] if other is not None and exchange else [volume], renamed)
        except BaseException:
            volume.name = old
            if other is not None:
                other.name = new
            raise
        del self.by_name[old]
        self.by_name[new] = volume
        self.folder.entries_changed()
        if other is not None and exchange:
            self.by_name[old] = other
        elif other is not None:
            self._forget(other)
        volume.ctime_ns = time.time_ns()
        self._unsaved[volume] = None

    async def remove(self, name: bytes) -> None:
        """Remove a volume's name, durably. Whoever has it open keeps it; so do snapshots.

        Its space comes back in the background. Works on a full device.
        """
        async with self.lock:
            volume = self.get(name)
            await self._reserve.helped(lambda: self.catalog.save([], lambda: self.add_removal(CatalogBatch(), volume)))
            del self.by_name[name]
            self._forget(volume)
            self.folder.entries_changed()

    def add_removal(self, batch: CatalogBatch, volume: Volume) -> CatalogBatch:
        """Add a removal to a commit; memory follows when it is durable."""
        epoch = max(self._clock.epoch, volume.named_epoch)
        batch.versions += volume.needed_versions()
        if volume.epoch < epoch and self._snapshots.holds(volume.volume_id, volume.epoch, epoch - 1):
            batch.versions.append(
                VersionRow(volume.volume_id, Epoch(volume.epoch), Epoch(epoch - 1), volume.attributes())
            )
        batch.dropped_volumes.append(volume.volume_id)
        batch.removed.append((volume.volume_id, Epoch(epoch)))
        return batch

    def _forget(self, volume: Volume) -> None:
        epoch = max(self._clock.epoch, volume.named_epoch)
        volume.last_instant = epoch - 1
        volume.versions.clear()
        self.removed[volume.volume_id] = Epoch(epoch)
        self._unsaved.pop(volume, None)
        for processor in self.processors:
            processor.tally.hide(volume.volume_id)
            portion = processor.portions.get(volume.volume_id)
            if portion is not None:
                portion.last_instant = volume.last_instant
        if volume.opens == 0:
            self._drop(volume)
            self._reclaim_wakeup.set()

    @property
    def removed_unused_count(self) -> int:
        """Removed volumes that nobody has open."""
        return sum((volume := self.by_id.get(one)) is None or volume.opens == 0 for one in self.removed)

    def to_dismantle(self) -> list[tuple[VolumeId, Epoch]]:
        """Removed volumes that nobody has open."""
        for volume_id in self.removed:
            volume = self.by_id.get(volume_id)
            if volume is not None and volume.opens == 0:
                self._drop(volume)
        return [(one, epoch) for one, epoch in self.removed.items() if one not in self.by_id]

    def to_trim(self) -> list[Volume]:
        """Volumes that have something behind their size to be cleared."""
        return [
            volume
            for volume in self.by_name.values()
            if volume.needs_trim and volume.may_have_blocks and not self.is_restoring(volume)
        ]

    def is_restoring(self, volume: Volume) -> bool:
        """Whether a rollback in place of it is under way, or could not be finished."""
        return self.traits.get(volume.volume_id).restore_instant != 0

    def check_whole(self, volumes: Iterable[Volume]) -> None:
        """Raises UnfinishedError for a volume whose rollback in place could not be finished: it is a mix."""
        for volume in volumes:
            if self.is_restoring(volume):
                raise UnfinishedError(
                    f"a rollback of volume {show_name(volume.name)!r} is not finished",
                    "Mend what kept it from that, then unmount and mount; or name other volumes, or remove it",
                )

    # -- attributes --------------------------------------------------------------------------

    async def change_folder(self, change: AttributeChange) -> None:
        """Change attributes of the volumes' folder; durable at once, but for times, which are at the next clean end."""
        async with self.lock:
            before = self.folder.now()
            self.folder.change(change)
            if not change.only_times:
                try:
                    await self.catalog.save([], lambda: CatalogBatch(meta=self.folder.kept()))
                except BaseException:
                    self.folder.take_back(before)
                    raise

    async def change(self, volume: Volume, change: AttributeChange) -> None:
        """Change attributes; durable at once, but for times, which are at the next sync."""
        async with self.lock:
            old = volume.attributes()
            volume.before_change()
            if change.mode is not None:
                volume.mode = stat.S_IMODE(change.mode)
            if change.uid is not None:
                volume.uid = change.uid
            if change.gid is not None:
                volume.gid = change.gid
            if change.atime_ns is not None:
                volume.atime_ns = storable_ns(change.atime_ns)
            if change.mtime_ns is not None:
                volume.mtime_ns = storable_ns(change.mtime_ns)
            volume.ctime_ns = time.time_ns() if change.ctime_ns is None else storable_ns(change.ctime_ns)
            if volume.is_removed:
                return
            self._unsaved[volume] = None
            if change.only_times:
                return
            try:
                await self.catalog.save([volume])
            except BaseException:
                volume.mode, volume.uid, volume.gid = old.mode, old.uid, old.gid
                raise

    @property
    def epoch(self) -> int:
        """The epoch in which a volume is born now."""
        return self._clock.epoch

    async def _until_answering(self, volume: Volume) -> None:
        """A device that hangs must not be waited for with the lock held, which all other volumes need."""
        for processor in self.processors:
            await processor.until_answering(volume.volume_id)

    async def fit(self, volume: Volume) -> None:
        """Have a volume that stands on an image of another size be of its own."""
        await self._until_answering(volume)
        async with self.lock:
            _check_used(volume)
            await volume.fit()

    async def discard(self, volume: Volume, offset: int, length: int) -> int:
        """Have a range of a volume read as zeros; bytes that take no space any more. Durable at the next sync.

        A snapshot may be made, and others' changes may come, between any two lots of objects. Raises BusyVolumeError
        when the volume is rolled back meanwhile.
        """
        await self._until_answering(volume)
        freed_bytes = 0
        async with aclosing(volume.discard(offset, length)) as lots:
            while True:
                # Of a large one not the whole: all other volumes need the lock.
                async with self.lock:
                    _check_used(volume)
                    freed_in_lot = await anext(lots, None)
                    if not volume.is_removed:
                        self._unsaved[volume] = None
                if freed_in_lot is None:
                    return freed_bytes
                freed_bytes += freed_in_lot

    async def truncate(self, volume: Volume, size_bytes: int) -> None:
        """Set a volume's size; see :meth:`Volume.truncate`. What is cut off is freed when this returns, or waits."""
        await self._until_answering(volume)
        while True:
            async with self.lock:
                _check_used(volume)
                if size_bytes <= volume.size_bytes or not volume.is_cut_short:
                    await volume.truncate(size_bytes)
                    volume.before_change()
                    volume.mtime_ns = volume.ctime_ns = time.time_ns()
                    if not volume.is_removed:
                        self._unsaved[volume] = None
                    break
            # What takes long is done without the lock, which all other volumes need.
            await volume.trim()
        await volume.clear_cut()
        if volume.needs_trim:
            # It waits for room, or was stopped for somebody who did not cut it in the end.
            self._reclaim_wakeup.set()


def _check_used(volume: Volume) -> None:
    """Raises NotFoundError for a volume that was removed while one waited: what it held is its snapshots' alone."""
    if volume.is_unused:
        raise NotFoundError(f"volume {show_name(volume.name)!r} was removed meanwhile", "Nothing was changed")
