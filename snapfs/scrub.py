"""Scrubbing: all that is sealed is read from the devices and held against its checksums.

And verifying: a snapshot's root is worked out anew from what it holds, and held against the one it was sealed with.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from . import blockmap
from .backends import DeviceFile
from .blockmap import HOLE, BlockMap
from .blockmasks import mask_runs
from .checksums import ZERO_DIGEST, ObjectSums, digest_of
from .contenthash import ContentHash, element_of, root_of
from .damage import DamagedBlock
from .errors import DamagedError, UnsealedError
from .formats import LogRow
from .geometry import BLOCK_SHIFT, BLOCK_SIZE, BLOCKS_PER_OBJECT, OBJECT_SHIFT, LogId, VolumeId, log_offset
from .jobs import Job
from .namedblocks import NamedBlocks
from .notresident import when_resident
from .pool import Pool
from .portion import Portion, Segment
from .processor import Processor
from .sealedfile import DamagedBlockError
from .snapshot import Snapshot
from .units import show_name

_OBJECTS_A_STEP = 16
_RUN_BLOCKS_MAX = 256


class _Rate:
    """Keeps reading below so many bytes a second; None for no bound."""

    def __init__(self, bytes_per_s: int | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = trio.current_time()

    async def spend(self, size_bytes: int) -> None:
        """Wait until this many bytes more are within the rate."""
        if self._bytes_per_s is None:
            await trio.lowlevel.checkpoint()
            return
        self._free_at = max(self._free_at, trio.current_time()) + size_bytes / self._bytes_per_s
        await trio.sleep_until(self._free_at)


@dataclass(slots=True)
class ScrubReport:
    """What a scrub found. ``unsealed_bytes`` lie in change logs that have no checksums yet.

    ``unread``: processor and log of what could not be read, or not all of it.
    """

    checked_bytes: int = 0
    unsealed_bytes: int = 0
    damaged: list[DamagedBlock] = field(default_factory=list)
    unreadable_logs: list[str] = field(default_factory=list)
    unread: set[tuple[int, LogId]] = field(default_factory=set)
    duration_ms: float = 0.0


async def scrub(pool: Pool, bytes_per_s: int | None = None, job_name: str = "") -> ScrubReport:
    """Read all that is sealed and that anything names, and compare. What is damaged is in the pool's ledger then.

    Raises StoppedError when the job is stopped.
    """
    report = ScrubReport()
    started = time.perf_counter_ns()
    known_before = frozenset(pool.damage.known)
    rate = _Rate(bytes_per_s)
    summed: list[tuple[Processor, LogRow]] = []
    for processor in pool.processors:
        await processor.commit(processor.sound_portions())
        store = processor.access.store
        summed += [(processor, row) for row in await processor.access.ask(store.summed_logs)]
        report.unsealed_bytes += sum(
            row.block_count << BLOCK_SHIFT for row in await processor.access.ask(store.unsummed_logs)
        )
    total = sum(row.block_count for _, row in summed) << BLOCK_SHIFT
    try:
        with pool.jobs.stoppable("scrub", "the sealed change logs", total, job_name) as job:
            for processor in pool.processors:
                logs = [row for one, row in summed if one is processor]
                await _ProcessorScrub(processor, rate, job, report).run(logs)
            report.checked_bytes = job.done
    finally:
        # Also when it is stopped.
        for damaged in report.damaged:
            pool.damage.note(*damaged)
    pool.damage.replace(report.damaged, known_before, report.unread)
    await pool.damage_teller.tell_all()
    report.duration_ms = (time.perf_counter_ns() - started) / 1e6
    return report


class _ProcessorScrub:
    """The scrub of one processor's change logs: object by object, of each all logs that anything names it in."""

    def __init__(self, processor: Processor, rate: _Rate, job: Job, report: ScrubReport) -> None:
        self._processor = processor
        self._rate = rate
        self._job = job
        self._report = report
        self._unreadable_ids: set[LogId] = set()

    async def run(self, logs: Sequence[LogRow]) -> None:
        """Read what is named in these logs, which are sealed, and compare."""
        families: dict[tuple[VolumeId, ...], dict[int, LogRow]] = {}
        for row in logs:
            families.setdefault(self._processor.traits.family_of(row.volume_id), {})[row.log_id] = row
        for by_id in families.values():
            family = partial(self._processor.traits.families_of, {row.volume_id for row in by_id.values()})
            walk = NamedBlocks(self._processor.access, family, by_id.keys())
            while (named := await walk.step()) is not None:
                for log_id, masks in sorted(_by_log(named).items()):
                    await self._scrub_log(by_id[log_id], masks)

    async def _scrub_log(self, row: LogRow, masks: dict[int, int]) -> None:
        if row.log_id in self._unreadable_ids:
            return
        try:
            file = await self._processor.access.in_thread(self._processor.logs.open_alone, row.log_id, row.device_id)
        except OSError as error:
            # What was freed meanwhile may have gone with its log.
            if await self._still_named(row, masks):
                self._unreadable_ids.add(row.log_id)
                self._report.unread.add((self._processor.index, row.log_id))
                where = f"change log {row.log_id} of processor {self._processor.index}"
                self._report.unreadable_logs.append(f"{where}: {error.strerror}")
            return
        try:
            for object_index, mask in sorted(masks.items()):
                await self._scrub_object(row, file, object_index, mask)
        finally:
            file.close()

    async def _scrub_object(self, row: LogRow, file: DeviceFile, object_index: int, mask: int) -> None:
        access = self._processor.access
        try:
            sums = await access.ask(access.store.checksums, row.log_id, object_index)
        except DamagedError as error:
            self._report.unreadable_logs.append(error.reason)
            self._report.unread.add((self._processor.index, row.log_id))
            return
        base = log_offset(object_index, self._processor.processor_count)
        try:
            wrong = await access.in_thread(_compare, file, base, mask, sums)
        except OSError:
            wrong = await access.in_thread(_unreadable, file, base, mask, sums)
        if wrong:
            # What was freed while it was read is not damaged.
            again = (await self._still_named(row, [object_index])).get(object_index, 0)
            self._report.damaged += [
                DamagedBlock(self._processor.index, row.log_id, object_index, block)
                for block in wrong
                if again >> block & 1
            ]
        size_bytes = mask.bit_count() << BLOCK_SHIFT
        self._job.done += size_bytes
        await self._rate.spend(size_bytes)

    async def _still_named(self, row: LogRow, objects: Iterable[int]) -> dict[int, int]:
        """By object: the mask of blocks in a log that anything names now."""
        processor = self._processor
        await processor.commit(processor.sound_portions())
        family = partial(processor.traits.family_of, row.volume_id)
        walk = NamedBlocks(processor.access, family, {row.log_id}, sorted(objects))
        found: dict[int, int] = {}
        while (named := await walk.step()) is not None:
            found.update(_by_log(named).get(row.log_id, {}))
        return found


