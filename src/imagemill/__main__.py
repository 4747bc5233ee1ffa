"""`python -m imagemill` is `imagemill`."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # the working directory, which the command `imagemill` does not search for modules either

from imagemill.cli import main

sys.exit(main())
