"""Places in a module that can be changed, and how: by the operators of cosmic-ray."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

# Of small numbers and None these give the same.
_SAME_FOR_NUMBERS = ("_Eq_Is", "_NotEq_IsNot", "_Is_Eq", "_IsNot_NotEq")
_SILENT_KEYWORDS = ("strict", "slots", "frozen")


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


def one_for_each_place(
    module: Path, source: str, chance: random.Random, free_constants: frozenset[str] = frozenset()
) -> list[Mutant]:
    """A change of each place of a module, chosen by chance where there are several.

    Annotations are left alone, and what is told of nothing but how: whether ``zip`` is strict (an assertion of lengths
    that never differ), and whether a dataclass has slots or is frozen. Others leave out places of which no test should
    tell, too (Petrović and Ivanković, "State of Mutation Testing at Google", 2018). So are ``free_constants``: bounds
    for which any value is right.
    """
    silent = _silent_places(source, free_constants)
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
        if operator_class.arguments() or name.endswith(_SAME_FOR_NUMBERS):
            continue
        operator = operator_class()
        places = (place for node in ast_nodes(tree) for place in operator.mutation_positions(node))
        for occurrence, ((line, column), _) in enumerate(places):
            yield Mutant(module, name, occurrence, line, column)


def _silent_places(source: str, free_constants: frozenset[str]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From where to where annotations go, which nothing runs, and what such keywords and constants are given."""
    found: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            found.append(node.returns)
        elif _is_silent(node, free_constants):
            found.append(node.value)
    return [
        ((one.lineno, one.col_offset), (one.end_lineno or one.lineno, one.end_col_offset or one.col_offset))
        for one in found
        if isinstance(one, ast.expr)
    ]


def _is_silent(node: ast.AST, free_constants: frozenset[str]) -> TypeGuard[ast.keyword | ast.Assign]:
    if isinstance(node, ast.keyword):
        return node.arg in _SILENT_KEYWORDS
    return isinstance(node, ast.Assign) and any(
        isinstance(one, ast.Name) and one.id in free_constants for one in node.targets
    )


def strings_in(source: str) -> frozenset[str]:
    """All texts of a module."""
    return frozenset(
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


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
