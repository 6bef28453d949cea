"""``snapfs create``."""

from __future__ import annotations

import os

import click

from ..formats import CHANGE_MODES
from .control import ask
from .output import print_json


@click.command()
@click.argument("volume", metavar="MOUNT/VOLUME", type=click.Path())
@click.option(
    "--size", metavar="SIZE", help="As 10G, or in bytes; with --source as that if left out, and not less in mode cow."
)
@click.option(
    "--mode",
    type=click.Choice(list(CHANGE_MODES)),
    default="redirect",
    show_default=True,
    help="How changes are logged: new data goes to the log, or old data does and the source is overwritten.",
)
@click.option("--source", metavar="RAW", type=click.Path(), help="A raw image or block device to stand on.")
@click.option("--change-log", metavar="NAME", help="The change log volume to log changes in.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def create(volume: str, size: str | None, mode: str, source: str | None, change_log: str | None, as_json: bool) -> None:
    """Create a volume. It reads as zeros and takes no space.

    With --source it shows the contents of a raw image or a block device, at once and without
    copying. In mode redirect the image is the untouched base: it is only read, and must not be
    changed while the volume is there. In mode cow the image is overwritten in place and stays a plain
    image, which other tools can read once MOUNT is unmounted; what snapshots need of it is preserved
    in the change log first, durably. An image is not removed with its volume, and must stay where
    it is while a snapshot holds the volume.

    With --change-log the changes since each snapshot are kept in that change log volume; see
    snapfs changelog.
    """
    if size is None and source is None:
        raise click.UsageError("give --size, or --source to be as large as that")
    mount_point, name = os.path.split(os.path.abspath(volume))
    options = [("mode", mode)]
    options += [("size", size)] if size is not None else []
    options += [("source", os.path.abspath(source))] if source is not None else []
    options += [("change-log", change_log)] if change_log is not None else []
    answer = ask(mount_point, "create", name, options=options)
    if as_json:
        print_json(answer)
