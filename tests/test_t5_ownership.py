"""Pools and devices of other users: root opens none, for it would do what they say."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapfs.backends import DirectoryDevice
from snapfs.descriptor import open_home, read_descriptor
from snapfs.errors import DeviceMissingError
from snapfs.ownership import device_opener
from snapfs.pool import open_device_of

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


COMMANDS = (
    ("mount",),
    ("mount", "rescue"),
    ("check",),
    ("check", "--repair"),
    ("changelog", "list"),
)


def refused(pool: Path, mount: Path, words: str) -> None:
    """No command opens a pool, and nothing of it is changed."""
    before = {path: (path.lstat().st_uid, path.lstat().st_mtime_ns) for path in (pool, *pool.rglob("*"))}
    for command, *options in COMMANDS:
        rest = [pool, mount, *(["-o", *options] if options else [])] if command == "mount" else [*options, pool]
        assert words in snapfs(command, *rest, expect=1).stderr
    assert {path: (path.lstat().st_uid, path.lstat().st_mtime_ns) for path in (pool, *pool.rglob("*"))} == before


def test_root_opens_no_pool_of_another_user(tmp_path: Path) -> None:
    """Who could have root run any program, and open any file: by a hook, an image, a device."""
    mounted = Mounted(tmp_path)
    try:
        notes = add_hook(mounted, tmp_path, "true", "true")
        mounted.unmount()
        give_away(mounted.pool)
        refused(mounted.pool, mounted.path, f"is another user's, {OTHER}")
        # Nor what is root's in a directory of theirs, or theirs in one of root's.
        for path in mounted.pool.rglob("*"):
            os.chown(path, 0, 0)
        refused(mounted.pool, mounted.path, f"is another user's, {OTHER}")
        os.chown(mounted.pool, 0, 0)
        for name in ("pool.json", "catalog.sqlite"):
            os.chown(mounted.pool / name, OTHER, OTHER)
            refused(mounted.pool, mounted.path, f"is another user's, {OTHER}")
            os.chown(mounted.pool / name, 0, 0)
        assert told(notes) == []
        mounted.mount()
        snapfs("snapshot", mounted.path, "s")
        assert told(notes)
        mounted.unmount()
    finally:
        clear_away(mounted)


def test_a_pool_that_others_may_write_to_is_not_opened(tmp_path: Path) -> None:
    """By a link to a folder as /tmp, say, which is root's."""
    mounted = Mounted(tmp_path)
    try:
        mounted.unmount()
        shared = tmp_path / "shared"
        mounted.pool.rename(shared)
        mounted.pool.symlink_to(shared)
        for mode in (0o1777, 0o770):
            shared.chmod(mode)
            refused(mounted.pool, mounted.path, "others than its owner may write to")
        shared.chmod(0o755)
        mounted.mount()
        mounted.unmount()
    finally:
        clear_away(mounted)


@pytest.mark.parametrize("is_own", [True, False])
def test_a_device_is_whoevers_the_pool_is(tmp_path: Path, is_own: bool) -> None:
    """Those of before 0.8.9 may be others', and open to all."""
    device = tmp_path / "device"
    device.mkdir()
    mounted = Mounted(tmp_path, "--device", device)
    try:
        (mounted.path / "v").write_bytes(b"kept")
        mounted.unmount()
        device.chmod(0o775)
        if not is_own:
            os.chown(device, OTHER, OTHER)
            for command in (("mount", mounted.pool, mounted.path), ("check", mounted.pool)):
                answer = snapfs(*command, expect=1).stderr
                assert f"cannot be used: it is another user's, {OTHER}" in answer and "chown it" in answer
            os.chown(device, 0, 0)
        mounted.mount()
        assert (mounted.path / "v").read_bytes() == b"kept"
        assert stat.S_IMODE(device.stat().st_mode) == 0o700
        mounted.unmount()
    finally:
        clear_away(mounted)


def test_nobody_else_comes_to_devices(tmp_path: Path) -> None:
    for name in ("own", "change", "others"):
        (tmp_path / name).mkdir(mode=0o755)
    os.chown(tmp_path / "others", OTHER, OTHER)
    refused = snapfs("init", tmp_path / "p", "--device", tmp_path / "others", expect=1)
    assert f"it belongs to another user, {OTHER}" in refused.stderr
    assert not (tmp_path / "p").exists() and os.listdir(tmp_path / "others") == []
    assert "it belongs to another user" in snapfs("init", tmp_path / "others", expect=1).stderr
    assert os.listdir(tmp_path / "others") == []
    snapfs("init", tmp_path / "p", "--device", tmp_path / "own")
    create = ("changelog", "create", tmp_path / "p", "logs", "--capacity", "1G", "--device")
    assert f"it is another user's, {OTHER}" in snapfs(*create, tmp_path / "others", expect=1).stderr
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


def test_a_directory_that_is_not_taken_is_left_as_it_is(tmp_path: Path) -> None:
    """It may be /srv, or somebody's home; or another disk's, at a device's path."""
    somebodys = tmp_path / "srv"
    somebodys.mkdir()
    (somebodys / "file").touch()
    somebodys.chmod(0o1777)
    for options in ((somebodys,), (tmp_path / "p", "--device", somebodys)):
        assert "is not empty" in snapfs("init", *options, expect=1).stderr
    device = tmp_path / "device"
    device.mkdir()
    snapfs("init", tmp_path / "p", "--device", device)
    create = ("changelog", "create", tmp_path / "p", "logs", "--capacity", "1G", "--device")
    assert "is not empty" in snapfs(*create, somebodys, expect=1).stderr
    device.rename(tmp_path / "away")
    somebodys.rename(device)
    (tmp_path / "mount").mkdir()
    assert "is not at" in snapfs("mount", tmp_path / "p", tmp_path / "mount", expect=1).stderr
    assert stat.S_IMODE(device.stat().st_mode) == 0o1777


def test_a_device_of_roots_that_others_may_write_to_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an ordinary user, who cannot change that; one that others may only read is."""
    snapfs("init", tmp_path / "p")
    home = open_home(str(tmp_path / "p"))
    descriptor = read_descriptor(home, "p")
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    monkeypatch.setattr(DirectoryDevice, "_uid_of_new", lambda device: OTHER)
    device = tmp_path / "p" / "device"
    device.chmod(0o755)
    open_device_of(descriptor, 0, str(device), device_opener(home)).close()
    device.chmod(0o777)
    with pytest.raises(DeviceMissingError, match="others may write to device 0"):
        open_device_of(descriptor, 0, str(device), device_opener(home))
    # What is only looked at is not changed, and does nothing.
    open_device_of(descriptor, 0, str(device), device_opener(home, writable=False)).close()
    home.close()


@pytest.mark.parametrize("has_nameless", [True, False])
def test_root_of_another_host_is_whose_its_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_nameless: bool
) -> None:
    """NFS with root_squash: what root makes is nobody's, and NFS has no nameless files."""
    open_file, stat_file = os.open, os.fstat

    def opened(path: str, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE and not has_nameless:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return open_file(path, flags, *args, **options)

    def squashed(fd: int) -> os.stat_result:
        found = list(stat_file(fd))
        found[stat.ST_UID] = 65534
        return os.stat_result(found)

    monkeypatch.setattr(os, "open", opened)
    device = DirectoryDevice(tmp_path)
    monkeypatch.setattr(os, "fstat", squashed)
    assert device.foreign_uid([]) is None
    device.make_private()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []
    device.close()
