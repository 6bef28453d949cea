"""Figures of rows, and how they are shown."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


def file_to_write(path: str) -> Path:
    """Of an option: refused at once where it cannot be, and not when all is measured."""
    if not Path(path).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(Path(path).parent)!r}")
    return Path(path)


@dataclass
class Result:
    """A row: its figures by subject, a figure each round; and the ratios it should reach.

    ``wanted`` has, by the other subject, what the ratio of ``own`` to it should be at least, or at most where
    ``less_is_better``. 0 is shown and not judged.
    """

    row: str
    unit: str
    own: str
    wanted: dict[str, float] = field(default_factory=dict)
    less_is_better: bool = False
    figures: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    def add(self, subject: str, figure: float) -> None:
        self.figures.setdefault(subject, []).append(figure)

    def median(self, subject: str) -> float:
        return statistics.median(self.figures[subject])

    def ratios(self, other: str) -> list[float]:
        """Round by round: both ran one right after the other."""
        return [a / b for a, b in zip(self.figures[self.own], self.figures[other], strict=False) if b]

    def reaches(self, other: str) -> bool | None:
        wanted = self.wanted.get(other, 0.0)
        if not wanted:
            return None
        ratio = statistics.median(self.ratios(other))
        return ratio <= wanted if self.less_is_better else ratio >= wanted

    def as_json(self) -> dict[str, object]:
        others = [one for one in self.figures if one != self.own]
        return {
            "row": self.row,
            "unit": self.unit,
            "own": self.own,
            "less_is_better": self.less_is_better,
            "figures": self.figures,
            "ratios": {other: self.ratios(other) for other in others},
            "wanted": self.wanted,
            "note": self.note,
        }


@dataclass
class Fact:
    """A figure that stands alone, and the bound it should keep, if there is one."""

    row: str
    figure: float
    unit: str
    at_most: float | None = None

    def as_json(self) -> dict[str, object]:
        return {"row": self.row, "figure": self.figure, "unit": self.unit, "at_most": self.at_most}


def _number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:,.2f}" if figure >= 1 else f"{figure:.3f}"


def _verdict(is_reached: bool | None) -> str:
    return {None: "", True: "yes", False: "[bold]no[/bold]"}[is_reached]


def show(results: list[Result], facts: list[Fact]) -> None:
    """Tables on the terminal."""
    console = Console(width=150)
    table = Table(
        title="medians; the ratio is of the first figure to the second, with its least and greatest of a round"
    )
    for column in ("row", "own", "", "other", "", "ratio", "least", "greatest", "wanted", "reached"):
        table.add_column(column, justify="left" if column in ("row", "") else "right")
    for result in results:
        first = True
        for other in result.figures:
            if other == result.own:
                continue
            ratios = result.ratios(other)
            wanted = result.wanted.get(other, 0.0)
            sign = "≤" if result.less_is_better else "≥"
            table.add_row(
                f"{result.row} ({result.unit})" if first else "",
                _number(result.median(result.own)) if first else "",
                result.own if first else "",
                _number(result.median(other)),
                other,
                f"{statistics.median(ratios):.2f}" if ratios else "-",
                f"{min(ratios):.2f}" if ratios else "-",
                f"{max(ratios):.2f}" if ratios else "-",
                f"{sign} {wanted:.2f}" if wanted else "",
                _verdict(result.reaches(other)),
            )
            first = False
        table.add_section()
    if results:
        console.print(table)
    fact_table = Table(title="figures that stand alone")
    for column in ("row", "figure", "", "wanted", "reached"):
        fact_table.add_column(column, justify="right" if column == "figure" else "left")
    for fact in facts:
        is_reached = None if fact.at_most is None else fact.figure <= fact.at_most
        bound = "" if fact.at_most is None else f"≤ {_number(fact.at_most)}"
        fact_table.add_row(fact.row, _number(fact.figure), fact.unit, bound, _verdict(is_reached))
    if facts:
        console.print(fact_table)
    for note in dict.fromkeys(result.note for result in results if result.note):
        console.print(f"* {note}")
