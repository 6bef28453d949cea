"""Real mounts with real tools."""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import SNAPFS, Mounted, main_here, run, snapfs, wait_for_end, wait_until

pytestmark = pytest.mark.mount
MIB = 1 << 20


def failing(code: int, call: Callable[..., object], *args: object) -> None:
    with pytest.raises(OSError) as caught:
        call(*args)
    assert caught.value.errno == code, caught.value


def test_a_volume_is_a_file(mounted: Mounted) -> None:
    volume = mounted.path / "v"
    data = os.urandom(3 * MIB + 77)
    volume.write_bytes(data)
    assert volume.read_bytes() == data
    assert volume.stat().st_size == len(data)
    run("dd", "if=/dev/urandom", f"of={volume}", "bs=1000", "seek=5000", "count=3", "conv=notrunc")
    assert volume.stat().st_size == 5_003_000
    with open(volume, "ab") as file:
        file.write(b"end")
    assert volume.read_bytes()[-3:] == b"end"
    os.truncate(volume, 100)
    os.truncate(volume, 200)
    assert volume.read_bytes() == data[:100] + bytes(100)
    os.rename(volume, mounted.path / "w")
    assert sorted(os.listdir(mounted.path)) == [".snapfs", ".snapshots", "w"]
    os.chmod(mounted.path / "w", 0o640)
    os.chown(mounted.path / "w", 12, 34)
    os.utime(mounted.path / "w", ns=(1_000_000_007, 2_000_000_009))
    mounted.remount()
    found = os.stat(mounted.path / "w")
    assert stat.S_IMODE(found.st_mode) == 0o640 and (found.st_uid, found.st_gid) == (12, 34)
    assert (found.st_atime_ns, found.st_mtime_ns) == (1_000_000_007, 2_000_000_009)
    os.unlink(mounted.path / "w")
    assert sorted(os.listdir(mounted.path)) == [".snapfs", ".snapshots"]


def test_a_clean_stop_loses_nothing(mounts: Callable[..., Mounted]) -> None:
    for how in ("umount", "fusermount3", "SIGTERM", "SIGINT"):
        mounted = mounts()
        data = os.urandom(2 * MIB)
        (mounted.path / "v").write_bytes(data)
        pid = int(mounted.status()["pid"])
        fd = os.pidfd_open(pid)
        if how == "umount":
            mounted.unmount()
        elif how == "fusermount3":
            run("fusermount3", "-u", mounted.path)
        else:
            os.kill(pid, getattr(signal, how))
        wait_for_end(fd)
        assert not os.path.ismount(mounted.path), how
        mounted.mount()
        assert (mounted.path / "v").read_bytes() == data, how


def test_a_stop_while_a_file_is_open_keeps_what_was_written(mounted: Mounted) -> None:
    data = os.urandom(MIB)
    file = os.open(mounted.path / "v", os.O_WRONLY | os.O_CREAT)
    os.write(file, data)
    pid = int(mounted.status()["pid"])
    fd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGTERM)
    wait_for_end(fd)
    failing(errno.ENOTCONN, os.close, file)
    mounted.mount()
    assert (mounted.path / "v").read_bytes() == data


def test_direct_and_mapped_and_synchronous_io(mounted: Mounted) -> None:
    path = mounted.path / "v"
    path.write_bytes(bytes(MIB))
    buffer = mmap.mmap(-1, 8192)
    buffer.write(os.urandom(8192))
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    assert os.pwrite(fd, buffer, 40960) == 8192
    back = mmap.mmap(-1, 8192)
    assert os.preadv(fd, [back], 40960) == 8192
    assert back[:] == buffer[:]
    os.close(fd)
    fd = os.open(path, os.O_RDWR | os.O_SYNC)
    os.pwrite(fd, b"odd", 12345)
    os.close(fd)
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, MIB) as mapped:
        mapped[99_999:100_003] = b"mmap"
        mounted.snapshot("with-the-store")
        mapped[99_999:100_003] = b"late"
    os.close(fd)
    held = (mounted.snapshots / "with-the-store" / "v").read_bytes()
    assert held[99_999:100_003] == b"mmap" and held[12345:12348] == b"odd" and held[40960:49152] == buffer[:]
    assert path.read_bytes()[99_999:100_003] == b"late"


def test_a_snapshot_holds_what_the_kernel_had_not_handed_over(mounted: Mounted) -> None:
    with open(mounted.path / "v", "wb", buffering=0) as file:
        for number in range(30):
            data = os.urandom(100_000)
            file.write(data)
            os.mkdir(mounted.snapshots / str(number))
            held = (mounted.snapshots / str(number) / "v").read_bytes()
            assert len(held) == (number + 1) * 100_000 and held[-100_000:] == data


