"""Sending a snapshot as a stream, and receiving it, through mounts.

What is received goes into volumes of the target, which for a stream with a base must be as that snapshot
holds them. The snapshot is made when all has come, was read back and is as it was sent; until then there is
none. What a broken stream leaves is taken back, or kept to be gone on with.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, Protocol

from .errors import BadCommandError, ChangedTargetError, DamagedError, ExistsError, MissingBaseError, SnapfsError
from .stream import (
    BEGIN,
    DATA,
    DATA_BYTES_MAX,
    END,
    END_VOLUME,
    VERSION,
    VOLUME,
    ZERO,
    Frame,
    StreamWriter,
    read_stream,
)

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
            return cls(str(guid), int(place), int(offset))
        except (ValueError, TypeError) as error:
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

    Raises NotFoundError; BadCommandError for a token of another snapshot.
    """
    plan = ask(mount_point, "extents", name, options=[("base", base)] if base is not None else [])
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
        with open(path, "rb", buffering=0) as source:
            extents = list(_from(volume["extents"], start))
            for offset, length, is_data in extents:
                if not is_data:
                    writer.zero(offset, length)
            pieces = (
                piece for offset, length, is_data in extents for piece in _pieces(source, offset, length, is_data)
            )
            for at, data in _read_ahead(pieces):
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


def _pieces(source: IO[bytes], offset: int, length: int, is_data: int) -> Iterator[tuple[int, bytes]]:
    done = 0
    while is_data and done < length:
        data = os.pread(source.fileno(), min(DATA_BYTES_MAX, length - done), offset + done)
        if not data:
            raise DamagedError("a volume of the snapshot is shorter than it says", "Unmount and run snapfs check")
        yield offset + done, data
        done += len(data)


