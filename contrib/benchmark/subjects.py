"""What is measured: each subject has one file of the same size on the same disk, and may take a snapshot of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
SNAPFS = [sys.executable, "-m", "snapfs"]
MIB = 1 << 20
_FICLONE = 0x40049409
_WAIT_S = 20
_SEALING_S = 1200


def fill(path: Path, size_bytes: int) -> None:
    """Random bytes, durable: nothing of the file is a hole, for any subject."""
    block = os.urandom(MIB)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        for offset in range(0, size_bytes, MIB):
            os.pwrite(fd, block, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def wait_for(what: str, is_there: Callable[[], bool], wait_s: float = _WAIT_S) -> None:
    """Wait for a process to have done something. Raises TimeoutError."""
    until = time.monotonic() + wait_s
    pause_s = 0.01
    while not is_there():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not come in {wait_s} s")
        time.sleep(pause_s)
        pause_s = min(1.0, 2 * pause_s)


class Subject:
    """``file`` is what rows read and write; ``fresh`` a name that is free for a new file, if there can be one."""

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        self.file = file

    @property
    def fresh(self) -> Path:
        return self.file.with_name("fresh")


class Keeper(Subject, ABC):
    """One that has snapshots."""

    @abstractmethod
    def snapshot(self) -> None:
        """Have what is in the file now kept."""


class Native(Subject):
    """A plain file of the filesystem that the others' files lie on."""


class Null(Subject):
    """A pyfuse3 handler that returns constants."""


class Snapfs(Keeper):
    """A pool, mounted."""

    def __init__(self, name: str, mount: Path, pool: Path) -> None:
        super().__init__(name, mount / "file")
        self.mount = mount
        self.pool = pool

    def snapshot(self) -> None:
        self.ask("snapshot")

    def ask(self, *lines: str) -> dict[str, object]:
        """Commands to the control file, and the answer to the last."""
        fd = os.open(self.mount / ".snapfs" / "control", os.O_RDWR)
        try:
            answer = b"{}"
            for line in lines:
                os.write(fd, line.encode() + b"\n")
                answer = os.read(fd, MIB)
            return json.loads(answer)  # type: ignore[no-any-return]
        finally:
            os.close(fd)

    def status(self) -> dict[str, object]:
        return json.loads((self.mount / ".snapfs" / "status.json").read_text())  # type: ignore[no-any-return]

    def settle(self) -> None:
        """Wait until all snapshots are sealed: what the background does for them is measured where it is the point."""
        wait_for("the sealing", lambda: self.status()["unsealed_snapshot_count"] == 0, _SEALING_S)

    def remount(self) -> float:
        """Unmount and mount again; how many seconds the mount took."""
        self.unmount()
        return self.do_mount()

    def do_mount(self) -> float:
        started = time.perf_counter()
        subprocess.run([*SNAPFS, "mount", str(self.pool), str(self.mount)], check=True)
        return time.perf_counter() - started

    def unmount(self) -> None:
        subprocess.run([*SNAPFS, "umount", str(self.mount)], check=True)


class Reflink(Keeper):
    """A file on a filesystem of its own, on a loop device; a snapshot is a reflink of it."""

    def snapshot(self) -> None:
        kept = self.file.with_name("kept")
        with contextlib.suppress(FileNotFoundError):
            kept.unlink()
        self.clone_to(kept)

    def clone_to(self, path: Path) -> None:
        with open(self.file, "rb") as source, open(path, "xb") as copy:
            fcntl.ioctl(copy, _FICLONE, source.fileno())