def test_a_snapshot_cannot_be_changed_even_by_root(mounted: Mounted) -> None:
    (mounted.path / "v").write_bytes(b"old")
    folder = mounted.snapshot("s")
    (mounted.path / "v").write_bytes(b"new")
    file = folder / "v"
    failing(errno.EROFS, os.open, file, os.O_RDWR)
    failing(errno.EROFS, os.open, file, os.O_RDONLY | os.O_TRUNC)
    failing(errno.EROFS, os.chmod, file, 0o777)
    failing(errno.EROFS, os.utime, file)
    failing(errno.EROFS, os.truncate, file, 0)
    failing(errno.EROFS, os.unlink, file)
    failing(errno.EROFS, os.rename, file, folder / "w")
    failing(errno.EROFS, os.rename, mounted.path / "v", folder / "w")
    failing(errno.EROFS, os.mkdir, folder / "x")
    failing(errno.EROFS, os.link, mounted.path / "v", folder / "x")
    failing(errno.EROFS, os.symlink, "a", folder / "x")
    failing(errno.EROFS, os.open, folder / "x", os.O_CREAT | os.O_WRONLY)
    failing(errno.EROFS, os.open, folder / ".manifest.json", os.O_RDWR)
    with open(file, "rb") as opened:
        failing(errno.EROFS, os.open, f"/proc/self/fd/{opened.fileno()}", os.O_RDWR)
    assert file.read_bytes() == b"old"


def test_snapshots_by_every_way(mounted: Mounted) -> None:
    for name in ("a", "b"):
        (mounted.path / name).write_bytes(b"1")
    os.mkdir(mounted.snapshots / "by-mkdir")
    assert snapfs("snapshot", mounted.path, "by-command", "--note", "a note").stdout == "by-command\n"
    run("sh", "-c", f"echo 'snapshot by-echo volume=a' > {mounted.control_path}")
    unnamed = snapfs("snapshot", mounted.path).stdout.strip()
    assert sorted(os.listdir(mounted.snapshots)) == sorted(["by-mkdir", "by-command", "by-echo", unnamed])
    assert sorted(os.listdir(mounted.snapshots / "by-echo")) == [".manifest.json", "a"]
    listed = json.loads(snapfs("list", mounted.path, "--json").stdout)
    assert [one["name"] for one in listed] == ["by-mkdir", "by-command", "by-echo", unnamed]
    assert listed[1]["note"] == "a note" and listed[0]["referenced_bytes"] == 8192
    os.rename(mounted.snapshots / "by-mkdir", mounted.snapshots / "renamed")
    snapfs("rename", mounted.path, "by-echo", "renamed too")
    os.rmdir(mounted.snapshots / "renamed")
    assert "would delete by-command" in snapfs("delete", mounted.path, "by-command", "--dry-run").stdout
    snapfs("delete", mounted.path, "by-command", unnamed)
    assert os.listdir(mounted.snapshots) == ["renamed too"]
    assert not (mounted.snapshots / "by-echo").exists()
    assert "renamed too" in snapfs("list", mounted.path).stdout
    assert json.loads((mounted.snapshots / "renamed too" / ".manifest.json").read_text())["volumes"][0]["name"] == "a"


def test_a_name_used_again_shows_the_new_snapshot(mounted: Mounted) -> None:
    for number in range(5):
        (mounted.path / "v").write_bytes(b"%d" % number * 5000)
        mounted.snapshot("again")
        assert (mounted.snapshots / "again" / "v").read_bytes() == b"%d" % number * 5000
        if number % 2:
            os.rmdir(mounted.snapshots / "again")
        else:
            mounted.ask("delete again")


def test_what_is_open_stays_readable(mounted: Mounted) -> None:
    path = mounted.path / "v"
    path.write_bytes(b"1" * MIB)
    mounted.snapshot("s")
    with open(mounted.snapshots / "s" / "v", "rb") as held, open(path, "r+b") as live:
        os.rmdir(mounted.snapshots / "s")
        live.write(b"2" * MIB)
        live.flush()
        os.fsync(live.fileno())
        os.unlink(path)
        path.write_bytes(b"3")
        assert held.read() == b"1" * MIB
        live.seek(0)
        assert live.read() == b"2" * MIB
        os.fstat(held.fileno())
        assert os.fstat(live.fileno()).st_nlink == 0
    wait_until(lambda: mounted.status()["space"]["mapped_bytes"] == 4096, "the space comes back")


