"""How rows are run: each on its lanes, one right after the other and every round in another order.

So a machine whose speed drifts spoils a ratio less.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import fio
from fio import DIRECT, Run
from results import Result
from subjects import Subject


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    rounds: int
    seconds: float
    size_bytes: int
    snapshot_count: int
    chain: int
    stall_s: int


@dataclass(frozen=True)
class Lane:
    """Where a row runs. ``around`` is open during the run; ``file`` is asked for when it begins."""

    label: str
    file: Callable[[], Path]
    around: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext


@dataclass(frozen=True)
class Row:
    """A measurement. ``once``: the file is gone through once at most, where others go on until the time is over."""

    name: str
    unit: str
    options: tuple[str, ...]
    lanes: tuple[Lane, ...]
    wanted: dict[str, float]
    figure: Callable[[Run], float] = lambda run: run.iops
    once: bool = False
    drop_caches: bool = False
    less_is_better: bool = False
    seconds: float = 0.0
    size_bytes: int = 0
    note: str = ""
    log: dict[str, Path] = field(default_factory=dict)


def measure(rows: list[Row], scale: Scale) -> list[Result]:
    """All rounds of these rows. The first lane is the one that is judged."""
    results = [
        Result(row.name, row.unit, row.lanes[0].label, row.wanted, row.less_is_better, note=row.note) for row in rows
    ]
    for number in range(scale.rounds):
        for row, result in zip(rows, results, strict=True):
            turn = number % len(row.lanes)
            for lane in row.lanes[turn:] + row.lanes[:turn]:
                result.add(lane.label, row.figure(run_lane(row, lane, scale)))
            print(".", end="", file=sys.stderr, flush=True)
    return results


def run_lane(row: Row, lane: Lane, scale: Scale) -> Run:
    options = row.options if row.once else (*row.options, "--time_based")
    fio.settle(drop_caches=row.drop_caches)
    with lane.around():
        seconds = 0 if "--end_fsync=1" in row.options else row.seconds or scale.seconds
        return fio.run(lane.file(), options, row.size_bytes or scale.size_bytes, seconds, row.log.get(lane.label))


def lane_of(subject: Subject, label: str = "") -> Lane:
    return Lane(label or subject.name, lambda: subject.file)


def random_io(kind: str, depth: int) -> tuple[str, ...]:
    return (*DIRECT, f"--rw=rand{kind}", "--bs=4k", f"--iodepth={depth}")


def sequential(kind: str) -> tuple[str, ...]:
    return (*DIRECT, f"--rw={kind}", "--bs=1m", "--iodepth=4")
