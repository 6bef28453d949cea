"""``snapfs snapshot``."""

from __future__ import annotations

import click

from .control import ask
from .output import print_json


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.argument("name", required=False)
@click.option("--volume", "volumes", multiple=True, metavar="VOLUME", help="Of this volume only; may be given again.")
@click.option("--hold", "hold_tags", multiple=True, metavar="TAG", help="Hold it by this tag; may be given again.")
@click.option("--note", default="", help="A text to keep with it.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def snapshot(
    mount_point: str, name: str | None, volumes: tuple[str, ...], hold_tags: tuple[str, ...], note: str, as_json: bool
) -> None:
    """Make a snapshot of all volumes of MOUNT, or of those named, at one instant.

    Without NAME it is named by the time in UTC. When this returns it survives a power cut.
    """
    options = [("volume", one) for one in volumes] + ([("note", note)] if note else [])
    options += [("hold", tag) for tag in hold_tags]
    answer = ask(mount_point, "snapshot", *([name] if name is not None else []), options=options)
    if as_json:
        print_json(answer)
    else:
        click.echo(answer["name"])
