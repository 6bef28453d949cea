"""``snapfs diff`` and ``snapfs blame``."""

from __future__ import annotations

import os

import click

from ..units import format_size
from .control import ask
from .output import print_json, print_table, say


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.argument("first", metavar="A")
@click.argument("second", metavar="[B]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every extent.")
def diff(mount_point: str, first: str, second: str | None, as_json: bool) -> None:
    """Show what changed on MOUNT from the snapshot A to the snapshot B, or until now.

    For each volume the extents that differ, with offset and length in bytes, and whether they hold
    data or read as zeros now. A volume is followed through renames and rollbacks. The time it takes
    follows what changed, not the size of the volumes. Blocks written again with the same contents
    count as changed.
    """
    changes = ask(mount_point, "diff", first, *([second] if second is not None else []))["volumes"]
    if as_json:
        print_json(changes)
        return
    for one in changes:
        renamed = f", was {one['renamed_from']}" if one["renamed_from"] else ""
        sizes = "" if one["size_bytes"] == one["size_bytes_before"] else f", now {one['size_bytes']} bytes"
        say(f"{one['change']} {one['name']}: {format_size(one['changed_bytes'])}{sizes}{renamed}")
        for extent in one["extents"]:
            click.echo(f"  {extent['offset']}\t{extent['length']}\t{extent['kind']}")


@click.command()
@click.argument("volume", metavar="MOUNT/VOLUME", type=click.Path())
@click.option("--offset", required=True, metavar="N", help="Where in the volume, in bytes or as 10G.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def blame(volume: str, offset: str, as_json: bool) -> None:
    """Show between which snapshots the block at an offset of a volume changed, newest change first."""
    mount_point, name = os.path.split(os.path.abspath(volume))
    changes = ask(mount_point, "blame", name, offset)["changes"]
    if as_json:
        print_json(changes)
        return
    print_table(
        ["CHANGED AFTER", "CREATED", "AND BEFORE", "CREATED"],
        [
            [
                one["after"]["name"] if one["after"] else "-",
                one["after"]["created"][:19] + "Z" if one["after"] else "",
                one["before"]["name"] if one["before"] else "now",
                one["before"]["created"][:19] + "Z" if one["before"] else "",
            ]
            for one in changes
        ],
    )
