"""Taking back what a stream brought that did not come to its end: volumes, names, contents."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from .errors import (
    ChangedTargetError,
    ExistsError,
    InUseError,
    NotFoundError,
    NotPermittedError,
    SnapfsError,
    UnsupportedError,
)
from .receivestate import MOVING_IN, MOVING_OUT, ReceiveState, states_in
from .transfer import Ask, ResumePoint

Step = Callable[[], object]
# renameat2(2)
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_libc = ctypes.CDLL(None, use_errno=True)


class Target:
    """The mount that a stream goes to, by the names of its volumes."""

    def __init__(self, ask: Ask, mount_point: str, guid: str) -> None:
        self._ask = ask
        self.mount_point = mount_point
        self._guid = guid

    def path(self, name: str) -> str:
        """Of a volume."""
        return os.path.join(self.mount_point, name)

    def exists(self, name: str) -> bool:
        """Whether there is a volume of that name."""
        return os.path.lexists(self.path(name))

    def inode(self, name: str) -> int:
        """What tells a volume from all others."""
        return os.lstat(self.path(name)).st_ino

    def mtime_ns(self, name: str) -> int:
        """When a volume was written to."""
        return os.stat(self.path(name)).st_mtime_ns

    def rename(self, before: str, after: str) -> None:
        """Rename a volume, in no one's place. Raises ExistsError."""
        paths = os.fsencode(self.path(before)), os.fsencode(self.path(after))
        if _libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_NOREPLACE):
            code = ctypes.get_errno()
            if code == errno.EEXIST:
                raise taken(after)
            raise OSError(code, os.strerror(code), before)

    def note(self, state: ReceiveState) -> None:
        """Keep durably how far the stream has come; what lies before is synced."""
        self._ask(self.mount_point, "receive-state", "put", self._guid, state.to_json())

    def forget(self) -> None:
        """Nothing of the stream is under way any more."""
        self._ask(self.mount_point, "receive-state", "drop", self._guid)

    def roll_back(self, snapshot: str, volumes: list[str]) -> str:
        """Have volumes as a snapshot holds them, whoever has them open: under them they were written as well.

        Gives the name of the snapshot of what they held.
        """
        options = [("volume", one) for one in volumes] + [("force", "yes")]
        return str(self._ask(self.mount_point, "rollback", snapshot, options=options)["undo"])

    def delete(self, snapshot: str) -> None:
        """Delete a snapshot."""
        self._ask(self.mount_point, "delete", snapshot)


def taken(name: str) -> ExistsError:
    """That there is a volume of that name."""
    return ExistsError(f"there is a volume {name!r} already", "Rename or remove it first")


def clear_away(target: Target, state: ReceiveState) -> None:
    """The snapshot is made: nothing is left but what it holds."""
    for move in state.moves or []:
        if move.after is None and target.exists(move.aside):
            os.unlink(target.path(move.aside))
    target.forget()


