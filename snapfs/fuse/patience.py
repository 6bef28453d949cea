"""When it pays to wait awake for what may come in a few microseconds. Pure."""

from __future__ import annotations

_MISSES_MAX = 8
_TRY_AGAIN_AFTER = 64


class Patience:
    """Whether to wait awake: as long as it goes well, and now and then to see whether it would."""

    def __init__(self) -> None:
        self._miss_count = 0

    def is_worth_it(self) -> bool:
        """Whether to wait awake this time."""
        if self._miss_count < _MISSES_MAX:
            return True
        self._miss_count += 1
        return self._miss_count % _TRY_AGAIN_AFTER == 0

    def note(self, *, has_come: bool) -> None:
        """How it went."""
        if has_come:
            self._miss_count = 0
        elif self._miss_count < _MISSES_MAX:
            self._miss_count += 1