def test_space_is_told_truly(mounted: Mounted) -> None:
    path = mounted.path / "v"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 39)
        file.write(b"x" * MIB)
    assert int(run("du", "-k", path).stdout.split()[0]) == 1024
    assert path.stat().st_size == 1 << 40
    mounted.snapshot("s")
    os.truncate(path, 0)
    assert int(run("du", "-k", path).stdout.split()[0]) == 0
    assert int(run("du", "-k", mounted.snapshots / "s" / "v").stdout.split()[0]) == 1024
    free = os.statvfs(mounted.pool)
    shown = os.statvfs(mounted.path)
    assert abs(free.f_bavail * free.f_frsize - shown.f_bavail * shown.f_frsize) < 64 * MIB


def test_sixteen_tebibytes(mounted: Mounted) -> None:
    snapfs("create", mounted.path / "big", "--size", "16T")
    fd = os.open(mounted.path / "big", os.O_RDWR)
    os.pwrite(fd, b"last", (16 << 40) - 4)
    assert os.pread(fd, 10, (16 << 40) - 6) == b"\0\0last"
    failing(errno.EFBIG, os.ftruncate, fd, 1 << 60)
    os.close(fd)
    # Past the page cache, which knows of no limit: there the error would come with the fsync.
    fd = os.open(mounted.path / "big", os.O_RDWR | os.O_DIRECT)
    failing(errno.EFBIG, os.pwrite, fd, mmap.mmap(-1, 4096), 1 << 62)
    os.close(fd)
    assert (mounted.path / "big").stat().st_size == 16 << 40


def test_two_devices_hold_the_data(mounts: Callable[..., Mounted], tmp_path: Path) -> None:
    devices = [tmp_path / "one", tmp_path / "two"]
    for device in devices:
        device.mkdir()
    mounted = mounts("--device", devices[0], "--device", devices[1], "--processors", "3")
    (mounted.path / "v").write_bytes(os.urandom(24 * MIB))
    run("sync", mounted.path / "v")
    for device in devices:
        used = sum(one.stat().st_blocks * 512 for one in device.rglob("*") if one.is_file())
        assert used >= 7 * MIB
    assert len(os.listdir(mounted.path / ".snapfs" / "processors")) == 3
    mounted.unmount()
    os.rename(devices[1], tmp_path / "away")
    failed = snapfs("mount", mounted.pool, mounted.path, expect=1)
    assert "device 1" in failed.stderr and str(devices[1]) in failed.stderr
    assert "device 1" in snapfs("check", mounted.pool, expect=1).stderr
    os.rename(tmp_path / "away", devices[1])


def test_ten_thousand_volumes_and_their_listing(mounted_in_memory: Mounted) -> None:
    mounted = mounted_in_memory
    for number in range(10_000):
        os.close(os.open(mounted.path / f"volume-{number:05}", os.O_CREAT | os.O_WRONLY))
    mounted.snapshot("all")
    assert len(os.listdir(mounted.path)) == 10_002
    with os.scandir(mounted.path) as entries:
        for entry in entries:
            if entry.name[-1] in "13579":
                os.unlink(entry.path)
    assert len(os.listdir(mounted.path)) == 5_002
    assert len(os.listdir(mounted.snapshots / "all")) == 10_001
    mounted.remount()
    assert len(os.listdir(mounted.path)) == 5_002
    assert len(os.listdir(mounted.snapshots / "all")) == 10_001


def test_editors_and_archivers(mounted: Mounted, tmp_path: Path) -> None:
    path = mounted.path / "text"
    path.write_text("one\ntwo\n")
    os.chmod(path, 0o644)
    mounted.snapshot("before")
    run("sed", "-i", "s/two/three/", path)
    assert path.read_text() == "one\nthree\n"
    assert subprocess.run(["diff", "-q", mounted.snapshots / "before" / "text", path], check=False).returncode == 1
    # Sealed, the manifest gets another size, and is another file for the kernel: cp(1) would complain of that.
    wait_until(lambda: not mounted.status()["unsealed_snapshot_count"], "the snapshot is sealed")
    run("cp", "-a", mounted.snapshots / "before", tmp_path / "copy")
    assert (tmp_path / "copy" / "text").read_text() == "one\ntwo\n"
    run("tar", "-cf", tmp_path / "all.tar", "-C", mounted.snapshots, "before")
    run("tar", "-xf", tmp_path / "all.tar", "-C", tmp_path)
    assert json.loads((tmp_path / "before" / ".manifest.json").read_text())["snapshot"]["name"] == "before"


