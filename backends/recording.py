"""A device that writes down what reaches it, and the devices a power cut could leave at any moment of that.

What is recorded is every call that changes something, in order, over all devices that share a :class:`Journal`.
:func:`power_cuts` then enumerates cuts, and :class:`CrashImages` has what they leave: a call that a later sync made
durable is always there, of all others any may be missing. Pillai et al., "All File Systems Are Not Created Equal"
(OSDI 2014), and Mohan et al., "Finding Crash-Consistency Bugs with Bounded Black-Box Crash Testing" (OSDI 2018),
look for bugs in this way.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .base import Buffer, DeviceFile
from .memory import PAGE_SIZE, MemoryDevice, MemoryFile
from .stacked import StackedDevice, StackedFile

CREATE, REMOVE, RENAME, SYNC_NAMES = "create", "remove", "rename", "sync_names"
WRITE, PUNCH, TRUNCATE, RESERVE, SYNC = "write", "punch", "truncate", "reserve", "sync"
_SUBSET_OPERATIONS = 3
_REORDERINGS = 3
_TEAR_UNITS = (512, 4096)


class Operation(NamedTuple):
    """One call. ``file`` numbers the file; ``name`` is its name, or the folder of a sync of names."""

    device: str
    kind: str
    file: int
    name: str = ""
    new_name: str = ""
    offset: int = 0
    length: int = 0
    data: bytes = b""


@dataclass(slots=True)
class Journal:
    """What happened on all devices, in order. ``durable_at`` has, for each call, the place of the sync that kept it."""

    operations: list[Operation] = field(default_factory=list)
    durable_at: list[int | None] = field(default_factory=list)
    capacities: dict[str, int | None] = field(default_factory=dict)
    _pending: dict[tuple[str, object], list[int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, operation: Operation) -> None:
        """Write down a call that was done. Devices are used by several threads."""
        with self._lock:
            self._note(operation)

    def is_durable(self, place: int, before: int) -> bool:
        """Whether a call at a place was made durable before another."""
        durable_at = self.durable_at[place]
        return durable_at is not None and durable_at < before

    def changes(self, before: int) -> Iterator[int]:
        """The places of all calls before one that change something: a sync only makes such durable."""
        return (one for one in range(before) if self.operations[one].kind not in (SYNC, SYNC_NAMES))

    def _note(self, operation: Operation) -> None:
        place = len(self.operations)
        self.operations.append(operation)
        self.durable_at.append(place if operation.kind in (SYNC, SYNC_NAMES) else None)
        if operation.kind in (SYNC, SYNC_NAMES):
            key = operation.file if operation.kind == SYNC else operation.name
            for earlier in self._pending.pop((operation.device, key), []):
                self.durable_at[earlier] = place
        else:
            is_of_names = operation.kind in (CREATE, REMOVE, RENAME)
            key = operation.name.rpartition("/")[0] if is_of_names else operation.file
            self._pending.setdefault((operation.device, key), []).append(place)


class RecordingDevice(StackedDevice):
    """A device in memory whose changes go into a journal. ``where`` names it there."""

    def __init__(self, journal: Journal, where: str, capacity_bytes: int | None = None) -> None:
        self.inner = MemoryDevice(capacity_bytes)
        self.journal = journal
        self.where = where
        self._numbers = itertools.count()
        self._files: dict[str, int] = {}
        journal.capacities[where] = capacity_bytes

    def open(self, name: str) -> DeviceFile:
        """See :meth:`Device.open`."""
        return _RecordingFile(self, self._files.get(name, -1), self.inner.open(name))

    def create(self, name: str) -> DeviceFile:
        """See :meth:`Device.create`."""
        inner = self.inner.create(name)
        if name in self._files:
            self.journal.note(Operation(self.where, TRUNCATE, self._files[name]))
        else:
            self._files[name] = next(self._numbers)
            self.journal.note(Operation(self.where, CREATE, self._files[name], name))
        return _RecordingFile(self, self._files[name], inner)

    def remove(self, name: str) -> None:
        """See :meth:`Device.remove`."""
        self.inner.remove(name)
        self.journal.note(Operation(self.where, REMOVE, self._files.pop(name), name))

    def rename(self, old: str, new: str) -> None:
        """See :meth:`Device.rename`."""
        self.inner.rename(old, new)
        self._files[new] = self._files.pop(old)
        self.journal.note(Operation(self.where, RENAME, self._files[new], old, new))

    def sync_names(self, folder: str) -> None:
        """See :meth:`Device.sync_names`."""
        # Noted first: what comes from another thread meanwhile is not made durable by it.
        self.journal.note(Operation(self.where, SYNC_NAMES, -1, folder))
        self.inner.sync_names(folder)


class _RecordingFile(StackedFile):
    """A file of a :class:`RecordingDevice`."""

    def __init__(self, device: RecordingDevice, number: int, inner: DeviceFile) -> None:
        self._device = device
        self._number = number
        self.inner = inner

    def _note(self, kind: str, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        self._device.journal.note(
            Operation(self._device.where, kind, self._number, offset=offset, length=length, data=data)
        )

    def write(self, data: Buffer, offset: int) -> None:
        try:
            self.inner.write(data, offset)
        finally:
            # What goes to a medium are whole pages of a cache, with what was written to them before; after an
            # error they may have a part of it.
            start, end = offset // PAGE_SIZE * PAGE_SIZE, -(-(offset + len(data)) // PAGE_SIZE) * PAGE_SIZE
            pages = bytearray(end - start)
            count = self.inner.read_into(pages, start)
            self._note(WRITE, start, data=bytes(pages[:count]))

    def sync(self) -> None:
        # Noted first, as above.
        self._note(SYNC)
        self.inner.sync()

    def punch(self, offset: int, length: int) -> None:
        self.inner.punch(offset, length)
        self._note(PUNCH, offset, length)

    def truncate(self, size_bytes: int) -> None:
        self.inner.truncate(size_bytes)
        self._note(TRUNCATE, length=size_bytes)

    def reserve(self, length: int) -> None:
        self.inner.reserve(length)
        self._note(RESERVE, length=length)


@dataclass(frozen=True, slots=True)
class PowerCut:
    """A cut before the call at ``place``.

    ``kept`` are the calls that nothing had made durable and that are there nevertheless; ``torn`` is one of them of
    which only some units of ``tear_unit`` bytes are, chosen by ``seed``.
    """

    place: int
    kept: frozenset[int]
    torn: int | None = None
    tear_unit: int = 0
    seed: int = 0


class _Replay:
    """The files and names that calls of a journal lead to."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.devices = {where: MemoryDevice() for where in journal.capacities}
        self._files: dict[tuple[str, int], MemoryFile] = {}
        self._names: dict[str, dict[str, MemoryFile]] = {where: {} for where in self.devices}

    def copy(self) -> _Replay:
        """Another one that has come as far."""
        other = _Replay(self._journal)
        other._files = {key: file.copy_on(other.devices[key[0]]) for key, file in self._files.items()}
        keys = {id(file): key for key, file in self._files.items()}
        other._names = {
            where: {name: other._files[keys[id(file)]] for name, file in names.items()}
            for where, names in self._names.items()
        }
        return other

    def settled(self) -> dict[str, MemoryDevice]:
        """The devices, with all of it durable. It is not gone on with then."""
        for where, device in self.devices.items():
            device.settle(self._names[where], self._journal.capacities[where])
        return self.devices

    def redo(self, place: int, cut: PowerCut | None = None) -> None:
        """Do a call again; of one that the cut tears, a part."""
        operation = self._journal.operations[place]
        key = operation.device, operation.file
        if key not in self._files:
            self._files[key] = self.devices[operation.device].nameless()
        file, names = self._files[key], self._names[operation.device]
        match operation.kind:
            case "create":
                names[operation.name] = file
            case "remove":
                # What was there instead, when an earlier change of the name was lost, stays.
                if names.get(operation.name) is file:
                    del names[operation.name]
            case "rename":
                # One of a folder's entries: the old one goes and the new one comes together.
                if names.get(operation.name) is file:
                    del names[operation.name]
                names[operation.new_name] = file
            case "write":
                is_torn = cut is not None and place == cut.torn
                for offset, data in _torn(operation, cut) if cut and is_torn else [(operation.offset, operation.data)]:
                    file.write(data, offset)
            case "punch":
                file.punch(operation.offset, operation.length)
            case "truncate":
                file.truncate(operation.length)
            case "reserve":
                file.reserve(operation.length)


