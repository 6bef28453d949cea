"""Real input: an ext4 on a loop device, SQLite, fio, counters under snapshots and kill -9."""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import sqlite3
import struct
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .conftest import Mounted, loop_device, mounted_filesystem, run, snapfs
from .kills import Kills

pytestmark = pytest.mark.mount
BLOCK = 4096
MIB = 1 << 20


@contextmanager
def in_thread(body: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run a loop beside the block until it ends; its failure fails the test."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            body(stop)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("direct_io", ["on", "off"])
def test_an_ext4_on_a_volume(mounted: Mounted, tmp_path: Path, direct_io: str) -> None:
    snapfs("create", mounted.path / "disk", "--size", "400M")
    source = tmp_path / "source"
    library = sysconfig.get_paths()["stdlib"]
    shutil.copytree(
        library,
        source,
        symlinks=True,
        ignore=shutil.ignore_patterns("site-packages", "test", "tests", "__pycache__", "*.so", "*.a"),
    )
    with loop_device(mounted.path / "disk", f"--direct-io={direct_io}") as device:
        run("mkfs.ext4", "-q", device)
        with mounted_filesystem(device, tmp_path / "live") as live:
            run("cp", "-a", source, live / "tree")
            run("fsfreeze", "--freeze", live)
            run("fsfreeze", "--unfreeze", live)

            def write(stop: threading.Event) -> None:
                number = 0
                while not stop.is_set():
                    number += 1
                    folder = live / f"later-{number % 5}"
                    folder.mkdir(exist_ok=True)
                    (folder / str(number)).write_bytes(os.urandom(30_000))
                    if number % 20 == 0:
                        os.sync()

            with in_thread(write):
                for number in range(5):
                    mounted.snapshot(f"s{number}")
    held = mounted.snapshots / "s3" / "disk"
    with mounted_filesystem(held, tmp_path / "then", "-o", "ro,noload,loop") as then:
        run("diff", "-r", "--no-dereference", source, then / "tree")
    run("cp", "--sparse=always", held, tmp_path / "copy")
    with mounted_filesystem(tmp_path / "copy", tmp_path / "replayed", "-o", "loop") as replayed:
        run("diff", "-r", "--no-dereference", source, replayed / "tree")
    run("e2fsck", "-f", "-n", tmp_path / "copy")


def test_sqlite_under_two_hundred_snapshots(mounted: Mounted, tmp_path: Path) -> None:
    path = mounted.path / "data.db"

    def write(stop: threading.Event) -> None:
        database = sqlite3.connect(path, timeout=60)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, filling BLOB)")
        database.commit()
        ready.set()
        number = 0
        while not stop.is_set():
            number += 1
            with database:
                database.execute("INSERT INTO rows VALUES (?, ?)", (number, os.urandom(1500)))
                database.execute("UPDATE rows SET filling = ? WHERE number = ?", (os.urandom(900), number // 2))
            if number == 300:
                half.set()
                half_is_taken.wait()
                # The second half with a rollback journal in place of the write-ahead log.
                assert database.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)
        database.close()

    ready, half, half_is_taken = threading.Event(), threading.Event(), threading.Event()
    with in_thread(write):
        ready.wait(60)
        for number in range(100):
            mounted.snapshot(f"{number:03}")
        half.wait(60)
        half_is_taken.set()
        for number in range(100, 200):
            mounted.snapshot(f"{number:03}")
    before = -1
    for number in range(200):
        copy = tmp_path / f"{number}"
        copy.mkdir()
        for name in os.listdir(mounted.snapshots / f"{number:03}"):
            if name.startswith("data.db") and not name.endswith("-shm"):
                shutil.copy(mounted.snapshots / f"{number:03}" / name, copy)
        database = sqlite3.connect(copy / "data.db")
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)], number
        count, last = database.execute("SELECT count(*), coalesce(max(number), 0) FROM rows").fetchone()
        database.close()
        assert count == last >= before, number
        before = count
        shutil.rmtree(copy)
    assert before > 100


