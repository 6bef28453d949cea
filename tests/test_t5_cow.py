"""Copy-on-write volumes, adopted images and change log volumes on real mounts, with real tools."""

from __future__ import annotations

import errno
import json
import mmap
import os
from pathlib import Path

import pytest

from snapfs.errors import BadCommandError, InUseError

from .conftest import Mounted, loop_device, main_here, mounted_filesystem, run, snapfs

pytestmark = pytest.mark.mount


def test_an_adopted_image_stays_a_plain_image(mounted: Mounted, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    run("truncate", "-s", "64M", image)
    run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0", image)
    with loop_device(image) as device, mounted_filesystem(device, tmp_path / "a") as folder:
        (folder / "file").write_text("before")
    snapfs("create", mounted.path / "disk", "--mode", "cow", "--source", image)
    volume = mounted.path / "disk"
    assert volume.stat().st_size == 64 << 20
    snapfs("snapshot", mounted.path, "s")
    with loop_device(volume) as device, mounted_filesystem(device, tmp_path / "a") as folder:
        assert (folder / "file").read_text() == "before"
        (folder / "file").write_text("after")
        (folder / "big").write_bytes(os.urandom(4 << 20))
    run("e2fsck", "-fn", volume)
    kept = mounted.snapshots / "s" / "disk"
    with (
        loop_device(kept, "--read-only") as device,
        mounted_filesystem(device, tmp_path / "b", "-o", "ro,noload") as folder,
    ):
        assert (folder / "file").read_text() == "before"
        assert not (folder / "big").exists()
    found = next(one for one in mounted.status()["volumes"] if one["name"] == "disk")
    assert (found["mode"], found["source"]) == ("cow", str(image))
    assert found["blocks_since_snapshot"] > 0
    mounted.unmount()
    mounted.check()
    # Other tools read it now.
    run("e2fsck", "-fn", image)
    with loop_device(image) as device, mounted_filesystem(device, tmp_path / "c") as folder:
        assert (folder / "file").read_text() == "after"
        big = (folder / "big").read_bytes()
    mounted.mount()
    with loop_device(volume) as device, mounted_filesystem(device, tmp_path / "a") as folder:
        assert (folder / "big").read_bytes() == big
    assert mounted.status()["changed_images"] == [str(image)]
    assert '"event": "image-changed"' in (mounted.path / ".snapfs" / "events").read_text()
    mounted.remount()
    assert mounted.status()["changed_images"] == []


def test_a_redirecting_volume_over_a_block_device(mounted: Mounted, tmp_path: Path) -> None:
    image = tmp_path / "base.raw"
    contents = os.urandom(8 << 20)
    image.write_bytes(contents)
    with loop_device(image, "--read-only") as device:
        snapfs("create", mounted.path / "v", "--source", device)
        volume = mounted.path / "v"
        assert volume.read_bytes() == contents
        with open(volume, "r+b") as file:
            file.seek(5 << 20)
            file.write(b"x" * 10000)
        changed = contents[: 5 << 20] + b"x" * 10000 + contents[(5 << 20) + 10000 :]
        mounted.remount()
        assert volume.read_bytes() == changed
        mounted.unmount()
        mounted.check()
    assert image.read_bytes() == contents
    mounted.mount()
    # Without the device: an error, and no zeros.
    with pytest.raises(OSError) as caught:
        volume.read_bytes()
    assert caught.value.errno in (errno.ENODEV, errno.EIO)
    volume.unlink()


def test_sources_that_cannot_be(mounted: Mounted, tmp_path: Path) -> None:
    (mounted.path / "v").write_bytes(b"1" * 4096)
    failed = snapfs("create", mounted.path / "w", "--mode", "cow", "--source", mounted.path / "v", expect=2)
    assert "lies in the pool or its mount" in failed.stderr
    snapfs("create", mounted.path / "w", "--source", mounted.pool / "pool.json", expect=2)
    snapfs("create", mounted.path / "w", "--source", tmp_path / "none", expect=1)
    snapfs("create", mounted.path / "w", "--source", tmp_path, expect=1)
    snapfs("create", mounted.path / "w", expect=2)
    assert sorted(path.name for path in mounted.path.iterdir()) == [".snapfs", ".snapshots", "v"]


@pytest.mark.parametrize("mode", ["cow", "redirect"])
def test_a_full_change_log_volume_stops_the_writer_and_harms_no_snapshot(
    mounted: Mounted, tmp_path: Path, mode: str
) -> None:
    folders = [tmp_path / "logs-a", tmp_path / "logs-b"]
    for folder in folders:
        folder.mkdir()
    devices = [word for folder in folders for word in ("--device", folder)]
    snapfs("changelog", "create", mounted.path, "logs", *devices, "--capacity", "8M")
    snapfs("create", mounted.path / "v", "--size", "64M", "--mode", mode, "--change-log", "logs")
    volume = mounted.path / "v"
    before = os.urandom(32 << 20)
    with open(volume, "r+b") as file:
        file.write(before)
    snapfs("snapshot", mounted.path, "s")
    fd = os.open(volume, os.O_RDWR | os.O_DIRECT)

    buffer = mmap.mmap(-1, 1 << 20)
    buffer.write(b"n" * (1 << 20))
    written = 0
    with pytest.raises(OSError) as caught:
        for number in range(32):
            os.pwrite(fd, buffer, number << 20)
            written += 1
    os.close(fd)
    assert caught.value.errno == errno.ENOSPC
    assert written == 8
    kept = mounted.snapshots / "s" / "v"
    assert kept.read_bytes()[: 32 << 20] == before
    listed = json.loads(snapfs("changelog", "list", mounted.path, "--json").stdout)
    assert listed[0]["percent"] == 100
    assert all(any(path.rglob("logs/*/*")) for path in folders)
    events = [json.loads(line) for line in (mounted.path / ".snapfs" / "events").read_text().splitlines()]
    assert [one["percent"] for one in events if one["event"] == "change-log-filling"] == [80, 95]
    snapfs("changelog", "resize", mounted.path, "logs", "16M")
    with open(volume, "r+b") as file:
        file.seek(8 << 20)
        file.write(b"m" * (4 << 20))
    mounted.remount()
    assert kept.read_bytes()[: 32 << 20] == before
    assert volume.read_bytes()[: 13 << 20] == b"n" * (8 << 20) + b"m" * (4 << 20) + before[12 << 20 : 13 << 20]
    mounted.unmount()
    assert "12.0 MiB" in snapfs("changelog", "list", mounted.pool).stdout
    mounted.mount()


def test_an_image_goes_back_in_place(mounted: Mounted, tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    run("mkfs.ext4", "-q", image)
    snapfs("create", mounted.path / "disk", "--mode", "cow", "--source", image)
    volume = mounted.path / "disk"
    with loop_device(volume) as device, mounted_filesystem(device, tmp_path / "fs") as folder:
        (folder / "kept").write_bytes(os.urandom(3 << 20))
        kept = (folder / "kept").read_bytes()
        os.sync()
        snapfs("snapshot", mounted.path, "good")
        (folder / "kept").write_bytes(b"ransom" * 500000)
        (folder / "more").write_bytes(os.urandom(8 << 20))
    before = volume.read_bytes()
    undo = snapfs("rollback", mounted.path, "good").stdout.strip()
    assert volume.read_bytes() == (mounted.snapshots / "good" / "disk").read_bytes()
    with loop_device(volume) as device, mounted_filesystem(device, tmp_path / "fs") as folder:
        assert (folder / "kept").read_bytes() == kept and not (folder / "more").exists()
    fd = os.open(volume, os.O_RDWR)
    assert mounted.ask(f"rollback {undo}")["errno"] == errno.EBUSY
    assert mounted.ask(f"rollback {undo} force=yes")["ok"]
    assert os.pread(fd, 64 << 20, 0) == before
    os.close(fd)
    snapfs("rollback", mounted.path, "good")
    mounted.unmount()
    with loop_device(image) as device, mounted_filesystem(device, tmp_path / "fs") as folder:
        assert (folder / "kept").read_bytes() == kept
    run("e2fsck", "-fn", image)
    mounted.mount()


def test_a_source_is_looked_at_beside_the_mount(mounted: Mounted, tmp_path: Path) -> None:
    """Whether an image lies in the mount was asked of the kernel by who answers it, when its answer had run out."""
    image = tmp_path / "image"
    image.write_bytes(b"data" * 4096)
    # A listing has the kernel forget the root's attributes.
    os.listdir(mounted.path)
    snapfs("create", mounted.path / "v", "--mode", "cow", "--source", image)
    os.listdir(mounted.path)
    (tmp_path / "link").symlink_to(mounted.path)
    assert main_here("create", mounted.path / "w", "--source", tmp_path / "link" / "v") == BadCommandError.exit_code
    assert (mounted.path / "v").read_bytes() == b"data" * 4096


def test_an_image_is_not_cut_nor_taken_twice_by_a_command_that_makes_a_volume(mounted: Mounted, tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    image, link = tmp_path / "image", tmp_path / "link"
    image.write_bytes(data)
    os.link(image, link)
    cow = ("--mode", "cow", "--source")
    assert main_here("create", mounted.path / "v", *cow, image, "--size", "64K") == BadCommandError.exit_code
    assert image.read_bytes() == data
    # Longer than the filesystem below takes: neither is there a volume, nor is one longer than before.
    assert main_here("create", mounted.path / "v", *cow, image, "--size", "20T") != 0
    assert sorted(os.listdir(mounted.path)) == [".snapfs", ".snapshots"] and image.read_bytes() == data
    snapfs("create", mounted.path / "v", *cow, image)
    with pytest.raises(OSError):
        os.truncate(mounted.path / "v", 20 << 40)
    assert (mounted.path / "v").stat().st_size == len(data)
    for options in (cow, ("--source",)):
        assert main_here("create", mounted.path / "w", *options, link) == InUseError.exit_code
    os.truncate(mounted.path / "v", 2 << 20)
    mounted.remount()
    assert (mounted.path / "v").read_bytes() == data + bytes(1 << 20)
    # Cut by who says so.
    os.truncate(mounted.path / "v", 4096)
    assert image.read_bytes() == data[:4096]
