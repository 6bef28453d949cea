"""Commands that tidy up behind themselves, whichever way they are told to end."""

from __future__ import annotations

import signal


def end_on_signals() -> None:
    """Have SIGTERM and SIGHUP (a service manager, a lost connection) end the command as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup(1) has it ignored, and means that.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt
