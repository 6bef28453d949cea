"""The block map of an object: which change log holds each block. Pure.

A map of 1024 entries is an ``array`` of unsigned 32-bit log ids; one whose entries are all equal
is a plain ``int``. Entry 0 is a hole and reads as zeros. A map is never changed: a change gives another one, so that
what finds no memory halfway has changed nothing.

Encoded for a store, a map is an integer (uniform), or a blob: a byte of kind, then little-endian
``R`` runs of (count - 1: u16, log id: u32), or ``A`` the 1024 ids (u32) - whichever is shorter. A map that
is kept and not changed any more may also be ``Z``: the lowest bytes of all ids, the next ones, and so on,
deflated (RFC 1950).
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Set
from itertools import chain, compress, pairwise
from operator import sub

from .errors import DamagedError
from .geometry import BLOCKS_PER_OBJECT

BlockMap = int | array  # type: ignore[type-arg] # array[int] is not a type at run time in Python 3.11

HOLE = 0
LOG_ID_MAX = (1 << 32) - 1
_RUN = struct.Struct("<HI")
_KIND_RUNS = b"R"
_KIND_ARRAY = b"A"
_KIND_DEFLATED = b"Z"
_ARRAY_BYTES = BLOCKS_PER_OBJECT * 4
# Not worth deflating.
_SHORT_BYTES = 256


def entry(block_map: BlockMap, block: int) -> int:
    """The log id of one block."""
    return block_map if isinstance(block_map, int) else block_map[block]


def expanded(block_map: BlockMap) -> array[int]:
    """The map as an array, to be read: it is the map's own if it has one."""
    return array("I", [block_map]) * BLOCKS_PER_OBJECT if isinstance(block_map, int) else block_map


def with_range(block_map: BlockMap, first: int, last: int, log_id: int) -> BlockMap:
    """The map with blocks ``first`` up to, not including, ``last`` set."""
    if last - first == BLOCKS_PER_OBJECT or (isinstance(block_map, int) and block_map == log_id):
        return log_id
    entries = expanded(block_map) if isinstance(block_map, int) else block_map[:]
    if last - first == 1:
        entries[first] = log_id
    else:
        entries[first:last] = array("I", [log_id]) * (last - first)
    if last == BLOCKS_PER_OBJECT or first == 0:
        # A sequential writer has just come to an end of the object: worth a look.
        return simplified(entries)
    return entries


def partial_map(log_id: int, count: int) -> BlockMap:
    """A map whose first ``count`` blocks lie in one log, and whose others are holes."""
    if count <= 0:
        return HOLE
    if count >= BLOCKS_PER_OBJECT:
        return log_id
    return array("I", [log_id]) * count + array("I", [HOLE]) * (BLOCKS_PER_OBJECT - count)


def other_count(block_map: BlockMap, first: int, last: int, log_id: int) -> int:
    """Blocks in a range that do not lie in a log."""
    if isinstance(block_map, int):
        return 0 if block_map == log_id else last - first
    return last - first - block_map[first:last].count(log_id)


def any_in(block_map: BlockMap, first: int, last: int, log_id: int) -> bool:
    """Whether any block of a range lies in a log."""
    if isinstance(block_map, int):
        return block_map == log_id
    return log_id in block_map[first:last]


def simplified(block_map: BlockMap) -> BlockMap:
    """The same map, as an int where all entries are equal."""
    if isinstance(block_map, int) or block_map[0] != block_map[-1]:
        return block_map
    first = block_map[0]
    return first if block_map.count(first) == BLOCKS_PER_OBJECT else block_map


def is_uniform(block_map: BlockMap, first: int, last: int, log_id: int) -> bool:
    """Whether blocks ``first`` up to ``last`` all lie in that log."""
    if isinstance(block_map, int):
        return block_map == log_id
    if last - first == 1:
        return bool(block_map[first] == log_id)
    return bool(block_map[first:last].count(log_id) == last - first)


def runs(block_map: BlockMap, first: int, last: int) -> list[tuple[int, int, int]]:
    """Runs of equal entries in a range, as ``(first block, block count, log id)``."""
    if isinstance(block_map, int):
        return [(first, last - first, block_map)]
    if last - first == 1:
        return [(first, 1, block_map[first])]
    part = block_map[first:last]
    head = part[0]
    if part.count(head) == len(part):
        return [(first, len(part), head)]
    starts, counts, ids = _pieces(part)
    return list(zip((first + start for start in starts), counts, ids, strict=True))


def _bits(entries: array[int]) -> int:
    """All entries as one number, the first lowest: what is done to it is done to all without a loop in Python.

    Maps are looked at in threads, and a loop keeps the interpreter from those who use the volumes.
    """
    return int.from_bytes(entries.tobytes(), "little")


def _steps(bits: int, count: int) -> int:
    """From that of so many entries: for each but the first, whether and how it differs from the one before."""
    return (bits >> 32) ^ (bits & ((1 << 32 * (count - 1)) - 1))


def _starts(steps: int, count: int) -> list[int]:
    """Where runs begin, from what :func:`_steps` gives."""
    return [0, *compress(range(1, count), array("I", steps.to_bytes(4 * (count - 1), "little")))]


def _pieces(entries: array[int]) -> tuple[list[int], list[int], list[int]]:
    """Where runs of equal entries start, how long each is, and what it names."""
    starts = _starts(_steps(_bits(entries), len(entries)), len(entries))
    return starts, list(map(sub, [*starts[1:], len(entries)], starts)), list(map(entries.__getitem__, starts))


def all_runs(block_map: BlockMap) -> list[tuple[int, int, int]]:
    """Runs of the whole map."""
    return runs(block_map, 0, BLOCKS_PER_OBJECT)


