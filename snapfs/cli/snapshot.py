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
@click.option("--max-stall", metavar="TIME", help="Make none if it holds things up for longer: 50ms, 1s.")
@click.option("--no-hooks", is_flag=True, help="Run no hooks.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def snapshot(
    mount_point: str,
    name: str | None,
    volumes: tuple[str, ...],
    hold_tags: tuple[str, ...],
    note: str,
    max_stall: str | None,
    no_hooks: bool,
    as_json: bool,
) -> None:
    """Make a snapshot of all volumes of MOUNT, or of those named, at one instant.

    Without NAME it is named by the time in UTC. When this returns it survives a power cut. How long it
    kept the daemon from serving is stored with it, and how long hooks kept applications frozen.
    """
    options = [("volume", one) for one in volumes] + ([("note", note)] if note else [])
    options += [("hold", tag) for tag in hold_tags]
    options += ([("max-stall", max_stall)] if max_stall is not None else []) + ([("hooks", "no")] if no_hooks else [])
    answer = ask(mount_point, "snapshot", *([name] if name is not None else []), options=options)
    if as_json:
        print_json(answer)
    else:
        click.echo(answer["name"])
