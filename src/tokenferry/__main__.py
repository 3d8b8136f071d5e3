"""`python -m tokenferry`, for use where the `tokenferry` script is not installed."""

from __future__ import annotations

import sys

from tokenferry.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
