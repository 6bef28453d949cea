"""The attacks of the test suite, with any seed, for as long as one likes: ``contrib/soak KIND --seed N --count M``.

Each line tells a seed and what was done with it; the first failure ends it, and tells its seed.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Callable

import trio

from .cramped import cramped
from .damage import Damages, judge_damage
from .faults import CODES, OFTEN_KINDS, RARE_KINDS, TIMES, Faults, countdown, countdown_of_delays
from .fuzz import fuzz_commands, fuzz_readers
from .growth import work_for_long
from .kills import kill_at_random_points
from .model import explore
from .powercut import try_power_cuts
from .powerloss import lose_power_under_clients
from .races import race
from .realmodel import explore_a_mount
from .storm import storm

WORKLOAD_OPERATIONS = 20


def power(seed: int) -> int:
    """Power cuts at every call of one workload."""
    return try_power_cuts(seed, WORKLOAD_OPERATIONS)


def fuzz(seed: int) -> int:
    """Ten thousand inputs for all that reads, and as many lines for the control file."""
    fuzz_readers(seed, 10_000)
    trio.run(fuzz_commands, seed, 10_000)
    return 20_000


def model(seed: int) -> int:
    """A thousand random sequences of operations against the model, with power cuts among them."""
    with cramped() if seed % 4 == 1 else contextlib.nullcontext():
        explore(seed, 1000, in_threads=seed % 4 == 0)
    return 1000


def mount(seed: int) -> int:
    """A hundred random sequences of system calls and commands on a real mount against the model, kills among them."""
    return explore_a_mount(seed, 100)


def growth(seed: int) -> int:
    """Ten thousand rounds of everything on a real mount, whose daemon must not grow."""
    return work_for_long(seed, 10_000)


def faults(seed: int) -> int:
    """Every call to a device of one workload fails, or takes ten seconds, one after the other."""
    kinds = (*RARE_KINDS, *OFTEN_KINDS)
    failed = sum(countdown(Faults(), kind, code, times) for kind in kinds for code in CODES for times in TIMES)
    return failed + sum(countdown_of_delays(Faults(), kind) for kind in kinds)


def damage(seed: int) -> int:
    """A thousand cases of damage to the files of a pool."""
    damages = Damages()
    for number in range(1000):
        judge_damage(damages.strike(seed * 1000 + number))
    return 1000


def clients(seed: int) -> int:
    """SQLite and PostgreSQL on a real mount whose disk loses power, four times."""
    return lose_power_under_clients(seed, rounds=4, snapshots=6, look_into=3)


def kills(seed: int) -> int:
    """The daemon of a real mount is killed a hundred times."""
    return kill_at_random_points(seed, 100)


def races(seed: int) -> int:
    """Clients side by side, in ten orders."""
    return sum(sum(race(seed * 10 + number, 60).values()) for number in range(10))


def storms(seed: int) -> int:
    """Clients side by side with every operation, on devices that fail, until power is lost: ten storms."""
    return sum(sum(storm(seed * 10 + number, 40)[0].values()) for number in range(10))


ATTACKS: dict[str, tuple[Callable[[int], int], str]] = {
    "power": (power, "crash images"),
    "races": (races, "operations"),
    "storms": (storms, "operations"),
    "damage": (damage, "cases"),
    "faults": (faults, "faults"),
    "fuzz": (fuzz, "inputs"),
    "model": (model, "examples"),
    "mount": (mount, "examples"),
    "growth": (growth, "rounds"),
    "kills": (kills, "kills"),
    "clients": (clients, "databases looked at"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = "\n".join(f"{name}: {function.__doc__}" for name, (function, _) in ATTACKS.items())
    parser.epilog = kinds
    parser.add_argument("kind", choices=ATTACKS)
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    parser.add_argument("--count", type=int, help="stop when so many were tried; without it go on until stopped")
    options = parser.parse_args()
    # Stopped by a signal, an attack still takes away what it mounted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    attack, unit = ATTACKS[options.kind]
    seed, total, started = options.seed, 0, time.monotonic()
    while options.count is None or total < options.count:
        found = attack(seed)
        total += found
        print(f"seed {seed}: {found} {unit}, {total} in all, {time.monotonic() - started:.0f} s", flush=True)
        seed += 1


if __name__ == "__main__":
    main()
