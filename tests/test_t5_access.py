"""Who may do what, with real users on real mounts."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapfs.cli.control import control_path

from .conftest import Mounted, run, snapfs, wait_until
from .test_t5_hostile import helper_of

pytestmark = pytest.mark.mount

GROUP = 23456
STRANGER: dict[str, Any] = {"user": 12345, "group": 12345, "extra_groups": [], "cwd": "/"}
OPERATOR: dict[str, Any] = {"user": 12346, "group": 12346, "extra_groups": [GROUP], "cwd": "/"}

ASK = 'exec 3<>"$1" && { echo "$2" >&3; cat <&3; }'


def open_folders(folder: Path) -> None:
    """Let other users through to a folder of pytest's, which are its user's alone."""
    for one in (folder, *folder.parents[:3]):
        if one.stat().st_mode & 0o777 == 0o700:
            one.chmod(0o755)


def ask_as(who: dict[str, Any], mounted: Mounted, line: str, expect: int = 0) -> str:
    """What the control file answers to a user; a Python of root's own is not to be had by others."""
    return run("sh", "-c", ASK, "ask", mounted.control_path, line, expect=expect, **who).stdout


@pytest.fixture
def shared(mounts: Callable[..., Mounted], tmp_path: Path) -> Mounted:
    """A mount that others may use, and a group may operate."""
    open_folders(tmp_path)
    return mounts(mount_options=("allow_other", f"control_group={GROUP}"))


def test_the_groups_members_operate_and_others_do_not(shared: Mounted) -> None:
    found = shared.control_path.stat()
    assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (GROUP, 0o660)
    (shared.path / "v").write_bytes(b"x")
    assert '"ok": true' in ask_as(OPERATOR, shared, "snapshot theirs")
    assert (shared.snapshots / "theirs" / "v").read_bytes() == b"x"
    assert '"ok": true' in ask_as(OPERATOR, shared, "delete theirs")
    ask_as(STRANGER, shared, "snapshot s", expect=2)
    assert os.listdir(shared.snapshots) == []


@pytest.mark.parametrize(
    "line",
    [
        "hook add h before=/bin/true",
        "hook remove h",
        "receive-state put p:1 [0,0,0,[],[]]",
        "receive-state list",
        "snapshot s guid=p:1",
        "rollback s force=yes",
        "create w source=/etc/shadow",
        "changelog create c capacity=1G device=/tmp/c",
    ],
)
def test_what_reaches_beyond_the_pool_is_not_for_the_group(shared: Mounted, line: str) -> None:
    answer = ask_as(OPERATOR, shared, line)
    assert '"errno": 1,' in answer and "is for the daemon's own user" in answer
    # To root it is a matter of what is there.
    assert "own user" not in str(shared.ask(line))
    shared.ask("hook remove h")


def test_without_the_option_the_control_file_is_the_owners_alone(
    mounts: Callable[..., Mounted], tmp_path: Path
) -> None:
    open_folders(tmp_path)
    mounted = mounts(mount_options=("allow_other",))
    assert stat.S_IMODE(mounted.control_path.stat().st_mode) == 0o600
    ask_as(OPERATOR, mounted, "snapshot s", expect=2)


def test_a_group_that_is_not_there_is_refused(mounted: Mounted, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    for group in ("no-such-group", "", "-1", "4294967295", "1" * 50):
        done = snapfs("mount", mounted.pool, tmp_path / "second", "-o", f"control_group={group}", expect=1)
        assert "there is no group" in done.stderr


def test_neither_snapshots_nor_clones_show_what_was_forbidden(shared: Mounted) -> None:
    secret = shared.path / "secret"
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    kept = shared.snapshot("then") / "secret"
    assert '"ok": true' in ask_as(OPERATOR, shared, "clone then/secret copy")
    secret.chmod(0o644)
    run("cat", secret, **STRANGER)
    for who in (STRANGER, OPERATOR):
        for path in (kept, shared.path / "copy", shared.snapshots / "@latest" / "secret"):
            run("cat", path, expect=1, **who)
    assert (shared.path / "copy").read_bytes() == b"secret"
    # A rollback takes the mode back as well: what was forbidden then is again.
    shared.ask("rollback then")
    run("cat", secret, expect=1, **STRANGER)


def test_no_devices_no_links_no_set_uid(shared: Mounted) -> None:
    for command in (
        ["mknod", shared.path / "null", "c", "1", "3"],
        ["mkfifo", shared.path / "fifo"],
        ["ln", "-s", "/etc/shadow", shared.path / "link"],
    ):
        run(*command, expect=1)
    program = shared.path / "id"
    program.write_bytes(Path("/usr/bin/id").read_bytes())
    program.chmod(0o4755)
    assert run(program, "-u", **STRANGER).stdout.strip() == "12345"
    shared.snapshot("s")
    assert run(shared.snapshots / "s" / "id", "-u", **STRANGER).stdout.strip() == "12345"


def test_nothing_in_the_pool_is_for_others_even_under_umask_0(tmp_path: Path) -> None:
    pool, mount = tmp_path / "pool", tmp_path / "mount"
    mount.mkdir()
    command = [sys.executable, "-m", "snapfs"]
    subprocess.run([*command, "init", pool], check=True, umask=0, capture_output=True)
    subprocess.run([*command, "mount", pool, mount], check=True, umask=0)
    try:
        (mount / "v").write_bytes(b"x" * 10000)
        (mount / ".snapshots" / "s").mkdir()
    finally:
        snapfs("umount", mount)
    for root, folders, files in os.walk(pool):
        for name in [*folders, *files]:
            path = Path(root) / name
            assert not path.lstat().st_mode & 0o077, path
    assert not pool.stat().st_mode & 0o077
    snapfs("check", pool)


def test_what_the_owner_comes_to_nobody_else_can_list_nor_look_into(shared: Mounted) -> None:
    """Whoever could would keep it locked in the kernel for as long as he likes, and commands and snapshots waiting."""
    folder = shared.path / ".snapfs" / "owner"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and os.listdir(folder) == ["control", "events"]
    for who in (STRANGER, OPERATOR):
        for command in (("ls", folder), ("cat", folder / "control"), ("touch", folder / "x"), ("stat", folder / "256")):
            said = run(*command, expect=2 if command[0] == "ls" else 1, **who)
            assert "Permission denied" in said.stderr
    assert control_path(str(shared.path)) == str(folder / "control")
    assert snapfs("snapshot", shared.path, "s").returncode == 0
    helper = helper_of(shared)
    told = shared.pool.parent / "told"
    with open(shared.path / "v", "wb", buffering=0) as file:
        file.write(b"x")
        strace = ["strace", "-qq", "-p", str(helper), "-e", "trace=openat", "-o", str(told)]
        with subprocess.Popen(strace, stderr=subprocess.DEVNULL) as tracing:
            wait_until(lambda: "TracerPid:\t0" not in Path(f"/proc/{helper}/status").read_text(), "it is traced")
            shared.snapshot("t")
            tracing.terminate()
    opened = [line.split('"')[1] for line in told.read_text().splitlines() if str(shared.path) in line]
    assert opened and all(path.startswith(f"{folder}/") for path in opened)
