"""On real mounts: names, long answers, and words for what goes wrong on the command line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from snapfs.cli.transfer import _mounted as mounted_for_a_while
from snapfs.errors import BadCommandError, SnapfsError

from .conftest import SNAPFS, Mounted, main_here, run, wait_for_end, wait_until

pytestmark = pytest.mark.mount


def test_the_name_of_the_manifest_is_taken(mounted_in_memory: Mounted, capsys: pytest.CaptureFixture[str]) -> None:
    mounted = mounted_in_memory
    (mounted.path / "v").write_bytes(b"x")
    mounted.snapshot("s")
    taken = mounted.path / ".manifest.json"
    for attempt in (
        lambda: taken.write_bytes(b"x"),
        lambda: os.mknod(taken),
        lambda: os.rename(mounted.path / "v", taken),
    ):
        with pytest.raises(PermissionError):
            attempt()
    assert main_here("create", taken, "--size", "1M") == 1
    assert main_here("clone", mounted.path, "s/v", ".manifest.json") == 1
    assert capsys.readouterr().err.count("'.manifest.json' is snapfs' own") == 2
    assert sorted(os.listdir(mounted.path)) == [".snapfs", ".snapshots", "v"]
    # It is no volume, and so cannot be exported as one.
    assert main_here("export", mounted.snapshots / "s" / ".manifest.json", mounted.pool.parent / "image") == 1
    assert "there is no volume" in capsys.readouterr().err


def test_notes_are_listed_to_the_letter(mounted_in_memory: Mounted, capsys: pytest.CaptureFixture[str]) -> None:
    mounted = mounted_in_memory
    assert main_here("snapshot", mounted.path, "backup[old]", "--note", "see [/srv/x]") == 0
    assert main_here("list", mounted.path) == 0
    told = capsys.readouterr().out
    assert "backup[old]" in told.splitlines()[-1] and told.rstrip().endswith("see [/srv/x]")


@pytest.mark.parametrize("encoding", ["utf-8:strict", "latin-1:strict"])
def test_a_name_that_is_no_text_is_printed(mounted_in_memory: Mounted, encoding: str) -> None:
    mounted = mounted_in_memory
    name = b"no\xfftext"
    for command, *options in ("snapshot",), ("list",), ("delete", "--dry-run"):
        words = [*SNAPFS, command, *options, str(mounted.path), *([] if command == "list" else [os.fsdecode(name)])]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(words, env=environment, capture_output=True, check=False)
        assert done.returncode == 0 and name in done.stdout and not done.stderr, done


def test_a_pool_in_use_cannot_be_received_into_and_that_is_told(mounted_in_memory: Mounted) -> None:
    for _ in range(2):
        done = run(*SNAPFS, "receive", mounted_in_memory.pool, expect=1, stdin=subprocess.DEVNULL)
        assert done.stderr.startswith("snapfs: ") and "is in use by process" in done.stderr and not done.stdout
        assert done.stderr.count("\n") == 1


def test_what_could_not_be_unmounted_after_receiving_is_kept(mounted_in_memory: Mounted) -> None:
    pool = mounted_in_memory.pool
    mounted_in_memory.unmount()
    for failure in (None, BadCommandError("the stream is no good")):
        with contextlib.ExitStack() as stack:
            with pytest.raises(SnapfsError) as told, mounted_for_a_while(str(pool)) as folder:
                volume = Path(folder) / "v"
                volume.write_bytes(b"contents")
                stack.enter_context(open(volume))
                if failure is not None:
                    raise failure
            assert "cannot be unmounted" in str(told.value) if failure is None else told.value is failure
            assert volume.read_bytes() == b"contents"
        assert main_here("umount", folder) == 0
        os.rmdir(folder)


def test_a_dead_mount_is_not_left_behind_by_receiving(mounted_in_memory: Mounted) -> None:
    mounted_in_memory.unmount()
    with pytest.raises(OSError), mounted_for_a_while(str(mounted_in_memory.pool)) as folder:
        pid = int(json.loads((Path(folder) / ".snapfs" / "status.json").read_text())["pid"])
        ended = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        wait_for_end(ended)
        # For a second the kernel answers from what it keeps.
        wait_until(lambda: not os.path.exists(folder), "the mount is dead")
        os.listdir(folder)
    assert os.fsencode(folder) not in Path("/proc/mounts").read_bytes()
    assert not os.path.exists(folder)


def test_mounting_and_sending_without_standard_streams(mounted_in_memory: Mounted) -> None:
    mounted = mounted_in_memory
    (mounted.path / "v").write_bytes(b"contents")
    mounted.snapshot("s")
    with open(mounted.pool.parent / "stream", "wb") as stream:
        subprocess.run(
            ["sh", "-c", 'exec "$@" 2>&-', "sh", *SNAPFS, "send", mounted.path, "s"], stdout=stream, check=True
        )
        assert stream.tell() > 0
    mounted.unmount()
    subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&-', "sh", *SNAPFS, "mount", mounted.pool, mounted.path], check=True, timeout=50
    )
    assert (mounted.path / "v").read_bytes() == b"contents"
    reading, writing = os.pipe()
    os.close(reading)
    for words in (["list"], ["list", "--json"], ["status"]):
        done = subprocess.run([*SNAPFS, *words, mounted.path], stdout=writing, stderr=subprocess.PIPE, check=False)
        assert done.returncode == 1 and not done.stderr, done
    os.close(writing)