def _torn(operation: Operation, cut: PowerCut) -> Iterator[tuple[int, bytes]]:
    rng = random.Random(cut.seed)
    start = 0
    while start < len(operation.data):
        # Up to where the medium's next unit begins.
        end = start + cut.tear_unit - (operation.offset + start) % cut.tear_unit
        if rng.random() < 0.5:
            yield operation.offset + start, operation.data[start:end]
        start = end


def power_cuts(journal: Journal, place: int, seed: int) -> list[PowerCut]:
    """The cuts to be tried before the call at ``place``; those that leave the same are told once.

    Everything unsynced lost; everything there; each subset of the last three such calls, with those before all lost
    and all there; the last write torn at 512 bytes and at 4 KiB; some subsets at random, as of a device that reorders.
    """
    unsynced = [one for one in journal.changes(place) if not journal.is_durable(one, place)]
    before, last = unsynced[:-_SUBSET_OPERATIONS], unsynced[-_SUBSET_OPERATIONS:]
    cuts: dict[PowerCut, None] = {}
    for count in range(len(last) + 1):
        for chosen in itertools.combinations(last, count):
            cuts[PowerCut(place, frozenset(chosen))] = None
            cuts[PowerCut(place, frozenset([*before, *chosen]))] = None
    rng = random.Random(f"{seed} {place}")
    writes = [one for one in unsynced if journal.operations[one].kind == WRITE]
    if writes:
        for unit in _TEAR_UNITS:
            if len(journal.operations[writes[-1]].data) > unit:
                cuts[PowerCut(place, frozenset(unsynced), writes[-1], unit, rng.getrandbits(32))] = None
    if before:
        for _ in range(_REORDERINGS):
            cuts[PowerCut(place, frozenset(one for one in unsynced if rng.random() < 0.5))] = None
    return list(cuts)


