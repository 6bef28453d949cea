"""The daemon's own use of its mount: wherever that is seen by now, whoever holds a lock, and as an ordinary user."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import (
    SNAPFS,
    Mounted,
    clear_away,
    has_unmounted,
    mounted_filesystem,
    run,
    snapfs,
    wait_for_end,
    wait_until,
)
from .test_t5_hostile import helper_of
from .unprivileged import leaving_others_mounts, run_unprivileged

pytestmark = pytest.mark.mount


@pytest.fixture
def seen_elsewhere(mounted_in_memory: Mounted, tmp_path: Path) -> Iterator[Path]:
    """Where a mount is seen that was lazily unmounted from where it was made."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("mount", "--bind", mounted_in_memory.path, elsewhere)
    daemon = os.pidfd_open(int(mounted_in_memory.status()["pid"]))
    snapfs("umount", "--lazy", mounted_in_memory.path)
    try:
        yield elsewhere
    finally:
        wait_until(lambda: has_unmounted(elsewhere), f"{elsewhere} stays busy")
        wait_for_end(daemon)


@contextlib.contextmanager
def left_open(path: Path) -> Iterator[int]:
    """A new file, open until its daemon has ended."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def test_a_snapshot_of_a_mount_seen_elsewhere_holds_what_the_kernel_had(seen_elsewhere: Path) -> None:
    with open(seen_elsewhere / "v", "w+b", buffering=0) as file:
        file.write(b"WRITTEN BEFORE" + bytes(4096))
        os.fsync(file.fileno())
        os.pwrite(file.fileno(), b"SECOND version", 0)
        os.mkdir(seen_elsewhere / ".snapshots" / "one")
        assert (seen_elsewhere / ".snapshots" / "one" / "v").read_bytes()[:14] == b"SECOND version"


def test_a_rollback_of_a_mount_seen_elsewhere_is_refused_and_changes_nothing(seen_elsewhere: Path) -> None:
    volume = seen_elsewhere / "v"
    volume.write_bytes(b"balance of monday: 100 000\n")
    os.mkdir(seen_elsewhere / ".snapshots" / "one")
    volume.write_bytes(b"tuesday: 5\n")
    refused = snapfs("rollback", seen_elsewhere, "one", expect=1)
    assert "is not this pool's mount any more" in refused.stderr
    assert volume.read_bytes() == b"tuesday: 5\n"
    assert os.listdir(seen_elsewhere / ".snapshots") == ["one"]


def test_unmounting_what_is_seen_elsewhere_too_says_so_and_ends(mounted_in_memory: Mounted, tmp_path: Path) -> None:
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "link"
    elsewhere.mkdir()
    link.symlink_to(mounted_in_memory.path)
    daemon = os.pidfd_open(int(mounted_in_memory.status()["pid"]))
    run("mount", "--bind", mounted_in_memory.path, elsewhere)
    said = snapfs("umount", mounted_in_memory.path, expect=1)
    assert f"it is seen on '{elsewhere}' too" in said.stderr
    wait_until(lambda: has_unmounted(elsewhere), f"{elsewhere} stays busy")
    wait_for_end(daemon)
    mounted_in_memory.mount()
    daemon = os.pidfd_open(int(mounted_in_memory.status()["pid"]))
    snapfs("umount", "--lazy", link)
    wait_for_end(daemon)


_ELSEWHERE = """
import os, sys
file = os.open(sys.argv[1], os.O_RDWR)
os.pwrite(file, b"NEW", 0)
print("written", flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def writer_in_another_namespace(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that sees all mounts of now whatever becomes of them here, and has written to a file."""
    script = leaving_others_mounts(str(path.parent)) + '; exec "$@"'
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    command += [sys.executable, "-c", _ELSEWHERE, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        try:
            yield writer
        finally:
            writer.communicate("\n")


def test_a_signal_ends_a_mount_that_another_namespace_sees_and_loses_nothing(mounted_in_memory: Mounted) -> None:
    volume = mounted_in_memory.path / "v"
    volume.write_bytes(b"OLD" + bytes(4096))
    pid = int(mounted_in_memory.status()["pid"])
    daemon = os.pidfd_open(pid)
    with writer_in_another_namespace(volume):
        os.kill(pid, signal.SIGTERM)
        wait_for_end(daemon)
    mounted_in_memory.mount()
    assert volume.read_bytes()[:3] == b"NEW"


def test_unmounting_what_another_namespace_sees_says_so_and_ends(mounted_in_memory: Mounted) -> None:
    volume = mounted_in_memory.path / "v"
    volume.write_bytes(b"OLD" + bytes(4096))
    daemon = os.pidfd_open(int(mounted_in_memory.status()["pid"]))
    with writer_in_another_namespace(volume) as writer:
        said = snapfs("umount", mounted_in_memory.path, expect=1)
        assert f"it is seen in the mount namespace of process {writer.pid} too" in said.stderr
    wait_for_end(daemon)
    mounted_in_memory.mount()
    assert volume.read_bytes()[:3] == b"NEW"


def test_the_helper_is_at_one_volume_after_the_other_when_it_writes_them_back(mounted_in_memory: Mounted) -> None:
    """Whichever was opened last is not the one that it is waited for at."""
    folder = mounted_in_memory.path
    for name in ("a", "b", "c"):
        (folder / name).write_bytes(b"x")
    pid = int(mounted_in_memory.status()["pid"])
    helper = str(helper_of(mounted_in_memory))
    told = mounted_in_memory.pool.parent / "told"
    with contextlib.ExitStack() as stack:
        for name in ("a", "b", "c"):
            stack.enter_context(left_open(folder / name))
        tracing = subprocess.Popen(
            ["strace", "-qq", "-p", helper, "-e", "trace=openat,fsync,close,umount2", "-o", told],
            stderr=subprocess.PIPE,
        )
        wait_until(lambda: "TracerPid:\t0" not in Path(f"/proc/{helper}/status").read_text(), "it is traced")
        daemon = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
        wait_for_end(daemon)
        tracing.communicate(timeout=60)
    calls = [line.split("(")[0] for line in told.read_text().splitlines() if "fsync" in line or '"25' in line]
    assert calls == ["openat", "fsync"] * 3, told.read_text()
    mounted_in_memory.mount()


_LEASE = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
file = os.open(sys.argv[1], os.O_RDONLY)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
print("leased", flush=True)
sys.stdin.readline()
"""


@contextlib.contextmanager
def leased(path: Path) -> Iterator[None]:
    """A read lease on a file, of a program that does not give it up when it is asked to."""
    command = [sys.executable, "-c", _LEASE, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "leased\n"
        try:
            yield
        finally:
            holder.communicate("\n")


def test_a_rollback_of_what_a_program_has_a_lease_on_is_refused(mounted_in_memory: Mounted) -> None:
    volume = mounted_in_memory.path / "v"
    volume.write_bytes(b"monday")
    mounted_in_memory.snapshot("one")
    volume.write_bytes(b"tuesday, longer")
    with leased(volume):
        said = snapfs("rollback", mounted_in_memory.path, "one", "--force", expect=1)
        assert "'v' is open in a program that has a lease on it" in said.stderr
    assert volume.read_bytes() == b"tuesday, longer"


def test_a_signal_takes_no_other_pools_mount_away(mounted_in_memory: Mounted, tmp_path: Path) -> None:
    first = mounted_in_memory
    pid = int(first.status()["pid"])
    daemon = os.pidfd_open(pid)
    with left_open(first.path / "v") as file:
        os.write(file, b"OLD" + bytes(4096))
        os.fsync(file)
        snapfs("umount", "--lazy", first.path)
        snapfs("init", tmp_path / "other")
        snapfs("mount", tmp_path / "other", first.path)
        (first.path / "theirs").write_bytes(b"theirs")
        os.pwrite(file, b"NEW", 0)
        os.kill(pid, signal.SIGTERM)
        wait_for_end(daemon)
    assert (first.path / "theirs").read_bytes() == b"theirs"
    snapfs("umount", first.path)
    first.mount()
    assert (first.path / "v").read_bytes()[:3] == b"NEW"


def test_a_signal_takes_no_mount_away_that_was_moved_over_it(mounted_in_memory: Mounted, tmp_path: Path) -> None:
    """An older mount, which the kernel's table lists before the one that it hides."""
    first, older = mounted_in_memory, tmp_path / "older"
    older.mkdir()
    with private_mount("tmpfs", older) as path:
        (path / "theirs").write_bytes(b"theirs")
        first.remount()
        pid = int(first.status()["pid"])
        daemon = os.pidfd_open(pid)
        with left_open(first.path / "v") as file:
            os.write(file, b"OLD")
            run("mount", "--move", path, first.path)
            os.kill(pid, signal.SIGTERM)
            wait_for_end(daemon)
        assert (first.path / "theirs").read_bytes() == b"theirs"
        run("mount", "--move", first.path, path)
    # The dead one, which nobody took away, goes when it is mounted anew.
    first.mount()
    assert (first.path / "v").read_bytes() == b"OLD"


@contextlib.contextmanager
def private_mount(kind: str, path: Path) -> Iterator[Path]:
    """A filesystem that can be moved: below one that is not shared."""
    run("mount", "--bind", path, path)
    run("mount", "--make-private", path)
    inside = path / "inside"
    inside.mkdir()
    run("mount", "-t", kind, "none", inside)
    try:
        yield inside
    finally:
        wait_until(lambda: has_unmounted(inside), f"{inside} stays busy")
        wait_until(lambda: has_unmounted(path), f"{path} stays busy")


def test_a_mount_below_something_else_is_rolled_back_by_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        mounted = Mounted(folder)
        stack.callback(clear_away, mounted)
        (mounted.path / "v").write_bytes(b"monday")
        mounted.snapshot("one")
        (mounted.path / "v").write_bytes(b"tuesday, longer")
        control = os.open(mounted.control_path, os.O_RDWR)
        try:
            with mounted_filesystem("none", folder, "-t", "tmpfs"), pytest.raises(OSError, match="Stale"):
                os.write(control, b"rollback one\n")
        finally:
            os.close(control)
        assert (mounted.path / "v").read_bytes() == b"tuesday, longer"
        assert os.listdir(mounted.snapshots) == ["one"]
        mounted.unmount()
        mounted.check()


def test_one_volume_that_cannot_be_written_back_keeps_no_other_from_it(mounted_in_memory: Mounted) -> None:
    pid = int(mounted_in_memory.status()["pid"])
    daemon = os.pidfd_open(pid)
    with left_open(mounted_in_memory.path / "a") as bad, left_open(mounted_in_memory.path / "b") as good:
        os.write(good, b"OLD")
        os.fsync(good)
        snapfs("umount", "--lazy", mounted_in_memory.path)
        # Behind the largest size: the kernel finds out when it writes it back.
        os.pwrite(bad, b"x", 1 << 55)
        os.pwrite(good, b"NEW", 0)
        os.kill(pid, signal.SIGTERM)
        wait_for_end(daemon)
    mounted_in_memory.mount()
    assert (mounted_in_memory.path / "b").read_bytes() == b"NEW"


def test_a_signal_after_a_lazy_unmount_loses_nothing(mounted_in_memory: Mounted) -> None:
    pid = int(mounted_in_memory.status()["pid"])
    daemon = os.pidfd_open(pid)
    with left_open(mounted_in_memory.path / "v") as file:
        os.write(file, b"OLD" + bytes(4096))
        os.fsync(file)
        snapfs("umount", "--lazy", mounted_in_memory.path)
        os.pwrite(file, b"NEW", 0)
        os.kill(pid, signal.SIGTERM)
        wait_for_end(daemon)
    mounted_in_memory.mount()
    assert (mounted_in_memory.path / "v").read_bytes()[:3] == b"NEW"


def test_a_rollback_of_a_program_that_runs_changes_nothing(mounted_in_memory: Mounted) -> None:
    program, volume = mounted_in_memory.path / "program", mounted_in_memory.path / "v"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    volume.write_bytes(b"balance of monday: 100 000\n")
    mounted_in_memory.snapshot("one")
    os.truncate(program, program.stat().st_size + 5000)
    volume.write_bytes(b"tuesday: 5\n")
    size_bytes = program.stat().st_size
    running = subprocess.Popen([program, "3600"])
    try:
        wait_until(lambda: os.readlink(f"/proc/{running.pid}/exe") == str(program), "it runs")
        refused = snapfs(
            "rollback", mounted_in_memory.path, "one", "--volume", "program", "--volume", "v", "--force", expect=1
        )
        assert "'program' is a program that runs" in refused.stderr
        assert program.stat().st_size == size_bytes and volume.read_bytes() == b"tuesday: 5\n"
        assert os.listdir(mounted_in_memory.snapshots) == ["one"]
    finally:
        running.kill()
        running.wait()
    snapfs("rollback", mounted_in_memory.path, "one")
    assert volume.read_bytes() == b"balance of monday: 100 000\n"
    assert program.stat().st_size == size_bytes - 5000


_WRITER = """
import mmap, os, sys
source = os.open(sys.argv[1], os.O_RDONLY)
memory = mmap.mmap(source, 4096, mmap.MAP_SHARED, mmap.PROT_READ)
target = os.open(sys.argv[2], os.O_WRONLY)
print("ready", flush=True)
sys.stdin.readline()
print("writing", flush=True)
os.write(target, memory)
"""


def test_a_write_that_waits_for_its_memory_holds_up_no_snapshot(mounted_in_memory: Mounted, tmp_path: Path) -> None:
    snapfs("init", tmp_path / "slow")
    slow = tmp_path / "slow-mount"
    slow.mkdir()
    snapfs("mount", tmp_path / "slow", slow)
    (slow / "memory").write_bytes(os.urandom(mmap.PAGESIZE))
    snapfs("umount", slow)
    snapfs("mount", tmp_path / "slow", slow)
    slow_pid = int(Mounted.status_of(slow)["pid"])
    held, other, busy = (mounted_in_memory.path / name for name in ("held", "other", "busy"))
    held.write_bytes(b"held")
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, slow / "memory", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdin is not None and writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        os.kill(slow_pid, signal.SIGSTOP)
        with open(other, "wb", buffering=0) as file:
            file.write(b"only in the kernel")
            writer.stdin.write("\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == "writing\n"
            stat = Path(f"/proc/{writer.pid}/stat")
            wait_until(lambda: stat.read_text().rpartition(") ")[2].startswith("D"), "the write waits")
            for name in ("one", "two"):
                # Not waited for by run(), which could not end it: it waits for its own answer.
                made = subprocess.Popen([*SNAPFS, "snapshot", str(mounted_in_memory.path), name])

                def is_made(made: subprocess.Popen[bytes] = made) -> bool:
                    # Others go on meanwhile, and what they do tells nothing of the one that is stuck.
                    busy.write_bytes(os.urandom(4096))
                    return made.poll() is not None

                wait_until(is_made, "the snapshot is made")
                assert made.returncode == 0
                assert (mounted_in_memory.snapshots / name / "other").read_bytes() == b"only in the kernel"
    finally:
        os.kill(slow_pid, signal.SIGCONT)
        writer.communicate("\n")
        snapfs("umount", slow)
    assert held.stat().st_size == mmap.PAGESIZE


def test_who_looks_at_an_ordinary_users_volume_keeps_it_from_no_rollback(tmp_path: Path) -> None:
    said = run_unprivileged(
        """
            os.mkdir("m")
            snapfs("init", "pool")
            snapfs("mount", "pool", "m")
            for name, data in (("one", b"short"), ("two", b"longer contents")):
                with open("m/v", "wb") as file:
                    file.write(data)
                os.chmod("m/v", 0o444)
                snapfs("snapshot", "m", name)
                os.chmod("m/v", 0o644)
            look = "import os\\nwhile True:\\n try: os.stat('m/v')\\n except OSError: pass"
            looking = subprocess.Popen([sys.executable, "-c", look])
            answers = []
            try:
                for number in range(60):
                    control = os.open("m/.snapfs/control", os.O_RDWR)
                    name = b"one" if number % 2 else b"two"
                    try:
                        os.write(control, b"rollback " + name + b" force=yes" + bytes([10]))
                    except OSError:
                        pass
                    answers.append(json.loads(os.read(control, 65536)).get("error", "done"))
                    os.close(control)
            finally:
                looking.kill()
                looking.wait()
            print(sorted(set(answers)))
            snapfs("umount", "m")
        """,
        tmp_path,
    )
    assert said.splitlines() == ["['done']"]


def test_an_ordinary_users_volumes_keep_nobody_from_anything_by_their_modes(tmp_path: Path) -> None:
    said = run_unprivileged(
        """
            assert os.geteuid() != 0
            os.mkdir("m")
            snapfs("init", "pool")
            snapfs("mount", "pool", "m")
            with open("m/log", "wb", buffering=0) as log:
                os.chmod("m/log", 0o200)
                log.write(b"line")
                snapfs("snapshot", "m", "one")
                os.chmod("m/log", 0o600)
                snapfs("clone", "m", "one/log", "kept")
                os.chmod("m/kept", 0o600)
                print("kept", open("m/kept", "rb").read())
            with open("m/golden", "wb") as golden:
                golden.write(b"the old contents")
            os.chmod("m/golden", 0o444)
            snapfs("snapshot", "m", "two")
            os.chmod("m/golden", 0o644)
            with open("m/golden", "wb") as golden:
                golden.write(b"x")
            os.chmod("m/golden", 0o444)
            snapfs("rollback", "m", "two", "--volume", "golden")
            print("back", open("m/golden", "rb").read(), oct(os.stat("m/golden").st_mode & 0o777))
            control = os.open("m/.snapfs/control", os.O_RDWR)
            os.write(control, b"resize golden 3" + bytes([10]))
            os.close(control)
            print("cut", open("m/golden", "rb").read())
            for mode in (0o600, 0o200):
                file = os.open(f"m/{mode:o}", os.O_WRONLY | os.O_CREAT)
                os.chmod(f"m/{mode:o}", mode)
                os.write(file, b"written")
                with open("m/.snapfs/status.json") as status:
                    pid = int(json.load(status)["pid"])
                daemon = os.pidfd_open(pid)
                os.kill(pid, signal.SIGTERM)
                select.select([daemon], [], [], 60)
                with contextlib.suppress(OSError):
                    os.close(file)
                snapfs("mount", "pool", "m")
                os.chmod(f"m/{mode:o}", 0o600)
                print("stopped", open(f"m/{mode:o}", "rb").read())
            snapfs("umount", "m")
            snapfs("check", "pool")
        """,
        tmp_path,
    )
    assert said.splitlines() == [
        "kept b'line'",
        "back b'the old contents' 0o444",
        "cut b'the'",
        "stopped b'written'",
        "stopped b'written'",
    ]
