"""What commands are answered with, and what the command line makes of it: long answers, odd names, words for errors."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress

from snapfs import jsontext, manifest, reserve, units
from snapfs.backends import FailNth, FaultyDevice, MemoryDevice
from snapfs.check import NOTE
from snapfs.cli import control as cli_control
from snapfs.cli.control import _translated
from snapfs.cli.output import description_column, print_any_name, print_table
from snapfs.descriptor import read_descriptor
from snapfs.errors import (
    AnswerTooLongError,
    BadCommandError,
    BadNameError,
    DamagedError,
    NotAllowedError,
    NotFoundError,
    ReservedNameError,
    UnreadableError,
)
from snapfs.formats import FORMAT_VERSION, POOL_FILE
from snapfs.fuse import control, names
from snapfs.fuse.command import Answer, Command, CommandContext
from snapfs.fuse.control import ControlSession
from snapfs.fuse.namespace import Caller, Namespace
from snapfs.hook import make_hook
from snapfs.images import export_image
from snapfs.pool import Pool, open_pool
from snapfs.schedule import Schedule, make_schedule
from snapfs.status import pool_status
from snapfs.transfer import send
from snapfs.units import MANIFEST_NAME

from .conftest import SNAPFS, main_here, run
from .harness import WHERE, World, in_memory, open_world, read_volume
from .test_t3_clones import BLOCK, OBJECT, put

# -- answers ------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=40,
)


@given(documents, st.integers(1, 8), st.integers(1, 4), st.integers(1, 9))
def test_json_in_pieces_is_the_same_json(document: object, small: int, together: int, joined: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsontext, "_SMALL", small)
        patch.setattr(jsontext, "_TOGETHER", together)
        patch.setattr(jsontext, "_JOINED", joined)
        text = json.dumps(document).encode()
        assert jsontext.encoded(document, len(text)) == text
        assert jsontext.encoded(document, len(text) - 1) is None
        assert jsontext.indented(document) == json.dumps(document, indent=1).encode()


def session_of(pool: Pool) -> ControlSession:
    async def resize(name: bytes, size_bytes: int) -> None:
        await pool.volumes.truncate(pool.volumes.get(name), size_bytes)

    return ControlSession(CommandContext(pool, resize))


def answers_in(session: ControlSession) -> list[Answer]:
    """All that can be read, seven bytes at a time."""
    text = bytearray()
    while part := session.read(7):
        assert len(part) <= 7
        text += part
    return [json.loads(line) for line in text.splitlines()]


async def test_the_newest_answer_is_given_however_long_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlSession, "ANSWER_BYTES_MAX", 2500)
    async with open_world(World()) as pool:
        session = session_of(pool)
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * 100 * BLOCK)
        await pool.snapshots.create(b"one")
        for number in range(0, 100, 2):
            await put(pool, b"v", number * BLOCK, b"2" * BLOCK)
        await session.write(b"diff one\n")
        (answer,) = answers_in(session)
        assert answer["command"] == "diff" and len(json.dumps(answer)) > 2500
        # Short ones are kept as long as there is room, the newer ones.
        for number in range(40):
            await session.write(b"snapshot s%d\n" % number)
        kept = [one["name"] for one in answers_in(session)]
        assert 1 < len(kept) < 40 and kept == [f"s{number}" for number in range(40 - len(kept), 40)]
        assert session.read(100) == b""


async def test_an_answer_that_nobody_could_take_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ControlSession, "ONE_ANSWER_BYTES_MAX", 20000)
    async with open_world(World()) as pool:
        session = session_of(pool)
        for number in range(100):
            await pool.volumes.create(b"%d" % number)
        # It was done, and so is not to be run again.
        line = b"snapshot one\nextents one\nsnapshot two\n"
        assert await session.write(line) == len(line)
        one, long, two = answers_in(session)
        assert (one["name"], two["name"]) == ("one", "two")
        assert long["ok"] is False and long["errno"] == AnswerTooLongError.errno
        assert "longer than 19.5 KiB" in str(long["error"]) and long["fix"] and long["line"] == "extents one"


async def test_moments_stand_for_names_where_nothing_is_deleted() -> None:
    async with open_world(World()) as pool:
        session = session_of(pool)
        for line in (b"snapshot one", b"hold @latest mine", b"list @latest", b"release @latest mine"):
            await session.write(line + b"\n")
        await session.write(b"rename @latest two\n")
        assert [one.get("name") for one in answers_in(session)] == ["one", "one", None, "one", "two"]
        assert set(pool.snapshots.by_name) == {b"two"}
        with pytest.raises(NotFoundError):
            await session.write(b"delete @latest\n")


async def test_a_schedule_that_cannot_work_is_refused_or_seen() -> None:
    async with open_world(World()) as pool:
        session = session_of(pool)
        with pytest.raises(NotFoundError, match="no volume 'v'"):
            await session.write(b"schedule add s every=1h volume=v\n")
        assert pool.scheduler.entries() == []
        await pool.volumes.create(b"v")
        await session.write(b"schedule add s every=1h volume=v\n")
        await pool.volumes.remove(b"v")
        assert (await pool_status(pool))["health"] == "ok"
        # The clock is far behind its last turn, so one is due.
        pool.scheduler._last_run_ns["s"] = 0
        await pool.scheduler._run_if_due("s")
        assert (await pool_status(pool))["health"] == "schedule-failed"
        await pool.volumes.create(b"v")
        await session.write(b"schedule run s\n")
        assert (await pool_status(pool))["health"] == "ok"


def test_a_daemon_without_an_answer_is_told_of_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_control, "control_path", lambda mount_point: os.devnull)
    with pytest.raises(cli_control.RefusedError, match="gave no answer"):
        cli_control.ask("anywhere", "diff", "a")


class Noted:
    """Calls, and of each whether it was made in the event loop."""

    def __init__(self) -> None:
        self.in_loop: list[bool] = []

    def of(self, call: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object) -> object:
            self.in_loop.append(threading.current_thread() is threading.main_thread())
            return call(*args)

        return run


async def test_a_long_answer_is_encoded_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in pieces, between which the loop goes on: the encoder in C lets no other thread run."""
    extents = [{"offset": number * 8192, "length": 4096, "kind": "data"} for number in range(40_000)]
    document: Answer = {"volumes": [{"name": "v", "extents": extents}]}
    noted = Noted()

    async def long(context: CommandContext, command: Command) -> Answer:
        return document

    monkeypatch.setattr(control, "COMMANDS", {"long": long})
    monkeypatch.setattr(control, "encoded", noted.of(jsontext.encoded))
    async with open_world(World()) as pool:
        session = session_of(pool)
        await session.write(b"long\n")
        assert noted.in_loop == [False]
        answer = json.loads(session.read(1 << 30))
        assert answer["ok"] and answer["volumes"][0]["extents"] == extents
    assert max(map(len, jsontext.pieces(document))) < 1 << 16


