"""Formats, maps, names and the layers: nothing here touches a device."""

from __future__ import annotations

import ast
import random
import shlex
import zlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapfs import blockmap, geometry, units
from snapfs.blockmasks import mask_runs, objects_with_data
from snapfs.cli import cli
from snapfs.errors import (
    BadCommandError,
    BadNameError,
    DamagedError,
    NotAPoolError,
    SnapfsError,
    TooLargeError,
    TooNewError,
)
from snapfs.formats import FORMAT_VERSION, DeviceDescriptor, PoolDescriptor, VolumeTraits
from snapfs.fuse import names
from snapfs.fuse.command import split_words
from snapfs.fuse.patience import Patience
from snapfs.geometry import VolumeId
from snapfs.snapshotindex import NEVER, SnapshotIndex
from snapfs.traits import TraitsTable

from .contents import Contents, first_of_no_version

BLOCKS = geometry.BLOCKS_PER_OBJECT
SOURCE = Path(__file__).resolve().parent.parent


def test_no_script_closes_a_pipe_that_is_written_to() -> None:
    # With pipefail the line has failed then, sometimes: packages that were to be had were not installed.
    for script in (SOURCE / "contrib").iterdir():
        if script.is_file() and "pipefail" in script.read_text():
            assert "| grep -q" not in script.read_text(), script


maps = st.one_of(
    st.integers(0, blockmap.LOG_ID_MAX),
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 5)), min_size=1, max_size=60).map(
        lambda runs: array(
            "I",
            [log for count, log in runs for _ in range(count)][:BLOCKS]
            + [9] * max(0, BLOCKS - sum(count for count, _ in runs)),
        )
    ),
    st.lists(st.integers(0, blockmap.LOG_ID_MAX), min_size=BLOCKS, max_size=BLOCKS).map(lambda ids: array("I", ids)),
)
ranges = st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS)).map(
    lambda pair: (pair[0], min(BLOCKS, pair[0] + pair[1]))
)


def as_list(block_map: blockmap.BlockMap) -> list[int]:
    return list(blockmap.expanded(block_map))


@given(maps)
def test_a_map_survives_its_encoding(block_map: blockmap.BlockMap) -> None:
    assert as_list(blockmap.decode(blockmap.encode(block_map))) == as_list(block_map)
    compact = blockmap.encode_compactly(block_map)
    assert as_list(blockmap.decode(compact)) == as_list(block_map)
    assert not isinstance(compact, bytes) or len(compact) <= len(blockmap.encode(block_map))  # type: ignore[arg-type]


def test_a_map_in_many_pieces_is_kept_in_little_room() -> None:
    chance = random.Random(1)
    entries = array("I", (70000 + chance.randrange(11) for _ in range(BLOCKS)))
    compact = blockmap.encode_compactly(entries)
    assert isinstance(compact, bytes) and compact[:1] == b"Z" and len(compact) < 800
    for damaged in (
        compact[:-1],
        compact + b"x",
        b"Z" + compact[2:],
        b"Z" + zlib.compress(bytes(4 * BLOCKS - 1)),
        b"Z" + zlib.compress(bytes(4 * BLOCKS + 1)),
        *(compact[:at] + bytes([compact[at] ^ 1]) + compact[at + 1 :] for at in range(3, len(compact), 50)),
    ):
        with pytest.raises(DamagedError):
            blockmap.decode(damaged)


@given(maps, ranges, st.integers(0, 9))
def test_setting_a_range_sets_it_and_nothing_else(
    block_map: blockmap.BlockMap, span: tuple[int, int], log_id: int
) -> None:
    expected = as_list(block_map)
    first, last = span
    expected[first:last] = [log_id] * (last - first)
    before = as_list(block_map)
    assert as_list(blockmap.with_range(block_map, first, last, log_id)) == expected
    assert as_list(block_map) == before


@given(maps, ranges)
def test_runs_tell_the_map(block_map: blockmap.BlockMap, span: tuple[int, int]) -> None:
    first, last = span
    told = [log_id for _, count, log_id in blockmap.runs(block_map, first, last) for _ in range(count)]
    assert told == as_list(block_map)[first:last]
    assert blockmap.mapped_count(block_map, first, last) == sum(1 for one in told if one)
    assert blockmap.is_uniform(block_map, first, last, told[0]) == (len(set(told)) == 1)
    for log_id in {*told, 12345}:
        assert blockmap.other_count(block_map, first, last, log_id) == sum(one != log_id for one in told)


