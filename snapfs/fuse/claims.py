"""What open control files have claimed for themselves, for as long as they are open: a stream is received once."""

from __future__ import annotations

from ..errors import InUseError


class Claims:
    """Who has claimed what in a mount. A holder is told from others by identity."""

    def __init__(self) -> None:
        self._holders: dict[str, object] = {}

    def claim(self, what: str, holder: object) -> None:
        """Have it for a holder alone. Raises InUseError when another has it."""
        if self._holders.setdefault(what, holder) is not holder:
            raise InUseError("this stream is being received already", "Wait until that has ended, or end it")

    def let_go(self, holder: object) -> None:
        """A holder needs nothing any more."""
        self._holders = {what: one for what, one in self._holders.items() if one is not holder}
