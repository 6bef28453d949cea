"""Names of files are UTF-8 to snapfs, whatever the user's locale takes them for."""

from __future__ import annotations

import os
import sys


def use_utf8() -> None:
    """Begin anew in Python's UTF-8 mode (PEP 540) where names are to be decoded otherwise.

    Names go through JSON, streams and the control file as UTF-8: a file called by the bytes of another encoding would
    be told, and asked for, by other bytes. What is started from here inherits it.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, sys.orig_argv)