@contextlib.contextmanager
def claimed(mount_point: str, *, alone: bool) -> Iterator[None]:
    """Streams come to a mount meanwhile, or are given up: several may come at a time, but none while one is given up.

    Raises InUseError, NotPermittedError. The lock (flock(2)) is on a folder to which only the mount's owner comes, and
    ends with this.
    """
    folder = os.path.join(mount_point, ".snapfs", "owner")
    try:
        fd = os.open(folder if os.path.isdir(folder) else mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        raise NotPermittedError("receiving is for the daemon's own user", "Ask whoever mounted it") from None
    try:
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            what = "a stream is being received" if alone else "a stream is being given up"
            raise InUseError(f"{what} on {mount_point}", "Wait until that has ended, or end it") from None
        yield
    finally:
        os.close(fd)


@dataclass(slots=True)
class Taken:
    """What came of taking back: what failed, in words, and the volumes that stay as the stream left them.

    ``undo`` is a snapshot with what somebody else may have written meanwhile, if there is one.
    """

    failures: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    undo: str = ""


def take_back(target: Target, state: ReceiveState, base: str | None, is_ours: Callable[[str], bool]) -> Taken:
    """Leave the target as it was: volumes that were made go, names go back, and so do those of the base.

    ``base`` is None where that snapshot is gone: what was written stays then. ``is_ours`` tells whether a snapshot of
    what is rolled back holds nothing that somebody else wrote; else it is kept. Each step is tried that does not need
    one which failed.
    """
    taken_back = Taken()

    def attempt(step: Step) -> None:
        try:
            step()
        except (SnapfsError, OSError) as error:
            taken_back.failures.append(str(error))

    if target.exists(state.name_of_new):
        attempt(partial(os.unlink, target.path(state.name_of_new)))
    for name in state.made:
        # Not one that somebody else gave the name.
        if target.exists(name) and state.is_made(name, target.inode(name)):
            attempt(partial(os.unlink, target.path(name)))
    failure_count = len(taken_back.failures)
    attempt(partial(_move_names_back, target, state, attempt))
    are_back = len(taken_back.failures) == failure_count
    if state.touched and base is None:
        taken_back.left += state.touched
    elif state.touched and base is not None and are_back:
        # By the names of the base, which might stand for others.
        attempt(partial(_roll_back, target, state, base, is_ours, taken_back))
    if not taken_back.failures:
        attempt(target.forget)
    return taken_back


def _roll_back(
    target: Target, state: ReceiveState, base: str, is_ours: Callable[[str], bool], taken_back: Taken
) -> None:
    for name in state.touched:
        if target.exists(name) and not state.is_of_base(name, target.inode(name)):
            raise ChangedTargetError(
                f"volume {name!r} is another than the stream wrote to", "Rename it, and the one it wrote to back"
            )
    undo = target.roll_back(base, state.touched)
    if is_ours(undo):
        target.delete(undo)
    else:
        taken_back.undo = undo


def changed_since(target: Target, state: ReceiveState) -> bool:
    """Whether somebody may have written, since the stream was cut off, to what it wrote to: then that is kept."""
    names_now = {move.before: move.after for move in state.moves or [] if move.after is not None}
    names = [names_now.get(name, name) for name in state.touched]
    return any(not target.exists(one) or target.mtime_ns(one) != state.times.get(one) for one in names)


def _move_names_back(target: Target, state: ReceiveState, attempt: Callable[[Step], None]) -> None:
    moves = state.moves or []
    if state.stage == MOVING_IN:
        for move in moves:
            if move.after is not None and not target.exists(move.aside) and target.exists(move.after):
                if not move.is_of(target.inode(move.after)):
                    raise taken(move.after)
                target.rename(move.after, move.aside)
        # From here on what is under a new name may be what always was.
        state.stage = MOVING_OUT
        target.note(state)
    if state.stage:
        for move in moves:
            if target.exists(move.aside):
                attempt(partial(target.rename, move.aside, move.before))


def abandon(ask: Ask, mount_point: str, token: str) -> list[str]:
    """Give up a stream that was cut off, and take back what it brought; ``token`` is what receive told.

    Gives the volumes that stay as the stream left them, for its base is gone. Raises BadCommandError, NotFoundError,
    InUseError, ChangedTargetError, UnsupportedError, and ExistsError when not all could be taken back, in which case it
    can be tried again.
    """
    guid = ResumePoint.from_token(token).guid
    with claimed(mount_point, alone=True):
        state = states_in(ask(mount_point, "receive-state", "list")).get(guid)
        if state is None:
            raise NotFoundError("nothing of that stream is here", "See the tokens with snapfs receive --tokens")
        if state.stage and state.moves is None:
            raise UnsupportedError(
                "an earlier version began to receive it, and only the stream tells which volumes it renamed",
                "Send it from its beginning: what is here is taken back first",
            )
        target = Target(ask, mount_point, guid)
        names = names_by_guid(ask, mount_point)
        if guid in names:
            clear_away(target, state)
            raise ExistsError(f"the snapshot {names[guid]!r} was received already", "There is nothing to give up")
        check_made(target, state)
        is_changed = changed_since(target, state)
        taken_back = take_back(target, state, base_of(state, names), lambda undo: not is_changed)
    if taken_back.failures:
        raise ExistsError(
            f"not all that the stream brought could be taken back ({'; '.join(taken_back.failures)})",
            "Mend that, then try again",
        )
    return taken_back.left


def names_by_guid(ask: Ask, mount_point: str) -> dict[str, str]:
    """What snapshots are called here."""
    listed = ask(mount_point, "list", options=[("space", "no")])["snapshots"]
    return {str(one["guid"]): str(one["name"]) for one in listed}


def base_of(state: ReceiveState, names: Mapping[str, str]) -> str | None:
    """What the base of a stream is called here; None where it is gone, and there is nothing to roll back to."""
    return names.get(state.base_guid or "")


def check_made(target: Target, state: ReceiveState) -> None:
    """Raises ChangedTargetError for a volume of the stream's that somebody wrote to: it would be removed with that."""
    for name in state.made:
        is_known = name in state.times and target.exists(name) and state.is_made(name, target.inode(name))
        if is_known and target.mtime_ns(name) != state.times[name]:
            raise ChangedTargetError(
                f"volume {name!r}, which the stream made, was written to since",
                "Rename it, if it is to be kept, or remove it; then try again",
            )
