"""A device in memory that can lose power.

It keeps, beside what a reader sees, what a power cut would leave: for every page the versions
written since the last sync, and for every name the changes since the folder was synced.
:meth:`MemoryDevice.crash` gives the device as it may be found afterwards.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from .base import Buffer, Device, DeviceFile, LockHolder, Space

PAGE_SIZE = 4096
SECTOR_SIZE = 512
_ZEROS = bytes(PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class CrashPlan:
    """What a power cut does to what was not synced.

    ``keep`` is the chance that an unsynced page or name change reached the medium, ``torn``
    the chance that a page which did was written only in part, sector by sector. Of a page that was written
    several times any version may be there, or with ``newest`` the last.
    """

    seed: int
    keep: float = 0.5
    torn: float = 0.2
    newest: bool = False


@dataclass(slots=True)
class _Node:
    pages: dict[int, bytes] = field(default_factory=dict)
    size: int = 0
    durable_pages: dict[int, bytes] = field(default_factory=dict)
    durable_size: int = 0
    # page number -> every content it had since the last sync; None is a punched or cut page
    unsynced: dict[int, list[bytes | None]] = field(default_factory=dict)

    def note(self, page: int, content: bytes | None) -> None:
        versions = self.unsynced.get(page)
        if versions is None:
            self.unsynced[page] = [content]
        else:
            versions.append(content)

    def note_zeros(self, pages: list[int]) -> None:
        """Pages that were not there are, of zeros."""
        self.pages.update(dict.fromkeys(pages, _ZEROS))
        for page in pages:
            self.unsynced.setdefault(page, []).append(_ZEROS)

    def sync(self) -> None:
        # What another thread writes from here on is for the next sync.
        unsynced, self.unsynced = self.unsynced, {}
        for page in list(unsynced):
            content = self.pages.get(page)
            if content is None:
                self.durable_pages.pop(page, None)
            else:
                self.durable_pages[page] = content
        self.durable_size = self.size


class MemoryFile(DeviceFile):
    """An open file of a :class:`MemoryDevice`."""

    def __init__(self, device: MemoryDevice, node: _Node) -> None:
        self._device = device
        self._open_node: _Node | None = node

    @property
    def _node(self) -> _Node:
        if self._open_node is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._open_node

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """See :meth:`DeviceFile.read_into`."""
        node = self._node
        count = max(0, min(len(buffer), node.size - offset))
        if count:
            first, inside = divmod(offset, PAGE_SIZE)
            last = (offset + count - 1) // PAGE_SIZE
            if first == last:
                found = node.pages.get(first, _ZEROS)
            else:
                get = node.pages.get
                found = b"".join([get(page, _ZEROS) for page in range(first, last + 1)])
            memoryview(buffer)[:count] = memoryview(found)[inside : inside + count]
        return count

    def write(self, data: Buffer, offset: int) -> None:
        """See :meth:`DeviceFile.write`; ENOSPC at the device's capacity, after a part was written."""
        node = self._node
        view = memoryview(data)
        page, inside = divmod(offset, PAGE_SIZE)
        done = 0
        try:
            while done < len(view):
                old = node.pages.get(page)
                if old is None:
                    self._device.take_page()
                    old = _ZEROS
                new = bytes(view[done : done + PAGE_SIZE - inside])
                step = len(new)
                if step < PAGE_SIZE:
                    new = old[:inside] + new + old[inside + step :]
                node.pages[page] = new
                node.note(page, new)
                done += step
                page, inside = page + 1, 0
        finally:
            if done:
                node.size = max(node.size, offset + done)

    def sync(self) -> None:
        """See :meth:`DeviceFile.sync`."""
        self._node.sync()

    def punch(self, offset: int, length: int) -> None:
        """See :meth:`DeviceFile.punch`."""
        self._clear(offset, min(offset + length, self._node.size))

    def _clear(self, start: int, end: int) -> None:
        node = self._node
        touched = range(start // PAGE_SIZE, -(-end // PAGE_SIZE)) if end > start else range(0)
        for page in sorted(node.pages.keys() & touched if len(touched) < len(node.pages) else node.pages):
            if page not in touched:
                continue
            low, high = page * PAGE_SIZE, (page + 1) * PAGE_SIZE
            if start <= low and (high <= end or end >= node.size):
                del node.pages[page]
                self._device.give_page()
                node.note(page, None)
            else:
                first, last = max(start, low) - low, min(end, high) - low
                old = node.pages[page]
                new = old[:first] + bytes(last - first) + old[last:]
                node.pages[page] = new
                node.note(page, new)

    def truncate(self, size_bytes: int) -> None:
        """See :meth:`DeviceFile.truncate`."""
        if size_bytes < self._node.size:
            self._clear(size_bytes, self._node.size)
        self._node.size = size_bytes

    def size(self) -> int:
        """See :meth:`DeviceFile.size`."""
        return self._node.size

    def allocated(self) -> int:
        """See :meth:`DeviceFile.allocated`."""
        return len(self._node.pages) * PAGE_SIZE

    def reserve(self, length: int) -> None:
        """See :meth:`DeviceFile.reserve`."""
        node = self._node
        missing = [page for page in range(length // PAGE_SIZE) if page not in node.pages]
        taken = self._device.take_pages(len(missing))
        node.note_zeros(missing[:taken])
        if taken < len(missing):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        node.size = max(node.size, length)

    def data_extents(self) -> list[tuple[int, int]]:
        """See :meth:`DeviceFile.data_extents`."""
        extents: list[tuple[int, int]] = []
        start = end = -1
        for page in sorted(self._node.pages):
            if page != end:
                if end > start:
                    extents.append((start * PAGE_SIZE, end * PAGE_SIZE))
                start = page
            end = page + 1
        if end > start:
            extents.append((start * PAGE_SIZE, min(end * PAGE_SIZE, max(self._node.size, start * PAGE_SIZE + 1))))
        return extents

    def copy_on(self, device: MemoryDevice) -> MemoryFile:
        """A file of the same contents, without a name on that device, of which all is durable."""
        node = self._node
        return MemoryFile(device, _Node(dict(node.pages), node.size, dict(node.pages), node.size))

    def close(self) -> None:
        """See :meth:`DeviceFile.close`. What is closed is not read or written any more, as with a descriptor."""
        self._open_node = None


class MemoryDevice(Device):
    """Named sparse files in memory. ``capacity_bytes`` bounds the pages, None for no bound."""

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self._used_pages = 0
        self._files: dict[str, _Node] = {}
        self._durable_names: dict[str, _Node] = {}
        self._holder: str | None = None

    def take_page(self) -> None:
        """Count a page as used, or raise ENOSPC."""
        if not self.take_pages(1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def take_pages(self, count: int) -> int:
        """Count as many pages as used as there is room for; how many."""
        if self.capacity_bytes is not None:
            count = max(0, min(count, self.capacity_bytes // PAGE_SIZE - self._used_pages))
        self._used_pages += count
        return count

    def give_page(self) -> None:
        """Count a page as free again."""
        self._used_pages -= 1

    def open(self, name: str) -> MemoryFile:
        """See :meth:`Device.open`."""
        return MemoryFile(self, self._node(name))

    def _node(self, name: str) -> _Node:
        try:
            return self._files[name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None

    def create(self, name: str) -> MemoryFile:
        """See :meth:`Device.create`."""
        node = self._files.setdefault(name, _Node())
        file = MemoryFile(self, node)
        file.truncate(0)
        return file

    def remove(self, name: str) -> None:
        """See :meth:`Device.remove`."""
        self._used_pages -= len(self._node(name).pages)
        del self._files[name]

    def rename(self, old: str, new: str) -> None:
        """See :meth:`Device.rename`."""
        node = self._node(old)
        if new in self._files and self._files[new] is not node:
            self.remove(new)
        del self._files[old]
        self._files[new] = node

    def names(self, folder: str) -> list[str]:
        """See :meth:`Device.names`."""
        return [name.rpartition("/")[2] for name in self._files if name.rpartition("/")[0] == folder]

    def sync_names(self, folder: str) -> None:
        """See :meth:`Device.sync_names`."""
        for name in set(self._files) | set(self._durable_names):
            if name.rpartition("/")[0] == folder:
                self._settle(self._durable_names, name)

    def _settle(self, names: dict[str, _Node], name: str) -> None:
        if name in self._files:
            names[name] = self._files[name]
        else:
            names.pop(name, None)

    def space(self) -> Space:
        """See :meth:`Device.space`."""
        total = self.capacity_bytes if self.capacity_bytes is not None else 1 << 40
        return Space(total, total - self._used_pages * PAGE_SIZE, 1 << 20, (1 << 20) - len(self._files))

    def lock(self, name: str, holder: str) -> None:
        """See :meth:`Device.lock`."""
        if self._holder is not None:
            raise LockHolder(self._holder)
        self._holder = holder

    def claim(self) -> None:
        """See :meth:`Device.claim`."""
        self.lock("", "")

    def local_path(self, name: str) -> None:
        """See :meth:`Device.local_path`; there is none."""
        return

    def close(self) -> None:
        """See :meth:`Device.close`."""
        self._holder = None

    def nameless(self) -> MemoryFile:
        """A new file that no name leads to yet."""
        return MemoryFile(self, _Node())

    def settle(self, names: Mapping[str, MemoryFile], capacity_bytes: int | None) -> None:
        """Have these files by these names and no others, all of it durable, and at least that much room."""
        self._files = {name: file._node for name, file in names.items()}
        self._durable_names = dict(self._files)
        nodes = {id(node): node for node in self._files.values()}
        for node in nodes.values():
            node.sync()
        self._used_pages = sum(len(node.pages) for node in nodes.values())
        if capacity_bytes is not None:
            self.capacity_bytes = max(capacity_bytes, self._used_pages * PAGE_SIZE)

    def crash(self, plan: CrashPlan) -> MemoryDevice:
        """The device as it may be after a power cut now; this one stays as it is."""
        rng = random.Random(plan.seed)
        names = dict(self._durable_names)
        for name in sorted(set(self._files) | set(names)):
            if self._files.get(name) is not names.get(name) and rng.random() < plan.keep:
                self._settle(names, name)
        after = MemoryDevice(self.capacity_bytes)
        survivors: dict[int, _Node] = {}
        for name, node in sorted(names.items()):
            if id(node) not in survivors:
                survivors[id(node)] = _survivor(node, plan, rng)
            after._files[name] = after._durable_names[name] = survivors[id(node)]
        after._used_pages = sum(len(node.pages) for node in survivors.values())
        return after


def _survivor(node: _Node, plan: CrashPlan, rng: random.Random) -> _Node:
    """What a power cut leaves of one file."""
    pages = dict(node.durable_pages)
    for page, versions in sorted(node.unsynced.items()):
        if rng.random() >= plan.keep:
            continue
        content = versions[-1] if plan.newest else rng.choice(versions)
        if content is not None and rng.random() < plan.torn:
            content = _tear(pages.get(page, _ZEROS), content, rng)
        if content is None:
            pages.pop(page, None)
        else:
            pages[page] = content
    size = node.size if rng.random() < plan.keep else node.durable_size
    pages = {page: content for page, content in pages.items() if page * PAGE_SIZE < size}
    last, inside = divmod(size, PAGE_SIZE)
    if inside and last in pages:
        pages[last] = pages[last][:inside] + bytes(PAGE_SIZE - inside)
    return _Node(pages=pages, size=size, durable_pages=dict(pages), durable_size=size)


def _tear(old: bytes, new: bytes, rng: random.Random) -> bytes:
    """A page of which each sector is either old or new."""
    sectors = []
    for start in range(0, PAGE_SIZE, SECTOR_SIZE):
        source = new if rng.random() < 0.5 else old
        sectors.append(source[start : start + SECTOR_SIZE])
    return b"".join(sectors)
