"""Every error snapfs raises on purpose.

A class says when it happens, what was kept and what to do; its errno is what a system call
gets, its exit code what a command line gets. The text of an instance names the thing at fault.
"""

from __future__ import annotations

import errno


class SnapfsError(Exception):
    """The base. ``fix`` says what the user can do, as a sentence, or is empty."""

    errno: int = errno.EIO
    exit_code: int = 1

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.reason}. {self.fix}" if self.fix else self.reason

    @property
    def public(self) -> str:
        """As much of it as everyone may read who comes to a mount."""
        return str(self)


class NotPermittedError(SnapfsError):
    """Not for whoever asks, or the tree has no place for it."""

    errno = errno.EPERM


class BadCommandError(SnapfsError):
    """A command or option that snapfs does not have, or with the wrong words. Nothing was done."""

    errno = errno.EINVAL
    exit_code = 2


class BadNameError(SnapfsError):
    """A name that a volume or a snapshot cannot have. Nothing was done."""

    errno = errno.EINVAL


class NameTooLongError(BadNameError):
    """A name of more than 255 bytes. Nothing was done."""

    errno = errno.ENAMETOOLONG


class ReservedNameError(BadNameError):
    """A name that snapfs keeps for itself. Nothing was done."""

    errno = errno.EPERM


class AnswerTooLongError(SnapfsError):
    """The answer to a command is too long to be given. The command was done."""

    errno = errno.EMSGSIZE


class NotFoundError(SnapfsError):
    """There is no volume or snapshot of that name. Nothing was done."""

    errno = errno.ENOENT


class ExistsError(SnapfsError):
    """The name is taken. What has it was kept as it is."""

    errno = errno.EEXIST


class ForeignPoolError(SnapfsError):
    """A pool is another user's, or others may write to it. It was not opened."""

    errno = errno.EACCES


class NotAllowedError(SnapfsError):
    """Somebody asked a daemon who may not. Nothing was done."""

    errno = errno.EACCES


class ReadOnlyError(SnapfsError):
    """Something that would change a snapshot, or a pool opened for reading. Nothing was changed."""

    errno = errno.EROFS


class TooLargeError(SnapfsError):
    """A size or an offset that a volume cannot have. The volume was kept as it is."""

    errno = errno.EFBIG


class NoSpaceError(SnapfsError):
    """A device has no room. Everything that was acknowledged is kept; deleting snapshots frees room."""

    errno = errno.ENOSPC


class DatabaseFullError(NoSpaceError):
    """There is no room in the pool's directory for rows of a database. Nothing was changed."""


class NoMemoryError(SnapfsError):
    """The daemon may have no more memory or threads. Nothing was begun; it is tried again when there is some."""

    errno = errno.ENOMEM


class IdsUsedUpError(SnapfsError):
    """A processor has begun as many change logs as there are ids. What was written stays readable."""

    errno = errno.EOVERFLOW


class SyncFailedError(SnapfsError):
    """A sync failed, so what was written since the last success may be lost.

    The volume takes no more writes until the pool is opened again; reads and snapshots made
    earlier go on.
    """

    errno = errno.EIO


class NoRoomForSyncError(SyncFailedError):
    """As :class:`SyncFailedError`, for a device that had taken what it has no room for: a thin one, or by quota."""

    errno = errno.ENOSPC


class DamagedError(SnapfsError):
    """Something on disk is not what was written there. Nothing is guessed; other volumes go on."""

    errno = errno.EIO
    exit_code = 4


class DaemonEndedError(SnapfsError):
    """The daemon of a mount ended before it had answered. What it had acknowledged is kept."""

    errno = errno.ENOTCONN


class UnsealedError(SnapfsError):
    """A snapshot is not sealed yet, so nothing can be proven of it. Nothing was done."""

    errno = errno.EAGAIN


class UnreadableError(SnapfsError):
    """Something on disk cannot be read. It is not taken for absent."""

    errno = errno.EIO


class NotAPoolError(SnapfsError):
    """The directory holds no pool."""

    errno = errno.EINVAL


class TooNewError(SnapfsError):
    """The pool was written by a newer snapfs. It was left as it is."""

    errno = errno.EPROTONOSUPPORT


class HeldError(SnapfsError):
    """A snapshot that tags hold was to be deleted. It was kept."""

    errno = errno.EBUSY


class BusyVolumeError(SnapfsError):
    """A volume that is open was to be rolled back. It was kept as it is."""

    errno = errno.EBUSY


class StaleVolumeError(SnapfsError):
    """A volume was rolled back, durably, and the kernel keeps its size of before. It opens after the next mount."""

    errno = errno.EBUSY


class UnsupportedError(SnapfsError):
    """Something that this kind of volume cannot do. Nothing was done."""

    errno = errno.EOPNOTSUPP


class HookFailedError(SnapfsError):
    """A program that was to run before a snapshot failed. What had begun was undone; no snapshot was made.

    What the program ``said`` may hold secrets.
    """

    errno = errno.ECANCELED

    def __init__(self, reason: str, fix: str = "", said: str = "") -> None:
        super().__init__(f"{reason}: {said}" if said else reason, fix)
        self._public = f"{reason}. {fix}"

    @property
    def public(self) -> str:
        """See :attr:`SnapfsError.public`."""
        return self._public


class UnfinishedError(SnapfsError):
    """A volume whose rollback in place could not be finished. It stays closed, and no snapshot is made of it."""

    errno = errno.EIO


class InsideHookError(SnapfsError):
    """A program that runs before or after a snapshot asked for something that waits for that snapshot."""

    errno = errno.EDEADLK


class StoppedError(SnapfsError):
    """Work was stopped, because the mount is going away. What was done so far stays."""

    errno = errno.ECANCELED


class StallError(SnapfsError):
    """A snapshot would have held things up for longer than was allowed. None was made."""

    errno = errno.ETIMEDOUT


class MissingBaseError(SnapfsError):
    """A stream of changes whose base is not in the target. Nothing was changed."""

    errno = errno.ENOENT


class ChangedTargetError(SnapfsError):
    """A stream of changes for volumes that changed since its base. Nothing was changed."""

    errno = errno.EBUSY


class MissingToolError(SnapfsError):
    """A program that is needed for this is not installed. Nothing was done."""

    errno = errno.ENOENT


class InUseError(SnapfsError):
    """Another process has the pool open."""

    errno = errno.EBUSY


class SilentDaemonError(SnapfsError):
    """The daemon does not answer. What it does is not known to whoever asks."""

    errno = errno.ETIMEDOUT


class DeviceMissingError(SnapfsError):
    """A device of the pool is not there, or another is in its place."""

    errno = errno.ENODEV


class ClosedError(SnapfsError):
    """The pool is closed or closing."""

    errno = errno.ESHUTDOWN


class MountError(SnapfsError):
    """The mount could not be made or undone."""

    errno = errno.EINVAL
