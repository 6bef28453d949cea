"""``snapfs scrub`` and ``snapfs verify``."""

from __future__ import annotations

import sys

import click

from ..errors import DamagedError
from ..units import format_size
from .control import ask_for_job
from .output import print_json, print_table, say

_DAMAGED = DamagedError.exit_code


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.option("--rate", metavar="SIZE", help="Read at most so much a second, such as 100M.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def scrub(mount_point: str, rate: str | None, as_json: bool) -> None:
    """Read all that is sealed on MOUNT from its devices, and hold it against its checksums.

    What snapshots hold is sealed in the background soon after they are made; what was written since, and
    the sources of copy-on-write volumes, are not, and are not looked at. Each damaged block is named
    with the volumes and snapshots that have it, up to 4,096 of them, also in .snapfs/status.json until a
    scrub finds it no more or the pool is unmounted.

    Exit codes: 0 nothing damaged, 4 damage found.
    """
    answer = ask_for_job(mount_point, "scrub", options=[("rate", rate)] if rate is not None else [])
    if as_json:
        print_json(answer)
    else:
        rate_shown = format_size(int(answer["checked_bytes"] / max(answer["duration_ms"] / 1e3, 1e-3)))
        click.echo(f"checked {format_size(answer['checked_bytes'])}, {rate_shown} a second")
        if answer["unsealed_bytes"]:
            click.echo(f"not sealed yet, and not checked: {format_size(answer['unsealed_bytes'])}")
        _print_damaged(answer["damaged_blocks"])
        for line in answer["unreadable_logs"]:
            say(f"cannot be read: {line}")
        if answer["damaged_block_count"] > len(answer["damaged_blocks"]):
            click.echo(f"damaged blocks in all: {answer['damaged_block_count']}")
    if answer["damaged_block_count"] or answer["unreadable_logs"]:
        sys.exit(_DAMAGED)


def _print_damaged(blocks: list[dict[str, object]]) -> None:
    if not blocks:
        return
    rows = []
    for block in blocks:
        for one in block["volumes"]:  # type: ignore[attr-defined]
            snapshots = one.get("snapshots", [])
            more = "…" if one.get("snapshot_count", 0) > len(snapshots) else ""
            rows.append(
                [
                    one.get("volume", one.get("reason", "")),
                    str(block["offset"]),
                    "yes" if one.get("is_live") else "no",
                    " ".join(snapshots) + more,
                ]
            )
    print_table(["DAMAGED VOLUME", " OFFSET", "LIVE", "IN SNAPSHOTS"], rows)


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.argument("name")
@click.option("--root", metavar="HEX", help="The root it must have, as written down when it was sealed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(mount_point: str, name: str, root: str | None, as_json: bool) -> None:
    """Prove that the snapshot NAME of MOUNT holds what it was sealed with.

    All of it is read, and its root worked out anew. The root is over the names, the sizes and every byte
    of its volumes; no other contents can have the same (BLAKE2b and MuHash). It is in .manifest.json, beside
    that of the snapshot before. Whoever could change the pool could change the stored root too: keep a copy
    elsewhere, and give it with --root.

    Exit codes: 0 proven, 1 not sealed yet, 4 it is not what was sealed.
    """
    answer = ask_for_job(mount_point, "verify", name)
    proven = answer["is_proven"] and (root is None or root.lower() == answer["root"])
    if as_json:
        print_json({**answer, "is_proven": proven})
    else:
        click.echo(f"root {answer['root']}")
        for one in answer["damaged"]:
            say(f"damaged: {one['volume']} at offset {one['offset']}")
        for volume in answer["unsealed_volumes"]:
            say(f"not covered: {volume}, which lies in a source outside of the change logs")
        if proven:
            click.echo(f"proven: {format_size(answer['checked_bytes'])} are what was sealed")
        elif root is not None and root.lower() != answer["root"]:
            click.echo("not proven: the snapshot was sealed with another root than the one given")
        else:
            click.echo("not proven: what it holds is not what was sealed")
    if not proven:
        sys.exit(_DAMAGED)