@given(maps, maps)
def test_dropped_runs_are_what_the_later_map_does_not_name(old: blockmap.BlockMap, new: blockmap.BlockMap) -> None:
    expected = {
        (block, one)
        for block, (one, other) in enumerate(zip(as_list(old), as_list(new), strict=True))
        if one and one != other
    }
    told = {(block + step, log_id) for block, count, log_id in blockmap.dropped_runs(old, new) for step in range(count)}
    assert told == expected


@given(maps, maps, st.data())
def test_dropped_runs_of_some_logs_are_those_in_them(
    old: blockmap.BlockMap, new: blockmap.BlockMap, data: st.DataObject
) -> None:
    log_ids = data.draw(st.sets(st.sampled_from(sorted({*as_list(old), 12345} - {0}))))
    expected = [run for run in blockmap.dropped_runs(old, new) if run[2] in log_ids]
    assert list(blockmap.dropped_runs_of(log_ids, old, new)) == expected


def test_the_encodings_are_the_documented_bytes() -> None:
    entries = array("I", [7]) * BLOCKS
    assert blockmap.encode(entries) == 7
    entries[1] = 258
    assert blockmap.encode(entries) == bytes.fromhex("52 0000 07000000 0000 02010000 fd03 07000000")
    entries = array("I", range(BLOCKS))
    encoded = blockmap.encode(entries)
    assert isinstance(encoded, bytes)
    assert encoded[:13] == bytes.fromhex("41 00000000 01000000 02000000")
    assert len(encoded) == 1 + 4 * BLOCKS
    planes = bytes(range(256)) * 4 + b"".join(bytes([high]) * 256 for high in range(4)) + bytes(2 * BLOCKS)
    assert blockmap.decode(b"Z" + zlib.compress(planes)) == entries


# Runs of 1024 and of one block more.
TOO_LONG = b"R" + bytes.fromhex("ff03 07000000 0000 08000000")


@pytest.mark.parametrize(
    "stored", [-1, 1 << 32, None, "x", b"", b"Z", b"R", b"R12345", b"A123", b"R" + bytes(6), TOO_LONG]
)
def test_a_damaged_map_is_refused(stored: object) -> None:
    with pytest.raises(DamagedError):
        blockmap.decode(stored)


@given(st.integers(0, 1 << 45), st.integers(1, 20 << 20))
def test_pieces_cover_a_range_once(offset: int, length: int) -> None:
    position = 0
    for object_index, inside, step, at in geometry.pieces(offset, length):
        assert at == position
        assert object_index * geometry.OBJECT_SIZE + inside == offset + at
        assert 0 < step <= geometry.OBJECT_SIZE - inside
        position += step
    assert position == length


@given(st.integers(0, 1 << 200))
def test_mask_runs_tell_the_mask(mask: int) -> None:
    assert sum(((1 << count) - 1) << first for first, count in mask_runs(mask)) == mask


def test_extents_are_told_by_object() -> None:
    found = objects_with_data([(4096, 12288), ((4 << 20) - 4096, (4 << 20) + 1)], 1, 4)
    assert found == [(1, 0b110 | 1 << 1023), (5, 1)]


def test_the_index_knows_who_is_held_when() -> None:
    index = SnapshotIndex()
    one, two = geometry.VolumeId(256), geometry.VolumeId(257)
    index.add(3, None)
    index.add(5, [one])
    assert index.holds(two, 1, 3) and not index.holds(two, 4, 9) and index.holds(one, 4, 9)
    assert index.newest(one) == 5 and index.newest(two) == 3
    assert index.next_of_all(2) == 3 and index.next_of_all(3) == NEVER
    index.remove(5, [one])
    index.remove(3, None)
    assert index.newest(one) == 0 and not index.holds(one, 0, NEVER)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("10G", 10 << 30), ("512m", 512 << 20), ("1 KiB", 1024), ("2TB", 2 << 40), ("7b", 7)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1.5G", "1X", "9" * 50, "9E", "٣"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(TooLargeError if text == "9E" else BadCommandError):
        units.parse_size(text)


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1536, 1 << 30, 5 << 40, 1 << 62])
def test_sizes_are_shown(size: int) -> None:
    assert units.format_size(size)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (b"", "volume"),
        (b".", "volume"),
        (b"..", "volume"),
        (b"a/b", "volume"),
        (b"a\nb", "volume"),
        (b"a\x01", "snapshot"),
        (b"a\x7f", "snapshot"),
        (b"x" * 256, "volume"),
        (b"@now", "snapshot"),
        (b".hidden", "snapshot"),
        (b".snapshots", "volume"),
        (b".snapfs", "volume"),
        (b".manifest.json", "volume"),
    ],
)
def test_bad_names_are_refused_with_words(name: bytes, kind: str) -> None:
    with pytest.raises(BadNameError) as caught:
        units.check_name(name, kind)
    assert kind in str(caught.value) or "snapfs" in str(caught.value)