def test_two_volumes_keep_their_order_in_a_thousand_snapshots(mounted_in_memory: Mounted) -> None:
    """The first is always written first: no snapshot has the second ahead of it."""
    mounted = mounted_in_memory
    names = ("first", "second")
    for name in names:
        (mounted.path / name).write_bytes(bytes(16 * BLOCK))

    def write(stop: threading.Event) -> None:
        fds = [os.open(mounted.path / name, os.O_WRONLY | os.O_DIRECT) for name in names]
        buffer = mmap.mmap(-1, BLOCK)
        number = 0
        while not stop.is_set():
            number += 1
            struct.pack_into("<Q", buffer, 0, number)
            for fd in fds:
                os.pwrite(fd, buffer, number % 16 * BLOCK)
        for fd in fds:
            os.close(fd)
        issued.append(number)

    issued: list[int] = []
    with in_thread(write):
        for number in range(1000):
            mounted.snapshot(str(number))
    before = 0
    for number in range(1000):
        counters = []
        for name in names:
            data = (mounted.snapshots / str(number) / name).read_bytes()
            counters.append(max(struct.unpack_from("<Q", data, place)[0] for place in range(0, len(data), BLOCK)))
        first, second = counters
        assert second <= first <= second + 1, number
        assert before <= first <= issued[0], number
        before = first
    assert before > 1000


def test_ten_thousand_snapshots(mounted_in_memory: Mounted) -> None:
    mounted = mounted_in_memory
    fd = os.open(mounted.path / "v", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 64 * MIB)
    control = os.open(mounted.control_path, os.O_RDWR)
    for first in range(0, 10_000, 4):
        os.pwrite(fd, struct.pack("<Q", first), first // 4 % 64 * MIB)
        os.write(control, b"".join(b"snapshot s%05d\n" % number for number in range(first, first + 4)))
        os.read(control, 65536)
    os.close(control)
    os.close(fd)
    assert len(os.listdir(mounted.snapshots)) == 10_000
    mounted.remount()
    assert len(os.listdir(mounted.snapshots)) == 10_000
    for number in (0, 1, 4, 5001, 9999):
        write = number // 4
        with open(mounted.snapshots / f"s{number:05}" / "v", "rb") as file:
            file.seek(write % 64 * MIB)
            assert struct.unpack("<Q", file.read(8)) == (write * 4,)
            file.seek((write + 1) % 64 * MIB)
            assert struct.unpack("<Q", file.read(8)) == (max(0, write - 63) * 4,)
    assert resident_mib(mounted) < 150
    for number in range(0, 10_000, 100):
        os.rmdir(mounted.snapshots / f"s{number:05}")
    assert len(os.listdir(mounted.snapshots)) == 9_900


def resident_mib(mounted: Mounted) -> float:
    status = Path(f"/proc/{mounted.status()['pid']}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def test_fio_verifies_over_snapshots(mounted: Mounted, tmp_path: Path) -> None:
    path = mounted.path / "v"
    common = ["--name=v", f"--filename={path}", "--size=48m", "--rw=randwrite", "--ioengine=libaio", "--direct=1"]
    common += ["--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--output-format=terse"]
    common += [f"--aux-path={tmp_path}", "--verify_state_save=0"]
    sums = {}
    for number in range(6):
        run("fio", *common, f"--randseed={number}", "--do_verify=1", "--io_size=24m", "--bsrange=512-64k")
        mounted.snapshot(str(number))
        sums[number] = hashlib.sha256(path.read_bytes()).hexdigest()
    # Each block once, so that it can be verified later from the seed alone.
    run("fio", *common, "--randseed=99", "--do_verify=0", "--bs=4k")
    for _ in range(2):
        for number, expected in sums.items():
            held = (mounted.snapshots / str(number) / "v").read_bytes()
            assert hashlib.sha256(held).hexdigest() == expected, number
        run("fio", *common, "--randseed=99", "--bs=4k", "--verify_only")
        mounted.remount()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", range(4))
def test_kill_at_random_points(mounted_in_memory: Mounted, seed: int) -> None:
    mounted = mounted_in_memory
    Kills(mounted, seed).rounds(25)
