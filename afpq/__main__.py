"""`python -m afpq` is the command `afpq`."""

import sys

from afpq.cli import main

if __name__ == "__main__":
    sys.exit(main())
