"""``snapfs export`` and ``snapfs import``."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import click

from ..errors import NotAllowedError, NotFoundError, ReadOnlyError
from ..images import FORMATS, RAW, Extents, export_image, import_image
from ..transfer import open_in_snapshot, snapshot_folder
from .control import ask, control_path
from .ending import end_on_signals
from .output import progress_bar


@click.command("export")
@click.argument("volume", metavar="MOUNT[/.snapshots/NAME]/VOLUME", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--format", "image_format", type=click.Choice(FORMATS), default=RAW, show_default=True)
def export_volume(volume: str, target: str, image_format: str) -> None:
    """Copy a volume, or what a snapshot holds of it, to the new disk image TARGET.

    A raw image of a snapshot's volume is sparse: only what holds data is read and written. Other
    formats are made with qemu-img, which must be installed (qemu-utils); there sizes are multiples of 512.
    """
    end_on_signals()
    path = os.path.abspath(volume)
    if not _is_file(path) or _is_of_snapfs(path):
        raise _no_volume(volume)
    with progress_bar(f"export {os.path.basename(path)}") as on_progress, _opened(path) as (source, extents):
        export_image(source, extents, target, image_format, on_progress)


def _is_file(path: str) -> bool:
    """Whether a file is there. Raises OSError where that cannot be told, as of a mount whose daemon is dead."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _is_of_snapfs(path: str) -> bool:
    """Whether a file is one of those in which a mount tells of itself."""
    folder, inside = os.path.split(path)
    while not os.path.ismount(folder) and folder != os.sep:
        folder, last = os.path.split(folder)
        inside = os.path.join(last, inside)
    return inside.startswith(f".snapfs{os.sep}")


def _no_volume(path: str) -> NotFoundError:
    return NotFoundError(f"there is no volume {path}", "Give the path of one, or of one in a snapshot")


@contextmanager
def _opened(path: str) -> Iterator[tuple[IO[bytes], Extents]]:
    """A volume, and where it holds data: of one in a snapshot; all of a live one."""
    folder, name = os.path.split(path)
    outer, snapshot = os.path.split(folder)
    mount_point, snapshots = os.path.split(outer)
    if snapshots != ".snapshots":
        with _opened_whole(path) as opened_whole:
            yield opened_whole
        return
    # What it answers tells which one a moment names: by the next look that may be another.
    try:
        plan = ask(mount_point, "extents", snapshot)
    except (ReadOnlyError, NotAllowedError):
        # It is read all the same, only not so fast.
        with _opened_whole(path) as opened_whole:
            yield opened_whole
        return
    extents = next((one["extents"] for one in plan["volumes"] if one["name"] == name), None)
    if extents is None:
        raise _no_volume(path)
    with snapshot_folder(mount_point, plan["snapshot"]) as opened:
        fd = open_in_snapshot(opened, plan["snapshot"], name)
    with os.fdopen(fd, "rb", buffering=0) as source:
        yield source, [(offset, length) for offset, length, is_data in extents if is_data]


@contextmanager
def _opened_whole(path: str) -> Iterator[tuple[IO[bytes], Extents]]:
    """A file, all of which may hold data."""
    with open(path, "rb", buffering=0) as source:
        yield source, [(0, os.fstat(source.fileno()).st_size)]


@click.command("import")
@click.argument("image", type=click.Path())
@click.argument("volume", metavar="MOUNT/VOLUME", type=click.Path())
@click.option("--format", "image_format", type=click.Choice(FORMATS), help="What IMAGE is; found out if left out.")
def import_volume(image: str, volume: str, image_format: str | None) -> None:
    """Copy the disk image IMAGE to the new volume VOLUME.

    The holes of a raw image stay holes. Other formats are read with qemu-img, which must be installed
    (qemu-utils). To use a raw image where it lies, without copying: snapfs create --source.
    """
    end_on_signals()
    control_path(os.path.dirname(os.path.abspath(volume)))
    with progress_bar(f"import {os.path.basename(volume)}") as on_progress:
        import_image(image, volume, image_format, on_progress)
