"""``python -m snapfs``."""

from .cli import main

main()
