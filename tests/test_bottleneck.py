"""What bounded a job, found in real jobs: the summary and the display name the same."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import helpers
import sample_images
from imagemill.display import observer
from imagemill.display.pace import Pace
from imagemill.pipeline import stopwatch
from imagemill.records import Progress, Settings
from imagemill.runner import run

sys.path.insert(0, str(helpers.PROJECT / "tests" / "faults"))

import harness

pytestmark = pytest.mark.process

SLOW_READS = """
if WORKER:
    def slowed(module):
        fetch = module.FolderSource.fetch
        module.FolderSource.fetch = lambda *arguments: (time.sleep(0.05), fetch(*arguments))[1]
    after_import("imagemill.pipeline.sources.folder", slowed)
"""
SLOW_DISK = """
if WORKER:
    def slowed(module):
        write = module.write_whole
        module.write_whole = lambda *arguments: (time.sleep(0.2), write(*arguments))[1]
    after_import("imagemill.system.files", slowed)
"""


@pytest.mark.parametrize(
    ("hook", "size", "devices", "busy", "bottleneck"),
    [
        (SLOW_READS, (40, 30), "null", 0, "read"),
        (SLOW_DISK, (40, 30), "null", 0, "write"),
        ("", (1600, 1200), "null", 0, "decode"),
        ("", (1600, 1200), "cpu", 2, "decode"),
    ],
)
def test_a_job_names_what_bounded_it_and_so_does_its_display(
    hook: str,
    size: tuple[int, int],
    devices: str,
    busy: int,
    bottleneck: str,
    job: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slow reads, a slow disk, and large files with a tiny model, alone and beside two busy
    processes: in the summary as on the screen.
    """
    for name, value in harness.hooks(tmp_path / "hooks", hook).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stopwatch, "SHORT_S", 0.05)
    pace, shown = Pace(48, 0), []

    class Watcher(observer.Watcher):
        def begin(self, total: int, resumed: int) -> Callable[[Progress], None]:
            return lambda progress: shown.append(pace.add(progress).bottleneck)

    with contextlib.ExitStack() as stack:
        for _ in range(busy):
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", "while True: pass"])
            )
            stack.callback(process.kill)
        folder = helpers.fill(
            tmp_path / "images",
            dict.fromkeys((f"{number}.jpg" for number in range(48)), sample_images.jpeg(*size)),
        )
        shard_size = 8 if hook == SLOW_DISK else 64
        summary = run.run(
            job(folder, devices=devices, shard_size=shard_size, batch_size=2, preflight=False),
            Watcher(),
        )
    assert (summary.bottleneck, shown[-1]) == (bottleneck, bottleneck), summary.devices
