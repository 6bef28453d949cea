"""Space on a real mount: what is predicted is what the device gets back, to the block."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from .conftest import Mounted, snapfs, wait_until_reclaimed

pytestmark = pytest.mark.mount

BLOCK = 4096


def data_bytes(mounted: Mounted) -> int:
    """What all change logs take on the device."""
    total = 0
    for path in (mounted.pool / "device" / "logs").rglob("*"):
        if path.is_file():
            total += path.stat().st_blocks * 512
    return total


def settled(mounted: Mounted) -> int:
    mounted.ask("sync")
    wait_until_reclaimed(mounted)
    mounted.remount()
    return data_bytes(mounted)


def write(path: Path, block: int, count: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, os.urandom(count * BLOCK), block * BLOCK)
    os.fsync(fd)
    os.close(fd)


def test_dry_runs_tell_what_is_freed_to_the_block(mounted: Mounted) -> None:
    volume = mounted.path / "v"
    write(volume, 0, 2000)
    for number in range(6):
        write(volume, number * 100, 50 + number * 30)
        snapfs("snapshot", mounted.path, f"s{number}")
    write(volume, 0, 2000)
    snapfs("clone", mounted.path, "s3/v", "clone")
    write(mounted.path / "clone", 300, 20)
    before = settled(mounted)
    told = json.loads(snapfs("delete", mounted.path, "s1", "s2", "s3", "--dry-run", "--json").stdout)
    assert [one["name"] for one in told["would_delete"]] == ["s1", "s2", "s3"]
    assert told["would_free_bytes"] >= sum(one["would_free_bytes"] for one in told["would_delete"]) > 0
    listed = {one["name"]: one for one in json.loads(snapfs("list", mounted.path, "--json").stdout)}
    assert listed["s0"]["written_bytes"] == 2000 * BLOCK and listed["s2"]["written_bytes"] == 110 * BLOCK
    assert listed["s2"]["exclusive_bytes"] == told["would_delete"][1]["would_free_bytes"]
    assert "together they would free" in snapfs("delete", mounted.path, "s1", "s2", "--dry-run").stdout
    snapfs("delete", mounted.path, "s1", "s2", "s3")
    after = settled(mounted)
    assert before - after == told["would_free_bytes"]


def test_reclaim_deletes_the_fewest_and_nothing_held_or_open(mounted: Mounted) -> None:
    volume = mounted.path / "v"
    sizes = [40, 400, 60, 300, 80]
    for number, count in enumerate(sizes):
        write(volume, 0, count)
        snapfs("snapshot", mounted.path, f"s{number}")
    write(volume, 0, 500)
    snapfs("hold", mounted.path, "s1", "mine")
    before = settled(mounted)
    with (mounted.snapshots / "s4" / "v").open("rb"):
        answer = mounted.ask("reclaim need=1G")
        assert answer["errno"] == errno.ENOSPC and "Nothing was deleted" in answer["fix"]
        told = json.loads(snapfs("reclaim", mounted.path, "--need", "240000", "--dry-run", "--json").stdout)
    assert told["is_smallest"] and told["would_delete"] == ["s3"]
    assert len(os.listdir(mounted.snapshots)) == 5
    done = json.loads(snapfs("reclaim", mounted.path, "--need", "240000", "--json").stdout)
    assert done["deleted"] == ["s3"] and done["freed_bytes"] == told["would_free_bytes"]
    assert before - settled(mounted) == done["freed_bytes"]
    assert "deleted" in snapfs("reclaim", mounted.path, "--need", "4K").stdout
    for line in ("reclaim", "reclaim need=x", "reclaim need=1G s1", "delete", "delete s0 dry-run=perhaps"):
        assert mounted.ask(line)["errno"] == errno.EINVAL, line
    assert mounted.ask("delete s0 nothing")["errno"] == errno.ENOENT
    assert mounted.ask("delete s0 s1")["errno"] == errno.EBUSY
    assert (mounted.snapshots / "s0").exists()
