"""`benchmarks/loadgen.py`: MLPerf's LoadGen drives a session, and its own log and verdict are what
is printed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import helpers

pytest.importorskip("mlperf_loadgen", reason="has no wheels for this Python")
SCRIPT = Path(__file__).parent.parent / "benchmarks" / "loadgen.py"


def test_a_run_that_ends_too_early_is_repeated_with_twice_the_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever rate was measured before, on a machine that was busy or became faster."""
    spec = importlib.util.spec_from_file_location("loadgen", SCRIPT)
    assert spec
    assert spec.loader
    loadgen: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loadgen)
    planned: list[float] = []

    def run(driven: object, folder: Path, min_duration_s: float, rate: float, **_: object) -> Any:
        planned.append(rate)
        enough = "Yes" if rate * min_duration_s > 100 else "NO"
        return {"Min duration satisfied": enough, "Samples per second": "50"}

    monkeypatch.setattr(loadgen, "run", run)
    assert loadgen.perform(None, Path(), 0.5, 0.001)["Min duration satisfied"] == "Yes"
    assert planned == [0.001, 100, 200, 400]


@pytest.mark.process
def test_loadgen_calls_both_modes_valid(models_dir: Path, tmp_path: Path) -> None:
    """The performance run is VALID, and in accuracy mode every answer is the one of the images in
    order.
    """
    command = [
        sys.executable,
        SCRIPT,
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