def test_a_manifest_can_be_copied_while_it_changes(mounted: Mounted) -> None:
    path = mounted.path / "v"
    path.write_bytes(bytes(8192))
    mounted.snapshot("s")
    manifest = mounted.snapshots / "s" / ".manifest.json"
    looked_at = os.stat(manifest)
    with path.open("r+b") as file:
        file.write(b"x" * 4096)
        os.fsync(file)
    with manifest.open("rb") as file:
        opened = os.fstat(file.fileno())
        assert (opened.st_ino, opened.st_size) == (looked_at.st_ino, looked_at.st_size)
        assert len(file.read()) == looked_at.st_size
    assert b'"point_in_time_copy": {' in manifest.read_bytes()
    assert os.stat(manifest).st_ino != looked_at.st_ino


def test_a_manifest_that_is_looked_up_twice_is_one_file(mounted: Mounted) -> None:
    """From the second time on the kernel has it in mind by another number, and looks it up once more for that."""
    (mounted.path / "v").write_bytes(bytes(1 << 20))
    mounted.snapshot("s")
    manifest = mounted.snapshots / "s" / ".manifest.json"
    for number in range(5):
        with (mounted.path / "v").open("r+b") as file:
            file.write(b"x" * (4096 << number))
            os.fsync(file)
        # Somebody else has a look at it.
        run("stat", manifest)
        looked_at = os.stat(manifest)
        with manifest.open("rb") as file:
            assert os.fstat(file.fileno()).st_ino == looked_at.st_ino
            assert len(file.read()) == looked_at.st_size


@pytest.mark.parametrize("how", ["new", "rewritten", "mapped", "old"])
def test_what_is_being_written_is_not_called_empty(mounted: Mounted, tmp_path: Path, how: str) -> None:
    """tar --sparse takes a file without blocks for zeros."""
    path = mounted.path / "v"
    if how == "rewritten":
        path.write_bytes(b"x" * 100_000)
    elif how == "old":
        path.touch()
        os.truncate(path, 100_000)
        assert path.stat().st_blocks == 0
    fd = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if how == "rewritten" else 0))
    try:
        if how == "mapped":
            os.ftruncate(fd, 100_000)
            with mmap.mmap(fd, 100_000) as mapped:
                mapped[:] = b"y" * 100_000
        else:
            os.pwrite(fd, b"y" * 100_000, 0)
        run("tar", "--sparse", "-cf", tmp_path / "sparse.tar", "-C", mounted.path, "v")
    finally:
        os.close(fd)
    run("tar", "-xf", tmp_path / "sparse.tar", "-C", tmp_path)
    assert (tmp_path / "v").read_bytes() == b"y" * 100_000
    path.write_bytes(b"")
    wait_until(lambda: path.stat().st_blocks == 0, "what nobody writes to any more has none")


def test_new_volumes_are_of_the_folders_group_where_it_says_so(mounts: Callable[..., Mounted]) -> None:
    mounted = mounts()
    os.chown(mounted.path, 0, 1234)
    mounted.path.chmod(0o2775)
    (mounted.path / "v").touch()
    mounted.remount()
    assert stat.S_IMODE(mounted.path.stat().st_mode) == 0o2775
    (mounted.path / "w").touch()
    assert [(mounted.path / one).stat().st_gid for one in "vw"] == [1234, 1234]
    mounted.path.chmod(0o775)
    (mounted.path / "x").touch()
    assert (mounted.path / "x").stat().st_gid == os.getgid()


