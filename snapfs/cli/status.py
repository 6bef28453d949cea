"""``snapfs status``."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any

import click

from ..units import format_size
from .control import control_path, meta_folder
from .output import print_json, print_table, say
from .silence import answered_soon


@click.command()
# No path to click, which looks at it, and waits for a daemon that does not answer.
@click.argument("mount_point", metavar="MOUNT")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(mount_point: str, as_json: bool) -> None:
    """Show health, space, devices and processors of MOUNT."""
    pool, processors = answered_soon(mount_point, partial(_told_by, mount_point))
    if as_json:
        print_json({**pool, "processors": processors})
        return
    space = pool["space"]
    click.echo(f"pool {pool['pool_id']}: {pool['health']}, daemon {pool['pid']}")
    last_commit = pool["last_commit"] or "none yet"
    click.echo(f"{pool['volume_count']} volumes, {pool['snapshot_count']} snapshots, last commit {last_commit}")
    click.echo(
        f"{format_size(space['mapped_bytes'])} mapped, {format_size(space['free_bytes'])}"
        f" free of {format_size(space['total_bytes'])}"
    )
    for stuck in pool["stuck_calls"]:
        say(f"stuck: {stuck['what']} of the {stuck['where']}, for {stuck['age_s']:.0f} s")
    for job in pool["jobs"]:
        say(f"job {job['name']}: {job['kind']} of {job['what']}, {_share(job)}, since {job['started']}")
    for failed in pool["failed_volumes"]:
        say(f"volume {failed['volume']}: {failed['reason']}")
    for schedule in pool["schedules"]:
        if schedule["failure"]:
            say(f"schedule {schedule['name']}: {schedule['failure']}")
    print_table(
        [" DEVICE", "PATH", "STATE", " FREE", " OF"],
        [
            [
                str(one["device_id"]),
                one["path"] or "",
                one["state"],
                _size(one["free_bytes"]),
                _size(one["total_bytes"]),
            ]
            for one in pool["devices"]
        ],
    )
    print_table(
        [" PROCESSOR", " VOLUMES", " OBJECTS", " MAPPED", " LOGS", " SNAPSHOTS", " DIRTY"],
        [
            [
                str(one["processor"]),
                str(one["volume_count"]),
                _count(one["object_count"]),
                format_size(one["mapped_bytes"]),
                _count(one["change_log_count"]),
                str(one["intermediate_snapshot_count"]),
                str(one["dirty_object_count"]),
            ]
            for one in processors
        ],
    )


def _told_by(mount_point: str) -> tuple[Any, list[Any]]:
    """What the daemon tells of the pool, and of each processor."""
    control_path(mount_point)
    folder = meta_folder(mount_point)
    pool = _load(os.path.join(folder, "status.json"))
    names = sorted(os.listdir(os.path.join(folder, "processors")), key=lambda name: int(name.split(".")[0]))
    return pool, [_load(os.path.join(folder, "processors", name)) for name in names]


def _share(job: dict[str, Any]) -> str:
    """How far a job is, as words."""
    return f"{min(100, 100 * job['done'] // job['total'])} % done" if job["total"] else "under way"


def _size(value: int | None) -> str:
    return "?" if value is None else format_size(value)


def _count(value: int | None) -> str:
    return "?" if value is None else str(value)


def _load(path: str) -> Any:
    with open(path) as file:
        return json.load(file)
