"""Schedules: when snapshots are due, and which of them are kept. Pure; all in UTC.

A period begins at multiples of its length since 1970, weeks on Mondays, or at a time of day. What is kept is told by
calendar periods, as in ``24h,30d,12m,5y``: of each of the last 24 hours that have snapshots the newest, and so on
(the rule of borg prune, https://borgbackup.readthedocs.io/en/stable/usage/prune.html).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

from .errors import BadCommandError, DamagedError
from .units import check_name, is_text, parse_duration, show_name

SECOND_NS = 1_000_000_000
_DAY_S = 86400
_WEEK_S = 7 * _DAY_S
# 1970 began on a Thursday; weeks begin on Mondays (ISO 8601).
_FIRST_MONDAY_S = 4 * _DAY_S
EVERY_S_MAX = 36525 * _DAY_S
_KEEP = re.compile(r"(\d{1,6})([hdwmy]?)")
_AT = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")
_T = TypeVar("_T")


class Keep(NamedTuple):
    """Keep the newest of each of the last so many periods of a ``unit``; with no unit the newest so many."""

    period_count: int
    unit: str


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a snapshot is made, of what, and how long it stays.

    ``volumes`` empty: of all. ``keep`` empty: for ever. ``offset_s``: where in its period it is due.
    """

    name: str
    every_s: int
    offset_s: int = 0
    volumes: tuple[str, ...] = ()
    keep: tuple[Keep, ...] = ()
    hold_tags: tuple[str, ...] = ()
    skips_unchanged: bool = False

    def due_ns(self, now_ns: int) -> int:
        """The last moment at or before now at which a snapshot is due."""
        begin_s = self.offset_s + (_FIRST_MONDAY_S if self.every_s % _WEEK_S == 0 else 0)
        every_ns, offset_ns = self.every_s * SECOND_NS, begin_s * SECOND_NS
        return (now_ns - offset_ns) // every_ns * every_ns + offset_ns

    def is_due(self, last_run_ns: int, now_ns: int) -> bool:
        """Whether a snapshot is to be made now: once, however many moments were missed.

        A last run that lies more than a period ahead is of a clock that was wrong.
        """
        return last_run_ns < self.due_ns(now_ns) or last_run_ns > now_ns + self.every_s * SECOND_NS

    def next_ns(self, last_run_ns: int, now_ns: int) -> int:
        """When one is due again."""
        if self.is_due(last_run_ns, now_ns):
            return now_ns
        # A last run that lies ahead, of a clock that was set back since, is waited for.
        return self.due_ns(max(now_ns, last_run_ns)) + self.every_s * SECOND_NS

    def to_json(self) -> str:
        """The rule as the catalog keeps it."""
        fields = asdict(self)
        del fields["name"]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, name: str, text: str) -> Schedule:
        """Read it. Raises DamagedError."""
        try:
            fields = json.loads(text)
            found = cls(
                name,
                int(fields["every_s"]),
                int(fields["offset_s"]),
                _texts(fields["volumes"]),
                tuple(_kept(*one) for one in fields["keep"]),
                _texts(fields["hold_tags"]),
                bool(fields["skips_unchanged"]),
            )
            # Earlier versions took longer periods than are taken now.
            if not 1 <= found.every_s < 1 << 62 or not 0 <= found.offset_s <= _DAY_S:
                raise ValueError(found.every_s)
            return found
        except (BadCommandError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise DamagedError(f"the rule of schedule {name!r} is damaged", "Remove it and add it again") from error


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise TypeError(values)
    return tuple(values)


def _kept(period_count: object, unit: object) -> Keep:
    (keep,) = parse_keep(f"{period_count}{unit}")
    return keep


def make_schedule(
    name: str,
    every: str,
    at: str | None = None,
    volumes: Iterable[str] = (),
    keep: str = "",
    hold_tags: Iterable[str] = (),
    *,
    skips_unchanged: bool = False,
) -> Schedule:
    """A schedule as a user writes it. Raises BadCommandError, BadNameError."""
    # The name of its snapshots begins with it.
    check_name(name.encode("utf-8", "surrogateescape"), "snapshot")
    if len(name.encode("utf-8", "surrogateescape")) > 200:
        raise BadCommandError(f"the name {name[:32]!r}... is too long for a schedule", "Use at most 200 bytes")
    if not is_text(name):
        raise BadCommandError(f"the name {name[:64]!r} is not text in UTF-8", "Write it in UTF-8")
    every_s = parse_duration(every)
    if every_s < 1:
        raise BadCommandError("a period is a second at least", "Write it as 15m, 1h, 1d")
    if every_s > EVERY_S_MAX:
        raise BadCommandError(f"a period of {every!r} is longer than 100 years", "Write it as 15m, 1h, 1d")
    return Schedule(
        name,
        every_s,
        _offset_s(at, every_s),
        tuple(volumes),
        parse_keep(keep),
        tuple(hold_tags),
        skips_unchanged,
    )


def _offset_s(at: str | None, every_s: int) -> int:
    if at is None:
        return 0
    match = _AT.fullmatch(at)
    if match is None:
        raise BadCommandError(f"{at!r} is not a time of day", "Write it as 03:30, in UTC")
    if every_s % _DAY_S:
        raise BadCommandError("a time of day goes with a period of whole days", "Write every 1d, or leave the time out")
    return int(match[1]) * 3600 + int(match[2]) * 60


def parse_keep(text: str) -> tuple[Keep, ...]:
    """What ``24h,30d,12m,5y`` says. Raises BadCommandError."""
    found = []
    for part in text.split(",") if text else ():
        match = _KEEP.fullmatch(part.strip())
        if match is None or int(match[1]) == 0:
            raise BadCommandError(
                f"{part!r} does not say what to keep", "Write numbers with h, d, w, m, y or nothing: 24h,30d,12m,5y"
            )
        found.append(Keep(int(match[1]), match[2]))
    return tuple(found)


def format_keep(keep: Iterable[Keep]) -> str:
    """The same, as text."""
    return ",".join(f"{one.period_count}{one.unit}" for one in keep)


def _period(created_ns: int, unit: str) -> object:
    """The calendar period that a moment lies in; each moment one of its own for no unit."""
    if not unit:
        return created_ns
    when = datetime.fromtimestamp(created_ns // SECOND_NS, UTC)
    if unit == "w":
        return when.isocalendar()[:2]
    return {
        "h": (when.year, when.month, when.day, when.hour),
        "d": (when.year, when.month, when.day),
        "m": (when.year, when.month),
        "y": (when.year,),
    }[unit]


def to_delete(keep: Iterable[Keep], snapshots: Iterable[_T], created_ns_of: Callable[[_T], int]) -> list[_T]:
    """Which of a schedule's snapshots, given in the order in which they were made, no rule keeps; without rules none.

    The order decides which is the newest, and not the time: when the clock was set back, what is made then is not to
    go for older ones with later times.
    """
    rules = list(keep)
    newest_first = list(snapshots)[::-1]
    if not rules:
        return []
    kept: set[int] = set()
    for rule in rules:
        seen: set[object] = set()
        for place, one in enumerate(newest_first):
            period = (_period(created_ns_of(one), rule.unit), place if not rule.unit else None)
            if period not in seen and len(seen) < rule.period_count:
                seen.add(period)
                kept.add(place)
    return [one for place, one in reversed(list(enumerate(newest_first))) if place not in kept]


def damaged_entry(name: str, last_run_ns: int) -> dict[str, object]:
    """As :func:`entry`, of a schedule whose rule cannot be read."""
    unknown = dict.fromkeys(("every_s", "at_s", "volumes", "keep", "skip_unchanged", "next_run_ns"))
    shown = show_name(name.encode("utf-8", "surrogateescape"))
    return {"name": shown, **unknown, "holds": [], "last_run_ns": last_run_ns}


def entry(schedule: Schedule, last_run_ns: int, now_ns: int) -> dict[str, object]:
    """A schedule as plain values, for lists."""
    return {
        "name": show_name(schedule.name.encode("utf-8", "surrogateescape")),
        "every_s": schedule.every_s,
        "at_s": schedule.offset_s,
        "volumes": list(schedule.volumes) or None,
        "keep": format_keep(schedule.keep) or None,
        "holds": list(schedule.hold_tags),
        "skip_unchanged": schedule.skips_unchanged,
        "last_run_ns": last_run_ns,
        "next_run_ns": schedule.next_ns(last_run_ns, now_ns),
    }
