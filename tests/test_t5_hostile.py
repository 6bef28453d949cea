"""What clients of a mount may do, and still nobody else loses anything by it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from .conftest import MEMORY, SNAPFS, Mounted, clear_away, mounted_filesystem, run, snapfs, wait_for_end, wait_until

pytestmark = pytest.mark.mount
BLOCK = 4096
LATEST_NS, EARLIEST_NS = (1 << 63) - 1, -(1 << 63)


@pytest.mark.parametrize(
    ("given_ns", "kept_ns"),
    [
        (10**19, LATEST_NS),
        (-(10**19), EARLIEST_NS),
        (-11_644_473_600 * 10**9, EARLIEST_NS),
        (-(10**18) - 1, -(10**18) - 1),
    ],
)
def test_times_of_other_centuries(mounted_in_memory: Mounted, given_ns: int, kept_ns: int) -> None:
    """One of 2300 ended the daemon at its next sync."""
    volume, other = mounted_in_memory.path / "v", mounted_in_memory.path / "other"
    for path in (volume, other):
        path.write_bytes(b"x" * 5000)
    os.utime(volume, ns=(given_ns, given_ns))
    for path in (volume, other):
        run("sync", path)
    os.mkdir(mounted_in_memory.snapshots / "s")
    mounted_in_memory.remount()
    assert volume.stat().st_mtime_ns == kept_ns
    assert (mounted_in_memory.snapshots / "s" / "v").stat().st_mtime_ns == kept_ns
    assert (mounted_in_memory.snapshots / "s" / ".manifest.json").read_bytes()
    assert mounted_in_memory.status()["health"] == "ok"


def test_discarding_loses_nothing_that_is_written_meanwhile(mounted_in_memory: Mounted) -> None:
    """The kernel's size of a file is ahead of the daemon's while its pages are not handed over yet."""
    path = mounted_in_memory.path / "log"
    path.write_bytes(bytes(2 * BLOCK))
    is_over = threading.Event()
    count = 0

    def append() -> None:
        nonlocal count
        with open(path, "ab", buffering=0) as file:
            while not is_over.is_set():
                # The daemon is asked now and then, so that there are not more pages than it can take.
                os.statvfs(mounted_in_memory.path)
                for _ in range(16):
                    file.write(struct.pack("<Q", count) * (BLOCK // 8))
                    count += 1
            os.fsync(file.fileno())

    writer = threading.Thread(target=append)
    writer.start()
    for _ in range(40):
        mounted_in_memory.ask("discard log 0 4096")
    is_over.set()
    writer.join()
    contents = path.read_bytes()
    assert len(contents) == (2 + count) * BLOCK
    assert [struct.unpack_from("<Q", contents, at)[0] for at in range(2 * BLOCK, len(contents), BLOCK)] == list(
        range(count)
    )


def test_a_removed_volume_that_comes_back_is_as_it_was_though_somebody_has_the_removed_one_pinned(
    mounted_in_memory: Mounted,
) -> None:
    """With O_PATH, as a bind mount does, the kernel keeps an inode, its pages and its size, with no file open."""
    path = mounted_in_memory.path / "v"
    path.write_bytes(b"old" * 3000)
    mounted_in_memory.snapshot("s")
    path.write_bytes(b"new" * 100)
    assert path.read_bytes() == b"new" * 100
    pinned = os.open(path, os.O_PATH)
    path.unlink()
    assert mounted_in_memory.ask("rollback s")["ok"]
    assert path.stat().st_size == 9000
    assert path.read_bytes() == b"old" * 3000
    os.close(pinned)


def test_mapping_the_events_holds_nothing_up(mounted_in_memory: Mounted) -> None:
    """A page that is being read is locked by the kernel, which waited in the event loop for that lock."""
    mounted = mounted_in_memory
    path = mounted.path / ".snapfs" / "events"
    mapper = (
        "import mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "while True:\n"
        "    with mmap.mmap(fd, max(1, os.fstat(fd).st_size), flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as found:\n"
        "        found[len(found) - 1]\n"
    )
    mappers = [subprocess.Popen([sys.executable, "-c", mapper, str(path)]) for _ in range(2)]
    try:
        for number in range(200):
            os.mkdir(mounted.snapshots / f"{number}")
            os.rmdir(mounted.snapshots / f"{number}")
        wait_until(lambda: b'"199"' in path.read_bytes(), "the events are told")
        # With the write-back cache the kernel asks for no sizes: it was told of this one.
        wait_until(lambda: path.stat().st_size == len(path.read_bytes()), "the kernel knows how long they are")
    finally:
        for one in mappers:
            one.kill()
            one.wait()


def helper_of(mounted: Mounted) -> int:
    """The process through which a daemon uses its own mount."""
    threads = Path(f"/proc/{mounted.status()['pid']}/task").iterdir()
    children = [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]
    (pid,) = [pid for pid in children if b"helper.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return pid


def kill_helper(mounted: Mounted) -> None:
    """And see it dead: what it has begun cannot be done twice."""
    pid = helper_of(mounted)
    ended = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    wait_for_end(ended)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_for_all_of_the_daemons_processes_loses_nothing(
    mounted_in_memory: Mounted, number: signal.Signals
) -> None:
    """As a service manager sends it, and a terminal."""
    path = mounted_in_memory.path / "v"
    daemon_pid = int(mounted_in_memory.status()["pid"])
    ended = os.pidfd_open(daemon_pid)
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"kept")
    os.fsync(fd)
    os.pwrite(fd, b"written" * 1000, 1 << 20)
    for pid in (helper_of(mounted_in_memory), daemon_pid):
        os.kill(pid, number)
    wait_for_end(ended)
    with contextlib.suppress(OSError):
        os.close(fd)
    mounted_in_memory.mount()
    assert path.read_bytes() == b"kept".ljust(1 << 20, b"\0") + b"written" * 1000


def test_a_helper_that_was_killed_is_started_anew(mounted_in_memory: Mounted) -> None:
    path = mounted_in_memory.path / "v"
    with open(path, "wb", buffering=0) as file:
        for number in range(3):
            file.write(b"%d" % number * BLOCK)
            kill_helper(mounted_in_memory)
            assert (mounted_in_memory.snapshot(f"{number}") / "v").stat().st_size == (number + 1) * BLOCK
    os.truncate(path, 5)
    kill_helper(mounted_in_memory)
    assert mounted_in_memory.ask("rollback 2")["ok"]
    assert path.stat().st_size == 3 * BLOCK


def test_nobody_else_can_keep_hooks_from_being_run(mounted_in_memory: Mounted) -> None:
    """Any user could take the name of a socket in no filesystem, by which they kept each other out."""
    mounted = mounted_in_memory
    snapfs("hook", "add", mounted.path, "h", "--before", "/bin/true")
    pool_id = json.loads((mounted.pool / "pool.json").read_text())["pool_id"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as taken:
        taken.bind(f"\0snapfs-hooks-{pool_id}")
        assert mounted.ask("snapshot s")["ok"]


def test_an_image_that_became_a_link_is_not_followed(mounted_in_memory: Mounted, tmp_path: Path) -> None:
    """Whoever owns the folder could have the daemon write to any file of root's."""
    mounted = mounted_in_memory
    image, other, secret = tmp_path / "folder" / "image", tmp_path / "other", tmp_path / "secret"
    image.parent.mkdir()
    image.write_bytes(b"image" * 2000)
    secret.write_bytes(b"secret" * 2000)
    snapfs("create", mounted.path / "v", "--mode", "cow", "--source", image)
    mounted.unmount()

    def in_its_place() -> None:
        image.rename(other)
        image.symlink_to(secret)

    def in_its_folders_place() -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        secret.rename(elsewhere / "image")
        image.unlink()
        image.parent.rmdir()
        image.parent.symlink_to(elsewhere)

    for put_a_link in (in_its_place, in_its_folders_place):
        put_a_link()
        mounted.mount()
        with pytest.raises(OSError), open(mounted.path / "v", "r+b", buffering=0) as file:
            file.write(b"overwritten")
            os.fsync(file.fileno())
        assert b"image-missing" in (mounted.path / ".snapfs" / "events").read_bytes()
        assert image.read_bytes() == b"secret" * 2000
        mounted.unmount()
    image.parent.unlink()
    image.parent.mkdir()
    other.rename(image)
    mounted.mount()
    assert (mounted.path / "v").read_bytes() == b"image" * 2000


