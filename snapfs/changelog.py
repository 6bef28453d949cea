"""Redirecting change logs: one sparse file each, on a device.

A change log takes what is written to one volume's objects on one processor between a snapshot and
the next; the source, which is the logs before it, stays as it was. Block ``b`` of an object lies at
the object's place in the file (see geometry.py), so there is no allocator.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from .backends import Device, DeviceFile
from .blockmap import LOG_ID_MAX
from .errors import DamagedError, IdsUsedUpError
from .formats import CHANGE_LOG, IMAGE_LOG, SOURCE_LOG, LogRow, log_file, log_folder, log_id_of
from .geometry import Epoch, LogId, VolumeId
from .liveness import DeviceWatch, Liveness
from .placement import Placement, Quota
from .sealedfile import SealedFile, SumCache

# Of each processor, as far as the process may have so many. A sequential read of what was written to between a thousand
# snapshots needs a thousand logs, over and over: at 300 MB/s with 512 of them open, at 960 with all.
OPEN_FILES_MAX = 2048
_OPEN_FILES_MIN = 16
_OTHER_FILES = 512
KNOWN_LOGS_MAX = 8192


class ChangeLog:
    """One change log.

    ``file`` is None while it is closed. ``users`` counts threads that read from the file; with one
    it is not closed. ``dirty``: written to since its last sync. ``unnamed``: its name on the device
    is not durable yet. ``held``: has state that is not committed, or takes writes. ``pins`` counts
    those that are about to name blocks of it; with one it does not die. ``liveness`` is its device's.
    ``unbegun_block_count``: what large writes put there since its device last was asked to begin to write it.
    """

    __slots__ = (
        "block_count",
        "created_ns",
        "device_id",
        "dirty",
        "epoch",
        "file",
        "held",
        "is_discarded",
        "kind",
        "live_before",
        "liveness",
        "log_id",
        "pins",
        "quota",
        "sealed",
        "summed",
        "unbegun_block_count",
        "unnamed",
        "users",
        "volume_id",
    )

    def __init__(self, row: LogRow, liveness: Liveness, quota: Quota | None = None) -> None:
        self.liveness = liveness
        self.quota = quota
        self.log_id = row.log_id
        self.volume_id = row.volume_id
        self.epoch = row.epoch
        self.device_id = row.device_id
        self.block_count = row.block_count
        self.live_before = row.live_before
        self.sealed = row.sealed
        self.summed = row.summed
        self.created_ns = row.created_ns
        self.kind = row.kind
        self.file: DeviceFile | None = None
        self.users = 0
        self.pins = 0
        self.unbegun_block_count = 0
        self.dirty = False
        self.unnamed = False
        self.held = 0
        self.is_discarded = False

    @property
    def is_idle(self) -> bool:
        """Whether nobody needs it in memory, nor its file to be open."""
        return not (self.held or self.users or self.pins or self.dirty)

    def add_blocks(self, count: int) -> None:
        """Count blocks that came to be named, or are named no more when negative."""
        block_count = self.block_count + count
        if self.quota is not None:
            self.quota.add(count)
        self.block_count = block_count

    def close_if_discarded(self) -> None:
        """Close the file of a log that is gone, once nobody reads from it any more."""
        if self.is_discarded and not self.users and self.file is not None:
            self.file.close()
            self.file = None

    def row(self) -> LogRow:
        """The log as its store keeps it."""
        return LogRow(
            self.log_id,
            self.volume_id,
            self.epoch,
            self.device_id,
            self.block_count,
            self.live_before,
            self.sealed,
            self.created_ns,
            self.kind,
            self.summed,
        )


class ChangeLogs:
    """The change logs of one processor that are known in memory, and their open files.

    ``known`` is looked up on the hot path. Files and logs that nobody uses are let go of, the
    longest unused first.
    """

    def __init__(
        self,
        processor_index: int,
        devices: Mapping[int, Device],
        placement: Placement,
        next_log_id: int,
        sums: SumCache,
        watch: DeviceWatch,
        processor_count: int,
    ) -> None:
        self.known: dict[int, ChangeLog] = {}
        self.next_log_id = next_log_id
        self.sums = sums
        self._processor_index = processor_index
        self._devices = devices
        self._placement = placement
        self._watch = watch
        self._open: OrderedDict[int, ChangeLog] = OrderedDict()
        self._open_max = files_share(processor_count)

    @property
    def known_room(self) -> int:
        """How many more logs may be known before others are forgotten."""
        return max(0, KNOWN_LOGS_MAX - len(self.known))

    @property
    def files_room(self) -> int:
        """How many more files may be open before others are closed."""
        return max(0, min(OPEN_FILES_MAX, self._open_max) - len(self._open))

    @property
    def has_room(self) -> bool:
        """Whether more may be known, open and held against checksums, and not just a few, before others have to go."""
        open_max = min(OPEN_FILES_MAX, self._open_max)
        return self.files_room * 4 >= open_max and self.known_room * 4 >= KNOWN_LOGS_MAX and self.sums.has_room

    def adopt(self, row: LogRow) -> ChangeLog:
        """The log of a stored row, the one in memory if it is known already."""
        log = self.known.get(row.log_id)
        if log is None:
            self._forget_idle()
            log = self.known[row.log_id] = self.made_of(row)
        return log

    def made_of(self, row: LogRow) -> ChangeLog:
        """The log of a stored row, which is not kept."""
        return ChangeLog(row, self._liveness(row), self._quota(row))

    def liveness_for(self, volume_id: VolumeId, *, is_change: bool) -> Liveness:
        """Of the device on which a volume's next log would be made."""
        return self._watch.of(self._placement.device_for(volume_id, self._processor_index, is_change=is_change))

    def _liveness(self, row: LogRow) -> Liveness:
        # What an image lies on is not known, and not asked.
        return self._watch.of(None if row.kind == IMAGE_LOG else row.device_id)

    def _quota(self, row: LogRow) -> Quota | None:
        return self._placement.quota_of(row.device_id) if row.kind == CHANGE_LOG else None

    def begin(self, volume_id: VolumeId, epoch: Epoch, live_before: int, *, is_change: bool) -> ChangeLog:
        """A new log with an empty file; ``is_change``: since a snapshot that is there.

        Raises OSError when the device gives no file, NoSpaceError when its change log volume is full,
        NotResidentError while the device has to answer first.
        """
        log_id = self.take_id()
        device_id = self._placement.device_for(volume_id, self._processor_index, is_change=is_change)
        row = LogRow(log_id, volume_id, epoch, device_id, 0, live_before, 0, time.time_ns())
        quota = self._quota(row)
        if quota is not None:
            quota.check(1)
        log = ChangeLog(row, self._liveness(row), quota)
        log.liveness.check_now()
        self._forget_idle()
        log.file = self._devices[device_id].create(self._name(log_id))
        log.unnamed = True
        self.known[log_id] = log
        self._note_open(log)
        return log

    def take_id(self) -> LogId:
        """The id of a log that is about to be made, given once. In the event loop, as all logs are that take writes.

        Raises IdsUsedUpError.
        """
        if self.next_log_id > LOG_ID_MAX:
            raise IdsUsedUpError("this pool has begun all the change logs it can", "Send its snapshots to a new pool")
        self.next_log_id += 1
        return LogId(self.next_log_id - 1)

    def begin_source(self, log_id: LogId, volume_id: VolumeId, epoch: Epoch, kind: int) -> LogRow:
        """The log that stands for what a volume is written over: an image, or a new file. Blocks."""
        device_id = self._placement.device_for(volume_id, self._processor_index, is_change=False)
        if kind == SOURCE_LOG:
            self._devices[device_id].create(self._name(log_id)).close()
            self._devices[device_id].sync_names(log_folder(self._processor_index))
        return LogRow(log_id, volume_id, epoch, device_id, 0, 0, 1, time.time_ns(), kind)

    def empty_row(self, volume_id: VolumeId, epoch: Epoch, live_before: int) -> LogRow:
        """A sealed log without a file, for the record."""
        log_id = self.take_id()
        device_id = self._placement.device_for(volume_id, self._processor_index, is_change=False)
        return LogRow(log_id, volume_id, epoch, device_id, 0, live_before, 1, time.time_ns())

    def open_file(self, log: ChangeLog) -> DeviceFile:
        """The log's file. Raises DamagedError when it is missing, OSError when it cannot be opened."""
        if log.file is None and log.kind == IMAGE_LOG:
            log.file = self._placement.open_image(log.volume_id, self._processor_index)
            self._note_open(log)
        elif log.file is None:
            try:
                log.file = self._device_of(log).open(self._name(log.log_id))
                self._prove(log)
            except FileNotFoundError:
                raise DamagedError(
                    f"change log {self._name(log.log_id)} of device {log.device_id} is missing",
                    "Unmount and run snapfs check",
                ) from None
            self._note_open(log)
        assert log.file is not None
        return log.file

    def open_apart(self, logs: Sequence[ChangeLog]) -> list[tuple[ChangeLog, DeviceFile]]:
        """Files of logs, for :meth:`admit_file`, without those that cannot be opened. Blocks; runs in a thread."""
        opened: list[tuple[ChangeLog, DeviceFile]] = []
        for log in logs:
            with contextlib.suppress(OSError, DamagedError):
                opened.append((log, self._device_of(log).open(self._name(log.log_id))))
        return opened

    def admit_file(self, log: ChangeLog, file: DeviceFile) -> None:
        """Keep a file that was opened apart, if the log still has none and others need not be closed for it."""
        if log.file is not None or not self.files_room or self.known.get(log.log_id) is not log:
            file.close()
            return
        log.file = file
        self._prove(log)
        self._note_open(log)

    def _device_of(self, log: ChangeLog) -> Device:
        try:
            return self._devices[log.device_id]
        except KeyError:
            raise DamagedError(
                f"change log {log.log_id} lies on device {log.device_id}, which the pool does not have",
                "Unmount and run snapfs check",
            ) from None

    def note_summed(self, log: ChangeLog) -> None:
        """All blocks of a log have their checksums, durably: from now on its reads are held against them."""
        log.summed = 1
        self._prove(log)

    def _prove(self, log: ChangeLog) -> None:
        if log.summed and log.file is not None and not isinstance(log.file, SealedFile):
            log.file = SealedFile(log.file, log.log_id, self.sums)

    def open_alone(self, log_id: int, device_id: int) -> DeviceFile:
        """A log's file opened once more, for whoever reads all of it; unproven. Raises FileNotFoundError. Blocks."""
        file = self._opened_alone(log_id, device_id)
        if file is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._name(log_id))
        return file

    def _name(self, log_id: int) -> str:
        return log_file(self._processor_index, log_id)

    def _note_open(self, log: ChangeLog) -> None:
        self._open[log.log_id] = log
        open_max = min(OPEN_FILES_MAX, self._open_max)
        if len(self._open) <= open_max:
            return
        # A few at a time: requests wait meanwhile.
        for log_id, other in list(islice(self._open.items(), -(-open_max // 16))):
            if other is not log and other.is_idle:
                self._close(other)
                del self._open[log_id]
            else:
                self._open.move_to_end(log_id)

    def _close(self, log: ChangeLog) -> None:
        if log.file is not None:
            file, log.file = log.file, None
            file.close()

    def _forget_idle(self) -> None:
        if len(self.known) < KNOWN_LOGS_MAX:
            return
        for log_id, log in list(self.known.items())[: KNOWN_LOGS_MAX // 4]:
            if log.is_idle:
                self._close(log)
                self._open.pop(log_id, None)
                del self.known[log_id]

    def sync(self, logs: list[ChangeLog]) -> None:
        """Make what was written to these logs durable, and their names.

        Blocks; runs in a thread, so the caller counts as a user of each meanwhile: its file stays open.
        """
        folders = set()
        for log in logs:
            assert log.file is not None, "a dirty log's file is open"
            log.file.sync()
            if log.unnamed:
                folders.add(log.device_id)
        for device_id in folders:
            self._devices[device_id].sync_names(log_folder(self._processor_index))
        for log in logs:
            log.unnamed = False

    def punch(self, log_id: int, device_id: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Give ranges ``(offset, length)`` of a log's file back to its device, durably. Blocks; runs in a thread."""
        # A file of its own: the log's may be closed meanwhile, and its descriptor be another's.
        file = self._opened_alone(log_id, device_id)
        if file is None:
            return
        try:
            for offset, length in ranges:
                file.punch(offset, length)
            # Whoever asked forgets the ranges now: a power cut must not bring them back.
            file.sync()
        finally:
            file.close()

    def data_extents(self, log_id: int, device_id: int) -> list[tuple[int, int]]:
        """Ranges of a log's file that hold data; none when there is no file. Blocks."""
        file = self._opened_alone(log_id, device_id)
        if file is None:
            return []
        try:
            return file.data_extents()
        finally:
            file.close()

    def _opened_alone(self, log_id: int, device_id: int) -> DeviceFile | None:
        """A log's file opened once more; None when there is none, nor its device if that was a change log volume's.

        One of those is removed when nothing is in use there; a log in which nothing is may be on record still.
        """
        device = self._devices.get(device_id)
        if device is None:
            return None
        try:
            return device.open(self._name(log_id))
        except FileNotFoundError:
            return None

    def discard(self, log: ChangeLog) -> None:
        """Forget a log that nothing names; its file goes by :meth:`remove_file`."""
        self.known.pop(log.log_id, None)
        self._open.pop(log.log_id, None)
        self.sums.forget_log(log.log_id)
        log.is_discarded = True
        log.close_if_discarded()

    def release_quota(self, rows: Iterable[LogRow]) -> None:
        """These logs go, with all that is in them."""
        for row in rows:
            log = self.known.get(row.log_id)
            quota = self._quota(row)
            if quota is not None:
                quota.add(-(row.block_count if log is None else log.block_count))

    def remove_file(self, log_id: int, device_id: int) -> None:
        """Remove a log's file, which may be gone already, and its device too. Blocks; runs in a thread."""
        device = self._devices.get(device_id)
        if device is not None:
            with contextlib.suppress(FileNotFoundError):
                device.remove(self._name(log_id))

    def stray_files(self, known: set[int]) -> list[tuple[int, str]]:
        """Files of logs that are not known: ``(device id, name)``. Blocks; runs in a thread."""
        found = []
        for device_id, device in self._devices.items():
            folder = log_folder(self._processor_index)
            for name in device.names(folder):
                try:
                    log_id = log_id_of(name)
                except ValueError:
                    continue
                if log_id not in known:
                    found.append((device_id, f"{folder}/{name}"))
        return found

    def remove_stray(self, device_id: int, name: str) -> None:
        """Remove a file found by :meth:`stray_files`."""
        self._devices[device_id].remove(name)

    def close(self) -> None:
        """Close every file. What fails is raised, when the others are closed."""
        with contextlib.ExitStack() as stack:
            for log in self.known.values():
                stack.callback(self._close, log)
            self.known.clear()
            self._open.clear()


def files_share(processor_count: int) -> int:
    """How many files each of so many processors may have open, of those that the process may have (getrlimit(2))."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return OPEN_FILES_MAX
    return max(_OPEN_FILES_MIN, (soft - _OTHER_FILES) // processor_count)


@contextlib.contextmanager
def in_use(logs: Sequence[ChangeLog]) -> Iterator[None]:
    """The files of these logs stay open inside."""
    for log in logs:
        log.users += 1
    try:
        yield
    finally:
        for log in logs:
            log.users -= 1
            log.close_if_discarded()
