"""What receiving, exporting and importing leave where they are killed, and where others make files meanwhile.

The target is a folder of the local filesystem, which answers as a mount does. And what is deleted for want of room.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from snapfs import freeing, takeback
from snapfs.backends import MemoryDevice
from snapfs.errors import (
    BadCommandError,
    ChangedTargetError,
    DamagedError,
    ExistsError,
    InUseError,
    MissingToolError,
    NoSpaceError,
    NotFoundError,
    NotPermittedError,
    SnapfsError,
    UnreadableError,
    UnsupportedError,
)
from snapfs.images import export_image, image_format_of, import_image
from snapfs.making import VolumeWish
from snapfs.placement import Quota
from snapfs.pool import Pool
from snapfs.receive import Receiver, resume_tokens
from snapfs.receivestate import ReceiveState
from snapfs.snapshot import SnapshotVolume
from snapfs.stream import BEGIN, END, END_VOLUME, VERSION, VOLUME, StreamWriter
from snapfs.transfer import ResumePoint

from .harness import World, open_world
from .test_t3_space import account_of_rows

BLOCK = 4096
SIZE = 2 * BLOCK
GUID = "pool:7"


class Killed(BaseException):
    """kill -9: nothing is tidied up behind it, for receiving is resumable where it is used."""


class Target:
    """A folder that answers as a mount does; killed at a step, if one is given."""

    def __init__(self, folder: Path, base: dict[str, bytes] | None = None) -> None:
        self.folder = folder
        self.base = base
        self.states: dict[str, str] = {}
        self.before_step: Callable[[str], None] = lambda step: None
        folder.mkdir()
        kept = folder / ".snapshots" / "base"
        for name, contents in (base or {}).items():
            (folder / name).write_bytes(contents)
            kept.mkdir(parents=True, exist_ok=True)
            (kept / name).write_bytes(contents)

    def ask(self, mount_point: str, *words: str, options: list[tuple[str, str]] | None = None) -> dict[str, Any]:
        self.before_step(words[0])
        answer: dict[str, Any] = getattr(self, "_" + words[0].replace("-", "_"))(*words[1:], options=options or [])
        return answer

    def claim(self, mount_point: str, guid: str) -> contextlib.AbstractContextManager[None]:
        """Nobody else receives here."""
        return contextlib.nullcontext()

    def _list(self, options: object) -> dict[str, Any]:
        made = [{"guid": GUID, "name": one.name} for one in self.folder.glob(".snapshots/*") if one.name != "base"]
        return {"snapshots": made + [{"guid": "base", "name": "base"}] * (self.base is not None)}

    def _diff(self, base: str, options: object) -> dict[str, Any]:
        return {"volumes": []}

    def _extents(self, name: str, options: object) -> dict[str, Any]:
        """Nobody else writes here."""
        kept = sorted((self.folder / ".snapshots" / name).iterdir())
        return {"volumes": [{"name": one.name, "size_bytes": one.stat().st_size, "extents": []} for one in kept]}

    def _receive_state(self, action: str, *words: str, options: object) -> dict[str, Any]:
        if action == "put":
            self.states[words[0]] = words[1]
        elif action == "drop":
            self.states.pop(words[0], None)
        return {"states": {guid: json.loads(state) for guid, state in self.states.items()}}

    def _snapshot(self, name: str, options: list[tuple[str, str]]) -> dict[str, Any]:
        kept = self.folder / ".snapshots" / name
        kept.mkdir(parents=True)
        for key, value in options:
            if key == "volume":
                (kept / value).write_bytes((self.folder / value).read_bytes())
        return {"name": name}

    def _rollback(self, base: str, options: list[tuple[str, str]]) -> dict[str, Any]:
        assert self.base is not None
        for key, name in options:
            if key == "volume":
                (self.folder / name).write_bytes(self.base[name])
        return {"undo": "undo"}

    def _delete(self, name: str, options: object) -> dict[str, Any]:
        if name != "undo":
            (self.folder / ".snapshots" / name).rename(self.folder.with_name(f"{self.folder.name}-deleted"))
        return {}

    def receive(self, stream: bytes, *, is_resumable: bool = False, **options: Any) -> None:
        receiver = Receiver(self.ask, self.claim, str(self.folder), force=False, is_resumable=is_resumable)
        receiver.receive(io.BytesIO(stream), **options)

    def names(self) -> set[str]:
        return {one.name for one in self.folder.iterdir() if one.name != ".snapshots"}

    def kept(self) -> dict[str, bytes]:
        return {one.name: one.read_bytes() for one in self.folder.glob(".snapshots/s/*")}


@pytest.fixture(autouse=True)
def any_filesystem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every one can be read past its cache."""
    monkeypatch.setattr(os, "O_DIRECT", 0)


def a_volume(name: str, base_name: str | None = None) -> dict[str, object]:
    me = {"uid": os.getuid(), "gid": os.getgid(), "mode": 0o600, "atime_ns": 0, "mtime_ns": 0}
    return {"name": name, "base_name": base_name, "size_bytes": SIZE, **me}


