"""``snapfs mount``."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import logging.handlers
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from io import TextIOWrapper

import click

from ..descriptor import open_home, read_descriptor
from ..errors import MountError, SnapfsError
from ..formats import DAEMON_LOG_FILE
from ..mountpoint import MountRequest, check_mount_point, check_options, offering_rescue
from .output import say

_LOG_BYTES_MAX = 1 << 20


@click.command()
@click.argument("pool", type=click.Path())
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.option("-o", "option_lists", multiple=True, metavar="OPTION,…", help="allow_other, ro, rescue, auto_unmount, …")
@click.option("--foreground", "-f", is_flag=True, help="Stay, and log to stderr.")
@click.option("--ready-fd", type=int, hidden=True)
def mount(pool: str, mount_point: str, option_lists: tuple[str, ...], foreground: bool, ready_fd: int | None) -> None:
    """Mount the pool in the directory POOL on the empty directory MOUNT.

    Returns when the mount answers; the daemon goes on in the background and logs to POOL/daemon.log.
    """
    options = frozenset(word for words in option_lists for word in words.split(",") if word)
    request = MountRequest(os.path.abspath(pool), os.path.abspath(mount_point), options)
    if ready_fd is not None:
        _serve_for_parent(request, ready_fd)
    elif foreground:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        _serve(request, partial(_tell_mounted, request.mount_point))
    else:
        _start(request)


def _serve(request: MountRequest, ready: Callable[[Sequence[str]], None]) -> None:
    # Imported in the daemon only: whoever starts one needs nothing of it.
    import trio

    from ..mount import serve

    trio.run(serve, request, ready)


def _log_path(request: MountRequest) -> str:
    """Where the daemon logs. Nothing of a damaged pool is changed."""
    return os.devnull if request.is_rescue else os.path.join(request.pool_path, DAEMON_LOG_FILE)


def _opened_log(path: str, flags: int) -> int:
    """The log, for whom ``open`` asks. The pool may be another user's: no link in its place is followed, and no pipe
    waited for.
    """
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    if path != os.devnull and not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no file", path)
    return fd


class _LogHandler(logging.handlers.RotatingFileHandler):
    """Logs into the pool's directory."""

    def _open(self) -> TextIOWrapper:
        mode, encoding = self.mode, self.encoding
        file = open(self.baseFilename, mode, encoding=encoding, opener=_opened_log)  # noqa: SIM115 - handed on
        assert isinstance(file, TextIOWrapper)
        return file


def _tell_mounted(mount_point: str, lost: Sequence[str]) -> None:
    _tell_lost(lost)
    click.echo(f"mounted on {mount_point}", err=True)


def _tell_lost(lost: Sequence[str]) -> None:
    for words in lost:
        say(f"lost: {words}", err=True)


def _start(request: MountRequest) -> None:
    """Start a daemon, and wait until it says that the mount answers, or why not."""
    check_options(request.options)
    check_mount_point(request)
    if not request.is_rescue:
        with contextlib.closing(open_home(request.pool_path)) as home, offering_rescue(request):
            read_descriptor(home, request.pool_path)
    reader, writer = os.pipe()
    command = [sys.executable, "-P", "-m", "snapfs", "mount", request.pool_path, request.mount_point]
    if request.options:
        command += ["-o", ",".join(sorted(request.options))]
    os.umask(0o077)
    with open(_log_path(request), "ab", opener=_opened_log) as log:
        daemon = subprocess.Popen(
            [*command, "--ready-fd", str(writer)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(writer,),
            start_new_session=True,
            cwd="/",
        )
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        try:
            told = pipe.read()
        except KeyboardInterrupt:
            click.echo(
                f"the daemon, {daemon.pid}, goes on: it mounts when the pool is recovered; snapfs umount ends it",
                err=True,
            )
            raise
    if not told:
        daemon.wait()
        raise MountError(
            f"the daemon ended with {daemon.returncode} before the mount answered",
            "Try again with --foreground" if request.is_rescue else f"See {request.pool_path}/{DAEMON_LOG_FILE}",
        )
    answer = json.loads(told)
    if not answer["ok"]:
        daemon.wait()
        failed = SnapfsError(answer["reason"], answer["fix"])
        failed.exit_code = answer["exit_code"]
        raise failed
    _tell_lost(answer["lost"])


def _serve_for_parent(request: MountRequest, ready_fd: int) -> None:
    handler: logging.Handler = logging.NullHandler()
    if not request.is_rescue:
        handler = _LogHandler(_log_path(request), maxBytes=_LOG_BYTES_MAX, backupCount=1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=[handler])
    # Not for fusermount3, which may outlive the daemon.
    os.set_inheritable(ready_fd, False)
    is_ready = False

    def tell(answer: dict[str, object]) -> None:
        # Who started this may have been ended; the mount is there all the same.
        with contextlib.suppress(BrokenPipeError):
            os.write(ready_fd, json.dumps(answer).encode())
        os.close(ready_fd)

    def ready(lost: Sequence[str]) -> None:
        nonlocal is_ready
        is_ready = True
        tell({"ok": True, "lost": list(lost)})

    try:
        _serve(request, ready)
    except SnapfsError as error:
        logging.error("%s", error)
        if not is_ready:
            tell({"ok": False, "reason": error.reason, "fix": error.fix, "exit_code": error.exit_code})
        sys.exit(error.exit_code)
    except OSError as error:
        logging.error("%s", error)
        if not is_ready:
            tell({"ok": False, "reason": str(error), "fix": "", "exit_code": 1})
        sys.exit(1)
    except BaseException:
        logging.exception("the daemon failed in an unforeseen way")
        raise
