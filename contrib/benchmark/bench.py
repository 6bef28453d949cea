"""Measures snapfs beside its ceilings, its peers and the native filesystem, and prints the ratios.

All of a row's subjects have a file of the same size and contents on the same disk, and run one right
after the other in every round. See docs/performance.md for what the rows compare.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import fio
import making
import meanwhile
import plots
import results
import rows
from lanes import Scale
from results import Fact, Result
from subjects import MIB

GROUPS = ("plain", "behind", "first", "buffered", "making", "stalls", "deleting", "large", "metadata", "plots")
QUICK = ("plain", "making")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help=f"under two minutes: one short round of {', '.join(QUICK)}"
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="these groups of rows; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2, help="of each run")
    parser.add_argument("--size", type=int, default=256, help="of the file, in MiB")
    parser.add_argument("--snapshots", type=int, default=1000, help="behind, and to be deleted")
    parser.add_argument("--chain", type=int, default=100, help="the peer's snapshots")
    parser.add_argument("--many", type=int, default=10000, help="snapshots where very many are asked for")
    parser.add_argument("--stall-seconds", type=int, default=100)
    parser.add_argument("--json", type=results.file_to_write, help="also write all figures to this file")
    parser.add_argument("--plots", type=Path, help="the folder that pictures go to; the one of --json by default")
    parser.add_argument("--folder", type=Path, help="where to measure; a temporary folder by default")
    return parser.parse_args()


class Bench:
    """What was found so far."""

    def __init__(self, folder: Path, scale: Scale, many: int, pictures: Path | None) -> None:
        self.folder = folder
        self.scale = scale
        self.many = many
        self.pictures = pictures
        self.results: list[Result] = []
        self.facts: list[Fact] = []
        self.by_count: dict[str, list[tuple[int, float]]] = {}

    def run(self, group: str) -> None:
        """Measure a group of rows, in a folder of its own that is gone afterwards."""
        print(f"{group} ", end="", file=sys.stderr, flush=True)
        inside = self.folder / group
        inside.mkdir()
        getattr(self, f"_{group}")(inside)
        shutil.rmtree(inside)
        print(file=sys.stderr)

    def _plain(self, folder: Path) -> None:
        self.results += rows.plain(folder, self.scale)

    def _behind(self, folder: Path) -> None:
        behind, oldest = rows.behind(folder, self.scale)
        self.results += behind + oldest

    def _first(self, folder: Path) -> None:
        self.results += rows.first_touch(folder, self.scale)

    def _buffered(self, folder: Path) -> None:
        self.results += rows.buffered(folder, self.scale)

    def _making(self, folder: Path) -> None:
        count = self.many if self.scale.rounds > 1 else self.scale.snapshot_count
        found, facts = making.making(folder, self.scale, count)
        self.results += found
        self.facts += facts

    def _stalls(self, folder: Path) -> None:
        found, log = meanwhile.stalls(folder, self.scale)
        self.results += found
        if self.pictures is not None:
            plots.latency(log, 1.0, self.pictures / "latency.svg")

    def _deleting(self, folder: Path) -> None:
        self.results += meanwhile.deleting(folder, self.scale)

    def _large(self, folder: Path) -> None:
        self.facts += making.large(folder, self.many, self.many // 10)

    def _metadata(self, folder: Path) -> None:
        self.facts += making.metadata(folder)

    def _plots(self, folder: Path) -> None:
        counts = [count for count in (0, 1, 3, 10, 30, 100, 300, 1000) if count <= self.scale.snapshot_count]
        self.by_count = rows.throughput_by_count(folder, self.scale, counts)
        if self.pictures is not None:
            plots.throughput(self.by_count, self.pictures / "throughput.svg")

    def document(self) -> dict[str, object]:
        """All of it, for JSON."""
        return {
            "machine": {"cpu_count": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
            "scale": asdict(self.scale),
            "rows": [one.as_json() for one in self.results],
            "facts": [one.as_json() for one in self.facts],
            "random_reads_by_snapshot_count": self.by_count,
        }


def main() -> None:
    arguments = _arguments()
    size = arguments.size * MIB
    if arguments.quick:
        scale = Scale(1, 0.4, min(size, 64 * MIB), 100, 10, 10)
        fio.hurry()
    else:
        chain = min(arguments.chain, arguments.snapshots)
        scale = Scale(arguments.rounds, arguments.seconds, size, arguments.snapshots, chain, arguments.stall_seconds)
    groups = arguments.only or (QUICK if arguments.quick else GROUPS)
    pictures = arguments.plots or (arguments.json.parent if arguments.json else None)
    folder = Path(tempfile.mkdtemp(prefix="snapfs-bench-", dir=arguments.folder))
    bench = Bench(folder, scale, arguments.many, pictures)
    # Ended by a signal it unmounts what it has mounted, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for group in groups:
            bench.run(group)
    finally:
        # Also when it was stopped halfway: what was found so far is shown.
        results.show(bench.results, bench.facts)
        if arguments.json:
            arguments.json.write_text(json.dumps(bench.document(), indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)


main()