def a_stream(
    *volumes: dict[str, object], base: str | None = None, gone: tuple[str, ...] = (), token: str | None = None
) -> bytes:
    """A stream that fills the first block of each volume with the letter of its place, from a token on."""
    point = None if token is None else ResumePoint.from_token(token)
    file = io.BytesIO()
    writer = StreamWriter(file)
    writer.fields(
        BEGIN,
        {
            "version": VERSION,
            "snapshot": {"guid": GUID, "name": "s", "note": ""},
            "base": None if base is None else {"guid": base, "name": base},
            "volumes": volumes,
            "gone": gone,
            "resume": None if point is None else [point.volume_place, point.offset],
        },
    )
    for place in range(0 if point is None else point.volume_place, len(volumes)):
        writer.fields(VOLUME, {"place": place})
        if point is None or (place, 0) >= (point.volume_place, point.offset):
            writer.data(0, bytes([ord("0") + place]) * BLOCK)
        writer.fields(END_VOLUME, {})
    writer.fields(END, {})
    return file.getvalue()


# -- volumes that somebody else makes ----------------------------------------------------------


@pytest.mark.parametrize("is_resumable", [False, True])
def test_a_volume_that_is_made_while_a_stream_comes_is_never_removed_nor_written_over(
    tmp_path: Path, is_resumable: bool
) -> None:
    target = Target(tmp_path / "mount")
    mine = target.folder / "b"

    def make_mine(done: int, total: int) -> None:
        mine.write_bytes(b"precious")

    stream = a_stream(a_volume("a"), a_volume("b"))
    with pytest.raises(ExistsError, match="there is a volume 'b' already"):
        target.receive(stream, is_resumable=is_resumable, on_progress=make_mine)
    assert mine.read_bytes() == b"precious"
    if not is_resumable:
        assert target.names() == {"b"} and not target.states
        return
    # Nor when it is tried again, with the token or without.
    (token,) = resume_tokens(target.ask, str(target.folder))
    rest = a_stream(a_volume("a"), a_volume("b"), token=token)
    with pytest.raises(ExistsError, match="there is a volume 'b' already"):
        target.receive(rest, is_resumable=True)
    with pytest.raises(ExistsError, match="there is a volume 'b' already"):
        target.receive(stream)
    assert mine.read_bytes() == b"precious" and target.names() == {"b"}
    mine.unlink()
    target.receive(stream)
    assert target.kept() == {"a": b"0" * BLOCK + bytes(BLOCK), "b": b"1" * BLOCK + bytes(BLOCK)}
    assert target.names() == {"a", "b"} and not target.states


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_volume_in_the_place_of_one_that_a_stream_made_is_left_alone(tmp_path: Path, goes_on: bool) -> None:
    target = Target(tmp_path / "mount")
    stream = a_stream(a_volume("a"), a_volume("b"))
    with pytest.raises(SnapfsError):
        target.receive(stream[:-40], is_resumable=True)
    (token,) = resume_tokens(target.ask, str(target.folder))
    # Held open: its inode is not given to the next file.
    with open(target.folder / "b", "rb"):
        os.unlink(target.folder / "b")
        (target.folder / "b").write_bytes(b"precious")
        with pytest.raises(SnapfsError, match="volume 'b'"):
            if goes_on:
                target.receive(a_stream(a_volume("a"), a_volume("b"), token=token), is_resumable=True)
            else:
                target.receive(stream)
    assert (target.folder / "b").read_bytes() == b"precious"


@pytest.mark.parametrize("is_written_by_then", [False, True])
@pytest.mark.parametrize("new_name", ["b", "c"])
def test_a_volume_that_takes_the_name_of_one_of_the_base_is_left_alone(
    tmp_path: Path, new_name: str, is_written_by_then: bool
) -> None:
    target = Target(tmp_path / "mount", {"a": b"a" * SIZE, "b": b"b" * SIZE})
    mine, theirs = target.folder / new_name, tmp_path / "theirs"

    def make_mine(done: int, total: int) -> None:
        if mine.exists() and not theirs.exists() and done >= BLOCK * (1 + is_written_by_then):
            mine.rename(theirs)
            mine.write_bytes(b"precious")

    stream = a_stream(a_volume("a", "a"), a_volume(new_name, "b"), base="base")
    with pytest.raises(ChangedTargetError, match=f"volume '{new_name}' is another than the stream began with"):
        target.receive(stream, on_progress=make_mine)
    assert mine.read_bytes() == b"precious"
    # What the stream wrote can be taken back once it is found again.
    mine.rename(tmp_path / "kept")
    theirs.rename(mine)
    target.receive(stream)
    assert target.kept() == {"a": b"0" * BLOCK + b"a" * BLOCK, new_name: b"1" * BLOCK + b"b" * BLOCK}


def test_a_new_name_that_is_taken_while_names_move_is_not_overwritten(tmp_path: Path) -> None:
    target = Target(tmp_path / "mount", {"a": b"a" * SIZE})

    stream = a_stream(a_volume("c", "a"), base="base")

    def make_mine(step: str) -> None:
        # Nothing has it noted before it is looked whether names are free.
        if target.states:
            (target.folder / "c").write_bytes(b"precious")

    target.before_step = make_mine
    with pytest.raises(ExistsError, match="there is a volume 'c' already"):
        target.receive(stream)
    assert (target.folder / "c").read_bytes() == b"precious"
    assert (target.folder / "a").read_bytes() == b"a" * SIZE
    assert target.names() == {"a", "c"} and not target.states