def test_a_command_does_not_wait_for_one_that_takes_long(mounted_in_memory: Mounted) -> None:
    """The kernel has the writes to one inode follow one another, in a sleep that no signal ends."""
    mounted = mounted_in_memory
    (mounted.path / "v").write_bytes(os.urandom(8 << 20))
    mounted.snapshot("s")
    wait_until(lambda: not mounted.status()["unsealed_snapshot_count"], "it is sealed")
    scrub = subprocess.Popen([*SNAPFS, "scrub", mounted.path, "--rate", "64K"], stderr=subprocess.DEVNULL)
    wait_until(lambda: bool(mounted.status()["jobs"]), "the scrub is under way")
    assert mounted.ask("list")["ok"] and mounted.ask("create w size=1M")["ok"]
    assert mounted.ask("snapshot t")["ok"]
    numbers = {(mounted.path / ".snapfs" / "control").stat().st_ino for _ in range(200)}
    assert len(numbers) == 127, "all but the one that is open"
    assert mounted.status()["jobs"]
    # It would take minutes: a command ends with the daemon.
    mounted.kill()
    assert scrub.wait(60)
    mounted.mount()


def test_a_pool_with_a_full_device_outside_is_mounted(tmp_path: Path) -> None:
    """To lock the device nothing is written there."""
    with (
        mounted_filesystem("tmpfs", tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m") as disk,
        tempfile.TemporaryDirectory(dir=MEMORY) as folder,
    ):
        (disk / "device").mkdir()
        mounted = Mounted(Path(folder), "--device", disk / "device")
        try:
            (mounted.path / "v").write_bytes(b"kept" * 1000)
            mounted.snapshot("s")
            mounted.unmount()
            with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(4096))
            mounted.mount()
            assert (mounted.path / "v").read_bytes() == b"kept" * 1000
            os.rmdir(mounted.snapshots / "s")
            mounted.unmount()
            mounted.check()
        finally:
            clear_away(mounted)


def test_a_log_that_became_a_link_is_not_followed(mounted_in_memory: Mounted, tmp_path: Path) -> None:
    victim, log = tmp_path / "victim", mounted_in_memory.pool / "daemon.log"
    victim.write_bytes(b"mine")
    mounted_in_memory.unmount()
    log.unlink()
    log.symlink_to(victim)
    refused = snapfs("mount", mounted_in_memory.pool, mounted_in_memory.path, expect=1)
    assert "daemon.log" in refused.stderr
    assert victim.read_bytes() == b"mine"
    log.unlink()
    mounted_in_memory.mount()
