"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import click


def print_json(document: object) -> None:
    """A document on stdout."""
    click.echo(json.dumps(document, indent=1))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout; numbers are to the right where a heading begins with a space."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.strip(), justify="right" if column.startswith(" ") else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(soft_wrap=True)
    console.print(table)
