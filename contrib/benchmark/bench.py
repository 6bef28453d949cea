"""Measures snapfs beside its ceiling and the native filesystem, in turn, and prints the ratios.

Every row runs once a round on each of its subjects, one right after the other, so that a machine
whose speed drifts spoils a ratio less. Shown are medians over the rounds and the least and the
greatest ratio of a round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
SNAPFS = [sys.executable, "-m", "snapfs"]


@dataclass(frozen=True)
class Row:
    """One measurement: fio's options, the subject it is held against, and what it should reach."""

    name: str
    against: str
    at_least: float
    fio: tuple[str, ...]
    unit: str
    file: str = "file"


SETTLE_S = 1.0
MEMORY_BYTES = 2 << 30
DIRECT = ("--direct=1", "--ioengine=libaio")
ROWS = (
    Row("4K random read, O_DIRECT, QD1", "null", 0.85, (*DIRECT, "--rw=randread", "--bs=4k", "--iodepth=1"), "IOPS"),
    Row("4K random read, O_DIRECT, QD16", "null", 0.85, (*DIRECT, "--rw=randread", "--bs=4k", "--iodepth=16"), "IOPS"),
    Row(
        "4K random overwrite, O_DIRECT, QD1", "null", 0.0, (*DIRECT, "--rw=randwrite", "--bs=4k", "--iodepth=1"), "IOPS"
    ),
    Row(
        "4K random overwrite, O_DIRECT, QD16",
        "null",
        0.0,
        (*DIRECT, "--rw=randwrite", "--bs=4k", "--iodepth=16"),
        "IOPS",
    ),
    Row("1M sequential read, O_DIRECT, QD4", "null", 0.75, (*DIRECT, "--rw=read", "--bs=1m", "--iodepth=4"), "MB/s"),
    Row("1M sequential write, O_DIRECT, QD4", "null", 0.75, (*DIRECT, "--rw=write", "--bs=1m", "--iodepth=4"), "MB/s"),
    Row(
        "4K sequential write, buffered, final fsync",
        "native",
        0.5,
        ("--ioengine=psync", "--rw=write", "--bs=4k", "--end_fsync=1"),
        "MB/s",
    ),
)


@dataclass
class Result:
    """A row's figures by subject, and the ratio of snapfs to the other, round by round."""

    name: str
    unit: str
    against: str
    at_least: float
    figures: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.figures["snapfs"], self.figures[self.against], strict=True)]


@dataclass
class CutResult:
    """What making a snapshot costs in one setting, in milliseconds."""

    setting: str
    cut_ms: float
    call_ms: float


