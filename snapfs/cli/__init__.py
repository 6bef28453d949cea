"""The command line: one command a file, each a thin face over the pool or the mount.

Exit codes: 0 done, 1 failed, 2 wrong usage, 4 damage found.
"""

from __future__ import annotations

import sys

import click

from ..errors import SnapfsError
from . import (
    changelog,
    check,
    clone,
    create,
    delete,
    diff,
    flatten,
    hold,
    hook,
    images,
    init,
    listing,
    mount,
    rename,
    rollback,
    schedule,
    snapshot,
    status,
    transfer,
    trust,
    umount,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="snapfs")
def cli() -> None:
    """Virtual volumes as files, snapshots as read-only directories."""


for _command in (
    init.init,
    mount.mount,
    umount.umount,
    create.create,
    changelog.changelog,
    schedule.schedule,
    snapshot.snapshot,
    listing.list_snapshots,
    delete.delete,
    delete.reclaim,
    rename.rename,
    rollback.rollback,
    clone.clone,
    transfer.send,
    transfer.receive,
    images.export_volume,
    images.import_volume,
    diff.diff,
    diff.blame,
    flatten.flatten,
    hold.hold,
    hook.hook,
    hold.release,
    status.status,
    check.check,
    trust.scrub,
    trust.verify,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line; errors are one sentence or two on stderr."""
    try:
        cli.main(standalone_mode=False)
    except SnapfsError as error:
        click.echo(f"snapfs: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("snapfs: stopped", err=True)
        sys.exit(1)
    except OSError as error:
        click.echo(f"snapfs: {error}", err=True)
        sys.exit(1)
