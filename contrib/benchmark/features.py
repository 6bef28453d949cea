"""Measures what stands around snapshots: clone, rollback, diff, send, scrub, copy-on-write. One run on its own mount.

What is compared is said in each line. Sizes are of one machine; what counts is that clone and rollback do
not grow with the volume, that diff follows what changed, and the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results

SNAPFS = [sys.executable, "-m", "snapfs"]
MIB = 1 << 20


def ask(mount: Path, line: str) -> tuple[dict[str, Any], float]:
    """A command to the control file, and how long the write took."""
    fd = os.open(mount / ".snapfs" / "control", os.O_RDWR)
    try:
        started = time.perf_counter()
        os.write(fd, line.encode() + b"\n")
        took = time.perf_counter() - started
        text = bytearray()
        while part := os.read(fd, 1 << 20):
            text += part
        return json.loads(text), took
    finally:
        os.close(fd)


def fill(path: Path, offset: int, length: int) -> None:
    """Random bytes, a MiB at a time, durable."""
    with open(path, "r+b", buffering=0) as file:
        for at in range(offset, offset + length, MIB):
            os.pwrite(file.fileno(), os.urandom(MIB), at)
        os.fsync(file.fileno())


def make(mount: Path, name: str, size: str, *options: str) -> Path:
    subprocess.run([*SNAPFS, "create", str(mount / name), "--size", size, *options], check=True)
    return mount / name


def median_ms(call: Callable[[int], float], count: int = 9) -> float:
    return statistics.median(call(number) for number in range(count)) * 1000


def clones_and_rollbacks(mount: Path, found: dict[str, object]) -> None:
    for name, size, data in (("small", "64M", 16), ("large", "1T", 1024)):
        clones_and_rollbacks_of(mount, found, name, size, data)


def clones_and_rollbacks_of(mount: Path, found: dict[str, object], name: str, size: str, data: int) -> None:
    path = make(mount, name, size)
    fill(path, 0, data * MIB)
    ask(mount, f"snapshot {name}-0 volume={name}")
    clone = median_ms(lambda number: ask(mount, f"clone {name}-0/{name} {name}-c{number}")[1])
    found[f"clone, {size} volume with {data} MiB of data, ms"] = clone
    back = median_ms(lambda number: ask(mount, f"rollback {name}-0 volume={name}")[1])
    found["rollback of it, ms" + f" ({size})"] = back


def changes(mount: Path, found: dict[str, object]) -> None:
    path = make(mount, "sparse", "100G")
    picks = random.Random(1)
    places = [picks.randrange(100 << 10) * MIB for _ in range(1024)]
    for at in places[:256]:
        fill(path, at, MIB)
    ask(mount, "snapshot d0 volume=sparse")
    for at in places:
        fill(path, at, MIB)
    ask(mount, "snapshot d1 volume=sparse")
    answer, took = ask(mount, "diff d0 d1")
    changed = sum(one["changed_bytes"] for one in answer["volumes"])
    found[f"diff of 100 GiB sparse, {changed >> 20} MiB changed in 1 MiB pieces, s"] = took
    with open(path, "r+b", buffering=0) as file:
        for _ in range(20000):
            os.pwrite(file.fileno(), b"x" * 4096, picks.randrange((100 << 30) // 4096) * 4096)
        os.fsync(file.fileno())
    ask(mount, "snapshot d2 volume=sparse")
    answer, took = ask(mount, "diff d1 d2")
    found["diff of the same, 20,000 random blocks changed, s"] = took


def sending(mount: Path, found: dict[str, object]) -> None:
    path = make(mount, "sent", "1G")
    fill(path, 0, 512 * MIB)
    ask(mount, "snapshot sent volume=sent")
    kept = mount / ".snapshots" / "sent" / "sent"
    wait_until_sealed(mount)
    for level in (0, 3):
        speeds: list[float] = []
        natives: list[float] = []
        for _ in range(3):
            for command, into in (
                ([*SNAPFS, "send", str(mount), "sent", "--level", str(level)], speeds),
                (["dd", f"if={kept}", "of=/dev/null", "bs=1M", "count=512", "status=none", "iflag=direct"], natives),
            ):
                Path("/proc/sys/vm/drop_caches").write_text("3")
                started = time.perf_counter()
                with open(os.devnull, "wb") as sink:
                    subprocess.run(command, stdout=sink, check=True)
                into.append(512 / (time.perf_counter() - started))
        speed, native = statistics.median(speeds), statistics.median(natives)
        found[f"send, zstd level {level}, MiB/s (random bytes)"] = speed
        found[f"send, zstd level {level}, of dd reading the same cold"] = speed / native


def wait_until_sealed(mount: Path) -> None:
    while json.loads((mount / ".snapfs" / "status.json").read_text())["unsealed_snapshot_count"]:
        time.sleep(0.1)


def proving(mount: Path, found: dict[str, object]) -> None:
    path = make(mount, "proven", "1G")
    fill(path, 0, 1024 * MIB)
    ask(mount, "snapshot proven volume=proven")
    started = time.perf_counter()
    wait_until_sealed(mount)
    found["sealing 1 GiB of random bytes in the background, MiB/s"] = 1024 / (time.perf_counter() - started)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    answer, took = ask(mount, "scrub")
    found["scrub, cold, MiB/s"] = answer["checked_bytes"] / MIB / took
    Path("/proc/sys/vm/drop_caches").write_text("3")
    answer, took = ask(mount, "verify proven")
    found["verify of 1 GiB, cold, MiB/s"] = answer["checked_bytes"] / MIB / took


def restoring(mount: Path, found: dict[str, object]) -> None:
    path = make(mount, "in-place", "1G", "--mode", "cow")
    fill(path, 0, 512 * MIB)
    ask(mount, "snapshot in-place volume=in-place")
    fill(path, 0, 256 * MIB)
    _, took = ask(mount, "rollback in-place volume=in-place")
    found["rollback in place of a copy-on-write volume, 256 MiB changed, s"] = took


def overwriting(mount: Path, found: dict[str, object], seconds: float) -> None:
    for mode in ("redirect", "cow"):
        path = make(mount, f"mode-{mode}", "256M", "--mode", mode)
        fill(path, 0, 256 * MIB)
        for what in ("no snapshot", "first touch after a snapshot"):
            for depth in (1, 16):
                if what != "no snapshot":
                    ask(mount, f"snapshot {mode}-{depth} volume=mode-{mode}")
                command = ["fio", "--name=x", f"--filename={path}", "--rw=randwrite", "--bs=4k", "--direct=1"]
                command += ["--ioengine=libaio", f"--iodepth={depth}", f"--runtime={seconds}", "--size=256M"]
                command += ["--random_generator=lfsr", "--output-format=json"]
                done = subprocess.run(command, capture_output=True, check=True, text=True)
                iops = json.loads(done.stdout)["jobs"][0]["write"]["iops"]
                found[f"4K random overwrite, {mode}, {what}, queue depth {depth}, IOPS"] = iops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2, help="of each run of fio")
    parser.add_argument("--json", type=results.file_to_write, help="also write all figures to this file")
    options = parser.parse_args()
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory(prefix="snapfs-bench-") as folder:
        pool, mount = Path(folder) / "pool", Path(folder) / "mount"
        mount.mkdir()
        subprocess.run([*SNAPFS, "init", str(pool)], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*SNAPFS, "mount", str(pool), str(mount)], check=True)
        try:
            clones_and_rollbacks(mount, found)
            changes(mount, found)
            sending(mount, found)
            proving(mount, found)
            restoring(mount, found)
            overwriting(mount, found, options.seconds)
        finally:
            subprocess.run([*SNAPFS, "umount", str(mount)], check=True)
    for name, value in found.items():
        print(f"{name:75} {value:12,.2f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
