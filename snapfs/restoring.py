"""Rolling a copy-on-write volume back in place: what its snapshot preserved is copied over its source.

The present is a snapshot by then, so what is overwritten is preserved for that first, as ever. In the commit of that
snapshot the volume is marked as being restored, and until all is copied and durable nobody reads or
writes it; so nobody sees a mix, and after a crash the copying is done again before the pool is used. When it
cannot go through - the change log is full, a preserved block is damaged - the present is copied back in the
same way, which takes no room; at an opening it then stays closed. The time it takes follows what changed since
the snapshot.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from . import blockmap
from .blockmap import HOLE
from .closed import Closed
from .errors import SnapfsError
from .events import EventLog
from .geometry import BLOCK_SHIFT, OBJECT_SHIFT
from .jobs import Job
from .notresident import when_resident
from .portion import Portion
from .processor import Processor
from .snapshotindex import NEVER
from .tasks import side_by_side
from .units import show_name
from .volume import Volume

_RUN_BLOCKS_MAX = 256
_OBJECTS_A_COMMIT = 64


class Restorer:
    """Puts one volume back in place. Whoever makes it has the present as a snapshot of ``undo_instant``.

    The caller holds the locks of the snapshots and of the volumes, and the volume's trimming turn.
    """

    def __init__(
        self,
        volume: Volume,
        processors: Sequence[Processor],
        events: EventLog,
    ) -> None:
        self._volume = volume
        self._processors = processors
        self._events = events
        self._closed = Closed(len(processors))
        self._portions: list[Portion] = []

    def hold(self) -> None:
        """Have the volume open, for :meth:`close_now`, or until :meth:`let_go`. Raises whatever keeps it from that."""
        self._volume.open()

    def let_go(self) -> None:
        """Undo :meth:`hold`: there is nothing to be put back."""
        self._volume.close()

    def close_now(self) -> None:
        """From now on nobody reads or writes the volume, which is held. Runs without an await, and does not fail."""
        self._portions = self._volume.portions
        self._volume.portions = self._closed.portions()

    def open_now(self) -> None:
        """Let readers and writers go on."""
        self._volume.portions = self._portions
        self._volume.close()
        self._closed.open()

    def give_up(self, error: BaseException) -> None:
        """Leave the volume closed, until the pool is opened again."""
        name = show_name(self._volume.name)
        self._closed.fail(
            SnapfsError(
                f"a rollback of volume {name!r} could not be finished ({error})",
                "Its snapshots are whole. Mend the cause, then unmount and mount: it is tried again",
            )
        )
        self._events.note("rollback-unfinished", logging.ERROR, volume=name, reason=str(error) or repr(error))

    async def copy_back(self, instant: int, size_bytes: int, job: Job) -> None:
        """Have the source hold what the volume held at an instant, durably. Raises what reading and writing raise."""
        await self._portions[0].fit_source(size_bytes, may_cut=False)
        await side_by_side(
            [
                _Copying(processor, portion, instant, size_bytes, job).run
                for processor, portion in zip(self._processors, self._portions, strict=True)
            ]
        )


class _Copying:
    """Copying one processor's part."""

    def __init__(self, processor: Processor, portion: Portion, instant: int, size_bytes: int, job: Job) -> None:
        self._processor = processor
        self._portion = portion
        self._instant = instant
        self._size_bytes = size_bytes
        self._job = job

    async def run(self) -> None:
        """Copy all that was preserved since the instant over the source, durably."""
        store = self._processor.access.store
        await self._processor.commit([self._portion])
        objects = await self._processor.access.ask(store.changed_objects, self._portion.volume_id, self._instant, NEVER)
        for number, object_index in enumerate(objects):
            await self._copy_object(object_index)
            if number % _OBJECTS_A_COMMIT == _OBJECTS_A_COMMIT - 1:
                await self._processor.commit([self._portion])
        await self._processor.commit([self._portion])

    async def _copy_object(self, object_index: int) -> None:
        source_id = self._processor.sources[self._portion.volume_id].log_id
        found = await self._portion.snapshot_map(object_index, self._instant)
        for block, count, log_id in blockmap.all_runs(found):
            if log_id == source_id:
                # It has not changed since.
                continue
            for first in range(block, block + count, _RUN_BLOCKS_MAX):
                await self._copy_run(object_index, first, min(_RUN_BLOCKS_MAX, block + count - first), log_id)

    async def _copy_run(self, object_index: int, block: int, count: int, log_id: int) -> None:
        """Up to the end of the volume alone: a block device may end within a block, and takes nothing behind that."""
        inside = block << BLOCK_SHIFT
        end = min(inside + (count << BLOCK_SHIFT), self._size_bytes - (object_index << OBJECT_SHIFT))
        if end <= inside:
            return
        if log_id == HOLE:
            last = end >> BLOCK_SHIFT
            await when_resident(lambda _: self._portion.unmap_now(object_index, block, last))
            inside = max(inside, last << BLOCK_SHIFT)
        view = memoryview(bytearray(end - inside))
        if log_id != HOLE:
            segments = await when_resident(lambda _: self._portion.segments(log_id, object_index, inside, len(view), 0))
            await self._portion.read_segments(segments, view)
        if len(view):
            await when_resident(lambda old: self._portion.write_now(object_index, inside, view, old))
        self._job.done += len(view)