async def test_a_manifest_is_made_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted()
    count = 50
    async with open_world(World(processor_count=1)) as pool:
        volume = await pool.volumes.create(b"v")
        await pool.volumes.truncate(volume, count * OBJECT)
        for number in range(count):
            # Those in a row are not alike, or they would be told as one.
            await put(pool, b"v", number * OBJECT, b"x" * BLOCK * (1 + number % 2))
        snapshot = await pool.snapshots.create(b"s")
        monkeypatch.setattr(manifest, "_references", noted.of(manifest._references))
        monkeypatch.setattr(manifest, "indented", noted.of(jsontext.indented))
        text = await manifest.manifest_of(pool, snapshot)
        assert noted.in_loop == [False] * (count + 1)
        told = json.loads(text)
        assert text == json.dumps(told, indent=1).encode() + b"\n"
        (part,) = told["intermediate_snapshots"][0]["volumes"]
        assert [one["first_object"] for one in part["objects"]] == list(range(count))


# -- names --------------------------------------------------------------------------------------


async def test_no_volume_gets_the_name_of_the_manifest() -> None:
    async with open_world(World()) as pool:
        session = session_of(pool)
        await pool.volumes.create(b"v")
        await pool.snapshots.create(b"s")
        for line in (b"create .manifest.json size=1M\n", b"clone s/v .manifest.json\n"):
            with pytest.raises(ReservedNameError):
                await session.write(line)
        with pytest.raises(ReservedNameError):
            await pool.volumes.rename(b"v", MANIFEST_NAME)
        assert list(pool.volumes.by_name) == [b"v"]


