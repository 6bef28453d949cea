"""Every device through the conformance kit, and what a power cut does to one in memory."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import stat
from pathlib import Path
from typing import Any

import apsw
import pytest

from snapfs.backends import (
    CrashPlan,
    DirectoryDevice,
    FailNth,
    FaultyDevice,
    LockHolder,
    MemoryDevice,
    open_local_image,
)
from snapfs.backends.conformance import check_device, check_lock
from snapfs.database import Database
from snapfs.errors import DamagedError, NoSpaceError, UnreadableError


def fresh(folder: Path) -> DirectoryDevice:
    path = folder / str(len(list(folder.iterdir())))
    path.mkdir()
    return DirectoryDevice(path)


def test_a_directory_is_a_device(tmp_path: Path) -> None:
    check_device(lambda: fresh(tmp_path))
    check_lock(lambda: DirectoryDevice(tmp_path))


def test_a_directory_that_is_only_read_has_a_lock_without_a_file(tmp_path: Path) -> None:
    reader = DirectoryDevice(tmp_path, writable=False)
    reader.lock("lock", "nobody is told")
    assert os.listdir(tmp_path) == []
    for writable in (True, False):
        other = DirectoryDevice(tmp_path, writable=writable)
        with pytest.raises(LockHolder):
            other.lock("lock", "the other")
        other.close()
    reader.close()
    writer = DirectoryDevice(tmp_path)
    writer.lock("lock", "the writer")
    reader = DirectoryDevice(tmp_path, writable=False)
    with pytest.raises(LockHolder) as caught:
        reader.lock("lock", "the reader")
    assert caught.value.holder == "the writer"
    writer.create("file").close()
    writer.close()
    file = reader.open("file")
    with pytest.raises(OSError):
        file.write(b"x", 0)
    file.close()
    reader.lock("lock", "the reader")
    assert (tmp_path / "lock").read_bytes() == b""
    reader.close()


@pytest.mark.parametrize("code", [errno.EBADF, errno.ENOLCK])
def test_a_lock_of_what_is_only_read_needs_no_writable_file(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS it is refused with EBADF (https://man7.org/linux/man-pages/man2/flock.2.html, "NFS details")."""
    (tmp_path / "lock").write_bytes(b"")

    def flock(fd: int, kind: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) or code == errno.ENOLCK:
            raise OSError(code, os.strerror(code))
        if kind & fcntl.LOCK_EX and not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_RDWR:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    reader = DirectoryDevice(tmp_path, writable=False)
    before = len(os.listdir("/proc/self/fd"))
    if code == errno.ENOLCK:
        with pytest.raises(OSError) as caught:
            reader.lock("lock", "the reader")
        assert caught.value.errno == code and len(os.listdir("/proc/self/fd")) == before
    else:
        reader.lock("lock", "the reader")
    reader.close()


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    device = DirectoryDevice(tmp_path, writable=False)
    for name in ("pipe", "."):
        with pytest.raises(OSError) as caught:
            device.open(name)
        assert caught.value.filename == name
    device.close()


def test_memory_is_a_device() -> None:
    check_device(MemoryDevice)


def test_a_faulty_device_without_faults_is_a_device() -> None:
    check_device(lambda: FaultyDevice(MemoryDevice()))


def test_faults_strike_when_told() -> None:
    hook = FailNth("write", 2, errno.EIO, only="a")
    device = FaultyDevice(MemoryDevice(), hook)
    file = device.create("a")
    file.write(b"1", 0)
    with pytest.raises(OSError, match="Input/output"):
        file.write(b"2", 0)
    file.write(b"3", 0)
    assert hook.failed_count == 1


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "device").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    (tmp_path / "device" / "file").symlink_to(tmp_path / "outside" / "secret")
    (tmp_path / "device" / "logs").symlink_to(tmp_path / "outside")
    device = DirectoryDevice(tmp_path / "device")
    for name in ("file", "logs/secret"):
        with pytest.raises(OSError) as caught:
            device.open(name)
        assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)
    device.close()


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        device = DirectoryDevice(tmp_path)
        device.create("logs/0/x").close()
        device.close()
    finally:
        os.umask(previous)
    assert (tmp_path / "logs" / "0" / "x").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_a_power_cut_drops_what_was_not_synced(keep: float) -> None:
    device = MemoryDevice()
    file = device.create("f")
    file.write(b"old" * 2000, 0)
    file.sync()
    device.sync_names("")
    file.write(b"new" * 2000, 0)
    device.create("g").write(b"x", 0)
    after = device.crash(CrashPlan(seed=1, keep=keep, torn=0.0))
    buffer = bytearray(6000)
    after.open("f").read_into(buffer, 0)
    assert bytes(buffer[:3]) == (b"new" if keep else b"old")
    assert after.names("") == (["f", "g"] if keep else ["f"])


def test_memory_has_a_capacity() -> None:
    device = MemoryDevice(capacity_bytes=8192)
    file = device.create("f")
    with pytest.raises(OSError) as caught:
        file.write(bytes(20000), 0)
    assert caught.value.errno == errno.ENOSPC
    file.truncate(0)
    file.write(bytes(8192), 0)


