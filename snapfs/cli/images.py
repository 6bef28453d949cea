"""``snapfs export`` and ``snapfs import``."""

from __future__ import annotations

import os

import click

from ..errors import NotFoundError
from ..images import FORMATS, RAW, export_image, image_format_of, import_image
from .control import ask, control_path
from .output import progress_bar


@click.command("export")
@click.argument("volume", metavar="MOUNT[/.snapshots/NAME]/VOLUME", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--format", "image_format", type=click.Choice(FORMATS), default=RAW, show_default=True)
def export_volume(volume: str, target: str, image_format: str) -> None:
    """Copy a volume, or what a snapshot holds of it, to the new disk image TARGET.

    A raw image of a snapshot's volume is sparse: only what holds data is read and written. Other
    formats are made with qemu-img, which must be installed (qemu-utils).
    """
    path = os.path.abspath(volume)
    if not os.path.isfile(path):
        raise NotFoundError(f"there is no volume {volume}", "Give the path of one, or of one in a snapshot")
    with progress_bar(f"export {os.path.basename(path)}") as on_progress:
        export_image(path, _extents(path), target, image_format, on_progress)


def _extents(path: str) -> list[tuple[int, int]]:
    """Where a volume holds data: of one in a snapshot; all of a live one."""
    folder, name = os.path.split(path)
    outer, snapshot = os.path.split(folder)
    mount_point, snapshots = os.path.split(outer)
    if snapshots != ".snapshots":
        return [(0, os.path.getsize(path))]
    volumes = ask(mount_point, "extents", snapshot)["volumes"]
    found = next((one["extents"] for one in volumes if one["name"] == name), None)
    if found is None:
        raise NotFoundError(f"the snapshot {snapshot} holds no volume {name}", "Give the path of one")
    return [(offset, length) for offset, length, is_data in found if is_data]


@click.command("import")
@click.argument("image", type=click.Path())
@click.argument("volume", metavar="MOUNT/VOLUME", type=click.Path())
@click.option("--format", "image_format", type=click.Choice(FORMATS), help="What IMAGE is; found out if left out.")
def import_volume(image: str, volume: str, image_format: str | None) -> None:
    """Copy the disk image IMAGE to the new volume VOLUME.

    The holes of a raw image stay holes. Other formats are read with qemu-img, which must be installed
    (qemu-utils). To use a raw image where it lies, without copying: snapfs create --source.
    """
    control_path(os.path.dirname(os.path.abspath(volume)))
    with progress_bar(f"import {os.path.basename(volume)}") as on_progress:
        import_image(image, volume, image_format or image_format_of(image), on_progress)
