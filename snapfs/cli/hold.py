"""``snapfs hold`` and ``snapfs release``."""

from __future__ import annotations

import click

from .control import ask
from .output import print_json


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.argument("name")
@click.argument("tag")
@click.option("--json", "as_json", is_flag=True, help="Print all tags of the snapshot as JSON.")
def hold(mount_point: str, name: str, tag: str, as_json: bool) -> None:
    """Keep the snapshot NAME of MOUNT from being deleted, by anyone or any rule.

    A snapshot can be held by several tags; it can be deleted once each is released. A deletion
    meanwhile fails with EBUSY and names the tags.
    """
    answer = ask(mount_point, "hold", name, tag)
    if as_json:
        print_json(answer)


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.argument("name")
@click.argument("tag")
@click.option("--json", "as_json", is_flag=True, help="Print the tags that are left as JSON.")
def release(mount_point: str, name: str, tag: str, as_json: bool) -> None:
    """Take the tag TAG from the snapshot NAME of MOUNT."""
    answer = ask(mount_point, "release", name, tag)
    if as_json:
        print_json(answer)
