"""What programs rely on with other filesystems: replaced files, errors of close, sizes, trees that are deleted."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Mounted, clear_away, run, snapfs, wait_until
from .harness import World, open_world

pytestmark = pytest.mark.mount

MIB = 1 << 20
DIRECT = ["oflag=direct", "conv=notrunc", "status=none"]


def with_little_room(mounted: Mounted, folder: Path, room: str = "4M") -> Path:
    """A volume of no size, whose change logs have little room."""
    folder.mkdir()
    snapfs("changelog", "create", mounted.path, "logs", "--device", folder, "--capacity", room)
    snapfs("create", mounted.path / "v", "--size", "0", "--change-log", "logs")
    return mounted.path / "v"


def with_no_room(mounted: Mounted, folder: Path) -> Path:
    """A volume of 1,000,000 times ``A``, all of it in a snapshot, in whose change logs there is no room any more."""
    path, filler = with_little_room(mounted, folder), mounted.path / "filler"
    snapfs("create", filler, "--size", "6M", "--change-log", "logs")
    path.write_bytes(b"A" * 1_000_000)
    filler.write_bytes(os.urandom(6 * MIB))
    run("sync", path, filler)
    mounted.snapshot("s")
    run("dd", "if=/dev/urandom", f"of={path}", "bs=4k", "count=1", "seek=200", *DIRECT)
    subprocess.run(["dd", "if=/dev/urandom", f"of={filler}", "bs=4k", "count=1536", *DIRECT], check=False)
    return path


def read_both(path: Path) -> tuple[bytes, bytes]:
    """Through the page cache, and past it."""
    through = path.read_bytes()
    done = subprocess.run(["dd", f"if={path}", "bs=1M", "iflag=direct", "status=none"], capture_output=True, check=True)
    return through, done.stdout


@pytest.mark.parametrize("how", ["truncate", "open"])
def test_a_cut_for_whose_tail_there_is_no_room_is_done_for_all(mounted: Mounted, tmp_path: Path, how: str) -> None:
    path = with_no_room(mounted, tmp_path / "logs")
    if how == "truncate":
        os.truncate(path, 500_001)
    else:
        os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    size_bytes = 500_001 if how == "truncate" else 0
    assert path.stat().st_size == size_bytes and read_both(path) == (b"A" * size_bytes,) * 2
    snapfs("changelog", "resize", mounted.path, "logs", "16M")
    with open(path, "ab") as file:
        file.write(b"B")
    assert read_both(path) == (b"A" * size_bytes + b"B",) * 2
    assert (mounted.snapshot("t") / "v").read_bytes() == b"A" * size_bytes + b"B"


@pytest.mark.parametrize("makes_snapshot", [False, True])
def test_close_tells_what_could_not_be_written_also_with_a_snapshot_meanwhile(
    mounted: Mounted, tmp_path: Path, makes_snapshot: bool
) -> None:
    path = with_little_room(mounted, tmp_path / "logs")
    mounted.snapshot("first")
    fd = os.open(path, os.O_WRONLY)
    for _ in range(8):
        os.write(fd, b"x" * MIB)
    if makes_snapshot:
        with pytest.raises(OSError, match="No space left"):
            mounted.snapshot("second")
    with pytest.raises(OSError, match="No space left"):
        os.close(fd)
    # Who did not have it open then is told nothing.
    os.close(os.open(path, os.O_WRONLY))


def test_a_child_does_not_take_what_close_tells_and_a_sync_that_told_it_ends_it(
    mounted: Mounted, tmp_path: Path
) -> None:
    path = with_little_room(mounted, tmp_path / "logs")
    mounted.snapshot("first")
    fd = os.open(path, os.O_WRONLY)
    os.set_inheritable(fd, True)
    for _ in range(8):
        os.write(fd, b"x" * MIB)
    with pytest.raises(OSError, match="No space left"):
        mounted.snapshot("second")
    subprocess.run(["true"], close_fds=False, check=True)
    copy = os.dup(fd)
    with pytest.raises(OSError, match="No space left"):
        os.close(copy)
    with pytest.raises(OSError, match="No space left"):
        os.fsync(fd)
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"y" * 4096, 0)
    os.fsync(fd)
    os.close(fd)


def test_a_file_that_is_open_for_synced_writes_makes_others_no_slower_than_a_sync_for_many(mounted: Mounted) -> None:
    """The kernel writes back by any writer's file: one sync does for all requests that come together."""
    path = mounted.path / "v"
    path.write_bytes(bytes(16 * MIB))
    mounted.snapshot("s")
    before = int(mounted.status()["commit_count"])
    synced = os.open(path, os.O_RDWR | os.O_DSYNC)
    with open(path, "r+b", buffering=0) as file:
        for block in range(0, 4096, 2):
            os.pwrite(file.fileno(), b"x" * 4096, block * 4096)
        os.fsync(file.fileno())
    os.close(synced)
    assert int(mounted.status()["commit_count"]) - before < 4 * 2048 / 4


