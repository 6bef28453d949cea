"""snapfs: virtual volumes as files, snapshots as read-only directories.

For scripts under trio: :func:`open_pool`. Everything else is found from the :class:`Pool` it gives.
"""

from .pool import Pool, create_pool, open_pool

__version__ = "0.3.0"
__all__ = ["Pool", "__version__", "create_pool", "open_pool"]
