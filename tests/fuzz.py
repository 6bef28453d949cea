"""Garbage for everything that reads what others write: control lines, names, streams, descriptors, tokens, options.

Inputs are made from good ones by a seeded generator: words are exchanged for nasty ones, bytes are flipped, doubled
and left out. Whatever comes, the answer is an answer or an error in words.
"""

from __future__ import annotations

import gc
import io
import json
import random
import resource
from collections.abc import Callable
from pathlib import Path

import trio

from snapfs.errors import SnapfsError
from snapfs.formats import DeviceDescriptor, PoolDescriptor
from snapfs.fuse.command import CommandContext, parse
from snapfs.fuse.control import ControlSession
from snapfs.hook import Hook, make_hook
from snapfs.mountpoint import check_options
from snapfs.pool import Pool
from snapfs.receivestate import ReceiveState
from snapfs.schedule import Schedule, make_schedule
from snapfs.stream import BEGIN, DATA, END, END_VOLUME, VOLUME, ZERO, StreamWriter, read_stream
from snapfs.streamhead import parse_head
from snapfs.transfer import ResumePoint
from snapfs.units import check_name, check_tag, parse_duration, parse_moment, parse_size

from .harness import World, open_world

NASTY = [
    *("", "-1", "0", "1", "4096", "4097", "9" * 50, "-" + "9" * 50, "18446744073709551616", "9223372036854775807"),
    *("4611686018427387904", "1e9", "1.5", "0x10", "NaN", "inf", "10G", "10ZiB", "1T", "50%", ".", "..", "/", "a/b"),
    *("v", "w", "s1", "s2", "c", "s1/v", "s1/w", "@", "@latest", "@1h", "@-1h", "@" + "9" * 30 + "d", "now"),
    *("@2026-11-22T08:31:13Z", "@2026-13-45T99:99:99Z", "@GMT-2026.11.22-08.31.13", ".snapshots", ".snapfs", "~"),
    *(
        "yes",
        "no",
        "maybe",
        "tag",
        "*",
        "{}",
        "[]",
        "null",
        "é",
        "\udcff",
        "\u202e",
        "\x7f",
        "\x01",
        "a" * 255,
        "b" * 256,
    ),
    *("x" * 5000, "--", "-", "=", "volume=v", "volume=", "--help", "$(id)", "`id`", "%s%n", "';--", "24h,30d", "15m"),
    *("1s", "0s", "99999999999d", "12:00", "25:61", "/nowhere", "/image", "relative", "redirect", "cow"),
]
LINES = [
    *(
        "snapshot",
        "snapshot s1",
        "snapshot s2 volume=v note=x hold=tag",
        "snapshot max-stall=50ms hooks=no",
        "delete s1",
    ),
    *("delete s1 s2 dry-run=yes", "rename s1 s2", "rollback s1 volume=v", "rollback s1 force=yes", "clone s1/v c"),
    *("hold s1 tag", "release s1 tag", "resize v 1M", "discard v 0 4096", "sync", "help", "create w size=1M mode=cow"),
    *(
        "create x source=/image mode=redirect",
        "create y change-log=z",
        "flatten c",
        "diff s1",
        "diff s1 s2",
        "blame v 0",
    ),
    *(
        "list",
        "list space=yes",
        "changelog list",
        "changelog create z capacity=1G device=/nowhere",
        "changelog resize z 2G",
    ),
    *("changelog remove z", "schedule add n every=15m keep=24h,30d at=12:00 skip-unchanged=yes hold=t volume=v"),
    *(
        "schedule list",
        "schedule run n dry-run=yes",
        "schedule remove n",
        "hook list",
        "hook remove h",
        "scrub rate=1G",
    ),
    *("verify s1", "reclaim need=1M dry-run=yes", "extents s1", "extents s2 base=s1", "receive", "stop 1", "jobs"),
]
WORDS = sorted({word for line in LINES for word in line.split()} | {line.split()[0] for line in LINES})


