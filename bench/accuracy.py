"""`python -m bench.accuracy`: every method on real text (bench/evidence/accuracy.py)."""

import sys

from .evidence.accuracy import main

if __name__ == "__main__":
    sys.exit(main())
