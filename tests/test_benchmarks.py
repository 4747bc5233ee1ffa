"""The scripts in `benchmarks/` that make their own data work with today's code, at their smallest.

Those that are measured against photographs, other programs or hardware are run before a release.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import helpers


@pytest.mark.large
@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("archives.py --members 2000 --kinds zip tar.gz", "| tar.gz, fresh tenth "),
        ("million.py --sizes 300", "| "),
        ("score_rows.py --sizes 2000", "|      2,000 | Parquet |"),
        ("scaling.py --sizes 2000", "|       2,000 | verify "),
        ("scaling.py --requests 60 20", "PUT"),
    ],
)
def test_a_script_measures_the_code_of_today(command: str, line: str, tmp_path: Path) -> None:
    """To its last line."""
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, helpers.PROJECT / "benchmarks" / script, *arguments],
        cwd=tmp_path,
        env=helpers.environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert line in done.stdout
