"""What docs/operations.md says to do when something is wrong, done on real mounts."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Mounted, mounted_filesystem, run, snapfs, wait_until, wait_until_reclaimed

pytestmark = pytest.mark.mount
OPERATIONS = Path(__file__).parent.parent / "docs" / "operations.md"


def test_a_device_that_is_not_there(mounts: Callable[..., Mounted], tmp_path: Path) -> None:
    """Its filesystem is mounted again, and nothing was changed meanwhile."""
    devices = [tmp_path / "one", tmp_path / "two"]
    for device in devices:
        device.mkdir()
    mounted = mounts(*(word for device in devices for word in ("--device", device)))
    data = os.urandom(9 << 20)
    (mounted.path / "v").write_bytes(data)
    mounted.snapshot("s")
    mounted.unmount()
    devices[1].rename(tmp_path / "elsewhere")
    refused = snapfs("mount", mounted.pool, mounted.path, expect=1).stderr
    assert "device 1" in refused and str(devices[1]) in refused
    devices[1].mkdir()
    assert "device 1" in snapfs("mount", mounted.pool, mounted.path, expect=1).stderr
    devices[1].rmdir()
    (tmp_path / "elsewhere").rename(devices[1])
    mounted.mount()
    assert (mounted.path / "v").read_bytes() == (mounted.snapshots / "s" / "v").read_bytes() == data


def test_a_pool_is_restored_from_a_copy(mounted: Mounted, tmp_path: Path) -> None:
    """One file of an older copy is refused, and so is a damaged one; the whole copy is as it was."""
    (mounted.path / "v").write_bytes(b"old" * 5000)
    mounted.snapshot("s")
    mounted.unmount()
    copy = tmp_path / "copy"
    shutil.copytree(mounted.pool, copy)
    mounted.mount()
    (mounted.path / "v").write_bytes(b"new" * 5000)
    mounted.snapshot("t")
    mounted.unmount()
    for name in ("catalog.sqlite", "shards/0.sqlite"):
        now = (mounted.pool / name).read_bytes()
        shutil.copy(copy / name, mounted.pool / name)
        assert "is an old copy" in snapfs("mount", mounted.pool, mounted.path, expect=4).stderr
        (mounted.pool / name).write_bytes(now[:4096] + b"\xff" * 4096 + now[8192:])
        assert "is damaged" in snapfs("mount", mounted.pool, mounted.path, expect=4).stderr
        assert "is damaged" in snapfs("check", mounted.pool, expect=4).stdout
        (mounted.pool / name).write_bytes(now)
    mounted.mount()
    assert (mounted.path / "v").read_bytes() == b"new" * 5000
    mounted.unmount()
    shutil.rmtree(mounted.pool)
    shutil.copytree(copy, mounted.pool)
    mounted.mount()
    assert (mounted.path / "v").read_bytes() == b"old" * 5000
    assert os.listdir(mounted.snapshots) == ["s"]


def test_a_change_log_that_is_lost(mounted: Mounted) -> None:
    """What lay in it cannot be read, and check says of which volumes that is; all else can be copied out."""
    (mounted.path / "before").write_bytes(b"b" * 9000)
    (mounted.path / "v").write_bytes(b"v" * 9000)
    mounted.snapshot("s")
    (mounted.path / "v").write_bytes(b"w" * 9000)
    mounted.unmount()
    logs = [path for path in (mounted.pool / "device" / "logs").rglob("*") if path.is_file()]
    newest = max(logs, key=lambda path: path.stat().st_mtime_ns)
    kept = newest.read_bytes()
    newest.unlink()
    (found,) = json.loads(snapfs("check", mounted.pool, "--json", expect=4).stdout)["findings"]
    assert found["severity"] == "damage" and found["what"].endswith("is missing; what lies there is of volume 'v'")
    newest.write_bytes(kept[:4096])
    assert "; what lies there is of volume 'v'" in snapfs("check", mounted.pool, expect=4).stdout
    mounted.mount()
    with pytest.raises(OSError) as caught:
        (mounted.path / "v").read_bytes()
    assert caught.value.errno == errno.EIO
    assert (mounted.path / "before").read_bytes() == b"b" * 9000
    assert (mounted.snapshots / "s" / "v").read_bytes() == b"v" * 9000
    # Rolled back, the volume is whole again; of what was lost nothing is kept.
    undo = mounted.ask("rollback s volume=v force=yes")["undo"]
    assert (mounted.path / "v").read_bytes() == b"v" * 9000
    os.rmdir(mounted.snapshots / undo)
    wait_until_reclaimed(mounted)
    mounted.remount()
    assert (mounted.path / "v").read_bytes() == b"v" * 9000


def test_what_is_left_of_a_damaged_pool(mounted: Mounted, tmp_path: Path) -> None:
    """The database of one processor is gone, and its filesystem takes no writes: the rest is copied out."""
    short, long = os.urandom(100_000), os.urandom(9 << 20)
    (mounted.path / "short").write_bytes(short)
    (mounted.path / "long").write_bytes(long)
    mounted.snapshot("s")
    (mounted.path / "short").write_bytes(b"later")
    mounted.unmount()
    (mounted.pool / "shards" / "1.sqlite").unlink()
    refused = snapfs("mount", mounted.pool, mounted.path, expect=4).stderr
    assert "processor 1 is missing" in refused and "snapfs mount -o rescue" in refused
    for name, spoilt in (("pool.json", b"{"), ("catalog.sqlite", b"x" * 4096)):
        before = (mounted.pool / name).read_bytes()
        (mounted.pool / name).write_bytes(spoilt)
        for options in ((), ("--foreground",)):
            told = snapfs("mount", mounted.pool, mounted.path, *options, expect=4).stderr
            assert told.count("copy out what is left, from snapfs mount -o rescue") == 1, told
        (mounted.pool / name).write_bytes(before)
    assert "rescue" not in snapfs("mount", mounted.pool / "shards", mounted.path, expect=1).stderr
    image, disk = tmp_path / "image", tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    run("mkfs.ext4", "-q", image)
    with mounted_filesystem(image, disk, "-o", "loop"):
        shutil.copytree(mounted.pool, disk / "pool")
    with mounted_filesystem(image, disk, "-o", "loop,ro"):
        told = snapfs("mount", disk / "pool", mounted.path, "-o", "rescue").stderr
        assert told == "lost: shard store 1 is missing; what processor 1 keeps cannot be read\n"
        try:
            assert mounted.status()["lost"] == ["shard store 1 is missing; what processor 1 keeps cannot be read"]
            assert mounted.status()["health"] == "failed"
            assert (mounted.path / "short").read_bytes() == b"later"
            assert (mounted.snapshots / "s" / "short").read_bytes() == short
            assert (mounted.path / "long").stat().st_size == len(long)
            with open(mounted.path / "long", "rb") as file:
                assert file.read(4 << 20) == long[: 4 << 20]
                with pytest.raises(OSError) as caught:
                    file.read(4 << 20)
                assert caught.value.errno == errno.EIO
                file.seek(8 << 20)
                assert file.read() == long[8 << 20 :]
            with pytest.raises(OSError) as caught:
                (mounted.path / "short").write_bytes(b"")
            assert caught.value.errno == errno.EROFS
            assert "takes no commands" in snapfs("snapshot", mounted.path, "t", expect=1).stderr
        finally:
            mounted.unmount()
    # Only a copy of the whole of it mends a pool; here there is none, and it is begun anew.
    shutil.rmtree(mounted.pool)
    snapfs("init", mounted.pool)


def test_a_rescue_leaves_nothing_behind(mounted: Mounted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the pool, nor where its databases are copied to, also when the daemon is killed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    (mounted.path / "v").write_bytes(b"v" * 9000)
    mounted.snapshot("s")
    mounted.unmount()

    def state() -> dict[Path, bytes]:
        return {one: one.read_bytes() for one in mounted.pool.rglob("*") if one.is_file()}

    before = state()
    mounted.mount_options = ("rescue",)
    for end in (mounted.unmount, mounted.kill):
        mounted.mount()
        assert (mounted.path / "v").read_bytes() == b"v" * 9000
        assert b"processor" in (mounted.snapshots / "s" / ".manifest.json").read_bytes()
        refused = snapfs("mount", mounted.pool, tmp_path / "copies", "-o", "rescue", expect=1).stderr
        assert "in use by another process" in refused
        end()
        assert os.listdir(tmp_path / "copies") == []
        assert state() == before
    empty = tmp_path / "empty"
    empty.mkdir()
    snapfs("umount", mounted.path)
    assert "is missing" in snapfs("mount", empty, mounted.path, "-o", "rescue", expect=4).stderr
    assert os.listdir(empty) == []
    mounted.mount_options = ()
    mounted.mount()


def test_an_image_that_is_not_there(mounted: Mounted, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"i" * 20000)
    snapfs("create", mounted.path / "v", "--source", image)
    (mounted.path / "other").write_bytes(b"other")
    mounted.unmount()
    image.rename(tmp_path / "away")
    mounted.mount()
    with pytest.raises(OSError) as caught:
        (mounted.path / "v").read_bytes()
    assert caught.value.errno == errno.ENODEV
    assert "image-missing" in (mounted.path / ".snapfs" / "events").read_text()
    assert (mounted.path / "other").read_bytes() == b"other"
    (tmp_path / "away").rename(image)
    assert (mounted.path / "v").read_bytes() == b"i" * 20000


_FAILING = """
import os, sys
import trio
from snapfs.fuse.operations import Operations
from snapfs.pool import Pool

