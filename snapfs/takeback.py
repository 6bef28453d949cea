"""Taking back what a stream brought that did not come to its end: volumes, names, contents."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Mapping
from functools import partial

from .errors import ExistsError, MissingBaseError, NotFoundError, SnapfsError, UnsupportedError
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

    def roll_back(self, snapshot: str, volumes: list[str], *, keeps_undo: bool) -> None:
        """Have volumes as a snapshot holds them, whoever has them open: under them they were written as well."""
        options = [("volume", one) for one in volumes] + [("force", "yes")]
        undo = self._ask(self.mount_point, "rollback", snapshot, options=options)
        if not keeps_undo:
            self._ask(self.mount_point, "delete", undo["undo"])


def taken(name: str) -> ExistsError:
    """That there is a volume of that name."""
    return ExistsError(f"there is a volume {name!r} already", "Rename or remove it first")


def clear_away(target: Target, state: ReceiveState) -> None:
    """The snapshot is made: nothing is left but what it holds."""
    for move in state.moves or []:
        if move.after is None and target.exists(move.aside):
            os.unlink(target.path(move.aside))
    target.forget()


def take_back(target: Target, state: ReceiveState, base: str, *, keeps_undo: bool = False) -> list[str]:
    """Leave the target as it was: volumes that were made go, names go back, and so do those of the base.

    ``keeps_undo``: somebody else's writes are among what is rolled back. Each step is tried, whatever becomes of the
    others; what failed, in words.
    """
    failures: list[str] = []

    def attempt(step: Step) -> None:
        try:
            step()
        except (SnapfsError, OSError) as error:
            failures.append(str(error))

    if target.exists(state.name_of_new):
        attempt(partial(os.unlink, target.path(state.name_of_new)))
    for name in state.made:
        # Not one that somebody else gave the name.
        if target.exists(name) and state.is_made(name, target.inode(name)):
            attempt(partial(os.unlink, target.path(name)))
    attempt(partial(_move_names_back, target, state, attempt))
    if state.touched:
        attempt(partial(target.roll_back, base, state.touched, keeps_undo=keeps_undo))
    if not failures:
        attempt(target.forget)
    return failures


def _move_names_back(target: Target, state: ReceiveState, attempt: Callable[[Step], None]) -> None:
    moves = state.moves or []
    if state.stage == MOVING_IN:
        for move in moves:
            if move.after is not None and not target.exists(move.aside) and target.exists(move.after):
                target.rename(move.after, move.aside)
        # From here on what is under a new name may be what always was.
        state.stage = MOVING_OUT
        target.note(state)
    if state.stage:
        for move in moves:
            if target.exists(move.aside):
                attempt(partial(target.rename, move.aside, move.before))


def abandon(ask: Ask, mount_point: str, token: str) -> None:
    """Give up a stream that was cut off, and take back what it brought; ``token`` is what receive told.

    Raises BadCommandError, NotFoundError, MissingBaseError, UnsupportedError, and ExistsError when not all could be
    taken back, in which case it can be tried again.
    """
    guid = ResumePoint.from_token(token).guid
    state = states_in(ask(mount_point, "receive-state", "list")).get(guid)
    if state is None:
        raise NotFoundError("nothing of that stream is here", "See the tokens with snapfs receive --tokens")
    if state.stage and state.moves is None:
        raise UnsupportedError(
            "an earlier version began to receive it, and only the stream tells which volumes it renamed",
            "Send it from its beginning: what is here is taken back first",
        )
    target = Target(ask, mount_point, guid)
    listed = ask(mount_point, "list", options=[("space", "no")])["snapshots"]
    names = {one["guid"]: str(one["name"]) for one in listed}
    if guid in names:
        clear_away(target, state)
        raise ExistsError(f"the snapshot {names[guid]!r} was received already", "There is nothing to give up")
    failures = take_back(target, state, _base_of(state, names))
    if failures:
        raise ExistsError(
            f"not all that the stream brought could be taken back ({'; '.join(failures)})", "Mend that, then try again"
        )


def _base_of(state: ReceiveState, names: Mapping[str, str]) -> str:
    """What the base of a stream is called here; empty where nothing is to be rolled back to it."""
    if not state.touched:
        return ""
    base = names.get(state.base_guid or "")
    if base is None:
        raise MissingBaseError(
            "the base of the stream is not here any more, so what it wrote cannot be taken back",
            f"Roll its volumes back by hand: {', '.join(state.touched)}",
        )
    return base
