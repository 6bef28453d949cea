"""Clocks that jump, a daemon that stands still for a while, and one that works for long; on a real mount."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest

from .conftest import Mounted, snapfs, wait_until
from .growth import work_for_long

pytestmark = pytest.mark.mount


def faketime_library() -> str:
    """What has a process see another time of day (libfaketime)."""
    (found,) = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
    return str(found)


def test_the_time_of_day_jumps(mounted: Mounted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Days forth and back: snapshots keep their order, schedules go on, nothing is made a thousand times."""
    shift = tmp_path / "shift"
    shift.write_text("+0")
    mounted.unmount()
    with monkeypatch.context() as patch:
        patch.setenv("LD_PRELOAD", faketime_library())
        patch.setenv("FAKETIME_TIMESTAMP_FILE", str(shift))
        patch.setenv("FAKETIME_NO_CACHE", "1")
        patch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        mounted.mount()
    volume = mounted.path / "v"
    volume.write_bytes(b"0")
    snapfs("schedule", "add", mounted.path, "s", "--every", "1s", "--keep", "4")
    shown = []
    for number, one in enumerate(("+0", "+1d", "-2d", "+400d")):
        shift.write_text(one)
        seen = scheduled(mounted)
        wait_until(lambda seen=seen: bool(scheduled(mounted) - seen), f"the schedule goes on at {one}")  # type: ignore[misc]
        volume.write_bytes(b"%d" % number)
        mounted.snapshot(f"by-hand-{number}")
        shown.append(mounted.status()["time"])
    assert shown[2] < shown[0] < shown[1] < shown[3], "the time did not jump"
    entries = json.loads(snapfs("list", mounted.path, "--json").stdout)
    by_hand = {one["name"]: one["instant"] for one in entries if one["name"].startswith("by-hand")}
    assert list(by_hand) == sorted(by_hand) and sorted(by_hand.values()) == list(by_hand.values())
    assert len(entries) <= 4 + 5, "one for each second that the clock leapt over"
    shift.write_text("+0")
    mounted.remount()
    for number in range(4):
        assert (mounted.snapshots / f"by-hand-{number}" / "v").read_bytes() == b"%d" % number


def scheduled(mounted: Mounted) -> set[str]:
    """The snapshots that the schedule made."""
    return {one for one in os.listdir(mounted.snapshots) if one.startswith("s-")}


def test_a_daemon_that_stood_still_goes_on(mounted: Mounted) -> None:
    """As when the machine was suspended: whoever waits gets what was asked for."""
    volume = mounted.path / "v"
    volume.write_bytes(b"before")
    pid = int(mounted.status()["pid"])
    os.kill(pid, signal.SIGSTOP)

    def write() -> None:
        with open(volume, "r+b") as file:
            file.write(b"during")
            os.fsync(file.fileno())
        mounted.snapshot("s")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        wait_until(lambda: waits_for_the_mount(writer), "the writer waits")
    finally:
        os.kill(pid, signal.SIGCONT)
    writer.join()
    assert (mounted.snapshots / "s" / "v").read_bytes() == b"during"
    assert mounted.status()["health"] == "ok"


def test_a_daemon_at_work_does_not_grow() -> None:
    assert work_for_long(1, 120) == 120


def waits_for_the_mount(thread: threading.Thread) -> bool:
    """Whether a thread is in a request to a FUSE daemon."""
    assert thread.native_id is not None
    stack = Path(f"/proc/self/task/{thread.native_id}/wchan").read_text()
    return "fuse" in stack or "request_wait" in stack
