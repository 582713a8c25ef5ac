"""`python -m vitrail` is the `vitrail` command: what torchrun and machines without the script on PATH use."""

from __future__ import annotations

import sys

from vitrail.cli import main

if __name__ == "__main__":
    sys.exit(main())
