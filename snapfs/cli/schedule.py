"""``snapfs schedule``."""

from __future__ import annotations

from typing import Any

import click

from ..units import iso_time
from .anywhere import ask_anywhere
from .control import ask
from .output import print_json, print_table


@click.group()
def schedule() -> None:
    """Have the daemon make snapshots by itself, and delete old ones by rule.

    Several schedules go on side by side. They are kept in the pool and run while it is mounted; what
    was missed while it was not is made up once. All times are UTC, so clock changes do not matter.
    Rules delete only what their own schedule made, never a snapshot that was made by hand or that a
    tag holds.
    """


@schedule.command()
@click.argument("where", metavar="POOL|MOUNT", type=click.Path())
@click.argument("name")
@click.option("--every", required=True, metavar="TIME", help="The period: 30s, 15m, 1h, 1d, 1w.")
@click.option("--at", metavar="HH:MM", help="The time of day in UTC, for periods of whole days.")
@click.option("--volume", "volumes", multiple=True, metavar="VOLUME", help="Only of this volume; may be given again.")
@click.option(
    "--keep",
    default="",
    metavar="RULES",
    help="As 24h,30d,12m,5y: the newest of each of the last 24 hours that have any, of 30 days, and so on;"
    " w is weeks, a number alone the newest so many. Without rules all are kept.",
)
@click.option("--hold", "hold_tags", multiple=True, metavar="TAG", help="Hold each by this tag; may be given again.")
@click.option("--skip-unchanged", is_flag=True, help="Make none when nothing changed since its last one.")
@click.option("--dry-run", is_flag=True, help="Only list what the rules would delete now.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def add(
    where: str,
    name: str,
    every: str,
    at: str | None,
    volumes: tuple[str, ...],
    keep: str,
    hold_tags: tuple[str, ...],
    skip_unchanged: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Add the schedule NAME. Its snapshots are called NAME and the time: hourly-2026-11-22T080000Z."""
    options = [("every", every), ("keep", keep)] if keep else [("every", every)]
    options += [("at", at)] if at is not None else []
    options += [("volume", one) for one in volumes] + [("hold", one) for one in hold_tags]
    options += [("skip-unchanged", "yes")] if skip_unchanged else []
    options += [("dry-run", "yes")] if dry_run else []
    answer = ask_anywhere(where, "schedule", "add", name, options=options)
    if as_json:
        print_json(answer)
    elif dry_run:
        for one in answer["would_delete"]:
            click.echo(one)


@schedule.command()
@click.argument("where", metavar="POOL|MOUNT", type=click.Path())
@click.argument("name")
def remove(where: str, name: str) -> None:
    """Remove the schedule NAME. Its snapshots stay."""
    ask_anywhere(where, "schedule", "remove", name)


@schedule.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Make nothing; only list what the rules would delete now.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def run(mount_point: str, name: str, dry_run: bool, as_json: bool) -> None:
    """Do now what the schedule NAME does: make a snapshot, and delete what its rules do not keep."""
    answer = ask(mount_point, "schedule", "run", name, options=[("dry-run", "yes")] if dry_run else [])
    if as_json:
        print_json(answer)
    elif dry_run:
        for one in answer["would_delete"]:
            click.echo(one)
    elif answer["made"] is not None:
        click.echo(answer["made"])


@schedule.command("list")
@click.argument("where", metavar="POOL|MOUNT", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_schedules(where: str, as_json: bool) -> None:
    """List the schedules: their periods, rules, and when they are due."""
    found = ask_anywhere(where, "schedule", "list")["schedules"]
    if as_json:
        print_json(found)
        return
    print_table(
        ["NAME", " EVERY", "OF", "KEEP", "NEXT", "FAILURE"],
        [
            [
                one["name"],
                *_rule(one),
                one["failure"] or "",
            ]
            for one in found
        ],
    )


def _rule(one: dict[str, Any]) -> list[str]:
    """Period, volumes, what is kept, and when it is due; nothing of a damaged one."""
    if one["every_s"] is None:
        return ["", "", "", ""]
    volumes = ", ".join(one["volumes"]) if one["volumes"] else "all"
    return [f"{one['every_s']} s", volumes, one["keep"] or "all", _moment(one["next_run_ns"])]


def _moment(when_ns: int) -> str:
    try:
        return iso_time(when_ns)[:19] + "Z"
    except (ValueError, OverflowError):
        # By a rule of an earlier version, which took any period.
        return "after 9999"