@pytest.mark.parametrize("is_whole_first", [False, True])
def test_a_stream_is_gone_on_with_from_the_same_base_alone(tmp_path: Path, is_whole_first: bool) -> None:
    target = Target(tmp_path / "mount", {"a": b"a" * SIZE})
    whole, step = (a_volume("b"), a_volume("c")), (a_volume("b", "a"), a_volume("c"))
    first, then = (whole, step) if is_whole_first else (step, whole)
    with pytest.raises(DamagedError):
        target.receive(a_stream(*first, base=None if is_whole_first else "base")[:-40], is_resumable=True)
    (token,) = resume_tokens(target.ask, str(target.folder))
    with pytest.raises(BadCommandError, match="another base"):
        target.receive(a_stream(*then, base="base" if is_whole_first else None, token=token), is_resumable=True)
    assert not target.kept()
    target.receive(a_stream(*first, base=None if is_whole_first else "base", token=token), is_resumable=True)
    assert target.kept().keys() == {"b", "c"}


@pytest.mark.parametrize("field", ["guid", "note", "name"])
def test_a_forged_head_that_is_no_text_is_refused_in_words(tmp_path: Path, field: str) -> None:
    file = io.BytesIO()
    snapshot = {"guid": GUID, "name": "s", "note": "", field: "\ud800"}
    head: dict[str, object] = {"snapshot": snapshot, "base": None, "volumes": [], "gone": [], "resume": None}
    StreamWriter(file).fields(BEGIN, {"version": VERSION, **head})
    with pytest.raises(DamagedError, match="its head is not as it should be"):
        Target(tmp_path / "mount").receive(file.getvalue())


# -- images ------------------------------------------------------------------------------------


def copied(how: str, source: Path, target: Path, on_progress: Callable[[int, int], None]) -> None:
    way, image_format = how.split()
    if way == "import":
        import_image(str(source), str(target), image_format, on_progress)
    else:
        with open(source, "rb", buffering=0) as volume:
            export_image(volume, [(0, SIZE)], str(target), image_format, on_progress)


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_an_image_that_needs_qemu_img_is_not_taken_for_raw_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_format: str
) -> None:
    image, raw = tmp_path / "image", tmp_path / "raw"
    raw.write_bytes(b"disk" * 4096)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", image_format, raw, image], check=True)
    assert (format_of(image), format_of(raw)) == (image_format, "raw")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingToolError, match=f"looks like {image_format}"):
        format_of(image)
    assert format_of(raw) == "raw"


# What a guest can write to the beginning of its disk, so that it is taken for an image whose data lies in that file.
DESCRIPTOR = """# Disk DescriptorFile
version=1
CID=fffffffe
parentCID=ffffffff
createType="monolithicFlat"
RW 8 FLAT "{}" 0
ddb.virtualHWVersion = "4"
ddb.geometry.cylinders = "1"
ddb.geometry.heads = "16"
ddb.geometry.sectors = "63"
ddb.adapterType = "ide"
"""


def test_a_disk_that_looks_as_if_its_data_lay_in_a_file_of_the_host_is_not_believed(tmp_path: Path) -> None:
    secret, disk, target = tmp_path / "secret", tmp_path / "disk", tmp_path / "target"
    secret.write_bytes(b"secret" * 1000)
    disk.write_text(DESCRIPTOR.format(secret))
    os.truncate(disk, SIZE)
    with pytest.raises(UnsupportedError, match=f"says that it stands on {secret}"):
        import_image(str(disk), str(target), None, no_progress)
    assert not target.exists()


