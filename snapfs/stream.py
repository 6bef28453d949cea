"""The format of a snapshot on its way: frames with checksums. Pure; ``docs/stream-format.md`` tells the same in prose.

A stream is the magic, then frames: a header of kind (1 byte), compression (1), length of the
payload as stored (4) and raw (4), little-endian; the payload; a BLAKE2b-128 checksum. Each checksum covers
the one before it, the header and the stored payload, so frames cannot be lost, repeated or swapped unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import zstandard

from .errors import DamagedError, TooNewError

MAGIC = b"snapfs-stream\n"
VERSION = 1
Buffer = bytes | memoryview
BEGIN, VOLUME, DATA, ZERO, END_VOLUME, END = 1, 2, 3, 4, 5, 6
DATA_BYTES_MAX = 1 << 20
_HEADER = struct.Struct("<BBII")
_RANGE = struct.Struct("<QQ")
_DIGEST_BYTES = 16
_STORED, _ZSTD = 0, 1
_PAYLOAD_BYTES_MAX = 64 << 20


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
        self.stored_bytes = 0
        self._put(MAGIC)

    def _put(self, data: Buffer) -> None:
        self._file.write(data)
        self.stored_bytes += len(data)

    def _frame(self, kind: int, *parts: Buffer) -> None:
        """A frame with a payload in parts, which are put together only to be compressed."""
        stored, compression = parts, _STORED
        length = sum(len(part) for part in parts)
        if self._compressor is not None and length > 64:
            smaller = self._compressor.compress(b"".join(parts))
            if len(smaller) < length:
                stored, compression = (smaller,), _ZSTD
        header = _HEADER.pack(kind, compression, sum(len(part) for part in stored), length)
        self._chain = _checksum(self._chain, header, *stored)
        self._put(header)
        for part in stored:
            self._put(part)
        self._put(self._chain)

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
    """The frames of a stream, each checked; the last is of kind END.

    Raises DamagedError for a stream that is cut off or was changed, TooNewError for one of a later version.
    """
    if _take(file, len(MAGIC)) != MAGIC:
        raise DamagedError("this is no stream of snapfs", "Make one with snapfs send")
    chain = b""
    kind = 0
    while kind != END:
        header = _take(file, _HEADER.size)
        kind, compression, stored_length, length = _HEADER.unpack(header)
        if max(stored_length, length) > _PAYLOAD_BYTES_MAX:
            raise DamagedError("the stream is damaged: a frame of impossible length", _AGAIN)
        stored = _take(file, stored_length)
        chain = _checksum(chain, header, stored)
        if _take(file, _DIGEST_BYTES) != chain:
            raise DamagedError("the stream is damaged: a checksum is wrong", _AGAIN)
        yield _decoded(kind, _expanded(compression, stored, length))


def _checksum(before: bytes, header: bytes, *stored: Buffer) -> bytes:
    found = hashlib.blake2b(before, digest_size=_DIGEST_BYTES)
    found.update(header)
    for part in stored:
        found.update(part)
    return found.digest()


_AGAIN = "Send it again; with a resume token it goes on where it stopped"


def _expanded(compression: int, stored: bytes, length: int) -> bytes:
    if compression == _STORED:
        return stored
    if compression != _ZSTD:
        raise TooNewError("the stream is of a later version", "Receive it with a later snapfs")
    try:
        return zstandard.ZstdDecompressor().decompress(stored, max_output_size=length)
    except zstandard.ZstdError as error:
        raise DamagedError(f"the stream is damaged: {error}", _AGAIN) from error


def _decoded(kind: int, payload: bytes) -> Frame:
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
    except ValueError as error:
        raise DamagedError("the stream is damaged: a frame is not JSON", _AGAIN) from error
    if not isinstance(fields, dict):
        raise DamagedError("the stream is damaged: a frame is not an object", _AGAIN)
    if kind == BEGIN and fields.get("version") != VERSION:
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
