"""snapfs: virtual volumes as files, snapshots as read-only directories.

For scripts under trio: :func:`open_pool`. Everything else is found from the :class:`Pool` it gives.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pool import Pool, create_pool, open_pool

__version__ = "0.8.8"
__all__ = ["Pool", "__version__", "create_pool", "open_pool"]


def __getattr__(name: str) -> object:
    """Import the pool when it is first asked for: most commands of the command line do without it."""
    if name not in ("Pool", "create_pool", "open_pool"):
        raise AttributeError(f"module 'snapfs' has no attribute {name!r}")
    from . import pool

    return getattr(pool, name)
