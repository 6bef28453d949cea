"""``snapfs create``."""

from __future__ import annotations

import os

import click

from ..errors import ExistsError
from ..units import parse_size
from .control import control_path


@click.command()
@click.argument("volume", metavar="MOUNT/VOLUME", type=click.Path())
@click.option("--size", required=True, metavar="SIZE", help="As 10G, 512M or in bytes. Nothing is allocated.")
def create(volume: str, size: str) -> None:
    """Create a volume of a size. It reads as zeros and takes no space."""
    size_bytes = parse_size(size)
    control_path(os.path.dirname(os.path.abspath(volume)))
    try:
        fd = os.open(volume, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ExistsError(f"there is a volume {volume} already", "Choose another name") from None
    try:
        os.ftruncate(fd, size_bytes)
        os.fsync(fd)
    except BaseException:
        os.unlink(volume)
        raise
    finally:
        os.close(fd)