def _by_log(named: Mapping[int, Mapping[int, int]]) -> dict[int, dict[int, int]]:
    """By log and object what is known by object and log."""
    found: dict[int, dict[int, int]] = {}
    for object_index, masks in named.items():
        for log_id, mask in masks.items():
            found.setdefault(log_id, {})[object_index] = mask
    return found


def _compare(file: DeviceFile, base: int, mask: int, sums: ObjectSums) -> list[int]:
    """Blocks of an object that are not what was sealed. Blocks."""
    wrong: list[int] = []
    for first, count in mask_runs(mask):
        for start in range(first, first + count, _RUN_BLOCKS_MAX):
            step = min(_RUN_BLOCKS_MAX, first + count - start)
            view = memoryview(bytearray(step << BLOCK_SHIFT))
            offset = base + (start << BLOCK_SHIFT)
            file.forget_cached(offset, len(view))
            file.read_into(view, offset)
            if sums.matches(start, view):
                continue
            for index in range(step):
                block = view[index << BLOCK_SHIFT : (index + 1) << BLOCK_SHIFT]
                if not sums.matches(start + index, block):
                    wrong.append(start + index)
    return wrong


def _unreadable(file: DeviceFile, base: int, mask: int, sums: ObjectSums) -> list[int]:
    """Like :func:`_compare`, block by block: what the device cannot read is damaged too. Blocks."""
    wrong = []
    for first, count in mask_runs(mask):
        for block in range(first, first + count):
            try:
                wrong += _compare(file, base, 1 << block, sums)
            except OSError:
                wrong.append(block)
    return wrong


@dataclass(slots=True)
class VerifyReport:
    """What verifying a snapshot found: the root it was sealed with, the one it has, and what is damaged.

    ``computed_root`` is empty when blocks are damaged. ``unsealed`` are volumes that no root is over.
    """

    root: str
    computed_root: str = ""
    checked_bytes: int = 0
    damaged: list[tuple[str, int]] = field(default_factory=list)
    unsealed: list[str] = field(default_factory=list)

    @property
    def is_proven(self) -> bool:
        """Whether what it holds is what was sealed."""
        return self.computed_root == self.root


