"""Latency of live requests while snapshots are made and deleted."""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import subjects
from lanes import Lane, Row, Scale, lane_of, measure, random_io, run_lane
from results import Result
from rows import take_snapshots


@contextlib.contextmanager
def _meanwhile(step: Callable[[int], object], every_s: float) -> Iterator[None]:
    """Do something over and over, in a thread."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        number = 0
        try:
            while not stop.wait(every_s):
                step(number)
                number += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def stalls(folder: Path, scale: Scale) -> tuple[list[Result], Path]:
    """The slowest requests at QD1 with a snapshot a second, and without; and where each write's latency is logged."""
    log = folder / "latency"
    with subjects.snapfs(folder) as own:
        subjects.fill(own.file, scale.size_bytes)
        once_a_second = Lane("snapshots", lambda: own.file, lambda: _meanwhile(lambda _: own.snapshot(), 1.0))
        lanes = (once_a_second, lane_of(own, "none"))
        rows = [
            Row(
                f"p99.9 latency of a 4K random {kind}, O_DIRECT, QD1, a snapshot a second for {scale.stall_s} s",
                "µs",
                random_io(kind, 1),
                lanes,
                {"none": 2.0},
                lambda run: run.p999_us,
                less_is_better=True,
                seconds=scale.stall_s,
                log={"snapshots": log} if kind == "write" else {},
            )
            for kind in ("write", "read")
        ]
        found = measure(rows, Scale(1, 0, scale.size_bytes, 0, 0, 0))
    return found, log.with_name("latency_lat.1.log")


def deleting(folder: Path, scale: Scale) -> list[Result]:
    """Live latency while snapshots are deleted: the oldest first, the newest first, every second of them."""
    return [_deleting(folder, scale, which) for which in ("the oldest", "the newest", "every second")]


def _deleting(folder: Path, scale: Scale, which: str) -> Result:
    seconds = max(4.0, scale.seconds)
    with subjects.snapfs(folder, f"deleting {which}") as own:
        subjects.fill(own.file, scale.size_bytes)
        take_snapshots(own, scale.snapshot_count, scale.size_bytes)
        own.settle()
        names = [one.name for one in (own.mount / ".snapshots").iterdir()]
        doomed = {"the oldest": names, "the newest": names[::-1], "every second": names[::2]}[which]

        def delete(number: int) -> None:
            if number < len(doomed):
                own.ask(f"delete {doomed[number]}")

        row = Row("", "", random_io("write", 1), (lane_of(own),), {}, seconds=seconds)
        none = [run_lane(row, row.lanes[0], scale).p99_us for _ in range(3)]
        lane = Lane("", lambda: own.file, lambda: _meanwhile(delete, 0.8 * seconds / len(doomed)))
        during = run_lane(row, lane, scale).p99_us
    name = f"p99 latency of a 4K random write, O_DIRECT, QD1, deleting {which} of {scale.snapshot_count} snapshots"
    result = Result(name, "µs", "deleting", {"none": 1.5}, less_is_better=True)
    result.add("none", statistics.median(none))
    result.add("deleting", during)
    print(".", end="", file=sys.stderr, flush=True)
    return result
