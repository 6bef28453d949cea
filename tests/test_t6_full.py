"""No room: for data, for inodes, for the catalog, in memory. On real mounts."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import resource
import threading
from pathlib import Path

import pytest

from .conftest import Mounted, clear_away, pool_on, small_filesystem, snapfs, wait_for_end, wait_until

pytestmark = pytest.mark.mount
MIB = 1 << 20


def direct_buffer(byte: bytes) -> mmap.mmap:
    """A MiB that O_DIRECT takes."""
    buffer = mmap.mmap(-1, MIB)
    buffer.write(byte * MIB)
    return buffer


def test_a_full_disk(tmp_path: Path) -> None:
    """A pool on a small filesystem that fills up: ENOSPC, nothing lost, and deleting makes room again."""
    with small_filesystem(tmp_path, 96 * MIB) as disk, pool_on(disk) as mounted:
        kept = os.urandom(20 * MIB)
        (mounted.path / "kept").write_bytes(kept)
        mounted.snapshot("s")
        fd = os.open(mounted.path / "filler", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
        buffer = direct_buffer(b"f")
        with pytest.raises(OSError, match="No space left") as caught:
            for number in range(200):
                os.pwrite(fd, buffer, number * MIB)
        assert caught.value.errno == 28
        os.close(fd)
        os.unlink(mounted.path / "kept")
        assert (mounted.snapshots / "s" / "kept").read_bytes() == kept
        os.rmdir(mounted.snapshots / "s")
        os.unlink(mounted.path / "filler")
        mounted.remount()
        assert sorted(os.listdir(mounted.path)) == [".snapfs", ".snapshots"]
        # It comes back in the background.
        wait_until(lambda: os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize >= 40 * MIB, "there is room again")
        (mounted.path / "again").write_bytes(kept)
        assert (mounted.path / "again").read_bytes() == kept


def test_a_disk_without_a_single_free_block(tmp_path: Path) -> None:
    """It mounts, is verified, and gives room: who holds the pool's lock could not be written down."""
    with small_filesystem(tmp_path, 96 * MIB) as disk, pool_on(disk) as mounted:
        (mounted.path / "v").write_bytes(os.urandom(20 * MIB))
        mounted.snapshot("s")
        (mounted.path / "v").unlink()
        mounted.unmount()
        with open(disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
            for size_bytes in (MIB, 4096):
                with contextlib.suppress(OSError) if size_bytes == MIB else contextlib.nullcontext():
                    while True:
                        filler.write(bytes(size_bytes))
        assert os.statvfs(disk).f_bavail < 4
        mounted.check()
        mounted.mount()
        os.rmdir(mounted.snapshots / "s")
        wait_until(lambda: os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize >= 18 * MIB, "its space is back")
        (disk / "filler").unlink()


@pytest.mark.parametrize("size_bytes", [96 * MIB, 1100 * MIB])
def test_a_disk_that_is_filled_and_unmounted_loses_nothing(tmp_path: Path, size_bytes: int) -> None:
    """What a program wrote that does not sync, up to the last block: its maps have room in the reserve."""
    with small_filesystem(tmp_path, size_bytes) as disk, pool_on(disk) as mounted:
        fd = os.open(mounted.path / "v", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, MIB)
        buffer.write(os.urandom(4096) * (MIB // 4096))
        end = 0
        for length in (MIB, 4096):
            with contextlib.suppress(OSError):
                while True:
                    end += os.pwrite(fd, memoryview(buffer)[:length], end)
        os.close(fd)
        assert end > size_bytes // 2
        mounted.remount()
        assert (mounted.path / "v").stat().st_size == end
        with open(mounted.path / "v", "rb", buffering=0) as file:
            assert all(file.read(4096) == buffer[:4096] for _ in range(end // 4096))


def test_deleting_goes_on_while_a_program_writes_to_a_full_disk(tmp_path: Path) -> None:
    """It takes nothing of the room that the first deletion was given, and has that of what is deleted."""
    with small_filesystem(tmp_path, 96 * MIB) as disk, pool_on(disk) as mounted:
        (mounted.path / "old").write_bytes(os.urandom(20 * MIB))
        for number in range(6):
            mounted.snapshot(f"s{number}")
        (mounted.path / "old").unlink()
        stop, is_refused = threading.Event(), threading.Event()
        ends = [0]

        def write() -> None:
            fd = os.open(mounted.path / "v", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
            with memoryview(direct_buffer(b"w")) as buffer:
                while not stop.is_set():
                    try:
                        ends.append(ends[-1] + os.pwrite(fd, buffer[: 1 << 16], ends[-1]))
                    except OSError as error:
                        assert error.errno == errno.ENOSPC
                        is_refused.set()
                        stop.wait(0.001)
            os.close(fd)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert is_refused.wait(60)
            end = ends[-1]
            for number in range(6):
                os.rmdir(mounted.snapshots / f"s{number}")
            wait_until(lambda: ends[-1] > end + 10 * MIB, "what was deleted is written to again")
        finally:
            stop.set()
            writer.join()
        mounted.remount()
        assert (mounted.path / "v").stat().st_size == ends[-1]


def test_what_cannot_be_made_durable_is_not_unmounted(tmp_path: Path) -> None:
    """Somebody removed even the reserve, to have room."""
    with small_filesystem(tmp_path, 96 * MIB) as disk, pool_on(disk) as mounted:
        block = os.urandom(4096)
        places = [index * 4 * MIB + number * 8192 for index in range(300) for number in range(16)]
        fd = os.open(mounted.path / "v", os.O_CREAT | os.O_RDWR)
        os.ftruncate(fd, 300 * 4 * MIB)
        os.fsync(fd)
        (mounted.pool / "reserve").unlink()
        with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(MIB))
        # Of the log's blocks some are there yet; of the maps' none.
        os.truncate(disk / "filler", os.stat(disk / "filler").st_size - 24 * MIB)
        for place in places:
            os.pwrite(fd, block, place)
        os.close(fd)
        with open(disk / "filler", "ab", buffering=0) as filler:
            for length in (MIB, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        filler.write(bytes(length))
        wait_until(lambda: mounted.status()["space"]["reserve_spent"], "it was given up")
        refused = snapfs("umount", mounted.path, expect=1)
        assert "stays mounted: not all that was written can be made durable" in refused.stderr
        assert os.path.ismount(mounted.path)
        (disk / "filler").unlink()
        mounted.remount()
        with open(mounted.path / "v", "rb") as file:
            assert all(os.pread(file.fileno(), 4096, place) == block for place in places)


def test_no_inodes_left(tmp_path: Path) -> None:
    """Each first write after a snapshot makes a log, which is a file: there are fewer inodes than blocks here."""
    with small_filesystem(tmp_path, 64 * MIB, "-N", "64") as disk, pool_on(disk) as mounted:
        path = mounted.path / "v"
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        held: dict[str, bytes] = {}
        with pytest.raises(OSError, match="No space left") as caught:
            for number in range(200):
                data = b"%d" % number * 100
                os.pwrite(fd, data, 0)
                os.fsync(fd)
                mounted.snapshot(f"s{number}")
                held[f"s{number}"] = data
        assert caught.value.errno == errno.ENOSPC and len(held) > 5
        os.close(fd)
        for name, data in held.items():
            assert (mounted.snapshots / name / "v").read_bytes()[: len(data)] == data
        for name in list(held)[: len(held) // 2]:
            os.rmdir(mounted.snapshots / name)
        mounted.remount()
        path.write_bytes(b"again")
        mounted.snapshot("again")
        assert (mounted.snapshots / "again" / "v").read_bytes() == path.read_bytes() == b"again"


def test_a_full_device_of_the_catalog(tmp_path: Path) -> None:
    """Data lies elsewhere: the pool's own directory is what others fill up."""
    (tmp_path / "data").mkdir()
    with small_filesystem(tmp_path, 24 * MIB) as disk, pool_on(disk, "--device", tmp_path / "data") as mounted:
        path = mounted.path / "v"
        kept = os.urandom(4 * MIB)
        path.write_bytes(kept)
        mounted.snapshot("s")
        (disk / "filler").write_bytes(b"")
        with open(disk / "filler", "r+b", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
            while True:
                filler.write(bytes(64 << 10))
        fd = os.open(path, os.O_RDWR)
        refused = 0
        for number in range(300):
            try:
                os.pwrite(fd, b"%05d" % number, number * 4096)
                os.fsync(fd)
                mounted.snapshot(f"t{number}")
            except OSError as error:
                assert error.errno == errno.ENOSPC
                refused += 1
                break
        assert refused, "the device was not full"
        assert (mounted.snapshots / "s" / "v").read_bytes() == kept
        # What is kept in reserve lets deleting go on.
        os.rmdir(mounted.snapshots / "s")
        os.unlink(disk / "filler")
        os.pwrite(fd, b"after", 0)
        os.fsync(fd)
        os.close(fd)
        mounted.snapshot("after")
        now = path.read_bytes()
        assert now[:5] == b"after" and len(now) == len(kept)
        mounted.remount()
        assert path.read_bytes() == now


@pytest.mark.parametrize("spare_bytes", [0, 4 * MIB, 12 * MIB])
def test_no_memory_left(tmp_path: Path, spare_bytes: int) -> None:
    """The daemon may have no more address space: errors say so; or it ends in order, as it cannot answer any more."""
    with pool_on(tmp_path) as mounted:
        path = mounted.path / "v"
        snapfs("create", path, "--size", "64M")
        first = os.urandom(16 * MIB)
        with open(path, "r+b") as file:
            file.write(first)
            os.fsync(file.fileno())
        mounted.snapshot("s")
        daemon = os.pidfd_open(int(mounted.status()["pid"]))
        limit_memory(mounted, spare_bytes)
        clients = [MemoryClient(mounted, number) for number in range(6)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert {error for client in clients for error in client.errors} <= MemoryClient.EXPECTED
        try:
            limit_memory(mounted, None)
        except (OSError, ValueError):
            wait_for_end(daemon)
            log = (mounted.pool / "daemon.log").read_text()
            assert "Traceback" not in log
            assert "no memory for a request" in log
            clear_away(mounted)
            mounted.mount()
        else:
            os.close(daemon)
        assert mounted.status()["health"] == "ok"
        assert (mounted.snapshots / "s" / "v").read_bytes()[: len(first)] == first
        for client in clients:
            client.verify()
        with open(path, "r+b") as file:
            file.write(b"again")
            os.fsync(file.fileno())
        mounted.snapshot("again")


def limit_memory(mounted: Mounted, spare_bytes: int | None) -> None:
    """Let the daemon have so much more address space than it has now; None for any amount."""
    pid = int(mounted.status()["pid"])
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = resource.RLIM_INFINITY if spare_bytes is None else pages * 4096 + spare_bytes
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


class MemoryClient(threading.Thread):
    """Writes with O_DIRECT and syncs, reads, makes and deletes snapshots, and remembers what was acknowledged."""

    # ENOENT and ENOTDIR: of the bare folder behind a mount that has ended.
    EXPECTED = frozenset((errno.ENOMEM, errno.ECONNABORTED, errno.ENOTCONN, errno.ENOENT, errno.ENOTDIR, errno.EIO))

    def __init__(self, mounted: Mounted, number: int) -> None:
        super().__init__()
        self.mounted = mounted
        self.path = mounted.path / "v"
        self.place = 20 + number
        self.random = random.Random(number)
        self.may_be = {0}
        self.errors: set[int | None] = set()

    def run(self) -> None:
        for step in range(1, 120):
            try:
                self.random.choice((self._write, self._read, self._snapshot))(step)
            except OSError as error:
                self.errors.add(error.errno)

    def _write(self, step: int) -> None:
        fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        try:
            self.may_be.add(step)
            os.pwrite(fd, direct_buffer(bytes([step])), self.place * MIB)
            os.fsync(fd)
            self.may_be = {step}
        finally:
            os.close(fd)

    def _read(self, step: int) -> None:
        with open(self.path, "rb", buffering=0) as file:
            os.preadv(file.fileno(), [bytearray(MIB)], self.random.randrange(16) * MIB)

    def _snapshot(self, step: int) -> None:
        made = self.mounted.snapshots / f"{self.place}-{step}"
        os.mkdir(made)
        if step % 2:
            os.rmdir(made)

    def verify(self) -> None:
        with open(self.path, "rb") as file:
            file.seek(self.place * MIB)
            found = set(file.read(MIB))
        assert found <= self.may_be, (found, self.may_be)
