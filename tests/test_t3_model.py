"""Any sequence of operations, power cuts among them, agrees with a model of dictionaries: 2,000 examples."""

from __future__ import annotations

import pytest

from .model import explore


@pytest.mark.parametrize("seed", range(2))
def test_any_operations_agree_with_the_model(seed: int) -> None:
    explore(seed, 50, in_threads=True)


@pytest.mark.parametrize("seed", range(2, 7))
def test_any_operations_agree_with_the_model_without_threads(seed: int) -> None:
    explore(seed, 380, in_threads=False)
