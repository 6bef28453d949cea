"""Checksums of sealed blocks, and what a snapshot's root is made of. Pure.

A sealed block has two: eight bytes of XXH3 (https://github.com/Cyan4973/xxHash), which every read of it is
held against, and sixteen of BLAKE2b (RFC 7693), which nobody can forge and of which roots are made.
A block of zeros has neither: what has none must be zeros.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from xxhash import xxh3_64_digest

from .errors import DamagedError
from .geometry import BLOCK_SHIFT, BLOCK_SIZE, BLOCKS_PER_OBJECT

CHECKSUM_BYTES = 8
DIGEST_BYTES = 16
MASK_BYTES = BLOCKS_PER_OBJECT // 8
ZERO_DIGEST = bytes(DIGEST_BYTES)
_ZERO_BLOCK = bytes(BLOCK_SIZE)
_ZEROS = bytes(BLOCK_SIZE * BLOCKS_PER_OBJECT)
_FULL_MASK = (1 << BLOCKS_PER_OBJECT) - 1


def digest_of(block: bytes | bytearray | memoryview) -> bytes:
    """The digest of a block; zeros for one of zeros."""
    if block == _ZERO_BLOCK:
        return ZERO_DIGEST
    return hashlib.blake2b(block, digest_size=DIGEST_BYTES, person=b"snapfs block").digest()


@dataclass(frozen=True, slots=True)
class ObjectSums:
    """The checksums of one object's blocks in one change log.

    ``mask`` has a bit for each block that has one; ``checksums`` and ``digests`` are theirs, in order.
    ``digests`` is empty where it was not asked for.
    """

    mask: int
    checksums: bytes
    digests: bytes = b""

    @classmethod
    def decode(cls, mask: object, checksums: object, digests: object = None) -> ObjectSums:
        """What a store keeps. Raises DamagedError when it cannot be."""
        if not (isinstance(mask, bytes) and isinstance(checksums, bytes) and len(mask) == MASK_BYTES):
            raise DamagedError("checksums of an object cannot be read", "Unmount and run snapfs check")
        bits = int.from_bytes(mask, "little")
        count = bits.bit_count()
        if len(checksums) != count * CHECKSUM_BYTES:
            raise DamagedError("checksums of an object are cut off", "Unmount and run snapfs check")
        if digests is None:
            return cls(bits, checksums)
        if not isinstance(digests, bytes) or len(digests) != count * DIGEST_BYTES:
            raise DamagedError("digests of an object are cut off", "Unmount and run snapfs check")
        return cls(bits, checksums, digests)

    def encoded_mask(self) -> bytes:
        """The mask as a store keeps it."""
        return self.mask.to_bytes(MASK_BYTES, "little")

    @property
    def size_bytes(self) -> int:
        """What it takes in memory, about."""
        return 200 + MASK_BYTES + len(self.checksums) + len(self.digests)

    def matches(self, first: int, view: memoryview) -> bool:
        """Whether whole blocks from ``first`` on are what was sealed."""
        count = len(view) >> BLOCK_SHIFT
        mask = self.mask
        wanted = ((1 << count) - 1) << first
        present = mask & wanted
        if present == wanted:
            at = first if mask == _FULL_MASK else (mask & ((1 << first) - 1)).bit_count()
            at *= CHECKSUM_BYTES
            if count == 1:
                return xxh3_64_digest(view) == self.checksums[at : at + CHECKSUM_BYTES]
            found = b"".join([xxh3_64_digest(view[one : one + BLOCK_SIZE]) for one in range(0, len(view), BLOCK_SIZE)])
            return found == self.checksums[at : at + count * CHECKSUM_BYTES]
        if not present:
            return view == _ZEROS[: len(view)]
        return self.first_wrong(first, view) is None

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


class SumsMaker:
    """Collects the sums of one object, block by block in order."""

    def __init__(self) -> None:
        self.mask = 0
        self._checksums: list[bytes] = []
        self._digests: list[bytes] = []

    def add(self, block: int, contents: memoryview) -> None:
        """Take in a block; one of zeros leaves no trace."""
        digest = digest_of(contents)
        if digest is not ZERO_DIGEST:
            self.mask |= 1 << block
            self._checksums.append(xxh3_64_digest(contents))
            self._digests.append(digest)

    def made(self) -> ObjectSums:
        """The sums of all that was taken in."""
        return ObjectSums(self.mask, b"".join(self._checksums), b"".join(self._digests))