def test_mount_8_mounts_it_as_any_filesystem(tmp_path: Path) -> None:
    """By mount.fuse, which runs ``snapfs POOL MOUNT -o ...``, as for an entry in fstab(5)."""
    pool, path = tmp_path / "pool", tmp_path / "mount"
    snapfs("init", pool)
    path.mkdir()
    # Where root's shell finds it.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "snapfs").symlink_to(Path(sys.executable).parent / "snapfs")
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    options = "defaults,nofail,noatime,_netdev,allow_other"
    command = ["mount.fuse3", str(pool), str(path), "-t", "fuse.snapfs", "-o", options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    try:
        (path / "v").write_bytes(b"as any other")
        (line,) = [one for one in Path("/proc/mounts").read_text().splitlines() if f" {path} " in one]
        assert "nosuid" in line and "noatime" in line and "allow_other" in line
    finally:
        snapfs("umount", path)
    command[-1] = "no_such_option"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no mount option 'no_such_option'" in done.stderr


def test_modes_are_enforced(mounts: Callable[..., Mounted], tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        # pytest's own folders are its user's alone.
        if folder.stat().st_mode & 0o777 == 0o700:
            folder.chmod(0o755)
    mounted = mounts(mount_options=("allow_other",))
    path = mounted.path / "private"
    path.write_bytes(b"secret")
    os.chmod(path, 0o600)
    mounted.snapshot("then")
    os.chmod(path, 0o644)
    as_other: dict[str, Any] = {"user": 12345, "group": 12345, "extra_groups": [], "cwd": "/"}
    run("cat", path, **as_other)
    for command in (
        ["cat", mounted.snapshots / "then" / "private"],
        ["sh", "-c", f"echo x > {path}"],
        ["sh", "-c", f"echo snapshot x > {mounted.control_path}"],
        ["mkdir", mounted.snapshots / "x"],
        ["rmdir", mounted.snapshots / "then"],
        ["touch", mounted.path / "mine"],
        ["chmod", "777", path],
    ):
        run(*command, expect=1 if command[0] != "sh" else 2, **as_other)
    assert os.listdir(mounted.snapshots) == ["then"]
    for root, folders, files in os.walk(mounted.pool):
        for name in [*folders, *files]:
            assert not os.lstat(os.path.join(root, name)).st_mode & 0o077, name


def test_status_and_events(mounted: Mounted) -> None:
    (mounted.path / "v").write_bytes(b"x" * 5000)
    mounted.snapshot("s")
    status = mounted.status()
    assert status["health"] == "ok" and status["snapshot_count"] == 1 and status["volume_count"] == 1
    processor = json.loads((mounted.path / ".snapfs" / "processors" / "0.json").read_text())
    assert processor["object_count"] == 1 and processor["intermediate_snapshot_count"] == 1
    events = [json.loads(line) for line in (mounted.path / ".snapfs" / "events").read_text().splitlines()]
    assert [one["event"] for one in events if one["event"] != "snapshot-sealed"] == ["mounted", "snapshot"]
    tail = subprocess.Popen(
        ["tail", "-n", "+1", "-f", mounted.path / ".snapfs" / "events"], stdout=subprocess.PIPE, text=True
    )
    assert tail.stdout is not None
    try:
        assert [json.loads(tail.stdout.readline())["event"] for _ in range(3)] == [
            "mounted",
            "snapshot",
            "snapshot-sealed",
        ]
        mounted.ask("delete s")
        assert json.loads(tail.stdout.readline())["event"] == "snapshot-deleted"
    finally:
        tail.terminate()
        tail.wait()
        tail.stdout.close()
    assert "1 volumes" in snapfs("status", mounted.path).stdout
    assert json.loads(snapfs("status", mounted.path, "--json").stdout)["processors"][0]["processor"] == 0


def test_the_control_file_answers(mounted: Mounted) -> None:
    fd = os.open(mounted.control_path, os.O_RDWR)
    lines = b"snapshot one\n# a comment\n\nsnapshot 'two words' note='some text'\nsync\nhelp\n"
    assert os.write(fd, lines) == len(lines)
    answers = [json.loads(line) for line in os.read(fd, 1 << 16).splitlines()]
    assert [one["command"] for one in answers] == ["snapshot", "snapshot", "sync", "help"]
    assert answers[1]["name"] == "two words" and answers[1]["note"] == "some text"
    assert any("delete NAME" in line for line in answers[3]["commands"])
    # Up to the first that fails: the count tells how far, the rest is the caller's to write again.
    assert os.write(fd, b"delete one\ndelete one\nsnapshot three\n") == len(b"delete one\n")
    failing(errno.ENOENT, os.write, fd, b"delete one\nsnapshot three\n")
    os.close(fd)
    assert os.listdir(mounted.snapshots) == ["two words"]
    (mounted.path / "v").write_bytes(b"x")
    assert mounted.ask("resize v 1M")["size_bytes"] == MIB
    assert (mounted.path / "v").stat().st_size == MIB
    assert mounted.ask("list space=no")["snapshots"][0]["name"] == "two words"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("frobnicate", errno.EINVAL),
        ("snapshot a b", errno.EINVAL),
        ("snapshot a frob=1", errno.EINVAL),
        ("snapshot a note=\udcff", errno.EINVAL),
        ("delete taken volume=v", errno.EINVAL),
        ("resize v 99999999999999999999", errno.EFBIG),
        ("resize v 1152921504606846976", errno.EFBIG),
        ("snapshot a volume=nothing", errno.ENOENT),
        ("snapshot .", errno.EINVAL),
        ("snapshot ..", errno.EINVAL),
        ("snapshot ''", errno.EINVAL),
        ("snapshot a/b", errno.EINVAL),
        ("snapshot @x", errno.EINVAL),
        ("snapshot .x", errno.EINVAL),
        ("snapshot " + "x" * 256, errno.ENAMETOOLONG),
        ("snapshot 'a\x01b'", errno.EINVAL),
        ("snapshot taken", errno.EEXIST),
        ("snapshot 'open quote", errno.EINVAL),
        ("snapshot a\0b", errno.EINVAL),
        ("delete nothing", errno.ENOENT),
        ("delete", errno.EINVAL),
        ("rename taken", errno.EINVAL),
        ("rename nothing new", errno.ENOENT),
        ("rename taken @x", errno.EINVAL),
        ("resize nothing 1G", errno.ENOENT),
        ("resize v 1X", errno.EINVAL),
        ("resize v " + "9" * 50, errno.EINVAL),
        ("resize v 9E", errno.EFBIG),
        ("x" * 70000, errno.EINVAL),
    ],
)
def test_bad_commands_are_refused_with_words(shared_mount: Mounted, line: str, code: int) -> None:
    answer = shared_mount.ask(line)
    assert not answer["ok"] and answer["errno"] == code, answer
    assert len(answer["error"]) > 10
    assert os.listdir(shared_mount.snapshots) == ["taken"]


