"""JSON of long documents, made in pieces. Pure.

For a thread: the encoder of the standard library is one call into C, half a second for 30 MiB, during which no other
thread runs. Between pieces they do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice

_SMALL = 512
_TOGETHER = 64
_JOINED = 4096
# Of the documents that snapfs makes, what is long lies higher.
_DEPTH_MAX = 8
_CHARACTERS_A_VALUE = 64


def is_small(document: object) -> bool:
    """Whether it is encoded sooner than a thread is begun."""
    return _value_count(document, _SMALL) <= _SMALL


def _value_count(document: object, limit: int) -> int:
    """How many values a document has, counted until there are more than ``limit``; a long text counts as several."""
    if isinstance(document, str):
        return 1 + len(document) // _CHARACTERS_A_VALUE
    count = 1
    if isinstance(document, dict | list | tuple):
        for one in document.values() if isinstance(document, dict) else document:
            if count > limit:
                break
            count += _value_count(one, limit - count)
    return count


def pieces(document: object, depth: int = 0) -> Iterator[str]:
    """What ``json.dumps`` gives, in pieces."""
    if depth == _DEPTH_MAX or not isinstance(document, dict | list | tuple) or is_small(document):
        yield json.dumps(document)
    elif isinstance(document, dict):
        before = "{"
        for key, one in document.items():
            # A key is written as a text, whatever it is.
            yield before + json.dumps({key: 0})[1:-2]
            yield from pieces(one, depth + 1)
            before = ", "
        yield "}"
    else:
        before = "["
        for start in range(0, len(document), _TOGETHER):
            some = document[start : start + _TOGETHER]
            yield before
            if is_small(some):
                yield json.dumps(some)[1:-1]
            else:
                yield from _one_by_one(some, depth + 1)
            before = ", "
        yield "]"


def _one_by_one(entries: Sequence[object], depth: int) -> Iterator[str]:
    """The entries of a list, without its brackets."""
    for place, one in enumerate(entries):
        if place:
            yield ", "
        yield from pieces(one, depth)


def encoded(document: object, bytes_max: int) -> bytes | None:
    """A document as ``json.dumps`` has it; None for one that is longer than that."""
    parts, length = [], 0
    for piece in pieces(document):
        parts.append(piece.encode())
        length += len(parts[-1])
        if length > bytes_max:
            return None
    return b"".join(parts)


def indented(document: object) -> bytes:
    """A document for people, a value a line."""
    # Never the encoder in C, which some versions have for this as well.
    tokens = json.JSONEncoder(indent=1).iterencode(document)
    parts = []
    while part := "".join(islice(tokens, _JOINED)):
        parts.append(part.encode())
    return b"".join(parts)
