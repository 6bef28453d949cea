"""What happened, as JSON lines, the latest megabyte of them."""

from __future__ import annotations

import json
import logging
import time

from .units import iso_time

KEPT_BYTES_MAX = 1 << 20

_log = logging.getLogger("snapfs")


class EventLog:
    """Lines in memory. When they grow too many the older half goes, as when a log is truncated."""

    def __init__(self) -> None:
        self.contents = bytearray()

    def note(self, event: str, level: int = logging.INFO, **fields: object) -> None:
        """Add a line, and give it to the log."""
        line = json.dumps({"time": iso_time(time.time_ns()), "event": event, **fields})
        self.contents += line.encode() + b"\n"
        if len(self.contents) > KEPT_BYTES_MAX:
            middle = self.contents.index(b"\n", KEPT_BYTES_MAX // 2) + 1
            del self.contents[:middle]
        _log.log(level, "%s", line)
