"""The format of a snapshot on its way: frames with checksums. Pure; ``docs/stream-format.md`` tells the same in prose.

A stream is the magic, then frames: a header of kind (1 byte), compression (1), length of the
payload as stored (4) and raw (4), little-endian; the payload; a checksum of 128 bits. Each checksum covers
the one before it, the header and the stored payload, so frames cannot be lost, repeated or swapped unnoticed.
The magic says by what: BLAKE3 in version 2, BLAKE2b in version 1, which took longer than all else in sending.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, Protocol

import blake3
import zstandard

from .errors import DamagedError, TooNewError

VERSION = 2
MAGIC = b"snapfs-stream2"
Buffer = bytes | memoryview
BEGIN, VOLUME, DATA, ZERO, END_VOLUME, END = 1, 2, 3, 4, 5, 6
DATA_BYTES_MAX = 1 << 20
_HEADER = struct.Struct("<BBII")
_RANGE = struct.Struct("<QQ")
_DIGEST_BYTES = 16
_STORED, _ZSTD = 0, 1
_PAYLOAD_BYTES_MAX = 64 << 20
# What does not get smaller by a sixteenth in these few places is not compressed: OpenZFS gives up early likewise
# (its "early abort" for zstd, module/zstd/README.md), for trying on the whole takes longer than sending it.
_SAMPLE_COUNT = 4
_SAMPLE_BYTES = 4096


class _Hash(Protocol):
    def update(self, data: Buffer, /) -> object: ...
    def digest(self) -> bytes: ...


class _Blake3:
    """BLAKE3 of 128 bits. O'Connor, Aumasson, Neves, Wilcox-O'Hearn: BLAKE3, one function, fast everywhere, 2020."""

    def __init__(self, data: bytes) -> None:
        self._hash = blake3.blake3(data)

    def update(self, data: Buffer) -> None:
        self._hash.update(data)

    def digest(self) -> bytes:
        return self._hash.digest(length=_DIGEST_BYTES)


def _blake2b(data: bytes) -> _Hash:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES)


_HASHES: dict[bytes, tuple[int, Callable[[bytes], _Hash]]] = {b"snapfs-stream\n": (1, _blake2b), MAGIC: (2, _Blake3)}


class Frame(NamedTuple):
    """One frame: ``fields`` of those with JSON, ``offset`` and ``length`` of DATA and ZERO, ``data`` of DATA."""

    kind: int
    fields: dict[str, Any]
    offset: int = 0
    length: int = 0
    data: bytes = b""


class StreamWriter:
    """Writes frames to a file."""

    def __init__(self, file: IO[bytes], level: int = 3) -> None:
        self._file = file
        self._chain = b""
        self._compressor = zstandard.ZstdCompressor(level=level) if level else None
        self._sampler = zstandard.ZstdCompressor(level=1)
        self.stored_bytes = 0
        self._put(MAGIC)

    def _put(self, data: Buffer) -> None:
        self._file.write(data)
        self.stored_bytes += len(data)

    def _frame(self, kind: int, *parts: Buffer) -> None:
        """A frame with a payload in parts, which are put together only to be compressed."""
        stored, compression = parts, _STORED
        length = sum(len(part) for part in parts)
        if self._compressor is not None and length > 64 and self._gets_smaller(parts[-1]):
            smaller = self._compressor.compress(b"".join(parts))
            if len(smaller) < length:
                stored, compression = (smaller,), _ZSTD
        header = _HEADER.pack(kind, compression, sum(len(part) for part in stored), length)
        self._chain = _checksum(_Blake3, self._chain, header, *stored)
        self._put(header)
        for part in stored:
            self._put(part)
        self._put(self._chain)

    def _gets_smaller(self, data: Buffer) -> bool:
        """Whether samples of it do; of what is short it is not asked."""
        if len(data) <= 2 * _SAMPLE_COUNT * _SAMPLE_BYTES:
            return True
        starts = range(0, len(data) - _SAMPLE_BYTES + 1, (len(data) - _SAMPLE_BYTES) // (_SAMPLE_COUNT - 1))
        sample = b"".join(data[start : start + _SAMPLE_BYTES] for start in starts)
        return len(self._sampler.compress(sample)) * 16 < len(sample) * 15

    def fields(self, kind: int, fields: dict[str, Any]) -> None:
        """A frame of JSON."""
        self._frame(kind, json.dumps(fields).encode())

    def data(self, offset: int, data: Buffer) -> None:
        """A range of a volume, at most DATA_BYTES_MAX."""
        self._frame(DATA, _RANGE.pack(offset, len(data)), data)

    def zero(self, offset: int, length: int) -> None:
        """A range of a volume that reads as zeros."""
        self._frame(ZERO, _RANGE.pack(offset, length))


def read_stream(file: IO[bytes]) -> Iterator[Frame]:
    """The frames of a stream, each checked; the last is of kind END, and then the file has to end as well.

    Raises DamagedError for a stream that is cut off or was changed, TooNewError for one of a later version.
    """
    magic = _take(file, len(MAGIC))
    if magic not in _HASHES:
        raise DamagedError("this is no stream of snapfs, or of a later version", "Make one with snapfs send")
    version, new_hash = _HASHES[magic]
    chain = b""
    kind = 0
    while kind != END:
        header = _take(file, _HEADER.size)
        kind, compression, stored_length, length = _HEADER.unpack(header)
        if max(stored_length, length) > _PAYLOAD_BYTES_MAX:
            raise DamagedError("the stream is damaged: a frame of impossible length", _AGAIN)
        stored = _take(file, stored_length)
        chain = _checksum(new_hash, chain, header, stored)
        if _take(file, _DIGEST_BYTES) != chain:
            raise DamagedError("the stream is damaged: a checksum is wrong", _AGAIN)
        yield _decoded(version, kind, _expanded(compression, stored, length))
    if file.read(1):
        # A second stream, say, which nobody would receive.
        raise DamagedError("there is something behind the end of the stream", "Receive one stream after the other")


def _checksum(new_hash: Callable[[bytes], _Hash], before: bytes, header: bytes, *stored: Buffer) -> bytes:
    found = new_hash(before)
    found.update(header)
    for part in stored:
        found.update(part)
    return found.digest()


_AGAIN = "Send it again; with a resume token it goes on where it stopped"


def _expanded(compression: int, stored: bytes, length: int) -> bytes:
    """What was stored, raw. What says to be longer than the header tells is not even tried."""
    if compression == _STORED and len(stored) == length:
        return stored
    if compression == _STORED:
        raise DamagedError("the stream is damaged: a frame of another length than it says", _AGAIN)
    if compression != _ZSTD:
        raise TooNewError("the stream is of a later version", "Receive it with a later snapfs")
    try:
        if zstandard.frame_content_size(stored) != length:
            raise DamagedError("the stream is damaged: a frame of another length than it says", _AGAIN)
        return zstandard.ZstdDecompressor().decompress(stored, max_output_size=length)
    except zstandard.ZstdError as error:
        raise DamagedError(f"the stream is damaged: {error}", _AGAIN) from error


def _decoded(version: int, kind: int, payload: bytes) -> Frame:
    if kind in (DATA, ZERO):
        if len(payload) < _RANGE.size:
            raise DamagedError("the stream is damaged: a frame is too short", _AGAIN)
        offset, length = _RANGE.unpack_from(payload)
        data = payload[_RANGE.size :]
        if kind == DATA and len(data) != length:
            raise DamagedError("the stream is damaged: a frame is too short", _AGAIN)
        return Frame(kind, {}, offset, length, data)
    if not BEGIN <= kind <= END:
        raise TooNewError(f"the stream is of a later version: it has a frame of kind {kind}", "Use a later snapfs")
    try:
        fields = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise DamagedError("the stream is damaged: a frame is not JSON", _AGAIN) from error
    if not isinstance(fields, dict):
        raise DamagedError("the stream is damaged: a frame is not an object", _AGAIN)
    if kind == BEGIN and fields.get("version") != version:
        if fields.get("version") in (1, VERSION):
            raise DamagedError("the stream is damaged: it says to be of two versions", _AGAIN)
        raise TooNewError(f"the stream has version {fields.get('version')}, this snapfs reads {VERSION}", "Update it")
    return Frame(kind, fields)


def _take(file: IO[bytes], length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        part = file.read(length - len(found))
        if not part:
            raise DamagedError("the stream is cut off", _AGAIN)
        found += part
    return bytes(found)