@pytest.fixture(scope="module")
def shared_mount(tmp_path_factory: pytest.TempPathFactory) -> object:
    """One mount for many refusals, none of which may change it."""
    mounted = Mounted(tmp_path_factory.mktemp("shared"))
    try:
        (mounted.path / "v").write_bytes(b"x")
        mounted.snapshot("taken")
        yield mounted
    finally:
        mounted.unmount()
    mounted.check()


def test_garbage_in_the_control_file(shared_mount: Mounted) -> None:
    with open(shared_mount.control_path, "wb", buffering=0) as control:
        failing(errno.EINVAL, control.write, os.urandom(MIB).replace(b"\n", b"x"))
        failing(errno.EINVAL, control.write, b"snapshot half-a-line")
        failing(errno.EINVAL, control.write, b"\xff\xfe\xfd\n")
    for seed in range(20):
        with open(shared_mount.control_path, "wb", buffering=0) as control, pytest.raises(OSError):
            for _ in range(1000):
                control.write(bytes((seed * 37 + index * 101) % 256 for index in range(500)) + b"\n")
    assert os.listdir(shared_mount.snapshots) == ["taken"]
    assert shared_mount.status()["health"] == "ok"


def test_bad_names_are_refused(shared_mount: Mounted) -> None:
    folder = os.fsencode(shared_mount.path)
    before = sorted(os.listdir(folder))
    for name, code in (
        (b"new\nline", errno.EINVAL),
        (b"control\x07", errno.EINVAL),
        (b"x" * 256, errno.ENAMETOOLONG),
        (b".snapfs", errno.EISDIR),
        (b".snapshots", errno.EISDIR),
    ):
        failing(code, os.open, folder + b"/" + name, os.O_CREAT | os.O_WRONLY)
    failing(errno.EPERM, os.mkdir, folder + b"/folder")
    failing(errno.EPERM, os.symlink, b"x", folder + b"/link")
    failing(errno.EPERM, os.link, folder + b"/v", folder + b"/link")
    failing(errno.EPERM, os.mkfifo, folder + b"/fifo")
    failing(errno.EPERM, os.rename, folder + b"/v", folder + b"/.snapshots/v")
    failing(errno.EPERM, os.rename, folder + b"/.snapshots/taken", folder + b"/taken")
    failing(errno.EPERM, os.rmdir, folder + b"/.snapfs")
    failing(errno.EPERM, os.rmdir, folder + b"/.snapshots")
    failing(errno.EPERM, os.open, folder + b"/.snapfs/file", os.O_CREAT | os.O_WRONLY)
    failing(errno.EINVAL, os.mkdir, folder + b"/.snapshots/@now")
    failing(errno.EEXIST, os.mkdir, folder + b"/.snapshots/taken")
    failing(errno.ENOENT, os.rmdir, folder + b"/.snapshots/nothing")
    assert sorted(os.listdir(folder)) == before
    odd = folder + b"/\xff\xfe odd"
    os.close(os.open(odd, os.O_CREAT | os.O_WRONLY))
    assert b"\xff\xfe odd" in os.listdir(folder)
    os.unlink(odd)


