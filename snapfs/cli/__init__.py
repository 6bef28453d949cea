"""The command line: one command a file, each a thin face over the pool or the mount.

Exit codes: 0 done, 1 failed, 2 wrong usage, 4 damage found.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import cast

import click

from ..errors import SnapfsError
from .output import open_closed_streams, print_any_name, say
from .utf8 import use_utf8

# The module a command is in, and what it is called there.
_COMMANDS = {
    "init": "init:init",
    "mount": "mount:mount",
    "umount": "umount:umount",
    "create": "create:create",
    "changelog": "changelog:changelog",
    "schedule": "schedule:schedule",
    "snapshot": "snapshot:snapshot",
    "list": "listing:list_snapshots",
    "delete": "delete:delete",
    "reclaim": "delete:reclaim",
    "rename": "rename:rename",
    "rollback": "rollback:rollback",
    "clone": "clone:clone",
    "send": "transfer:send",
    "receive": "transfer:receive",
    "export": "images:export_volume",
    "import": "images:import_volume",
    "diff": "diff:diff",
    "blame": "diff:blame",
    "flatten": "flatten:flatten",
    "hold": "hold:hold",
    "hook": "hook:hook",
    "release": "hold:release",
    "status": "status:status",
    "stop": "stop:stop",
    "check": "check:check",
    "scrub": "trust:scrub",
    "verify": "trust:verify",
}


class _Commands(click.Group):
    """Commands that are imported when they are asked for: the pool and trio take longer than most of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; but ``snapfs POOL MOUNT -o ...``, as mount(8) says for the type fuse.snapfs, mounts."""
        if args[0] not in _COMMANDS and os.sep in args[0]:
            return "mount", self.get_command(ctx, "mount"), args
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        return cast("click.Command", getattr(import_module(f".{module}", __name__), name))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="snapfs")
def cli() -> None:
    """Virtual volumes as files, snapshots as read-only directories."""


def main() -> None:
    """Run the command line; errors are one sentence or two on stderr."""
    try:
        use_utf8()
        open_closed_streams()
        print_any_name()
        cli.main(standalone_mode=False)
    except SnapfsError as error:
        say(f"snapfs: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BaseExceptionGroup as group:
        # Ctrl-C within tasks, of a daemon that begins, say.
        if group.split(KeyboardInterrupt)[1] is not None:
            raise
        click.echo("snapfs: stopped", err=True)
        sys.exit(1)
    except click.Abort:
        click.echo("snapfs: stopped", err=True)
        sys.exit(1)
    except OSError as error:
        say(f"snapfs: {error}", err=True)
        sys.exit(1)
