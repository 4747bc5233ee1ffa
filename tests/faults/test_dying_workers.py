"""Workers that die again and again end the job clearly, or do not end it at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import harness
import pytest

import helpers
from imagemill.display.results import format_status
from imagemill.job.open_job import OpenJob

pytestmark = pytest.mark.process


def test_a_worker_that_cannot_start_ends_the_job_with_its_last_words(
    null_run, small_jpegs: Path, tmp_path: Path
) -> None:
    """Three starts that fail running end the job with exit 1 and the last lines of the log; once
    the cause is gone, it resumes.
    """
    hook = """
    if WORKER:
        def die(module):
            print("the driver is not loaded", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        after_import("imagemill.pipeline.backends.null", die)
    """
    result = null_run(
        small_jpegs, "--output", tmp_path / "out", env=harness.hooks(tmp_path / "hooks", hook)
    )
    assert result.code == 1
    log = tmp_path / "out" / "logs" / "null#0.log"
    message = (
        "imagemill: worker null#0 failed to start 3 times in a row; the last time it was killed by"
        f" SIGKILL. The last lines of {log}:\n"
    )
    assert message in result.err
    assert result.err.endswith("the driver is not loaded\n")
    assert "Traceback" not in result.err
    assert log.read_text().count("the driver is not loaded") == 3
    assert null_run(small_jpegs, "--output", tmp_path / "out").code == 0
    harness.assert_complete(tmp_path / "out")


def test_a_device_that_never_starts_is_retired_and_the_job_ends_complete(
    null_run, small_jpegs: Path, tmp_path: Path
) -> None:
    """The user, `status` and the summary name it, while the job runs and afterwards; another start
    tries it again.
    """
    hook = """
    if WORKER:
        def deadly(module):
            begin = module.NullSession.__init__
            def begun(self, spec, device, clock):
                if device.name == "null#1":
                    print("the card has fallen off the bus", file=sys.stderr, flush=True)
                    os._exit(7)
                while not os.path.exists(os.environ["RETIRED"]):
                    time.sleep(0.02)
                begin(self, spec, device, clock)
            module.NullSession.__init__ = begun
        after_import("imagemill.pipeline.backends.null", deadly)
    """
    words = (small_jpegs, "--output", tmp_path / "out", "--devices", "null:3")
    retired = str(tmp_path / "out" / "retired.json")
    result = null_run(*words, env=harness.hooks(tmp_path / "hooks", hook, RETIRED=retired))
    assert result.code == 0, result
    log = tmp_path / "out" / "logs" / "null#1.log"
    reason = (
        "worker null#1 failed to start 3 times in a row; the last time it ended with exit code 7."
        f" The last lines of {log}: … the card has fallen off the bus"
    )
    assert result.err.count(f"null#1 is retired, the others process its images: {reason}\n") == 1
    assert f"  null#1 was retired: {reason}\n" in result.out
    assert harness.assert_complete(tmp_path / "out").num_rows == 48
    status = OpenJob.open(tmp_path / "out").status()
    assert status.complete
    assert format_status(status).splitlines()[-1] == f"null#1 was retired: {reason}"
    next((tmp_path / "out" / "predictions").glob("part-*")).unlink()
    again = null_run(*words, "--json")
    assert again.code == 0, again
    assert [device["retired"] for device in again.json["devices"]] == [None] * 3
    assert OpenJob.open(tmp_path / "out").status().retired == {}


def test_deaths_without_a_commit_end_the_job(null_run, small_jpegs: Path, tmp_path: Path) -> None:
    """Workers that start but never finish a shard are not restarted for ever; what was committed
    before them is kept.
    """
    hook = """
    if WORKER:
        def die(module):
            write = module.Sink.write
            def deadly(self, batch, top):
                if batch.rows[0].shard.number >= 3:
                    print("here it ends", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
                return write(self, batch, top)
            module.Sink.write = deadly
        after_import("imagemill.pipeline.sink", die)
    if LAUNCHER:
        def impatient(module):
            module.DEATHS_WITHOUT_COMMIT = 3
        after_import("imagemill.workers.launcher", impatient)
    """
    result = null_run(
        small_jpegs,
        "--output",
        tmp_path / "out",
        "--batch-size",
        "8",
        env=harness.hooks(tmp_path / "hooks", hook),
    )
    assert result.code == 1
    assert (
        "imagemill: workers died 3 times without finishing a shard; the last one was killed by"
        " SIGKILL. The last lines of" in result.err
    )
    assert (tmp_path / "out" / "logs" / "null#0.log").read_text().count("here it ends") == 3
    assert harness.assert_sound_so_far(tmp_path / "out") == 3
    before = helpers.parts(tmp_path / "out")
    assert null_run(small_jpegs, "--output", tmp_path / "out").code == 0
    harness.assert_complete(tmp_path / "out")
    assert before.items() <= helpers.parts(tmp_path / "out").items()


@pytest.mark.parametrize("deaths", [1, 3])
def test_memory_that_runs_out_in_a_worker_is_a_death_like_any_other(
    null_run, small_jpegs: Path, calm: Path, tmp_path: Path, deaths: int
) -> None:
    """A MemoryError outside any decoder ends the worker, not the job; its shard is given to the
    next one, in the end alone.
    """
    hook = """
    if WORKER:
        def exhaust(module):
            write = module.Sink.write
            def exhausted(self, batch, top):
                if batch.rows[0].shard.number == 2 and any(once(f"{os.environ['MARKER']}{n}") for n in range(int(os.environ["DEATHS"]))):
                    raise MemoryError
                return write(self, batch, top)
            module.Sink.write = exhausted
        after_import("imagemill.pipeline.sink", exhaust)
    """
    env = harness.hooks(
        tmp_path / "hooks", hook, MARKER=str(tmp_path / "death"), DEATHS=str(deaths)
    )
    result = null_run(
        small_jpegs, "--output", tmp_path / "out", "--json", "--batch-size", "8", env=env
    )
    assert result.code == 0, result
    assert result.json["devices"][0]["restarts"] == deaths
    assert (
        "several workers died: isolated" in (tmp_path / "out" / "logs" / "launcher.log").read_text()
    ) == (deaths >= 2)
    harness.assert_complete(tmp_path / "out")
    harness.assert_same(tmp_path / "out", calm)


def test_workers_take_no_module_from_the_folder_the_user_is_in(
    null_run, small_jpegs: Path, tmp_path: Path
) -> None:
    """A folder of downloads that happens to hold a queue.py is no place to run code from."""
    stray = b"import os\nos._exit(9)\n"
    here = helpers.fill(
        tmp_path / "here", {"simplejpeg.py": stray, "queue.py": stray, "colorsys.py": stray}
    )
    # The launcher is `python -m imagemill` here, which needs the same care from its user; the
    # installed `imagemill` does not.
    hook = """
    if LAUNCHER:
        os.environ.pop("PYTHONSAFEPATH", None)
    """
    env = harness.hooks(tmp_path / "hooks", hook, PYTHONSAFEPATH="1")
    result = null_run(small_jpegs, "--output", tmp_path / "out", env=env, cwd=here)
    assert result.code == 0, result


def test_a_session_that_hangs_is_killed_and_started_again(
    null_run, small_jpegs: Path, tmp_path: Path
) -> None:
    """A device that never answers does not stop the job: its worker is killed, and the next one
    computes what it held.
    """
    hook = """
    if WORKER:
        def hang(module):
            stream = module.NullSession.stream
            def hanging(self, batches):
                for number, found in enumerate(stream(self, batches)):
                    if number == 3 and once(os.environ["MARKER"]):
                        time.sleep(3600)
                    yield found
            module.NullSession.stream = hanging
        after_import("imagemill.pipeline.backends.null", hang)
    if LAUNCHER:
        def impatient(module):
            module.STALLED_S = 1.5
        after_import("imagemill.workers.supervisor", impatient)
    """
    env = harness.hooks(tmp_path / "hooks", hook, MARKER=str(tmp_path / "marker"))
    result = null_run(small_jpegs, "--output", tmp_path / "out", "--json", env=env)
    assert result.code == 0, result
    assert result.json["devices"][0]["restarts"] >= 1  # more if it is not scheduled for as long
    assert (
        "null#0 has done nothing for 2 s with"
        in (tmp_path / "out" / "logs" / "launcher.log").read_text()
    )
    assert harness.assert_complete(tmp_path / "out").num_rows == 48


def test_a_worker_killed_behind_the_commit_of_a_retry_costs_a_restart(
    null_run, small_jpegs: Path, tmp_path: Path
) -> None:
    """Its part has no failed row any more, and nobody got its receipt. No row changes, although
    another image of the shard is gone.
    """
    hook = """
    if WORKER:
        def fatal(module):
            commit = module.Part.commit
            def committing(self):
                receipt = commit(self)
                if once(os.environ["MARKER"]):
                    os.kill(os.getpid(), signal.SIGKILL)
                return receipt
            module.Part.commit = committing
        after_import("imagemill.pipeline.sink", fatal)
    """
    source = tmp_path / "images"
    shutil.copytree(small_jpegs, source)
    broken, gone, *_ = sorted(source.iterdir())
    sound = broken.read_bytes()
    broken.write_bytes(b"")
    arguments = (source, "--output", tmp_path / "out", "--shard-size", "8", "--json")
    assert null_run(*arguments).json["failed_by_status"] == {"empty": 1}
    broken.write_bytes(sound)
    gone.unlink()
    env = harness.hooks(tmp_path / "hooks", hook, MARKER=str(tmp_path / "marker"))
    result = null_run(*arguments, "--retry-failed", env=env)
    assert (result.code, result.json["failed"]) == (0, 0), result.err
    assert (tmp_path / "marker").exists()
    assert {row["status"] for row in helpers.rows(tmp_path / "out")} == {"ok"}
    harness.assert_complete(tmp_path / "out")