def test_sqlite_survives_power_cuts_on_a_device() -> None:
    """A commit that returned is there after any cut; one that did not is there whole or not at all."""
    for seed in range(150):
        device = MemoryDevice()
        database = Database(device, "db", "a test", create_schemas=["CREATE TABLE t (x INTEGER, y BLOB)"])
        device.sync_names("")
        count = 0
        for number in range(seed % 7 + 1):
            with database.transaction():
                database.each("INSERT INTO t VALUES (?, ?)", [(number, bytes(3000))] * 4)
            count += 4
        after = device.crash(CrashPlan(seed))
        database.abandon()
        reopened = Database(after, "db", "a test")
        assert reopened.row("SELECT count(*) FROM t") == (count,), seed
        assert reopened.row("PRAGMA integrity_check") == ("ok",)
        reopened.close()


def test_a_full_device_is_said_to_be_full() -> None:
    device = MemoryDevice(capacity_bytes=128 << 10)
    database = Database(device, "db", "a test", create_schemas=["CREATE TABLE t (y BLOB)"])
    with pytest.raises(NoSpaceError), database.transaction():
        database.each("INSERT INTO t VALUES (?)", [(bytes(100000),)] * 4)
    assert database.number("SELECT count(*) FROM t") == 0
    database.close()


def test_a_number_that_is_none_is_damage() -> None:
    database = Database(MemoryDevice(), "db", "a test", create_schemas=["CREATE TABLE t (y BLOB)"])
    for query in ("SELECT y FROM t", "SELECT max(y) FROM t", "SELECT 'x'"):
        with pytest.raises(DamagedError, match="a test is damaged"):
            database.number(query)
    database.close()


def test_what_is_written_while_a_device_in_memory_syncs_is_for_the_next_sync() -> None:
    device = MemoryDevice()
    file = device.create("f")
    file.write(b"a" * 4096, 0)

    class Interrupting(dict[int, bytes]):
        def __setitem__(self, page: int, content: bytes) -> None:
            super().__setitem__(page, content)
            if page == 0:
                file.write(b"b" * 4096, 8 * 4096)

    node = file._node
    node.durable_pages = Interrupting()
    file.sync()
    assert 0 in node.durable_pages and 8 not in node.durable_pages and 8 in node.unsynced
    file.sync()
    assert 8 in node.durable_pages and not node.unsynced


def test_a_file_that_others_put_there_is_not_written_to(tmp_path: Path) -> None:
    """They may have it open, and would read what is written to the new one of that name."""
    device = DirectoryDevice(tmp_path)
    planted = tmp_path / "f"
    planted.write_bytes(b"")
    with open(planted, "rb") as reader:
        file = device.create("f")
        file.write(b"secret", 0)
        assert reader.read() == b"" and planted.read_bytes() == b"secret"
        file.close()
    device.close()


def test_a_database_that_is_exchanged_after_its_device_was_opened_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may rename the pool's directory has its path lead to another database when SQLite opens it."""
    for name in ("pool", "other"):
        (tmp_path / name).mkdir()
        device = DirectoryDevice(tmp_path / name)
        Database(device, "db", "the catalog", create_schemas=["CREATE TABLE t (a)"]).close()
        device.close()
    journals = sqlite3.connect(tmp_path / "other" / "db")
    journals.execute("PRAGMA journal_mode=DELETE").fetchall()
    journals.close()
    before = (tmp_path / "other" / "db").read_bytes()
    device = DirectoryDevice(tmp_path / "pool")
    monkeypatch.setattr(device, "local_path", lambda name: str(tmp_path / "other" / name))
    with pytest.raises(UnreadableError, match="exchanged"):
        Database(device, "db", "the catalog")
    assert (tmp_path / "other" / "db").read_bytes() == before
    assert os.listdir(tmp_path / "other") == ["db"]
    monkeypatch.undo()
    # What SQLite reads beside it counts as well.
    connect = apsw.Connection

    def connect_and_exchange(path: str, **options: Any) -> apsw.Connection:
        connection = connect(path, **options)
        (tmp_path / "pool").rename(tmp_path / "away")
        (tmp_path / "other").rename(tmp_path / "pool")
        return connection

    monkeypatch.setattr(apsw, "Connection", connect_and_exchange)
    with pytest.raises(UnreadableError, match="exchanged"):
        Database(device, "db", "the catalog")
    device.close()


def test_what_an_image_is_is_seen_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To open a tape drive or a watchdog does something."""
    opened: list[int] = []
    open_file = os.open

    def noting(path: str, flags: int, *args: Any, **options: Any) -> int:
        opened.append(flags)
        return open_file(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", noting)
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", str(tmp_path / "pipe")):
        with pytest.raises(OSError, match="neither a file nor a block device"):
            open_local_image(path, True)
    image = tmp_path / "image"
    image.write_bytes(b"x" * 512)
    assert opened and all(flags & os.O_PATH for flags in opened)
    file = open_local_image(str(image), True)
    assert file.size() == 512
    file.close()

    def exchanged(path: str) -> str:
        image.rename(tmp_path / "away")
        image.write_bytes(b"y" * 512)
        raise FileNotFoundError(path)

    # Without proc mounted it is opened by its path again.
    with monkeypatch.context() as patch:
        patch.setattr(os, "readlink", exchanged)
        with pytest.raises(OSError, match="exchanged"):
            open_local_image(str(image), True)
    (tmp_path / "link").symlink_to(image)
    for link in (tmp_path / "link", Path("/proc/self/cwd") / "x"):
        with pytest.raises(OSError):
            open_local_image(str(link), False)


def test_what_could_not_be_replaced_leaves_nothing_aside() -> None:
    device = FaultyDevice(MemoryDevice(), FailNth("write", 1, errno.ENOSPC))
    with pytest.raises(OSError):
        device.write_file("f", b"x")
    assert device.names("") == []
