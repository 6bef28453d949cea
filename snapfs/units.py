"""Sizes, times and names as users write and read them. Pure."""

from __future__ import annotations

import contextlib
import re
from datetime import UTC, datetime

from .errors import BadCommandError, BadNameError, NameTooLongError, ReservedNameError, TooLargeError

NAME_MAX_BYTES = 255
OFFSET_MAX = (1 << 63) - 1
# What a snapshot's folder holds beside its volumes.
MANIFEST_NAME = b".manifest.json"
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SIZE = re.compile(r"\s*([0-9]{1,20})\s*(?:([kmgtpe])(i?b)?|b)?\s*", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]{1,9})([smhdw]?)")
_DURATION_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_MOMENT_FORMS = (
    "%Y-%m-%dT%H:%M:%SZ",
    "%Y-%m-%dT%H:%M:%S",
    "%Y-%m-%dT%H%M%SZ",
    "%Y-%m-%dT%H:%MZ",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%d",
    "GMT-%Y.%m.%d-%H.%M.%S",
)
_POWERS = {"k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


def parse_size(text: str) -> int:
    """Bytes of ``10G``, ``512M``, ``4096``; units are powers of 1024.

    Raises BadCommandError, or TooLargeError above 8 EiB.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise BadCommandError(f"{text!r} is not a size", "Write bytes, or a number with K, M, G or T: 10G")
    number, unit, _ = match.groups()
    size_bytes = int(number) << _POWERS.get((unit or "").lower(), 0)
    if size_bytes > OFFSET_MAX:
        raise TooLargeError(f"{text.strip()} is more than any file can hold", "Give a smaller size")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """A size for people: ``0``, ``512 B``, ``1.5 GiB``."""
    if abs(size_bytes) < 1024:
        return f"{size_bytes} B" if size_bytes else "0"
    power = min((abs(size_bytes).bit_length() - 1) // 10, len(_UNITS))
    return f"{size_bytes / (1 << 10 * power):.1f} {_UNITS[power - 1]}"


def parse_duration(text: str) -> int:
    """Seconds of ``15m``, ``1h``, ``30s``, ``2d``, ``1w``, ``900``. Raises BadCommandError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise BadCommandError(f"{text[:64]!r} is not a length of time", "Write it as 30s, 15m, 1h, 1d or 1w")
    return int(match[1]) * _DURATION_S[match[2] or "s"]


def parse_moment(text: str, now_ns: int) -> int:
    """The moment that ``2026-11-22T08:31:13Z``, ``1h`` (ago), ``latest`` or ``GMT-2026.11.22-08.31.13`` names.

    All are UTC; a date alone is its first moment. The last form is that of Samba's shadow_copy2. The
    end of the second that is named counts. Raises BadNameError.
    """
    if text == "latest":
        return OFFSET_MAX
    if _DURATION.fullmatch(text):
        return now_ns - parse_duration(text) * 1_000_000_000
    for form in _MOMENT_FORMS:
        with contextlib.suppress(ValueError):
            found = datetime.strptime(text, form).replace(tzinfo=UTC)
            return (int(found.timestamp()) + (1 if "%S" in form else 0)) * 1_000_000_000 - ("%S" in form)
    raise BadNameError(f"{text[:64]!r} is not a moment", "Write @2026-11-22T08:31:13Z, @1h or @latest")


def utc_name(when_ns: int) -> str:
    """The name of a snapshot that was given none: ``2026-11-22T083113Z``."""
    return datetime.fromtimestamp(when_ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H%M%SZ")


def storable_ns(when_ns: int) -> int:
    """A moment, or the nearest that 64 bits of nanoseconds can tell, of 1677 to 2262, as ext4 does with its span."""
    return max(-(1 << 63), min(when_ns, (1 << 63) - 1))


def iso_time(when_ns: int) -> str:
    """A moment in UTC to the millisecond: ``2026-11-22T08:31:13.042Z``."""
    seconds, rest = divmod(when_ns, 1_000_000_000)
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{rest // 1_000_000:03d}Z"


def show_name(name: bytes) -> str:
    """A name for messages and JSON; bytes that are not UTF-8 become lone surrogates (PEP 383)."""
    return name.decode("utf-8", "surrogateescape")


def check_path(path: str) -> str:
    """A path that a database can keep and open, or BadNameError."""
    if not is_text(path):
        raise BadNameError(f"the path {path!r} is not text in UTF-8", "Rename what it leads through; nothing was done")
    return path


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8, and so kept as text: no bytes that came as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_tag(tag: str) -> str:
    """The tag of a hold, if it can be one: 1 to 255 bytes, no control characters. Raises BadNameError."""
    encoded = tag.encode("utf-8", "surrogateescape")
    if not encoded or len(encoded) > NAME_MAX_BYTES or any(byte < 0x20 or byte == 0x7F for byte in encoded):
        raise BadNameError(f"{tag[:64]!r} cannot be a tag", "Give 1 to 255 bytes without control characters")
    if not is_text(tag):
        raise BadNameError(f"the tag {tag[:64]!r} is not text in UTF-8", "Write it in UTF-8")
    return tag


def check_name(name: bytes, kind: str) -> bytes:
    """The name, if a volume or snapshot can have it. ``kind`` is the word for messages.

    Names are bytes: any that are not control characters, of 1 to 255. A leading ``.`` is kept for
    snapfs, a leading ``@`` for moments in time. Raises BadNameError, NameTooLongError or
    ReservedNameError.
    """
    shown = show_name(name)[:64]
    if not name:
        raise BadNameError(f"a {kind} needs a name", "Give it one of 1 to 255 bytes")
    if len(name) > NAME_MAX_BYTES:
        raise NameTooLongError(f"the {kind} name {shown!r}... has {len(name)} bytes", f"Use at most {NAME_MAX_BYTES}")
    if b"/" in name:
        raise BadNameError(f"the {kind} name {shown!r} has a slash", "Volumes and snapshots lie in one folder")
    if any(byte < 0x20 or byte == 0x7F for byte in name):
        raise BadNameError(f"the {kind} name {shown!r} has a control character", "Leave it out")
    if name in (b".snapshots", b".snapfs") or (name == MANIFEST_NAME and kind == "volume"):
        raise ReservedNameError(f"{shown!r} is snapfs' own", "Choose another name")
    if name[:1] == b".":
        if kind == "snapshot" or name in (b".", b".."):
            raise BadNameError(f"the {kind} name {shown!r} begins with a dot", "Choose another first letter")
    elif name[:1] == b"@" and kind == "snapshot":
        raise BadNameError(f"the {kind} name {shown!r} begins with @", "@ is kept for moments in time")
    return name