@pytest.mark.parametrize("name", [b"a", b"\xff\xfe", b"x" * 255, b"a b", b".swp", b"@x", "é".encode()])
def test_other_names_are_volumes(name: bytes) -> None:
    assert units.check_name(name, "volume") == name


def test_descriptors_survive_and_refuse() -> None:
    pool = PoolDescriptor("id", 6, 5)
    assert PoolDescriptor.from_json(pool.to_json(), "p") == pool
    device = DeviceDescriptor("id", 2)
    assert DeviceDescriptor.from_json(device.to_json(), "d") == device
    with pytest.raises(TooNewError):
        newer = b'"format_version": %d' % (FORMAT_VERSION + 1)
        PoolDescriptor.from_json(pool.to_json().replace(b'"format_version": %d' % FORMAT_VERSION, newer), "p")
    for contents, error in (
        (b"", DamagedError),
        (b"[]", NotAPoolError),
        (b"{}", NotAPoolError),
        (b"[" * 100000, DamagedError),
        (device.to_json(), NotAPoolError),
        (pool.to_json().replace(b": 6", b": 600"), DamagedError),
        (pool.to_json().replace(b'"pool_id"', b'"x"'), DamagedError),
        (pool.to_json().replace(b'"format_version": ', b'"format_version": "2", "x": '), DamagedError),
    ):
        with pytest.raises(error):
            PoolDescriptor.from_json(contents, "p")


def test_inode_numbers_name_one_thing() -> None:
    snapshot, volume = geometry.SnapshotId(7), geometry.VolumeId(256)
    inodes = {
        names.of_volume(volume),
        names.of_snapshot(snapshot),
        names.of_manifest(snapshot),
        names.of_snapshot_volume(snapshot, volume),
        names.of_processor(0),
        *range(1, 9),
    }
    assert len(inodes) == 13
    inode = names.of_snapshot_volume(snapshot, volume)
    assert (names.snapshot_id_of(inode), names.volume_id_of(inode)) == (7, 256)
    assert names.is_snapshot_folder(names.of_snapshot(snapshot)) and names.is_manifest(names.of_manifest(snapshot))
    assert names.processor_index_of(names.of_processor(63)) == 63


def test_every_error_has_an_errno_an_exit_code_and_words() -> None:
    def all_classes(kind: type[SnapfsError]) -> list[type[SnapfsError]]:
        return [kind, *(one for sub in kind.__subclasses__() for one in all_classes(sub))]

    for kind in all_classes(SnapfsError):
        assert kind.errno > 0 and kind.exit_code in (1, 2, 4)
        assert kind.__doc__, kind


LAYERS = [
    ["errors"],
    ["units"],
    ["geometry", "schedule", "stream", "hook", "hookguard", "jsontext"],
    ["transfer", "images", "streamhead", "beneath"],
    ["receivestate"],
    ["takeback"],
    ["receive"],
    ["blockmap", "snapshotindex", "tasks", "threads", "jobs", "notresident", "checksums", "contenthash"],
    ["formats", "events", "damage", "sealedfile", "pace"],
    ["ownership"],
    ["freeze", "pending", "descriptor"],
    ["database", "traits", "image"],
    ["placement", "liveness", "rowchecks"],
    ["catalog", "shardstore", "changelog", "reserve"],
    ["folder", "catalogaccess", "blockmasks", "shardstate", "counting", "objectdigests"],
    ["writeback", "namedblocks", "prefetch"],
    ["portion"],
    ["cowportion"],
    ["processor"],
    ["closed"],
    ["reclaim", "unnamed", "volume", "sealing", "hooks", "space"],
    ["volumes", "snapshot", "smallest"],
    ["snapshots"],
    ["objecthistory"],
    ["reclaimer", "scheduler", "affected", "sealer", "restoring"],
    ["clones", "making", "changelogvolumes"],
    ["freeing", "imagewatch"],
    ["pool"],
    ["manifest", "status", "repair", "rescue", "diff", "scrub"],
    ["check"],
    ["fuse.patience", "fuse.helper", "fuse.claims"],
    [
        "fuse.loop",
        "fuse.names",
        "fuse.kernelnames",
        "fuse.kernelevents",
        "fuse.command",
        "fuse.helperprocess",
        "fuse.mounttable",
    ],
    [
        "fuse.snapshotcommands",
        "fuse.changelogcommands",
        "fuse.schedulecommands",
        "fuse.hookcommands",
        "fuse.jobcommands",
    ],
    ["fuse.comparecommands", "fuse.trustcommands", "fuse.volumecommands"],
    ["fuse.control"],
    ["fuse.handles", "fuse.manifests"],
    ["fuse.namespace"],
    ["fuse.ownmount", "fuse.operations"],
    ["mountpoint"],
    ["mount"],
    ["cli.output"],
    ["cli.control"],
    ["cli"],
]


