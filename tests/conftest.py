"""Fixtures for tests on real mounts. Whatever a test leaves mounted, attached or running is taken away."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import hypothesis
import pytest
from click.testing import CliRunner, Result

from snapfs.cli import cli, main
from snapfs.errors import SnapfsError

# How long an example takes says nothing on a machine that is busy with other tests.
hypothesis.settings.register_profile("snapfs", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("snapfs")

# Where pools lie in tests that are not about what syncs do: kill -9 loses nothing that was written to a file.
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
SNAPFS = [sys.executable, "-m", "snapfs"]
# mallopt(3)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def can_mount() -> str:
    """Why this machine cannot mount; empty if it can."""
    if not os.path.exists("/dev/fuse"):
        return "there is no /dev/fuse"
    if os.geteuid() != 0:
        return "mount tests run as root, on loop devices and with other users"
    return ""


# The files of tests that take long, longest first.
LONG = ("t6_real", "t3_powercut", "t6_time", "t3_damage", "t5_model", "t3_model", "t6_power", "t3_faults", "t6_others")


def in_turn(items: list[pytest.Item], worker_count: int) -> list[pytest.Item]:
    """The tests in an order in which each of the workers, who begin with equal parts, begins with long ones."""

    def rank(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONG.index(name) if name in LONG else len(LONG)

    ordered = sorted(items, key=rank)
    return [item for worker in range(worker_count) for item in ordered[worker::worker_count]]


def pytest_configure() -> None:
    """Volumes of some megabytes are read thousands of times: their memory is kept, and not asked for anew each time."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for what, size_bytes in ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, 1 << 30), (_M_TOP_PAD, 64 << 20)):
            mallopt(what, size_bytes)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = in_turn(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    reason = can_mount()
    if reason:
        for item in items:
            if "mount" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def run(*command: object, expect: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command; fails with its output when it ends otherwise than expected."""
    words = as_words(*command)
    done: subprocess.CompletedProcess[str] = subprocess.run(
        words, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == expect, f"{words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done


def snapfs(*words: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return run(*SNAPFS, *words, expect=expect)


def as_words(*words: object) -> list[str]:
    """As a shell hands them over."""
    return [os.fspath(word) if isinstance(word, Path) else str(word) for word in words]


@contextlib.contextmanager
def ordinary_umask() -> Iterator[None]:
    """That of a shell, which commands may change."""
    umask = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(umask)


def invoke(*words: object) -> Result:
    """Run the command line in this process, which takes a third of the time."""
    with ordinary_umask():
        return CliRunner().invoke(cli, as_words(*words))


def main_here(*words: object) -> int:
    """Run the command line in this process as ``snapfs`` does, which ends with a code; what it tells goes to capsys."""
    with ordinary_umask(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["snapfs", *as_words(*words)])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0


def snapfs_here(*words: object) -> None:
    """Run the command line in this process; fails with its output."""
    done = invoke(*words)
    assert done.exit_code == 0, f"{words} ended with {done.exit_code}:\n{done.output}\n{done.exception!r}"


class Mounted:
    """A pool, and where it is mounted."""

    def __init__(self, folder: Path, *init_options: object, mount_options: tuple[str, ...] = ()) -> None:
        self.pool = folder / "pool"
        self.path = folder / "mount"
        self.path.mkdir()
        self.mount_options = mount_options
        snapfs_here("init", self.pool, *init_options)
        self.mount()

    @property
    def snapshots(self) -> Path:
        return self.path / ".snapshots"

    @property
    def control_path(self) -> Path:
        return self.path / ".snapfs" / "control"

    def status(self) -> dict[str, Any]:
        return self.status_of(self.path)

    @staticmethod
    def status_of(mount: Path) -> dict[str, Any]:
        """What a mount tells of itself."""
        return cast(dict[str, Any], json.loads((mount / ".snapfs" / "status.json").read_text()))

    def mount(self) -> None:
        options = ["-o", ",".join(self.mount_options)] if self.mount_options else []
        snapfs("mount", self.pool, self.path, *options)

    def unmount(self) -> None:
        def is_done() -> bool:
            done = invoke("umount", self.path)
            is_busy = isinstance(done.exception, SnapfsError) and done.exception.errno == errno.EBUSY
            assert done.exit_code == 0 or is_busy, f"{done.output}\n{done.exception!r}"
            return done.exit_code == 0

        wait_until(is_done, f"{self.path} stays busy")

    def remount(self) -> None:
        self.unmount()
        self.mount()

    def kill(self) -> None:
        """kill -9 the daemon, and wait until it is gone."""
        pid = int(self.status()["pid"])
        fd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        wait_for_end(fd)

    def ask(self, line: str) -> dict[str, Any]:
        """A command to the control file; its answer, also when it failed."""
        fd = os.open(self.control_path, os.O_RDWR)
        try:
            with contextlib.suppress(OSError):
                os.write(fd, line.encode("utf-8", "surrogateescape") + b"\n")
            return cast(dict[str, Any], json.loads(os.read(fd, 1 << 20)))
        finally:
            os.close(fd)

    def snapshot(self, name: str) -> Path:
        os.mkdir(self.snapshots / name)
        return self.snapshots / name

    def check(self) -> None:
        """The verifier finds nothing; the pool must not be mounted."""
        snapfs_here("check", self.pool)


def wait_for_end(pidfd: int) -> None:
    import select

    select.select([pidfd], [], [], 60)
    os.close(pidfd)


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Callable[..., Mounted]]:
    """Makes mounted pools; at the end each is unmounted and verified."""
    with _mounts_in(tmp_path) as make:
        yield make


@pytest.fixture
def mounted_in_memory() -> Iterator[Mounted]:
    """One mounted pool on a tmpfs."""
    with tempfile.TemporaryDirectory(prefix="snapfs-test-", dir=MEMORY) as folder, _mounts_in(Path(folder)) as make:
        yield make()


@contextlib.contextmanager
def _mounts_in(tmp_path: Path) -> Iterator[Callable[..., Mounted]]:
    made: list[Mounted] = []

    def make(*init_options: object, mount_options: tuple[str, ...] = ()) -> Mounted:
        folder = tmp_path / f"pool-{len(made)}"
        folder.mkdir()
        mounted = Mounted(folder, *init_options, mount_options=mount_options)
        made.append(mounted)
        return mounted

    try:
        yield make
        for mounted in made:
            if os.path.ismount(mounted.path):
                mounted.unmount()
            mounted.check()
    finally:
        for mounted in made:
            clear_away(mounted)


@pytest.fixture
def mounted(mounts: Callable[..., Mounted]) -> Mounted:
    """One mounted pool."""
    return mounts()


def clear_away(mounted: Mounted) -> None:
    """Unmount by force, and wait for the daemon's end."""
    pid = None
    with contextlib.suppress(OSError, ValueError):
        pid = int(mounted.status()["pid"])
    while b" %s " % os.fsencode(mounted.path) in Path("/proc/mounts").read_bytes():
        subprocess.run(["umount", "--lazy", str(mounted.path)], check=False, capture_output=True)
    if pid is not None:
        with contextlib.suppress(OSError):
            wait_for_end(os.pidfd_open(pid))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that happens in another process."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def wait_until_reclaimed(mounted: Mounted) -> None:
    """Wait until what deleted snapshots held is given back."""

    def is_done() -> bool:
        status = mounted.status()
        return not status["reclaim_waiting_count"] and not status["is_reclaiming"]

    wait_until(is_done, "the space of deleted snapshots comes back")


@contextlib.contextmanager
def traced(mounted: Mounted, calls: str, told: Path) -> Iterator[None]:
    """The daemon's system calls of these names, by strace, in a file; descriptors have their paths."""
    command = ["strace", "-f", "-y", "-e", f"trace={calls}", "-p", str(mounted.status()["pid"]), "-o", str(told)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert tracer.stderr is not None
        while "attached" not in tracer.stderr.readline():
            assert tracer.poll() is None
        yield
    finally:
        tracer.terminate()
        tracer.communicate()


@contextlib.contextmanager
def loop_device(image: Path, *options: str) -> Iterator[str]:
    """An image attached as a loop device."""
    device = run("losetup", "--find", "--show", *options, image).stdout.strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


def has_unmounted(folder: Path) -> bool:
    """Unmount; not while busy, as it is for the moment in which the tools of another test look at all mounts."""
    done = subprocess.run(["umount", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "busy" in done.stderr, done.stderr
    return done.returncode == 0


@contextlib.contextmanager
def mounted_filesystem(device: object, folder: Path, *options: str) -> Iterator[Path]:
    """A filesystem mounted on a folder."""
    folder.mkdir(exist_ok=True)
    run("mount", *options, device, folder)
    try:
        yield folder
    finally:
        wait_until(lambda: has_unmounted(folder), f"{folder} stays busy")


@contextlib.contextmanager
def small_filesystem(folder: Path, size_bytes: int, *options: str) -> Iterator[Path]:
    """An ext4 of its own, of a size."""
    image = folder / "image"
    with open(image, "wb") as file:
        file.truncate(size_bytes)
    run("mkfs.ext4", "-q", "-m", "0", *options, image)
    with mounted_filesystem(image, folder / "disk", "-o", "loop") as disk:
        yield disk


@contextlib.contextmanager
def pool_on(disk: Path, *init_options: object) -> Iterator[Mounted]:
    """A mounted pool there; at the end it is unmounted and verified."""
    mounted = Mounted(disk, *init_options)
    try:
        yield mounted
        mounted.unmount()
        mounted.check()
    finally:
        clear_away(mounted)
