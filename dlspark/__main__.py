"""``python -m dlspark`` is the command ``dlspark``; this file is also what ``spark-submit`` takes."""

from __future__ import annotations

import sys

if not __package__:
    # Run by its path: Python has put dlspark's own folder first, where our modules could hide others of the same names.
    sys.path.pop(0)

from dlspark.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
