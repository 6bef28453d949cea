"""Pools of other users, which root mounts, checks or lists: it does nothing for them that they could not do."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Mounted, clear_away, main_here, snapfs
from .test_t5_access import STRANGER, open_folders
from .test_t5_hooks import add_hook, told

pytestmark = pytest.mark.mount

OTHER = 4001


def give_away(*folders: Path) -> None:
    """All of it is another user's from now on."""
    for folder in folders:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, OTHER, OTHER)


def owners(folder: Path) -> set[int]:
    """Whose what lies there is."""
    return {path.lstat().st_uid for path in (folder, *folder.rglob("*"))}


def forge(pool: Path, pool_id: str, device: Path) -> None:
    """What the owner of a pool can make of it: another pool's directory."""
    descriptor = json.loads((pool / "pool.json").read_text())
    (pool / "pool.json").write_text(json.dumps({**descriptor, "pool_id": pool_id}))
    for path in (pool / "catalog.sqlite", *(pool / "shards").glob("*.sqlite")):
        database = sqlite3.connect(path)
        database.execute("UPDATE meta SET value = ? WHERE key = 'pool_id'", (pool_id,))
        if path.name == "catalog.sqlite":
            database.execute("UPDATE meta SET value = 1000000 WHERE key = 'generation'")
            database.execute("UPDATE devices SET path = ?", (str(device),))
        database.commit()
        database.close()


def test_a_link_to_a_folder_of_roots_does_not_make_a_pool_roots(tmp_path: Path) -> None:
    """Where everybody may write, as in /tmp, the directory says nothing of whose its files are."""
    mounted = Mounted(tmp_path)
    try:
        notes = add_hook(mounted, tmp_path, "true", "true")
        mounted.unmount()
        shared = tmp_path / "shared"
        mounted.pool.rename(shared)
        give_away(shared)
        os.chown(shared, 0, 0)
        shared.chmod(0o1777)
        mounted.pool.symlink_to(shared)
        mounted.mount()
        refused = snapfs("snapshot", mounted.path, "s", expect=1)
        assert f"the pool belongs to another user, {OTHER}" in refused.stderr
        mounted.unmount()
        # Nor is it root's alone while anybody may put other files there.
        for path in shared.rglob("*"):
            os.chown(path, 0, 0)
        mounted.mount()
        assert "others than its owner may write" in snapfs("snapshot", mounted.path, "s", expect=1).stderr
        mounted.unmount()
        assert told(notes) == []
        shared.chmod(0o700)
        mounted.mount()
        snapfs("snapshot", mounted.path, "s")
        assert told(notes)
        mounted.unmount()
    finally:
        clear_away(mounted)


@pytest.mark.parametrize("how", ["by its path", "by a link"])
def test_another_users_pool_does_not_get_at_roots_devices(tmp_path: Path, how: str) -> None:
    device = tmp_path / "device"
    device.mkdir()
    mounted = Mounted(tmp_path, "--device", device)
    try:
        (mounted.path / "secret").write_bytes(b"root's own")
        pool_id = mounted.status()["pool_id"]
        mounted.unmount()
        before = sorted(path.name for path in device.rglob("*"))
        other = tmp_path / "other"
        snapfs("init", other)
        if how == "by a link":
            shutil.rmtree(other / "device")
            (other / "device").symlink_to(device)
        forge(other, pool_id, device if how == "by its path" else Path())
        if how == "by a link":
            database = sqlite3.connect(other / "catalog.sqlite")
            database.execute("UPDATE devices SET path = ''")
            database.commit()
            database.close()
        for path in (other, *other.rglob("*")):
            os.chown(path, OTHER, OTHER, follow_symlinks=False)
        for command in (("mount", other, mounted.path), ("changelog", "list", other), ("check", "--repair", other)):
            assert "it is not its pool's owner's" in snapfs(*command, expect=1).stderr
        assert sorted(path.name for path in device.rglob("*")) == before
        mounted.mount()
        assert (mounted.path / "secret").read_bytes() == b"root's own"
        mounted.unmount()
    finally:
        clear_away(mounted)


