"""A daemon whose device hangs, on a real mount: by strace, which holds fdatasync up, or as its filesystem is frozen."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapfs.cli import silence
from snapfs.errors import MountError, SilentDaemonError

from .conftest import Mounted, invoke, main_here, pool_on, run, small_filesystem, snapfs, wait_for_end, wait_until

pytestmark = pytest.mark.mount

HOLD_S = 3600


@contextlib.contextmanager
def syncs_held_up(pid: int) -> Iterator[None]:
    """All fdatasync calls of a daemon hang, until the block ends."""
    command = ["strace", "-f", "-q", "-p", str(pid), "-e", "trace=fdatasync"]
    command += ["-e", f"inject=fdatasync:delay_enter={HOLD_S}s", "-o", "/dev/null"]
    tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        threads = f"/proc/{pid}/task"

        def is_traced() -> bool:
            traced = []
            for thread in os.listdir(threads):
                with contextlib.suppress(OSError), open(f"{threads}/{thread}/status") as file:
                    traced.append(f"TracerPid:\t{tracer.pid}\n" in file.read())
            return all(traced)

        wait_until(is_traced, "strace has hold of the daemon")
        yield
    finally:
        tracer.terminate()
        tracer.wait()


def test_a_device_that_hangs(tmp_path: Path, mounted: Mounted) -> None:
    path = mounted.path / "v"
    path.write_bytes(b"first" * 3000)

    other = mounted.path / "other"
    other.write_bytes(b"other" * 3000)
    kept = mounted.snapshot("s") / "v"
    assert kept.read_bytes() == b"first" * 3000
    wait_until(lambda: not mounted.status()["unsealed_snapshot_count"], "the snapshot is sealed")
    pid = int(mounted.status()["pid"])
    daemon = os.pidfd_open(pid)
    # Not of zeros, which would need no data: the sync of data is to hang, not the processor's store with the checksums.
    (tmp_path / "new").write_bytes(b"x" * 8192)
    with syncs_held_up(pid):
        writer = subprocess.Popen(["dd", f"if={tmp_path}/new", f"of={path}", "bs=4k", "conv=notrunc,fsync"])
        wait_until(lambda: bool(mounted.status()["stuck_calls"]), "status tells of what hangs")
        assert mounted.status()["health"] == "stuck"
        assert "stuck: " in snapfs("status", mounted.path).stdout
        assert kept.read_bytes() == b"first" * 3000
        # Of the daemon, not of the kernel's cache.
        read = subprocess.run(["dd", f"if={other}", "bs=4k", "iflag=direct"], capture_output=True, timeout=60)
        assert read.stdout == b"other" * 3000
        assert len(os.listdir(mounted.path)) == 4
        run("umount", "--lazy", mounted.path)
        assert not os.path.ismount(mounted.path)
    writer.wait(timeout=60)
    assert writer.returncode == 0
    wait_for_end(daemon)
    mounted.mount()
    assert mounted.status()["health"] == "ok"
    assert path.read_bytes()[:8192] == b"x" * 8192


@contextlib.contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """Whatever would write to a filesystem waits, until the block ends."""
    run("fsfreeze", "--freeze", folder)
    try:
        yield
    finally:
        run("fsfreeze", "--unfreeze", folder)


@pytest.mark.parametrize("mode", ["redirect", "cow"])
def test_a_write_to_a_device_that_hangs_holds_up_nobody_else(tmp_path: Path, mode: str) -> None:
    healthy = tmp_path / "healthy"
    healthy.mkdir()
    with small_filesystem(tmp_path, 64 << 20) as disk, contextlib.ExitStack() as stack:
        (disk / "device").mkdir()
        options = ["--device", disk / "device", "--device", healthy, "--processors", "1"]
        mounted = stack.enter_context(pool_on(tmp_path, *options))
        # Each volume of one object lies on one device; two that follow one another lie on both.
        contents = {name: os.urandom(8192) for name in ("a", "b")}
        for name, data in contents.items():
            snapfs("create", mounted.path / name, "--size", "1M", "--mode", mode)
            (mounted.path / name).write_bytes(data)
        run("sync", "--file-system", mounted.path)
        mounted.snapshot("s")
        wait_until(lambda: not mounted.status()["unsealed_snapshot_count"], "the snapshot is sealed")
        used = [run("du", "-s", folder).stdout.split()[0] for folder in (disk / "device" / "logs", healthy / "logs")]
        assert all(int(one) >= 8 for one in used)

        def states() -> list[str]:
            return [one["state"] for one in mounted.status()["devices"]]

        wait_until(lambda: states() == ["idle", "idle"], "nothing has been asked of the devices for long")
        with frozen(disk):
            command = ["dd", "if=/dev/zero", "bs=4k", "count=1", "oflag=direct", "conv=notrunc", "status=none"]
            writers = {name: subprocess.Popen([*command, f"of={mounted.path / name}"]) for name in contents}
            # Of all that asks the daemon this alone does not wait for ever.
            snapfs("status", mounted.path)
            wait_until(lambda: any(one.poll() is not None for one in writers.values()), "one of them goes through")
            wait_until(lambda: "silent" in states(), "one of them waits")
            assert states()[0] == "silent"
            (stuck,) = [one for one in writers.values() if one.poll() is None]
            wait_until(lambda: mounted.status()["health"] == "stuck", "status tells of it")
            told = snapfs("status", mounted.path).stdout
            assert "stuck: probe of the device 0" in told
            assert (mounted.snapshots / "s" / "a").read_bytes()[:8192] == contents["a"]
            assert (mounted.snapshots / "s" / "b").read_bytes()[:8192] == contents["b"]
            assert os.statvfs(mounted.path).f_blocks
            assert stuck.poll() is None
        for writer in writers.values():
            assert writer.wait(timeout=60) == 0
        for name, data in contents.items():
            assert (mounted.path / name).read_bytes()[:8192] == bytes(4096) + data[4096:]
        assert mounted.status()["health"] == "ok"


def test_status_of_a_daemon_that_does_not_answer(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "ANSWER_S", 0.2)
    pid = int(mounted.status()["pid"])
    # So that the kernel has to ask for the attributes of the mount's folder, as it does a second later.
    (mounted.path / "new").touch()
    os.kill(pid, signal.SIGSTOP)
    try:
        done = invoke("status", mounted.path)
        assert isinstance(done.exception, SilentDaemonError) and done.exit_code != 0
        assert f"process {pid}, it is stopped for " in str(done.exception)
        # It is not asked for anything to be taken away.
        snapfs("umount", "--lazy", mounted.path)
        assert not os.path.ismount(mounted.path)
        assert main_here("umount", "--lazy", mounted.path) == MountError.exit_code
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the daemon ends with its mount")
    mounted.mount()
    assert invoke("status", mounted.path).exit_code == 0


def test_what_a_silent_daemon_waits_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "ANSWER_S", 0.05)
    monkeypatch.chdir(tmp_path)
    pipe = tmp_path / "log"
    os.mkfifo(pipe)
    # Open for both, so that nobody waits for the other end.
    program = "import os; os.read(os.open('log', os.O_RDWR), 1)"
    with subprocess.Popen(["python3", "-c", program, "snapfs", "mount", "pool", "mnt"]) as daemon:
        try:
            wait_until(lambda: silence._file_of_call(daemon.pid) == str(pipe), "it waits")
            with pytest.raises(SilentDaemonError) as caught:
                silence.answered_soon("mnt", threading.Event().wait)
            assert f"process {daemon.pid}, waits in a call to the system for {pipe} for " in str(caught.value)
        finally:
            daemon.kill()
    with pytest.raises(SilentDaemonError) as caught:
        silence.answered_soon("mnt", threading.Event().wait)
    assert "process" not in str(caught.value)
    with pytest.raises(ZeroDivisionError):
        silence.answered_soon("mnt", lambda: 1 / 0)
    assert silence.answered_soon("mnt", lambda: 1) == 1
