"""A daemon whose device hangs, on a real mount: its fdatasync calls are held up by strace."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

import pytest

from .conftest import Mounted, run, snapfs, wait_for_end, wait_until

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


def test_a_device_that_hangs(mounted: Mounted) -> None:
    path = mounted.path / "v"
    path.write_bytes(b"first" * 3000)

    other = mounted.path / "other"
    other.write_bytes(b"other" * 3000)
    kept = mounted.snapshot("s") / "v"
    assert kept.read_bytes() == b"first" * 3000
    pid = int(mounted.status()["pid"])
    daemon = os.pidfd_open(pid)
    with syncs_held_up(pid):
        writer = subprocess.Popen(["dd", "if=/dev/zero", f"of={path}", "bs=4k", "count=2", "conv=notrunc,fsync"])
        wait_until(lambda: bool(mounted.status()["stuck_calls"]), "status tells of what hangs")
        assert mounted.status()["health"] == "stuck"
        assert "stuck: " in snapfs("status", mounted.path).stdout
        assert kept.read_bytes() == b"first" * 3000
        assert other.read_bytes() == b"other" * 3000
        assert len(os.listdir(mounted.path)) == 4
        run("umount", "--lazy", mounted.path)
        assert not os.path.ismount(mounted.path)
    writer.wait(timeout=60)
    assert writer.returncode == 0
    wait_for_end(daemon)
    mounted.mount()
    assert mounted.status()["health"] == "ok"
    assert path.read_bytes()[:8192] == bytes(8192)
