"""Whether devices answer, so that one that hangs holds up nobody but those who need it.

Writes are made in the event loop: by way of a thread each would take six times as long. Linux' buffered writes wait
for a device that hangs all the same (those of ext4 know no ``RWF_NOWAIT``), and so does making or opening a file. So
what may wait is done in the loop only while the device has answered a moment ago, which a thread finds out; else it
waits for an answer, and all others go on. What is left is the moment in which a device begins to hang while it is
written to.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import trio

from .backends import Device, Space
from .errors import NoMemoryError
from .notresident import NotResidentError, OldBlocks
from .pace import Demand
from .pending import PendingCalls
from .tasks import Shared, Wakeup, in_thread, side_by_side

# While volumes are used their devices are asked so often, and for so long after the last request.
LOOK_S = 0.25
IDLE_S = 1.0
# With no answer for so long a device is taken to hang. A disk at its limit takes some tenths of a second.
HANGS_S = 1.0
# A slow device is asked less often, so that it is not busy with that alone; but not much less.
_REST_FACTOR = 50
_REST_S_MAX = 1.0
# So long somebody who asks for room waits for all devices together.
_ROOM_WAIT_S = 1.0

ANSWERS, SILENT, IDLE = "answers", "silent", "idle"


class Room(NamedTuple):
    """Room on a device. Devices of one ``filesystem`` have the same; None stands for one of its own."""

    filesystem: int | None
    space: Space


class Liveness:
    """Of one device. ``is_over``: its last answer is too old; looked at on the hot path."""

    __slots__ = (
        "_answered",
        "_asked_s",
        "_device",
        "_due_s",
        "_expiry_count",
        "_limiter",
        "_pending",
        "_room",
        "_wakeup",
        "_where",
        "is_over",
    )

    def __init__(self, device: Device | None, where: str, pending: PendingCalls, wakeup: Wakeup) -> None:
        self.is_over = device is not None and device.may_hang
        self._device = device
        self._where = where
        self._pending = pending
        self._wakeup = wakeup
        self._answered: trio.Event | None = None
        self._asked_s = 0.0
        self._expiry_count = 0
        # Its own: calls that hang must not keep the questions to others waiting.
        self._limiter = trio.CapacityLimiter(1)
        self._room = None if device is None else Shared(partial(_room_on, device))
        self._due_s = 0.0

    @property
    def state(self) -> str:
        """``answers``, ``silent`` while those that need it wait, ``idle`` when nobody has asked for long."""
        if not self.is_over:
            return ANSWERS
        return IDLE if self._answered is None else SILENT

    def check_now(self) -> None:
        """Raises NotResidentError while the device has to answer first."""
        if self.is_over:
            raise NotResidentError(self.fetch)

    async def fetch(self, old_blocks: OldBlocks) -> None:
        """For :class:`NotResidentError`: see :meth:`renew`."""
        await self.renew()

    async def renew(self) -> None:
        """Wait until the device has answered, if its last answer is too old. Raises NoMemoryError."""
        while self.is_over:
            if self._answered is None:
                await self._ask()
                # Whoever asked takes the answer, though meanwhile nobody used the device.
                self.is_over = False
                self._wakeup.set()
            else:
                await self._answered.wait()

    async def _ask(self) -> None:
        assert self._device is not None
        answered = self._answered = trio.Event()
        self._asked_s = trio.current_time()
        try:
            probe = self._device.probe
            with self._pending.running(self._where, probe) as one, contextlib.suppress(OSError):
                # An error is an answer as well.
                await in_thread(one.run, probe, limiter=self._limiter, is_abandoned_when_cancelled=True)
            now_s = trio.current_time()
            self._due_s = now_s + min(_REST_S_MAX, _REST_FACTOR * (now_s - self._asked_s))
        finally:
            self._answered = None
            answered.set()

    def look(self, nursery: trio.Nursery) -> None:
        """Now and then while it is used: ask again, or see that it does not answer."""
        now_s = trio.current_time()
        if self._answered is not None:
            self.is_over |= now_s - self._asked_s >= HANGS_S
        elif not self.is_over and now_s >= self._due_s:
            nursery.start_soon(self._ask_in_background)

    async def _ask_in_background(self) -> None:
        if self._answered is None and not self.is_over:
            expiry_count = self._expiry_count
            # Whoever writes next is told of missing memory.
            with contextlib.suppress(NoMemoryError, MemoryError):
                await self._ask()
                # Once it is used no more nobody looks whether it still answers.
                self.is_over = self._expiry_count != expiry_count

    def expire(self) -> None:
        """Nobody has used it for long: whoever comes next asks first."""
        self.is_over = True
        self._expiry_count += 1

    async def room(self) -> Room | None:
        """The room there is, None when the device does not tell soon. Raises OSError."""
        if self._device is None or self._room is None:
            return None
        if not self._device.may_hang:
            return _room_on(self._device)
        return None if self.state == SILENT else await self._room.within(_ROOM_WAIT_S)


class DeviceWatch:
    """The devices of a pool, which may come to be more. ``run`` is its task."""

    def __init__(self, devices: Mapping[int, Device], pending: PendingCalls, demand: Demand) -> None:
        self._devices = devices
        self._pending = pending
        self._demand = demand
        self._known: dict[int | None, tuple[Device | None, Liveness]] = {}
        self._wakeup = Wakeup()

    def of(self, device_id: int | None) -> Liveness:
        """Of one device. What the pool does not have, or does not know (None), always answers."""
        device = self._device(device_id)
        known = self._known.get(device_id)
        if known is None or known[0] is not device:
            known = (device, Liveness(device, f"device {device_id}", self._pending, self._wakeup))
            self._known[device_id] = known
        return known[1]

    async def run(self) -> None:
        """Ask those that are used every now and then; until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._wakeup.wait()
                await self._look_until_idle(nursery)

    async def _look_until_idle(self, nursery: trio.Nursery) -> None:
        count, used_s = self._demand.count(), trio.current_time()
        while trio.current_time() - used_s < IDLE_S:
            await trio.sleep(LOOK_S)
            if self._demand.count() != count:
                count, used_s = self._demand.count(), trio.current_time()
            for liveness in self._that_may_hang():
                liveness.look(nursery)
        for liveness in self._that_may_hang():
            liveness.expire()

    def _that_may_hang(self) -> list[Liveness]:
        return [
            liveness
            for device_id, (device, liveness) in self._known.items()
            # Others are gone from the pool, and closed.
            if device is not None and device is self._device(device_id) and device.may_hang
        ]

    def _device(self, device_id: int | None) -> Device | None:
        return None if device_id is None else self._devices.get(device_id)

    async def rooms(self) -> dict[int, Room | OSError | None]:
        """The room on each device, None for one that does not tell soon, or why it cannot."""
        found: dict[int, Room | OSError | None] = {}

        async def ask(device_id: int) -> None:
            try:
                found[device_id] = await self.of(device_id).room()
            except OSError as error:
                found[device_id] = error
            except (NoMemoryError, MemoryError):
                # Not known, as of one that hangs: whoever asks for it has other things to do as well.
                found[device_id] = None

        device_ids = list(self._devices)
        await side_by_side([partial(ask, device_id) for device_id in device_ids])
        return {device_id: found[device_id] for device_id in device_ids}


def _room_on(device: Device) -> Room:
    path = device.local_path("")
    return Room(None if path is None else os.stat(path).st_dev, device.space())