@pytest.mark.parametrize("name", ["file:b.img", "disk:2026", "json:x", "-b"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vmdk"])
def test_any_name_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, image_format: str) -> None:
    """Also what qemu-img would take for a protocol."""
    monkeypatch.chdir(tmp_path)
    contents = os.urandom(SIZE)
    (tmp_path / "source").write_bytes(contents)
    other = tmp_path / name.partition(":")[2] if ":" in name else tmp_path / "other"
    other.write_bytes(b"precious")
    with open("source", "rb", buffering=0) as source:
        export_image(source, [(0, SIZE)], name, image_format, no_progress)
    for number, told in enumerate((None, image_format)):
        import_image(name, f"back-{number}", told, no_progress)
        assert (tmp_path / f"back-{number}").read_bytes() == contents
    assert other.read_bytes() == b"precious"
    assert {one.name for one in tmp_path.iterdir()} == {"source", name, other.name, "back-0", "back-1"}


def test_what_is_exchanged_while_an_image_is_made_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By who may write to the folder: a link in the place of the new file, or of the folder itself."""
    (tmp_path / "source").write_bytes(os.urandom(SIZE))
    victim = tmp_path / "away" / "image"
    victim.parent.mkdir()
    victim.write_bytes(b"precious")
    run_qemu_img = subprocess.run

    def file_replaced() -> None:
        (tmp_path / "folder" / "image").unlink()
        (tmp_path / "folder" / "image").symlink_to(victim)

    def folder_replaced() -> None:
        (tmp_path / "folder").rename(tmp_path / "before")
        (tmp_path / "folder").symlink_to(victim.parent)

    for exchange in (file_replaced, folder_replaced):

        def run_late(*words: Any, exchange: Callable[[], None] = exchange, **options: Any) -> Any:
            exchange()
            return run_qemu_img(*words, **options)

        (tmp_path / "folder").mkdir(exist_ok=True)
        monkeypatch.setattr(subprocess, "run", run_late)
        with open(tmp_path / "source", "rb", buffering=0) as source, contextlib.suppress(UnreadableError):
            export_image(source, [(0, SIZE)], str(tmp_path / "folder" / "image"), "qcow2", no_progress)
        monkeypatch.setattr(subprocess, "run", run_qemu_img)
        assert victim.read_bytes() == b"precious" and list(victim.parent.iterdir()) == [victim]
        for left in (tmp_path / "folder" / "image", tmp_path / "folder"):
            with contextlib.suppress(OSError):
                left.unlink()


def test_an_image_is_made_where_a_folder_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a mount of snapfs; and by a path that goes through a link and back."""
    contents = os.urandom(SIZE)
    (tmp_path / "source").write_bytes(contents)
    (tmp_path / "one" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "one" / "inner")
    mkdir = os.mkdir

    def refuse(path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if dir_fd is not None and os.readlink(f"/proc/self/fd/{dir_fd}") == str(tmp_path):
            raise PermissionError(errno.EPERM, "no folders here", path)
        mkdir(path, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", refuse)
    for number, target in enumerate((tmp_path / "image", tmp_path / "link" / ".." / "image")):
        with open(tmp_path / "source", "rb", buffering=0) as source:
            export_image(source, [(0, SIZE)], str(target), "qcow2", no_progress)
        import_image(str(target), str(tmp_path / f"back-{number}"), "qcow2", no_progress)
        assert (tmp_path / f"back-{number}").read_bytes() == contents
        assert target.stat().st_mode & 0o777 == (tmp_path / "source").stat().st_mode & 0o777
    assert os.listdir(tmp_path / "one") == ["inner", "image"] or os.listdir(tmp_path / "one") == ["image", "inner"]


def test_an_image_that_is_exchanged_after_the_look_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, image, target = tmp_path / "secret", tmp_path / "image", tmp_path / "target"
    secret.write_bytes(b"secret" * 1000)
    (tmp_path / "raw").write_bytes(bytes(SIZE))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "raw", image], check=True)
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b"]
    subprocess.run([*create, str(secret), str(tmp_path / "other")], check=True)
    run_qemu_img = subprocess.run

    def run_and_exchange(*words: Any, **options: Any) -> Any:
        done = run_qemu_img(*words, **options)
        if (tmp_path / "other").exists():
            (tmp_path / "other").rename(image)
        return done

    monkeypatch.setattr(subprocess, "run", run_and_exchange)
    import_image(str(image), str(target), None, no_progress)
    assert target.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize("image_format", [None, "raw", "qcow2"])
def test_what_is_no_image_is_not_waited_for(tmp_path: Path, image_format: str | None) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero", str(tmp_path)):
        with pytest.raises(UnsupportedError, match="neither a file nor a block device"):
            import_image(path, str(tmp_path / "target"), image_format, no_progress)
    assert not (tmp_path / "target").exists()


def format_of(path: Path) -> str:
    with open(path, "rb", buffering=0) as image:
        return image_format_of(image, str(path))


def no_progress(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("how", ["import raw", "import qcow2", "export raw", "export qcow2"])
def test_a_file_that_is_made_before_an_image_is_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x" * SIZE)
    looked: list[object] = []
    lexists = os.path.lexists

    def seen_late(path: str) -> bool:
        looked.append(path)
        return len(looked) > 1 and lexists(path)

    # It is made between a look and the making.
    monkeypatch.setattr(os.path, "lexists", seen_late)
    target.write_bytes(b"precious")
    with pytest.raises(ExistsError):
        copied(how, source, target, no_progress)
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize("how", ["import raw", "export raw"])
def test_of_an_image_that_fails_what_was_begun_is_removed_and_nothing_else(tmp_path: Path, how: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x" * SIZE)

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    def replace_and_fail(done: int, total: int) -> None:
        (tmp_path / "mine").write_bytes(b"precious")
        (tmp_path / "mine").rename(target)
        fail(done, total)

    with pytest.raises(KeyboardInterrupt):
        copied(how, source, target, fail)
    assert not target.exists()
    with pytest.raises(KeyboardInterrupt):
        copied(how, source, target, replace_and_fail)
    assert target.read_bytes() == b"precious"


def test_a_signal_while_the_new_file_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are other threads, of a progress bar, say, which may be given the signal."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x" * SIZE)
    os_open = os.open

    def told_to_end(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        fd = os_open(path, flags, *arguments, **options)
        if flags & os.O_CREAT:
            os.kill(os.getpid(), signal.SIGTERM)
        return fd

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(os, "open", told_to_end)
    may_end = threading.Event()
    other = threading.Thread(target=may_end.wait)
    other.start()
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            import_image(str(source), str(target), "raw", no_progress)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
        may_end.set()
        other.join()
    assert not target.exists()


# -- kills -------------------------------------------------------------------------------------


class Steps:
    """Counts the steps that change the target, and is killed at one, before it or right behind it; none comes after."""

    def __init__(self, patch: pytest.MonkeyPatch, target: Target, killed_at: int) -> None:
        self._numbers = itertools.count()
        self._killed_at = killed_at
        self.is_killed = False
        target.before_step = self._before_ask
        for name in ("unlink", "ftruncate", "pwrite", "chmod", "utime", "open"):
            patch.setattr(os, name, self._counted(getattr(os, name)))
        patch.setattr(takeback.Target, "rename", self._counted(takeback.Target.rename))

    def _step(self) -> None:
        if next(self._numbers) >= self._killed_at:
            self.is_killed = True
            raise Killed

    def _before_ask(self, step: str) -> None:
        self._step()

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            self._step()
            answer = call(*args, **options)
            self._step()
            return answer

        return counted


def killed_everywhere(
    make: Callable[[], Target], stream: bytes, *, is_resumable: bool = True
) -> Iterator[tuple[Target, bool]]:
    """A target for each step at which receiving can be killed, and whether the snapshot was made by then."""
    for killed_at in itertools.count():
        target = make()
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch, target, killed_at)
            with contextlib.suppress(Killed, DamagedError):
                target.receive(stream, is_resumable=is_resumable)
            target.before_step = lambda step: None
        if not steps.is_killed:
            assert killed_at > 20
            return
        yield target, bool(target.kept())


@pytest.mark.parametrize("goes_on", [False, True])
def test_new_volumes_arrive_wherever_receiving_was_killed(tmp_path: Path, goes_on: bool) -> None:
    places = itertools.count()
    stream = a_stream(a_volume("a"), a_volume("b"))
    expected = {"a": b"0" * BLOCK + bytes(BLOCK), "b": b"1" * BLOCK + bytes(BLOCK)}
    for target, is_made in killed_everywhere(lambda: Target(tmp_path / f"mount-{next(places)}"), stream):
        again(target, is_made, goes_on, a_volume("a"), a_volume("b"))
        assert target.kept() == expected
        assert target.names() == {"a", "b"} and not target.states


# What became of the base's volumes by the snapshot: exchanged; gone and another in its place; shifted, with a new one.
CHANGES = {
    "exchanged": ((a_volume("a", "b"), a_volume("b", "a"), a_volume("c", "c")), ()),
    "replaced": ((a_volume("b", "a"), a_volume("c", "c")), ("b",)),
    "anew": ((a_volume("a"), a_volume("b", "b"), a_volume("c", "c")), ("a",)),
    "shifted": ((a_volume("b", "a"), a_volume("c", "b"), a_volume("d", "c"), a_volume("a")), ()),
}


@pytest.mark.parametrize("change", ["all new", *CHANGES])
def test_a_stream_that_was_cut_off_is_given_up(tmp_path: Path, change: str) -> None:
    """Wherever it was killed, all is as it was before, or as it was received if that was done already."""
    places = itertools.count()
    volumes, gone = CHANGES.get(change, ((a_volume("x"), a_volume("y")), ()))
    base = {name: name.encode() * SIZE for name in "abc"} if change in CHANGES else None
    stream = a_stream(*volumes, base=None if base is None else "base", gone=gone)
    token_count = 0
    for target, is_made in killed_everywhere(lambda: Target(tmp_path / f"mount-{next(places)}", base), stream):
        for token in resume_tokens(target.ask, str(target.folder)):
            token_count += 1
            with pytest.raises(ExistsError, match="received already") if is_made else contextlib.nullcontext():
                takeback.abandon(target.ask, str(target.folder), token)
            with pytest.raises(NotFoundError):
                takeback.abandon(target.ask, str(target.folder), token)
        assert not target.states
        if is_made:
            assert target.names() == {str(one["name"]) for one in volumes}
        else:
            assert {name: (target.folder / name).read_bytes() for name in target.names()} == (base or {})
    assert token_count > 10


def test_what_cannot_be_given_up_is_said(tmp_path: Path) -> None:
    target = Target(tmp_path / "mount", {"a": b"a" * SIZE})
    token = ResumePoint(GUID, 0, 0).to_token()
    # As an earlier version left it, in the middle of its renames.
    target.states[GUID] = json.dumps([0, 0, 1, {}, [], ".receiving-1-", "base", {}])
    with pytest.raises(UnsupportedError, match="an earlier version"):
        takeback.abandon(target.ask, str(target.folder), token)
    assert GUID in target.states
    for damaged in ([["a", "../b", "c"]], [["a", "b"]], [7], 7):
        target.states[GUID] = json.dumps([0, 0, 0, {}, [], ".receiving-1-", "base", {}, damaged])
        with pytest.raises(DamagedError):
            takeback.abandon(target.ask, str(target.folder), token)


def cut_off(target: Target, stream: bytes) -> str:
    """Receive a part of a stream; the token to go on with."""
    with pytest.raises(DamagedError):
        target.receive(stream[:-1], is_resumable=True)
    (token,) = resume_tokens(target.ask, str(target.folder))
    return token


BOTH = (a_volume("b", "a"), a_volume("a", "b"), a_volume("c", "c"))


def as_noted_before(state: str, version: str) -> str:
    """A state as an earlier version would have noted it."""
    fields = json.loads(state)
    if version == "0.8.6":
        return json.dumps(fields[:8])
    moves = [move[:3] for move in fields[8]] if version == "first 0.8.7" else fields[8]
    return json.dumps([*fields[:8], moves])


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("version", ["0.8.6", "first 0.8.7", "0.8.7"])
def test_a_stream_that_an_earlier_version_cut_off_goes_on(tmp_path: Path, version: str, goes_on: bool) -> None:
    """A volume was renamed, and another has its name, as with logs that are rotated."""
    target = Target(tmp_path / "mount", {"log": b"a" * SIZE})
    volumes = (a_volume("log.1", "log"), a_volume("log"))
    stream = a_stream(*volumes, base="base")
    with pytest.raises(DamagedError):
        target.receive(stream[:-20], is_resumable=True)
    assert target.names() == {"log", "log.1"}
    target.states = {guid: as_noted_before(state, version) for guid, state in target.states.items()}
    (token,) = resume_tokens(target.ask, str(target.folder))
    if goes_on:
        target.receive(a_stream(*volumes, base="base", token=token), is_resumable=True)
    else:
        target.receive(stream)
    assert target.kept() == {"log.1": b"0" * BLOCK + b"a" * BLOCK, "log": b"1" * BLOCK + bytes(BLOCK)}
    assert not target.states


def test_of_a_stream_whose_base_is_gone_what_it_wrote_stays_and_is_told(tmp_path: Path) -> None:
    target = Target(tmp_path / "mount", {name: name.encode() * SIZE for name in "abc"})
    token = cut_off(target, a_stream(*BOTH, base="base"))
    target.base = None
    assert sorted(takeback.abandon(target.ask, str(target.folder), token)) == ["a", "b", "c"]
    assert not target.states and target.names() == {"a", "b", "c"}
    # The names are back.
    assert (target.folder / "a").read_bytes()[BLOCK:] == b"a" * BLOCK


def test_what_users_wrote_since_a_stream_was_cut_off_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(tmp_path / "mount", {name: name.encode() * SIZE for name in "abc"})
    token = cut_off(target, a_stream(*BOTH, base="base"))
    (target.folder / "c").write_bytes(b"mine")
    deleted: list[str] = []
    monkeypatch.setattr(target, "_delete", lambda name, options: deleted.append(name))
    takeback.abandon(target.ask, str(target.folder), token)
    assert deleted == [] and (target.folder / "c").read_bytes() == b"c" * SIZE
    # A volume that the stream made has no snapshot of before.
    token = cut_off(target, a_stream(a_volume("n"), *BOTH, base="base"))
    (target.folder / "n").write_bytes(b"mine")
    with pytest.raises(ChangedTargetError, match="'n', which the stream made"):
        takeback.abandon(target.ask, str(target.folder), token)
    with pytest.raises(ChangedTargetError, match="'n', which the stream made"):
        target.receive(a_stream(a_volume("n"), *BOTH, base="base"))
    assert (target.folder / "n").read_bytes() == b"mine"
    (target.folder / "n").rename(target.folder / "kept")
    takeback.abandon(target.ask, str(target.folder), token)
    assert target.names() == {"a", "b", "c", "kept"}


def test_what_came_in_parts_and_was_not_read_back_right_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the part before only its times are known: somebody may have written to that meanwhile."""
    target = Target(tmp_path / "mount", {name: name.encode() * SIZE for name in "ab"})
    volumes = (a_volume("a", "a"), a_volume("b", "b"))
    with pytest.raises(DamagedError):
        target.receive(a_stream(*volumes, base="base")[:-20], is_resumable=True)
    (token,) = resume_tokens(target.ask, str(target.folder))
    deleted: list[str] = []
    ask = target.ask

    def ask_and_note(mount_point: str, *words: str, options: list[tuple[str, str]] | None = None) -> dict[str, Any]:
        if words[0] == "delete":
            deleted.append(words[1])
        return ask(mount_point, *words, options=options)

    def fail(receiver: Receiver, snapshot: str, *others: object) -> None:
        if snapshot == "s":
            raise DamagedError("not what was sent")

    monkeypatch.setattr(target, "ask", ask_and_note)
    monkeypatch.setattr(Receiver, "_check_nothing_else", fail)
    with pytest.raises(DamagedError, match="not what was sent") as caught:
        target.receive(a_stream(*volumes, base="base", token=token), is_resumable=True)
    assert deleted == ["s"] and "in snapshot 'undo'" in caught.value.fix


def test_a_volume_of_a_users_own_is_not_taken_for_one_that_a_stream_renamed(tmp_path: Path) -> None:
    target = Target(tmp_path / "mount", {"a": b"a" * SIZE})
    token = cut_off(target, a_stream(a_volume("b", "a"), base="base"))
    (target.folder / "b").rename(target.folder / "mine")
    (target.folder / "b").write_bytes(b"new")
    with pytest.raises(ExistsError, match="there is a volume 'b'"):
        takeback.abandon(target.ask, str(target.folder), token)
    assert target.names() == {"mine", "b"} and (target.folder / "b").read_bytes() == b"new"
    (target.folder / "b").unlink()
    (target.folder / "mine").rename(target.folder / "b")
    takeback.abandon(target.ask, str(target.folder), token)
    assert target.names() == {"a"}


def test_no_stream_is_given_up_while_one_is_received_and_no_two_at_a_time(tmp_path: Path) -> None:
    target = Target(tmp_path / "mount", {"a": b"a" * SIZE})
    folder = str(target.folder)
    token = cut_off(target, a_stream(a_volume("a", "a"), base="base"))
    with takeback.claimed(folder, alone=False):
        with pytest.raises(InUseError, match="is being received"):
            takeback.abandon(target.ask, folder, token)
        # Several may come at a time.
        with takeback.claimed(folder, alone=False):
            pass
    with takeback.claimed(folder, alone=True):
        with pytest.raises(InUseError, match="is being given up"):
            target.receive(a_stream(a_volume("a", "a"), base="base"))
        with pytest.raises(InUseError):
            takeback.abandon(target.ask, folder, token)
    takeback.abandon(target.ask, folder, token)


def test_who_is_not_the_mounts_owner_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(tmp_path / "mount", {"a": b"a" * SIZE})

    def refused(*arguments: object, **options: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(NotPermittedError, match="the daemon's own user"):
        target.receive(a_stream(a_volume("a", "a"), base="base"))


def test_what_was_not_read_back_right_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would be sent any more, and so nothing looked at."""
    target = Target(tmp_path / "mount", {"a": b"a" * SIZE})

    def wrong(*arguments: object) -> None:
        raise DamagedError("volume 'a' is not what was sent", "Check the devices")

    monkeypatch.setattr(Receiver, "_read_back", wrong)
    with pytest.raises(DamagedError, match="not what was sent") as refused:
        target.receive(a_stream(a_volume("a", "a"), base="base"), is_resumable=True)
    assert "resume-token" not in str(refused.value.fix)
    assert not target.states and (target.folder / "a").read_bytes() == b"a" * SIZE


@pytest.mark.parametrize("how", ["goes on", "again", "taken back"])
@pytest.mark.parametrize("change", CHANGES)
def test_names_that_moved_arrive_wherever_receiving_was_killed(tmp_path: Path, change: str, how: str) -> None:
    places = itertools.count()
    volumes, gone = CHANGES[change]
    base = {name: name.encode() * SIZE for name in "abc"}
    expected = {}
    for place, volume in enumerate(volumes):
        rest = bytes(BLOCK) if volume["base_name"] is None else base[str(volume["base_name"])][BLOCK:]
        expected[str(volume["name"])] = b"%d" % place * BLOCK + rest
    stream = a_stream(*volumes, base="base", gone=gone)
    if how == "taken back":
        stream = stream[:-1]
    for target, is_made in killed_everywhere(
        lambda: Target(tmp_path / f"mount-{next(places)}", base), stream, is_resumable=how != "taken back"
    ):
        again(target, is_made, how == "goes on", *volumes, base="base", gone=gone)
        assert target.kept() == expected
        assert target.names() == set(expected) and not target.states


def again(target: Target, is_made: bool, goes_on: bool, *volumes: dict[str, object], **options: Any) -> None:
    """Receive once more, from where it stopped if it is to go on and there is a token."""
    tokens = resume_tokens(target.ask, str(target.folder)) if goes_on else []
    stream = a_stream(*volumes, **options, token=tokens[0] if tokens else None)
    with pytest.raises(ExistsError, match="received already") if is_made else contextlib.nullcontext():
        target.receive(stream, is_resumable=goes_on)


# -- the oldest snapshots, deleted for want of room --------------------------------------------


@asynccontextmanager
async def nearly_full_soon() -> AsyncIterator[Pool]:
    """A pool with a volume whose change logs have room for 100 blocks, where the oldest are freed."""
    world = World(processor_count=2)
    world.devices["logs"] = MemoryDevice()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"logs", ["logs"], 100 * BLOCK, frees_oldest=True)
        await pool.maker.create(VolumeWish(b"v", 1 << 20, changelog_name=b"logs"))
        yield pool


async def write(pool: Pool, block_count: int, letter: bytes) -> None:
    async with pool.volumes.opened(b"v") as volume:
        await volume.write(0, letter * BLOCK * block_count)


async def until(is_done: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not is_done():
            # By way of a thread: others go on, and it is not waited for awake.
            await trio.to_thread.run_sync(lambda: None)


def reasons(pool: Pool) -> list[str]:
    """Why freeing stopped, as events told."""
    lines = [json.loads(line) for line in pool.events.contents.splitlines()]
    return [line["reason"] for line in lines if line["event"] == "freeing-stopped"]


class Looks:
    """Counts how often what is nearly full is looked at."""

    def __init__(self) -> None:
        self.count = 0

    async def some(self) -> None:
        """Several more."""
        wanted = self.count + 5
        await until(lambda: self.count >= wanted)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """It is looked at again and again."""
    monkeypatch.setattr(freeing, "_REST_S_MIN", 0.01)
    monkeypatch.setattr(freeing, "_REST_FACTOR", 1)
    found, look_at = Looks(), freeing.OldestFreer._look_at

    async def counted(freer: freeing.OldestFreer, changelog_id: int, quota: Quota) -> None:
        await look_at(freer, changelog_id, quota)
        found.count += 1

    monkeypatch.setattr(freeing.OldestFreer, "_look_at", counted)
    return found


async def test_no_snapshot_is_deleted_that_would_free_nothing_there(looks: Looks) -> None:
    async with nearly_full_soon() as pool:
        await write(pool, 120, b"A")
        for number in range(5):
            await pool.snapshots.create(b"s%d" % number)
        # All of it live: what the snapshots hold lies elsewhere.
        await write(pool, 96, b"B")
        await until(lambda: bool(reasons(pool)))
        await looks.some()
        assert len(pool.snapshots.by_name) == 5
        assert reasons(pool) == ["no snapshot that may be deleted holds anything there alone"]
        # Of one that would, it alone goes, and there is still no room to be had from the others.
        await pool.snapshots.create(b"s5")
        await write(pool, 2, b"C")
        await until(lambda: b"s5" not in pool.snapshots.by_name)
        await looks.some()
        assert len(pool.snapshots.by_name) == 5
        assert len(reasons(pool)) == 1
        assert pool.changelogs.get(b"logs").used_blocks == 96


async def test_snapshots_that_hold_the_same_blocks_go_together_and_those_before_stay(looks: Looks) -> None:
    async with nearly_full_soon() as pool:
        await write(pool, 120, b"A")
        await pool.snapshots.create(b"before")
        await write(pool, 60, b"B")
        for number in range(3):
            await pool.snapshots.create(b"s%d" % number)
        await pool.snapshots.create(b"held", hold_tags=["keep"])
        await write(pool, 36, b"C")
        await until(lambda: bool(reasons(pool)))
        assert len(pool.snapshots.by_name) == 5
        await pool.snapshots.release(b"held", "keep")
        await until(lambda: pool.changelogs.get(b"logs").percent < 95)
        assert set(pool.snapshots.by_name) == {b"before"}
        assert pool.changelogs.get(b"logs").used_blocks == 60


@asynccontextmanager
async def with_a_reader_of_the_oldest() -> AsyncIterator[tuple[Pool, SnapshotVolume]]:
    """Three snapshots that hold something there, of which the one that is to go first is open."""
    async with nearly_full_soon() as pool:
        for name, contents in ((b"before", b"A"), (b"oldest", b"B"), (b"next", b"C")):
            await write(pool, 30, contents)
            await pool.snapshots.create(name)
        oldest = pool.snapshots.get(b"oldest")
        members = await pool.snapshots.members(oldest)
        reader = await pool.snapshots.open_volume(oldest, members.get(b"v")[0])
        yield pool, reader


async def fill_up(pool: Pool) -> None:
    """Until it is told what keeps room from being made."""
    async with pool.volumes.opened(b"v") as volume:
        await volume.write(100 * BLOCK, b"D" * 36 * BLOCK)
    await until(lambda: bool(reasons(pool)))


@pytest.mark.parametrize("is_deleted", [False, True])
async def test_a_reader_of_the_oldest_is_waited_for(looks: Looks, is_deleted: bool) -> None:
    async with with_a_reader_of_the_oldest() as (pool, reader):
        if is_deleted:
            await pool.snapshots.delete(b"oldest")
        await fill_up(pool)
        await looks.some()
        assert (b"oldest" in pool.snapshots.by_name) != is_deleted
        assert b"next" in pool.snapshots.by_name
        assert reasons(pool) == ["snapshot 'oldest', the oldest to be deleted, is open"]
        assert bytes(await reader.read(0, BLOCK)) == b"B" * BLOCK
        pool.snapshots.close_volume(reader)
        await until(lambda: pool.changelogs.get(b"logs").percent < 95)
        assert set(pool.snapshots.by_name) == {b"before", b"next"}


async def test_a_reader_of_what_may_not_go_is_not_waited_for(looks: Looks) -> None:
    async with with_a_reader_of_the_oldest() as (pool, reader):
        await fill_up(pool)
        await pool.snapshots.hold(b"oldest", "mine")
        await until(lambda: len(reasons(pool)) == 2)
        assert reasons(pool)[1] == "no snapshot that may be deleted holds anything there alone"
        pool.snapshots.close_volume(reader)


instant_rows = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(1, 9)), max_size=14)


