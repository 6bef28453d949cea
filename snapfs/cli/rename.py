"""``snapfs rename``."""

from __future__ import annotations

import click

from .control import ask


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.argument("old")
@click.argument("new")
def rename(mount_point: str, old: str, new: str) -> None:
    """Give the snapshot OLD of MOUNT the name NEW."""
    ask(mount_point, "rename", old, new)
