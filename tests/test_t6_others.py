"""The exercisers of others: stress-ng on ext4 and XFS, pgbench, qemu-img. With snapshots meanwhile."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .clients import PostgresClient, postgres_server
from .conftest import Mounted, loop_device, mounted_filesystem, run

pytestmark = pytest.mark.mount
MIB = 1 << 20
STRESSORS = ("hdd", "iomix", "rename", "dirdeep", "fallocate", "sync-file", "aio", "seek", "copy-file", "link")
# XFS replaces an attribute in two transactions: after a crash in between xfs_repair calls it incomplete.
ONLY = {"ext4": ("xattr",), "xfs": ()}
MAKE = {"ext4": ("mkfs.ext4", "-q"), "xfs": ("mkfs.xfs", "-q")}
CHECK = {"ext4": ("e2fsck", "-f", "-n"), "xfs": ("xfs_repair", "-n")}


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can look into, which those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="snapfs-others-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def filesystem_in(volume: Path, folder: Path, kind: str, size_bytes: int) -> Iterator[Path]:
    """A filesystem made in a volume, and mounted."""
    with open(volume, "wb") as file:
        file.truncate(size_bytes)
    with loop_device(volume) as device:
        run(*MAKE[kind], device)
        with mounted_filesystem(device, folder) as mounted:
            yield mounted


def copy_of(mounted: Mounted, snapshot: str, name: str, folder: Path) -> Path:
    """A writable copy of a volume in a snapshot, for a filesystem in it to replay its journal."""
    copy = folder / f"{name}-{snapshot}"
    run("cp", "--sparse=always", mounted.snapshots / snapshot / name, copy)
    return copy


def snapshots_during(mounted: Mounted, process: subprocess.Popen[Any]) -> int:
    """Make snapshots s0, s1 and so on while a process runs; how many."""
    count = 0
    while process.poll() is None:
        mounted.snapshot(f"s{count}")
        count += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.3)
    return count


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_stress_on_a_filesystem_in_a_volume(mounted: Mounted, tmp_path: Path, kind: str) -> None:
    with filesystem_in(mounted.path / "disk", tmp_path / "live", kind, 400 * MIB) as live:
        command = ["stress-ng", "--temp-path", str(live), "--timeout", "5s", "--verify", "--seed", "1"]
        command += [word for one in (*STRESSORS, *ONLY[kind]) for word in (f"--{one}", "1")]
        command += ["--hdd-bytes", "24m", "--iomix-bytes", "16m", "--fallocate-bytes", "16m", "--aio-requests", "8"]
        # Or it takes all the inodes there are, and the others find none.
        command += ["--dirdeep-inodes", "8192"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as stress:
            count = snapshots_during(mounted, stress)
            assert stress.stdout is not None
            output = stress.stdout.read()
        assert stress.returncode == 0 and "successful run completed" in output, output
    assert count > 5
    run(*CHECK[kind], mounted.path / "disk")
    for number in (0, count // 2, count - 1):
        copy = copy_of(mounted, f"s{number}", "disk", tmp_path)
        # Mounting replays the journal, as after a power cut at that instant.
        with mounted_filesystem(copy, tmp_path / "then", "-o", "loop"):
            pass
        run(*CHECK[kind], copy)
        copy.unlink()


def test_pgbench_with_snapshots(mounted: Mounted, open_folder: Path) -> None:
    sums = {"abalance": "accounts", "bbalance": "branches", "tbalance": "tellers", "delta": "history"}
    with filesystem_in(mounted.path / "disk", open_folder / "live", "ext4", 400 * MIB) as live:
        PostgresClient(live)
        with postgres_server(live / "data") as server:
            run(*server.command("pgbench", "-i", "-q", "-s", "2", "postgres"))
            with subprocess.Popen(
                server.command("pgbench", "-n", "-T", "4", "-c", "4", "postgres"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            ) as bench:
                count = snapshots_during(mounted, bench)
            assert bench.returncode == 0
            assert int(server.query("SELECT count(*) FROM pgbench_history")) > 100
    assert count > 5
    before = -1
    for number in (1, count // 2, count - 1):
        copy = copy_of(mounted, f"s{number}", "disk", open_folder)
        with (
            mounted_filesystem(copy, open_folder / "then", "-o", "loop") as then,
            postgres_server(then / "data") as server,
        ):
            run(*server.command("pg_amcheck", "--all", "--heapallindexed"))
            totals = {
                server.query(f"SELECT coalesce(sum({one}), 0) FROM pgbench_{table}") for one, table in sums.items()
            }
            assert len(totals) == 1, totals
            done = int(server.query("SELECT count(*) FROM pgbench_history"))
            assert done >= before
            before = done
        copy.unlink()
    assert before > 0


def test_qemu_img_on_volumes_and_snapshots(mounted: Mounted, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.write_bytes(os.urandom(5 * MIB) + bytes(7 * MIB) + os.urandom(3 * MIB))
    disk, image = mounted.path / "disk", mounted.path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", raw, disk)
    run("qemu-img", "convert", "-O", "qcow2", disk, image)
    run("qemu-img", "check", image)
    mounted.snapshot("before")
    run("qemu-io", "-c", "write -P 7 1M 2M", "-c", "flush", image)
    run("qemu-io", "-f", "raw", "-c", "write -P 9 6M 1M", "-c", "flush", disk)
    mounted.snapshot("after")
    before, after = mounted.snapshots / "before", mounted.snapshots / "after"
    for one in (before, after):
        run("qemu-img", "check", one / "disk.qcow2")
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", before / "disk.qcow2", raw)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", before / "disk", raw)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", after / "disk.qcow2", raw, expect=1)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", after / "disk.qcow2", image)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", after / "disk", tmp_path / "copy.qcow2")
    run("qemu-img", "compare", "-F", "raw", tmp_path / "copy.qcow2", disk)
    # A disk of a VM that stands on a snapshot, as on a golden image.
    run("qemu-img", "create", "-f", "qcow2", "-b", before / "disk", "-F", "raw", mounted.path / "child.qcow2")
    run("qemu-io", "-c", "write -P 3 0 64k", mounted.path / "child.qcow2")
    run("qemu-img", "check", mounted.path / "child.qcow2")
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", before / "disk", raw)
