"""Freezing applications for a snapshot, where what runs their programs cannot be had any more."""

from __future__ import annotations

import json
import os
import signal

import pytest

from snapfs import freeze
from snapfs.events import EventLog
from snapfs.freeze import Freeze
from snapfs.hook import Hook


async def test_what_cannot_be_thawed_is_told_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    events, guard_pids = EventLog(), set[int]()
    frozen = Freeze([Hook("app", "/bin/true", "/bin/true")], dict(os.environ), None, None, events, guard_pids)
    await frozen.begin()
    (pid,) = guard_pids
    os.kill(pid, signal.SIGKILL)
    monkeypatch.setattr(freeze, "_THAW_TRIES", 0)
    await frozen.end()
    assert not guard_pids and frozen.frozen_ns > 0
    told = [json.loads(line) for line in events.contents.splitlines()]
    assert [(one["event"], one.get("reason")) for one in told] == [
        ("hook-guard-lost", None),
        ("hook-failed", "hook 'app': it could not be thawed"),
    ]
