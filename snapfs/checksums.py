"""Checksums of sealed blocks, and what a snapshot's root is made of. Pure.

A sealed block has two: eight bytes of XXH3 (https://github.com/Cyan4973/xxHash), which every read of it is
held against, and sixteen of BLAKE2b (RFC 7693), which nobody can forge and of which roots are made.
A block of zeros has neither: what has none must be zeros. Ranges of 32 blocks have an XXH3 of their own, so that
a long read is held against few; one that does not match is looked at block by block, for a block that
was freed reads as zeros, and that is no damage to its neighbours.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from xxhash import xxh3_64, xxh3_64_digest

from .errors import DamagedError
from .geometry import BLOCK_SHIFT, BLOCK_SIZE, BLOCKS_PER_OBJECT

CHECKSUM_BYTES = 8
DIGEST_BYTES = 16
RANGE_BLOCKS = 32
RANGE_BYTES = RANGE_BLOCKS * BLOCK_SIZE
MASK_BYTES = BLOCKS_PER_OBJECT // 8
ZERO_DIGEST = bytes(DIGEST_BYTES)
_ZERO_BLOCK = bytes(BLOCK_SIZE)
_ZEROS = bytes(BLOCK_SIZE * BLOCKS_PER_OBJECT)
FULL_MASK = (1 << BLOCKS_PER_OBJECT) - 1
_RANGES_PAY_BLOCKS = 64


def digest_of(block: bytes | bytearray | memoryview) -> bytes:
    """The digest of a block; zeros for one of zeros."""
    if block == _ZERO_BLOCK:
        return ZERO_DIGEST
    return hashlib.blake2b(block, digest_size=DIGEST_BYTES, person=b"snapfs block").digest()


@dataclass(frozen=True, slots=True)
class ObjectSums:
    """The checksums of one object's blocks in one change log.

    ``mask`` has a bit for each block that has one; ``checksums`` and ``digests`` are theirs, in order.
    ``ranges`` are the checksums of all ranges, empty where so little is there that it would not pay.
    ``digests`` is empty where it was not asked for.
    """

    mask: int
    checksums: bytes
    ranges: bytes = b""
    digests: bytes = b""

    @classmethod
    def decode(
        cls, place: tuple[int, int], mask: bytes, checksums: bytes, ranges: bytes, guards: bytes, digests: bytes | None
    ) -> ObjectSums:
        """What a store keeps for a log and an object. Raises DamagedError when it is not what was put there."""
        wrong = DamagedError(
            f"the checksums of object {place[1]} in change log {place[0]} are damaged", "Unmount and run snapfs check"
        )
        if len(guards) != 2 * CHECKSUM_BYTES or guards[:CHECKSUM_BYTES] != _guard(place, mask, checksums, ranges):
            raise wrong
        if digests is not None and guards[CHECKSUM_BYTES:] != _guard(place, digests):
            raise wrong
        bits = int.from_bytes(mask, "little")
        count = bits.bit_count()
        if len(checksums) != count * CHECKSUM_BYTES or (digests is not None and len(digests) != count * DIGEST_BYTES):
            raise wrong
        if bits == FULL_MASK:
            # One number for all, which is known by its identity.
            bits = FULL_MASK
        return cls(bits, checksums, ranges, digests or b"")

    def encoded(self, place: tuple[int, int]) -> tuple[bytes, bytes, bytes, bytes, bytes]:
        """Mask, checksums, ranges, guards of these and of the digests, and digests, as a store keeps them."""
        mask = self.mask.to_bytes(MASK_BYTES, "little")
        guards = _guard(place, mask, self.checksums, self.ranges) + _guard(place, self.digests)
        return mask, self.checksums, self.ranges, guards, self.digests

    def without_digests(self) -> ObjectSums:
        """As much of it as reads need."""
        # One number for all, which is known by its identity.
        mask = FULL_MASK if self.mask == FULL_MASK else self.mask
        return ObjectSums(mask, self.checksums, self.ranges, b"")

    @property
    def size_bytes(self) -> int:
        """What it takes in memory, about."""
        return 200 + MASK_BYTES + len(self.checksums) + len(self.ranges) + len(self.digests)

    def matches(self, first: int, view: memoryview) -> bool:
        """Whether whole blocks from ``first`` on are what was sealed."""
        if self.ranges and len(view) >= RANGE_BYTES:
            return self._matches_ranges(first, view)
        count = len(view) >> BLOCK_SHIFT
        mask = self.mask
        wanted = ((1 << count) - 1) << first
        present = mask & wanted
        if present == wanted:
            at = first if mask is FULL_MASK else (mask & ((1 << first) - 1)).bit_count()
            at *= CHECKSUM_BYTES
            found = b"".join([xxh3_64_digest(view[one : one + BLOCK_SIZE]) for one in range(0, len(view), BLOCK_SIZE)])
            return found == self.checksums[at : at + count * CHECKSUM_BYTES]
        if not present:
            return view == _ZEROS[: len(view)]
        return self.first_wrong(first, view) is None

    def _matches_ranges(self, first: int, view: memoryview) -> bool:
        block = first
        end = first + (len(view) >> BLOCK_SHIFT)
        while block < end:
            stop = min(end, block + RANGE_BLOCKS - block % RANGE_BLOCKS)
            part = view[(block - first) << BLOCK_SHIFT : (stop - first) << BLOCK_SHIFT]
            if len(part) == RANGE_BYTES:
                at = block // RANGE_BLOCKS * CHECKSUM_BYTES
                is_right = xxh3_64_digest(part) == self.ranges[at : at + CHECKSUM_BYTES]
                is_right = is_right or self.first_wrong(block, part) is None
            else:
                is_right = self.matches(block, part)
            if not is_right:
                return False
            block = stop
        return True

    def first_wrong(self, first: int, view: memoryview) -> int | None:
        """The first block from ``first`` on that is not what was sealed; None for none."""
        for index in range(len(view) >> BLOCK_SHIFT):
            block = view[index << BLOCK_SHIFT : (index + 1) << BLOCK_SHIFT]
            if not self._is_right(first + index, block):
                return first + index
        return None

    def _is_right(self, block: int, contents: memoryview) -> bool:
        if not self.mask >> block & 1:
            return contents == _ZERO_BLOCK
        at = (self.mask & ((1 << block) - 1)).bit_count() * CHECKSUM_BYTES
        return xxh3_64_digest(contents) == self.checksums[at : at + CHECKSUM_BYTES]

    def digest_at(self, block: int) -> bytes:
        """The digest of a block; zeros where there is none."""
        if not self.mask >> block & 1:
            return ZERO_DIGEST
        at = (self.mask & ((1 << block) - 1)).bit_count() * DIGEST_BYTES
        return self.digests[at : at + DIGEST_BYTES]

    def digests_of(self, first: int, count: int) -> bytes:
        """The digests of a run of blocks, one after the other."""
        wanted = ((1 << count) - 1) << first
        if self.mask & wanted == wanted:
            at = (self.mask & ((1 << first) - 1)).bit_count() * DIGEST_BYTES
            return self.digests[at : at + count * DIGEST_BYTES]
        return b"".join([self.digest_at(block) for block in range(first, first + count)])


def _guard(place: tuple[int, int], *parts: bytes) -> bytes:
    """A checksum over checksums: a store that went bad must not make sound data look damaged."""
    return xxh3_64_digest(b"%d %d " % place + b"".join(parts))


class SumsMaker:
    """Collects the sums of one object, block by block in order."""

    def __init__(self) -> None:
        self.mask = 0
        self._next_block = 0
        self._range = xxh3_64()
        self._ranges: list[bytes] = []
        self._checksums: list[bytes] = []
        self._digests: list[bytes] = []

    def add(self, block: int, contents: memoryview) -> None:
        """Take in a block; one of zeros leaves no trace."""
        digest = digest_of(contents)
        if digest is not ZERO_DIGEST:
            self.mask |= 1 << block
            self._checksums.append(xxh3_64_digest(contents))
            self._digests.append(digest)
            self._skip_to(block)
            self._range.update(contents)
            self._next_block += 1

    def _skip_to(self, block: int) -> None:
        """Take the zeros between into the ranges' checksums."""
        while self._next_block < block or not self._next_block % RANGE_BLOCKS:
            if not self._next_block % RANGE_BLOCKS and len(self._ranges) < self._next_block // RANGE_BLOCKS:
                self._ranges.append(self._range.digest())
                self._range.reset()
            if self._next_block >= block:
                return
            step = min(block, self._next_block - self._next_block % RANGE_BLOCKS + RANGE_BLOCKS) - self._next_block
            self._range.update(_ZEROS[: step * BLOCK_SIZE])
            self._next_block += step

    def made(self) -> ObjectSums:
        """The sums of all that was taken in."""
        if self.mask.bit_count() < _RANGES_PAY_BLOCKS:
            return ObjectSums(self.mask, b"".join(self._checksums), b"", b"".join(self._digests))
        self._skip_to(BLOCKS_PER_OBJECT)
        ranges = b"".join(self._ranges)
        return ObjectSums(self.mask, b"".join(self._checksums), ranges, b"".join(self._digests))
