"""What making a snapshot costs, and what a pool of very many costs: mounting, listing, memory, metadata."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import fio
import subjects
from lanes import Scale, random_io
from results import Fact, Result
from subjects import MIB, Snapfs

CUT_MS_MAX = 0.2
CALL_MS_MAX = 5.0
_GIB = 1 << 30


def _costs(own: Snapfs, path: Path, count: int, *, writes: bool = True) -> tuple[list[float], list[float]]:
    """Cuts and calls of so many snapshots, each after a write; in milliseconds."""
    cuts, calls = [], []
    with open(path, "r+b", buffering=0) as file:
        for number in range(count):
            if writes:
                os.pwrite(file.fileno(), os.urandom(4096), number % 1024 * 65536)
            started = time.perf_counter()
            answer = own.ask("snapshot")
            calls.append((time.perf_counter() - started) * 1000)
            cuts.append(float(str(answer["cut_us"])) / 1000)
    return cuts, calls


def making(folder: Path, scale: Scale, count: int) -> tuple[list[Result], list[Fact]]:
    """The cut and the call: of a small and a huge volume, the first and the last, idle and under load."""
    facts: list[Fact] = []
    ratio = Result(
        "making a snapshot, the call", "ms", "the last 50", {"the first 50": 1.3, "of 1 GiB": 1.3}, less_is_better=True
    )

    def note(setting: str, cuts: list[float], calls: list[float], *, is_idle: bool = True) -> None:
        facts.append(
            Fact(
                f"making a snapshot, {setting}: the cut, median of {len(cuts)}",
                statistics.median(cuts),
                "ms",
                CUT_MS_MAX,
            )
        )
        bound = CALL_MS_MAX if is_idle else None
        facts.append(Fact(f"making a snapshot, {setting}: the call, median", statistics.median(calls), "ms", bound))
        facts.append(Fact(f"making a snapshot, {setting}: the call, slowest", max(calls), "ms"))

    with subjects.snapfs(folder, "making") as own:
        subjects.fill(own.file, scale.size_bytes)
        with open(own.file, "r+b") as file:
            file.truncate(_GIB)
        cuts, calls = _costs(own, own.file, 50)
        note("a volume of 1 GiB, the first 50", cuts, calls)
        for one in calls:
            ratio.add("the first 50", one)
        sparse = own.mount / "sparse"
        with open(sparse, "w+b") as huge:
            huge.truncate(4 << 40)
            for place in range(0, 4 << 40, 64 << 30):
                huge.seek(place)
                huge.write(b"x" * 4096)
        cuts, calls = _costs(own, sparse, 50)
        note("with a sparse volume of 4 TiB, written to", cuts, calls)
        loaded: list[float] = []
        loaded_cuts: list[float] = []

        def meanwhile() -> None:
            time.sleep(0.5)
            loaded_cuts[:], loaded[:] = _costs(own, sparse, 30, writes=False)

        thread = threading.Thread(target=meanwhile)
        thread.start()
        fio.run(own.file, (*random_io("write", 16), "--time_based"), scale.size_bytes, max(3.0, scale.seconds))
        thread.join()
        note("under 4K random writes at QD16", loaded_cuts, loaded, is_idle=False)
        own.settle()
        fio.settle()
        _, again = _costs(own, own.file, 50)
        for one in again:
            ratio.add("of 1 GiB", one)
        _costs(own, own.file, count)
        own.settle()
        fio.settle()
        cuts, calls = _costs(own, own.file, 50)
        note(f"after {count + 180} others", cuts, calls)
        for one in calls:
            ratio.add("the last 50", one)
    reflinks = Result(
        "making a snapshot against a reflink of the same file, the call",
        "ms",
        "snapfs",
        {"btrfs": 1.0, "xfs": 1.0},
        less_is_better=True,
    )
    for kind in ("btrfs", "xfs"):
        with subjects.reflink(folder, kind, scale.size_bytes) as link:
            if link is None:
                continue
            subjects.fill(link.file, scale.size_bytes)
            with open(link.file, "r+b", buffering=0) as source:
                for number in range(20):
                    os.pwrite(source.fileno(), os.urandom(4096), number * 65536)
                    started = time.perf_counter()
                    copy = link.file.with_name(f"copy{number}")
                    link.clone_to(copy)
                    fd = os.open(copy, os.O_RDONLY)
                    # A snapshot is durable when its call returns.
                    os.fsync(fd)
                    os.close(fd)
                    reflinks.add(kind, (time.perf_counter() - started) * 1000)
                    if len(reflinks.figures.get("snapfs", ())) < 20:
                        reflinks.add("snapfs", calls[number])
    return [ratio, reflinks] if len(reflinks.figures) > 1 else [ratio], facts


def large(folder: Path, snapshot_count: int, volume_count: int) -> list[Fact]:
    """A pool of very many snapshots and volumes: mounting it, listing it, its memory."""
    with subjects.snapfs(folder, "large") as own:
        for number in range(volume_count):
            (own.mount / f"v{number}").touch()
        for _ in range(snapshot_count):
            own.snapshot()
        took_s = own.remount()
        listed_s = []
        for _ in range(3):
            fio.settle(drop_caches=True)
            started = time.perf_counter()
            subprocess.run(["ls", "-l", own.mount / ".snapshots"], check=True, stdout=subprocess.DEVNULL)
            listed_s.append(time.perf_counter() - started)
        pid = int(str(own.status()["pid"]))
        status = Path(f"/proc/{pid}/status").read_text()
        resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    of = f"a pool of {snapshot_count} snapshots and {volume_count} volumes"
    return [
        Fact(f"{of}: mount", took_s, "s", 1.0),
        Fact(f"{of}: ls -l of the snapshots, nothing cached", statistics.median(listed_s), "s", 0.5),
        Fact(f"{of}: resident memory after that", resident / 1024, "MiB", 120.0),
    ]


def metadata(folder: Path, written_bytes: int = _GIB, snapshot_count: int = 10) -> list[Fact]:
    """What random 4K writes over some snapshots add to metadata, and to space beyond the data."""
    with subjects.snapfs(folder, "metadata") as own:
        size = _GIB
        with open(own.file, "wb") as file:
            file.truncate(size)
        before = _databases(own.pool)
        pid = int(str(own.status()["pid"]))
        written_before = _bytes_written(pid)
        for number in range(snapshot_count):
            options = (
                *random_io("write", 16),
                f"--randseed={number + 1}",
                f"--io_size={written_bytes // snapshot_count}",
            )
            fio.run(own.file, options, size, 0)
            own.snapshot()
            print(".", end="", file=sys.stderr, flush=True)
        own.settle()
        os.sync()
        wrote = _bytes_written(pid) - written_before
        logs = sum(path.stat().st_blocks * 512 for path in own.pool.rglob("*.sqlite-wal"))
        # What is written ahead is folded in; it is bounded, and not of these writes alone.
        own.unmount()
        grown = _databases(own.pool) - before
        kept = sum(
            path.stat().st_blocks * 512 for path in own.pool.rglob("*") if path.is_file() and path.name != "reserve"
        )
        own.do_mount()
        blocks = written_bytes
    return [
        Fact("metadata kept, of 1 GiB of random 4K writes over 10 snapshots", 100 * grown / written_bytes, "%", 2.0),
        Fact("write-ahead logs besides, while mounted", logs / MIB, "MiB"),
        Fact("written by the daemon beyond the data, of the same", 100 * (wrote - written_bytes) / written_bytes, "%"),
        Fact("space beyond the blocks written, of the same", 100 * (kept - blocks) / blocks, "%", 2.0),
    ]


def _databases(pool: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in pool.rglob("*.sqlite*"))


def _bytes_written(pid: int) -> int:
    text = Path(f"/proc/{pid}/io").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("write_bytes"))
