"""``snapfs changelog``."""

from __future__ import annotations

import os

import click

from ..units import format_size
from .anywhere import ask_anywhere
from .output import print_json, print_table

_WHERE = {"metavar": "POOL|MOUNT", "type": click.Path()}


@click.group()
def changelog() -> None:
    """Keep change logs in a place of their own: change log volumes.

    A change log volume is a named set of directories with a capacity, spread over the processors.
    Volumes that are created with --change-log NAME log there what changed since each snapshot. When
    it is full their writers get ENOSPC; no snapshot is ever given up for that, unless it was
    created with --free-oldest: then the oldest go from 95 percent on, and who writes faster than
    that gives room back still gets ENOSPC. Events tell when it is 80 and 95 percent full.

    Redirecting volumes keep there what was written since their first snapshot, until it is
    overwritten in a later epoch or the volume goes; copy-on-write volumes keep there only what
    snapshots need.
    """


@changelog.command()
@click.argument("where", **_WHERE)  # type: ignore[arg-type]
@click.argument("name")
@click.option("--device", "devices", multiple=True, required=True, type=click.Path(), help="An empty directory.")
@click.option("--capacity", required=True, metavar="SIZE", help="How much may be kept there, as 50G.")
@click.option("--free-oldest", is_flag=True, help="Full, delete the oldest snapshots that nothing holds.")
@click.option("--json", "as_json", is_flag=True, help="Print what was made as JSON.")
def create(where: str, name: str, devices: tuple[str, ...], capacity: str, free_oldest: bool, as_json: bool) -> None:
    """Create the change log volume NAME, on one or more empty directories."""
    options = [("capacity", capacity)] + [("device", os.path.abspath(path)) for path in devices]
    options += [("free-oldest", "yes")] if free_oldest else []
    answer = ask_anywhere(where, "changelog", "create", name, options=options)
    if as_json:
        print_json(answer)


@changelog.command()
@click.argument("where", **_WHERE)  # type: ignore[arg-type]
@click.argument("name")
@click.argument("capacity", metavar="SIZE")
@click.option("--json", "as_json", is_flag=True, help="Print what it is now as JSON.")
def resize(where: str, name: str, capacity: str, as_json: bool) -> None:
    """Give the change log volume NAME another capacity.

    Less than is in use is allowed: then nothing more goes in until snapshots are deleted.
    """
    answer = ask_anywhere(where, "changelog", "resize", name, capacity)
    if as_json:
        print_json(answer)


@changelog.command()
@click.argument("where", **_WHERE)  # type: ignore[arg-type]
@click.argument("name")
def remove(where: str, name: str) -> None:
    """Remove the change log volume NAME, which nothing may use any more.

    Its directories keep empty folders below logs/; remove those before they are used again.
    """
    ask_anywhere(where, "changelog", "remove", name)


@changelog.command("list")
@click.argument("where", **_WHERE)  # type: ignore[arg-type]
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_changelogs(where: str, as_json: bool) -> None:
    """List the change log volumes: where they are and how full."""
    found = ask_anywhere(where, "changelog", "list")["change_log_volumes"]
    if as_json:
        print_json(found)
        return
    print_table(
        ["NAME", " USED", " OF", " FULL", "DEVICES"],
        [
            [
                one["name"],
                format_size(one["used_bytes"]),
                format_size(one["capacity_bytes"]),
                f"{one['percent']} %",
                " ".join(device["path"] for device in one["devices"]),
            ]
            for one in found
        ],
    )
