"""``snapfs send`` and ``snapfs receive``."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import click

from ..errors import BadCommandError, MountError, SnapfsError
from ..receive import Receiver, resume_tokens
from ..takeback import abandon
from ..transfer import ResumePoint
from ..transfer import send as send_stream
from .anywhere import is_pool
from .control import ask, claimed_stream
from .ending import end_on_signals
from .output import print_json, progress_bar, say
from .umount import take_away


@contextlib.contextmanager
def _mounted(where: str) -> Iterator[str]:
    """The mount; of a pool that is not mounted one for as long as this lasts."""
    if not is_pool(where):
        yield where
        return
    folder = os.path.abspath(tempfile.mkdtemp(prefix="snapfs-receive-"))
    try:
        try:
            _mount(where, folder)
            yield folder
        except BaseException:
            if _is_mounted_on(folder):
                _take_away_after_failure(folder)
            raise
        take_away(folder)
    finally:
        # Never with what is in it, which is the pool's when it could not be unmounted.
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def _is_mounted_on(folder: str) -> bool:
    """Whether a mount is there, also one whose daemon is dead."""
    try:
        os.stat(folder)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return os.path.ismount(folder)


def _mount(pool: str, folder: str) -> None:
    """Mount with a command of its own, so that the daemon is no child of this one. Raises MountError in its words."""
    # Not with what happens to lie in the current directory in place of its modules (-P).
    command = [sys.executable, "-P", "-m", "snapfs", "mount", "--", pool, folder]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="surrogateescape", check=False)
    if done.returncode:
        failed = MountError(done.stderr.strip().removeprefix("snapfs: "))
        failed.exit_code = done.returncode
        raise failed
    click.echo(done.stderr, nl=False, err=True)


def _take_away_after_failure(folder: str) -> None:
    """What failed first is what the user is told in the end, perhaps with how to go on."""
    try:
        take_away(folder)
    except SnapfsError as error:
        say(f"snapfs: {error}", err=True)


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.argument("name", metavar="SNAP")
@click.option("--from", "base", metavar="BASE", help="Send only what changed since this snapshot.")
@click.option("--resume-token", metavar="TOKEN", help="Go on with a stream that was cut off, as snapfs receive told.")
@click.option(
    "--level", default=3, show_default=True, type=click.IntRange(0, 19), help="How hard to compress (zstd); 0 not."
)
def send(mount_point: str, name: str, base: str | None, resume_token: str | None, level: int) -> None:
    """Write the snapshot SNAP of MOUNT to standard output, as a stream for snapfs receive.

    Only blocks that hold data are sent; with --from only those that are other than in BASE, which the receiver
    must have received. The stream is compressed and carries checksums. The format is told in
    docs/stream-format.md.
    """
    if sys.stdout is None:
        raise BadCommandError("standard output is closed", "Write to a file or a pipe: snapfs send ... > file")
    if sys.stdout.isatty():
        raise BadCommandError("a stream is not for a terminal", "Write it to a file or a pipe: snapfs send ... > file")
    resume = None if resume_token is None else ResumePoint.from_token(resume_token)
    with progress_bar(f"send {name}") as on_progress:
        send_stream(ask, mount_point, name, sys.stdout.buffer, base, resume, on_progress, level)


@click.command()
@click.argument("where", metavar="POOL|MOUNT", type=click.Path())
@click.option("--name", metavar="NAME", help="Call the snapshot so, and not as it was.")
@click.option("--force", is_flag=True, help="Roll back volumes that changed since the base of the stream.")
@click.option("--resumable", is_flag=True, help="Keep what a broken stream brought, and tell a token to go on with.")
@click.option("--tokens", is_flag=True, help="Receive nothing; list the tokens of streams that were cut off.")
@click.option(
    "--abandon",
    "given_up",
    metavar="TOKEN",
    help="Receive nothing; take back what this stream, which was cut off, brought.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the snapshot that was made as JSON.")
def receive(
    where: str, name: str | None, force: bool, resumable: bool, tokens: bool, given_up: str | None, as_json: bool
) -> None:
    """Read a stream of snapfs send from standard input, and make its snapshot.

    A whole stream makes its volumes; none of those names may be taken. A stream with a base needs that
    snapshot here, and its volumes as that holds them. The snapshot is made when all has come; what was sent
    is then read back from it, and it is deleted if it differs.

    A stream that breaks off leaves nothing behind. With --resumable what came is kept, and a token is
    told: give it to snapfs send --resume-token, and receive that stream with --resumable as well. With --abandon
    and the token it is given up, and what it brought is taken back.
    """
    if given_up is not None and (tokens or force or resumable or as_json or name is not None):
        raise click.UsageError("--abandon goes with no other option")
    if sys.stdin is None and not tokens and given_up is None:
        raise BadCommandError("standard input is closed", "Read the stream from a file or a pipe")
    # So that what it brought is taken back, and what it mounted is unmounted.
    end_on_signals()
    with _mounted(where) as mount_point:
        if tokens:
            for token in resume_tokens(ask, mount_point):
                click.echo(token)
            return
        if given_up is not None:
            for left in abandon(ask, mount_point, given_up):
                say(f"volume {left!r} stays as the stream left it: its base is gone", err=True)
            return
        with progress_bar("receive") as on_progress:
            receiver = Receiver(ask, claimed_stream, mount_point, force=force, is_resumable=resumable)
            try:
                made = receiver.receive(sys.stdin.buffer, name, on_progress)
            except (KeyboardInterrupt, SystemExit):
                if receiver.undo:
                    say(f"what somebody else wrote meanwhile is in snapshot {receiver.undo!r}", err=True)
                raise
    if as_json:
        print_json(made)
    else:
        click.echo(made["name"])
