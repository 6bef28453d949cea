"""Two pictures: throughput against the number of snapshots, and the latency of writes with snapshots marked."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "snapfs"

from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


def throughput(found: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Lines of IOPS by the number of snapshots behind."""
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for name, points in found.items():
        axes.plot([count for count, _ in points], [iops / 1000 for _, iops in points], marker="o", label=name)
    axes.set_xscale("symlog")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("snapshots behind (qemu: length of the chain)")
    axes.set_ylabel("4K random read, O_DIRECT, QD16: thousands a second")
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, path)


def latency(log: Path, every_s: float, path: Path) -> None:
    """The slowest write of each tenth of a second, from fio's log: time in ms, latency in ns."""
    points = [line.split(",")[:2] for line in log.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(8, 4))
    times = [int(at) / 1000 for at, _ in points]
    axes.plot(times, [int(value) / 1e6 for _, value in points], linewidth=0.8)
    for number in range(1, int(max(times, default=0) / every_s) + 1):
        axes.axvline(number * every_s, color="grey", alpha=0.3, linewidth=0.7)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds; a snapshot at each grey line")
    axes.set_ylabel("slowest 4K write of a tenth of a second, ms")
    axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
