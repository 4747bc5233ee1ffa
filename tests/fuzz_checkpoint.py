"""Fuzz the checkpoint readers with atheris. Not part of the tests.

pip install atheris PYTHONPATH=src python tests/fuzz_checkpoint.py -max_total_time=600
-rss_limit_mb=1024 CORPUS tests/fixtures

New inputs go to the folder CORPUS. Any exception but `CheckpointError`, more than 1 GB of memory,
or more than a few seconds for one input is a finding.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["imagemill", "pickletools", "zipfile"]):
    from imagemill.errors import CheckpointError
    from imagemill.models.checkpoints import checkpoint

FILE = Path(tempfile.mkdtemp()) / "w.pth"


def one(data: bytes) -> None:
    """Read one input."""
    FILE.write_bytes(data)
    try:
        checkpoint.read(FILE)
    except CheckpointError as error:
        assert "\n" not in str(error)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
