"""``snapfs flatten``."""

from __future__ import annotations

import click

from ..units import format_size
from .control import ask_for_job
from .output import print_json


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.argument("volume")
@click.option("--json", "as_json", is_flag=True, help="Print what was copied as JSON.")
def flatten(mount_point: str, volume: str, as_json: bool) -> None:
    """Make the clone VOLUME of MOUNT independent: copy every block it shares with others.

    It may be in use meanwhile. Afterwards no snapshot is kept for it and nothing of what it was
    cloned from. Stopped halfway, what was copied stays copied; run it again to go on.
    """
    answer = ask_for_job(mount_point, "flatten", volume)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"copied {format_size(answer['copied_bytes'])}")
