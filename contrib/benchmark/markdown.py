"""Turns the figures that `contrib/bench --json FILE` wrote into tables for docs/performance.md.

Usage: markdown.py FILE...      rows of a later file take the place of those of an earlier one
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def _number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.1f}" if figure >= 10 else f"{figure:.3g}"


def _ratio(row: dict[str, Any], other: str) -> str:
    ratios = row["ratios"][other]
    wanted = row["wanted"].get(other, 0)
    median = statistics.median(ratios)
    shown = f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) < 10 else f"{median:.2f}"
    if not wanted:
        return shown
    is_reached = median <= wanted if row["less_is_better"] else median >= wanted
    bound = f"{'at most' if row['less_is_better'] else 'at least'} {wanted:g}"
    return f"{shown}, {bound}" if is_reached else f"**{shown}**, {bound}"


def rows_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| row | its figure | beside it | | ratio, and what it should be |", "|---|---|---|---|---|"]
    for row in rows:
        own = f"{_number(statistics.median(row['figures'][row['own']]))} {row['unit']}, {row['own']}"
        for other in row["ratios"]:
            figure = _number(statistics.median(row["figures"][other]))
            lines.append(f"| {row['row'] if own else ''} | {own} | {figure} | {other} | {_ratio(row, other)} |")
            own = ""
    return "\n".join(lines)


def facts_table(facts: list[dict[str, Any]]) -> str:
    lines = ["| what | figure | should be at most |", "|---|---|---|"]
    for fact in facts:
        bound = "" if fact["at_most"] is None else f"{fact['at_most']:g}"
        figure = f"{_number(fact['figure'])} {fact['unit']}"
        if fact["at_most"] is not None and fact["figure"] > fact["at_most"]:
            figure = f"**{figure}**"
        lines.append(f"| {fact['row']} | {figure} | {bound} |")
    return "\n".join(lines)


def main() -> None:
    rows: dict[str, dict[str, Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in sys.argv[1:]:
        document = json.loads(Path(name).read_text())
        rows |= {row["row"]: row for row in document["rows"]}
        facts |= {fact["row"]: fact for fact in document["facts"]}
    print(rows_table(list(rows.values())))
    print()
    print(facts_table(list(facts.values())))


if __name__ == "__main__":
    main()
