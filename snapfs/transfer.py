"""Sending a snapshot as a stream, through a mount."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import mmap
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, Protocol

from .errors import BadCommandError, BadNameError, DamagedError, NotFoundError
from .geometry import BLOCK_SIZE, snapshot_id_of
from .stream import (
    BEGIN,
    DATA_BYTES_MAX,
    END,
    END_VOLUME,
    VERSION,
    VOLUME,
    StreamWriter,
)
from .units import MANIFEST_NAME, show_name

# So many files of a snapshot are opened before the first is sent.
_OPEN_AHEAD_COUNT = 256
Answer = dict[str, Any]
OnProgress = Callable[[int, int], None]


class Ask(Protocol):
    """A command to the control file of a mount."""

    def __call__(self, mount_point: str, *words: str, options: list[tuple[str, str]] | None = None) -> Answer:
        """Its answer."""
        ...


def say_nothing(done_bytes: int, total_bytes: int) -> None:
    """Nobody looks."""


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """How far a stream had come: the guid of its snapshot, a volume by place, and an offset in it."""

    guid: str
    volume_place: int
    offset: int

    def to_token(self) -> str:
        """As a word for the command line."""
        return base64.urlsafe_b64encode(json.dumps([self.guid, self.volume_place, self.offset]).encode()).decode()

    @classmethod
    def from_token(cls, token: str) -> ResumePoint:
        """Read it. Raises BadCommandError."""
        try:
            guid, place, offset = json.loads(base64.urlsafe_b64decode(token.encode()))
            point = cls(str(guid), int(place), int(offset))
            if point.volume_place < 0 or point.offset < 0:
                raise ValueError("a negative place")
            return point
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            raise BadCommandError(f"{token[:32]!r} is no resume token", "Take it from snapfs receive") from error


def send(
    ask: Ask,
    mount_point: str,
    name: str,
    file: IO[bytes],
    base: str | None = None,
    resume: ResumePoint | None = None,
    on_progress: OnProgress = say_nothing,
    level: int = 3,
) -> int:
    """Write a snapshot as a stream, whole or what changed since ``base``; the stream's length.

    Raises NotFoundError, also when the snapshot is deleted too early; BadCommandError for a token of another one;
    BadNameError for a volume that no path leads to.
    """
    plan = ask(mount_point, "extents", name, options=[("base", base)] if base is not None else [])
    if any(os.fsencode(one["name"]) == MANIFEST_NAME for one in plan["volumes"]):
        raise BadNameError(
            f"the snapshot {name!r} holds a volume called {show_name(MANIFEST_NAME)!r}, where its manifest is read",
            "Rename the volume and make another snapshot; snapfs clone gives what this one holds of it",
        )
    guid = plan["snapshot"]["guid"]
    if resume is not None and resume.guid != guid:
        raise BadCommandError("the resume token is of another snapshot", "Send the one it was given for")
    writer = StreamWriter(file, level)
    first, start = (0, 0) if resume is None else (resume.volume_place, resume.offset)
    volumes = plan["volumes"][first:]
    total_bytes = sum(length for one in plan["volumes"] for _, length, _ in one["extents"])
    done_bytes = 0
    writer.fields(BEGIN, _head(plan, resume))
    with contextlib.closing(_opened(mount_point, plan["snapshot"], [one["name"] for one in volumes])) as sources:
        for place, volume, source in zip(itertools.count(first), volumes, sources, strict=False):
            writer.fields(VOLUME, {"place": place})
            extents = list(_from(volume["extents"], start))
            for offset, length, is_data in extents:
                if not is_data:
                    writer.zero(offset, length)
            parts = (source.pieces(offset, length, is_data) for offset, length, is_data in extents)
            for at, data in _read_ahead(itertools.chain.from_iterable(parts)):
                writer.data(at, data)
                done_bytes += len(data)
                on_progress(done_bytes, total_bytes)
            writer.fields(END_VOLUME, {})
            start = 0
    writer.fields(END, {})
    file.flush()
    return writer.stored_bytes


def _head(plan: Answer, resume: ResumePoint | None) -> dict[str, Any]:
    return {
        "version": VERSION,
        "snapshot": plan["snapshot"],
        "base": plan["base"],
        "volumes": [{**one, "extents": None} for one in plan["volumes"]],
        "gone": plan["gone"],
        "resume": None if resume is None else [resume.volume_place, resume.offset],
    }


def _opened(mount_point: str, snapshot: Answer, names: Sequence[str]) -> Generator[SnapshotFile]:
    """Files of a snapshot, one after the other; each is closed when the next one is asked for.

    Many are opened before the first is given: those are read to their end also when the snapshot is deleted
    meanwhile. Raises NotFoundError for others then.
    """
    ahead = deque[SnapshotFile]()
    with snapshot_folder(mount_point, snapshot) as folder:

        def opened(name: str) -> SnapshotFile:
            return SnapshotFile(open_in_snapshot(folder, snapshot, name, os.O_DIRECT))

        try:
            ahead.extend(opened(one) for one in names[:_OPEN_AHEAD_COUNT])
            for one in names:
                with contextlib.closing(ahead.popleft() if ahead else opened(one)) as file:
                    yield file
        finally:
            for file in ahead:
                file.close()


@contextlib.contextmanager
def snapshot_folder(mount_point: str, snapshot: Answer) -> Iterator[int]:
    """A descriptor of the folder of a snapshot that a command told of: what is opened in it is of that one alone.

    A name may pass to another snapshot at any time. Raises NotFoundError when it did so before.
    """
    path = os.path.join(mount_point, ".snapshots", snapshot["name"])
    with _there(snapshot):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _there(snapshot):
            if snapshot_id_of(os.fstat(fd).st_ino) != snapshot["snapshot_id"]:
                raise FileNotFoundError
        yield fd
    finally:
        os.close(fd)


def open_in_snapshot(folder: int, snapshot: Answer, name: str, flags: int = 0) -> int:
    """A descriptor of a file in a :func:`snapshot_folder`. Raises NotFoundError."""
    with _there(snapshot):
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=folder)


@contextlib.contextmanager
def _there(snapshot: Answer) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError(
            f"the snapshot {snapshot['name']!r} was deleted or renamed meanwhile", "See the names with snapfs list"
        ) from None


def _from(extents: list[list[int]], start: int) -> Iterator[tuple[int, int, int]]:
    """The extents from an offset on."""
    for offset, length, is_data in extents:
        skip = min(max(0, start - offset), length)
        if length > skip:
            yield offset + skip, length - skip, is_data


class SnapshotFile:
    """A file of a snapshot, opened with O_DIRECT: past the kernel's page cache it is read twice as fast.

    What it gives is good until it is asked for two more: it reads into three buffers in turn.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffers: list[memoryview] = []

    def pieces(self, offset: int, length: int, is_data: int) -> Iterator[tuple[int, memoryview]]:
        """An extent of data, in pieces of at most DATA_BYTES_MAX. Raises DamagedError at the file's end."""
        # Not before it is read, for many may be open.
        self._buffers = self._buffers or [memoryview(mmap.mmap(-1, DATA_BYTES_MAX)) for _ in range(3)]
        done = 0
        while is_data and done < length:
            wanted = min(DATA_BYTES_MAX, length - done)
            buffer = self._buffers[0]
            self._buffers.append(self._buffers.pop(0))
            # Whole blocks; what is behind the end of the file is not there.
            whole = min(DATA_BYTES_MAX, -(-wanted // BLOCK_SIZE) * BLOCK_SIZE)
            count = min(wanted, os.preadv(self._fd, [buffer[:whole]], offset + done))
            if not count:
                raise DamagedError("a volume of the snapshot is shorter than it says", "Unmount and run snapfs check")
            yield offset + done, buffer[:count]
            done += count

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _read_ahead(pieces: Iterator[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
    """The same, with the next one read while this one is compressed and written."""
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(next, pieces, None)
        while (piece := ahead.result()) is not None:
            ahead = reader.submit(next, pieces, None)
            yield piece
