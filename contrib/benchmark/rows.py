"""The rows of reads and writes: what fio does to which subjects, and what is to be reached."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import fio
import subjects
from fio import DIRECT
from lanes import Lane, Row, Scale, lane_of, measure, random_io, sequential
from results import Result
from subjects import Keeper, Snapfs, Subject

QEMU_NOTE = (
    "qemu: its FUSE export mixes up requests that run at the same time (seen with 7.2), so above a queue "
    "depth of 1 it stands for speed only; nbdfuse shows qemu's NBD export, which is free of that"
)


FOUR = {
    "4K random read, O_DIRECT, QD1": random_io("read", 1),
    "4K random read, O_DIRECT, QD16": random_io("read", 16),
    "4K random overwrite, O_DIRECT, QD1": random_io("write", 1),
    "4K random overwrite, O_DIRECT, QD16": random_io("write", 16),
}


def _lanes(*found: Subject | None) -> tuple[Lane, ...]:
    """One for each subject that is to be had here."""
    return tuple(lane_of(one) for one in found if one is not None)


def _main_subjects(
    stack: ExitStack, folder: Path, size_bytes: int
) -> tuple[Snapfs, Subject, Keeper | None, Keeper | None]:
    """snapfs, a file on the native filesystem, qemu's FUSE export and nbdfuse, each with a file that is full."""
    own = stack.enter_context(subjects.snapfs(folder))
    native = stack.enter_context(subjects.native(folder))
    for one in (own, native):
        subjects.fill(one.file, size_bytes)
    qemu = stack.enter_context(subjects.qemu(folder, "qemu", size_bytes, by_nbd=False))
    nbd = stack.enter_context(subjects.qemu(folder, "nbdfuse", size_bytes, by_nbd=True))
    return own, native, qemu, nbd


# -- no snapshots ------------------------------------------------------------------------------


def plain(folder: Path, scale: Scale) -> list[Result]:
    """Beside the ceilings, the peers and the native file; nothing has a snapshot."""
    size = scale.size_bytes
    with ExitStack() as stack:
        own, native, qemu, nbd = _main_subjects(stack, folder, size)
        stock = stack.enter_context(subjects.null(folder, "stock ceiling", "stock", size))
        ours = stack.enter_context(subjects.null(folder, "our ceiling", "fast", size))
        lanes = _lanes(own, stock, ours, qemu, nbd, native)
        wants = ((0.90, 0.85, 1.0), (1.2, 0.85, 1.0), (0.80, 0.85, 1.0), (1.1, 0.85, 1.0))
        rows = [
            Row(name, "IOPS", options, lanes, _wanted(*want), note=QEMU_NOTE)
            for (name, options), want in zip(FOUR.items(), wants, strict=True)
        ]
        for kind, peer in (("read", 2.0), ("write", 1.0)):
            name = f"1M sequential {kind}, O_DIRECT, QD4"
            wanted = _wanted(0.85, 0.85, peer)
            rows.append(Row(name, "MB/s", sequential(kind), lanes, wanted, lambda run: run.mb_s, note=QEMU_NOTE))
        return measure(rows, scale)


def _wanted(stock: float, ours: float, qemu: float) -> dict[str, float]:
    return {"stock ceiling": stock, "our ceiling": ours, "qemu": qemu}


# -- many snapshots ----------------------------------------------------------------------------


def take_snapshots(subject: Snapfs, count: int, size_bytes: int, seed: int = 1) -> None:
    """So many, with a few random writes between each and the next."""
    chance = random.Random(seed)
    block = chance.randbytes(4096)
    with open(subject.file, "r+b", buffering=0) as file:
        for _ in range(count):
            for _ in range(8):
                file.seek(chance.randrange(size_bytes >> 12) << 12)
                file.write(block)
            subject.snapshot()


def behind(folder: Path, scale: Scale) -> tuple[list[Result], list[Result]]:
    """With snapshots behind; and of them the oldest, read.

    The other pool has the same writes behind it and no snapshots. Overwrites are of a part of the file that was
    written to since the last snapshot: first writes after one have a row of their own.
    """
    size = scale.size_bytes
    part = size // 8
    with ExitStack() as stack:
        many = stack.enter_context(subjects.snapfs(folder, f"with {scale.snapshot_count} snapshots"))
        none = stack.enter_context(subjects.snapfs(folder, "without"))
        for one in (many, none):
            subjects.fill(one.file, size)
        many.ask("snapshot oldest")
        chain_name = f"qemu, chain of {scale.chain}"
        chain = stack.enter_context(subjects.qemu(folder, chain_name, size, by_nbd=False, chain=scale.chain))
        take_snapshots(many, scale.snapshot_count, size)
        many.settle()
        lanes = _lanes(many, none, chain)
        for lane in lanes:
            subjects.fill(lane.file(), part)
        wanted = {"without": 0.9, chain_name: 5.0}
        rows = [
            Row(
                f"{name}, snapshots behind",
                "IOPS",
                options,
                lanes,
                wanted,
                size_bytes=part if "overwrite" in name else 0,
                note=QEMU_NOTE,
            )
            for name, options in FOUR.items()
        ]
        old = many.mount / ".snapshots" / "oldest" / "file"
        pair = (Lane("oldest", lambda: old), lane_of(many, "live"))
        oldest = [
            Row(
                "4K random read of the oldest snapshot, O_DIRECT, QD1",
                "IOPS",
                _read_only("randread", "4k", 1),
                pair,
                {"live": 0.85},
            ),
            Row(
                "4K random read of the oldest snapshot, O_DIRECT, QD16",
                "IOPS",
                _read_only("randread", "4k", 16),
                pair,
                {"live": 0.85},
            ),
            Row(
                "1M sequential read of the oldest snapshot, O_DIRECT, QD4",
                "MB/s",
                _read_only("read", "1m", 4),
                pair,
                {"live": 0.85},
                lambda run: run.mb_s,
            ),
        ]
        return measure(rows, scale), measure(oldest, scale)