def test_bad_uses_of_the_command_line(
    shared_mount: Mounted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("x")
    empty = tmp_path / "empty"
    empty.mkdir()
    pool = shared_mount.pool
    for words, code, text in (
        (("frobnicate",), 2, "No such command"),
        (("init",), 2, "Missing argument"),
        (("init", tmp_path / "p", "--processors", "0"), 2, "0 is not in the range"),
        (("init", tmp_path / "p", "--processors", "65"), 2, "65 is not in the range"),
        (("init", tmp_path / "p", "--device", tmp_path / "nowhere"), 1, "is not there"),
        (("init", tmp_path / "p", "--device", full), 1, "not empty"),
        (("init", tmp_path / "p", "--device", empty, "--device", empty), 2, "twice"),
        (("init", full), 1, "not empty"),
        (("init", pool), 1, "already"),
        (("init", full / "file"), 1, "not a directory"),
        (("init", tmp_path / "no" / "where"), 1, "No such file"),
        (("mount", empty, full), 1, "not empty"),
        (("mount", empty, tmp_path / "nowhere"), 1, "not a directory"),
        (("mount", empty, full / "file"), 1, "not a directory"),
        (("mount", full, empty), 1, "holds no pool"),
        (("mount", tmp_path / "nowhere", empty), 1, "there is no directory"),
        (("mount", pool, empty, "-o", "frob"), 2, "no mount option 'frob'"),
        (("mount", pool, shared_mount.path), 1, "already"),
        (("mount", pool, empty), 1, "is in use by process"),
        (("umount", empty), 1, "no snapfs is mounted"),
        (("snapshot", empty), 1, "no snapfs is mounted"),
        (("snapshot", shared_mount.path, "taken"), 1, "already"),
        (("snapshot", shared_mount.path, "a\nb"), 2, "line break"),
        (("delete", shared_mount.path, "nothing"), 1, "no snapshot 'nothing'"),
        (("rename", shared_mount.path, "nothing", "x"), 1, "no snapshot 'nothing'"),
        (("create", shared_mount.path / "v", "--size", "1G"), 1, "already"),
        (("create", shared_mount.path / "w", "--size", "1X"), 2, "is not a size"),
        (("create", shared_mount.path / "w", "--size", "1000P"), 1, "go up to"),
        (("create", shared_mount.path / "w", "--size", "20000000000G"), 1, "more than any file"),
        (("snapshot", shared_mount.path, "a", "--note", "b\nc"), 2, "line break"),
        (("create", empty / "w", "--size", "1G"), 1, "no snapfs is mounted"),
        (("list", empty), 1, "no snapfs is mounted"),
        (("status", empty), 1, "no snapfs is mounted"),
        (("check", empty), 1, "holds no pool"),
        (("check", pool), 1, "is in use by process"),
    ):
        assert main_here(*words) == code
        told = capsys.readouterr().err
        assert text in told and "Traceback" not in told, (words, told)
    assert not (tmp_path / "p").exists() and os.listdir(empty) == [] and os.listdir(full) == ["file"]
    assert not (shared_mount.path / "w").exists()
    for command in ("init", "mount", "umount", "create", "snapshot", "list", "delete", "rename", "status", "check"):
        assert main_here(command, "--help") == 0
        assert "Usage:" in capsys.readouterr().out
    # And one as a process of its own.
    assert "is not a size" in snapfs("create", shared_mount.path / "w", "--size", "1X", expect=2).stderr


def test_a_killed_daemon_leaves_a_mount_that_can_be_used_again(mounted: Mounted) -> None:
    (mounted.path / "v").write_bytes(b"x" * 5000)
    run("sync", mounted.path / "v")
    mounted.kill()
    failing(errno.ENOTCONN, os.listdir, mounted.path)
    mounted.mount()
    assert (mounted.path / "v").read_bytes() == b"x" * 5000
    mounted.kill()
    snapfs("umount", mounted.path)
    assert os.listdir(mounted.path) == []
    mounted.mount()


def test_auto_unmount_returns_and_unmounts(mounted: Mounted) -> None:
    mounted.unmount()
    mounted.mount_options = ("auto_unmount",)
    mounted.mount()
    (mounted.path / "v").write_bytes(b"x")
    run("sync", mounted.path / "v")
    mounted.kill()
    wait_until(lambda: not os.path.ismount(mounted.path), "fusermount3 takes the dead mount away")
    mounted.mount_options = ()
    mounted.mount()
    assert (mounted.path / "v").read_bytes() == b"x"


def test_a_kill_while_the_kernel_hands_pages_over(mounted: Mounted) -> None:
    """A daemon that flushed its own mount from a thread waited for itself when killed, for ever."""
    for _ in range(5):
        fd = os.open(mounted.path / "v", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.write(fd, os.urandom(64 * MIB))
        maker = subprocess.Popen(["mkdir", mounted.snapshots / "s"], stderr=subprocess.DEVNULL)
        mounted.kill()
        maker.wait(60)
        run("umount", "--lazy", mounted.path)
        failing(errno.ENOTCONN, os.close, fd)
        mounted.mount()
        if (mounted.snapshots / "s").exists():
            os.rmdir(mounted.snapshots / "s")


def test_a_program_that_writes_behind_the_largest_size_is_named(mounted: Mounted) -> None:
    with open(mounted.path / "far", "wb", buffering=0) as file:
        os.pwrite(file.fileno(), b"x", 1 << 46)
        answer = mounted.ask("snapshot s")
        assert answer["errno"] == errno.EFBIG and "'far'" in answer["error"]
        assert mounted.ask("snapshot s")["ok"]
        # Its own user is told as well, by the next close; the kernel has told it once, to the snapshot.
        failing(errno.EFBIG, os.close, os.dup(file.fileno()))
        # Until a sync has gone through.
        failing(errno.EFBIG, os.fsync, file.fileno())
        os.fsync(file.fileno())


def test_in_the_foreground(mounted: Mounted) -> None:
    mounted.unmount()
    daemon = subprocess.Popen(
        [*SNAPFS, "mount", "--foreground", mounted.pool, mounted.path], stderr=subprocess.PIPE, text=True
    )
    assert daemon.stderr is not None
    for line in daemon.stderr:
        if line.startswith("mounted on"):
            break
    (mounted.path / "v").write_bytes(b"x")
    daemon.send_signal(signal.SIGINT)
    assert daemon.wait(60) == 0
    daemon.stderr.close()


def test_read_only(mounted: Mounted) -> None:
    (mounted.path / "v").write_bytes(b"x")
    mounted.unmount()
    mounted.mount_options = ("ro",)
    mounted.mount()
    failing(errno.EROFS, os.open, mounted.path / "v", os.O_RDWR)
    failing(errno.EROFS, os.mkdir, mounted.snapshots / "s")
    assert (mounted.path / "v").read_bytes() == b"x"


def test_a_busy_mount_is_said_to_be_busy(mounted: Mounted) -> None:
    with open(mounted.path / "v", "wb") as file:
        assert "busy" in snapfs("umount", mounted.path, expect=1).stderr
        file.write(b"goes on")
    assert (mounted.path / "v").read_bytes() == b"goes on"


def test_damage_is_refused_and_found(mounted: Mounted) -> None:
    (mounted.path / "v").write_bytes(b"x" * 50000)
    mounted.unmount()
    log = next(iter((mounted.pool / "device" / "logs" / "0").iterdir()))
    whole = log.read_bytes()
    log.write_bytes(whole[:8192])
    found = snapfs("check", mounted.pool, expect=4)
    assert "damage" in found.stdout and "named" not in found.stderr
    assert json.loads(snapfs("check", mounted.pool, "--json", expect=4).stdout)["findings"]
    mounted.mount()
    failing(errno.EIO, (mounted.path / "v").read_bytes)
    assert mounted.status()["health"] == "ok"
    mounted.unmount()
    log.write_bytes(whole)
    shard = mounted.pool / "shards" / "0.sqlite"
    kept = shard.read_bytes()
    shard.write_bytes(b"garbage" * 1000)
    for command in (("mount", mounted.pool, mounted.path), ("check", mounted.pool)):
        snapfs(*command, expect=4)
    for name in ("shards/1.sqlite", "catalog.sqlite"):
        whole_file = (mounted.pool / name).read_bytes()
        (mounted.pool / name).write_bytes(b"")
        shard.write_bytes(kept)
        for command in (("mount", mounted.pool, mounted.path), ("check", mounted.pool)):
            snapfs(*command, expect=4)
        assert (mounted.pool / name).read_bytes() == b"", "what is damaged was left as it is"
        (mounted.pool / name).write_bytes(whole_file)
    assert "clean" in snapfs("check", mounted.pool, "--repair").stdout


def test_a_file_that_takes_anothers_place_is_there_after_a_kill(mounted: Mounted) -> None:
    """As programs save what they had open: written, closed, renamed, and not synced."""
    for name in ("conf", "copy-on-write"):
        if name != "conf":
            snapfs("create", mounted.path / name, "--size", "1M", "--mode", "cow")
        (mounted.path / name).write_bytes(b"old" * 5000)
        run("sync", mounted.path / name)
        (mounted.path / "new").write_bytes(b"new" * 5000)
        os.rename(mounted.path / "new", mounted.path / name)
    mounted.kill()
    mounted.mount()
    assert (mounted.path / "conf").read_bytes() == (mounted.path / "copy-on-write").read_bytes() == b"new" * 5000
    # Cut and written anew: durable as soon as nothing is told to be dirty any more.
    (mounted.path / "conf").write_bytes(b"anew" * 5000)
    wait_until(lambda: not mounted.status()["dirty_object_count"], "it is durable")
    mounted.kill()
    mounted.mount()
    assert (mounted.path / "conf").read_bytes() == b"anew" * 5000
