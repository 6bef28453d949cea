"""What happened, as JSON lines, the latest megabyte of them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable

from .units import iso_time

KEPT_BYTES_MAX = 1 << 20

_log = logging.getLogger("snapfs")


def _ignore_line(offset: int, line: bytes) -> None:
    """Nobody follows."""


def _ignore_cut() -> None:
    """Nobody follows."""


class EventLog:
    """Lines in memory. When they grow too many the older half goes, as when a log is truncated.

    ``on_line`` is called with the offset and the bytes of each new line, ``on_cut`` when the older
    half has gone.
    """

    def __init__(self) -> None:
        self.contents = bytearray()
        self.on_line: Callable[[int, bytes], None] = _ignore_line
        self.on_cut: Callable[[], None] = _ignore_cut

    def note(self, event: str, level: int = logging.INFO, **fields: object) -> None:
        """Add a line, and give it to the log."""
        line = json.dumps({"time": iso_time(time.time_ns()), "event": event, **fields})
        told = line.encode() + b"\n"
        self.contents += told
        self.on_line(len(self.contents) - len(told), told)
        if len(self.contents) > KEPT_BYTES_MAX:
            middle = self.contents.index(b"\n", KEPT_BYTES_MAX // 2) + 1
            del self.contents[:middle]
            self.on_cut()
        _log.log(level, "%s", line)
