"""``snapfs check``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import click
import trio

from ..backends import DirectoryDevice
from ..check import Report, check_pool, repair
from ..descriptor import open_home
from ..ownership import device_opener
from .output import print_json, say

_EXIT_DAMAGE = 4
T = TypeVar("T")


@click.command()
@click.argument("pool", type=click.Path())
@click.option("--repair", "with_repair", is_flag=True, help="Repair what can be repaired without guessing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(pool: str, with_repair: bool, as_json: bool) -> None:
    """Verify the pool in the directory POOL, which must not be mounted.

    Changes nothing without --repair. Exits with 4 when data or snapshots are damaged or space has leaked.
    """
    done: list[str] = []
    report = _with_home(pool, _check, writable=False)
    if with_repair and report.is_damaged:
        click.echo("nothing was repaired: repairing a damaged pool would be guessing", err=True)
    elif with_repair:
        done = _with_home(pool, _repair, writable=True)
        report = _with_home(pool, _check, writable=False)
    if as_json:
        print_json({**report.to_json(), "repaired": done})
    else:
        for sentence in done:
            say(f"repaired: {sentence}")
        for finding in report.findings:
            say(f"{finding.severity}: {finding.where}: {finding.what}")
        click.echo(
            f"{report.volume_count} volumes, {report.snapshot_count} snapshots, {report.object_count} objects,"
            f" {report.copy_count} point-in-time copies, {report.log_count} change logs:"
            f" {'clean' if report.is_clean else 'not clean'}"
        )
    sys.exit(0 if report.is_clean else _EXIT_DAMAGE)


def _check(home: DirectoryDevice, where: str) -> Report:
    return check_pool(home, where, device_opener(home, writable=False))


def _repair(home: DirectoryDevice, where: str) -> list[str]:
    return trio.run(repair, home, where, device_opener(home))


def _with_home(pool: str, call: Callable[[DirectoryDevice, str], T], *, writable: bool) -> T:
    home = open_home(pool, writable=writable)
    try:
        return call(home, pool)
    finally:
        home.close()
