"""Sending a snapshot as a stream, through a mount."""

from __future__ import annotations

import base64
import contextlib
import json
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any, Protocol

from .errors import BadCommandError, BadNameError, DamagedError
from .geometry import BLOCK_SIZE
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

_NOTE_EVERY_BYTES = 256 << 20
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

    Raises NotFoundError; BadCommandError for a token of another snapshot; BadNameError for a volume that
    no path leads to.
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
    writer.fields(
        BEGIN,
        {
            "version": VERSION,
            "snapshot": plan["snapshot"],
            "base": plan["base"],
            "volumes": [{**one, "extents": None} for one in plan["volumes"]],
            "gone": plan["gone"],
            "resume": None if resume is None else [resume.volume_place, resume.offset],
        },
    )
    total_bytes = sum(length for one in plan["volumes"] for _, length, _ in one["extents"])
    done_bytes = 0
    for place, volume in enumerate(plan["volumes"]):
        start = 0
        if resume is not None:
            if place < resume.volume_place:
                continue
            start = resume.offset if place == resume.volume_place else 0
        writer.fields(VOLUME, {"place": place})
        path = os.path.join(mount_point, ".snapshots", name, volume["name"])
        with contextlib.closing(SnapshotFile(path)) as source:
            extents = list(_from(volume["extents"], start))
            for offset, length, is_data in extents:
                if not is_data:
                    writer.zero(offset, length)
            parts = (source.pieces(offset, length, is_data) for offset, length, is_data in extents)
            for at, data in _read_ahead(chain.from_iterable(parts)):
                writer.data(at, data)
                done_bytes += len(data)
                on_progress(done_bytes, total_bytes)
        writer.fields(END_VOLUME, {})
    writer.fields(END, {})
    file.flush()
    return writer.stored_bytes


def _from(extents: list[list[int]], start: int) -> Iterator[tuple[int, int, int]]:
    """The extents from an offset on."""
    for offset, length, is_data in extents:
        skip = min(max(0, start - offset), length)
        if length > skip:
            yield offset + skip, length - skip, is_data


class SnapshotFile:
    """A file of a snapshot, read past the kernel's page cache: twice as fast as through it.

    What it gives is good until it is asked for two more: it reads into three buffers in turn.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        self._buffers = [memoryview(mmap.mmap(-1, DATA_BYTES_MAX)) for _ in range(3)]

    def pieces(self, offset: int, length: int, is_data: int) -> Iterator[tuple[int, memoryview]]:
        """An extent of data, in pieces of at most DATA_BYTES_MAX. Raises DamagedError at the file's end."""
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
