"""``snapfs delete``."""

from __future__ import annotations

import click

from ..units import format_size
from .control import ask
from .output import print_json


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.argument("names", metavar="NAME…", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Say what would be freed, and delete nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def delete(mount_point: str, names: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Delete snapshots of MOUNT. Their space comes back in the background."""
    if dry_run:
        found = ask(mount_point, "list", *names)["snapshots"]
        if as_json:
            print_json([{"name": one["name"], "would_free_bytes": one["exclusive_bytes"]} for one in found])
            return
        for one in found:
            click.echo(f"would delete {one['name']}, which alone holds {format_size(one['exclusive_bytes'])}")
        return
    answers = [ask(mount_point, "delete", name) for name in names]
    if as_json:
        print_json(answers)
