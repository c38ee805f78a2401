"""``python -m benchmarks.gpu``."""

from .command import main

main()
