"""``snapfs rollback``."""

from __future__ import annotations

import click

from .control import ask
from .output import print_json


@click.command()
@click.argument("mount_point", metavar="MOUNT", type=click.Path())
@click.argument("name")
@click.option("--volume", "volumes", multiple=True, metavar="VOLUME", help="Only this volume; may be given again.")
@click.option("--force", is_flag=True, help="Also volumes that are open: their users see other contents at once.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def rollback(mount_point: str, name: str, volumes: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Put the volumes of MOUNT back to what the snapshot NAME holds.

    All volumes of the snapshot go back at one instant, or those given with --volume. The present is
    kept as a snapshot first, whose name is printed: a rollback to that one undoes this one. Newer
    snapshots stay. Volumes removed since come back; volumes made since stay as they are. Takes the
    same time whatever the size; but copy-on-write volumes are copied back, which takes as long as what
    changed, and one that was removed cannot come back: clone it.

    A volume that was renamed since goes back under the name that it has now; named with --volume it is
    refused. Where another volume has the name by now, as after an editor that saves by renaming, rename
    that one first, or clone what the snapshot has.

    A volume that is open is refused (EBUSY). With --force its users read the old contents from the
    next read on; a filesystem that is mounted from it will not expect that, so unmount it first.
    """
    options = [("volume", one) for one in volumes] + ([("force", "yes")] if force else [])
    answer = ask(mount_point, "rollback", name, options=options)
    if as_json:
        print_json(answer)
    else:
        click.echo(answer["undo"])
