"""`python -m paretofuse.kernels.aot`."""

import sys

from paretofuse.kernels.aot.build import main

if __name__ == "__main__":
    sys.exit(main())
