"""``snapfs list``."""

from __future__ import annotations

import click

from ..units import format_size
from .control import ask
from .output import print_json, print_table


@click.command("list")
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--no-space", is_flag=True, help="Leave out the sizes, which take time with many snapshots.")
def list_snapshots(mount_point: str, as_json: bool, no_space: bool) -> None:
    """List the snapshots of MOUNT: what each references, what was written since the one before, what it alone holds.

    What it alone holds is what deleting it would free; for several at once see delete --dry-run. Referenced
    are the blocks of its volumes; the other two count blocks in change logs.
    """
    snapshots = ask(mount_point, "list", options=[("space", "no")] if no_space else [])["snapshots"]
    if as_json:
        print_json(snapshots)
        return
    print_table(
        ["NAME", "CREATED", "OF", " REFERENCED", " WRITTEN", " EXCLUSIVE", "NOTE"],
        [
            [
                one["name"],
                one["created"][:19] + "Z",
                "all" if one["of_all_volumes"] else "some",
                format_size(one["referenced_bytes"]) if "referenced_bytes" in one else "",
                format_size(one["written_bytes"]) if "written_bytes" in one else "",
                format_size(one["exclusive_bytes"]) if "exclusive_bytes" in one else "",
                one["note"],
            ]
            for one in snapshots
        ],
    )
