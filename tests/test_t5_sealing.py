"""Checksums on a real mount: damaged blocks give EIO and are named; scrub and verify prove the rest."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from .conftest import Mounted, run, snapfs, wait_until, wait_until_reclaimed

pytestmark = pytest.mark.mount

BLOCK = 4096


def sealed(mounted: Mounted) -> None:
    wait_until(lambda: mounted.status()["unsealed_snapshot_count"] == 0, "all snapshots are sealed")


def damage(mounted: Mounted, marker: bytes) -> None:
    """Change one byte behind the daemon's back, as a device that decays would."""
    for path in (mounted.pool / "device" / "logs").rglob("*"):
        if path.is_file():
            at = path.read_bytes().find(marker)
            if at >= 0:
                with path.open("r+b") as file:
                    file.seek(at)
                    file.write(b"\xff")
                os.sync()
                return
    raise AssertionError("nothing has these bytes")


def fail_to_read(path: Path, offset: int, length: int = BLOCK) -> None:
    # Past the page cache of the mount, which may hold what was read before the damage.
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        import mmap

        with mmap.mmap(-1, length) as buffer:
            with pytest.raises(OSError) as failed:
                os.preadv(fd, [buffer], offset)
            assert failed.value.errno == errno.EIO
    finally:
        os.close(fd)


@pytest.mark.parametrize("when", ["mounted", "unmounted"])
def test_a_damaged_block_is_named_and_never_read(mounted: Mounted, when: str) -> None:
    blocks = [b"%06d" % index * 682 + b"...." for index in range(300)]
    (mounted.path / "v").write_bytes(b"".join(blocks))
    (mounted.path / "sound").write_bytes(b"sound" * 10000)
    snapfs("snapshot", mounted.path, "s")
    sealed(mounted)
    if when == "unmounted":
        mounted.unmount()
    damage(mounted, b"000123")
    if when == "unmounted":
        mounted.mount()
    copy = mounted.snapshots / "s" / "v"
    fail_to_read(copy, 123 * BLOCK)
    fail_to_read(mounted.path / "v", 123 * BLOCK)
    with copy.open("rb") as file:
        file.seek(124 * BLOCK)
        assert file.read(BLOCK) == blocks[124]
    assert (mounted.snapshots / "s" / "sound").read_bytes() == b"sound" * 10000
    wait_until(lambda: bool(mounted.status()["damaged_blocks"]), "the damage is told")
    status = mounted.status()
    assert status["health"] == "damaged"
    (block,) = status["damaged_blocks"]
    assert block["offset"] == 123 * BLOCK
    assert block["volumes"] == [{"volume": "v", "is_live": True, "snapshots": ["s"], "snapshot_count": 1}]
    events = [json.loads(line) for line in (mounted.path / ".snapfs" / "events").read_text().splitlines()]
    assert [one["offset"] for one in events if one["event"] == "damaged-block"] == [123 * BLOCK]
    assert "damaged-block" in (mounted.pool / "daemon.log").read_text()
    told = snapfs("scrub", mounted.path, expect=4).stdout
    assert told.splitlines()[-1].split() == ["v", "503808", "yes", "s"]
    found = json.loads(snapfs("scrub", mounted.path, "--rate", "1G", "--json", expect=4).stdout)
    assert found["damaged_block_count"] == 1 and found["checked_bytes"] >= 300 * BLOCK
    told = snapfs("verify", mounted.path, "s", expect=4).stdout
    assert "damaged: v at offset 503808" in told and "not proven" in told
    # Written anew the live volume is sound; without the snapshot so is all.
    with (mounted.path / "v").open("r+b") as file:
        file.seek(123 * BLOCK)
        file.write(blocks[123])
    assert (mounted.path / "v").read_bytes() == b"".join(blocks)
    snapfs("delete", mounted.path, "s")
    wait_until_reclaimed(mounted)
    snapfs("scrub", mounted.path)
    assert mounted.status()["health"] == "ok"


def test_roots_prove_contents_and_survive(mounted: Mounted, tmp_path: Path) -> None:
    data = os.urandom(9 << 20)
    (mounted.path / "v").write_bytes(data)
    snapfs("snapshot", mounted.path, "first")
    with (mounted.path / "v").open("r+b") as file:
        file.seek(5 << 20)
        file.write(b"changed")
    snapfs("snapshot", mounted.path, "second")
    sealed(mounted)
    manifest = {
        name: json.loads((mounted.snapshots / name / ".manifest.json").read_text())["checksums"]
        for name in ("first", "second")
    }
    root = manifest["first"]["root"]
    assert manifest["first"]["is_sealed"] and len(root) == 64 and manifest["first"]["previous_root"] is None
    assert manifest["second"]["previous_root"] == root != manifest["second"]["root"]
    assert "proven" in snapfs("verify", mounted.path, "first", "--root", root).stdout
    snapfs("verify", mounted.path, "first", "--root", "0" * 64, expect=4)
    assert json.loads(snapfs("verify", mounted.path, "second", "--json").stdout)["is_proven"]
    mounted.remount()
    mounted.kill()
    run("umount", "--lazy", mounted.path)
    mounted.mount()
    assert "proven" in snapfs("verify", mounted.path, "second").stdout
    # Another pool with the same contents has the same root.
    other = tmp_path / "copy"
    other.mkdir()
    snapfs("init", other / "pool", "--processors", "3")
    (other / "mount").mkdir()
    snapfs("mount", other / "pool", other / "mount")
    try:
        (other / "mount" / "v").write_bytes(data)
        snapfs("snapshot", other / "mount", "same")
        snapfs("rename", other / "mount", "same", "renamed")
        wait_until(
            lambda: json.loads((other / "mount/.snapshots/renamed/.manifest.json").read_text())["checksums"][
                "is_sealed"
            ],
            "it is sealed",
        )
        snapfs("verify", other / "mount", "renamed", "--root", root)
    finally:
        snapfs("umount", other / "mount")


def test_wrong_usage_is_told(mounted: Mounted) -> None:
    assert mounted.ask("scrub rate=0")["errno"] == errno.EINVAL
    assert mounted.ask("scrub rate=fast")["exit_code"] != 0
    assert mounted.ask("verify nothing")["errno"] == errno.ENOENT
    assert mounted.ask("verify")["errno"] == errno.EINVAL
    assert mounted.ask("scrub")["checked_bytes"] == 0
