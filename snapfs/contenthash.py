"""A hash of what a volume holds that follows changes: MuHash. Pure.

Each object that is not all zeros is an element: its number and the digests of its blocks, hashed to
a number below a prime of 3072 bits. The hash of a set of elements is their product modulo that prime, so
an object that changed is divided out and multiplied in again, whatever the size of the volume,
and the parts of several processors are combined by multiplying them (Bellare and Micciancio, "A New
Paradigm for Collision-Free Hashing", EUROCRYPT 1997; Bitcoin Core keeps its set of coins so). Finding two
contents with the same hash is as hard as discrete logarithms in that group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

# The largest safe distance below 2**3072 that gives a prime.
PRIME = 2**3072 - 1103717
VALUE_BYTES = 384


def element_of(object_index: int, digests: bytes) -> int:
    """The number that stands for an object with these digests, one a block; 1 if all are of zeros."""
    if not any(digests):
        return 1
    key = hashlib.blake2b(
        object_index.to_bytes(8, "little") + digests, digest_size=32, person=b"snapfs object"
    ).digest()
    return int.from_bytes(hashlib.shake_256(key).digest(VALUE_BYTES), "little") % PRIME


class ContentHash:
    """The hash of a set of objects, as a number below the prime."""

    def __init__(self, value: int = 1) -> None:
        self.value = value

    def replace(self, old: Iterable[int], new: Iterable[int]) -> None:
        """Take elements out and others in."""
        gone = 1
        for element in old:
            gone = gone * element % PRIME
        value = self.value
        for element in new:
            value = value * element % PRIME
        self.value = value * pow(gone, -1, PRIME) % PRIME if gone != 1 else value

    def combine(self, other: int) -> None:
        """Take in another part."""
        self.value = self.value * other % PRIME

    def encoded(self) -> bytes:
        """The value as bytes."""
        return self.value.to_bytes(VALUE_BYTES, "little")


def root_of(volumes: Iterable[tuple[bytes, int, int]]) -> str:
    """The root over volumes, each as ``(name, size in bytes, content hash)``, in hexadecimal."""
    root = hashlib.blake2b(digest_size=32, person=b"snapfs root")
    for name, size_bytes, value in sorted(volumes):
        root.update(len(name).to_bytes(2, "little") + name + size_bytes.to_bytes(8, "little"))
        root.update(value.to_bytes(VALUE_BYTES, "little"))
    return root.hexdigest()