@contextmanager
def names_of_earlier_versions() -> Iterator[None]:
    """Inside, a volume may have the name of the manifest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "MANIFEST_NAME", b"")
        yield


async def test_a_volume_of_an_earlier_version_with_the_name_of_the_manifest() -> None:
    world = World()
    async with open_world(world) as pool:
        with names_of_earlier_versions():
            await pool.volumes.create(MANIFEST_NAME)
        await put(pool, MANIFEST_NAME, 0, b"contents")
        await pool.volumes.create(b"v")
        await pool.snapshots.create(b"s")
    assert [one.severity for one in world.check().findings] == [NOTE]
    async with open_world(world) as pool:

        async def never(*arguments: object) -> None:
            raise AssertionError

        tree = Namespace(pool, "/", never, never)
        folder = (await tree.lookup(names.SNAPSHOTS, b"s", Caller(1, 0, 0))).inode
        found = [await tree.entry(inode) for _, inode in await tree.listing(folder)]
        assert sorted(one[0] for one in found if one is not None) == [MANIFEST_NAME, b"v"]
        node = await tree.lookup(folder, MANIFEST_NAME, Caller(1, 0, 0))
        assert names.is_manifest(node.inode)
        # What it holds is reached by a clone, and the volume by its name, which does not come to another.
        await pool.clones.clone(b"s", MANIFEST_NAME, b"c")
        assert await read_volume(pool, b"c") == b"contents"
        with pytest.raises(ReservedNameError):
            await pool.volumes.rename(MANIFEST_NAME, b"v", exchange=True)
        await pool.volumes.rename(MANIFEST_NAME, b"w")
    world.check_clean()


async def test_a_manifest_that_changes_is_one_file_to_who_looks_at_it_and_opens_it(
    mock_clock: trio.testing.MockClock,
) -> None:
    """``cp`` refused it, as replaced while being copied, when the snapshot was sealed between the two."""
    async with open_world(World()) as pool:

        async def never(*arguments: object) -> None:
            raise AssertionError

        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"a" * 3 * OBJECT)
        await pool.snapshots.create(b"s")
        tree = Namespace(pool, "/", never, never)
        folder = (await tree.lookup(names.SNAPSHOTS, b"s", Caller(1, 0, 0))).inode

        async def look(pid: int) -> int:
            return (await tree.lookup(folder, MANIFEST_NAME, Caller(pid, 0, 0))).inode

        async def text(inode: int, pid: int) -> bytes:
            handle = await tree.open(inode, os.O_RDONLY, Caller(pid, 0, 0))
            try:
                return bytes(await handle.read(0, 1 << 20))
            finally:
                tree.close(handle)

        first = await look(1)
        before = await manifest.manifest_of(pool, pool.snapshots.get(b"s"))
        await put(pool, b"v", 0, b"b" * 4096)
        assert await look(2) != first
        assert await look(1) == first
        assert await text(first, 1) == before
        # It was opened: the next look is a new one, and the same for a while, for one call may look twice.
        second = await look(1)
        assert second != first and await text(second, 1) == await manifest.manifest_of(pool, pool.snapshots.get(b"s"))
        third = await look(1)
        assert third == second
        await put(pool, b"v", OBJECT, b"b" * 4096)
        assert [await look(1), await look(1)] == [third, third]
        mock_clock.jump(60)
        fourth = await look(1)
        assert fourth != third


def test_a_snapshot_with_a_volume_that_no_path_leads_to_is_not_sent() -> None:
    def ask(mount_point: str, *words: str, options: list[tuple[str, str]] | None = None) -> dict[str, object]:
        return {"snapshot": {"guid": "p:1"}, "base": None, "gone": [], "volumes": [{"name": ".manifest.json"}]}

    stream = io.BytesIO()
    with pytest.raises(BadNameError, match="where its manifest is read"):
        send(ask, "/", "s", stream)
    assert not stream.getvalue()


# -- what the command line prints ---------------------------------------------------------------

ODD_WORDS = ["backup[old]", "a:key:b", "see [/srv/x]", "[bold]x", "\\[x]", "日本"]


def test_names_and_notes_are_printed_to_the_letter(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["NAME", " SIZE"], [[word, "1 B"] for word in [*ODD_WORDS, "日" * 150]])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(maxsplit=2)[0] for line in lines[1:]] == [*ODD_WORDS, "日" * 150]


def test_a_progress_bar_tells_of_names_to_the_letter() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    for word in ODD_WORDS:
        with Progress(description_column(), console=console, transient=True) as progress:
            progress.add_task(f"send {word}", total=None)
        assert f"send {word}" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("utf-8", "日é".encode() + b"\xff\xfe"),
        ("latin-1", b"\\u65e5\xe9\xff\xfe"),
        ("ascii", b"\\u65e5\\xe9\xff\xfe"),
    ],
)
def test_printing_any_name_goes_well(
    encoding: str, errors: str, printed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding, errors, write_through=True) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        print_any_name()
        print_table(["NAME"], [["日é\udcff\udcfe"]])
        print("日é\udcff\udcfe")
        assert [line.strip() for line in raw.getvalue().splitlines()] == [b"NAME", printed, printed]
        monkeypatch.undo()


# -- schedules ----------------------------------------------------------------------------------


def test_a_period_beyond_a_hundred_years_is_refused() -> None:
    assert make_schedule("x", "36525d").every_s == 36525 * 86400
    for every in ("36526d", "999999w", "999999999w"):
        with pytest.raises(BadCommandError, match="longer than 100 years"):
            make_schedule("x", every)


@pytest.mark.parametrize("every_s", [999_999 * 604800, 999_999_999 * 604800])
def test_a_period_that_was_stored_before_is_listed(
    tmp_path: Path, every_s: int, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = tmp_path / "pool"
    assert main_here("init", pool) == 0

    async def store() -> None:
        async with open_pool(str(pool)) as opened:
            await opened.scheduler.add(Schedule("far", every_s))
            await opened.scheduler.add(Schedule("near", 3600))

    trio.run(store)
    capsys.readouterr()
    assert main_here("schedule", "list", pool) == 0
    _, far, near = capsys.readouterr().out.splitlines()
    assert far.split() == ["far", str(every_s), "s", "all", "all", "after", "9999"] and near.rstrip().endswith("Z")


# -- receiving into a pool that is not mounted --------------------------------------------------


def test_why_a_pool_cannot_be_received_into_is_told_in_words(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    assert main_here("init", pool) == 0
    (pool / "pool.json").write_bytes(b"garbage")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = run(*SNAPFS, "receive", pool, expect=DamagedError.exit_code, env=environment, stdin=subprocess.DEVNULL)
    assert done.stderr.startswith("snapfs: the pool descriptor in") and "Traceback" not in done.stderr
    assert os.listdir(temporary) == []


# -- streams that are closed --------------------------------------------------------------------


def with_closed(streams: str, *words: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """The command line, some of whose standard streams are closed: ``<&- >&-``."""
    return run("sh", "-c", f'exec "$@" {streams}', "sh", *SNAPFS, *words, expect=expect)


def test_a_stream_from_or_to_nowhere_is_refused_in_words(tmp_path: Path) -> None:
    assert "standard output is closed" in with_closed(">&-", "send", tmp_path, "s", expect=2).stderr
    assert "standard input is closed" in with_closed("<&-", "receive", tmp_path, expect=2).stderr


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_commands_do_without_standard_streams(tmp_path: Path, streams: str) -> None:
    pool = tmp_path / "pool"
    with_closed(streams, "init", pool)
    with_closed(streams, "schedule", "add", pool, "x", "--every", "1h")
    done = with_closed(streams, "schedule", "list", pool)
    assert ("3600 s" in done.stdout) == (streams == "2>&-") and not done.stderr
    assert with_closed("2>&-", "nonsense", expect=2).stdout == ""
    assert with_closed("", "check", pool).stdout.rstrip().endswith("clean")


def test_nobody_who_reads_is_no_reason_for_a_traceback(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    assert main_here("init", pool) == 0
    reading, writing = os.pipe()
    os.close(reading)
    for words in (["schedule", "list", pool], ["schedule", "list", pool, "--json"], ["check", pool], ["--help"]):
        done = subprocess.run([*SNAPFS, *map(str, words)], stdout=writing, stderr=subprocess.PIPE, check=False)
        assert done.returncode == 1 and not done.stderr, done
    os.close(writing)


# -- what everyone may read ---------------------------------------------------------------------


async def test_status_does_not_tell_what_hooks_run() -> None:
    async with open_world(World()) as pool:
        await pool.hooks.add(make_hook("h", "/bin/freeze secret", "/bin/thaw secret", shell=False))
        told = await pool_status(pool)
        assert told["hooks"] == [{"name": "h", "is_damaged": False}]
        assert "secret" not in json.dumps(told) and "secret" in json.dumps(pool.hooks.entries())


def test_a_table_tells_a_terminal_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["NOTE"], [["\x1b]0;title\x07 \x9b31m red\nnext\tone \x7f é 日"]])
    shown = capsys.readouterr().out
    assert "\\x1b]0;title\\x07 \\x9b31m red\\x0anext\\x09one \\x7f é 日" in shown
    assert not [one for one in shown.rstrip("\n") if one < " " and one != "\n"]


def test_who_may_not_ask_a_daemon_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotAllowedError, match="the user whose daemon it is") as caught, _translated("/mnt"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/mnt/.snapfs/control")
    assert caught.value.errno == errno.EACCES

    def refuse(path: str) -> os.stat_result:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    # Where others, root among them, are not even let in to see whether there is one.
    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(NotAllowedError, match="you may not look into /mnt"):
        cli_control.control_path("/mnt")


def test_what_cannot_be_read_is_not_said_of_what_it_is_copied_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads that an image cannot be read may look for another disk to put it on."""
    volume, image = tmp_path / "volume", tmp_path / "image"
    volume.write_bytes(b"x" * 5000)
    read = os.pread

    def lost(fd: int, length: int, offset: int) -> bytes:
        if os.path.samestat(os.fstat(fd), volume.stat()):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, length, offset)

    monkeypatch.setattr(os, "pread", lost)
    with (
        pytest.raises(UnreadableError, match="what is to be copied cannot be read at byte 0") as caught,
        open(volume, "rb", buffering=0) as source,
    ):
        export_image(source, [(0, 5000)], str(image), "raw", lambda done, total: None)
    assert str(image) not in str(caught.value) and not image.exists()


