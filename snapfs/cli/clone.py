"""``snapfs clone``."""

from __future__ import annotations

import click

from .control import ask
from .output import print_json


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.argument("source", metavar="NAME/VOLUME")
@click.argument("new")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def clone(mount_point: str, source: str, new: str, as_json: bool) -> None:
    """Make the volume NEW of MOUNT out of what the snapshot NAME holds of VOLUME.

    It is there at once, whatever its size, and can be written; it shares all blocks with the
    snapshot until they are written. It has the mode and the owner that VOLUME had then. The snapshot
    can be deleted meanwhile; what the clone still shows of it stays. See also snapfs flatten.
    """
    answer = ask(mount_point, "clone", source, new)
    if as_json:
        print_json(answer)
