"""``snapfs hook``."""

from __future__ import annotations

from typing import Any

import click

from .anywhere import ask_anywhere
from .output import print_json, print_table


@click.group()
def hook() -> None:
    """Have applications hold still while a snapshot is cut.

    A hook is a program that runs before a snapshot (it flushes and freezes an application) and one that
    runs after (it thaws it): as for fsfreeze, a database's backup mode, or a virtual machine's guest agent.
    They run for every snapshot, also by schedule and by mkdir, as the user of the daemon, in / and with
    nothing of its environment but PATH, LANG, SNAPFS_MOUNT, SNAPFS_SNAPSHOT, SNAPFS_HOOK and SNAPFS_PHASE.
    They may read and write the volumes, and give snapfs no commands. One that runs after should do no harm
    when it runs twice: it does, when the process that runs it is killed meanwhile.

    If the first fails or takes too long, no snapshot is made. The second runs whatever happens, also when
    the daemon is killed in between: right after the cut, before anything is written.
    """


@hook.command()
@click.argument("where", metavar="POOL|MOUNT", type=click.Path())
@click.argument("name")
@click.option("--before", default="", metavar="PROGRAM", help="What freezes, with its words, from / on.")
@click.option("--after", default="", metavar="PROGRAM", help="What thaws.")
@click.option("--time-limit", metavar="TIME", help="How long each may take: 30s, 1m. It is ended then.  [default: 10s]")
@click.option("--volume", "volumes", multiple=True, metavar="VOLUME", help="Only for snapshots that hold this volume.")
@click.option("--shell", is_flag=True, help="Give both to /bin/sh, as lines.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def add(
    where: str,
    name: str,
    before: str,
    after: str,
    time_limit: str | None,
    volumes: tuple[str, ...],
    shell: bool,
    as_json: bool,
) -> None:
    """Add the hook NAME. Several run in the order of their names, and thaw in turned order."""
    options = [(key, value) for key, value in (("before", before), ("after", after)) if value]
    options += [("time-limit", time_limit)] if time_limit is not None else []
    options += [("volume", one) for one in volumes] + ([("shell", "yes")] if shell else [])
    answer = ask_anywhere(where, "hook", "add", name, options=options)
    if as_json:
        print_json(answer)


@hook.command()
@click.argument("where", metavar="POOL|MOUNT", type=click.Path())
@click.argument("name")
def remove(where: str, name: str) -> None:
    """Remove the hook NAME."""
    ask_anywhere(where, "hook", "remove", name)


@hook.command("list")
@click.argument("where", metavar="POOL|MOUNT", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_hooks(where: str, as_json: bool) -> None:
    """List the hooks."""
    hooks = ask_anywhere(where, "hook", "list")["hooks"]
    if as_json:
        print_json(hooks)
        return
    print_table(
        ["NAME", "BEFORE", "AFTER", " LIMIT", "VOLUMES"],
        [[one["name"], "damaged", "", "", ""] if one["is_damaged"] else _row(one) for one in hooks],
    )


def _row(hook: dict[str, Any]) -> list[str]:
    volumes = " ".join(hook["volumes"]) or "any"
    return [hook["name"], hook["before"], hook["after"], f"{hook['time_limit_s']} s", volumes]
