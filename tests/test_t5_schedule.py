"""Schedules and moments as paths, on a real mount."""

from __future__ import annotations

import errno
import json
import os
from datetime import UTC, datetime

import pytest

from .conftest import Mounted, run, snapfs, wait_until

pytestmark = pytest.mark.mount


def test_the_daemon_makes_snapshots_on_schedule(mounted: Mounted) -> None:
    (mounted.path / "v").write_bytes(b"1")
    mounted.snapshot("by-hand")
    snapfs("schedule", "add", mounted.path, "s", "--every", "1s", "--keep", "2")
    wait_until(lambda: len(list(mounted.snapshots.glob("s-*Z"))) == 2, "two snapshots of the schedule")
    first = set(os.listdir(mounted.snapshots))
    wait_until(lambda: not first & set(mounted.snapshots.glob("s-*")) and len(first) >= 2, "they are replaced")
    listed = json.loads(snapfs("schedule", "list", mounted.path, "--json").stdout)
    assert [(one["name"], one["every_s"], one["keep"]) for one in listed] == [("s", 1, "2")]
    made = json.loads(snapfs("list", mounted.path, "--json").stdout)
    assert {one["schedule"] for one in made} == {None, "s"}
    mounted.unmount()
    assert "s" in snapfs("schedule", "list", mounted.pool).stdout
    snapfs("schedule", "remove", mounted.pool, "s")
    mounted.mount()
    assert (mounted.snapshots / "by-hand" / "v").read_bytes() == b"1"
    assert json.loads(snapfs("schedule", "list", mounted.path, "--json").stdout) == []
    snapfs("schedule", "add", mounted.path, "x", "--every", "never", expect=2)
    snapfs("schedule", "remove", mounted.path, "x", expect=1)


def test_a_dry_run_lists_what_would_go(mounted: Mounted) -> None:
    (mounted.path / "v").write_bytes(b"1")
    snapfs("schedule", "add", mounted.path, "s", "--every", "52w")
    names = []
    for number in range(4):
        (mounted.path / "v").write_bytes(b"%d" % number)
        names.append(snapfs("schedule", "run", mounted.path, "s").stdout.strip())
    snapfs("hold", mounted.path, names[0], "mine")
    snapfs("schedule", "remove", mounted.path, "s")
    options = ("--every", "52w", "--keep", "1")
    assert snapfs("schedule", "add", mounted.path, "s", *options, "--dry-run").stdout.split() == names[1:3]
    assert json.loads(snapfs("schedule", "list", mounted.path, "--json").stdout) == []
    snapfs("schedule", "add", mounted.path, "s", *options)
    snapfs("schedule", "run", mounted.path, "s")
    kept = {one for one in os.listdir(mounted.snapshots) if one.startswith("s-")}
    assert names[0] in kept and not {*names[1:3]} & kept and len(kept) == 2


def test_moments_are_paths(mounted: Mounted) -> None:
    volume = mounted.path / "v"
    for number in range(3):
        volume.write_bytes(b"%d" % number)
        mounted.snapshot(f"s{number}")
        if number < 2:
            run("sleep", "1.1")
    entries = json.loads(snapfs("list", mounted.path, "--json").stdout)
    for number, one in enumerate(entries):
        second = one["created"][:19]
        assert (mounted.snapshots / f"@{second}Z" / "v").read_bytes() == b"%d" % number
        samba = datetime.fromisoformat(second).replace(tzinfo=UTC).strftime("@GMT-%Y.%m.%d-%H.%M.%S")
        assert run("cat", mounted.snapshots / samba / "v").stdout == str(number)
    assert (mounted.snapshots / "@latest" / "v").read_bytes() == b"2"
    assert sorted(os.listdir(mounted.snapshots / "@latest")) == [".manifest.json", "v"]
    assert sorted(os.listdir(mounted.snapshots)) == ["s0", "s1", "s2"]
    assert (mounted.snapshots / "@0s" / "v").read_bytes() == b"2"
    for name in ("@1h", "@2020-01-01", "@nonsense", "@"):
        assert not (mounted.snapshots / name).exists()
    # Commands take them too.
    assert mounted.ask("clone @latest/v again")["ok"]
    assert (mounted.path / "again").read_bytes() == b"2"
    volume.write_bytes(b"3")
    assert mounted.ask("diff @latest")["volumes"]
    undo = mounted.ask("rollback @latest volume=v")
    assert undo["name"] == "s2" and volume.read_bytes() == b"2"
    assert mounted.ask("rollback @1h")["errno"] == errno.ENOENT
    assert mounted.ask(f"delete {undo['undo']}")["ok"]
    # Under its name and as a moment at once.
    here = os.getcwd()
    try:
        os.chdir(mounted.snapshots / "s2")
        assert (mounted.snapshots / "@latest" / "v").read_bytes() == b"2"
        assert os.path.basename(os.getcwd()) == "s2"
    finally:
        os.chdir(here)
    with pytest.raises(OSError) as caught:
        os.rmdir(mounted.snapshots / "@latest")
    assert caught.value.errno in (errno.ENOENT, errno.EPERM, errno.EROFS)
    os.rmdir(mounted.snapshots / "s2")
    assert (mounted.snapshots / "@latest" / "v").read_bytes() == b"1"