flag, is_beside_write = sys.argv.pop(), sys.argv.pop() == "write"
written = trio.Event()
write = Operations.write

async def fail(pool):
    if is_beside_write:
        await written.wait()
    while not os.path.exists(flag):
        await trio.sleep(0.01)
    raise RuntimeError("a defect")

async def write_or_wait(operations, *args):
    if is_beside_write and os.path.exists(flag):
        written.set()
        await trio.sleep_forever()
    return await write(operations, *args)

Operations.write = write_or_wait
Pool._sync_periodically = fail
from snapfs.cli import main
sys.argv[1:1] = ["mount", "--foreground"]
main()
"""


@pytest.mark.parametrize("beside", ["nothing", "write"])
def test_a_daemon_that_fails_leaves_no_mount(mounted: Mounted, tmp_path: Path, beside: str) -> None:
    """Whatever nobody has thought of ends the daemon, also while it waits for itself through the kernel.

    Nobody waits for it then, and what was synced is there.
    """
    (mounted.path / "v").write_bytes(b"before")
    mounted.unmount()
    flag = tmp_path / "flag"
    command = [sys.executable, "-c", _FAILING, str(mounted.pool), str(mounted.path), beside, str(flag)]
    daemon = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: os.path.ismount(mounted.path), "it is mounted")
        descriptor = os.open(mounted.path / "v", os.O_RDWR)
        os.pwrite(descriptor, b"synced", 0)
        os.fsync(descriptor)
        os.pwrite(descriptor, b"not synced", 6)
        flag.touch()
        if beside == "write":
            # It has the kernel write back what is not synced, and waits for that.
            snapfs("snapshot", mounted.path, "s", expect=1)
        _, told = daemon.communicate(timeout=60)
        with contextlib.suppress(OSError):
            os.close(descriptor)
    finally:
        daemon.kill()
        daemon.wait()
    assert daemon.returncode not in (0, -9) and b"a defect" in told
    assert not os.path.ismount(mounted.path)
    mounted.mount()
    assert (mounted.path / "v").read_bytes().startswith(b"synced")
    assert not list(mounted.snapshots.iterdir())


def test_each_procedure_is_rehearsed() -> None:
    """Each row of the table names a test, and the test is there."""
    text = OPERATIONS.read_text().split("## What you see", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 25
    tests = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for row in rows:
        names = re.findall(r"`(test_[a-z0-9_]+)`", row.rsplit("|", 2)[1])
        assert names, f"no test rehearses: {row[:100]}"
        for name in names:
            assert f"def {name}(" in tests, name