def mapped_count(block_map: BlockMap, first: int = 0, last: int = BLOCKS_PER_OBJECT) -> int:
    """Blocks in a range that are not holes."""
    if isinstance(block_map, int):
        return last - first if block_map else 0
    if first == 0 and last == BLOCKS_PER_OBJECT:
        return BLOCKS_PER_OBJECT - block_map.count(HOLE)
    return last - first - block_map[first:last].count(HOLE)


def changed_runs(old: BlockMap, new: BlockMap) -> Iterator[tuple[int, int, int]]:
    """Runs of blocks that ``new`` names otherwise than ``old``, with what ``new`` says of them; also holes."""
    if isinstance(old, int) and isinstance(new, int):
        if old != new:
            yield 0, BLOCKS_PER_OBJECT, new
        return
    after, before = expanded(new), expanded(old)
    after_bits, before_bits = _bits(after), _bits(before)
    if after_bits == before_bits:
        return
    steps = _steps(after_bits, BLOCKS_PER_OBJECT) | _steps(before_bits, BLOCKS_PER_OBJECT)
    first = count = log_id = 0
    for start, end in pairwise([*_starts(steps, BLOCKS_PER_OBJECT), BLOCKS_PER_OBJECT]):
        if after[start] == before[start]:
            continue
        if count and first + count == start and after[start] == log_id:
            # Of the same log, and of several before.
            count += end - start
            continue
        if count:
            yield first, count, log_id
        first, count, log_id = start, end - start, after[start]
    yield first, count, log_id


def dropped_runs(old: BlockMap, new: BlockMap) -> Iterator[tuple[int, int, int]]:
    """Runs of blocks that ``old`` names and ``new`` names otherwise or not at all; holes are left out."""
    return (run for run in changed_runs(new, old) if run[2] != HOLE)


def dropped_runs_of(log_ids: Set[int], old: BlockMap, new: BlockMap) -> Iterable[tuple[int, int, int]]:
    """Those of :func:`dropped_runs` that lie in some logs, in a time that grows with what ``old`` names of these."""
    entries = (old,) if isinstance(old, int) else old
    if log_ids >= set(entries):
        return dropped_runs(old, new)
    found: list[tuple[int, int, int]] = []
    for block in compress(range(len(entries)), map(log_ids.__contains__, entries)):
        log_id = entries[block]
        if entry(new, block) == log_id:
            continue
        first, count, last_id = found[-1] if found else (0, 0, HOLE)
        if first + count == block and last_id == log_id:
            found[-1] = (first, count + 1, log_id)
        else:
            found.append((block, 1, log_id))
    return found


def encode(block_map: BlockMap) -> int | bytes:
    """The map as a store keeps it."""
    block_map = simplified(block_map)
    if isinstance(block_map, int):
        return block_map
    starts = _starts(_steps(_bits(block_map), BLOCKS_PER_OBJECT), BLOCKS_PER_OBJECT)
    if len(starts) * _RUN.size >= _ARRAY_BYTES:
        return _KIND_ARRAY + _little_endian(block_map).tobytes()
    ends_less_one = map((-1).__add__, [*starts[1:], BLOCKS_PER_OBJECT])
    runs = zip(map(sub, ends_less_one, starts), map(block_map.__getitem__, starts), strict=True)
    return _KIND_RUNS + struct.pack("<" + "HI" * len(starts), *chain.from_iterable(runs))


def encode_compactly(block_map: BlockMap) -> int | bytes:
    """The map as a store keeps one that is not changed any more: in a fifth of the room, if it is in many pieces."""
    stored = encode(block_map)
    if isinstance(stored, int) or len(stored) <= _SHORT_BYTES:
        return stored
    ids = _little_endian(expanded(block_map)).tobytes()
    deflated = _KIND_DEFLATED + zlib.compress(b"".join(ids[place::4] for place in range(4)), 1)
    return min(stored, deflated, key=len)


def _inflated(body: bytes) -> bytes | None:
    """The ids of a deflated map; None if it is none."""
    inflating = zlib.decompressobj()
    try:
        planes = inflating.decompress(body, _ARRAY_BYTES)
    except zlib.error:
        return None
    if len(planes) != _ARRAY_BYTES or not inflating.eof or inflating.unused_data:
        return None
    ids = bytearray(_ARRAY_BYTES)
    for place in range(4):
        ids[place::4] = planes[place * BLOCKS_PER_OBJECT : (place + 1) * BLOCKS_PER_OBJECT]
    return bytes(ids)


def decode(stored: object) -> BlockMap:
    """The map of :func:`encode` or :func:`encode_compactly`. Raises DamagedError for anything else."""
    if isinstance(stored, int) and 0 <= stored <= LOG_ID_MAX:
        return stored
    if isinstance(stored, bytes):
        body = stored[1:]
        if stored[:1] == _KIND_DEFLATED and (inflated := _inflated(body)) is not None:
            return _little_endian(array("I", inflated))
        if stored[:1] == _KIND_ARRAY and len(body) == _ARRAY_BYTES:
            return _little_endian(array("I", body))
        if stored[:1] == _KIND_RUNS and body and len(body) % _RUN.size == 0:
            entries = array("I")
            for less_one, log_id in _RUN.iter_unpack(body):
                entries.extend(array("I", [log_id]) * (less_one + 1))
            if len(entries) == BLOCKS_PER_OBJECT:
                return entries
    raise DamagedError("a block map is damaged", "Run snapfs check on the unmounted pool")


def _little_endian(entries: array[int]) -> array[int]:
    if sys.byteorder == "big":
        entries = entries[:]
        entries.byteswap()
    return entries