class Subjects:
    """The mounts and folders that rows run on."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.folder = folder
        self.size_bytes = size_bytes
        self.files = {name: folder / name for name in ("snapfs", "null", "native")}

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        for path in self.files.values():
            path.mkdir()
        pool = self.folder / "pool"
        subprocess.run([*SNAPFS, "init", str(pool)], check=True, stdout=subprocess.DEVNULL)
        with contextlib.ExitStack() as stack:
            subprocess.run([*SNAPFS, "mount", str(pool), str(self.files["snapfs"])], check=True)
            stack.callback(subprocess.run, [*SNAPFS, "umount", str(self.files["snapfs"])], check=True)
            null = subprocess.Popen(
                [sys.executable, str(HERE / "null_handler.py"), str(self.files["null"]), str(self.size_bytes)]
            )
            stack.callback(null.wait)
            stack.callback(subprocess.run, ["fusermount3", "-u", str(self.files["null"])], check=True)
            while not (self.files["null"] / "file").exists():
                time.sleep(0.01)
            for name in ("snapfs", "native"):
                self._fill(self.files[name] / "file")
            yield

    def _fill(self, path: Path) -> None:
        block = os.urandom(1 << 20)
        with open(path, "wb") as file:
            for _ in range(self.size_bytes >> 20):
                file.write(block)
            os.fsync(file.fileno())


def back_memory() -> None:
    """Touch memory and give it back, so that in a virtual machine the host need not back it during a run."""
    with mmap.mmap(-1, MEMORY_BYTES) as memory:
        for offset in range(0, MEMORY_BYTES, mmap.PAGESIZE):
            memory[offset] = 1


def run_fio(path: Path, row: Row, size_bytes: int, seconds: float) -> float:
    """One run; IOPS or MB/s."""
    command = ["fio", "--name=row", f"--filename={path}", f"--size={size_bytes}", "--fallocate=none"]
    command += ["--output-format=json", *row.fio]
    if "--end_fsync=1" not in row.fio:
        command += ["--time_based", f"--runtime={seconds}"]
    else:
        command += ["--overwrite=0"]
    # The dirty pages and the discards of one run are not the next one's burden.
    os.sync()
    time.sleep(SETTLE_S)
    back_memory()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side = job["read"] if job["read"]["io_bytes"] else job["write"]
    if "--end_fsync=1" in row.fio:
        # With the time of the fsync, which fio leaves out of the bandwidth.
        return float(side["io_bytes"] / job["job_runtime"] / 1000)
    return float(side["iops"] if row.unit == "IOPS" else side["bw_bytes"] / 1e6)


def measure_rows(subjects: Subjects, rows: list[Row], rounds: int, seconds: float) -> list[Result]:
    results = [Result(row.name, row.unit, row.against, row.at_least) for row in rows]
    for number in range(rounds):
        for row, result in zip(rows, results, strict=True):
            order = ["snapfs", row.against] if number % 2 == 0 else [row.against, "snapfs"]
            for subject in order:
                target = subjects.files[subject] / (row.file if "--end_fsync=1" not in row.fio else "fresh")
                value = run_fio(target, row, subjects.size_bytes, seconds)
                result.figures.setdefault(subject, []).append(value)
                if target.name == "fresh":
                    target.unlink()
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results


def snapshot_cost(mount_point: Path, count: int) -> tuple[float, float]:
    """Median cut and call of ``count`` snapshots, each after a write; in milliseconds."""
    cuts, calls = [], []
    volume = os.open(mount_point / "file", os.O_RDWR)
    control = os.open(mount_point / ".snapfs" / "control", os.O_RDWR)
    try:
        for number in range(count):
            os.pwrite(volume, os.urandom(4096), number % 1024 * 65536)
            started = time.perf_counter()
            os.write(control, b"snapshot\n")
            calls.append((time.perf_counter() - started) * 1000)
            cuts.append(json.loads(os.read(control, 65536))["cut_us"] / 1000)
    finally:
        os.close(control)
        os.close(volume)
    return statistics.median(cuts), statistics.median(calls)


def measure_cuts(subjects: Subjects, snapshot_count: int) -> list[CutResult]:
    mount_point = subjects.files["snapfs"]
    results = []

    def note(setting: str) -> None:
        cut_ms, call_ms = snapshot_cost(mount_point, 50)
        results.append(CutResult(setting, cut_ms, call_ms))

    note(f"one volume of {subjects.size_bytes >> 20} MiB, the first 50 snapshots")
    with open(mount_point / "sparse", "wb") as sparse:
        sparse.truncate(4 << 40)
        for place in range(0, 4 << 40, 64 << 30):
            sparse.seek(place)
            sparse.write(b"x" * 4096)
    note("and a sparse one of 4 TiB")
    snapshot_cost(mount_point, snapshot_count)
    note(f"after {snapshot_count + 100} snapshots")
    return results


def show(results: list[Result], cuts: list[CutResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="medians; ratio is snapfs to the other, with its least and greatest of a round")
    for column in ("row", "snapfs", "other", "", "ratio", "least", "greatest", "wanted"):
        table.add_column(column, justify="left" if column == "row" else "right")
    for result in results:
        ratios = result.ratios
        own, other = (statistics.median(result.figures[name]) for name in ("snapfs", result.against))
        table.add_row(
            result.name,
            f"{own:,.0f}",
            f"{other:,.0f} {result.against}",
            result.unit,
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}",
            f"{max(ratios):.2f}",
            f"{result.at_least:.2f}" if result.at_least else "",
        )
    cut_table = Table(title="making a snapshot, medians of 50, each after a write")
    for column in ("setting", "cut ms", "call ms"):
        cut_table.add_column(column)
    for cut in cuts:
        cut_table.add_row(cut.setting, f"{cut.cut_ms:.3f}", f"{cut.call_ms:.2f}")
    console = Console(width=140)
    console.print(table)
    console.print(cut_table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of each run")
    parser.add_argument("--size", type=int, default=256, help="of the file, in MiB")
    parser.add_argument("--snapshots", type=int, default=1000, help="before the last measurement of a snapshot")
    parser.add_argument("--quick", action="store_true", help="under two minutes")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--folder", type=Path, help="where to measure; a temporary folder by default")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if arguments.only in row.name]
    rounds, seconds, snapshots = arguments.rounds, arguments.seconds, arguments.snapshots
    if arguments.quick:
        rounds, seconds, snapshots = 2, 1, 100
    folder = Path(tempfile.mkdtemp(prefix="snapfs-bench-", dir=arguments.folder))
    try:
        subjects = Subjects(folder, arguments.size << 20)
        with subjects.mounted():
            results = measure_rows(subjects, rows, rounds, seconds)
            cuts = measure_cuts(subjects, snapshots)
    finally:
        shutil.rmtree(folder)
    show(results, cuts)
    if arguments.json:
        document = {
            "rounds": rounds,
            "rows": [asdict(result) | {"ratios": result.ratios} for result in results],
            "snapshots": [asdict(cut) for cut in cuts],
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


main()
