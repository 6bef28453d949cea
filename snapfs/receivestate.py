"""How far a stream has come, as its target keeps it: what lets it go on, be taken back, or be given up."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import blake3

from .errors import DamagedError, SnapfsError
from .streamhead import StreamHead, moment_of, number_of, text_of, volume_name

_ASIDE = ".receiving-"
_BAD_STATE = "the state of a stream that was cut off is damaged"
MOVING_OUT, MOVING_IN = 1, 2


class Move(NamedTuple):
    """A volume that leaves its name: where it is in between, and its new name, None where the snapshot lacks it.

    ``inode`` is the volume's, 0 as long as it is not known: who has one of the names may be another by now.
    """

    before: str
    aside: str
    after: str | None
    inode: int = 0

    def is_of(self, inode: int) -> bool:
        """Whether that volume is the one."""
        return self.inode in (0, inode)


@dataclass(slots=True)
class ReceiveState:
    """How far a stream has come, as the target keeps it.

    ``stage`` is of the moves: 0 none, then all moving out of their names, then all moving into the new ones.
    ``made`` has the inode of each volume that the stream made, 0 where that was not noted (before 0.8.0): who has
    the name may be another by now. ``aside`` begins the names that are this stream's alone. ``base_guid`` is that of
    its base, empty for a whole stream; None: not noted. ``times`` has when what came was written, by name.
    ``moves``: None where they were not noted (before 0.8.7), and only the stream's head tells. ``inodes`` are those of
    the volumes of the base, by their names there; before 0.8.8 they were not noted.
    """

    volume_place: int = 0
    offset: int = 0
    stage: int = 0
    made: dict[str, int] = field(default_factory=dict)
    touched: list[str] = field(default_factory=list)
    aside: str = _ASIDE
    base_guid: str | None = None
    times: dict[str, int] = field(default_factory=dict)
    moves: list[Move] | None = None
    inodes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_stream(cls, head: StreamHead) -> ReceiveState:
        """That of a stream of which nothing came yet."""
        own = blake3.blake3(os.fsencode(head.guid)).hexdigest(length=8)
        state = cls(aside=f"{_ASIDE}{own}-", base_guid=head.base_guid or "")
        state.know_moves(head)
        return state

    def know_moves(self, head: StreamHead) -> None:
        """Learn from the head which volumes leave their names, where that was not noted."""
        if self.moves is None:
            renamed = [one for one in head.volumes if one.base_name is not None and one.base_name != one.name]
            self.moves = [
                *(Move(str(one.base_name), self.aside_for(number), one.name) for number, one in enumerate(renamed)),
                *(Move(name, self.aside_for(f"gone-{number}"), None) for number, name in enumerate(head.gone)),
            ]

    def aside_for(self, what: object) -> str:
        """A name that is this stream's alone."""
        return f"{self.aside}{what}"

    @property
    def name_of_new(self) -> str:
        """What a volume is called while it is made."""
        return self.aside_for("new")

    def is_made(self, name: str, inode: int) -> bool:
        """Whether a volume is the one that the stream made under a name."""
        return self.made[name] in (0, inode)

    def is_of_base(self, name: str, inode: int) -> bool:
        """Whether a volume may be the one that the base calls so."""
        return self.inodes.get(name, inode) == inode

    def to_json(self) -> str:
        """For the target to keep."""
        fields = [self.volume_place, self.offset, self.stage, self.made, self.touched, self.aside, self.base_guid]
        return json.dumps([*fields, self.times, self.moves, self.inodes])

    @classmethod
    def from_fields(cls, fields: object) -> ReceiveState:
        """Read it. Raises DamagedError."""
        if not isinstance(fields, list) or len(fields) not in (5, 7, 8, 9, 10):
            raise DamagedError(_BAD_STATE, "Send the stream again")
        # What earlier versions did not note.
        known: list[Any] = [*fields, *(_ASIDE, None, {}, None, {})[len(fields) - 5 :]]
        place, offset, stage, made, touched, aside, base_guid, times, moves, of_base = known
        try:
            inodes = made if isinstance(made, dict) else dict.fromkeys(made, 0)
            return cls(
                number_of(place),
                number_of(offset),
                number_of(stage),
                {volume_name(name): number_of(inode) for name, inode in inodes.items()},
                [volume_name(one) for one in touched],
                volume_name(aside),
                None if base_guid is None else text_of(base_guid, empty=True),
                {volume_name(name): moment_of(when) for name, when in times.items()},
                None if moves is None else [_move(*one) for one in moves],
                {volume_name(name): number_of(inode) for name, inode in of_base.items()},
            )
        except (AttributeError, TypeError, ValueError, SnapfsError) as error:
            raise DamagedError(_BAD_STATE, "Send the stream again") from error


def _move(before: object, aside: object, after: object, inode: object = 0) -> Move:
    new_name = None if after is None else volume_name(after)
    return Move(volume_name(before), volume_name(aside), new_name, number_of(inode))


def states_in(answer: Mapping[str, object]) -> dict[str, ReceiveState]:
    """The streams that were cut off, by the guids of their snapshots, of what a target answers. Raises DamagedError."""
    states = answer["states"]
    assert isinstance(states, dict)
    return {str(guid): ReceiveState.from_fields(fields) for guid, fields in sorted(states.items())}