async def verify(pool: Pool, snapshot: Snapshot, job_name: str = "") -> VerifyReport:
    """Read all that a snapshot holds, and work its root out anew.

    Raises UnsealedError, and StoppedError when the job is stopped.
    """
    if not snapshot.root:
        raise UnsealedError(
            f"snapshot {show_name(snapshot.name or b'')!r} is not sealed yet",
            "It is being sealed in the background: status.json tells how many wait. Try again later",
        )
    report = VerifyReport(snapshot.root)
    members = await pool.snapshots.members(snapshot)
    ids = [one for one in members.ordered_ids if one not in snapshot.unsealed_ids]
    report.unsealed = [show_name(members.by_id[one].name) for one in members.ordered_ids if one not in ids]
    total = sum(members.block_counts.get(one, 0) for one in ids) << BLOCK_SHIFT
    volumes = []
    with pool.jobs.stoppable("verify", show_name(snapshot.name or b""), total, job_name) as job:
        for volume_id in ids:
            attributes = members.by_id[volume_id]
            view = await pool.snapshots.open_volume(snapshot, volume_id)
            try:
                content = ContentHash()
                for processor, portion in zip(pool.processors, view.portions, strict=True):
                    checking = _Verifying(processor, portion, snapshot.instant, job)
                    content.combine(await checking.run())
                    report.damaged += [(show_name(attributes.name), offset) for offset in checking.damaged_offsets]
            finally:
                pool.snapshots.close_volume(view)
            volumes.append((attributes.name, attributes.size_bytes, content.value))
        report.checked_bytes = job.done
    if not report.damaged:
        report.computed_root = root_of(volumes)
    await pool.damage_teller.tell_all()
    return report


class _Verifying:
    """Reading one processor's part of a volume in a snapshot."""

    def __init__(self, processor: Processor, portion: Portion, instant: int, job: Job) -> None:
        self.damaged_offsets: list[int] = []
        self._processor = processor
        self._portion = portion
        self._instant = instant
        self._job = job

    async def run(self) -> int:
        """The content hash of what is there."""
        content = ContentHash()
        from_object = 0
        while objects := await self._processor.mapped_objects(self._portion.volume_id, from_object, _OBJECTS_A_STEP):
            for object_index in objects:
                block_map = await self._portion.snapshot_map(object_index, self._instant)
                if block_map != HOLE:
                    content.replace([], [element_of(object_index, await self._digests(object_index, block_map))])
            from_object = objects[-1] + 1
        return content.value

    async def _digests(self, object_index: int, block_map: BlockMap) -> bytes:
        parts = []
        for block, count, log_id in blockmap.runs(block_map, 0, BLOCKS_PER_OBJECT):
            if log_id == HOLE:
                parts.append(ZERO_DIGEST * count)
                continue
            for start in range(block, block + count, _RUN_BLOCKS_MAX):
                step = min(_RUN_BLOCKS_MAX, block + count - start)
                parts.append(await self._digests_of_run(object_index, log_id, start, step))
        return b"".join(parts)

    async def _digests_of_run(self, object_index: int, log_id: int, block: int, count: int) -> bytes:
        view = memoryview(bytearray(count << BLOCK_SHIFT))
        try:
            await self._portion.read_segments(await self._segments(object_index, log_id, block, len(view)), view)
        except DamagedBlockError as damage:
            if count > 1:
                parts = [await self._digests_of_run(object_index, log_id, block + one, 1) for one in range(count)]
                return b"".join(parts)
            self._portion.report(damage)
            self.damaged_offsets.append((object_index << OBJECT_SHIFT) + (block << BLOCK_SHIFT))
            return ZERO_DIGEST
        self._job.done += len(view)
        return await self._processor.access.in_thread(_digests_in, view)

    async def _segments(self, object_index: int, log_id: int, block: int, length: int) -> list[Segment]:
        inside = block << BLOCK_SHIFT
        return await when_resident(lambda _: self._portion.segments(log_id, object_index, inside, length, 0))


def _digests_in(view: memoryview) -> bytes:
    return b"".join(digest_of(view[at : at + BLOCK_SIZE]) for at in range(0, len(view), BLOCK_SIZE))
