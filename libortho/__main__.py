"""`python -m libortho`: the command line, which lives in `libortho.cli`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
