"""Runs a script as an ordinary user who can mount, wherever the interpreter and the checkout lie.

In namespaces of its own: another user may not come to what lies in root's home, nor open /dev/fuse everywhere, and
whatever the script leaves mounted or running goes with them.
"""

from __future__ import annotations

import os
import pwd
import sys
import textwrap
from pathlib import Path

from .conftest import run

# fusermount3 has to find a name for it.
USER = pwd.getpwnam("nobody").pw_uid
CHECKOUT = Path(__file__).resolve().parent.parent


def leaving_others_mounts(but: str = "") -> str:
    """A shell line, the first in a mount namespace: what others have mounted must not stay for what runs there."""
    wanted = f"""$3 == "fuse.snapfs" && $2 != "{but}" {{print $2}}"""
    return f"""awk '{wanted}' /proc/mounts | while read -r path; do umount -l "$path"; done"""


def _closed_ancestor(path: Path) -> Path | None:
    """The first folder on the way to a path that others may not go through."""
    for folder in reversed(path.parents):
        if not folder.stat().st_mode & 0o001:
            return folder
    return None


def _opening(path: Path, spare: Path) -> list[str]:
    """Shell lines after which others may come to a path; for what runs in this namespace alone."""
    closed = _closed_ancestor(path)
    if closed is None:
        return []
    spare.mkdir()
    return [
        f"mount --bind '{path}' '{spare}'",
        f"mount -t tmpfs -o mode=755 none '{closed}'",
        f"mkdir -p '{path}'",
        f"mount --bind '{spare}' '{path}'",
    ]


# What each script begins with; ``snapfs`` gives what the command prints.
_PRELUDE = """
import contextlib, json, os, select, signal, subprocess, sys
def snapfs(*words, **options):
    command = [sys.executable, "-m", "snapfs", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, **options).stdout
"""


def run_unprivileged(script: str, folder: Path) -> str:
    """What a script of Python prints; ``folder`` becomes that user's, and is where it runs."""
    for one in (folder, *folder.parents):
        if one != Path("/") and not one.stat().st_mode & 0o001:
            one.chmod(0o755)
    (folder / "script.py").write_text(_PRELUDE + textwrap.dedent(script))
    os.chown(folder, USER, USER)
    fuse = folder / "fuse"
    os.mknod(fuse, 0o020666, os.makedev(10, 229))
    fuse.chmod(0o666)
    lines = ["set -e", leaving_others_mounts(), f"mount --bind '{fuse}' /dev/fuse"]
    for number, path in enumerate({Path(sys.base_prefix).resolve(), CHECKOUT}):
        lines += _opening(path, folder / f"spare-{number}")
    lines += [f"cd '{folder}'"]
    environment = f"HOME='{folder}' PYTHONPATH='{CHECKOUT}' LD_LIBRARY_PATH='{sys.base_prefix}/lib'"
    lines += [
        f"setpriv --reuid {USER} --regid {USER} --clear-groups env {environment} '{sys.executable}' script.py",
    ]
    spaces = ("--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private")
    return run("unshare", *spaces, "sh", "-c", "\n".join(lines), timeout=120).stdout
