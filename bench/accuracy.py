"""Runs `python -m bench.accuracy`, which stands in bench/evidence/accuracy.py."""

import sys

from .evidence.accuracy import main

if __name__ == "__main__":
    sys.exit(main())
