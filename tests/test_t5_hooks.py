"""Hooks on a real mount: applications hold still for the cut, and go on whatever happens."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from .conftest import Mounted, loop_device, mounted_filesystem, run, snapfs, wait_for_end, wait_until

pytestmark = pytest.mark.mount


def script(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def add_hook(mounted: Mounted, tmp_path: Path, before: str, after: str, *options: object, name: str = "app") -> Path:
    """A hook whose programs note their turns in a file; that file."""
    notes = tmp_path / "notes"
    first = script(tmp_path, f"{name}-before", f"echo {name} before >> {notes}\n{before}")
    second = script(tmp_path, f"{name}-after", f"{after}\necho {name} after >> {notes}")
    snapfs("hook", "add", mounted.path, name, "--before", first, "--after", second, *options)
    return notes


def told(notes: Path) -> list[str]:
    return notes.read_text().splitlines() if notes.exists() else []


def is_running(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_cut_falls_between_before_and_after(mounted: Mounted, tmp_path: Path) -> None:
    volume = mounted.path / "v"
    volume.write_bytes(b"idle  " * 1000)
    notes = add_hook(
        mounted,
        tmp_path,
        f"printf frozen | dd of={volume} conv=notrunc 2>/dev/null; env > {tmp_path}/env",
        f"printf thawed | dd of={volume} conv=notrunc 2>/dev/null",
    )
    add_hook(mounted, tmp_path, "", "", name="zweites")
    made = json.loads(snapfs("snapshot", mounted.path, "s", "--json").stdout)
    assert (mounted.snapshots / "s" / "v").read_bytes()[:6] == b"frozen"
    assert volume.read_bytes()[:6] == b"thawed"
    assert told(notes) == ["app before", "zweites before", "zweites after", "app after"]
    assert made["frozen_ms"] > 1
    assert json.loads((mounted.snapshots / "s" / ".manifest.json").read_text())["snapshot"]["frozen_ms"] > 1
    environment = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    environment.pop("_", None)
    environment.pop("SHLVL", None)
    assert environment == {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "PWD": "/",
        "SNAPFS_MOUNT": str(mounted.path),
        "SNAPFS_SNAPSHOT": "s",
        "SNAPFS_PHASE": "before",
        "SNAPFS_HOOK": "app",
    }
    os.mkdir(mounted.snapshots / "by-mkdir")
    assert len(told(notes)) == 8
    snapfs("snapshot", mounted.path, "without", "--no-hooks")
    assert len(told(notes)) == 8
    mounted.remount()
    snapfs("snapshot", mounted.path, "again")
    assert len(told(notes)) == 12
    listed = json.loads(snapfs("hook", "list", mounted.path, "--json").stdout)
    assert [one["name"] for one in listed] == ["app", "zweites"] and mounted.status()["hooks"] == listed
    snapfs("hook", "remove", mounted.path, "zweites")
    snapfs("hook", "remove", mounted.path, "app")
    snapfs("snapshot", mounted.path, "none")
    assert len(told(notes)) == 12


def test_a_hook_that_fails_or_takes_too_long_makes_no_snapshot(mounted: Mounted, tmp_path: Path) -> None:
    notes = add_hook(mounted, tmp_path, "echo database is away >&2; exit 3", "")
    answer = mounted.ask("snapshot s")
    assert answer["errno"] == errno.ECANCELED
    assert "database is away" in answer["error"] and "ended with 3" in answer["error"]
    with pytest.raises(OSError) as failed:
        os.mkdir(mounted.snapshots / "s")
    assert failed.value.errno == errno.ECANCELED
    assert told(notes) == ["app before", "app after"] * 2
    snapfs("hook", "remove", mounted.path, "app")
    notes.unlink()
    add_hook(mounted, tmp_path, f"sleep 1000 & echo $! > {tmp_path}/pid; wait", "", "--time-limit", "1s")
    answer = mounted.ask("snapshot s")
    assert answer["errno"] == errno.ECANCELED and "longer than 1 s" in answer["error"]
    assert told(notes) == ["app before", "app after"]
    child = int((tmp_path / "pid").read_text())
    wait_until(
        lambda: not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes(),
        "it is ended",
    )
    assert os.listdir(mounted.snapshots) == []
    snapfs("hook", "remove", mounted.path, "app")
    add_hook(mounted, tmp_path, "", "exit 7")
    assert mounted.ask("snapshot s")["ok"]
    events = (mounted.path / ".snapfs" / "events").read_text()
    assert "after ended with 7" in events


@pytest.mark.parametrize("victim", ["daemon", "guard"])
def test_applications_are_thawed_also_when_one_is_killed(mounted: Mounted, tmp_path: Path, victim: str) -> None:
    go_on = tmp_path / "go-on"
    os.mkfifo(go_on)
    notes = add_hook(mounted, tmp_path, f"cat {go_on}", "")
    import subprocess
    import sys

    asking = subprocess.Popen(
        [sys.executable, "-m", "snapfs", "snapshot", str(mounted.path), "s"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_until(lambda: told(notes) == ["app before"], "the hook runs")
    if victim == "daemon":
        mounted.kill()
    else:
        daemon = mounted.status()["pid"]
        children = " ".join(one.read_text() for one in Path(f"/proc/{daemon}/task").glob("*/children")).split()
        (guard,) = [int(pid) for pid in children if b"hookguard" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        fd = os.pidfd_open(guard)
        os.kill(guard, signal.SIGKILL)
        wait_for_end(fd)
    go_on.write_text("")
    wait_until(lambda: told(notes)[-1] == "app after", "the application is thawed")
    asking.communicate(timeout=60)
    assert asking.returncode == 1
    if victim == "daemon":
        run("umount", "--lazy", mounted.path)
        mounted.mount()
    assert os.listdir(mounted.snapshots) == []
    assert mounted.ask("snapshot after hooks=no")["ok"]


def test_a_bound_for_the_stall(mounted: Mounted, tmp_path: Path) -> None:
    (mounted.path / "v").write_bytes(b"1" * 100000)
    made = json.loads(snapfs("snapshot", mounted.path, "s", "--max-stall", "1s", "--json").stdout)
    assert 0 < made["stall_us"] < 1_000_000
    answer = mounted.ask("snapshot t max-stall=0.000001ms")
    assert answer["errno"] == errno.ETIMEDOUT and "held things up for" in answer["error"]
    notes = add_hook(mounted, tmp_path, "sleep 0.2", "")
    answer = mounted.ask("snapshot t max-stall=50ms")
    assert answer["errno"] in (errno.ETIMEDOUT, errno.ECANCELED), answer
    assert told(notes) == ["app before", "app after"] or told(notes) == ["app after"]
    assert mounted.ask("snapshot t max-stall=30s")["frozen_ms"] > 200
    assert sorted(os.listdir(mounted.snapshots)) == ["s", "t"]
    for bad in ("0ms", "fast", "-1ms", "5"):
        assert mounted.ask(f"snapshot u max-stall={bad}")["errno"] == errno.EINVAL


def test_a_frozen_ext4_needs_no_recovery(mounted: Mounted, tmp_path: Path) -> None:
    image = mounted.path / "disk"
    snapfs("create", image, "--size", "64M")
    run("mkfs.ext4", "-q", image)
    with loop_device(image) as device, mounted_filesystem(device, tmp_path / "fs") as folder:
        snapfs(
            "hook", "add", mounted.path, "fs", "--volume", "disk",
            "--before", f"/sbin/fsfreeze --freeze {folder}", "--after", f"/sbin/fsfreeze --unfreeze {folder}",
        )  # fmt: skip
        for number in range(5):
            (folder / f"file{number}").write_bytes(os.urandom(200000))
            snapfs("snapshot", mounted.path, f"s{number}", "--volume", "disk")
        (folder / "after").write_text("goes on")
    for number in range(5):
        copy = mounted.snapshots / f"s{number}" / "disk"
        assert "needs_recovery" not in run("dumpe2fs", "-h", copy).stdout
        run("e2fsck", "-fn", copy)


def test_bad_hooks_are_refused(mounted: Mounted) -> None:
    for line in (
        "hook add a",
        "hook add a before=relative",
        "hook add a before=/bin/true time-limit=0s",
        "hook add a before=/bin/true time-limit=2h",
        'hook add a "before=/bin/true \'open"',
        "hook add a before=/bin/true shell=perhaps",
        "hook add",
        "hook list x",
        "hook dance",
    ):
        assert mounted.ask(line)["errno"] == errno.EINVAL, line
    assert mounted.ask("hook remove a")["errno"] == errno.ENOENT
    assert mounted.ask("hook add a before=/bin/true")["ok"]
    assert mounted.ask("hook add a before=/bin/true")["errno"] == errno.EEXIST
    assert mounted.ask("hook add gone before=/no/such/program")["ok"]
    assert "cannot be run" in mounted.ask("snapshot s")["error"]
    assert mounted.ask("hook remove gone")["ok"]
    assert mounted.ask('hook add lines "before=test -n \\"$SNAPFS_MOUNT\\" && exit 0" shell=yes')["ok"]
    assert mounted.ask("snapshot s")["ok"]
