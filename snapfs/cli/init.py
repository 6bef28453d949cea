"""``snapfs init``."""

from __future__ import annotations

import os

import click

from ..backends import Device, DirectoryDevice
from ..errors import ExistsError, NotFoundError
from ..formats import CATALOG_FILE, EMBEDDED_DEVICE_FOLDER, POOL_FILE, RESERVE_FILE
from ..geometry import PROCESSOR_COUNT_MAX
from ..pool import PROCESSOR_COUNT_DEFAULT, create_pool

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
    for path in paths:
        if not os.path.isdir(path):
            raise NotFoundError(f"the device directory {path} is not there", "Make it with mkdir")
        if os.listdir(path):
            raise ExistsError(f"the device directory {path} is not empty", "Give an empty one")
    os.umask(0o077)
    made = _make_home(pool)
    home = DirectoryDevice(pool)
    opened: dict[str, Device] = {}
    try:
        if paths:
            for path in paths:
                opened[path] = DirectoryDevice(path)
        else:
            inside = os.path.join(pool, EMBEDDED_DEVICE_FOLDER)
            os.makedirs(inside, mode=0o700, exist_ok=True)
            _clear(inside)
            opened[""] = DirectoryDevice(inside)
        descriptor = create_pool(home, opened, processors)
    except BaseException:
        _undo(pool, paths, made)
        raise
    finally:
        for device in opened.values():
            device.close()
        home.close()
    click.echo(
        f"pool {descriptor.pool_id} in {os.path.abspath(pool)}, {processors} processors, {len(opened)} device(s)"
    )


def _make_home(pool: str) -> bool:
    """Make the pool's directory, or see that it is empty; whether it was made."""
    try:
        os.mkdir(pool, 0o700)
    except FileExistsError:
        if not os.path.isdir(pool):
            raise ExistsError(f"{pool} is there and is not a directory", "Choose another name") from None
    else:
        return True
    found = set(os.listdir(pool))
    if POOL_FILE in found:
        raise ExistsError(f"there is a pool in {pool} already", "Mount it, or choose another directory")
    if "init.started" in found and found <= _OWN_LEFTOVERS:
        # An init that was killed: there never was a pool.
        _clear(pool)
    elif found:
        raise ExistsError(f"{pool} is not empty", "Choose an empty directory, or one that is not there")
    os.chmod(pool, 0o700)
    return False


def _clear(folder: str) -> None:
    for root, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(root, name))
        for name in folders:
            os.rmdir(os.path.join(root, name))


def _undo(pool: str, device_paths: list[str], made: bool) -> None:
    """Leave things as they were before."""
    for path in [pool, *device_paths]:
        _clear(path)
    if made:
        os.rmdir(pool)