class Qemu(Keeper):
    """A qcow2 file shown by qemu-storage-daemon: by its own FUSE export, or as NBD under nbdfuse.

    Its snapshots are a chain: each freezes the file of before, and what is written goes to a new one over it.
    The FUSE export of qemu 7.2 mixes up requests that run at the same time: above a queue depth of 1 it stands
    for speed only. NBD is free of that.
    """

    def __init__(self, name: str, folder: Path, size_bytes: int, *, by_nbd: bool) -> None:
        super().__init__(name, folder / "file")
        self._folder = folder
        self._by_nbd = by_nbd
        self._count = 1
        self.file.touch()
        _quiet("qemu-img", "create", "-q", "-f", "qcow2", self._image(1), str(size_bytes))

    def _image(self, number: int) -> Path:
        return self._folder / f"{number}.qcow2"

    def start(self) -> None:
        pid_file = self._folder / "pid"
        command = ["qemu-storage-daemon", "--daemonize", "--pidfile", pid_file]
        # The host's page cache is used, as it is by snapfs.
        command += ["--blockdev", f"driver=file,node-name=file,filename={self._image(self._count)}"]
        command += ["--blockdev", "driver=qcow2,node-name=disk,file=file"]
        if self._by_nbd:
            socket = self._folder / "socket"
            command += ["--nbd-server", f"addr.type=unix,addr.path={socket}"]
            _quiet(*command, "--export", "type=nbd,id=export,node-name=disk,writable=on")
            self._nbdfuse = subprocess.Popen(["nbdfuse", self.file, f"nbd+unix:///disk?socket={socket}"])
        else:
            mount = f"mountpoint={self.file}"
            _quiet(*command, "--export", f"type=fuse,id=export,node-name=disk,{mount},writable=on")
        wait_for(self.name, lambda: self.file.stat().st_size > 0)

    def stop(self) -> None:
        if self._by_nbd:
            _quiet("fusermount3", "-u", self.file)
            self._nbdfuse.wait()
        pid = int((self._folder / "pid").read_text())
        os.kill(pid, 15)
        wait_for(f"the end of {self.name}", lambda: not Path(f"/proc/{pid}").exists())
        wait_for("the unmount", lambda: self.file.stat().st_size == 0)

    def snapshot(self) -> None:
        self.stop()
        self.freeze()
        self.start()

    def freeze(self, writes: int = 0) -> None:
        """A new file over the last one, and into it a few random blocks; while it is not running."""
        self._count += 1
        below = self._image(self._count - 1).name
        _quiet("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, self._image(self._count))
        if writes:
            size = (self._size() >> 12) - 1
            words = [
                f"write -P {self._count % 256} {number * 7919 * self._count % size * 4096} 4k"
                for number in range(writes)
            ]
            _quiet("qemu-io", *(part for one in words for part in ("-c", one)), self._image(self._count))

    def _size(self) -> int:
        shown = subprocess.run(
            ["qemu-img", "info", "--output=json", self._image(1)], check=True, capture_output=True, text=True
        )
        return int(json.loads(shown.stdout)["virtual-size"])


def _quiet(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def snapfs(folder: Path, name: str = "snapfs") -> Iterator[Snapfs]:
    """A new pool, mounted."""
    mount = folder / f"{name}-mount"
    mount.mkdir()
    subject = Snapfs(name, mount, folder / f"{name}-pool")
    subprocess.run([*SNAPFS, "init", str(subject.pool)], check=True, stdout=subprocess.DEVNULL)
    subject.do_mount()
    try:
        yield subject
    finally:
        subject.unmount()
        shutil.rmtree(subject.pool)


@contextlib.contextmanager
def null(folder: Path, name: str, loop: str, size_bytes: int) -> Iterator[Null]:
    """The handler of constants, under pyfuse3's own loop ("stock") or that of snapfs ("fast")."""
    mount = folder / f"{name}-mount"
    mount.mkdir()
    process = subprocess.Popen([sys.executable, str(HERE / "null_handler.py"), str(mount), str(size_bytes), loop])
    try:
        wait_for(name, lambda: (mount / "file").exists())
        yield Null(name, mount / "file")
    finally:
        _quiet("fusermount3", "-u", mount)
        process.wait()


@contextlib.contextmanager
def native(folder: Path) -> Iterator[Native]:
    """A file beside the pools."""
    (folder / "native").mkdir()
    yield Native("native", folder / "native" / "file")


@contextlib.contextmanager
def qemu(folder: Path, name: str, size_bytes: int, *, by_nbd: bool, chain: int = 0) -> Iterator[Qemu | None]:
    """A qcow2 file, filled, and that many snapshots over it with a few random writes in each; None where it is not."""
    needed = ["qemu-storage-daemon", "qemu-img", "qemu-io", *(["nbdfuse"] if by_nbd else [])]
    absent = [one for one in needed if shutil.which(one) is None]
    if absent:
        print(f"{name} is left out: there is no {', '.join(absent)}", file=sys.stderr)
        yield None
        return
    # A comma would end a file's name for qemu.
    inside = folder / name.replace(",", "")
    inside.mkdir()
    subject = Qemu(name, inside, size_bytes, by_nbd=by_nbd)
    subject.start()
    try:
        fill(subject.file, size_bytes)
        if chain:
            subject.stop()
            for _ in range(chain):
                subject.freeze(writes=8)
            subject.start()
        yield subject
    finally:
        subject.stop()
        shutil.rmtree(inside)


@contextlib.contextmanager
def reflink(folder: Path, kind: str, size_bytes: int) -> Iterator[Reflink | None]:
    """A file on btrfs or XFS on a loop device; None where they are not to be had."""
    image, mount = folder / f"{kind}.img", folder / f"{kind}-mount"
    mount.mkdir()
    with open(image, "wb") as file:
        # Room for a copy of every block, twice over; allocated, so that the file below has no holes to fill.
        os.posix_fallocate(file.fileno(), 0, max(3 * size_bytes, 1 << 30))
    try:
        _quiet(f"mkfs.{kind}", "-q", image)
        _quiet("mount", "-o", "loop", image, mount)
    except (OSError, subprocess.CalledProcessError):
        image.unlink()
        print(f"{kind} cannot be made or mounted here: left out", file=sys.stderr)
        yield None
        return
    try:
        yield Reflink(kind, mount / "file")
    finally:
        _quiet("umount", mount)
        image.unlink()