def distinct_cuts(journal: Journal, place: int, seed: int) -> dict[object, PowerCut]:
    """Those of :func:`power_cuts`, by what is there after them: the same for cuts at any place that leave the same."""
    durable = frozenset(one for one in journal.changes(place) if journal.is_durable(one, place))
    return {
        (hash(durable | cut.kept), cut.torn, cut.tear_unit, cut.seed): cut for cut in power_cuts(journal, place, seed)
    }


class CrashImages:
    """The devices that cuts leave, whose places never go back. What is durable before them is worked out once."""

    def __init__(self, journal: Journal, start: int = 0) -> None:
        self._journal = journal
        self._base = _Replay(journal)
        # Calls that are not in the base: some cut may not leave them, or such a one of the same file came before.
        self._waiting: list[int] = []
        self._seen = 0
        self._settle_base(start)

    def _settle_base(self, before: int) -> None:
        """Do what every later cut leaves; the calls of one file, and those of a device's names, in their order."""
        held_up: set[tuple[str, int | None]] = set()
        waiting = []
        for place in (*self._waiting, *range(self._seen, before)):
            operation = self._journal.operations[place]
            if operation.kind in (SYNC, SYNC_NAMES):
                continue
            is_of_names = operation.kind in (CREATE, REMOVE, RENAME)
            key = operation.device, None if is_of_names else operation.file
            if key not in held_up and self._journal.is_durable(place, before):
                self._base.redo(place)
            else:
                held_up.add(key)
                waiting.append(place)
        self._waiting, self._seen = waiting, max(self._seen, before)

    def after(self, cut: PowerCut) -> dict[str, MemoryDevice]:
        """What a cut leaves, by what the devices are called in the journal."""
        self._settle_base(cut.place)
        replay = self._base.copy()
        for place in self._waiting:
            if place in cut.kept or self._journal.is_durable(place, cut.place):
                replay.redo(place, cut)
        return replay.settled()