def test_what_root_makes_in_another_users_pool_is_that_users(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.mkdir()
    mounted = Mounted(tmp_path, "--device", device)
    try:
        mounted.unmount()
        give_away(mounted.pool, device)
        (mounted.pool / "lock").unlink()
        snapfs("check", "--repair", mounted.pool)
        snapfs("changelog", "list", mounted.pool)
        mounted.mount()
        (mounted.path / "v").write_bytes(b"x" * 9_000_000)
        snapfs("snapshot", mounted.path, "s")
        (mounted.path / "v").write_bytes(b"y" * 9_000_000)
        assert owners(mounted.pool) == owners(device) == {OTHER}
        mounted.unmount()
        assert owners(mounted.pool) == owners(device) == {OTHER}
    finally:
        clear_away(mounted)


def test_nobody_else_comes_to_devices(tmp_path: Path) -> None:
    for name in ("own", "change", "others"):
        (tmp_path / name).mkdir(mode=0o755)
    os.chown(tmp_path / "others", OTHER, OTHER)
    refused = snapfs("init", tmp_path / "p", "--device", tmp_path / "others", expect=1)
    assert f"it belongs to another user, {OTHER}" in refused.stderr
    assert not (tmp_path / "p").exists() and os.listdir(tmp_path / "others") == []
    snapfs("init", tmp_path / "p", "--device", tmp_path / "own")
    create = ("changelog", "create", tmp_path / "p", "logs", "--capacity", "1G", "--device")
    assert "it belongs to another user" in snapfs(*create, tmp_path / "others", expect=1).stderr
    assert os.listdir(tmp_path / "others") == []
    snapfs(*create, tmp_path / "change")
    for name in ("own", "change"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


def test_a_directory_in_which_making_a_change_log_volume_was_cut_off_can_be_given_again(tmp_path: Path) -> None:
    device = tmp_path / "logs"
    device.mkdir()
    snapfs("init", tmp_path / "p")
    create = ("changelog", "create", tmp_path / "p", "logs", "--capacity", "1G", "--device", device)
    pool_id = json.loads((tmp_path / "p" / "pool.json").read_text())["pool_id"]
    own = json.loads((tmp_path / "p" / "device" / "snapfs-device.json").read_text())
    (device / "snapfs-device.json").write_text(json.dumps({**own, "pool_id": "another", "device_id": 1}))
    assert "a device of a pool already" in snapfs(*create, expect=1).stderr
    (device / "snapfs-device.json").write_text(json.dumps({**own, "device_id": 0}))
    assert "a device of a pool already" in snapfs(*create, expect=1).stderr
    (device / "snapfs-device.json").write_text(json.dumps({**own, "pool_id": pool_id, "device_id": 1}))
    (device / "snapfs-device.json.new").write_text("{")
    snapfs(*create)
    assert str(device) in snapfs("changelog", "list", tmp_path / "p").stdout
    assert "clean" in snapfs("check", tmp_path / "p").stdout


def test_who_may_read_a_file_in_a_snapshot_may_export_it(mounts: Callable[..., Mounted], tmp_path: Path) -> None:
    """The daemon, which would tell where it has holes, takes no commands from them."""
    open_folders(tmp_path)
    shared = mounts(mount_options=("allow_other",))
    (shared.path / "v").write_bytes(b"x" * 5000)
    (shared.path / "v").chmod(0o644)
    snapfs("snapshot", shared.path, "s")
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    inbox.chmod(0o777)
    export = ("export", shared.snapshots / "s" / "v", inbox / "v.raw")
    assert code_as_stranger(*export) == 0
    assert (inbox / "v.raw").read_bytes() == b"x" * 5000
    assert (inbox / "v.raw").stat().st_uid == STRANGER["user"]


def code_as_stranger(*words: object) -> int:
    """What the command line of somebody else ends with, who need not come to the checkout for that."""
    # Found by then: a command is brought in when it is first used.
    assert main_here(words[0], "--help") == 0
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.setgid(STRANGER["group"])
            os.setgroups([])
            os.setuid(STRANGER["user"])
            code = main_here(*words)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
