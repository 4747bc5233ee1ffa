"""Signals, second launchers, sources that change or vanish, clocks that step, and outages that must
not be frozen into the results.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import harness
import pytest

import helpers
import sample_images

pytestmark = pytest.mark.process


def has_parts(output: Path) -> bool:
    return bool(list(output.glob("predictions/part-*.parquet")))


def is_stopping(output: Path) -> bool:
    """Whether the launcher has handled a signal."""
    return "finishing the shards in flight" in (output / "logs" / "launcher.log").read_text()


def test_sigterm_finishes_the_shards_in_flight_within_the_grace(
    null_start, null_run, small_jpegs: Path, tmp_path: Path
) -> None:
    """SIGTERM: the shards in flight are finished, no other is begun, exit 143 with the way to go on;
    repeating the command resumes.
    """
    output, hold = tmp_path / "out", harness.Hold(tmp_path, 20)
    process = null_start(small_jpegs, "--output", output, "--grace", "600", env=hold.environment)
    helpers.until(lambda: has_parts(output), process=process)
    before = len(helpers.parts(output))
    process.send_signal(signal.SIGTERM)
    helpers.until(lambda: is_stopping(output), process=process)
    hold.release()
    result = helpers.finish(process)
    assert result.code == 143
    assert "Run the same command again to continue." in result.err
    assert before < len(helpers.parts(output)) < 6, (
        "the shards in flight were to be finished, and no other"
    )
    kept = helpers.parts(output)
    assert null_run(small_jpegs, "--output", output).code == 0
    harness.assert_complete(output)
    assert kept.items() <= helpers.parts(output).items()


@pytest.mark.parametrize(
    ("grace", "signals"), [("0.3", [signal.SIGTERM]), ("600", [signal.SIGINT, signal.SIGINT])]
)
def test_the_grace_and_a_second_signal_end_the_wait(
    null_start, null_run, small_jpegs: Path, tmp_path: Path, grace, signals
) -> None:
    """A shard that takes too long is dropped when the grace is over, and at once on a second
    signal; and is done when the job resumes.
    """
    output = tmp_path / "out"
    process = null_start(
        small_jpegs,
        "--output",
        output,
        "--grace",
        grace,
        env=harness.Hold(tmp_path, 20).environment,
    )
    helpers.until(lambda: has_parts(output), process=process)
    workers = harness.children(process.pid)
    process.send_signal(signals[0])
    helpers.until(lambda: is_stopping(output))  # two signals at once count as one
    for number in signals[1:]:
        process.send_signal(number)
    result = helpers.finish(process)
    assert re.search(
        rf"stopping: finishing \d shards? \(.* images\) for at most {grace} s, ", result.err
    )
    assert result.code == 128 + signals[0]
    assert not any(map(helpers.running, workers))
    assert null_run(small_jpegs, "--output", output).code == 0
    harness.assert_complete(output)


def test_a_signal_while_listing_leaves_nothing_in_the_way(
    null_start, null_run, small_jpegs: Path, tmp_path: Path
) -> None:
    """Before the plan is frozen there is nothing to lose: exit 143, and another command may use the
    same output.
    """
    listing, output = tmp_path / "list", tmp_path / "out"
    os.mkfifo(listing)
    process = null_start(f"@{listing}", "--output", output)
    with listing.open("wb"):  # it opens once the launcher opens it, and has no end
        time.sleep(0.3)  # by then the launcher waits for the first line
        process.send_signal(signal.SIGTERM)
        result = helpers.finish(process)
    assert result.code == 143
    assert "Traceback" not in result.err
    assert null_run(small_jpegs, "--output", output).code == 0


def test_a_second_launcher_is_refused(
    null_start, null_run, imagemill, small_jpegs: Path, tmp_path: Path
) -> None:
    """Two runs on one output: the second says so and exits 1, before the plan is frozen and after;
    the first does not notice. `status` may look at it.
    """
    output, hold = tmp_path / "out", harness.Hold(tmp_path, 0)
    process = null_start(small_jpegs, "--output", output, env=hold.environment)
    helpers.until((output / ".lock").exists, process=process)
    early = null_run(small_jpegs, "--output", output)
    helpers.until((output / "job.json").exists, process=process)
    late = null_run(small_jpegs, "--output", output)
    status = imagemill("status", output, "--json").json
    hold.release()
    assert (status["images"], status["running"], status["complete"]) == (48, True, False)
    for result in (early, late):
        assert (result.code, result.out) == (1, "")
        assert f"{output} is in use by another imagemill run. Wait for it or stop it" in result.err
    assert helpers.finish(process).code == 0
    harness.assert_complete(output)


def test_looking_at_a_job_does_not_lock_it(null_run, small_jpegs: Path, tmp_path: Path) -> None:
    """`status` takes the lock for a moment to see whether it can; a run that starts in that moment
    waits for it.
    """
    import fcntl

    output = tmp_path / "out"
    output.mkdir()
    hook = """
    if LAUNCHER:
        def busy(module):
            locked, module._LOCK_DELAYS_S = module.locked, (0.05,) * 1000
            def busily(paths):
                import subprocess
                code = "import fcntl, sys, time; fcntl.flock(0, fcntl.LOCK_SH); print(flush=True); time.sleep(0.04)"
                with open(paths.lock) as lock:
                    looking = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=lock, stdout=subprocess.PIPE)
                    looking.stdout.readline()
                return locked(paths)
            module.locked = busily
        after_import("imagemill.job.lock", busy)
    """
    (output / ".lock").touch()
    assert (
        null_run(small_jpegs, "--output", output, env=harness.hooks(tmp_path / "hooks", hook)).code
        == 0
    )
    with (output / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_images_that_change_or_vanish_under_the_job(
    null_start, small_jpegs: Path, tmp_path: Path
) -> None:
    """An image that is gone when its turn comes is `missing`; one of another size is taken as it is
    now, and the log says so.
    """
    source = helpers.fill(
        tmp_path / "source", {path.name: path.read_bytes() for path in small_jpegs.iterdir()}
    )
    output = tmp_path / "out"
    hold = harness.Hold(tmp_path, 24)
    process = null_start(source, "--output", output, env=hold.environment)
    helpers.until(lambda: has_parts(output), process=process)
    (source / "045.jpg").unlink()
    (source / "046.jpg").write_bytes(sample_images.jpeg(60, 50, seed=1))
    hold.release()
    assert helpers.finish(process).code == 0
    harness.assert_complete(output)
    rows = helpers.by_path(output)
    assert rows["045.jpg"]["status"] == "missing"
    assert (rows["046.jpg"]["status"], rows["046.jpg"]["width"]) == ("ok", 60)
    assert "b'046.jpg' changed since it was listed" in (output / "logs" / "null#0.log").read_text()


def test_a_source_that_is_gone_is_rows_and_retry_failed_heals_them(
    null_run, small_jpegs: Path, tmp_path: Path
) -> None:
    """An outage of the storage is not frozen into the results: `--retry-failed` computes those
    shards again, and leaves the others be.
    """
    output, source = tmp_path / "out", tmp_path / "source"
    for half, offset in (("a", 0), ("b", 24)):
        helpers.fill(
            source / half,
            {
                f"{n:03d}.jpg": (small_jpegs / f"{n + offset:03d}.jpg").read_bytes()
                for n in range(24)
            },
        )
    helpers.fill(source / "a", {"000.jpg": b"bad for good"})
    assert null_run(source, "--output", tmp_path / "calm").code == 0
    hook = """
    if LAUNCHER:
        def outage(module):
            start = module.LocalPool.start
            def started(self, *arguments):
                if os.path.exists(os.environ["SOURCE"] + "/b"):
                    os.rename(os.environ["SOURCE"] + "/b", os.environ["SOURCE"] + "-b")
                return start(self, *arguments)
            module.LocalPool.start = started
        after_import("imagemill.workers.local", outage)
    """
    result = null_run(
        source,
        "--output",
        output,
        "--json",
        env=harness.hooks(tmp_path / "hooks", hook, SOURCE=str(source)),
    )
    assert result.code == 0, result
    assert result.json["failed_by_status"] == {"missing": 24, "not_an_image": 1}
    failed = (output / "failed.txt").read_text().splitlines()
    assert failed == [f"{source}/a/000.jpg", *(f"{source}/b/{n:03d}.jpg" for n in range(24))]
    (tmp_path / "source-b").rename(source / "b")

    before = helpers.parts(output)
    assert null_run(source, "--output", output).code == 0
    assert helpers.parts(output) == before, "without the flag a finished job stays as it is"
    listed = null_run(f"@{output / 'failed.txt'}", "--output", tmp_path / "again", "--json")
    assert listed.code == 0, listed
    assert (listed.json["images"], listed.json["ok"]) == (25, 24)
    result = null_run(source, "--output", output, "--retry-failed=missing", "--json")
    assert result.code == 0, result
    assert (result.json["failed_by_status"], result.json["resumed_shards"]) == (
        {"not_an_image": 1},
        3,
    )
    assert (
        dict(list(before.items())[:3]).items() <= helpers.parts(output).items()
        or len(before.items() & helpers.parts(output).items()) == 3
    )
    harness.assert_complete(output)
    harness.assert_same(output, tmp_path / "calm")
    assert (output / "failed.txt").read_text().splitlines() == [f"{source}/a/000.jpg"]
    result = null_run(source, "--output", output, "--retry-failed", "--json")
    assert (result.code, result.json["resumed_shards"]) == (0, 5)
    harness.assert_same(output, tmp_path / "calm")


def test_too_many_bad_images_stop_the_job_early_and_resumably(null_run, tmp_path: Path) -> None:
    """`--max-bad-fraction` ends a job with exit 1 long before its end; with a larger one, or none,
    it goes on from there.
    """
    source = helpers.fill(
        tmp_path / "source",
        {
            f"{n:03d}.jpg": sample_images.jpeg(40, 36, seed=n) if n % 4 else b"bad"
            for n in range(240)
        },
    )
    output = tmp_path / "out"
    result = null_run(source, "--output", output, "--max-bad-fraction", "0.05")
    assert result.code == 1
    assert "14 of 240 images failed, more than --max-bad-fraction 0.05 allows." in result.err
    assert "repeat the command with a larger fraction, or without it, to resume." in result.err
    kept = helpers.parts(output)
    assert 7 <= len(kept) < 30
    assert null_run(source, "--output", output, "--max-bad-fraction", "0.05").code == 1
    assert null_run(source, "--output", output, "--max-bad-fraction", "0.25").code == 0
    harness.assert_complete(output)
    assert kept.items() <= helpers.parts(output).items()


def test_steps_of_the_clock_do_not_matter(
    null_run, small_jpegs: Path, calm: Path, tmp_path: Path
) -> None:
    """A wall clock that jumps by years, to and fro, in every process neither kills a worker nor
    ends a wait nor changes a row.
    """
    hook = """
    import itertools, random
    steps, real = random.Random(1), time.time
    time.time = lambda: real() + steps.choice((-3e8, 0.0, 3e8))
    time.time_ns = lambda: int(time.time() * 1e9)
    """
    env = harness.hooks(tmp_path / "hooks", hook)
    result = null_run(small_jpegs, "--output", tmp_path / "out", "--json", env=env)
    assert result.code == 0, result
    assert result.json["devices"][0]["restarts"] == 0
    assert 0 < result.json["seconds"] < 1e6  # a step is 3e8
    harness.assert_same(tmp_path / "out", calm)


def test_the_plan_is_durable_before_the_job_says_so(
    null_run, small_jpegs: Path, tmp_path: Path
) -> None:
    """Whatever a power cut leaves of the memory of a disk: where there is a job.json, its plan is
    whole. So every plan file, and the folder that names it, are synced before job.json gets its
    name; and every part before it gets its own.
    """
    hook = """
    synced = set()
    fsync, replace = os.fsync, os.replace
    def noting(descriptor):
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        return fsync(descriptor)
    def renamed(before, after, **options):
        with open(os.environ["EVENTS"], "a") as events:
            plan = os.path.join(os.path.dirname(str(after)), "plan")
            needed = [str(before)]
            if os.path.basename(after) == "job.json":
                needed += [plan, *(os.path.join(plan, name) for name in os.listdir(plan))]
            print(os.path.basename(after), *(name for name in needed if name not in synced), file=events)
        return replace(before, after, **options)
    os.fsync, os.replace = noting, renamed
    def path(module):
        module.Path.replace = lambda self, target: os.replace(self, target)
    import pathlib
    path(pathlib)
    """
    env = harness.hooks(tmp_path / "hooks", hook, EVENTS=str(tmp_path / "events"))
    assert null_run(small_jpegs, "--output", tmp_path / "out", env=env).code == 0
    events = (tmp_path / "events").read_text().splitlines()
    events = [line for line in events if not line.startswith("pace.json")]  # nobody needs it later
    closing = ["manifest.json", "failed.txt", "summary.json"]
    assert events == ["job.json", *(f"part-{n:06d}.parquet" for n in range(6)), *closing]
