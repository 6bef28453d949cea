"""A daemon at work for long: its memory, files, threads and logs must not grow."""

from __future__ import annotations

import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .conftest import MEMORY, Mounted, clear_away, wait_until, wait_until_reclaimed

MIB = 1 << 20
LOG_BYTES_MAX = 2 * MIB + 65536
SNAPSHOTS_KEPT = 6
# Of a long soak one sees now and then how it is.
TOLD_ROUNDS = 1000
OBJECT = 4 * MIB
OBJECT_COUNT = 4


@dataclass(frozen=True, slots=True)
class Size:
    """What a daemon has."""

    resident_bytes: int
    open_files: int
    threads: int
    pool_files: int
    metadata_bytes: int
    log_bytes: int

    @classmethod
    def of(cls, mounted: Mounted) -> Size:
        """Once all that is done in the background is done."""
        wait_until(lambda: not mounted.status()["unsealed_snapshot_count"], "all snapshots are sealed")
        wait_until_reclaimed(mounted)
        pid = int(mounted.status()["pid"])
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = [path for path in mounted.pool.rglob("*") if path.is_file()]
        return cls(
            int(fields["VmRSS"].split()[0]) * 1024,
            len(os.listdir(f"/proc/{pid}/fd")),
            int(fields["Threads"]),
            len(files),
            sum(path.stat().st_size for path in files if ".sqlite" in path.name),
            sum(path.stat().st_size for path in files if path.name.startswith("daemon.log")),
        )

    def has_grown_from(self, before: Size) -> str:
        """What is more than it should be, in words; empty when nothing."""
        found = []
        # Caches fill up: 16 to 24 MiB come in the first hundred and twenty rounds, 7 in the next thousand.
        if self.resident_bytes > before.resident_bytes * 1.1 + 32 * MIB:
            found.append(f"memory from {before.resident_bytes} to {self.resident_bytes}")
        if self.open_files > before.open_files + 16:
            found.append(f"open files from {before.open_files} to {self.open_files}")
        if self.threads > max(before.threads, 24):
            found.append(f"threads from {before.threads} to {self.threads}")
        if self.pool_files > before.pool_files + 64:
            found.append(f"the pool's files from {before.pool_files} to {self.pool_files}")
        if self.metadata_bytes > before.metadata_bytes * 1.5 + 4 * MIB:
            found.append(f"metadata from {before.metadata_bytes} to {self.metadata_bytes}")
        if self.log_bytes > LOG_BYTES_MAX:
            found.append(f"logs of {self.log_bytes} bytes")
        return ", ".join(found)


class Work:
    """A bit of everything, that leaves as much behind as it found."""

    def __init__(self, mounted: Mounted, seed: int) -> None:
        self.mounted = mounted
        self.random = random.Random(seed)
        self.number = 0
        for name, mode in (("a", "redirect"), ("b", "cow")):
            mounted.ask(f"create {name} size=16M mode={mode}")

    def cycle(self) -> None:
        self.number += 1
        for name in ("a", "b"):
            with open(self.mounted.path / name, "r+b", buffering=0) as file:
                for _ in range(8):
                    os.pwrite(file.fileno(), os.urandom(5000), self._place())
                os.pread(file.fileno(), 100_000, self._place())
                os.fsync(file.fileno())
        self.mounted.snapshot(f"s{self.number}")
        if self.number > SNAPSHOTS_KEPT:
            os.rmdir(self.mounted.snapshots / f"s{self.number - SNAPSHOTS_KEPT}")
        (self._clone, self._roll_back, self._look, self._complain)[self.number % 4]()

    def _place(self) -> int:
        """In a few blocks of each object, so that all is soon written anew and no old change log stays."""
        return self.random.randrange(OBJECT_COUNT) * OBJECT + self.random.randrange(8) * 4096

    def _clone(self) -> None:
        for volume in ("a", "b"):
            self.mounted.ask(f"clone s{self.number}/{volume} clone")
            with open(self.mounted.path / "clone", "r+b") as file:
                file.write(b"x" * 9000)
            os.unlink(self.mounted.path / "clone")

    def _roll_back(self) -> None:
        for volume in ("a", "b"):
            undo = str(self.mounted.ask(f"rollback s{self.number} volume={volume} force=yes")["undo"])
            os.rmdir(self.mounted.snapshots / undo)

    def _look(self) -> None:
        self.mounted.status()
        self.mounted.ask("list space=yes")
        for snapshot in os.listdir(self.mounted.snapshots):
            for one in (self.mounted.snapshots / snapshot).iterdir():
                with open(one, "rb") as file:
                    file.read(4096)

    def _complain(self) -> None:
        """What is refused leaves nothing either."""
        for line in ("nonsense", "snapshot s1 s2", "rollback nothing", f"snapshot s{self.number}", "clone x/y z"):
            assert not self.mounted.ask(line)["ok"], line


def work_for_long(seed: int, cycle_count: int) -> int:
    """Many cycles on a mount of its own; fails when the daemon is bigger after all of them than after a quarter."""
    with tempfile.TemporaryDirectory(prefix="snapfs-growth-", dir=MEMORY) as folder:
        mounted = Mounted(Path(folder))
        try:
            work = Work(mounted, seed)
            for _ in range(cycle_count // 4):
                work.cycle()
            before = Size.of(mounted)
            for _ in range(cycle_count - cycle_count // 4):
                work.cycle()
                if work.number % TOLD_ROUNDS == 0:
                    print(f"round {work.number}: {Size.of(mounted)}", flush=True)
            after = Size.of(mounted)
            grown = after.has_grown_from(before)
            assert not grown, f"seed {seed}, {cycle_count} cycles: {grown}"
            mounted.unmount()
            mounted.check()
        finally:
            clear_away(mounted)
    print(f"seed {seed}: from {before} to {after}", flush=True)
    return cycle_count
