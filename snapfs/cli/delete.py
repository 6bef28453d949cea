"""``snapfs delete`` and ``snapfs reclaim``."""

from __future__ import annotations

import click

from ..units import format_size
from .control import ask
from .output import print_json, say


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.argument("names", metavar="NAME…", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Say what would be freed, and delete nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def delete(mount_point: str, names: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Delete snapshots of MOUNT. Their space comes back in the background.

    With --dry-run it is told, to the block, what each holds alone, and what deleting all of them
    frees: that is more than the sum, when blocks are held by several of them and by nothing else.
    """
    if not dry_run:
        answer = ask(mount_point, "delete", *names)
        if as_json:
            print_json(answer)
        return
    answer = ask(mount_point, "delete", *names, options=[("dry-run", "yes")])
    if as_json:
        print_json(answer)
        return
    for one in answer["would_delete"]:
        held = f"; held by {', '.join(one['holds'])}" if one["holds"] else ""
        say(f"would delete {one['name']}, which alone holds {format_size(one['would_free_bytes'])}{held}")
    click.echo(f"together they would free {format_size(answer['would_free_bytes'])}")


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.option("--need", required=True, metavar="SIZE", help="How much is to be freed, as 20G.")
@click.option("--dry-run", is_flag=True, help="Say which would be deleted, and delete nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def reclaim(mount_point: str, need: str, dry_run: bool, as_json: bool) -> None:
    """Delete the fewest snapshots of MOUNT that free so much, and wait until it is free.

    None goes that a tag holds, or of which a file is open. If all together do not free enough, none is deleted.
    With clones, or with very many snapshots, the set may not be the smallest there is; then that is said.
    """
    options = [("need", need)] + ([("dry-run", "yes")] if dry_run else [])
    answer = ask(mount_point, "reclaim", options=options)
    if as_json:
        print_json(answer)
        return
    for name in answer["would_delete" if dry_run else "deleted"]:
        say(f"would delete {name}" if dry_run else f"deleted {name}")
    freed = format_size(answer["would_free_bytes" if dry_run else "freed_bytes"])
    click.echo(f"would free {freed}" if dry_run else f"freed {freed}")
    if not answer.get("is_freed", True):
        click.echo(
            "an open file or a clone of one of them keeps some of it: that comes back when it is closed, or gone"
        )
    if not answer["is_smallest"]:
        click.echo("there may be a smaller set")
