"""`python -m bench.analyses`: looks at models trained on real text (bench/evidence/analyses.py)."""

import sys

from .evidence.analyses import main

if __name__ == "__main__":
    sys.exit(main())