def imported_modules(path: Path, module: str) -> set[str]:
    """What a file of snapfs imports of snapfs; imports for types only count too."""
    found = set()
    package = module.split(".")[:-1] if path.name != "__init__.py" else module.split(".")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found |= {f"{target}.{alias.name}" if not node.module else target for alias in node.names}
    return found


def test_imports_only_go_down() -> None:
    rank = {f"snapfs.{name}": number for number, layer in enumerate(LAYERS) for name in layer}
    seen = set()
    for path in sorted((SOURCE / "snapfs").rglob("*.py")):
        relative = path.relative_to(SOURCE).with_suffix("")
        module = ".".join(relative.parts).removesuffix(".__init__")
        if "backends" in relative.parts or module in ("snapfs", "snapfs.__main__", "snapfs.fuse"):
            continue
        own = "snapfs.cli" if module.startswith("snapfs.cli.") and module not in rank else module
        assert own in rank, f"{module} has no layer: give it one in LAYERS"
        seen.add(own)
        for target in imported_modules(path, module):
            if target.startswith("snapfs.backends") or target in ("snapfs.fuse", "snapfs"):
                continue
            other = "snapfs.cli" if target.startswith("snapfs.cli.") and target not in rank else target
            assert rank[other] < rank[own] or other == own == "snapfs.cli", (
                f"{module} imports {target}: a layer may only use those below it"
            )
    assert seen == set(rank), "a layer names a module that is not there"


def test_devices_import_nothing_of_snapfs() -> None:
    for path in (SOURCE / "backends").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1 and not (node.module or "").startswith("snapfs"), path
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("snapfs") for alias in node.names), path


def test_only_the_fuse_layer_and_the_mount_know_pyfuse3() -> None:
    allowed = {"fuse/operations.py", "fuse/loop.py", "mount.py"}
    for path in (SOURCE / "snapfs").rglob("*.py"):
        if "import pyfuse3" in path.read_text():
            assert str(path.relative_to(SOURCE / "snapfs")) in allowed, path


@given(st.text(alphabet=" \t\n'\"\\\\#=abü", max_size=30))
def test_a_line_is_split_as_a_shell_would(text: str) -> None:
    try:
        expected = shlex.split(text, comments=True)
    except ValueError:
        with pytest.raises(BadCommandError):
            split_words(text)
    else:
        assert split_words(text) == expected


def test_a_long_word_is_read_in_time() -> None:
    word = "x" * 900_000
    assert split_words(f"hook add '{word}' {word}") == ["hook", "add", word, word]


def test_every_command_is_found_by_its_name() -> None:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None and command.name == name and command.help
    assert cli.get_command(context, "nonsense") is None


