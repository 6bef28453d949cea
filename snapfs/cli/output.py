"""Tables for people, JSON for programs."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING
from unicodedata import category

import click

if TYPE_CHECKING:
    from rich.progress import TextColumn

_ANY_NAME = "snapfs-any-name"


def open_closed_streams() -> None:
    """Have no file or pipe get the number of a standard stream that is closed: what is printed would go there."""
    for wanted in range(3):
        try:
            os.fstat(wanted)
        except OSError:
            # The lowest number that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process is there


def print_any_name() -> None:
    """Have no name fail to be printed: bytes that are no text go out as they are, what the encoding lacks escaped."""
    codecs.register_error(_ANY_NAME, _any_name)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors=_ANY_NAME)


def _any_name(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    # PEP 383
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return character.encode("ascii", "backslashreplace").decode(), error.start + 1


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (description_column(), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total or None)


def description_column() -> TextColumn:
    """What a progress bar is of, to the letter: names may look like markup."""
    from rich.progress import TextColumn

    return TextColumn("{task.description}", markup=False)


def print_json(document: object) -> None:
    """A document on stdout."""
    click.echo(json.dumps(document, indent=1))


def printable(text: str) -> str:
    """A text without what would tell a terminal to do something."""
    return "".join(f"\\x{ord(one):02x}" if category(one) == "Cc" else one for one in text)


def say(text: str, *, err: bool = False) -> None:
    """A sentence that has names in it, which tell a terminal nothing. Names alone, for scripts, go out as they are."""
    click.echo("\n".join(printable(line) for line in text.split("\n")), err=err)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout; numbers are to the right where a heading begins with a space."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.strip(), justify="right" if column.startswith(" ") else "left", overflow="fold")
    widest = 0
    for row in rows:
        # Not as markup, which names and notes may look like.
        cells = [Text(printable(cell)) for cell in row]
        table.add_row(*cells)
        widest = max(widest, sum(cell.cell_len + 2 for cell in cells))
    console = Console()
    if not console.is_terminal:
        # A program reads it: a row a line, whatever its length.
        console = Console(width=max(widest, 200))
    console.print(table)
