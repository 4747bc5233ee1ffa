"""Jobs over archives whose launcher is killed: the same command finishes them as if nothing had
been.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import harness
import pytest

import helpers
from archive_files import KINDS, pack

pytestmark = pytest.mark.process


@pytest.mark.parametrize("kind", KINDS)
def test_a_launcher_killed_in_the_middle_of_an_archive_is_resumed(
    null_run, null_start, small_jpegs: Path, tmp_path: Path, kind: str
) -> None:
    """SIGKILL after the second part: the repeated command keeps what there is and makes the rest;
    the parts are an undisturbed job's, byte for byte. Nothing half-written is left, and what a
    packed tar keeps beside the plan is found again.
    """
    source = pack(
        tmp_path, kind, {path.name: path.read_bytes() for path in sorted(small_jpegs.iterdir())}
    )
    output = tmp_path / "out"
    hold = harness.Hold(tmp_path, 24)
    process = null_start(source, "--output", output, "--shard-size", "4", env=hold.environment)
    helpers.until(lambda: len(helpers.parts(output)) >= 2, process=process)
    harness.kill(process.pid)
    process.wait()
    for worker in helpers.worker_pids(output):
        helpers.until(lambda worker=worker: not helpers.running(worker))
    before = helpers.parts(output)
    assert 2 <= len(before) <= 6
    result = null_run(source, "--output", output, "--shard-size", "4", "--json")
    assert (result.code, result.json["resumed_shards"]) == (0, len(before)), result.err
    assert helpers.parts(output).items() >= before.items()
    harness.assert_complete(output)
    assert null_run(source, "--output", tmp_path / "calm", "--shard-size", "4").code == 0
    harness.assert_same(output, tmp_path / "calm")


def test_an_archive_that_vanishes_while_a_job_runs_ends_in_rows_that_a_retry_heals(
    null_run, null_start, small_jpegs: Path, tmp_path: Path
) -> None:
    """Cut short in the middle of the run, every image still has its row; when the archive is back,
    --retry-failed makes the job whole.
    """
    files = {path.name: path.read_bytes() for path in sorted(small_jpegs.iterdir())}
    source = Path(pack(tmp_path, "zip", files))
    shutil.copy(source, tmp_path / "copy.zip")
    output = tmp_path / "out"
    hold = harness.Hold(tmp_path, 24)
    process = null_start(source, "--output", output, env=hold.environment)
    helpers.until(lambda: helpers.parts(output), process=process)
    os.truncate(source, source.stat().st_size // 3)
    hold.release()
    assert helpers.finish(process).code == 0
    statuses = set(harness.assert_complete(output)["status"].to_pylist())
    assert {"ok", "truncated"} <= statuses
    shutil.copyfile(tmp_path / "copy.zip", source)
    assert null_run(source, "--output", output, "--retry-failed").code == 0
    assert set(harness.assert_complete(output)["status"].to_pylist()) == {"ok"}
