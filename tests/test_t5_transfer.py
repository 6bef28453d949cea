"""Sending and receiving snapshots between real mounts: whole, in steps, broken, gone on with."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import os
import stat
import struct
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blake3
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from snapfs import takeback, transfer
from snapfs.cli import images
from snapfs.cli.control import ask, claimed_stream
from snapfs.errors import BadCommandError, DamagedError, ExistsError, NotFoundError, SnapfsError, TooNewError
from snapfs.receive import Receiver
from snapfs.stream import BEGIN, DATA, END, END_VOLUME, MAGIC, VERSION, VOLUME, ZERO, Frame, StreamWriter, read_stream
from snapfs.transfer import ResumePoint, send

from .conftest import SNAPFS, Mounted, invoke, run, snapfs, wait_until
from .unprivileged import run_unprivileged

MIB = 1 << 20
GOLDEN = Path(__file__).parent / "golden"


def sent(mounted: Mounted, *words: object) -> bytes:
    done = subprocess.run([*SNAPFS, "send", str(mounted.path), *map(str, words)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def received(mounted: Mounted, stream: bytes, *words: object, expect: int = 0) -> str:
    command = [*SNAPFS, "receive", *map(str, words), str(mounted.path)]
    done = subprocess.run(command, input=stream, capture_output=True, check=False)
    assert done.returncode == expect, done.stderr
    assert b"Traceback" not in done.stderr
    return (done.stdout + done.stderr).decode()


def same(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir() if path.name[0] != ".")
    assert names == sorted(path.name for path in other.iterdir() if path.name[0] != ".")
    for name in names:
        first, second = (one / name).stat(), (other / name).stat()
        assert (one / name).read_bytes() == (other / name).read_bytes()
        for field in ("st_size", "st_mode", "st_uid", "st_gid", "st_mtime_ns"):
            assert getattr(first, field) == getattr(second, field), (name, field)


@pytest.mark.mount
def test_a_chain_of_snapshots_arrives_equal(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts("--processors", "3")
    disk = source.path / "disk"
    with open(disk, "wb") as file:
        file.truncate(300 * MIB)
        file.write(os.urandom(3 * MIB))
        file.seek(200 * MIB)
        file.write(b"text " * 100000)
    (source.path / "small").write_bytes(b"x" * 1001)
    os.chmod(source.path / "small", 0o640)
    os.chown(source.path / "small", 12, 34)
    source.snapshot("one")
    whole = sent(source, "one")
    assert len(whole) < 4 * MIB
    assert received(target, whole).strip() == "one"
    same(source.snapshots / "one", target.snapshots / "one")
    with open(disk, "r+b") as file:
        file.seek(MIB)
        file.write(b"changed" * 1000)
        file.truncate(250 * MIB)
    source.ask("discard disk 209715200 100000")
    os.rename(source.path / "small", source.path / "renamed")
    (source.path / "third").write_bytes(os.urandom(5000))
    source.snapshot("two")
    step = sent(source, "two", "--from", "one")
    assert len(step) < 100000
    received(target, step)
    same(source.snapshots / "two", target.snapshots / "two")
    same(source.snapshots / "one", target.snapshots / "one")
    same(target.snapshots / "two", target.path)
    # And on from there, through a rollback of the source, into a pool that is not mounted.
    snapfs("rollback", source.path, "one", "--volume", "disk")
    with open(disk, "r+b") as file:
        file.write(b"again")
    source.snapshot("three")
    target.unmount()
    command = [*SNAPFS, "receive", str(target.pool)]
    stream = sent(source, "three", "--from", "two")
    assert subprocess.run(command, input=stream, capture_output=True, check=False).returncode == 0
    target.mount()
    same(source.snapshots / "three", target.snapshots / "three")


@pytest.mark.mount
def test_bases_that_are_missing_or_differ_are_refused_with_words(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    volume = source.path / "v"
    volume.write_bytes(b"1" * 100000)
    source.snapshot("one")
    volume.write_bytes(b"2" * 100000)
    source.snapshot("two")
    step = sent(source, "two", "--from", "one")
    assert "base 'one' of the stream is not here" in received(target, step, expect=1)
    assert os.listdir(target.path) == [".snapshots", ".snapfs"]
    received(target, sent(source, "one"))
    assert "received already" in received(target, sent(source, "one"), expect=1)
    # One of that name, but another.
    target.snapshot("two")
    assert "there is a snapshot 'two' already" in received(target, step, expect=1)
    (target.path / "v").write_bytes(b"mine")
    assert "has changed since 'one'" in received(target, step, "--name", "second", expect=1)
    assert (target.path / "v").read_bytes() == b"mine"
    received(target, step, "--name", "second", "--force")
    assert (target.snapshots / "second" / "v").read_bytes() == b"2" * 100000
    undo = next(name for name in os.listdir(target.snapshots) if name.endswith("-before-rollback"))
    assert (target.snapshots / undo / "v").read_bytes() == b"mine"
    failed = subprocess.run([*SNAPFS, "send", str(source.path), "none"], capture_output=True, check=False)
    assert failed.returncode == 1 and b"there is no snapshot" in failed.stderr


@pytest.mark.mount
@pytest.mark.parametrize("cut", ["short", "flipped"])
def test_a_broken_stream_leaves_the_target_as_it_was(mounts: Callable[..., Mounted], cut: str) -> None:
    source, target = mounts(), mounts()
    volume = source.path / "v"
    volume.write_bytes(os.urandom(5 * MIB))
    source.snapshot("one")
    whole = sent(source, "one")
    volume.write_bytes(os.urandom(5 * MIB))
    source.snapshot("two")
    step = sent(source, "two", "--from", "one")

    def broken(stream: bytes) -> bytes:
        middle = len(stream) * 2 // 3
        if cut == "short":
            return stream[:middle]
        return stream[:middle] + bytes([stream[middle] ^ 1]) + stream[middle + 1 :]

    words = received(target, broken(whole), expect=4)
    assert "stream" in words
    assert sorted(os.listdir(target.path)) == [".snapfs", ".snapshots"]
    received(target, whole)
    received(target, broken(step), expect=4)
    assert os.listdir(target.snapshots) == ["one"]
    same(source.snapshots / "one", target.path)
    received(target, step)
    same(source.snapshots / "two", target.snapshots / "two")


@pytest.mark.mount
def test_a_stream_goes_on_where_it_stopped(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    (source.path / "a").write_bytes(os.urandom(2 * MIB))
    (source.path / "b").write_bytes(os.urandom(6 * MIB))
    source.snapshot("s")
    whole = sent(source, "s")
    words = received(target, whole[: len(whole) * 2 // 3], "--resumable", expect=4)
    token = words.split("--resume-token ")[1].split()[0].rstrip(".")
    assert os.listdir(target.snapshots) == []
    assert snapfs("receive", target.path, "--tokens").stdout.split() == [token]
    target.remount()
    rest = sent(source, "s", "--resume-token", token)
    assert len(rest) < len(whole) * 2 // 3
    received(target, rest, "--resumable")
    same(source.snapshots / "s", target.snapshots / "s")
    assert snapfs("receive", target.path, "--tokens").stdout == ""
    assert "resume token" in snapfs("send", source.path, "s", "--resume-token", "x", expect=2).stderr


@pytest.mark.mount
def test_a_stream_that_goes_on_looks_again_at_what_it_had_not_come_to(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    for name in ("a", "b"):
        (source.path / name).write_bytes(name.encode() * MIB)
    source.snapshot("one")
    received(target, sent(source, "one"))
    (source.path / "a").write_bytes(os.urandom(6 * MIB))
    with (source.path / "b").open("r+b") as file:
        file.write(b"changed")
    os.rename(source.path / "b", source.path / "c")
    source.snapshot("two")
    whole = sent(source, "two", "--from", "one")
    words = received(target, whole[: len(whole) // 2], "--resumable", expect=4)
    token = words.split("--resume-token ")[1].split()[0].rstrip(".")
    rest = sent(source, "two", "--from", "one", "--resume-token", token)
    with (target.path / "c").open("r+b") as file:
        file.seek(MIB // 2)
        file.write(b"somebody's")
    said = received(target, rest, "--resumable", expect=1)
    assert "volume 'c' has changed since 'one'" in said
    assert "two" not in os.listdir(target.snapshots)
    with (target.path / "c").open("r+b") as file:
        file.seek(MIB // 2)
        file.write(b"somebody's")
    received(target, whole, "--force")
    same(source.snapshots / "two", target.snapshots / "two")


@pytest.mark.mount
def test_what_somebody_else_writes_while_a_stream_comes_is_in_no_snapshot_of_it(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    (source.path / "v").write_bytes(b"v" * MIB)
    source.snapshot("one")
    received(target, sent(source, "one"))
    with (source.path / "v").open("r+b") as file:
        file.write(os.urandom(65536))
    source.snapshot("two")
    stream = sent(source, "two", "--from", "one")
    for options in ((), ("--resumable",)):
        receiver = subprocess.Popen(
            [*SNAPFS, "receive", target.path, *options], stdin=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert receiver.stdin is not None
        receiver.stdin.write(stream[: len(stream) // 2])
        receiver.stdin.flush()
        wait_until(lambda: bool(target.ask("receive-state list")["states"]), "it has begun")
        with (target.path / "v").open("r+b") as file:
            file.seek(MIB // 2)
            file.write(b"somebody's")
            file.flush()
            os.fsync(file.fileno())
        _, said = receiver.communicate(stream[len(stream) // 2 :], timeout=60)
        assert receiver.returncode == 1 and b"somebody wrote to volume 'v'" in said, said
        names = os.listdir(target.snapshots)
        assert "two" not in names
        # It is back as it was, and what was written is kept.
        same(source.snapshots / "one", target.path)
        (kept,) = [name for name in names if "before-rollback" in name]
        assert (target.snapshots / kept / "v").read_bytes()[MIB // 2 :][:10] == b"somebody's"
        snapfs("delete", target.path, kept)
    received(target, stream)
    same(source.snapshots / "two", target.snapshots / "two")


@contextlib.contextmanager
def half_received(mounted: Mounted, stream: bytes, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A receiver that has the first half of a stream, and waits for the rest; killed if it is there at the end."""
    command = [*SNAPFS, "receive", *options, str(mounted.path)]
    receiver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert receiver.stdin is not None
        receiver.stdin.write(stream[: len(stream) // 2])
        receiver.stdin.flush()
        # What it has written to is noted before.
        wait_until(lambda: any(one[4] for one in mounted.ask("receive-state list")["states"].values()), "it writes")
        yield receiver
    finally:
        receiver.kill()
        receiver.communicate()


def two_steps(source: Mounted, target: Mounted) -> bytes:
    """A second snapshot of a volume as a stream of which nothing can be compressed; the first is there already."""
    (source.path / "v").write_bytes(b"v" * (12 * MIB))
    (source.path / "v").chmod(0o644)
    source.snapshot("one")
    received(target, sent(source, "one"))
    (source.path / "v").chmod(0o600)
    with (source.path / "v").open("r+b") as file:
        file.write(os.urandom(8 * MIB))
    source.snapshot("two")
    return sent(source, "two", "--from", "one", "--level", "0")


@pytest.mark.mount
def test_a_stream_is_received_once_at_a_time(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    stream = two_steps(source, target)
    with half_received(target, stream) as receiver:
        words = received(target, stream, expect=1)
        assert "is being received already" in words
        receiver.communicate(stream[len(stream) // 2 :], timeout=60)
        assert receiver.returncode == 0
    same(source.snapshots / "two", target.snapshots / "two")
    # By one that was killed nothing is kept from the next, nor by one that has just ended.
    target.ask("delete two")
    target.ask("rollback one")
    with half_received(target, stream) as receiver:
        receiver.kill()
        receiver.wait()
        wait_until(lambda: "already" not in received_or_not(target, stream), "it is received")
    same(source.snapshots / "two", target.snapshots / "two")


def received_or_not(mounted: Mounted, stream: bytes) -> str:
    done = subprocess.run([*SNAPFS, "receive", str(mounted.path)], input=stream, capture_output=True, check=False)
    return done.stderr.decode()


@pytest.mark.mount
@pytest.mark.parametrize("offset", [10 * MIB, 4096], ids=["elsewhere", "over what came"])
def test_what_somebody_wrote_while_a_stream_came_that_broke_off_is_kept(
    mounts: Callable[..., Mounted], offset: int
) -> None:
    source, target = mounts(), mounts()
    stream = two_steps(source, target)
    with half_received(target, stream) as receiver:
        with (target.path / "v").open("r+b") as file:
            wait_until(lambda: os.pread(file.fileno(), 9, 4096) != b"v" * 9, "it has come so far")
            os.pwrite(file.fileno(), b"somebody's", offset)
            os.fsync(file.fileno())
        _, said = receiver.communicate(timeout=60)
        assert receiver.returncode == 4
    (undo,) = [one for one in os.listdir(target.snapshots) if one.endswith("-before-rollback")]
    assert f"in snapshot {undo!r}".encode() in said
    assert (target.snapshots / undo / "v").read_bytes()[offset:][:10] == b"somebody's"
    same(source.snapshots / "one", target.path)
    # Of one that broke off alone nothing is left.
    target.ask(f"delete {undo}")
    received(target, stream[: len(stream) // 2], expect=4)
    assert os.listdir(target.snapshots) == ["one"]


@pytest.mark.mount
def test_zeros_arrive_in_a_volume_that_was_rolled_back(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    (source.path / "v").write_bytes(b"v" * MIB)
    source.snapshot("one")
    received(target, sent(source, "one"))
    source.ask(f"discard v 4096 {MIB // 2}")
    source.snapshot("two")
    (target.path / "v").write_bytes(b"other")
    snapfs("rollback", target.path, "one")
    received(target, sent(source, "two", "--from", "one"))
    same(source.snapshots / "two", target.snapshots / "two")


@pytest.mark.mount
def test_receiving_where_nothing_can_be_written_is_refused_in_words(mounted: Mounted) -> None:
    (mounted.path / "v").write_bytes(b"v")
    mounted.snapshot("one")
    stream = sent(mounted, "one")
    mounted.unmount()
    snapfs("mount", mounted.pool, mounted.path, "-o", "ro")
    assert "is mounted read-only, and takes no commands" in received(mounted, stream, expect=1)


@pytest.mark.mount
def test_what_became_private_is_so_while_it_is_received(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    stream = two_steps(source, target)
    with half_received(target, stream, "--resumable") as receiver:
        assert stat.S_IMODE((target.path / "v").stat().st_mode) == 0o600
        _, said = receiver.communicate(timeout=60)
    assert stat.S_IMODE((target.path / "v").stat().st_mode) == 0o600
    token = said.decode().split("--resume-token ")[1].split()[0].rstrip(".")
    received(target, sent(source, "two", "--from", "one", "--resume-token", token), "--resumable")
    same(source.snapshots / "two", target.snapshots / "two")


@pytest.mark.mount
def test_a_stream_that_was_cut_off_in_its_first_bytes_goes_on(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    (source.path / "v").write_bytes(b"v" * MIB)
    source.snapshot("one")
    received(target, sent(source, "one"))
    # Of another size, which is set before any of it comes.
    (source.path / "v").write_bytes(os.urandom(6 * MIB))
    source.snapshot("two")
    stream = sent(source, "two", "--from", "one")
    words = received(target, stream[:20_000], "--resumable", expect=4)
    token = words.split("--resume-token ")[1].split()[0].rstrip(".")
    received(target, sent(source, "two", "--from", "one", "--resume-token", token), "--resumable")
    same(source.snapshots / "two", target.snapshots / "two")


@pytest.mark.mount
def test_a_stream_does_not_go_on_over_what_was_rolled_back(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    (source.path / "v").write_bytes(b"v" * 8 * MIB)
    source.snapshot("one")
    received(target, sent(source, "one"))
    (source.path / "v").write_bytes(os.urandom(8 * MIB))
    source.snapshot("two")
    stream = sent(source, "two", "--from", "one")
    words = received(target, stream[: len(stream) // 2], "--resumable", expect=4)
    token = words.split("--resume-token ")[1].split()[0].rstrip(".")
    rest = sent(source, "two", "--from", "one", "--resume-token", token)
    snapfs("rollback", target.path, "one")
    said = received(target, rest, "--resumable", expect=1)
    assert "volume 'v' has changed since the stream was cut off" in said
    received(target, stream, "--force")
    same(source.snapshots / "two", target.snapshots / "two")


@pytest.mark.mount
def test_a_stream_that_was_cut_off_is_given_up(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    for name in ("v", "w"):
        (source.path / name).write_bytes(name.encode() * MIB)
    source.snapshot("one")
    received(target, sent(source, "one"))
    os.rename(source.path / "w", source.path / "x")
    (source.path / "v").write_bytes(os.urandom(MIB))
    (source.path / "new").write_bytes(os.urandom(8 * MIB))
    source.snapshot("two")
    received(target, sent(source, "two", "--from", "one")[: 6 * MIB], "--resumable", expect=4)
    (token,) = snapfs("receive", target.path, "--tokens").stdout.split()
    assert "new" in os.listdir(target.path) and "x" in os.listdir(target.path)
    snapfs("receive", target.path, "--abandon", token)
    assert snapfs("receive", target.path, "--tokens").stdout == ""
    assert set(os.listdir(target.snapshots)) - {"one"} == set()
    same(source.snapshots / "one", target.path)
    assert "nothing of that stream" in snapfs("receive", target.path, "--abandon", token, expect=1).stderr
    # Of a pool that is not mounted as well, and then the stream comes whole.
    received(target, sent(source, "two", "--from", "one")[: 6 * MIB], "--resumable", expect=4)
    (token,) = snapfs("receive", target.path, "--tokens").stdout.split()
    target.unmount()
    snapfs("receive", target.pool, "--abandon", token)
    target.mount()
    received(target, sent(source, "two", "--from", "one"))
    same(source.snapshots / "two", target.snapshots / "two")


@pytest.mark.mount
def test_a_stream_names_nothing_that_its_base_does_not_hold(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    (source.path / "v").write_bytes(b"v")
    source.snapshot("one")
    received(target, sent(source, "one"))
    guid = target.ask("list")["snapshots"][0]["guid"]
    (target.path / "precious").write_bytes(b"precious")
    volume = {"name": "w", "size_bytes": 8, "mode": 0o644, "uid": 0, "gid": 0, "atime_ns": 0, "mtime_ns": 0}
    for base_name, gone in (("precious", []), (None, ["precious"])):
        forged = io.BytesIO()
        writer = StreamWriter(forged)
        head = {"version": 2, "snapshot": {"guid": "x", "name": "evil", "note": ""}, "resume": None, "gone": gone}
        head |= {"base": {"guid": guid, "name": "one"}, "volumes": [{**volume, "base_name": base_name}]}
        writer.fields(BEGIN, head)
        said = received(target, forged.getvalue(), expect=4)
        assert "its base holds no volume 'precious'" in said
        assert (target.path / "precious").read_bytes() == b"precious"


@pytest.mark.mount
def test_a_volume_that_is_made_while_a_stream_comes_is_left_alone(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    for name in "ab":
        (source.path / name).write_bytes(os.urandom(MIB))
    source.snapshot("s")
    whole = sent(source, "s")

    def make_mine(done: int, total: int) -> None:
        (target.path / "b").write_bytes(b"precious")

    receiver = Receiver(ask, claimed_stream, str(target.path), force=False, is_resumable=False)
    with pytest.raises(ExistsError, match="there is a volume 'b' already"):
        receiver.receive(io.BytesIO(whole), on_progress=make_mine)
    assert (target.path / "b").read_bytes() == b"precious"
    assert sorted(os.listdir(target.path)) == [".snapfs", ".snapshots", "b"]
    os.unlink(target.path / "b")
    received(target, whole)
    same(source.snapshots / "s", target.snapshots / "s")


@pytest.mark.mount
@pytest.mark.parametrize("rename_count", [0, 2, 3, 4])
def test_a_stream_whose_receiver_was_killed_while_names_moved_goes_on(
    mounts: Callable[..., Mounted], rename_count: int
) -> None:
    source, target = mounts(), mounts()
    for name in "abcd":
        (source.path / name).write_bytes(name.encode() * 9000)
    source.snapshot("one")
    received(target, sent(source, "one"))
    # Exchanged, and one in the place of another.
    for before, after in (("a", "x"), ("b", "a"), ("x", "b"), ("c", "d")):
        os.rename(source.path / before, source.path / after)
    for name in "abd":
        with open(source.path / name, "r+b") as file:
            file.write(b"new")
    source.snapshot("two")

    done: list[str] = []
    rename = takeback.Target.rename

    def killed(receiver: takeback.Target, before: str, after: str) -> None:
        if len(done) == rename_count:
            raise KeyboardInterrupt
        rename(receiver, before, after)
        done.append(after)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(takeback.Target, "rename", killed)
        receiver = Receiver(ask, claimed_stream, str(target.path), force=False, is_resumable=True)
        with pytest.raises(KeyboardInterrupt):
            receiver.receive(io.BytesIO(sent(source, "two", "--from", "one")))
    target.remount()
    token = snapfs("receive", target.path, "--tokens").stdout.strip()
    received(target, sent(source, "two", "--from", "one", "--resume-token", token), "--resumable")
    same(source.snapshots / "two", target.snapshots / "two")
    same(source.path, target.path)
    assert snapfs("receive", target.path, "--tokens").stdout == ""


def sent_while(mounted: Mounted, name: str, meanwhile: Callable[[], object]) -> tuple[str, dict[int, bytes]]:
    """A snapshot sent, with something done when a first part was: the name in the stream, and its volumes' data."""
    file = io.BytesIO()
    waiting = [meanwhile]

    def on_progress(done: int, total: int) -> None:
        if waiting:
            waiting.pop()()

    send(ask, str(mounted.path), name, file, on_progress=on_progress)
    frames = list(read_stream(io.BytesIO(file.getvalue())))
    found: dict[int, bytes] = {}
    for frame in frames:
        if frame.kind == VOLUME:
            found[frame.fields["place"]] = b""
        elif frame.kind == DATA:
            found[max(found)] += frame.data
    return frames[0].fields["snapshot"]["name"], found


@pytest.mark.mount
@pytest.mark.parametrize("name", ["daily", "@latest"])
def test_all_volumes_of_a_stream_are_of_one_snapshot(mounted: Mounted, name: str) -> None:
    for volume in "abc":
        (mounted.path / volume).write_bytes(b"1" * 5000)
    mounted.snapshot("daily")

    def rotate() -> None:
        for volume in "abc":
            (mounted.path / volume).write_bytes(b"2" * 5000)
        assert mounted.ask("delete daily")["ok"]
        assert mounted.ask("snapshot daily")["ok"]
        assert mounted.ask("reclaim need=1")["ok"] is False

    assert sent_while(mounted, name, rotate) == ("daily", dict.fromkeys(range(3), b"1" * 5000))
    # One that got another name is still the same.
    rename = functools.partial(mounted.ask, "rename daily other")
    assert sent_while(mounted, name, rename) == ("daily", dict.fromkeys(range(3), b"2" * 5000))


@pytest.mark.mount
def test_a_snapshot_that_goes_while_it_is_sent_is_told_of_in_words(
    mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    for volume in "abc":
        (mounted.path / volume).write_bytes(b"1" * 5000)
    mounted.snapshot("s")
    mounted.snapshot("t")
    monkeypatch.setattr(transfer, "_OPEN_AHEAD_COUNT", 2)
    with pytest.raises(NotFoundError, match="'s' was deleted or renamed meanwhile"):
        sent_while(mounted, "s", lambda: os.rmdir(mounted.snapshots / "s"))
    with pytest.raises(NotFoundError, match="'t' was deleted or renamed meanwhile"):
        sent_while(mounted, "t", functools.partial(mounted.ask, "delete t"))

    # Another one by the time its folder is opened.
    def ask_first(mount_point: str, *words: str, options: list[tuple[str, str]] | None = None) -> dict[str, Any]:
        answer = ask(mount_point, *words, options=options)
        os.rename(mounted.snapshots / "u", mounted.snapshots / "old")
        mounted.snapshot("u")
        return answer

    mounted.snapshot("u")
    with pytest.raises(NotFoundError, match="'u' was deleted or renamed meanwhile"):
        send(ask_first, str(mounted.path), "u", io.BytesIO())


@pytest.mark.mount
def test_discard_gives_room_back_and_reads_as_zeros(mounted: Mounted) -> None:
    volume = mounted.path / "v"
    contents = os.urandom(8 * MIB)
    volume.write_bytes(contents)
    with open(volume, "r+b") as file:
        os.fsync(file.fileno())
    before = volume.stat().st_blocks
    # Read, so that the kernel has the pages.
    assert volume.read_bytes() == contents
    answer = mounted.ask(f"discard v 5000 {6 * MIB}")
    assert answer["ok"] and answer["freed_bytes"] == 6 * MIB - 4096
    expected = contents[:5000] + bytes(6 * MIB) + contents[5000 + 6 * MIB :]
    assert volume.read_bytes() == expected
    assert volume.stat().st_blocks == before - (6 * MIB - 4096) // 512
    mounted.remount()
    assert volume.read_bytes() == expected
    assert not mounted.ask("discard v 1")["ok"]
    # Not of another that has the name by now.
    assert "another" in mounted.ask(f"discard v 0 4096 inode={volume.stat().st_ino + 1}")["error"]
    assert volume.read_bytes() == expected
    assert mounted.ask(f"discard v 0 0 inode={volume.stat().st_ino}")["ok"]
    assert mounted.ask(f"discard v 0 {1 << 40}")["ok"]
    assert volume.read_bytes() == bytes(8 * MIB)
    assert volume.stat().st_blocks == 0


# -- the format ------------------------------------------------------------------------------


def a_stream(level: int = 3) -> bytes:
    file = io.BytesIO()
    writer = StreamWriter(file, level)
    writer.fields(BEGIN, {"version": VERSION, "x": 1})
    writer.data(4096, b"data" * 1000)
    writer.zero(1 << 40, 12345)
    writer.fields(END, {})
    assert writer.stored_bytes == len(file.getvalue())
    return file.getvalue()


def test_nothing_may_follow_a_stream() -> None:
    frames = read_stream(io.BytesIO(a_stream() * 2))
    with pytest.raises(DamagedError, match="something behind the end"):
        list(frames)


@pytest.mark.parametrize("level", [0, 3])
def test_frames_survive(level: int) -> None:
    frames = list(read_stream(io.BytesIO(a_stream(level))))
    assert [frame.kind for frame in frames] == [BEGIN, DATA, ZERO, END]
    assert (frames[1].offset, frames[1].data) == (4096, b"data" * 1000)
    assert (frames[2].offset, frames[2].length) == (1 << 40, 12345)


def test_worked_bytes_of_the_format() -> None:
    # As docs/stream-format.md has them.
    assert a_stream(0)[:14] == b"snapfs-stream2"
    assert a_stream(0)[14:24] == bytes.fromhex("01 00 16000000 16000000")
    assert a_stream(0)[24:46] == b'{"version": 2, "x": 1}'


@pytest.mark.parametrize("level", [0, 3])
def test_a_stream_of_version_1_is_read(level: int) -> None:
    with open(GOLDEN / f"stream-1-level-{level}.bin", "rb") as file:
        frames = list(read_stream(file))
    assert frames == [
        Frame(BEGIN, {"version": 1, "x": 1}),
        Frame(DATA, {}, 4096, 4000, b"data" * 1000),
        Frame(ZERO, {}, 1 << 40, 12345),
        Frame(END, {}),
    ]


def a_frame(kind: int, compression: int, stored: bytes, length: int) -> bytes:
    """A stream of one frame, whose checksum is right and whose length need not be."""
    header = struct.pack("<BBII", kind, compression, len(stored), length)
    return MAGIC + header + stored + blake3.blake3(header + stored).digest(length=16)


@pytest.mark.parametrize(
    ("compression", "stored"),
    [
        (1, zstandard.ZstdCompressor().compress(bytes(50 << 20))),
        (1, b"\x28\xb5\x2f\xfd\xe0\x00\x00\x00\x00\x00\x01\x00\x00"),
        (0, b"longer than ten bytes"),
    ],
)
def test_a_frame_that_lies_about_its_length_is_not_expanded(compression: int, stored: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError, match="another length"):
            list(read_stream(io.BytesIO(a_frame(DATA, compression, stored, 10))))
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_deep_json_in_a_frame_or_a_token_is_refused_in_words() -> None:
    deep = b"[" * 200_000
    with pytest.raises(DamagedError, match="not JSON"):
        list(read_stream(io.BytesIO(a_frame(BEGIN, 0, deep, len(deep)))))
    for token in (deep, b'["g",1e400,0]', b'["g",-1,0]', b'["g",0,-5]'):
        with pytest.raises(BadCommandError):
            ResumePoint.from_token(base64.urlsafe_b64encode(token).decode())


@pytest.mark.parametrize("size_bytes", [30_000, 40_000, 1 << 20])
def test_only_what_gets_smaller_is_compressed(size_bytes: int) -> None:
    for data, is_smaller in ((os.urandom(size_bytes), False), (b"0123456789abcdef" * (size_bytes // 16), True)):
        file = io.BytesIO()
        StreamWriter(file, 3).data(0, data)
        assert (len(file.getvalue()) < size_bytes // 2) == is_smaller
        assert is_smaller or len(file.getvalue()) > size_bytes


@given(st.data())
def test_any_change_of_a_stream_is_noticed(data: st.DataObject) -> None:
    stream = bytearray(a_stream())
    place = data.draw(st.integers(0, len(stream) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "drop", "repeat"]))
    if how == "flip":
        stream[place] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del stream[place:]
    elif how == "drop":
        del stream[place]
    else:
        stream[place:place] = stream[place : place + 1]
        if bytes(stream) == a_stream():
            return
    try:
        found = list(read_stream(io.BytesIO(bytes(stream))))
    except (DamagedError, TooNewError):
        return
    # A byte repeated behind the end is nobody's.
    assert how == "repeat" and found == list(read_stream(io.BytesIO(a_stream())))


@given(st.binary(max_size=200))
def test_any_bytes_behind_the_magic_give_an_error_in_words(garbage: bytes) -> None:
    with pytest.raises(SnapfsError):
        list(read_stream(io.BytesIO(b"snapfs-stream2" + garbage)))


@pytest.mark.mount
@pytest.mark.parametrize("image_format", ["raw", "qcow2", "vmdk", "vdi"])
def test_images_go_out_and_come_in(mounted: Mounted, tmp_path: Path, image_format: str) -> None:
    volume = mounted.path / "disk"
    with open(volume, "wb") as file:
        file.truncate(64 * MIB)
        file.seek(10 * MIB)
        file.write(os.urandom(2 * MIB))
    kept = mounted.snapshot("s") / "disk"
    before = kept.read_bytes()
    with open(volume, "r+b") as file:
        file.write(b"later")
    image = tmp_path / "image"
    snapfs("export", kept, image, "--format", image_format)
    assert image.stat().st_blocks * 512 < 4 * MIB
    snapfs("export", kept, image, expect=1)
    snapfs("import", image, mounted.path / "back")
    assert (mounted.path / "back").read_bytes() == before
    snapfs("import", image, mounted.path / "back", expect=1)
    snapfs("import", tmp_path / "none", mounted.path / "other", expect=1)
    snapfs("export", mounted.path / "none", tmp_path / "other", expect=1)
    assert not (mounted.path / "other").exists() and not (tmp_path / "other").exists()


@pytest.mark.mount
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_an_export_is_of_the_snapshot_whose_extents_were_asked_for(
    mounted: Mounted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_format: str
) -> None:
    volume = mounted.path / "v"
    volume.write_bytes(b"1" * 65536)
    mounted.snapshot("one")

    def ask_first(mount_point: str, *words: str) -> dict[str, Any]:
        answer = ask(mount_point, *words)
        with open(volume, "r+b") as file:
            file.truncate(0)
            file.seek(MIB)
            file.write(b"2" * 65536)
        mounted.snapshot("two")
        return answer

    monkeypatch.setattr(images, "ask", ask_first)
    done = invoke("export", mounted.snapshots / "@latest" / "v", tmp_path / "image", "--format", image_format)
    assert done.exit_code == 0, done.output
    monkeypatch.undo()
    snapfs("import", tmp_path / "image", mounted.path / "back")
    assert (mounted.path / "back").read_bytes() == b"1" * 65536
    # And a file of a snapshot that is none of its volumes.
    for name in (".manifest.json", "none"):
        failed = snapfs("export", mounted.snapshots / "one" / name, tmp_path / "other", expect=1)
        assert "there is no volume" in failed.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.mount
def test_what_is_only_read_is_exported_and_what_is_dead_is_not_called_absent(
    mounts: Callable[..., Mounted], tmp_path: Path
) -> None:
    mounted = mounts()
    contents = os.urandom(100_000) + bytes(5 * MIB) + b"end"
    (mounted.path / "v").write_bytes(contents)
    mounted.snapshot("one")
    for options in ("ro", "rescue"):
        mounted.unmount()
        snapfs("mount", mounted.pool, mounted.path, "-o", options)
        for number, volume in enumerate((mounted.path / "v", mounted.snapshots / "one" / "v")):
            image = tmp_path / f"{options}-{number}"
            snapfs("export", volume, image)
            assert image.read_bytes() == contents
            assert image.stat().st_blocks * 512 < 3 * MIB
    mounted.kill()
    said = snapfs("export", mounted.path / "v", tmp_path / "image", expect=1).stderr
    assert "Transport endpoint is not connected" in said
    assert not (tmp_path / "image").exists()
    snapfs("umount", mounted.path)


@pytest.mark.mount
def test_names_that_were_exchanged_shifted_replaced_and_removed_arrive(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    for name in "abcdef":
        (source.path / name).write_bytes(name.encode() * 5001)
    source.snapshot("one")
    received(target, sent(source, "one"))
    path = source.path
    for before, after in (("a", "x"), ("b", "a"), ("x", "b"), ("d", "dd"), ("c", "d")):
        os.rename(path / before, path / after)
    (path / "new").write_bytes(b"new" * 3000)
    os.rename(path / "new", path / "e")
    os.unlink(path / "f")
    source.snapshot("two")
    step = sent(source, "two", "--from", "one")
    (target.path / "mine").write_bytes(b"mine")
    # Cut off, all names are what they were.
    received(target, step[:-100], expect=4)
    os.rename(target.path / "mine", target.path / "m")
    assert sorted(one.name for one in target.path.iterdir() if one.name[0] != ".") == [*"abcdef", "m"]
    for name in "abcdef":
        assert (target.path / name).read_bytes() == name.encode() * 5001
    received(target, step)
    same(source.snapshots / "two", target.snapshots / "two")
    os.unlink(target.path / "m")
    same(source.path, target.path)
    (path / "f").write_bytes(b"f again")
    source.snapshot("three")
    received(target, sent(source, "three", "--from", "two"))
    same(source.snapshots / "three", target.snapshots / "three")


@pytest.mark.mount
def test_a_broken_step_is_taken_back_although_the_volume_is_open(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    (source.path / "v").write_bytes(os.urandom(2 * MIB + 77))
    (source.path / "still").write_bytes(b"x" * 5001)
    source.snapshot("one")
    received(target, sent(source, "one"))
    (source.path / "v").write_bytes(os.urandom(2 * MIB + 99))
    source.snapshot("two")
    step = sent(source, "two", "--from", "one")
    with open(target.path / "v", "rb"):
        received(target, step[:-40], expect=4)
        same(source.snapshots / "one", target.path)
    assert os.listdir(target.snapshots) == ["one"]
    received(target, step)
    same(source.snapshots / "two", target.snapshots / "two")


@pytest.mark.mount
def test_a_receiver_that_is_told_to_stop_takes_back_what_came(mounts: Callable[..., Mounted]) -> None:
    source, target = mounts(), mounts()
    (source.path / "v").write_bytes(os.urandom(4 * MIB))
    source.snapshot("s")
    stream = sent(source, "s")
    command = [*SNAPFS, "receive", str(target.path)]
    receiver = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert receiver.stdin is not None
    receiver.stdin.write(stream[: 3 * MIB])
    receiver.stdin.flush()
    wait_until(lambda: (target.path / "v").exists(), "the volume is begun")
    receiver.terminate()
    receiver.communicate()
    assert receiver.returncode == 1
    assert sorted(os.listdir(target.path)) == [".snapfs", ".snapshots"]
    # One that was killed leaves what the next one clears away.
    receiver = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert receiver.stdin is not None
    receiver.stdin.write(stream[: 3 * MIB])
    receiver.stdin.flush()
    wait_until(lambda: (target.path / "v").exists(), "the volume is begun")
    receiver.kill()
    receiver.communicate()
    assert (target.path / "v").exists()
    received(target, stream)
    same(source.snapshots / "s", target.snapshots / "s")


def forged(head: dict[str, object], *frames: tuple[int, object]) -> bytes:
    file = io.BytesIO()
    writer = StreamWriter(file)
    writer.fields(BEGIN, {"version": VERSION, **head})
    for kind, fields in frames:
        if kind == DATA:
            writer.data(0, b"forged")
        else:
            assert isinstance(fields, dict)
            writer.fields(kind, fields)
    return file.getvalue()


@pytest.mark.mount
def test_forged_streams_reach_nothing_outside_and_give_words(mounted: Mounted, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    snapshot = {"guid": "g", "name": "s", "note": ""}
    volume = {"size_bytes": 6, "mode": 0o644, "uid": 0, "gid": 0, "atime_ns": 0, "mtime_ns": 0, "base_name": None}
    (mounted.path / "v").write_bytes(b"v")
    mounted.snapshot("base")
    guid = mounted.ask("list space=no")["snapshots"][0]["guid"]
    base = {"guid": guid, "name": "base", "note": ""}
    head: dict[str, object] = {"snapshot": snapshot, "base": None, "resume": None, "gone": []}
    body: tuple[tuple[int, object], ...] = ((END_VOLUME, {}), (END, {}))
    names = (str(outside), "../../outside", "..", ".", "", ".snapshots", ".snapfs/control", "a/b", "x\0y", "n" * 300)
    heads: list[dict[str, object]] = [{**head, "volumes": [{**volume, "name": name}]} for name in names]
    heads += [
        {**head, "base": base, "volumes": [{**volume, "name": name, "base_name": name}]} for name in names if name
    ]
    heads += [{**head, "base": base, "volumes": [], "gone": [name]} for name in names]
    heads += [
        {},
        {"snapshot": snapshot},
        {**head, "volumes": "zz"},
        {**head, "volumes": [{}]},
        {**head, "volumes": [{**volume, "name": 5}]},
        {**head, "volumes": [{**volume, "name": "w", "size_bytes": -1}]},
        {**head, "volumes": [{**volume, "name": "w"}, {**volume, "name": "w"}]},
        {**head, "volumes": [], "snapshot": {**snapshot, "name": "../x"}},
        {**head, "volumes": [], "gone": ["v"]},
        {**head, "volumes": [], "resume": ["x"]},
    ]
    received(mounted, forged(heads[0], (VOLUME, {"place": 0}), (DATA, None), *body), expect=4)
    for one in heads:
        for is_resumable in (False, True):
            stream = io.BytesIO(forged(one, (VOLUME, {"place": 0}), (DATA, None), *body))
            with pytest.raises(DamagedError):
                Receiver(ask, claimed_stream, str(mounted.path), force=False, is_resumable=is_resumable).receive(stream)
    good = {**head, "volumes": [{**volume, "name": "w"}]}
    frames: tuple[tuple[int, object], ...]
    for frames in (
        ((VOLUME, {"place": 7}),),
        ((VOLUME, {}),),
        ((VOLUME, {"place": "x"}),),
        ((VOLUME, {"place": 0}), (VOLUME, {"place": 0}), (END, {})),
        ((VOLUME, {"place": 0}), (END, {})),
        ((END, {}),),
        ((DATA, None),),
    ):
        with pytest.raises(DamagedError):
            stream = io.BytesIO(forged(good, *frames))
            Receiver(ask, claimed_stream, str(mounted.path), force=False, is_resumable=False).receive(stream)
    assert outside.read_bytes() == b"precious" and outside.stat().st_mode & 0o777 == 0o644
    assert sorted(os.listdir(mounted.path)) == [".snapfs", ".snapshots", "v"]
    assert os.listdir(mounted.snapshots) == ["base"]
    assert snapfs("receive", mounted.path, "--tokens").stdout == ""


@pytest.mark.mount
def test_words_that_look_like_options_are_words(mounted: Mounted) -> None:
    (mounted.path / "size=1").write_bytes(b"x")
    assert snapfs("snapshot", mounted.path, "note=q").stdout.strip() == "note=q"
    snapfs("hold", mounted.path, "note=q", "volume=x")
    snapfs("release", mounted.path, "note=q", "volume=x")
    snapfs("clone", mounted.path, "note=q/size=1", "mode=cow")
    snapfs("flatten", mounted.path, "mode=cow")
    snapfs("rename", mounted.path, "note=q", "--", "--json")
    snapfs("delete", mounted.path, "--", "--json")
    assert mounted.ask("snapshot guid=\xff")["ok"] is False
    assert mounted.ask("receive-state put g notjson")["ok"] is False


@pytest.mark.mount
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_what_is_private_stays_so_on_its_way_out_and_in(mounted: Mounted, tmp_path: Path, image_format: str) -> None:
    volume, image = mounted.path / "v", tmp_path / "image"
    volume.write_bytes(b"secret" * 1000)
    volume.chmod(0o600)
    snapfs("export", volume, image, "--format", image_format)
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    snapfs("import", image, mounted.path / "private")
    image.chmod(0o644)
    snapfs("import", image, mounted.path / "public")
    assert stat.S_IMODE((mounted.path / "private").stat().st_mode) == 0o600
    assert stat.S_IMODE((mounted.path / "public").stat().st_mode) == 0o644


@pytest.mark.mount
def test_a_guests_disk_that_looks_as_if_it_stood_on_a_file_of_the_host_is_not_believed(
    mounted: Mounted, tmp_path: Path
) -> None:
    secret, disk = tmp_path / "secret", tmp_path / "disk.raw"
    secret.write_bytes(b"root:*:" + bytes(505))
    # What a guest can write to the beginning of its raw disk.
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, disk)
    refused = snapfs("import", disk, mounted.path / "guest", expect=1)
    assert f"says that it stands on {secret}" in refused.stderr
    assert not (mounted.path / "guest").exists()
    snapfs("import", disk, mounted.path / "guest", "--format", "raw")
    assert (mounted.path / "guest").read_bytes() == disk.read_bytes()


@pytest.mark.mount
def test_a_mount_with_a_volume_called_as_a_pools_descriptor_is_a_mount(mounted: Mounted) -> None:
    (mounted.path / "pool.json").write_bytes(b"no pool")
    source = mounted.pool.parent / "stream"
    mounted.snapshot("s")
    source.write_bytes(sent(mounted, "s"))
    for kind in ("schedule", "hook", "changelog"):
        snapfs(kind, "list", mounted.path)
    snapfs("receive", mounted.path, "--tokens")
    with source.open("rb") as file:
        said = run(*SNAPFS, "receive", mounted.path, "--name", "@x", stdin=file, expect=1).stderr
    assert "@ is kept for moments" in said
    with source.open("rb") as file:
        said = run(*SNAPFS, "receive", mounted.path, stdin=file, expect=1).stderr
    assert "received already" in said


@pytest.mark.mount
def test_who_is_not_root_receives_volumes_that_nobody_may_write_to(tmp_path: Path) -> None:
    said = run_unprivileged(
        """
            for name in ("a", "b"):
                os.mkdir(name)
                snapfs("init", name + ".pool")
                snapfs("mount", name + ".pool", name)
            for snapshot, options in (("one", ()), ("two", ("--from", "one"))):
                with open("a/v", "wb") as file:
                    file.write(snapshot.encode() * 1000)
                os.chmod("a/v", 0o444)
                snapfs("snapshot", "a", snapshot)
                os.chmod("a/v", 0o644)
                snapfs("receive", "b", input=snapfs("send", "a", snapshot, *options))
                print(open("b/v").read() == snapshot * 1000, oct(os.stat("b/v").st_mode))
            for name in ("a", "b"):
                snapfs("umount", name)
        """,
        tmp_path,
    )
    assert said.splitlines() == ["True 0o100444"] * 2
