"""Hooks on a real mount: applications hold still for the cut, and go on whatever happens."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sqlite3
import subprocess
import sys
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
    assert [one["name"] for one in listed] == ["app", "zweites"] and listed[0]["before"].endswith("app-before")
    assert mounted.status()["hooks"] == [{"name": one["name"], "is_damaged": False} for one in listed]
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
    add_hook(mounted, tmp_path, "", "echo login of S3cret failed; exit 7")
    assert mounted.ask("snapshot s")["ok"]
    events = (mounted.path / ".snapfs" / "events").read_text()
    assert '"event": "hook-failed"' in events and "after ended with 7" in events
    # Everyone may read these; what the programs say is for the log.
    assert "S3cret" not in events and "database is away" not in events
    assert "S3cret" in (mounted.pool / "daemon.log").read_text()


def test_what_a_hook_says_to_a_schedule_is_not_for_everyone(mounted: Mounted, tmp_path: Path) -> None:
    add_hook(mounted, tmp_path, "echo login of S3cret failed; exit 3", "")
    snapfs("schedule", "add", mounted.path, "often", "--every", "1s")

    def has_failed() -> bool:
        return "schedule-failed" in (mounted.path / ".snapfs" / "events").read_text()

    wait_until(has_failed, "the schedule's snapshot has failed")
    snapfs("schedule", "remove", mounted.path, "often")
    for name in ("events", "status.json"):
        text = (mounted.path / ".snapfs" / name).read_text()
        assert "S3cret" not in text


@pytest.mark.parametrize("victim", ["daemon", "guard"])
def test_applications_are_thawed_also_when_one_is_killed(mounted: Mounted, tmp_path: Path, victim: str) -> None:
    go_on = tmp_path / "go-on"
    os.mkfifo(go_on)
    notes = add_hook(mounted, tmp_path, f"cat {go_on}", "")
    asking = subprocess.Popen(
        [sys.executable, "-m", "snapfs", "snapshot", str(mounted.path), "s"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_until(lambda: told(notes) == ["app before"], "the hook runs")
    if victim == "daemon":
        mounted.kill()
    else:
        guard = guard_of(mounted)
        fd = os.pidfd_open(guard)
        os.kill(guard, signal.SIGKILL)
        wait_for_end(fd)
    # Opened for both, for whoever waited for it may have been ended.
    os.close(os.open(go_on, os.O_RDWR))
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


# -- what attacks found ----------------------------------------------------------------------


def test_a_hook_that_asks_for_snapshots_is_refused_and_hangs_nothing(mounted: Mounted, tmp_path: Path) -> None:
    said = tmp_path / "said"
    inside = f"{sys.executable} -m snapfs snapshot {mounted.path} inner 2>> {said}"
    notes = add_hook(mounted, tmp_path, f"{inside}; mkdir {mounted.snapshots}/inner 2>> {said}; true", "")
    snapfs("snapshot", mounted.path, "outer")
    assert os.listdir(mounted.snapshots) == ["outer"]
    assert said.read_text().count("Resource deadlock avoided") >= 1 and len(said.read_text().splitlines()) == 2
    assert told(notes) == ["app before", "app after"]


def test_what_a_hook_freezes_may_hold_everything_it_writes_to(mounted: Mounted, tmp_path: Path) -> None:
    """The next hook hangs on a frozen filesystem and cannot be killed, and the guard has nowhere to write to."""
    image = mounted.path / "disk"
    snapfs("create", image, "--size", "64M")
    run("mkfs.ext4", "-q", image)
    with loop_device(image) as device, mounted_filesystem(device, tmp_path / "fs") as folder:
        os.environ["TMPDIR"] = str(folder)
        try:
            freeze, thaw = f"/sbin/fsfreeze --freeze {folder}", f"/sbin/fsfreeze --unfreeze {folder}"
            snapfs("hook", "add", mounted.path, "a", "--before", freeze, "--after", thaw, "--time-limit", "5s")
            writer = script(tmp_path, "writer", f"echo x > {folder}/x")
            snapfs("hook", "add", mounted.path, "b", "--before", writer, "--time-limit", "1s")
            answer = mounted.ask("snapshot s")
        finally:
            del os.environ["TMPDIR"]
        assert answer["errno"] == errno.ECANCELED and "could not even be killed" in answer["error"], answer
        (folder / "goes-on").write_text("thawed")
    assert os.listdir(mounted.snapshots) == []


@pytest.mark.parametrize("phase", ["before", "after"])
def test_a_guard_that_is_killed_leaves_nothing_frozen(mounted: Mounted, tmp_path: Path, phase: str) -> None:
    """What it was running is ended first; a hook that was not begun is not thawed; frozen time is told in full."""
    notes = tmp_path / "notes"
    pause = {one: f"sleep {int(one == phase)}" for one in ("before", "after")}
    first = script(tmp_path, "first", f"echo freezing >> {notes}; {pause['before']}; echo frozen >> {notes}")
    last = script(tmp_path, "last", f"echo thawing >> {notes}; {pause['after']}; echo thawed >> {notes}")
    snapfs("hook", "add", mounted.path, "app", "--before", first, "--after", last)
    snapfs("hook", "add", mounted.path, "later", "--after", script(tmp_path, "other", f"echo later >> {notes}"))
    asking = subprocess.Popen(
        [sys.executable, "-m", "snapfs", "snapshot", str(mounted.path), "s", "--json", "--max-stall", "30s"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_until(lambda: ("freezing" if phase == "before" else "thawing") in told(notes), "it is at it")
    guard = guard_of(mounted)
    fd = os.pidfd_open(guard)
    os.kill(guard, signal.SIGKILL)
    wait_for_end(fd)
    out, _ = asking.communicate(timeout=60)
    if phase == "before":
        assert asking.returncode == 1 and told(notes) == ["freezing", "thawing", "thawed"]
    else:
        # The second time is whole; the first was ended.
        assert told(notes) == ["freezing", "frozen", "later", "thawing", "thawing", "thawed"]
        assert json.loads(out)["frozen_ms"] > 1000
    assert "hook-guard-lost" in (mounted.path / ".snapfs" / "events").read_text()


def guard_of(mounted: Mounted) -> int:
    daemon = mounted.status()["pid"]
    children = " ".join(one.read_text() for one in Path(f"/proc/{daemon}/task").glob("*/children")).split()
    (guard,) = [int(pid) for pid in children if b"hookguard" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return guard


def test_guards_of_a_daemon_that_was_killed_end_before_others_begin(mounted: Mounted, tmp_path: Path) -> None:
    notes = add_hook(mounted, tmp_path, "sleep 1", "sleep 1")
    asking = subprocess.Popen(
        [sys.executable, "-m", "snapfs", "snapshot", str(mounted.path), "s"], stderr=subprocess.DEVNULL
    )
    wait_until(lambda: told(notes) == ["app before"], "the hook runs")
    mounted.kill()
    asking.wait(60)
    run("umount", "--lazy", mounted.path)
    mounted.mount()
    snapfs("snapshot", mounted.path, "t")
    assert told(notes) == ["app before", "app after"] * 2


def test_a_damaged_hook_is_told_and_holds_snapshots_up(mounted: Mounted) -> None:
    for name in ("a", "b", "c", "d"):
        assert mounted.ask(f"hook add {name} before=/bin/true")["ok"]
    mounted.unmount()
    with contextlib.closing(sqlite3.connect(mounted.pool / "catalog.sqlite")) as database, database:
        rule = json.loads(database.execute("SELECT rule FROM hooks LIMIT 1").fetchone()[0])
        for name, damaged in (
            ("a", json.dumps({**rule, "time_limit_s": 0}).replace(": 0", ": 1e400")),
            ("b", "[" * 100000),
            ("c", json.dumps({**rule, "volumes": "abc"})),
        ):
            database.execute("UPDATE hooks SET rule = ? WHERE name = ?", (damaged, name))
        database.execute("UPDATE hooks SET rule = CAST(x'ff7b' AS TEXT) WHERE name = 'd'")
    mounted.mount()
    answer = mounted.ask("snapshot s")
    assert answer["errno"] == errno.ECANCELED and "hook 'a' is damaged" in answer["error"]
    assert "damaged" in snapfs("hook", "list", mounted.path).stdout
    assert mounted.ask("snapshot s hooks=no")["ok"]
    for name in ("a", "b", "c", "d"):
        snapfs("hook", "remove", mounted.path, name)
    assert mounted.ask("snapshot t")["ok"]


def test_words_and_bounds(mounted: Mounted, tmp_path: Path) -> None:
    assert mounted.ask("hook add \udcff before=/bin/true")["errno"] == errno.EINVAL
    assert mounted.ask("hook add a before=/bin/" + "x" * 9000)["errno"] == errno.EINVAL
    assert mounted.ask("snapshot s max-stall=\u0661ms")["errno"] == errno.EINVAL
    add_hook(mounted, tmp_path, "printf '\\033[31mred\\n%05000d' 1; exit 1", "")
    answer = mounted.ask("snapshot s")
    assert "[31mred" in answer["error"] and answer["error"].isprintable() and len(answer["error"]) < 1200
    snapfs("hook", "remove", mounted.path, "app")
    add_hook(mounted, tmp_path, "sleep 1", "")
    answer = mounted.ask("snapshot s max-stall=100ms")
    assert answer["errno"] == errno.ETIMEDOUT and "allowed" in answer["error"], answer


def _scrubbing(mounted: Mounted) -> subprocess.Popen[bytes]:
    """A scrub that takes minutes, under way."""
    (mounted.path / "v").write_bytes(os.urandom(8 << 20))
    mounted.snapshot("s")
    wait_until(lambda: mounted.status()["unsealed_snapshot_count"] == 0, "it is sealed")
    asking = subprocess.Popen(
        [sys.executable, "-m", "snapfs", "scrub", str(mounted.path), "--rate", "64K"], stderr=subprocess.PIPE
    )
    wait_until(lambda: bool(mounted.status()["jobs"]), "it scrubs")
    return asking


def test_a_scrub_is_stopped_when_the_daemon_is(mounted: Mounted) -> None:
    assert mounted.ask("scrub rate=1")["errno"] == errno.EINVAL
    asking = _scrubbing(mounted)
    pid = mounted.status()["pid"]
    fd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGTERM)
    wait_for_end(fd)
    _, words = asking.communicate(timeout=60)
    # The connection may be gone before the answer is.
    assert asking.returncode == 1 and (b"was stopped" in words or b"ended before it had answered" in words), words
    mounted.mount()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_whoever_asked_for_a_scrub_stops_it(mounted: Mounted, number: int) -> None:
    asking = _scrubbing(mounted)
    daemon = mounted.status()["pid"]
    # Impatiently: once more before there can be an answer.
    os.kill(daemon, signal.SIGSTOP)
    try:
        asking.send_signal(number)
        waits_in = Path(f"/proc/{asking.pid}/wchan")
        wait_until(lambda: "request_wait" in waits_in.read_text(), "it asks the daemon")
        asking.send_signal(number)
    finally:
        os.kill(daemon, signal.SIGCONT)
    _, words = asking.communicate(timeout=60)
    assert asking.returncode == 1 and b"scrub was stopped" in words, words
    assert not mounted.status()["jobs"]


def test_a_job_is_stopped_by_its_name(mounted: Mounted) -> None:
    asking = _scrubbing(mounted)
    (job,) = mounted.status()["jobs"]
    assert job["is_stoppable"]
    assert f"job {job['name']}: scrub of the sealed change logs, " in snapfs("status", mounted.path).stdout
    assert f"a job {job['name']!r} already" in mounted.ask(f"scrub job={job['name']}")["error"]
    assert mounted.ask("scrub job=../x")["errno"] == errno.EINVAL
    assert json.loads(snapfs("stop", mounted.path, job["name"], "--json").stdout)["kind"] == "scrub"
    _, words = asking.communicate(timeout=60)
    assert asking.returncode == 1 and b"scrub was stopped" in words, words
    assert not mounted.status()["jobs"]
    assert mounted.ask(f"stop {job['name']}")["errno"] == errno.ENOENT
    assert mounted.ask("scrub job=x")["ok"], "a name is free again"


def test_a_command_says_so_when_the_daemon_is_killed_under_it(mounted: Mounted) -> None:
    asking = _scrubbing(mounted)
    mounted.kill()
    _, words = asking.communicate(timeout=60)
    assert asking.returncode == 1 and b"ended before it had answered. Mount the pool again" in words, words
    mounted.mount()
