"""`python -m paretofuse`."""

from __future__ import annotations

import sys

from paretofuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
