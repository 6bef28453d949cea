"""Receiving a stream into a mount.

What is received goes into volumes of the target, which for a stream with a base must be as that snapshot
holds them. The snapshot is made when all has come; then it is read back, and deleted if it is not as it was
sent. What a broken stream leaves is taken back, or kept to be gone on with. A stream may come from anyone:
nothing in it is believed before it was looked at.
"""

from __future__ import annotations

import contextlib
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import IO

import blake3

from .errors import (
    BadCommandError,
    ChangedTargetError,
    DamagedError,
    ExistsError,
    MissingBaseError,
    SnapfsError,
    UnsupportedError,
)
from .geometry import BLOCK_SIZE
from .receivestate import MOVING_IN, MOVING_OUT, ReceiveState, states_in
from .stream import BEGIN, DATA, END, END_VOLUME, VOLUME, ZERO, Frame, read_stream
from .streamhead import SEND_AGAIN, StreamHead, StreamVolume, parse_head
from .takeback import Target, base_of, changed_since, check_made, claimed, clear_away, take_back, taken
from .transfer import Answer, Ask, OnProgress, ResumePoint, SnapshotFile, say_nothing
from .units import check_name

_NOTE_EVERY_BYTES = 256 << 20
# Has the stream of a guid for oneself in a mount, as long as it is entered. Raises SnapfsError when it is another's.
Claim = Callable[[str, str], AbstractContextManager[None]]
_FROM_BEGINNING = "Send it from its beginning"


def resume_tokens(ask: Ask, mount_point: str) -> list[str]:
    """A token for each stream that was cut off in a mount."""
    states = states_in(ask(mount_point, "receive-state", "list"))
    return [ResumePoint(guid, state.volume_place, state.offset).to_token() for guid, state in states.items()]


