"""`python -m imagemill` is `imagemill`."""

import os
import sys

if not sys.flags.safe_path and (not sys.path[0] or sys.path[0] == os.getcwd()):  # noqa: PTH109 - pathlib would be taken from there
    # The working directory, which the command `imagemill` does not search for modules either.
    del sys.path[0]

from imagemill.cli import main

sys.exit(main())
