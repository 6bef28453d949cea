"""``snapfs stop``."""

from __future__ import annotations

import click

from .control import ask
from .output import print_json


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.argument("job")
@click.option("--json", "as_json", is_flag=True, help="Print what was stopped as JSON.")
def stop(mount_point: str, job: str, as_json: bool) -> None:
    """Stop the JOB of MOUNT: a scrub, verify or flatten, by its name in snapfs status.

    What it did so far stays; whoever asked for it is told that it was stopped.
    """
    answer = ask(mount_point, "stop", job)
    if as_json:
        print_json(answer)
