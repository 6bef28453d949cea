"""What a stream says before its data, and the words and numbers that it may have. Nothing is believed unseen."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from .errors import DamagedError, SnapfsError
from .units import OFFSET_MAX, check_name, storable_ns

# The largest number of all is chown(2)'s word for none.
_ID_MAX = (1 << 32) - 2
SEND_AGAIN = "Send it again"


@dataclass(frozen=True, slots=True)
class StreamVolume:
    """A volume as a stream announces it. ``base_name`` is what it is called in the base, None where it is new."""

    name: str
    base_name: str | None
    size_bytes: int
    mode: int
    uid: int
    gid: int
    atime_ns: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class StreamHead:
    """What a stream says before its data. ``gone`` are volumes of the base that the snapshot does not hold."""

    guid: str
    name: str
    note: str
    base_guid: str | None
    base_name: str
    volumes: tuple[StreamVolume, ...]
    gone: tuple[str, ...]
    resume: tuple[int, int] | None


def parse_head(fields: dict[str, Any]) -> StreamHead:
    """The head of a stream, with nothing in it that could lead out of the mount. Raises DamagedError."""
    try:
        snapshot, base, resume = fields["snapshot"], fields["base"], fields["resume"]
        volumes = tuple(parse_volume(one) for one in fields["volumes"])
        gone = tuple(volume_name(one) for one in fields["gone"])
        head = StreamHead(
            text_of(snapshot["guid"]),
            text_of(snapshot["name"]),
            text_of(snapshot["note"], empty=True),
            None if base is None else text_of(base["guid"]),
            "" if base is None else text_of(base["name"]),
            volumes,
            gone,
            None if resume is None else (number_of(resume[0]), number_of(resume[1])),
        )
        check_name(os.fsencode(head.name), "snapshot")
    except (KeyError, TypeError, ValueError, IndexError, SnapfsError) as error:
        raise DamagedError(f"the stream is damaged: its head is not as it should be ({error})", SEND_AGAIN) from error
    before = [one.base_name for one in volumes if one.base_name is not None] + list(gone)
    after = [one.name for one in volumes]
    if len(set(before)) != len(before) or len(set(after)) != len(after) or (before and head.base_guid is None):
        raise DamagedError("the stream is damaged: it names a volume twice, or one of no base", SEND_AGAIN)
    return head


def parse_volume(one: dict[str, Any]) -> StreamVolume:
    """A volume of the head. Raises KeyError, TypeError, ValueError, BadNameError."""
    base_name = one["base_name"]
    return StreamVolume(
        volume_name(one["name"]),
        None if base_name is None else volume_name(base_name),
        number_of(one["size_bytes"]),
        number_of(one["mode"]) & 0o777,
        user_of(one["uid"]),
        user_of(one["gid"]),
        moment_of(one["atime_ns"]),
        moment_of(one["mtime_ns"]),
    )


def volume_name(value: object) -> str:
    """A name that a volume may have. Raises ValueError, BadNameError."""
    text = text_of(value)
    check_name(os.fsencode(text), "volume")
    return text


def text_of(value: object, *, empty: bool = False) -> str:
    """Text of a bearable length. Raises ValueError."""
    if not isinstance(value, str) or len(value) > 65536 or (not value and not empty):
        raise ValueError(f"{value!r:.60} is no name")
    # Nothing that could not be handed over.
    os.fsencode(value)
    return value


def moment_of(value: object) -> int:
    """Nanoseconds since 1970 that the catalog can keep. Raises ValueError."""
    if not isinstance(value, int) or value != storable_ns(value):
        raise ValueError(f"{value!r:.60} is no time")
    return value


def user_of(value: object) -> int:
    """The number of a user or of a group. Raises ValueError."""
    if number_of(value) > _ID_MAX:
        raise ValueError(f"{value!r:.60} is no user or group")
    return number_of(value)


def number_of(value: object) -> int:
    """A size, an offset or a count. Raises ValueError."""
    if not isinstance(value, int) or not 0 <= value <= OFFSET_MAX:
        raise ValueError(f"{value!r:.60} is no number")
    return value
