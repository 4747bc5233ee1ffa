"""`benchmarks/loadgen.py`: MLPerf's LoadGen drives a session, and its own log and verdict are what
is printed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import helpers

pytestmark = pytest.mark.process


def test_loadgen_calls_both_modes_valid(models_dir: Path, tmp_path: Path) -> None:
    """The performance run is VALID, and in accuracy mode every answer is the one of the images in
    order.
    """
    script = Path(__file__).parent.parent / "benchmarks" / "loadgen.py"
    command = [
        sys.executable,
        script,
        "--model",
        "tiny",
        "--models-dir",
        models_dir,
        "--min-duration",
        "0.2",
        "--log-dir",
        tmp_path,
    ]
    done = subprocess.run(
        list(map(str, command)), env=helpers.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "samples/s, VALID" in done.stdout
    assert "64 of 64 answers" in done.stdout
    reported = (tmp_path / "performance" / "mlperf_log_summary.txt").read_text()
    assert "Scenario : Offline\nMode     : PerformanceOnly\n" in reported
    assert "Result is : VALID" in reported