def test_a_discard_that_stops_halfway_leaves_no_pages_of_what_is_gone(mounted: Mounted, tmp_path: Path) -> None:
    path = with_no_room(mounted, tmp_path / "logs")
    assert path.read_bytes()[:8] == b"A" * 8
    assert mounted.ask("discard v 0 500001")["errno"] == errno.ENOSPC
    through, past = read_both(path)
    assert through == past


def test_a_tree_that_is_deleted_leaves_snapshots_and_rmdir_deletes_them(mounted: Mounted) -> None:
    """As ``rsync --delete`` and ``find -delete`` go about it: files first, then their folder, whatever came of that."""
    for name in ("a", "b"):
        (mounted.path / name).write_bytes(name.encode())
    mounted.snapshot("one")
    mounted.snapshot("two")
    shutil.rmtree(mounted.path, ignore_errors=True)
    assert {one for one in os.listdir(mounted.path) if one[0] != "."} == set()
    assert set(os.listdir(mounted.snapshots)) == {"one", "two"}
    assert (mounted.snapshots / "one" / "a").read_bytes() == b"a"
    with pytest.raises(OSError, match="not empty") as refused:
        os.rmdir(mounted.snapshots / "two")
    assert refused.value.errno == errno.ENOTEMPTY
    # Files of all first, then the folders; by two threads; and by the name of a moment.
    names = ["one", "two"]
    for name in names:
        with pytest.raises(OSError, match="Read-only"):
            os.unlink(mounted.snapshots / name / "a")
    for name in names:
        with pytest.raises(OSError, match="not empty"):
            os.rmdir(mounted.snapshots / name)
    failures: list[OSError] = []

    def remove() -> None:
        try:
            os.rmdir(mounted.snapshots / "one")
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=remove)
    thread.start()
    thread.join()
    assert len(failures) == 1
    code = "import os, sys\ntry: os.unlink(sys.argv[1])\nexcept OSError: os.rmdir(sys.argv[2])"
    command = [sys.executable, "-c", code, str(mounted.snapshots / "@latest" / "a"), str(mounted.snapshots / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "not empty" in done.stderr
    # Who tried nothing of the sort deletes them.
    run("rmdir", mounted.snapshots / "one")
    snapfs("delete", mounted.path, "two")
    assert os.listdir(mounted.snapshots) == []


def test_a_file_that_is_replaced_is_there_all_the_time(mounted: Mounted) -> None:
    path, new = mounted.path / "conf", mounted.path / "new"
    path.write_bytes(b"0")
    is_over = threading.Event()
    failures: list[OSError] = []

    def use(how: Callable[[], object]) -> None:
        while not is_over.is_set():
            try:
                how()
            except OSError as error:
                failures.append(error)

    uses: list[Callable[[], object]] = [
        lambda: os.close(os.open(path, os.O_RDONLY)),
        lambda: os.close(os.open(path, os.O_RDWR | os.O_CREAT)),
        lambda: os.chmod(path, 0o600),
        lambda: os.stat(path),
    ]
    threads = [threading.Thread(target=use, args=(how,)) for how in uses]
    for thread in threads:
        thread.start()
    try:
        for number in range(150):
            new.write_bytes(b"%d" % number)
            os.rename(new, path)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    # Replaced once more between two tries of the kernel's, it says that it is stale; never that it is not there.
    assert {one.errno for one in failures} <= {errno.ESTALE} and len(failures) < 20
    assert path.read_bytes() == b"149"


@pytest.mark.parametrize("kind", ["dsync", "sync"])
def test_asynchronous_direct_writes_are_durable_when_they_are_to_be(mounted: Mounted, kind: str) -> None:
    """fio has them answered through libaio, after which the kernel does not ask for a sync."""
    path = mounted.path / "v"
    path.write_bytes(b"o" * 64 * 4096)
    run("sync", path)
    mounted.snapshot("s")
    job = ["--name=w", f"--filename={path}", "--rw=write", "--bs=4k", "--size=256k", "--ioengine=libaio", "--iodepth=4"]
    run("fio", *job, "--direct=1", f"--sync={kind}", "--buffer_pattern=0x5a", "--end_fsync=0", "--fallocate=none")
    mounted.kill()
    mounted.mount()
    assert path.read_bytes() == b"\x5a" * 64 * 4096
    assert (mounted.snapshots / "s" / "v").read_bytes() == b"o" * 64 * 4096


def test_names_that_are_too_long_are_so(mounted: Mounted) -> None:
    for name in ("x" * 256, "é" * 128):
        for call in (os.stat, os.unlink, lambda path: os.open(path, os.O_RDONLY)):
            with pytest.raises(OSError) as refused:
                call(mounted.path / name)
            assert refused.value.errno == errno.ENAMETOOLONG
    (mounted.path / ("x" * 255)).write_bytes(b"1")


def test_more_requests_may_wait_than_by_default(mounted: Mounted) -> None:
    """Of the kernel's own default 12 that wait would hold up all others."""
    folder = Path("/sys/fs/fuse/connections")
    run("mount", "-t", "fusectl", "none", folder)
    try:
        setting = folder / str(os.minor(mounted.path.stat().st_dev)) / "max_background"
        assert int(setting.read_text()) >= 192
    finally:
        run("umount", folder)


def test_twenty_writers_that_wait_hold_up_nobody_else(tmp_path: Path) -> None:
    image, disk, folder = tmp_path / "image", tmp_path / "disk", tmp_path / "own"
    disk.mkdir()
    folder.mkdir()
    run("truncate", "-s", "64M", image)
    run("mkfs.ext4", "-q", image)
    run("mount", "-o", "loop", image, disk)
    writers: list[subprocess.Popen[bytes]] = []
    mounted = Mounted(folder)
    try:
        (disk / "logs").mkdir()
        snapfs("changelog", "create", mounted.path, "slow", "--device", disk / "logs", "--capacity", "32M")
        slow, quick = [mounted.path / f"slow{number}" for number in range(20)], mounted.path / "quick"
        for path in slow:
            mounted.ask(f"create {path.name} size=64K change-log=slow")
            path.write_bytes(os.urandom(8192))
        quick.write_bytes(os.urandom(MIB))
        run("sync", *slow, quick)
        mounted.snapshot("s")
        for path in slow:
            run("dd", "if=/dev/urandom", f"of={path}", "bs=4k", "count=1", *DIRECT)
        wait_until(lambda: not mounted.status()["unsealed_snapshot_count"], "the snapshot is sealed")
        idle = ["idle", "idle"]
        wait_until(lambda: [one["state"] for one in mounted.status()["devices"]] == idle, "nothing is asked of either")
        run("fsfreeze", "--freeze", disk)
        try:
            for path in slow:
                writers.append(subprocess.Popen(["dd", "if=/dev/urandom", f"of={path}", "bs=4k", "count=1", *DIRECT]))
            wait_until(lambda: mounted.status()["health"] == "stuck", "the writers wait")
            # Past the page cache, and through it.
            run("dd", f"if={quick}", "of=/dev/null", "bs=64k", "iflag=direct", "status=none", timeout=60)
            run("dd", "if=/dev/urandom", f"of={quick}", "bs=4k", "count=4", *DIRECT, timeout=60)
            assert any(one.poll() is None for one in writers)
        finally:
            run("fsfreeze", "--unfreeze", disk)
        for one in writers:
            assert one.wait(timeout=60) == 0
        mounted.unmount()
        mounted.check()
    finally:
        for one in writers:
            one.kill()
            one.wait()
        clear_away(mounted)
        run("umount", disk)


def test_an_image_on_a_loop_device_over_the_mount_is_refused(mounted: Mounted, tmp_path: Path) -> None:
    path = mounted.path / "v"
    snapfs("create", path, "--size", "32M")
    loop = run("losetup", "--find", "--show", path).stdout.strip()
    folder = tmp_path / "on-loop"
    folder.mkdir()
    try:
        said = snapfs("create", mounted.path / "w", "--mode", "cow", "--source", loop, expect=2).stderr
        assert "on a loop device over that" in said
        run("mkfs.ext4", "-q", loop)
        run("mount", loop, folder)
        try:
            (folder / "image").write_bytes(bytes(4096))
            snapfs("create", mounted.path / "w", "--mode", "cow", "--source", folder / "image", expect=2)
            for name in ("lower", "upper", "work", "over"):
                (folder / name).mkdir()
            (folder / "lower" / "image").write_bytes(bytes(4096))
            layers = f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work"
            run("mount", "-t", "overlay", "overlay", "-o", layers, folder / "over")
            try:
                snapfs("create", mounted.path / "w", "--mode", "cow", "--source", folder / "over" / "image", expect=2)
            finally:
                run("umount", folder / "over")
            (folder / "logs").mkdir()
            words = ("changelog", "create", mounted.path, "logs", "--device", folder / "logs", "--capacity", "1M")
            assert "on a loop device over that" in snapfs(*words, expect=2).stderr
        finally:
            run("umount", folder)
    finally:
        run("losetup", "--detach", loop)
    assert os.listdir(mounted.path).count("w") == 0


def test_room_that_is_kept_for_root_is_not_used(tmp_path: Path) -> None:
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    run("truncate", "-s", "64M", image)
    run("mkfs.ext4", "-q", "-m", "30", image)
    run("mount", "-o", "loop", image, disk)
    try:
        pool, mount = disk / "pool", tmp_path / "mount"
        mount.mkdir()
        snapfs("init", pool)
        snapfs("mount", pool, mount)
        try:
            percent = [run("df", "--output=pcent", one).stdout.split()[-1] for one in (disk, mount)]
            assert abs(int(percent[0][:-1]) - int(percent[1][:-1])) <= 1, percent
        finally:
            snapfs("umount", mount)
    finally:
        run("umount", disk)


def test_a_listing_goes_on_by_its_offset_in_another_opening(mounted: Mounted) -> None:
    """As an NFS server lists: what comes and goes meanwhile has it miss nothing that is there all the time."""
    for number in range(8):
        (mounted.path / f"v{number}").write_bytes(b"1")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    libc.closedir.argtypes = libc.readdir.argtypes = libc.telldir.argtypes = [ctypes.c_void_p]
    libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]

    def names_from(offset: int, count: int) -> tuple[list[str], int]:
        stream = libc.opendir(os.fsencode(mounted.path))
        try:
            if offset:
                libc.seekdir(stream, offset)
            found: list[str] = []
            while len(found) < count and (entry := libc.readdir(stream)):
                # struct dirent: the name behind inode, offset, length and kind.
                found.append(ctypes.string_at(entry + 19).decode())
            return found, int(libc.telldir(stream))
        finally:
            libc.closedir(stream)

    first, offset = names_from(0, 6)
    seen = [one for one in first if one[0] == "v"]
    assert 0 < len(seen) < 7
    os.unlink(mounted.path / seen[0])
    rest, _ = names_from(offset, 100)
    assert sorted([*seen, *rest]) == [f"v{number}" for number in range(8)]


async def test_an_entry_keeps_its_offset() -> None:
    from snapfs.fuse import names
    from snapfs.fuse.namespace import Namespace

    async def never(*arguments: object) -> None:
        raise AssertionError

    async with open_world(World()) as pool:
        tree = Namespace(pool, "/", never, never)
        for name in (b"a", b"b", b"c"):
            await pool.volumes.create(name)
            await pool.snapshots.create(name)
        before = {
            folder: await tree.listing(folder) for folder in (names.ROOT, names.SNAPSHOTS, names.META, names.OWNER)
        }
        for listing in before.values():
            assert sorted(listing) == listing and len({offset for offset, _ in listing}) == len(listing)
        await pool.volumes.remove(b"a")
        await pool.snapshots.delete(b"a")
        for folder in (names.ROOT, names.SNAPSHOTS):
            assert set(await tree.listing(folder)) < set(before[folder])