@pytest.mark.parametrize("is_full", [True, False])
async def test_a_pool_of_before_is_upgraded_on_a_full_device_or_left_as_it_was(
    is_full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reserve, "_SHARE", 6)
    world = World(1, make_device=lambda where, _: MemoryDevice(12 << 20 if where == "home" else None))
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"x" * BLOCK)
    home = in_memory(world.home)
    descriptor = dataclasses.replace(read_descriptor(home, WHERE), format_version=FORMAT_VERSION - 1)
    home.write_file(POOL_FILE, descriptor.to_json())
    if not is_full:
        failing = FaultyDevice(home, FailNth("write", 1, errno.EIO, only=POOL_FILE))
        with pytest.raises(UnreadableError, match="the pool cannot be upgraded"):
            Pool.open(failing, WHERE, world.open_device)
        home.close()
        assert read_descriptor(home, WHERE) == descriptor and f"{POOL_FILE}.new" not in home.names("")
        return
    filler = home.create("filler")
    filler.write(bytes(home.space().free_bytes), 0)
    async with open_world(world) as pool:
        assert await read_volume(pool, b"v") == b"x" * BLOCK
        assert pool.reserve.is_spent
        home.remove("filler")
        await pool.reserve.refill()
        assert not pool.reserve.is_spent
    world.check_clean()
