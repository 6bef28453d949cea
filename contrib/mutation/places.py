"""Places in a module that can be changed, and how: by the operators of cosmic-ray."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names


@dataclass(frozen=True)
class Mutant:
    """One change of one place; ``line`` counts from 1."""

    module: Path
    operator_name: str
    occurrence: int
    line: int
    column: int

    def code(self, source: str) -> str:
        """The module with the change in it."""
        changed: str | None = mutate_code(source, get_operator(self.operator_name)(), self.occurrence)
        assert changed is not None, self
        return changed


def one_for_each_place(module: Path, source: str, chance: random.Random) -> list[Mutant]:
    """A change of each place of a module, chosen by chance where there are several.

    Annotations are left alone, and whether ``zip`` is strict: an assertion of lengths that never differ. Others leave
    out places of which no test should tell, too (Petrović and Ivanković, "State of Mutation Testing at Google", 2018).
    """
    silent = _silent_places(source)
    places: dict[tuple[int, int], list[Mutant]] = {}
    for mutant in _mutants(module, source):
        place = (mutant.line, mutant.column)
        if not any(start <= place < end for start, end in silent):
            places.setdefault(place, []).append(mutant)
    return [chance.choice(places[place]) for place in sorted(places)]


def _mutants(module: Path, source: str) -> Iterator[Mutant]:
    tree = get_ast(source)
    for name in sorted(operator_names()):
        operator_class = get_operator(name)
        if operator_class.arguments():
            continue
        operator = operator_class()
        places = (place for node in ast_nodes(tree) for place in operator.mutation_positions(node))
        for occurrence, ((line, column), _) in enumerate(places):
            yield Mutant(module, name, occurrence, line, column)


def _silent_places(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From where to where annotations go, which nothing runs, and what zip is told of lengths."""
    found: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            found.append(node.returns)
        elif isinstance(node, ast.keyword) and node.arg == "strict":
            found.append(node.value)
    return [
        ((one.lineno, one.col_offset), (one.end_lineno or one.lineno, one.end_col_offset or one.col_offset))
        for one in found
        if isinstance(one, ast.expr)
    ]


def users_of_constant(source: str, line: int) -> list[int]:
    """Lines that use what a line outside of all functions defines; empty for other lines."""
    tree = ast.parse(source)
    names = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.lineno <= line <= (node.end_lineno or node.lineno)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in names]
