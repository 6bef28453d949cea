"""Clones, rollbacks and holds on a real mount, with real data."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from .conftest import Mounted, loop_device, mounted_filesystem, run, snapfs

pytestmark = pytest.mark.mount


def test_rollback_of_a_closed_volume_drops_the_kernels_pages(mounted: Mounted) -> None:
    volume = mounted.path / "v"
    volume.write_bytes(b"old" * 100000)
    inode = volume.stat().st_ino
    snapfs("snapshot", mounted.path, "s")
    volume.write_bytes(b"new and longer" * 100000)
    assert volume.read_bytes() == b"new and longer" * 100000
    undo = snapfs("rollback", mounted.path, "s").stdout.strip()
    assert volume.stat().st_size == 300000
    assert volume.read_bytes() == b"old" * 100000
    assert volume.stat().st_ino == inode
    snapfs("rollback", mounted.path, undo)
    assert volume.read_bytes() == b"new and longer" * 100000
    mounted.remount()
    assert volume.read_bytes() == b"new and longer" * 100000
    assert (mounted.snapshots / "s" / "v").read_bytes() == b"old" * 100000


def test_rollback_of_an_open_and_mapped_volume_needs_force(mounted: Mounted) -> None:
    import mmap

    volume = mounted.path / "v"
    volume.write_bytes(b"1" * 65536)
    mounted.snapshot("s")
    fd = os.open(volume, os.O_RDWR)
    with mmap.mmap(fd, 65536) as memory:
        memory[0:4096] = b"2" * 4096
        os.pwrite(fd, b"3" * 4096, 8192)
        answer = mounted.ask("rollback s")
        assert (answer["ok"], answer["errno"]) == (False, errno.EBUSY)
        answer = mounted.ask("rollback s force=yes")
        assert answer["ok"], answer
        assert memory[:] == b"1" * 65536
        assert os.pread(fd, 65536, 0) == b"1" * 65536
        os.pwrite(fd, b"4" * 4096, 0)
    os.close(fd)
    undo = mounted.snapshots / answer["undo"] / "v"
    assert undo.read_bytes() == b"2" * 4096 + b"1" * 4096 + b"3" * 4096 + b"1" * 53248
    assert volume.read_bytes() == b"4" * 4096 + b"1" * 61440


def test_an_ext4_goes_back_and_sideways(mounted: Mounted, tmp_path: Path) -> None:
    image = mounted.path / "disk"
    snapfs("create", image, "--size", "64M")
    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", image)
    with loop_device(image) as device, mounted_filesystem(device, tmp_path / "a") as folder:
        (folder / "file").write_text("before")
    snapfs("snapshot", mounted.path, "clean")
    with loop_device(image) as device, mounted_filesystem(device, tmp_path / "a") as folder:
        (folder / "file").write_text("after")
        (folder / "more").write_bytes(os.urandom(1 << 20))
    snapfs("clone", mounted.path, "clean/disk", "fork")
    with loop_device(mounted.path / "fork") as device, mounted_filesystem(device, tmp_path / "b") as folder:
        assert (folder / "file").read_text() == "before"
        (folder / "file").write_text("fork")
    snapfs("rollback", mounted.path, "clean")
    for name, text in (("disk", "before"), ("fork", "fork")):
        run("e2fsck", "-fn", mounted.path / name)
        with loop_device(mounted.path / name) as device, mounted_filesystem(device, tmp_path / "c") as folder:
            assert (folder / "file").read_text() == text
            assert not (folder / "more").exists()
    snapfs("delete", mounted.path, "clean")
    assert "copied" in snapfs("flatten", mounted.path, "fork").stdout
    run("e2fsck", "-fn", mounted.path / "fork")


def test_a_clone_keeps_the_mode_and_the_owner_of_then(mounted: Mounted) -> None:
    volume = mounted.path / "v"
    volume.write_bytes(b"secret")
    os.chmod(volume, 0o640)
    os.chown(volume, 1234, 1235)
    mounted.snapshot("s")
    os.chmod(volume, 0o666)
    os.chown(volume, 0, 0)
    made = json.loads(snapfs("clone", mounted.path, "s/v", "c", "--json").stdout)
    assert made["size_bytes"] == 6
    found = (mounted.path / "c").stat()
    assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o640, 1234, 1235)
    snapfs("clone", mounted.path, "s/v", "c", expect=1)
    snapfs("clone", mounted.path, "s", "d", expect=2)


def test_a_held_snapshot_stays(mounted: Mounted) -> None:
    (mounted.path / "v").write_bytes(b"1")
    snapfs("snapshot", mounted.path, "s", "--hold", "backup of monday")
    with pytest.raises(OSError) as caught:
        os.rmdir(mounted.snapshots / "s")
    assert caught.value.errno == errno.EBUSY
    failed = snapfs("delete", mounted.path, "s", expect=1)
    assert "backup of monday" in failed.stderr
    assert json.loads(snapfs("hold", mounted.path, "s", "second", "--json").stdout)["holds"] == [
        "backup of monday",
        "second",
    ]
    mounted.remount()
    snapfs("release", mounted.path, "s", "backup of monday")
    snapfs("delete", mounted.path, "s", expect=1)
    snapfs("release", mounted.path, "s", "second")
    snapfs("delete", mounted.path, "s")
