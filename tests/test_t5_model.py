"""Any sequence of system calls and commands on a real mount agrees with a model of dictionaries: 200 examples."""

from __future__ import annotations

import pytest

from .realmodel import explore_a_mount

pytestmark = pytest.mark.mount


@pytest.mark.parametrize("seed", range(2))
def test_any_operations_on_a_mount_agree_with_the_model(seed: int) -> None:
    assert explore_a_mount(seed, 100) == 100
