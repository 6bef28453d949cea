"""kill -9 of the daemon at random points under load on a real mount, and what is there when it is mounted again."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3

from snapfs.check import check_pool
from snapfs.descriptor import open_home
from snapfs.ownership import device_opener

from .conftest import MEMORY, Mounted, clear_away, run, snapfs, wait_for_end

BLOCK = 4096
# So far apart 40 blocks lie in five objects, and all processors have some.
APART = 110


class Counters:
    """A writer that syncs and a maker of snapshots, that know what was acknowledged to them."""

    def __init__(self, mounted: Mounted, rng: random.Random) -> None:
        self.mounted = mounted
        self.random = rng
        self.issued: dict[tuple[str, int], int] = {}
        self.synced: dict[tuple[str, int], int] = {}
        self.snapshots: dict[str, dict[str, str]] = {}
        self.number = 0
        self.snapshot_number = 0

    def write(self, stop: threading.Event) -> None:
        """Counters into blocks of two volumes, each block wholly; now and then a sync."""
        try:
            fds = {name: os.open(self.mounted.path / name, os.O_RDWR | os.O_CREAT) for name in ("a", "b")}
            unsynced: dict[str, dict[tuple[str, int], int]] = {"a": {}, "b": {}}
            while not stop.is_set():
                self.number += 1
                name = self.random.choice(("a", "b"))
                block = self.random.randrange(40) * APART
                self.issued[name, block] = self.number
                os.pwrite(fds[name], struct.pack("<Q", self.number) * (BLOCK // 8), block * BLOCK)
                unsynced[name][name, block] = self.number
                if self.random.random() < 0.3:
                    taken = dict(unsynced[name])
                    os.fsync(fds[name])
                    self.synced.update(taken)
                    unsynced[name].clear()
        except OSError:
            return

    def make_snapshots(self, stop: threading.Event) -> None:
        """Snapshots that returned, with what was in them then."""
        try:
            while not stop.is_set():
                self.snapshot_number += 1
                name = f"s{self.snapshot_number}"
                folder = self.mounted.snapshot(name)
                self.snapshots[name] = {
                    one.name: blake3(one.read_bytes()).hexdigest() for one in folder.iterdir() if one.name in "ab"
                }
                if len(self.snapshots) > 4:
                    oldest = next(iter(self.snapshots))
                    del self.snapshots[oldest]
                    os.rmdir(self.mounted.snapshots / oldest)
        except OSError:
            return

    def verify(self) -> None:
        for (name, block), issued in self.issued.items():
            with open(self.mounted.path / name, "rb") as file:
                file.seek(block * BLOCK)
                data = file.read(BLOCK)
            values = set(struct.unpack(f"<{len(data) // 8}Q", data)) or {0}
            assert len(values) == 1, (name, block, "is torn")
            found = values.pop()
            assert self.synced.get((name, block), 0) <= found <= issued, (name, block)
            self.synced[name, block] = self.issued[name, block] = found
        for name, sums in self.snapshots.items():
            for volume, expected in sums.items():
                held = (self.mounted.snapshots / name / volume).read_bytes()
                assert blake3(held).hexdigest() == expected, (name, volume)


class Rollbacks:
    """A volume that is written as a whole, kept, written again and rolled back: it is what it was before or after."""

    BLOCKS = tuple(range(0, 2400, 150))

    def __init__(self, mounted: Mounted, name: str, rng: random.Random) -> None:
        self.mounted = mounted
        self.name = name
        self.path = mounted.path / name
        self.random = rng
        self.generation = 0
        self.begun_count = self.kept_count = 0
        self.may_be: list[tuple[int, ...]] = [(0,) * len(self.BLOCKS)]
        self.is_mixed = False
        self.kept: dict[str, tuple[int, ...]] = {}

    def prepare(self) -> None:
        """Make something to roll back to."""
        self._write()
        self._keep()

    def work(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                self.random.choice((self._write, self._keep, self._roll_back, self._roll_back))()
        except OSError:
            return

    def _write(self) -> None:
        """A new number into some blocks; a kill in between leaves any of them as it was."""
        (now,) = self.may_be
        self.generation += 1
        chosen = [self.random.random() < 0.6 for _ in self.BLOCKS]
        wanted = tuple(self.generation if one else old for one, old in zip(chosen, now, strict=True))
        self.may_be, self.is_mixed = [now, wanted], True
        fd = os.open(self.path, os.O_WRONLY)
        try:
            for block, one in zip(self.BLOCKS, chosen, strict=True):
                if one:
                    os.pwrite(fd, struct.pack("<Q", self.generation) * (BLOCK // 8), block * BLOCK)
            os.fsync(fd)
        finally:
            os.close(fd)
        self.may_be, self.is_mixed = [wanted], False

    def _keep(self) -> None:
        self.kept_count += 1
        name = f"{self.name}-{self.kept_count}"
        self._ask(f"snapshot {name} volume={self.name}")
        (self.kept[name],) = self.may_be
        if len(self.kept) > 3:
            oldest = next(iter(self.kept))
            del self.kept[oldest]
            os.rmdir(self.mounted.snapshots / oldest)

    def _roll_back(self) -> None:
        (now,) = self.may_be
        name = self.random.choice(list(self.kept))
        self.begun_count += 1
        self.may_be = [now, self.kept[name]]
        # By force: the kernel tells of a closed file later, so the volume may count as open for a moment.
        undo = self._ask(f"rollback {name} volume={self.name} force=yes")["undo"]
        self.may_be = [self.kept[name]]
        os.rmdir(self.mounted.snapshots / str(undo))

    def _ask(self, line: str) -> dict[str, object]:
        answer = self.mounted.ask(line)
        if "error" in answer:
            raise AssertionError(answer)
        return answer

    def verify(self) -> None:
        found = self._read(self.path)
        if self.is_mixed:
            per_block = zip(found, *self.may_be, strict=True)
            assert all(one in options for one, *options in per_block), (self.name, found, self.may_be)
        else:
            assert found in self.may_be, (self.name, found, self.may_be)
        self.may_be, self.is_mixed = [found], False
        for name, expected in self.kept.items():
            assert self._read(self.mounted.snapshots / name / self.name) == expected, name

    def _read(self, path: Path) -> tuple[int, ...]:
        values = []
        with open(path, "rb") as file:
            for block in self.BLOCKS:
                file.seek(block * BLOCK)
                data = file.read(BLOCK)
                (value,) = set(struct.unpack(f"<{len(data) // 8}Q", data)) or {0}
                values.append(value)
        return tuple(values)


class Kills:
    """Rounds of load, kill, check, mount and look."""

    def __init__(self, mounted: Mounted, seed: int) -> None:
        self.mounted = mounted
        self.random = random.Random(seed)
        self.counters = Counters(mounted, self.random)
        self.rollbacks = [Rollbacks(mounted, name, random.Random(f"{seed} {name}")) for name in ("redirect", "cow")]
        for one in self.rollbacks:
            snapfs("create", one.path, "--size", "10M", "--mode", one.name)
            one.prepare()

    def rounds(self, count: int) -> int:
        """So many rounds; fails when something that was acknowledged is not there."""
        for _ in range(count):
            self._round()
        counters = self.counters
        assert counters.snapshot_number > count / 4 and counters.number > count, "hardly anything was done"
        assert all(one.begun_count for one in self.rollbacks), "nothing was ever rolled back"
        return count

    def _round(self) -> None:
        fd = os.pidfd_open(int(self.mounted.status()["pid"]))
        stop = threading.Event()
        failures: list[BaseException] = []

        def guarded(work: Callable[[threading.Event], None]) -> None:
            try:
                work(stop)
            except BaseException as error:  # noqa: BLE001 - raised again below
                failures.append(error)

        works = [self.counters.write, self.counters.make_snapshots, *(one.work for one in self.rollbacks)]
        threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        stop.wait(self.random.uniform(0.002, 0.12))
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        for thread in threads:
            thread.join()
        wait_for_end(fd)
        run("umount", "--lazy", self.mounted.path)
        if failures:
            raise failures[0]
        home = open_home(str(self.mounted.pool))
        report = check_pool(home, str(self.mounted.pool), device_opener(home))
        home.close()
        assert report.is_clean, json.dumps(report.to_json())
        self.mounted.mount()
        self.counters.verify()
        for one in self.rollbacks:
            one.verify()


def kill_at_random_points(seed: int, count: int) -> int:
    """Rounds on a pool of its own."""
    with tempfile.TemporaryDirectory(prefix="snapfs-kills-", dir=MEMORY) as folder:
        mounted = Mounted(Path(folder))
        try:
            done = Kills(mounted, seed).rounds(count)
            mounted.unmount()
            mounted.check()
        finally:
            clear_away(mounted)
    return done
