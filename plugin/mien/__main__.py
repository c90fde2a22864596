"""`python -m mien` is `mien`."""

from .cli import main

main()