def _read_only(kind: str, block: str, depth: int) -> tuple[str, ...]:
    return (*DIRECT, f"--rw={kind}", f"--bs={block}", f"--iodepth={depth}", "--readonly")


# -- after a snapshot --------------------------------------------------------------------------


def _first_lane(subject: Keeper, label: str = "") -> Lane:
    return Lane(label or subject.name, lambda: subject.file, lambda: _after_snapshot(subject))


@contextlib.contextmanager
def _after_snapshot(subject: Keeper) -> Iterator[None]:
    subject.snapshot()
    yield


def first_touch(folder: Path, scale: Scale) -> list[Result]:
    """Each block written once after a snapshot; beside writing again what was written, and beside reflinks."""
    size = scale.size_bytes
    with ExitStack() as stack:
        own, native, qemu, nbd = _main_subjects(stack, folder, size)
        links = [stack.enter_context(subjects.reflink(folder, kind, size)) for kind in ("btrfs", "xfs")]
        for link in links:
            if link is not None:
                subjects.fill(link.file, size)
        overwriting = lane_of(own, "overwriting")
        peers = [one for one in (qemu, nbd, *links) if one is not None]

        lanes = (_first_lane(own, "first touch"), overwriting, *(_first_lane(one) for one in peers))

        synced = (*random_io("write", 1), "--fdatasync=1")
        rows = [
            Row(
                "4K random write, each block the first time after a snapshot, O_DIRECT, QD16",
                "IOPS",
                random_io("write", 16),
                lanes,
                {"overwriting": 0.6, "qemu": 1.5, "btrfs": 1.0, "xfs": 1.0},
                once=True,
                note=QEMU_NOTE,
            ),
            Row(
                "4K random write with fdatasync each, first touch after a snapshot, QD1",
                "IOPS",
                synced,
                lanes,
                {"qemu": 1.5},
                once=True,
            ),
            Row(
                "4K random overwrite with fdatasync each, QD1",
                "IOPS",
                synced,
                (overwriting, *_lanes(native, qemu, nbd)),
                {"native": 0.7, "qemu": 1.5},
            ),
        ]
        return measure(rows, scale)


# -- through the page cache --------------------------------------------------------------------


def _fresh_lane(subject: Subject) -> Lane:
    return Lane(subject.name, lambda: subject.fresh, lambda: _new_file(subject.fresh))


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[None]:
    path.unlink(missing_ok=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def buffered(folder: Path, scale: Scale) -> list[Result]:
    """Through the kernel's page cache, and with nothing in it."""
    size = scale.size_bytes
    with ExitStack() as stack:
        own, native, qemu, nbd = _main_subjects(stack, folder, size)
        fresh = [_fresh_lane(own), _fresh_lane(native)]
        # The peers show one file of a fixed size: theirs is written over.
        again = _lanes(qemu, nbd)
        lanes = _lanes(own, native, qemu, nbd)
        write = ("--ioengine=psync", "--rw=write", "--bs=4k", "--end_fsync=1")
        rows = [
            Row(
                "4K sequential write of a new file, buffered, final fsync",
                "MB/s",
                write,
                (*fresh, *again),
                {"native": 0.8, "qemu": 5.0},
                lambda run: run.mb_s_with_sync,
                once=True,
            ),
            Row(
                "sequential read, buffered, cold",
                "MB/s",
                ("--ioengine=psync", "--rw=read", "--bs=128k"),
                lanes,
                {"native": 0.8, "qemu": 2.0},
                lambda run: run.mb_s,
                once=True,
                drop_caches=True,
            ),
            Row(
                "4K random read of what is in no cache, O_DIRECT, QD16",
                "IOPS",
                random_io("read", 16),
                lanes,
                {"native": 0.7},
                once=True,
                drop_caches=True,
                note="in no cache: all but native fill the page cache as they go; each block is read once at most",
            ),
        ]
        return measure(rows, scale)


# -- by the number of snapshots ---------------------------------------------------------------


def throughput_by_count(folder: Path, scale: Scale, counts: list[int]) -> dict[str, list[tuple[int, float]]]:
    """4K random reads at QD16 against the number of snapshots: of snapfs, and of the peer with a chain."""
    found: dict[str, list[tuple[int, float]]] = {"snapfs": [], "qemu": []}
    options = random_io("read", 16)
    with subjects.snapfs(folder, "by count") as own:
        subjects.fill(own.file, scale.size_bytes)
        made = 0
        for count in counts:
            take_snapshots(own, count - made, scale.size_bytes, seed=count)
            made = count
            fio.settle()
            run = fio.run(own.file, (*options, "--time_based"), scale.size_bytes, scale.seconds)
            found["snapfs"].append((count, run.iops))
    for count in [one for one in counts if one <= scale.chain]:
        with subjects.qemu(folder, f"chain {count}", scale.size_bytes, by_nbd=False, chain=count) as peer:
            if peer is None:
                break
            fio.settle()
            run = fio.run(peer.file, (*options, "--time_based"), scale.size_bytes, scale.seconds)
            found["qemu"].append((count, run.iops))
    return found