def _rounded(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges ``(offset, end)`` grown to whole blocks, in order, those that touch as one."""
    found: list[tuple[int, int]] = []
    for offset, end in sorted(ranges):
        first, last = offset - offset % BLOCK_SIZE, end + -end % BLOCK_SIZE
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def _covers(ranges: Sequence[tuple[int, int]], offset: int, end: int) -> bool:
    """Whether one of the ranges, which are in order, has all from an offset to an end."""
    place = bisect_right(ranges, (offset, sys.maxsize)) - 1
    return place >= 0 and ranges[place][1] >= end


@dataclass(slots=True)
class _Received:
    """What has come of one volume: ``written`` are ranges of bytes and zeros, ``extents`` those of bytes alone.

    From ``from_offset`` on that is all that was sent. ``is_whole``: there is nothing to come any more.
    """

    from_offset: int
    written: list[tuple[int, int]] = field(default_factory=list)
    extents: list[tuple[int, int]] = field(default_factory=list)
    digest: blake3.blake3 = field(default_factory=blake3.blake3)
    is_whole: bool = False


class Receiver:
    """Receives one stream into a mount.

    ``undo`` is, after a failure, a snapshot with what somebody else wrote meanwhile, if anybody did.
    """

    def __init__(self, ask: Ask, claim: Claim, mount_point: str, *, force: bool, is_resumable: bool) -> None:
        self._ask = ask
        self._claim = claim
        self._mount_point = mount_point
        self._force = force
        self._is_resumable = is_resumable
        self._head: StreamHead
        self._base_here = ""
        self._state = ReceiveState()
        self._target: Target
        # By place.
        self._received: dict[int, _Received] = {}
        self.undo = ""
        self._is_others_too = False
        # What fails from then on cannot be gone on with: nothing would be sent, and so nothing read back.
        self._is_all_here = False
        self._unnoted_bytes = 0

    def receive(self, file: IO[bytes], name: str | None = None, on_progress: OnProgress = say_nothing) -> Answer:
        """Receive; the snapshot that was made.

        Raises DamagedError for a broken stream, MissingBaseError, ChangedTargetError, ExistsError, InUseError.
        ``SnapfsError.fix`` has the resume token where there is one.
        """
        with claimed(self._mount_point, alone=False):
            frames = read_stream(file)
            begin = next(frames)
            if begin.kind != BEGIN:
                raise DamagedError("the stream is damaged: it does not begin", SEND_AGAIN)
            self._head = parse_head(begin.fields)
            # Before it is looked at what of it is here: that is another's own, as long as that one is at work.
            with self._claim(self._mount_point, self._head.guid):
                return self._receive(frames, name, on_progress)

    def _receive(self, frames: Iterator[Frame], name: str | None, on_progress: OnProgress) -> Answer:
        self._target = Target(self._ask, self._mount_point, self._head.guid)
        snapshot_name = name if name is not None else self._head.name
        # Before anything is read of what may be large.
        check_name(os.fsencode(snapshot_name), "snapshot")
        self._check(snapshot_name)
        self._know_inodes()
        self._note()
        try:
            self._move_names()
            self._apply(frames, on_progress)
            self._set_attributes()
            made = self._snapshot(snapshot_name)
        except BaseException as error:
            self._give_up(error)
            raise
        clear_away(self._target, self._state)
        return made

    def _give_up(self, error: BaseException) -> None:
        """Keep what came, and tell how to go on; or take it back."""
        if self._is_resumable and not self._is_others_too and not self._is_all_here:
            self._note_times()
            point = ResumePoint(self._head.guid, self._state.volume_place, self._state.offset)
            if isinstance(error, SnapfsError):
                error.fix = f"Go on with: snapfs send --resume-token {point.to_token()}"
            return
        taken_back = take_back(self._target, self._state, self._base_here, self._is_mine)
        self.undo = taken_back.undo
        if not isinstance(error, SnapfsError):
            return
        if taken_back.undo:
            error.fix = f"What somebody else wrote meanwhile is in snapshot {taken_back.undo!r}. {error.fix}"
        if taken_back.failures:
            failed = "; ".join(taken_back.failures)
            error.fix = f"Not all could be taken back ({failed}): roll the volumes back by hand"

    def _is_mine(self, undo: str) -> bool:
        """Whether a snapshot of what was received up to now holds that, and nothing that somebody else wrote."""
        if self._is_others_too or self._head.resume is not None:
            # Of what came before, only its times are known.
            return False
        # What was written to of the base, by its names there, which it has again.
        names = {place: self._head.volumes[place].base_name for place in self._received}
        of_base = {place: name for place, name in names.items() if name is not None and name in self._state.touched}
        try:
            self._check_nothing_else(undo, of_base)
            for place, base_name in of_base.items():
                self._read_back(undo, base_name, self._received[place])
        except (SnapfsError, OSError, KeyError):
            return False
        return True

    def _found(self, fields: object) -> ReceiveState:
        """How far the stream had come before. Raises DamagedError."""
        state = ReceiveState.from_fields(fields)
        state.know_moves(self._head)
        return state

    def _note(self) -> None:
        self._unnoted_bytes = 0
        self._target.note(self._state)

    def _note_times(self) -> None:
        """Have whoever goes on know whether somebody else wrote to what is here, or rolled it back."""
        for volume in self._head.volumes[: self._state.volume_place + 1]:
            if volume.base_name in self._state.touched or volume.name in self._state.made:
                with contextlib.suppress(OSError, SnapfsError):
                    found = os.stat(self._target.path(volume.name))
                    # The kernel may have it from a write that the daemon was told of a little later.
                    os.utime(self._target.path(volume.name), ns=(found.st_atime_ns, found.st_mtime_ns))
                    self._state.times[volume.name] = found.st_mtime_ns
        with contextlib.suppress(OSError, SnapfsError):
            self._note()

    # -- before ------------------------------------------------------------------------------

    def _check(self, name: str) -> None:
        head = self._head
        if not head.volumes:
            # A snapshot that names no volume is one of all that are here.
            raise UnsupportedError(f"the snapshot {head.name!r} of the stream holds no volume", "Nothing was received")
        listed = self._ask(self._mount_point, "list", options=[("space", "no")])["snapshots"]
        fields = self._ask(self._mount_point, "receive-state", "list")["states"].get(head.guid)
        if any(one["guid"] == head.guid for one in listed):
            if fields is not None:
                # By one that was killed when it had made the snapshot.
                self._state = self._found(fields)
                clear_away(self._target, self._state)
            raise ExistsError(f"the snapshot {name!r} was received already", "There is nothing to do")
        if any(one["name"] == name for one in listed):
            raise ExistsError(f"there is a snapshot {name!r} already", "Give another name with --name")
        if head.base_guid is not None:
            here = next((one for one in listed if one["guid"] == head.base_guid), None)
            if here is None:
                raise MissingBaseError(
                    f"the base {head.base_name!r} of the stream is not here",
                    "Receive that one first, or send a whole stream",
                )
            self._base_here = here["name"]
            self._check_base_names()
        if head.resume is not None:
            self._check_resumed(fields)
            return
        if fields is not None:
            # One that was killed before it could take back what it had brought.
            self._state = self._found(fields)
            base = base_of(self._state, {str(one["guid"]): str(one["name"]) for one in listed})
            check_made(self._target, self._state)
            is_changed = changed_since(self._target, self._state)
            failures = take_back(self._target, self._state, base, lambda undo: not is_changed).failures
            if failures:
                raise ExistsError(
                    f"not all that an earlier try left could be taken back ({'; '.join(failures)})",
                    "Mend that, then send it again",
                )
        self._state = ReceiveState.of_stream(head)
        if head.base_guid is not None:
            self._check_unchanged(self._base_here)
        before = {one.base_name for one in head.volumes} | set(head.gone)
        wanted = [one.name for one in head.volumes if one.name not in before]
        wanted += [self._state.name_of_new, *(move.aside for move in self._state.moves or [])]
        for name in wanted:
            if self._target.exists(name):
                raise taken(name)

    def _check_base_names(self) -> None:
        """What a stream changes or takes away is what its base holds, and nobody else's. Raises DamagedError."""
        held = set(os.listdir(os.path.join(self._mount_point, ".snapshots", self._base_here)))
        named = {one.base_name for one in self._head.volumes if one.base_name is not None} | set(self._head.gone)
        if named - held:
            raise DamagedError(
                f"the stream is damaged: its base holds no volume {min(named - held)!r}", "Send it again"
            )

    def _check_unchanged(self, base: str) -> None:
        known = {one.base_name for one in self._head.volumes if one.base_name is not None} | set(self._head.gone)
        changes = self._ask(self._mount_point, "diff", base)["volumes"]
        changed = [one for one in changes if (one["renamed_from"] or one["name"]) in known and one["change"] != "added"]
        if changed and not self._force:
            raise ChangedTargetError(
                f"volume {changed[0]['name']!r} has changed since {base!r}, the base of the stream",
                f"Roll it back with snapfs rollback, or have that done with --force ({base} is kept)",
            )
        if changed:
            options = [("volume", one["renamed_from"] or one["name"]) for one in changed]
            self._ask(self._mount_point, "rollback", base, options=options)
            for one in changed:
                if one["renamed_from"] and not self._target.exists(one["renamed_from"]):
                    self._target.rename(one["name"], one["renamed_from"])

    def _check_resumed(self, fields: object) -> None:
        if fields is None or not self._is_resumable:
            raise BadCommandError(
                "the stream begins in the middle, and nothing of it is here to go on with",
                "Send it from its beginning, or receive it with --resumable as its first part",
            )
        self._state = self._found(fields)
        if self._state.base_guid not in (None, self._head.base_guid or ""):
            raise BadCommandError(
                "the stream has another base than the part that is here", "Send it with the --from of that one"
            )
        if (self._state.volume_place, self._state.offset) < (self._head.resume or (0, 0)):
            raise BadCommandError("the stream begins later than what is here ends", "Use the token that is told here")
        self._check_times()
        if self._base_here:
            self._check_untouched(self._base_here)

    def _check_times(self) -> None:
        """What came before is as it was left."""
        for name, when in self._state.times.items():
            if not self._target.exists(name) or os.stat(self._target.path(name)).st_mtime_ns != when:
                raise ChangedTargetError(
                    f"volume {name!r} has changed since the stream was cut off",
                    f"{_FROM_BEGINNING}, and receive it with --force, which rolls it back",
                )
        self._state.times = {}

    def _check_untouched(self, base: str) -> None:
        """Volumes that the part which is here had not come to are still those of the base, but for their names."""
        first = self._state.volume_place + (1 if self._state.offset else 0)
        # What the stream itself began to change is noted before it does.
        ahead = {one.base_name for one in self._head.volumes[first:]} - set(self._state.touched)
        for one in self._ask(self._mount_point, "diff", base)["volumes"]:
            is_other = one["changed_bytes"] or one["size_bytes"] != one["size_bytes_before"]
            if (one["renamed_from"] or one["name"]) in ahead and one["change"] != "added" and is_other:
                raise ChangedTargetError(
                    f"volume {one['name']!r} has changed since {base!r}, the base of the stream",
                    "Send the stream from its beginning, and receive it with --force, which rolls it back",
                )

    def _know_inodes(self) -> None:
        """Which volumes are those of the base: who has a name of theirs may be another later."""
        moves = {move.before: move for move in self._state.moves or []}
        for name in (one.base_name for one in self._head.volumes if one.base_name is not None):
            inode = moves[name].inode if name in moves else 0
            # Once they move, another may have the name by now; earlier versions did not note which is meant.
            is_known = inode or name not in moves or not self._state.stage
            if name not in self._state.inodes and is_known and (inode or self._target.exists(name)):
                self._state.inodes[name] = inode or self._target.inode(name)

    # -- names -------------------------------------------------------------------------------

    def _move_names(self) -> None:
        """All out of their old names first, so that names may be exchanged; then into the new ones.

        It goes on where an earlier try was killed: what is aside has moved out, what no longer is has moved in.
        """
        moves = self._state.moves or []
        if not moves:
            return
        if not self._state.stage:
            moves = [move._replace(inode=self._target.inode(move.before)) for move in moves]
            self._state.moves = moves
            self._note_stage(MOVING_OUT)
        if self._state.stage == MOVING_OUT:
            for move in moves:
                if not self._target.exists(move.aside):
                    self._target.rename(move.before, move.aside)
            self._note_stage(MOVING_IN)
        for move in moves:
            if move.after is not None and self._target.exists(move.aside):
                self._target.rename(move.aside, move.after)

    def _note_stage(self, stage: int) -> None:
        self._state.stage = stage
        self._note()

    # -- the volumes -------------------------------------------------------------------------

    def _apply(self, frames: Iterator[Frame], on_progress: OnProgress) -> None:
        place = (self._head.resume or (0, 0))[0]
        done_bytes = 0
        for frame in frames:
            if frame.kind == VOLUME:
                if frame.fields.get("place") != place or place >= len(self._head.volumes):
                    raise DamagedError("the stream is damaged: its volumes are out of order", SEND_AGAIN)
                done_bytes = self._receive_volume(place, frames, done_bytes, on_progress)
                place += 1
            elif frame.kind == END:
                if place < len(self._head.volumes):
                    raise DamagedError("the stream is damaged: it ends before its last volume", SEND_AGAIN)
            else:
                raise DamagedError("the stream is damaged: data without a volume", SEND_AGAIN)

    def _receive_volume(self, place: int, frames: Iterator[Frame], done_bytes: int, on_progress: OnProgress) -> int:
        volume = self._head.volumes[place]
        fd = self._open(volume)
        resume_place, resume_offset = self._head.resume or (0, 0)
        received = self._received[place] = _Received(resume_offset if place == resume_place else 0)
        try:
            for frame in frames:
                if frame.kind == END_VOLUME:
                    break
                # First: a part of it may be there when it fails.
                received.written.append((frame.offset, frame.offset + frame.length))
                self._put(fd, volume, frame)
                if frame.kind == DATA:
                    received.digest.update(frame.data)
                    received.extents.append((frame.offset, frame.length))
                done_bytes += frame.length
                self._unnoted_bytes += frame.length
                if self._unnoted_bytes >= _NOTE_EVERY_BYTES and frame.kind == DATA:
                    self._note_position(fd, place, frame.offset + frame.length)
                on_progress(done_bytes, 0)
            if os.fstat(fd).st_size != volume.size_bytes:
                os.ftruncate(fd, volume.size_bytes)
            os.fsync(fd)
        except BaseException:
            if received.extents and self._is_resumable:
                self._note_position(fd, place, sum(received.extents[-1]))
            raise
        finally:
            os.close(fd)
        received.is_whole = True
        self._state.volume_place, self._state.offset = place + 1, 0
        if self._unnoted_bytes >= _NOTE_EVERY_BYTES:
            # Of many small volumes not each: one that was killed receives some of them once more.
            self._note()
        return done_bytes

    def _note_position(self, fd: int, place: int, offset: int) -> None:
        os.fsync(fd)
        self._state.volume_place, self._state.offset = place, offset
        self._note()

    def _open(self, volume: StreamVolume) -> int:
        if volume.base_name is None:
            self._make(volume.name)
        fd = self._opened(volume)
        try:
            self._check_same(volume, os.fstat(fd).st_ino)
            self._keep_private(fd, volume)
            if os.fstat(fd).st_size != volume.size_bytes:
                self._touch(volume)
                if os.fstat(fd).st_size < volume.size_bytes:
                    os.ftruncate(fd, volume.size_bytes)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _keep_private(self, fd: int, volume: StreamVolume) -> None:
        """Whoever may read it now, and not when all has come, reads nothing of what comes."""
        found = os.fstat(fd)
        if (found.st_mode & 0o777, found.st_uid, found.st_gid) == (volume.mode, volume.uid, volume.gid):
            return
        self._touch(volume)
        os.fchmod(fd, 0o600)
        if os.geteuid() == 0:
            os.fchown(fd, volume.uid, volume.gid)

    def _check_same(self, volume: StreamVolume, inode: int) -> None:
        """What has a volume's name is what the stream means by it. Raises ChangedTargetError."""
        if volume.base_name is None:
            is_same, meant = self._state.is_made(volume.name, inode), "the stream made"
        else:
            is_same, meant = self._state.is_of_base(volume.base_name, inode), "the stream began with"
        if not is_same:
            raise ChangedTargetError(f"volume {volume.name!r} is another than {meant}", _FROM_BEGINNING)

    def _opened(self, volume: StreamVolume) -> int:
        path, flags = self._target.path(volume.name), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags)
        except PermissionError:
            # Its owner's mode keeps its owner from it. It gets that of the stream when all has come.
            self._touch(volume)
            os.chmod(path, 0o600)
            return os.open(path, flags)

    def _make(self, name: str) -> None:
        """Have a new volume there, if it is not yet.

        It is made under a name of the stream's own, and noted before it gets its name: so whatever a kill leaves, what
        somebody else made is not taken for it.
        """
        aside = self._state.name_of_new
        if name not in self._state.made:
            if self._target.exists(aside):
                # Made by one that was killed before it could note that.
                os.unlink(self._target.path(aside))
            fd = os.open(self._target.path(aside), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                self._state.made[name] = os.fstat(fd).st_ino
            finally:
                os.close(fd)
            self._note()
        if self._target.exists(aside) and self._state.is_made(name, self._target.inode(aside)):
            self._target.rename(aside, name)

    def _touch(self, volume: StreamVolume) -> None:
        """It is about to be other than in the base; that is noted first."""
        if volume.base_name is not None and volume.base_name not in self._state.touched:
            self._state.touched.append(volume.base_name)
            self._note()

    def _put(self, fd: int, volume: StreamVolume, frame: Frame) -> None:
        if frame.kind not in (DATA, ZERO) or frame.offset + frame.length > volume.size_bytes:
            raise DamagedError("the stream is damaged: data behind the end of a volume", SEND_AGAIN)
        self._touch(volume)
        if frame.kind == ZERO:
            where = (str(frame.offset), str(frame.length))
            # Durable with all else, when the volume is whole.
            options = [("sync", "no"), ("inode", str(os.fstat(fd).st_ino))]
            self._ask(self._mount_point, "discard", volume.name, *where, options=options)
            return
        view, offset = memoryview(frame.data), frame.offset
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count

    def _set_attributes(self) -> None:
        for volume in self._head.volumes:
            path = self._target.path(volume.name)
            found = os.stat(path)
            self._check_same(volume, found.st_ino)
            if (found.st_mode & 0o777, found.st_uid, found.st_gid) != (volume.mode, volume.uid, volume.gid):
                self._touch(volume)
                os.chmod(path, volume.mode)
                if os.geteuid() == 0:
                    os.chown(path, volume.uid, volume.gid)
            if found.st_mtime_ns != volume.mtime_ns:
                self._touch(volume)
                os.utime(path, ns=(volume.atime_ns, volume.mtime_ns))

    # -- the snapshot ------------------------------------------------------------------------

    def _snapshot(self, name: str) -> Answer:
        options = [("volume", one.name) for one in self._head.volumes]
        options += [("guid", self._head.guid), ("note", self._head.note)]
        made = self._ask(self._mount_point, "snapshot", name, options=options)
        self._is_all_here = True
        try:
            names = {place: self._head.volumes[place].name for place in self._received}
            self._check_nothing_else(name, names)
            for place, volume_name in names.items():
                self._read_back(name, volume_name, self._received[place])
        except BaseException:
            self._target.delete(name)
            raise
        return made

    def _check_nothing_else(self, snapshot: str, names: Mapping[int, str]) -> None:
        """A snapshot differs from the base in what was received, and in nothing else. Raises ChangedTargetError.

        ``names`` has what the volumes at these places are called in it.
        """
        options = [("base", self._base_here)] if self._base_here else []
        answer = self._ask(self._mount_point, "extents", snapshot, options=options)
        found = {one["name"]: one for one in answer["volumes"]}
        for place, name in names.items():
            received = self._received[place]
            sent = _rounded(received.written)
            is_other = received.is_whole and found[name]["size_bytes"] != self._head.volumes[place].size_bytes
            for offset, length, _ in found[name]["extents"]:
                first, end = max(offset, received.from_offset), offset + length
                is_other = is_other or (first < end and not _covers(sent, first, end))
            if is_other:
                self._is_others_too = True
                raise ChangedTargetError(
                    f"somebody wrote to volume {name!r} while it was received",
                    "Keep others from its volumes, then receive it again",
                )

    def _read_back(self, snapshot: str, name: str, received: _Received) -> None:
        """A snapshot holds what was sent: read from it again, and compare. Raises DamagedError."""
        found = blake3.blake3()
        path = os.path.join(self._mount_point, ".snapshots", snapshot, name)
        with contextlib.closing(SnapshotFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))) as kept:
            for offset, length in received.extents:
                for _, data in kept.pieces(offset, length, 1):
                    found.update(data)
        if found.digest() != received.digest.digest():
            raise DamagedError(f"volume {name!r} is not what was sent", "Check the devices, then send it again")
