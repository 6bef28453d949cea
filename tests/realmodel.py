"""A real mount against the model of dictionaries: any sequence of system calls and commands, kills among them.

Like :mod:`tests.model`, with everything in between: the kernel's page cache in write-back mode, O_DIRECT beside it,
FUSE, the command file, and a daemon that is killed and mounted again.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from .conftest import MEMORY, Mounted, clear_away, run
from .contents import Contents
from .model import NAMES, SNAPSHOT_NAMES, Model, ModelVolume, Operation

BLOCK = 4096
OBJECT = 4 << 20
SPAN = OBJECT + 80_000

names = st.sampled_from([name.decode() for name in NAMES])
snapshot_names = st.sampled_from([name.decode() for name in SNAPSHOT_NAMES])
offsets = st.one_of(st.integers(0, SPAN - 71_000), st.sampled_from([0, BLOCK, OBJECT - 1, OBJECT, OBJECT - BLOCK, 100]))
lengths = st.one_of(st.integers(1, 9000), st.sampled_from([1, 512, BLOCK, 2 * BLOCK, 70_000]))
fills = st.integers(1, 255)
operations = st.one_of(
    st.tuples(st.just("write"), names, offsets, lengths, fills),
    st.tuples(st.just("write"), names, offsets, lengths, fills),
    st.tuples(st.just("map"), names, offsets, lengths, fills),
    st.tuples(st.just("direct"), names, st.sampled_from([0, 1, 2, 1023, 1024]), st.integers(1, 3), fills),
    st.tuples(st.just("sync"), names),
    st.tuples(st.just("truncate"), names, offsets),
    st.tuples(st.just("create"), names, st.sampled_from(["redirect", "cow"])),
    st.tuples(st.just("remove"), names),
    st.tuples(st.just("rename"), names, names),
    st.tuples(st.just("snapshot"), snapshot_names),
    st.tuples(st.just("snapshot"), snapshot_names),
    st.tuples(st.just("snapshot_of"), snapshot_names, names),
    st.tuples(st.just("delete"), snapshot_names),
    st.tuples(st.just("rename_snapshot"), snapshot_names, snapshot_names),
    st.tuples(st.just("clone"), snapshot_names, names, names),
    st.tuples(st.just("rollback"), snapshot_names, names),
    st.tuples(st.just("flatten"), names),
    st.tuples(st.just("discard"), names, offsets, lengths),
    st.tuples(st.just("start_again"), st.integers(0, 9)),
)


class RealRunner:
    """Does operations on a mount and on the model."""

    def __init__(self, mounted: Mounted) -> None:
        self.mounted = mounted
        self.model = Model()

    def step(self, operation: Operation) -> None:
        """Do one operation."""
        kind, *arguments = operation
        getattr(self, "do_" + kind)(*arguments)

    def path(self, name: str) -> Path:
        return self.mounted.path / name

    def ask(self, line: str) -> dict[str, object]:
        answer: dict[str, object] = self.mounted.ask(line)
        assert "error" not in answer, answer
        return answer

    def do_write(self, name: str, offset: int, length: int, fill: int) -> None:
        volume = self.model.volumes.get(name.encode())
        if volume is not None:
            data = bytes([fill]) * length
            with open(self.path(name), "r+b", buffering=0) as file:
                assert os.pwrite(file.fileno(), data, offset) == length
            volume.write(offset, data)

    def do_map(self, name: str, offset: int, length: int, fill: int) -> None:
        """Stores through a shared mapping, made durable by msync."""
        volume = self.model.volumes.get(name.encode())
        if volume is None or offset + length > len(volume.data):
            return
        data = bytes([fill]) * length
        with open(self.path(name), "r+b") as file, mmap.mmap(file.fileno(), len(volume.data)) as mapped:
            mapped[offset : offset + length] = data
            mapped.flush()
        volume.write(offset, data)

    def do_direct(self, name: str, block: int, count: int, fill: int) -> None:
        volume = self.model.volumes.get(name.encode())
        if volume is None:
            return
        with mmap.mmap(-1, count * BLOCK) as buffer:
            buffer.write(bytes([fill]) * (count * BLOCK))
            fd = os.open(self.path(name), os.O_RDWR | os.O_DIRECT)
            try:
                assert os.pwrite(fd, buffer, block * BLOCK) == count * BLOCK
            finally:
                os.close(fd)
        volume.write(block * BLOCK, bytes([fill]) * (count * BLOCK))

    def do_sync(self, name: str) -> None:
        volume = self.model.volumes.get(name.encode())
        if volume is not None:
            with open(self.path(name), "r+b") as file:
                os.fsync(file.fileno())
            volume.synced()

    def do_truncate(self, name: str, size: int) -> None:
        volume = self.model.volumes.get(name.encode())
        if volume is not None:
            os.truncate(self.path(name), size)
            volume.data.truncate(size)
            volume.note()

    def do_create(self, name: str, mode: str) -> None:
        if name.encode() not in self.model.volumes:
            self.ask(f"create {name} mode={mode}")
            self.model.volumes[name.encode()] = ModelVolume()
            if mode == "cow":
                self.model.in_place.add(self.model.volumes[name.encode()].identity)

    def do_remove(self, name: str) -> None:
        if self.model.volumes.pop(name.encode(), None) is not None:
            os.unlink(self.path(name))

    def do_rename(self, old: str, new: str) -> None:
        if old.encode() in self.model.volumes and old != new:
            self.model.volumes[new.encode()] = self.model.volumes.pop(old.encode())
            os.rename(self.path(old), self.path(new))

    def do_snapshot(self, name: str) -> None:
        if name.encode() not in self.model.snapshots:
            self.mounted.snapshot(name)
            self.keep(name, list(self.model.volumes))

    def do_snapshot_of(self, name: str, volume: str) -> None:
        if name.encode() not in self.model.snapshots and volume.encode() in self.model.volumes:
            self.ask(f"snapshot {name} volume={volume}")
            self.keep(name, [volume.encode()])

    def keep(self, name: str, held: list[bytes]) -> None:
        volumes = {one: self.model.volumes[one] for one in held}
        self.model.snapshots[name.encode()] = {
            one: (volume.identity, volume.data.copy()) for one, volume in volumes.items()
        }
        for volume in volumes.values():
            volume.synced()

    def do_delete(self, name: str) -> None:
        if self.model.snapshots.pop(name.encode(), None) is not None:
            os.rmdir(self.mounted.snapshots / name)

    def do_rename_snapshot(self, old: str, new: str) -> None:
        held = self.model.snapshots
        if old.encode() in held and new.encode() not in held:
            held[new.encode()] = held.pop(old.encode())
            os.rename(self.mounted.snapshots / old, self.mounted.snapshots / new)

    def do_clone(self, snapshot: str, source: str, new: str) -> None:
        found = self.model.snapshots.get(snapshot.encode(), {}).get(source.encode())
        if found is not None and new.encode() not in self.model.volumes:
            self.ask(f"clone {snapshot}/{source} {new}")
            volume = self.model.volumes[new.encode()] = ModelVolume(found[1].copy())
            volume.synced()

    def do_rollback(self, snapshot: str, name: str) -> None:
        found = self.model.snapshots.get(snapshot.encode(), {}).get(name.encode())
        volume = None
        for one in self.model.volumes.values():
            volume = one if found is not None and one.identity is found[0] else volume
        if found is None or volume is None:
            return
        if self.model.volumes.get(name.encode()) is not volume:
            # It was renamed since.
            answer = self.mounted.ask(f"rollback {snapshot} volume={name} force=yes")
            assert (answer["ok"], answer["errno"]) == (False, errno.ENOENT)
            return
        undo = str(self.ask(f"rollback {snapshot} volume={name} force=yes")["undo"])
        os.rmdir(self.mounted.snapshots / undo)
        volume.data = found[1].copy()
        volume.synced()

    def do_flatten(self, name: str) -> None:
        if name.encode() in self.model.volumes:
            self.ask(f"flatten {name}")

    def do_discard(self, name: str, offset: int, length: int) -> None:
        volume = self.model.volumes.get(name.encode())
        if volume is not None:
            self.ask(f"discard {name} {offset} {length}")
            volume.discard(offset, length)

    def do_start_again(self, number: int) -> None:
        """The daemon is killed, or stopped, or all is synced, which is quicker."""
        if number == 0:
            self.mounted.kill()
            run("umount", "--lazy", self.mounted.path)
            self.mounted.check()
            self.mounted.mount()
            for name, volume in self.model.volumes.items():
                volume.adopt(Contents(self.path(name.decode()).read_bytes()), exact_size=False)
        elif number == 1:
            self.mounted.remount()
        else:
            self.ask("sync")
        for volume in self.model.volumes.values():
            volume.synced()
        self.verify()

    def verify(self) -> None:
        """The mount shows what the model holds."""
        shown = {os.fsencode(name) for name in os.listdir(self.mounted.path)} - {b".snapfs", b".snapshots"}
        assert shown == set(self.model.volumes)
        for name, volume in self.model.volumes.items():
            self.compare(self.path(name.decode()), volume.data)
        assert {os.fsencode(name) for name in os.listdir(self.mounted.snapshots)} == set(self.model.snapshots)
        for name, held in self.model.snapshots.items():
            folder = self.mounted.snapshots / name.decode()
            assert {os.fsencode(one) for one in os.listdir(folder)} - {b".manifest.json"} == set(held)
            for one, (_, data) in held.items():
                self.compare(folder / one.decode(), data)

    def compare(self, path: Path, wanted: Contents) -> None:
        found = Contents(path.read_bytes())
        differing = [one for one in sorted(found.pages.keys() | wanted.pages) if found.page(one) != wanted.page(one)]
        assert found == wanted, f"{path}: {len(found)} bytes for {len(wanted)}, the pages {differing[:20]} differ"

    def start(self) -> None:
        """Take away whatever an example before this one left."""
        for name in {*os.listdir(self.mounted.path)} - {".snapfs", ".snapshots"}:
            os.unlink(self.path(name))
        for name in os.listdir(self.mounted.snapshots):
            os.rmdir(self.mounted.snapshots / name)


def explore_a_mount(seed: int, example_count: int) -> int:
    """Hold examples of a seed's against the model, on one mount."""
    with tempfile.TemporaryDirectory(prefix="snapfs-model-", dir=MEMORY) as folder:
        mounted = Mounted(Path(folder))

        @hypothesis_seed(seed)
        @settings(
            max_examples=example_count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(operations, min_size=4, max_size=30))
        def agree(ops: list[Operation]) -> None:
            runner = RealRunner(mounted)
            runner.start()
            for operation in [("create", "a", "redirect"), ("create", "b", "cow"), *ops]:
                runner.step(operation)
            runner.verify()

        try:
            agree()
            mounted.unmount()
            mounted.check()
        finally:
            clear_away(mounted)
    return example_count