def test_waiting_awake_goes_on_while_it_goes_well_and_is_tried_again_now_and_then() -> None:
    patience = Patience()
    for _ in range(100):
        assert patience.is_worth_it()
        patience.note(has_come=True)
    tries = 0
    while patience.is_worth_it():
        patience.note(has_come=False)
        tries += 1
    assert tries < 20
    later = [patience.is_worth_it() for _ in range(1000)]
    assert 0 < sum(later) < 40
    patience.note(has_come=True)
    assert patience.is_worth_it()


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, 20000), st.binary(max_size=9000)),
            st.tuples(st.just("write"), st.integers(0, 20000), st.integers(0, 9000).map(bytes)),
            st.tuples(st.just("clear"), st.integers(0, 30000), st.integers(0, 30000)),
            st.tuples(st.just("truncate"), st.integers(0, 30000), st.none()),
        )
    )
)
def test_contents_are_what_bytes_would_be(changes: list[tuple[str, int, Any]]) -> None:
    contents, plain = Contents(), bytearray()
    for kind, place, what in changes:
        before, plain_before = contents.copy(), bytes(plain)
        if kind == "write":
            contents.write(place, what)
            plain.extend(bytes(max(0, place + len(what) - len(plain))))
            plain[place : place + len(what)] = what
        elif kind == "clear":
            contents.clear(place, what)
            plain[place:what] = bytes(len(plain[place:what]))
        else:
            contents.truncate(place)
            plain = plain[:place].ljust(place, b"\0")
        assert contents == Contents(bytes(plain)) and len(contents) == len(plain)
        assert contents.piece(0, len(plain)) == plain and contents.piece(4000, 5000) == plain[4000:9000].ljust(
            5000, b"\0"
        )
        assert (contents == before) == (plain == plain_before)
        assert (first_of_no_version(contents, [before], exact_size=False) is None) == (
            len(plain) == len(plain_before) and plain == plain_before
        )


def test_each_sector_may_be_of_another_version() -> None:
    old, new = Contents(b"o" * 10000), Contents(b"n" * 10000)
    mixed = Contents(b"o" * 512 + b"n" * 1024 + b"o" * (10000 - 1536))
    assert first_of_no_version(mixed, [old, new]) is None
    assert first_of_no_version(Contents(b"o" * 100 + b"n" * 9900), [old, new]) == "what lies at 0 is of no version"
    assert first_of_no_version(Contents(b"o" * 9999), [old, new]) == "9999 bytes, which no version has"
    assert first_of_no_version(Contents(b"o" * 9999), [Contents(b"o" * 9990), new, old], exact_size=False) is None


@pytest.mark.parametrize("is_backwards", [False, True])
def test_a_map_that_was_written_block_by_block_from_either_end_is_one_number(is_backwards: bool) -> None:
    block_map: blockmap.BlockMap = blockmap.HOLE
    for block in reversed(range(BLOCKS)) if is_backwards else range(BLOCKS):
        block_map = blockmap.with_range(block_map, block, block + 1, 7)
    assert block_map == 7


def families_told(rows: Mapping[int, VolumeTraits]) -> dict[int, tuple[int, ...]]:
    """The families of volumes, worked out the long way."""
    families = {one: {one} for one in rows} | {row.origin_id: {row.origin_id} for row in rows.values()}
    for _ in rows:
        for row in rows.values():
            if row.origin_id:
                joined = families[row.volume_id] | families[row.origin_id]
                families[row.volume_id] = families[row.origin_id] = joined
                for member in joined:
                    families[member] = joined
    return {one: tuple(sorted(family)) for one, family in families.items()}


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(1, 9), st.integers(0, 9), st.integers(1, 3), st.booleans()),
            st.tuples(st.just("drop"), st.integers(1, 9)),
            st.tuples(st.just("ask"), st.integers(1, 9)),
        )
    )
)
def test_families_are_what_their_rows_say(steps: list[tuple[Any, ...]]) -> None:
    table = TraitsTable([])
    rows: dict[int, VolumeTraits] = {}
    for step in steps:
        volume_id = VolumeId(step[1])
        if step[0] == "put" and step[2] != volume_id:
            rows[volume_id] = VolumeTraits(
                volume_id, volume_id, origin_id=VolumeId(step[2]), origin_instant=step[3], inherits=int(step[4])
            )
            table.put(rows[volume_id])
        elif step[0] == "drop":
            rows.pop(volume_id, None)
            table.drop(volume_id)
        elif step[0] == "ask":
            assert table.family_of(volume_id) == families_told(rows).get(volume_id, (volume_id,))
    told = families_told(rows)
    for one in map(VolumeId, range(1, 10)):
        assert table.family_of(one) == told.get(one, (one,))
        origins = [row.origin_instant for row in rows.values() if row.origin_id == one]
        assert table.shared_until(one) == max(origins, default=0) and table.is_origin(one) == bool(origins)
        assert table.get(one) == rows.get(one, VolumeTraits(one, one))
