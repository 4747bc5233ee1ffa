"""Processes are killed, at random and at every single step."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import harness
import pytest

import helpers
import sample_images

pytestmark = pytest.mark.process

SCRIPT = Path(__file__).with_name("crash_lines.py")


def test_any_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    """Workers and launchers that are killed at random moments leave a job that one quiet run
    finishes: same rows, same bytes.

    The long form is `python benchmarks/chaos.py --images 3000 --kills 100`; docs/faults.md has its
    result.
    """
    import chaos

    report = chaos.chaos(tmp_path, 160, 5, seed=4)
    assert report.kills.total() == 5
    assert report.committed_under_fire > 0


def test_a_worker_killed_at_any_step_of_run_shards_and_of_the_commit_comes_to_the_same_end(
    tmp_path: Path,
) -> None:
    """A worker killed at any line of run_shards.py, or after any change on disk that sink.py or
    writing a file makes: the job is complete, with one row per image, and its parts equal an
    undisturbed job's byte for byte.
    """
    _kill_at_every_place(
        "worker",
        tmp_path,
        {"pipeline/run_shards.py": 5, "pipeline/sink.py": 1, "system/files.py": 3},
    )


def test_a_launcher_killed_at_any_step_from_freezing_to_closing_comes_to_the_same_end(
    tmp_path: Path,
) -> None:
    """A launcher killed after any change on disk that it makes while it freezes a job, cuts its
    plan, carries it out, closes its ledger or writes a file: the same command, repeated, ends as
    if nothing had happened.
    """
    _kill_at_every_place(
        "launcher",
        tmp_path,
        {"runner/run.py": 1, "runner/freeze.py": 1, "job/plan.py": 3, "system/files.py": 3},
    )


@pytest.mark.parametrize("places", [pytest.param("lines", marks=pytest.mark.large), "record"])
def test_a_launcher_killed_at_any_step_of_appending_comes_to_the_same_end(
    tmp_path: Path, places: str
) -> None:
    """A launcher killed after any change on disk that it makes while it lists again, cuts the new
    images and processes them, and with `lines` at any line of append.py: the same command,
    repeated, ends with the same rows, and the parts of the first generation keep their bytes.
    """
    later = {f"{seed}.jpg": sample_images.jpeg(24, 20, seed=seed) for seed in (100, 101, 20, 21)}
    helpers.fill(tmp_path / "later", later | {"00.jpg": b"broken"})
    _kill_at_every_place(
        "append",
        tmp_path,
        {"runner/run.py": 1, "job/plan.py": 3, "system/files.py": 3}
        | ({"runner/append.py": 30} if places == "lines" else {}),
        places,
    )


def _kill_at_every_place(
    process: str, folder: Path, least: dict[str, int], mode: str = "record"
) -> None:
    harness.null_bundle(folder / "models", classes=20, size=16)
    files = {f"{seed}.jpg": sample_images.jpeg(24, 20, seed=seed) for seed in range(11)} | {
        "broken.jpg": b"broken"
    }
    helpers.fill(folder / "images", files)
    places = _driver(mode, process, folder).communicate()[0].decode().splitlines()
    for file, count in least.items():
        assert sum(place.startswith(file) for place in places) >= count, places
    drivers = [_driver("crash", process, folder, *places[half::2]) for half in (0, 1)]
    ends = [(driver.communicate(), driver.returncode) for driver in drivers]
    for half, ((out, err), code) in enumerate(ends):
        assert (code, out.decode().splitlines()) == (0, places[half::2]), err.decode()


def _driver(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=helpers.environment()
    )


@pytest.mark.parametrize("victim", ["worker", "launcher", "terminal"])
def test_the_image_in_progress_at_a_kill_gets_its_answer(
    null_start, null_run, small_jpegs: Path, calm: Path, tmp_path: Path, victim: str
) -> None:
    """An image that was being read when its worker or its launcher was killed, or the terminal was
    closed, gets its answer like any other.
    """
    hook = """
    if WORKER:
        def slow(module):
            fetch = module.FolderSource.fetch
            def slowed(self, path, locator, max_bytes):
                if path == b"020.jpg" and once(os.environ["MARKER"]):
                    time.sleep(600)
                return fetch(self, path, locator, max_bytes)
            module.FolderSource.fetch = slowed
        after_import("imagemill.pipeline.sources.folder", slow)
    """
    env = harness.hooks(tmp_path / "hooks", hook, MARKER=str(tmp_path / "marker"))
    before = () if victim == "worker" else (*helpers.FRESH, "--default-signal=HUP")
    process = null_start(small_jpegs, "--output", tmp_path / "out", env=env, before=before)
    helpers.until((tmp_path / "marker").exists, process=process)
    worker = harness.children(process.pid)[0]
    number = signal.SIGHUP if victim == "terminal" else signal.SIGKILL
    harness.kill(worker if victim == "worker" else process.pid, number)
    if victim != "worker":
        assert process.wait() == -number
        helpers.until(lambda: not helpers.running(worker))
        assert null_run(small_jpegs, "--output", tmp_path / "out", env=env).code == 0
    else:
        assert helpers.finish(process).code == 0
        log = (tmp_path / "out" / "logs" / "launcher.log").read_text()
        assert f"(pid {worker}) was killed by SIGKILL" in log
    harness.assert_complete(tmp_path / "out")
    harness.assert_same(tmp_path / "out", calm)
