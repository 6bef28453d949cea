"""Power loss under real databases, on a real mount."""

from __future__ import annotations

import pytest

from .powerloss import lose_power_under_clients

pytestmark = pytest.mark.mount


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [1, 2])
def test_databases_come_back_from_power_loss_and_from_snapshots(seed: int) -> None:
    assert lose_power_under_clients(seed, rounds=2, snapshots=4, look_into=2) == 18
