"""Any sequence of operations, power cuts among them, agrees with a model of dictionaries: 2,100 examples."""

from __future__ import annotations

import pytest

from .cramped import cramped
from .model import explore


@pytest.mark.parametrize("seed", range(2))
def test_any_operations_agree_with_the_model(seed: int) -> None:
    explore(seed, 50, in_threads=True)


@pytest.mark.parametrize("seed", range(2, 7))
def test_any_operations_agree_with_the_model_without_threads(seed: int) -> None:
    explore(seed, 380, in_threads=False)


@pytest.mark.parametrize("seed", range(7, 12))
def test_any_operations_agree_with_the_model_where_all_bounds_are_small(seed: int) -> None:
    """What goes over the bounds of caches and batches in large pools only does so here."""
    with cramped():
        explore(seed, 20, in_threads=False)