def _read_ahead(pieces: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The same, with the next one read while this one is compressed and written."""
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(next, pieces, None)
        while (piece := ahead.result()) is not None:
            ahead = reader.submit(next, pieces, None)
            yield piece


class Receiver:
    """Receives one stream into a mount."""

    def __init__(self, ask: Ask, mount_point: str, *, force: bool, is_resumable: bool) -> None:
        self._ask = ask
        self._mount_point = mount_point
        self._force = force
        self._is_resumable = is_resumable
        self._begin: dict[str, Any] = {}
        self._made: list[str] = []
        self._digests: dict[int, tuple[str, list[tuple[int, int]]]] = {}
        self._unnoted_bytes = 0

    def receive(self, file: IO[bytes], name: str | None = None, on_progress: OnProgress = say_nothing) -> Answer:
        """Receive; the snapshot that was made.

        Raises DamagedError for a broken stream, MissingBaseError, ChangedTargetError, ExistsError.
        ``SnapfsError.fix`` has the resume token where there is one.
        """
        frames = read_stream(file)
        begin = next(frames)
        if begin.kind != BEGIN:
            raise DamagedError("the stream is damaged: it does not begin", "Send it again")
        self._begin = begin.fields
        snapshot_name = name if name is not None else self._begin["snapshot"]["name"]
        self._check(snapshot_name)
        self._note(0, 0)
        try:
            self._apply(frames, on_progress)
            self._set_attributes()
            made = self._snapshot(snapshot_name)
        except BaseException as error:
            if isinstance(error, SnapfsError) and self._is_resumable:
                error.fix = f"Go on with: snapfs send --resume-token {self._point().to_token()}"
            elif not self._is_resumable:
                self._take_back()
            raise
        self._ask(self._mount_point, "receive-state", "drop", self._guid)
        return made

    @property
    def _guid(self) -> str:
        return str(self._begin["snapshot"]["guid"])

    def _path(self, name: str) -> str:
        return os.path.join(self._mount_point, name)

    # -- before ------------------------------------------------------------------------------

    def _check(self, name: str) -> None:
        listed = self._ask(self._mount_point, "list", options=[("space", "no")])["snapshots"]
        if any(one["guid"] == self._guid for one in listed):
            raise ExistsError(f"the snapshot {name!r} was received already", "There is nothing to do")
        if any(one["name"] == name for one in listed):
            raise ExistsError(f"there is a snapshot {name!r} already", "Give another name with --name")
        resume = self._begin["resume"]
        if resume is not None:
            self._check_resumed(resume)
            return
        base = self._begin["base"]
        if base is None:
            taken = [one["name"] for one in self._begin["volumes"] if os.path.lexists(self._path(one["name"]))]
            if taken:
                raise ExistsError(f"there is a volume {taken[0]!r} already", "Rename or remove it first")
            return
        here = next((one for one in listed if one["guid"] == base["guid"]), None)
        if here is None:
            raise MissingBaseError(
                f"the base {base['name']!r} of the stream is not here", "Receive that one first, or send a whole stream"
            )
        self._check_unchanged(here["name"])

    def _check_unchanged(self, base: str) -> None:
        known = {one["base_name"] for one in self._begin["volumes"] if one["base_name"] is not None}
        changes = self._ask(self._mount_point, "diff", base)["volumes"]
        changed = [one for one in changes if (one["renamed_from"] or one["name"]) in known]
        if changed and not self._force:
            raise ChangedTargetError(
                f"volume {changed[0]['name']!r} has changed since {base!r}, the base of the stream",
                f"Roll it back with snapfs rollback, or have that done with --force ({base} is kept)",
            )
        if changed:
            options = [("volume", name) for name in sorted(known)]
            self._ask(self._mount_point, "rollback", base, options=options)
        new = [one["name"] for one in self._begin["volumes"] if one["base_name"] is None]
        taken = [one for one in new if os.path.lexists(self._path(one))]
        if taken:
            raise ExistsError(f"there is a volume {taken[0]!r} already", "Rename or remove it first")

    def _check_resumed(self, resume: list[int]) -> None:
        states = self._ask(self._mount_point, "receive-state", "list")["states"]
        state = states.get(self._guid)
        if state is None:
            raise BadCommandError("nothing of this stream is here to go on with", "Send it from its beginning")
        if [state["volume_place"], state["offset"]] < resume:
            raise BadCommandError("the stream begins later than what is here ends", "Use the token that is told here")
        self._made = list(state["made"])

    # -- the volumes -------------------------------------------------------------------------

    def _apply(self, frames: Iterator[Frame], on_progress: OnProgress) -> None:
        done_bytes = 0
        fd = -1
        place = 0
        digest = hashlib.blake2b(digest_size=32)
        extents: list[tuple[int, int]] = []
        try:
            for frame in frames:
                if frame.kind == VOLUME:
                    place = int(frame.fields["place"])
                    fd = self._open(place)
                    digest, extents = hashlib.blake2b(digest_size=32), []
                elif frame.kind in (DATA, ZERO):
                    self._put(fd, place, frame)
                    if frame.kind == DATA:
                        digest.update(frame.data)
                        extents.append((frame.offset, frame.length))
                    done_bytes += frame.length
                    self._unnoted_bytes += frame.length
                    if self._unnoted_bytes >= _NOTE_EVERY_BYTES:
                        os.fsync(fd)
                        self._note(place, frame.offset + frame.length)
                    on_progress(done_bytes, 0)
                elif frame.kind == END_VOLUME:
                    self._digests[place] = (digest.hexdigest(), extents)
                    os.ftruncate(fd, self._begin["volumes"][place]["size_bytes"])
                    os.fsync(fd)
                    os.close(fd)
                    fd = -1
                    self._note(place + 1, 0)
        except BaseException:
            if fd >= 0 and extents:
                with contextlib.suppress(OSError):
                    os.fsync(fd)
                    self._note(place, sum(extents[-1]))
            raise
        finally:
            if fd >= 0:
                os.close(fd)

    def _open(self, place: int) -> int:
        volume = self._begin["volumes"][place]
        path = self._path(volume["name"])
        if volume["base_name"] is None and volume["name"] not in self._made:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._made.append(volume["name"])
        else:
            before = volume["base_name"]
            if before is not None and before != volume["name"] and os.path.lexists(self._path(before)):
                os.rename(self._path(before), path)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if os.fstat(fd).st_size < volume["size_bytes"]:
            os.ftruncate(fd, volume["size_bytes"])
        return fd

    def _put(self, fd: int, place: int, frame: Frame) -> None:
        if fd < 0:
            raise DamagedError("the stream is damaged: data without a volume", "Send it again")
        size_bytes = self._begin["volumes"][place]["size_bytes"]
        if frame.offset + frame.length > size_bytes:
            raise DamagedError("the stream is damaged: data behind the end of a volume", "Send it again")
        if frame.kind == DATA:
            view = memoryview(frame.data)
            offset = frame.offset
            while view:
                count = os.pwrite(fd, view, offset)
                view, offset = view[count:], offset + count
            return
        name = self._begin["volumes"][place]["name"]
        self._ask(self._mount_point, "discard", name, str(frame.offset), str(frame.length))

    def _set_attributes(self) -> None:
        for volume in self._begin["volumes"]:
            path = self._path(volume["name"])
            os.chmod(path, int(volume["mode"]))
            with contextlib.suppress(PermissionError):
                os.chown(path, int(volume["uid"]), int(volume["gid"]))
            os.utime(path, ns=(int(volume["atime_ns"]), int(volume["mtime_ns"])))

    # -- the snapshot ------------------------------------------------------------------------

    def _snapshot(self, name: str) -> Answer:
        options = [("volume", one["name"]) for one in self._begin["volumes"]]
        options += [("guid", self._guid), ("note", str(self._begin["snapshot"]["note"]))]
        made = self._ask(self._mount_point, "snapshot", name, options=options)
        try:
            for place, (digest, extents) in self._digests.items():
                self._read_back(name, place, digest, extents)
        except BaseException:
            self._ask(self._mount_point, "delete", name)
            raise
        return made

    def _read_back(self, name: str, place: int, digest: str, extents: list[tuple[int, int]]) -> None:
        """The snapshot holds what was sent: read from it again, and compare."""
        volume = self._begin["volumes"][place]["name"]
        found = hashlib.blake2b(digest_size=32)
        with open(os.path.join(self._mount_point, ".snapshots", name, volume), "rb", buffering=0) as kept:
            for offset, length in extents:
                for _, data in _pieces(kept, offset, length, True):
                    found.update(data)
        if found.hexdigest() != digest:
            raise DamagedError(f"volume {volume!r} is not what was sent", "Check the devices, then send it again")

    # -- what a broken stream leaves ---------------------------------------------------------

    def _note(self, place: int, offset: int) -> None:
        """Keep durably how far it has come; what lies before is synced."""
        self._unnoted_bytes = 0
        state = {"volume_place": place, "offset": offset, "made": self._made}
        self._ask(self._mount_point, "receive-state", "put", self._guid, json.dumps(state))

    def _point(self) -> ResumePoint:
        states = self._ask(self._mount_point, "receive-state", "list")["states"]
        state = states.get(self._guid, {"volume_place": 0, "offset": 0})
        return ResumePoint(self._guid, state["volume_place"], state["offset"])

    def _take_back(self) -> None:
        """Leave the target as it was: volumes that were made go, those of the base go back to it."""
        with contextlib.suppress(SnapfsError, OSError):
            for name in self._made:
                os.unlink(self._path(name))
            base = self._begin["base"]
            if base is not None:
                listed = self._ask(self._mount_point, "list", options=[("space", "no")])["snapshots"]
                here = next(one["name"] for one in listed if one["guid"] == base["guid"])
                known = [one["base_name"] for one in self._begin["volumes"] if one["base_name"] is not None]
                undo = self._ask(self._mount_point, "rollback", here, options=[("volume", one) for one in known])
                self._ask(self._mount_point, "delete", undo["undo"])
                for one in self._begin["volumes"]:
                    renamed = one["base_name"] is not None and one["base_name"] != one["name"]
                    if renamed and os.path.lexists(self._path(one["name"])):
                        os.rename(self._path(one["name"]), self._path(one["base_name"]))
            self._ask(self._mount_point, "receive-state", "drop", self._guid)