def mutated_text(rng: random.Random, text: str) -> str:
    """A line with words exchanged, doubled, left out, quoted."""
    words = text.split(" ")
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        place = rng.randrange(len(words) + 1)
        match rng.randrange(5):
            case 0:
                words.insert(place, rng.choice(NASTY))
            case 1:
                words.insert(place, rng.choice(WORDS))
            case 2 if words:
                del words[place - 1]
            case 3 if words:
                key, equals, _ = words[place - 1].partition("=")
                words[place - 1] = key + equals + rng.choice(NASTY) if equals else rng.choice(NASTY)
            case 4 if words:
                words[place - 1] = rng.choice("'\"\\#") + words[place - 1] + rng.choice(["'", '"', "\\", ""])
    return " ".join(words)


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, exchanged, doubled, left out, cut off."""
    found = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 2, 8])):
        if not found:
            break
        place = rng.randrange(len(found))
        length = rng.choice([1, 1, 2, 8, 100])
        match rng.randrange(5):
            case 0:
                found[place] ^= 1 << rng.randrange(8)
            case 1:
                found[place : place + length] = rng.randbytes(length)
            case 2:
                del found[place : place + length]
            case 3:
                found[place:place] = found[place : place + length]
            case 4:
                del found[place:]
    return bytes(found)


def mutated_json(rng: random.Random, value: object) -> object:
    """A document with parts exchanged, left out, and of other types."""
    if rng.random() < 0.12:
        return rng.choice([None, -1, 0, 1 << 70, 1.5, "", "x", "../x", "\udcff", [], {}, [[]], True, *NASTY[:8]])
    if isinstance(value, dict):
        return {key: mutated_json(rng, one) for key, one in value.items() if rng.random() > 0.03}
    if isinstance(value, list):
        return [mutated_json(rng, one) for one in value for _ in range(rng.choice([0, 1, 1, 1, 1, 1, 2]))]
    return value


def random_line(rng: random.Random) -> bytes:
    """A line for the control file, its end included."""
    line = mutated_text(rng, rng.choice(LINES)).encode("utf-8", "surrogateescape")
    if rng.random() < 0.2:
        line = mutated_bytes(rng, line)
    return line.replace(b"\n", b" ") + b"\n"


HEAD = {
    "version": 2,
    "snapshot": {"name": "s", "guid": "p:1", "created": "2026-11-22T08:31:13Z", "note": ""},
    "base": {"name": "b", "guid": "p:0"},
    "volumes": [
        {"name": "v", "base_name": "v", "size_bytes": 9, "mode": 420, "uid": 0, "gid": 0, "atime_ns": 0, "mtime_ns": 0}
    ],
    "gone": ["w"],
    "resume": [0, 4096],
}
POOL = PoolDescriptor("0" * 32, 4, 0)
HOOK = make_hook("h", "/bin/freeze", "/bin/thaw", "5s", ["v"], shell=False)
SCHEDULE = make_schedule("n", "1d", "12:00", ["v"], "24h,30d", ["t"])


def a_stream(rng: random.Random) -> bytes:
    """A stream whose checksums are right, of frames that need not be."""
    file = io.BytesIO()
    writer = StreamWriter(file, rng.choice([0, 3]))
    writer.fields(BEGIN, mutated_json(rng, HEAD))  # type: ignore[arg-type]
    for _ in range(rng.randrange(4)):
        match rng.randrange(5):
            case 0:
                writer.data(rng.choice([0, 4096, 1 << 63]), rng.randbytes(rng.choice([0, 10, 5000])))
            case 1:
                writer.zero(rng.choice([0, 1 << 62]), rng.choice([0, 4096, 1 << 63]))
            case 2:
                writer.fields(
                    rng.choice([VOLUME, END_VOLUME, DATA, ZERO, 7, 0]), {"place": rng.choice([0, -1, 1 << 70])}
                )
            case 3:
                writer.fields(VOLUME, {"place": 0})
            case 4:
                writer.fields(END_VOLUME, {})
    writer.fields(END, {})
    return file.getvalue()


def read_a_stream(rng: random.Random) -> None:
    """Frames, and the head."""
    data = a_stream(rng)
    if rng.random() < 0.5:
        data = mutated_bytes(rng, data)
    for frame in read_stream(io.BytesIO(data)):
        if frame.kind == BEGIN:
            parse_head(frame.fields)


def read_a_descriptor(rng: random.Random) -> None:
    """``pool.json`` and ``snapfs-device.json``."""
    contents = POOL.to_json()
    if rng.random() < 0.5:
        contents = json.dumps(mutated_json(rng, json.loads(contents))).encode()
    contents = mutated_bytes(rng, contents)
    (PoolDescriptor if rng.random() < 0.5 else DeviceDescriptor).from_json(contents, "where")


def read_words(rng: random.Random) -> None:
    """What is read of single words."""
    text = mutated_text(rng, rng.choice(NASTY))
    readers: list[Callable[[], object]] = [
        lambda: parse_size(text),
        lambda: parse_duration(text),
        lambda: parse_moment(text, 1_800_000_000 * 10**9),
        lambda: check_name(text.encode("utf-8", "surrogateescape"), "volume"),
        lambda: check_tag(text),
        lambda: ResumePoint.from_token(text),
        lambda: ReceiveState.from_fields(mutated_json(rng, [0, 0, 0, ["a"], ["b"]])),
        lambda: check_options(frozenset(text.split(","))),
        lambda: make_schedule("n", text, rng.choice([None, text]), [text], rng.choice(["", text])),
        lambda: make_hook(text, text, rng.choice(["", text]), rng.choice([None, text]), [text], shell=True),
        lambda: Hook.from_json("h", mutated_bytes(rng, HOOK.to_json().encode())),
        lambda: Schedule.from_json("n", mutated_bytes(rng, SCHEDULE.to_json().encode()).decode("utf-8", "replace")),
    ]
    rng.choice(readers)()


READERS: list[Callable[[random.Random], object]] = [
    lambda rng: parse(random_line(rng)[:-1]),
    read_a_stream,
    read_a_descriptor,
    read_words,
]


GROWTH_BYTES_MAX = 24 << 20


class Growth:
    """What the process holds in memory, from the first quarter of a run to its end."""

    def __init__(self, count: int) -> None:
        self._first = count // 4
        self._before = 0

    def note(self, number: int) -> None:
        """Be told of each input's number."""
        if number == self._first:
            self._before = resident_bytes()

    def check(self) -> None:
        """Fail when inputs left something behind."""
        grown = resident_bytes() - self._before
        assert grown < GROWTH_BYTES_MAX, f"{grown} bytes more after all inputs than after a quarter of them"


