"""Runs `python -m bench.analyses`, which stands in bench/evidence/analyses.py."""

import sys

from .evidence.analyses import main

if __name__ == "__main__":
    sys.exit(main())
