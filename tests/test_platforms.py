"""imagemill needs nothing that only Linux has: it works where Python lacks it, as on macOS."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import helpers

pytestmark = pytest.mark.process

OTHER_UNIX = os.pathsep.join(
    map(str, (Path(__file__).with_name("other_unix"), helpers.SOURCE_ROOT))
)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every test shows it")
def test_a_job_needs_nothing_that_only_linux_has(
    jpegs: Callable[..., Path],
    imagemill: Callable[..., helpers.Result],
    models_dir: Path,
    tmp_path: Path,
) -> None:
    """Its rows are the same, and the commands that look at the machine or at files work."""
    folder = jpegs(6, **{"broken.jpg": b"no image"})
    here = helpers.environment(IMAGEMILL_MODELS=str(models_dir))
    there = here | {"PYTHONPATH": OTHER_UNIX}

    def run(*arguments: object, env: dict[str, str]) -> None:
        done = imagemill(*arguments, env=env)
        assert done.code == 0, done.err

    job = ("run", folder, "--model", "tiny", "--devices", "cpu:1", "--output")
    run(*job, tmp_path / "here", "--no-report", env=here)
    run(*job, tmp_path / "there", env=there)
    assert helpers.by_path(tmp_path / "here") == helpers.by_path(tmp_path / "there")
    assert (tmp_path / "there" / "report.html").is_file()
    run("sort", tmp_path / "there", "--into", tmp_path / "sorted", env=there)
    run("devices", env=there)