def resident_bytes() -> int:
    """The memory of this process, without what waits to be collected."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def fuzz_readers(seed: int, count: int) -> None:
    """Read ``count`` inputs; fails when one gives something other than a value or an error in words."""
    growth = Growth(count)
    for number in range(count):
        growth.note(number)
        rng = random.Random(f"{seed} {number}")
        try:
            rng.choice(READERS)(rng)
        except SnapfsError as error:
            assert error.reason and error.errno, error
        except Exception as error:
            raise AssertionError(f"seed {seed}, input {number}") from error
    growth.check()


async def fuzz_commands(seed: int, count: int) -> int:
    """Write ``count`` lines to the control file of pools in memory; how many were done and not refused."""
    done = 0
    growth = Growth(count // 200)
    for start in range(0, count, 200):
        growth.note(start // 200)
        world = World(2, 1)
        world.make_image("/image", b"image" * 3000)
        async with open_world(world) as pool:

            async def resize(name: bytes, size_bytes: int, pool: Pool = pool) -> None:
                await pool.volumes.truncate(pool.volumes.get(name), size_bytes)

            session = ControlSession(CommandContext(pool, resize))
            for line in (b"create v size=1M\n", b"snapshot s1\n"):
                await session.write(line)
            for number in range(start, min(start + 200, count)):
                line = random_line(random.Random(f"{seed} {number}"))
                if is_program(line):
                    continue
                try:
                    with trio.fail_after(60):
                        await session.write(line)
                    done += 1
                except SnapfsError as error:
                    assert error.reason and error.errno, (line, error)
                except OSError as error:
                    assert error.errno, (line, error)
                except Exception as error:
                    raise AssertionError(f"seed {seed}, input {number}: {line[:300]!r}") from error
            json.loads(b"[" + session.read(1 << 30).rstrip().replace(b"\n", b",") + b"]")
    growth.check()
    return done


def is_program(line: bytes) -> bool:
    """Whether it would have programs run: hooks are only read."""
    try:
        parsed = parse(line[:-1])
    except SnapfsError:
        return False
    return parsed is not None and parsed[0] == "hook" and parsed[1].words[:1] == [b"add"]
