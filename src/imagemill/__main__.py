"""`python -m imagemill` is `imagemill`."""

import sys

from imagemill.cli import main

sys.exit(main())