@given(instant_rows, st.integers(0, 60), st.sets(st.integers(0, 7)))
def test_the_first_that_are_needed_are_no_more_and_no_fewer(
    held: list[tuple[int, int, int]], needed: int, tagged: set[int]
) -> None:
    account = account_of_rows(held, 8)
    allowed = [10 * (place + 1) for place in range(8) if place not in tagged]
    found = account.first_needed(allowed, needed)
    enough = min(needed, account.freed_blocks(allowed))
    assert account.freed_blocks(found) >= enough
    assert not found or account.freed_blocks(found[:-1]) < enough
    useful = [one for one in allowed if account.freed_blocks(allowed) > account.freed_blocks({*allowed} - {one})]
    assert found == useful[: len(found)]


def test_a_state_of_an_earlier_version_survives_being_kept_again() -> None:
    state = ReceiveState.from_fields([1, 4096, 0, ["a"], ["b"]])
    assert state.base_guid is None
    assert ReceiveState.from_fields(json.loads(state.to_json())) == state


async def test_what_writers_take_meanwhile_is_not_taken_for_nothing_freed(
    looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer took as much as each deletion gave back: freeing stopped, and the writer had no space."""
    async with nearly_full_soon() as pool:
        quota = pool.changelogs.get(b"logs")
        await write(pool, 120, b"-")
        for number in range(9):
            await pool.snapshots.create(b"s%d" % number)
            async with pool.volumes.opened(b"v") as volume:
                await volume.write(0, b"%d" % number * 10 * BLOCK)
        taken = 0
        delete = pool.freer._delete

        async def beside_a_writer(*args: Any) -> object:
            nonlocal taken
            failure = await delete(*args)
            if taken < 3:
                async with pool.volumes.opened(b"v") as volume:
                    await volume.write((20 + 10 * taken) * BLOCK, b"w" * 10 * BLOCK)
                taken += 1
            return failure

        with monkeypatch.context() as patch:
            patch.setattr(pool.freer, "_delete", beside_a_writer)
            async with pool.volumes.opened(b"v") as volume:
                await volume.write(10 * BLOCK, b"x" * 6 * BLOCK)
            await until(lambda: taken == 3 and quota.percent < 95)
        assert not reasons(pool)


async def test_a_rest_is_cut_short_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a minute had passed writers had no space, though there was much to free by then."""
    monkeypatch.setattr(freeing, "_REST_S_MIN", 0.01)
    monkeypatch.setattr(freeing, "_REST_S_MAX", 1e6)
    monkeypatch.setattr(freeing, "_REST_FACTOR", 1e9)
    async with nearly_full_soon() as pool:
        quota = pool.changelogs.get(b"logs")
        await write(pool, 120, b"-")
        await pool.snapshots.create(b"s", hold_tags=["keep"])
        await write(pool, 96, b"A")
        await until(lambda: bool(reasons(pool)))
        await pool.snapshots.create(b"t")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(0, b"B" * 4 * BLOCK)
            with pytest.raises(NoSpaceError):
                await volume.write(10 * BLOCK, b"B" * 10 * BLOCK)
        await until(lambda: quota.percent < 95 or b"t" not in pool.snapshots.by_name)
