"""``snapfs init``."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

import click

from ..backends import Device, DirectoryDevice, LockHolder
from ..errors import ExistsError, InUseError, NotFoundError
from ..formats import CATALOG_FILE, EMBEDDED_DEVICE_FOLDER, POOL_FILE, RESERVE_FILE
from ..geometry import PROCESSOR_COUNT_MAX
from ..ownership import make_private
from ..pool import PROCESSOR_COUNT_DEFAULT, create_pool
from ..units import check_path

_OWN_LEFTOVERS = {"init.started", "init.started.new", CATALOG_FILE, CATALOG_FILE + "-wal", CATALOG_FILE + "-shm"}
_OWN_LEFTOVERS |= {RESERVE_FILE, "shards", EMBEDDED_DEVICE_FOLDER, POOL_FILE + ".new"}


@click.command()
@click.argument("pool", type=click.Path())
@click.option(
    "--device", "devices", multiple=True, type=click.Path(), help="A directory to put data on; may be given again."
)
@click.option(
    "--processors",
    default=PROCESSOR_COUNT_DEFAULT,
    show_default=True,
    type=click.IntRange(1, PROCESSOR_COUNT_MAX),
    help="Over how many processors volumes are spread. It cannot be changed later.",
)
def init(pool: str, devices: tuple[str, ...], processors: int) -> None:
    """Make a pool in the directory POOL, which is made or must be empty.

    Without --device its data lies inside it. A device is a directory of a local filesystem; a
    volume's data is spread over as many of them as there are processors, that of all volumes over all.
    """
    paths = [os.path.abspath(path) for path in devices]
    if len(set(paths)) != len(paths):
        raise click.UsageError("the same --device is given twice")
    for path in (os.path.abspath(pool), *paths):
        check_path(path)
    for path in paths:
        if not os.path.isdir(path):
            raise NotFoundError(f"the device directory {path} is not there", "Make it with mkdir")
        _check_empty(path)
    os.umask(0o077)
    made = _make_home(pool)
    # What is claimed here is nobody else's, who might make a pool of it at the same time; only that is cleared again.
    claimed: list[str] = []
    opened: dict[str, Device] = {}
    try:
        home = DirectoryDevice(pool)
        opened[pool] = home
        _claim(home, pool)
        _check_no_pool(pool)
        _shut(home, pool, _leftovers)
        _take_home(pool)
        claimed.append(pool)
        if not paths:
            os.makedirs(os.path.join(pool, EMBEDDED_DEVICE_FOLDER), mode=0o700, exist_ok=True)
        for path in paths or [os.path.join(pool, EMBEDDED_DEVICE_FOLDER)]:
            opened[path] = DirectoryDevice(path)
            _claim(opened[path], path)
            _shut(opened[path], path, _check_empty)
            claimed.append(path)
        lying = {path: opened[path] for path in paths} or {"": opened[os.path.join(pool, EMBEDDED_DEVICE_FOLDER)]}
        descriptor = create_pool(home, lying, processors)
    except BaseException:
        _undo(claimed, pool if made and pool in claimed else None)
        raise
    finally:
        for device in opened.values():
            device.close()
    click.echo(f"pool {descriptor.pool_id} in {os.path.abspath(pool)}, {processors} processors, {len(lying)} device(s)")


def _make_home(pool: str) -> bool:
    """Make the pool's directory, or see that it is one; whether it was made."""
    try:
        os.mkdir(pool, 0o700)
    except FileExistsError:
        if not os.path.isdir(pool):
            raise ExistsError(f"{pool} is there and is not a directory", "Choose another name") from None
        # Said first, for one that is mounted is in use as well.
        _check_no_pool(pool)
        return False
    return True


def _check_no_pool(pool: str) -> None:
    if os.path.lexists(os.path.join(pool, POOL_FILE)):
        raise ExistsError(f"there is a pool in {pool} already", "Mount it, or choose another directory")


def _claim(device: Device, path: str) -> None:
    """Keep others out of a directory until the device is closed. Raises InUseError."""
    try:
        device.claim()
    except LockHolder:
        raise InUseError(f"somebody else is using {path}", "Choose another directory") from None


def _shut(device: Device, path: str, look: Callable[[str], object]) -> None:
    """Nobody else is to read or change what lies there, which ``look`` sees to be nothing. Raises UnreadableError.

    Before, for it is not to be shut that is somebody's; and then, when nobody puts anything there any more.
    """
    look(path)
    mode = stat.S_IMODE(os.stat(path).st_mode)
    make_private(device, path)
    try:
        look(path)
    except BaseException:
        os.chmod(path, mode)
        raise


def _take_home(pool: str) -> None:
    """See that the pool's directory is empty, or clear it of what an init left that was killed. Raises ExistsError."""
    _check_no_pool(pool)
    if _leftovers(pool):
        # There never was a pool.
        _clear(pool)


def _leftovers(pool: str) -> set[str]:
    """What an init that was killed has left in a directory; raises ExistsError when there is anything else."""
    found = set(os.listdir(pool))
    if found and not ("init.started" in found and found <= _OWN_LEFTOVERS):
        raise ExistsError(f"{pool} is not empty", "Choose an empty directory, or one that is not there")
    return found


def _check_empty(path: str) -> None:
    if os.listdir(path):
        raise ExistsError(f"the device directory {path} is not empty", "Give an empty one")


def _clear(folder: str) -> None:
    for root, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(root, name))
        for name in folders:
            os.rmdir(os.path.join(root, name))


def _undo(claimed: list[str], made: str | None) -> None:
    """Leave what was claimed as it was before, which is empty; what was made goes."""
    for path in claimed:
        _clear(path)
    if made is not None:
        os.rmdir(made)
