"""What bounded a job: its summary and its display name the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import helpers
from imagemill.display import observer
from imagemill.display.pace import Pace
from imagemill.pipeline import stopwatch
from imagemill.records import Progress, Settings
from imagemill.runner import run

sys.path.insert(0, str(helpers.PROJECT / "tests" / "faults"))

import harness

pytestmark = pytest.mark.process

CLOCK = """
if WORKER:
    def fixed(module):
        add, image = module.Stopwatch.add, module.Stopwatch.image
        waits = os.environ["WAITS"]
        module.Stopwatch.add = lambda self, name, _: add(self, name, float(name == waits))
        module.Stopwatch.image = lambda self, *_: image(self, 1.0, 0.1, 0.1, 0.1)
    after_import("imagemill.pipeline.stopwatch", fixed)
"""
"""The loop of the worker waits for one thing only, and reading takes longer than decoding."""


@pytest.mark.parametrize(
    ("waits", "bottleneck"), [("starved", "read"), ("write", "write"), ("compute", "compute")]
)
def test_a_job_names_what_bounded_it_and_so_does_its_display(
    waits: str,
    bottleneck: str,
    job: Callable[..., Settings],
    small_jpegs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker's clock decides, in the summary as on the screen."""
    hold = harness.Hold(tmp_path, 0, CLOCK, WAITS=waits)
    for name in ("PYTHONPATH", "HOLD", "WAITS"):
        monkeypatch.setenv(name, hold.environment[name])
    monkeypatch.setattr(stopwatch, "SHORT_S", 0.0)
    pace, shown = Pace(48, 0), []

    class Watcher(observer.Watcher):
        def begin(self, total: int, resumed: int) -> Callable[[Progress], None]:
            def note(progress: Progress) -> None:
                shown.append(pace.add(progress).bottleneck)
                hold.release()  # the display compares with the clock before the first image

            return note

    summary = run.run(job(small_jpegs, batch_size=2, preflight=False), Watcher())
    assert (summary.bottleneck, shown[-1]) == (bottleneck, bottleneck), summary
