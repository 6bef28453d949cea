"""Power loss under real databases.

The pool lies on an ext4 of its own, and power is lost by ``FS_IOC_SHUTDOWN`` without a flush of the journal: whatever
was not synced is gone, data and names (xfstests does the same with its ``godown``). From then on, until the daemon is
killed, every call on the pool's devices fails, which nobody may take for a success. SQLite and PostgreSQL work
meanwhile, on an ext4 in a volume and on the mount itself, and snapshots are made.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from .clients import Client, PostgresClient, SqliteClient
from .conftest import Mounted, loop_device, mounted_filesystem, run, wait_for_end, wait_until

MIB = 1 << 20
DISK_BYTES = 1536 * MIB
VOLUME_BYTES = 256 * MIB
FS_IOC_SHUTDOWN = 0x8004587D
SHUTDOWN_WITHOUT_LOG_FLUSH = 2


@contextlib.contextmanager
def _working(clients: dict[str, Client]) -> Iterator[None]:
    """The clients at work; what none of them expects fails the test."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(client: Client) -> None:
        try:
            client.work(stop)
        except BaseException as error:  # noqa: BLE001 - raised again below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(client,)) for client in clients.values()]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


class PowerLoss:
    """A pool on a disk that loses power, its clients, and what must be there again."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.disk = folder / "disk"
        self.inside = folder / "inside"
        self.image = folder / "image"
        self.snapshots: dict[str, dict[str, tuple[int, int]]] = {}
        self.clients: dict[str, Client] = {}
        self.mounted: Mounted
        with open(self.image, "wb") as file:
            file.truncate(DISK_BYTES)
        run("mkfs.ext4", "-q", "-m", "0", self.image)

    def prepare(self) -> None:
        """Make the pool, the filesystem in it, and the databases."""
        with mounted_filesystem(self.image, self.disk, "-o", "loop") as disk:
            self.mounted = Mounted(disk)
            try:
                with open(self.mounted.path / "volume", "wb") as file:
                    file.truncate(VOLUME_BYTES)
                run("mkfs.ext4", "-q", "-E", "nodiscard", self.mounted.path / "volume")
                with self._filesystem(self.mounted.path / "volume", self.inside) as inside:
                    for name in ("sqlite-wal", "postgres"):
                        (inside / name).mkdir()
                    self.clients = {
                        "sqlite-wal": SqliteClient(inside / "sqlite-wal", "wal"),
                        "postgres": PostgresClient(inside / "postgres"),
                        "sqlite-on-the-mount": SqliteClient(self.mounted.path, "delete"),
                    }
            finally:
                self.mounted.unmount()

    @contextlib.contextmanager
    def _filesystem(self, path: Path, folder: Path) -> Iterator[Path]:
        direct_io = "--direct-io=" + self.random.choice(("on", "off"))
        with loop_device(path, direct_io) as device, mounted_filesystem(device, folder) as mounted:
            yield mounted

    def lose_power(self, snapshot_count: int) -> None:
        """Let all work, make snapshots, and cut the power at some moment."""
        with mounted_filesystem(self.image, self.disk, "-o", "loop") as disk:
            self.mounted.mount()
            daemon = os.pidfd_open(int(self.mounted.status()["pid"]))
            with contextlib.ExitStack() as at_the_end:
                at_the_end.callback(run, "umount", "--lazy", self.mounted.path)
                at_the_end.callback(kill, daemon)
                at_the_end.enter_context(self._filesystem(self.mounted.path / "volume", self.inside))
                with _working(self.clients):
                    self._make_snapshots(snapshot_count)
                    self._wait(self.random.uniform(0.0, 0.4))
                    shut_down(disk)
                    wait_until(lambda: self.mounted.status()["health"] == "failed", "status tells of no failure")
                    self._wait(self.random.uniform(0.0, 0.2))
                    signal.pidfd_send_signal(daemon, signal.SIGKILL)

    def _wait(self, seconds: float) -> None:
        """Let the clients work for a while; nothing else tells when a power cut should be."""
        threading.Event().wait(seconds)

    def _make_snapshots(self, count: int) -> None:
        first = len(self.snapshots)
        begun = {name: client.acknowledged for name, client in self.clients.items()}
        wait_until(
            lambda: all(client.acknowledged > begun[name] for name, client in self.clients.items()),
            "not all clients are at work",
        )
        for number in range(first, first + count):
            self._wait(self.random.uniform(0.05, 0.3))
            before = {name: client.acknowledged for name, client in self.clients.items()}
            self.mounted.snapshot(str(number))
            asked = {name: client.asked for name, client in self.clients.items()}
            self.snapshots[str(number)] = {name: (before[name], asked[name]) for name in self.clients}

    def verify(self, look_into: int) -> None:
        """The pool, the databases as the cut left them, and those in the latest snapshots."""
        with mounted_filesystem(self.image, self.disk, "-o", "loop"):
            self.mounted.check()
            self.mounted.mount()
            try:
                asked = {name: (client.acknowledged, client.asked) for name, client in self.clients.items()}
                with self._filesystem(self.mounted.path / "volume", self.inside):
                    self._read(self.inside, self.mounted.path, asked)
                    for name, client in self.clients.items():
                        client.acknowledged = client.asked = self.found[name]
                for name in sorted(self.snapshots, key=int)[-look_into:]:
                    self._verify_snapshot(name)
            finally:
                self.mounted.unmount()
            self.mounted.check()

    def _verify_snapshot(self, name: str) -> None:
        held = self.mounted.snapshots / name
        with tempfile.TemporaryDirectory(dir=self.folder) as copies:
            os.chmod(copies, 0o755)
            run("cp", "--sparse=always", held / "volume", Path(copies) / "volume")
            for path in held.glob("data.db*"):
                shutil.copy(path, copies)
            with self._filesystem(Path(copies) / "volume", Path(copies) / "then") as then:
                self._read(then, Path(copies), self.snapshots[name])
            run("e2fsck", "-fn", Path(copies) / "volume")

    def _read(self, inside: Path, outside: Path, bounds: dict[str, tuple[int, int]]) -> None:
        self.found = {}
        for name, client in self.clients.items():
            found = client.read(outside if name == "sqlite-on-the-mount" else inside / name)
            acknowledged, asked = bounds[name]
            assert acknowledged <= found <= asked, (name, acknowledged, found, asked)
            self.found[name] = found


def shut_down(folder: Path) -> None:
    """Lose what was not synced to the filesystem of a folder; all calls on it fail from now on."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("=I", SHUTDOWN_WITHOUT_LOG_FLUSH))
    finally:
        os.close(fd)


def kill(pidfd: int) -> None:
    """End a process, if it has not ended yet, and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    wait_for_end(pidfd)


def lose_power_under_clients(seed: int, rounds: int, snapshots: int, look_into: int) -> int:
    """Rounds of work, power loss and recovery; how many databases were looked at."""
    folder = Path(tempfile.mkdtemp(prefix="snapfs-power-"))
    os.chmod(folder, 0o755)
    try:
        loss = PowerLoss(folder, seed)
        loss.prepare()
        for _ in range(rounds):
            loss.lose_power(snapshots)
            loss.verify(look_into)
        assert all(client.acknowledged for client in loss.clients.values()), "a client never did anything"
        return rounds * (1 + look_into) * len(loss.clients)
    finally:
        subprocess.run(["rm", "-r", "--one-file-system", str(folder)], check=False)
