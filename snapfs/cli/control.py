"""Talking to a mount through its control file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, cast

from ..errors import BadCommandError, DaemonEndedError, NotAllowedError, NotFoundError, ReadOnlyError, SnapfsError
from .output import description_column

Answer = dict[str, Any]
_READ_BYTES = 1 << 20
_PROGRESS_PERIOD_S = 0.25
# What the kernel gives a request that was under way when the daemon went, and one that comes later.
_NO_DAEMON = (errno.ECONNABORTED, errno.ENOTCONN)


class RefusedError(SnapfsError):
    """The daemon refused a command; its words and errno are the daemon's."""


def control_path(mount_point: str) -> str:
    """The control file of a mount. Raises NotFoundError when nothing is mounted there, NotAllowedError.

    The one in the owner's folder, where one may come to that: nobody else can keep it from being looked up.
    """
    folder = meta_folder(mount_point)
    with contextlib.suppress(OSError):
        path = os.path.join(folder, "owner", "control")
        os.stat(path)
        return path
    path = os.path.join(folder, "control")
    try:
        os.stat(path)
    except PermissionError as error:
        raise NotAllowedError(
            f"you may not look into {mount_point}",
            "If it is a mount of somebody else's, have it mounted with -o allow_other, or allow_root for root",
        ) from error
    except OSError as error:
        raise NotFoundError(
            f"no snapfs is mounted on {mount_point} ({error.strerror})", "Mount one with snapfs mount"
        ) from error
    return path


def meta_folder(mount_point: str) -> str:
    """The folder in which a mount tells of itself."""
    return os.path.join(mount_point, ".snapfs")


def ask(mount_point: str, *words: str, options: list[tuple[str, str]] | None = None) -> Answer:
    """Write one command and read its answer.

    Raises:
        RefusedError: the daemon refused it, with its reason.
        ReadOnlyError: the mount takes no commands.
        DaemonEndedError: it is not known whether the command was done.
    """
    line = command_line(words, options)
    with _translated(mount_point):
        answer, failed = _exchange(control_path(mount_point), line)
    return _accepted(answer, failed)


@contextlib.contextmanager
def _translated(mount_point: str) -> Iterator[None]:
    """Say in words what keeps a daemon from being asked."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_DAEMON:
            raise DaemonEndedError(
                f"the daemon of {mount_point} ended before it had answered",
                "Mount the pool again, and see with snapfs list whether the command was done",
            ) from error
        if error.errno == errno.EROFS:
            raise ReadOnlyError(
                f"{mount_point} is mounted read-only, and takes no commands",
                "Mount it without -o ro, or rescue; status works",
            ) from error
        if error.errno == errno.EACCES:
            raise NotAllowedError(
                f"{mount_point} takes commands from the user whose daemon it is and from root alone",
                "Ask one of them; or have it mounted with -o control_group, for a group that you are in",
            ) from error
        raise


def _accepted(answer: Answer, failed: OSError | None) -> Answer:
    """An answer, if the command was done. Raises RefusedError."""
    if failed is not None or not answer.get("ok"):
        reason = answer.get("error") or (str(failed) if failed is not None else "the daemon gave no answer")
        refused = RefusedError(reason, answer.get("fix", ""))
        refused.exit_code = answer.get("exit_code", 1)
        refused.errno = answer.get("errno") or (failed.errno if failed is not None else refused.errno) or 5
        raise refused
    return answer


@contextlib.contextmanager
def claimed_stream(mount_point: str, guid: str) -> Iterator[None]:
    """Nobody else receives a stream inside: by a control file that stays open. Raises what :func:`ask` does."""
    with _translated(mount_point):
        fd = os.open(control_path(mount_point), os.O_RDWR | os.O_CLOEXEC)
    try:
        with _translated(mount_point):
            claimed = _exchange_by(fd, command_line(("receive-state", "claim", guid), None))
        _accepted(*claimed)
        try:
            yield
        finally:
            # The daemon hears of a closed file a little later. Of one that is dead nothing is claimed.
            with contextlib.suppress(OSError):
                _exchange_by(fd, command_line(("receive-state", "let-go"), None))
    finally:
        os.close(fd)


def _exchange(path: str, line: bytes) -> tuple[Answer, OSError | None]:
    """The answer to a line, and what the write of it ended with. Raises OSError when no answer can be had."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return _exchange_by(fd, line)
    finally:
        os.close(fd)


def _exchange_by(fd: int, line: bytes) -> tuple[Answer, OSError | None]:
    failed: OSError | None = None
    try:
        os.write(fd, line + b"\n")
    except OSError as error:
        failed = error
    return _read_answer(fd), failed


def ask_for_job(mount_point: str, *words: str, options: list[tuple[str, str]] | None = None) -> Answer:
    """Like :func:`ask`, for what takes a while and can be stopped: SIGINT and SIGTERM have the daemon stop it.

    Whoever writes a command waits in the kernel, out of any signal's reach, so that is a thread. On a terminal there
    is a progress bar, as the daemon tells in its status of the job.
    """
    job = f"{words[0]}-{os.getpid()}-{time.time_ns():x}"
    told = [*(options or []), ("job", job)]
    with _signals_noted(signal.SIGINT, signal.SIGTERM) as noted, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, mount_point, *words, options=told)
        with _progress_shown(mount_point, job, words[0]) as show:
            while not wait([answer], timeout=_PROGRESS_PERIOD_S).done:
                if noted:
                    # Each time: it may not have begun yet. The answer tells whether it was stopped, or done by then.
                    with contextlib.suppress(SnapfsError, OSError):
                        ask(mount_point, "stop", job)
                show()
        return answer.result()


@contextlib.contextmanager
def _signals_noted(*numbers: signal.Signals) -> Iterator[list[int]]:
    """Signals that came inside do nothing else than to be in this list."""
    noted: list[int] = []
    before = [signal.signal(number, lambda got, frame: noted.append(got)) for number in numbers]
    try:
        yield noted
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress_shown(mount_point: str, job: str, kind: str) -> Iterator[Callable[[], None]]:
    """Gives what shows how far a job is, on a terminal, as the daemon tells in its status."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (description_column(), *Progress.get_default_columns()[1:])
    status = os.path.join(meta_folder(mount_point), "status.json")
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(kind, total=None)

        def show() -> None:
            now = []
            # A daemon that ends meanwhile is told of by the answer.
            with contextlib.suppress(OSError, ValueError, KeyError), open(status) as file:
                now = [one for one in json.load(file)["jobs"] if one["name"] == job]
            for one in now:
                progress.update(bar, completed=one["done"], total=one["total"], description=f"{kind} {one['what']}")

        yield show


def command_line(words: tuple[str, ...], options: list[tuple[str, str]] | None) -> bytes:
    """A command as a line, without its end. Raises BadCommandError for a word that no line can hold."""
    if any("\n" in word for word in [*words, *(value for _, value in options or [])]):
        raise BadCommandError("a word has a line break", "Leave it out")
    given = [shlex.quote(f"{key}={value}") for key, value in options or []]
    line = " ".join([words[0], *given, "--", *(shlex.quote(word) for word in words[1:])])
    return os.fsencode(line)


def _read_answer(fd: int) -> Answer:
    text = bytearray()
    while part := os.read(fd, _READ_BYTES):
        text += part
    return cast("Answer", json.loads(text)) if text else {}
