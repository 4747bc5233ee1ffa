"""Results in an object store keep the promises that results in a folder keep. The server is real,
and so are the kills.
"""

from __future__ import annotations

import io
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pyarrow.parquet as pq
import pytest

import helpers
import sample_images
from archive_files import pack
from s3 import Bucket, Fault, FaultProxy, Request, answers, delays, hangs, resets

PATIENT = """
def patient(module):
    module.WRITING = module.RetryPolicy(seconds=3600, silence_s=3600)
after_import("imagemill.system.storage", patient)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for object stores on "this machine" is the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def calm_parts(calm: Path) -> dict[str, bytes]:
    """Name and bytes of every part of an undisturbed job into a folder."""
    return {path.name: path.read_bytes() for path in (calm / "predictions").iterdir()}


def parts(bucket: Bucket, job: str = "job") -> dict[str, bytes]:
    """The parts in the store; each of them must be a whole Parquet file."""
    keys = bucket.keys()
    found = {
        key.rpartition("/")[2]: bucket.get(key)
        for key in keys
        if key.startswith(f"{job}/predictions/")
    }
    for data in found.values():
        assert pq.read_table(io.BytesIO(data)).num_rows == 8
    return found


def is_put_of(name: str) -> Callable[[Request], bool]:
    return lambda request: request.method == "PUT" and request.path.endswith(name)


def meet_at(name: str) -> Callable[[Request], Fault | None]:
    """A rule that holds the first launcher's PUT of a file until the second one's has come."""
    both = threading.Barrier(2, timeout=300)
    return lambda request: (
        (lambda handler, request: both.wait() and None)
        if is_put_of(name)(request) and request.number < 2
        else None
    )


def test_a_job_in_a_store_is_the_job_in_a_folder(
    s3: Bucket,
    calm_parts: dict[str, bytes],
    small_jpegs: Path,
    null_run: Callable[..., helpers.Result],
    cache: Path,
) -> None:
    """The same parts, byte for byte, with all that belongs to them; any machine can look at it,
    repeat it and verify it.
    """
    result = null_run(small_jpegs, "--output", s3.url + "/job/", "--json")
    assert result.code == 0, result
    assert result.json["output"] == s3.url + "/job"
    assert parts(s3) == calm_parts
    keys = s3.keys()
    names = {
        key.partition("/")[2] for key in keys if "/predictions/" not in key and "/plan/" not in key
    }
    assert names == {
        "job.json",
        "summary.json",
        "manifest.json",
        "failed.txt",
        "logs/launcher.log",
        "logs/null#0.log",
    }
    for machine in ("cache", "another machine's cache"):
        env = helpers.environment(XDG_CACHE_HOME=str(cache.parent / machine))
        sound = helpers.imagemill_here("verify", s3.url + "/job", env=env)
        assert (sound.code, sound.out) == (
            0,
            "complete and sound: 48 images, one row each\n",
        ), sound
        assert (
            "48 of 48 images saved (100 %), finished"
            in helpers.imagemill_here("status", s3.url + "/job", env=env).out
        )
        repeated = null_run(small_jpegs, "--output", s3.url + "/job", env=env)
        assert (repeated.code, "already finished" in repeated.err) == (0, True), repeated


def test_a_launcher_killed_in_mid_write_leaves_no_half_object(
    s3_faults: FaultProxy,
    s3: Bucket,
    calm_parts: dict[str, bytes],
    small_jpegs: Path,
    null_run: Callable[..., helpers.Result],
    null_start: Callable[..., Any],
    cache: Path,
) -> None:
    """Killed while a part is on its way: only whole parts are there. Another machine, which knows
    nothing of it, finishes the job.
    """
    third = is_put_of("part-000002.parquet")
    s3_faults.rule = lambda request: hangs() if third(request) else None
    launcher = null_start(small_jpegs, "--output", s3.url + "/job")
    helpers.until(lambda: any(map(third, list(s3_faults.requests))), process=launcher)
    harness.kill(launcher.pid)
    launcher.communicate()
    before = parts(s3)
    assert sorted(before) == ["part-000000.parquet", "part-000001.parquet"]
    s3_faults.rule = lambda _: None
    s3_faults.requests.clear()
    resumed = null_run(
        small_jpegs,
        "--output",
        s3.url + "/job",
        env=helpers.environment(XDG_CACHE_HOME=str(cache / "other")),
    )
    assert resumed.code == 0, resumed
    assert "resuming: 16 of 48 images are done" in resumed.err
    assert s3_faults.count("PUT", "part-000000") == s3_faults.count("PUT", "part-000001") == 0
    assert parts(s3) == calm_parts


def test_two_launchers_at_once_do_no_harm(
    s3_faults: FaultProxy,
    s3: Bucket,
    calm_parts: dict[str, bytes],
    small_jpegs: Path,
    null_start: Callable[..., Any],
    cache: Path,
) -> None:
    """Two machines that freeze the same job at the same moment: one of them does, the other takes
    it up, and both end well.
    """
    s3_faults.rule = meet_at("job.json")
    launchers = [
        null_start(
            small_jpegs,
            "--output",
            s3.url + "/job",
            env=helpers.environment(XDG_CACHE_HOME=str(cache / name)),
            before=helpers.FRESH,
        )
        for name in "ab"
    ]
    results = [helpers.finish(launcher) for launcher in launchers]
    assert [result.code for result in results] == [0, 0], results
    assert parts(s3) == calm_parts
    keys = s3.keys()
    assert len([key for key in keys if "/plan/" in key]) == 1
    assert helpers.imagemill_here("verify", s3.url + "/job").code == 0


def test_two_launchers_that_append_at_once_do_no_harm(
    s3_faults: FaultProxy,
    s3: Bucket,
    small_jpegs: Path,
    null_run: Callable[..., helpers.Result],
    null_start: Callable[..., Any],
    tmp_path: Path,
    cache: Path,
) -> None:
    """Two machines that append the same images at the same moment: one of them freezes them, the
    other one finds them in the plan. A third machine, which has no copy of the plan, sees one job.
    """
    images = tmp_path / "images"
    shutil.copytree(small_jpegs, images)
    output = s3.url + "/job"
    assert null_run(images, "--output", output).code == 0
    keys = s3.keys()
    before = {key: s3.get(key) for key in keys if "/predictions/" in key}
    later = {f"{n}.jpg": sample_images.jpeg(30, 30, seed=n) for n in (0, 300)}
    helpers.fill(images, later)
    packed = pack(tmp_path, "tar.gz", later)
    s3_faults.rule = meet_at("000002.json")
    launchers = [
        null_start(
            *(images, packed, "--append", "--output", output),
            env=helpers.environment(XDG_CACHE_HOME=str(cache / name)),
        )
        for name in "ab"
    ]
    results = [helpers.finish(launcher) for launcher in launchers]
    assert [result.code for result in results] == [0, 0], results
    added = "imagemill: 4 new images: 0.jpg, 300.jpg, 0.jpg, 300.jpg\n"
    nothing = "imagemill: nothing to append: the job has all 52 listed images\n"
    assert sorted((added in r.err, nothing in r.err) for r in results) == [
        (False, True),
        (True, False),
    ]
    keys = s3.keys()
    assert [key for key in keys if "/appended/" in key] == ["job/appended/000002.json"]
    assert len([key for key in keys if "/plan/000002/plan-" in key]) == 1
    assert before.items() <= {key: s3.get(key) for key in keys}.items()
    env = helpers.environment(XDG_CACHE_HOME=str(cache / "c"))
    sound = helpers.imagemill_here("verify", output, env=env)
    assert (sound.code, sound.out) == (0, "complete and sound: 52 images, one row each\n"), sound
    (local,) = (cache / "c" / "imagemill" / "jobs").iterdir()
    assert (local / "plan" / "source-00001.gzidx").is_file()


def test_a_launcher_killed_while_it_appends_to_a_store_is_followed_by_another_machine(
    s3_faults: FaultProxy,
    s3: Bucket,
    small_jpegs: Path,
    null_run: Callable[..., helpers.Result],
    null_start: Callable[..., Any],
    tmp_path: Path,
    cache: Path,
) -> None:
    """It had published its plan, but not the document. The other machine adds more images, and the
    first one, with its copy of a plan that never was, sees them.
    """
    output, words = s3.url + "/job", ("--append", "--output", s3.url + "/job")
    assert null_run(small_jpegs, *words).code == 0
    helpers.fill(tmp_path / "more", {f"{n}.jpg": sample_images.jpeg(seed=n) for n in range(3)})
    document = is_put_of("appended/000002.json")
    s3_faults.rule = lambda request: hangs() if document(request) else None
    launcher = null_start(tmp_path / "more", *words)
    helpers.until(lambda: any(map(document, list(s3_faults.requests))), process=launcher)
    harness.kill(launcher.pid)
    launcher.communicate()
    s3_faults.rule = lambda _: None
    helpers.fill(tmp_path / "more", {"0/first.jpg": sample_images.jpeg(seed=9)})
    other = helpers.environment(XDG_CACHE_HOME=str(cache / "other"))
    assert null_run(tmp_path / "more", *words, env=other).code == 0
    again = null_run(tmp_path / "more", *words)
    assert (again.code, "nothing to append" in again.err) == (0, True), again
    sound = helpers.imagemill_cli("verify", output)
    assert sound.out == "complete and sound: 52 images, one row each\n", sound


def test_a_slow_and_failing_store_delays_the_job_and_no_more(
    s3_faults: FaultProxy,
    s3: Bucket,
    calm_parts: dict[str, bytes],
    small_jpegs: Path,
    null_run: Callable[..., helpers.Result],
) -> None:
    """Throttled, reset and delayed writes are tried again."""

    def rule(request: Request) -> Any:
        if request.method != "PUT" or request.number > 1:
            return None
        return (answers(503, "SlowDown"), resets(), delays(0.3))[
            (len(request.path) + request.number) % 3
        ]

    s3_faults.rule = rule
    result = null_run(small_jpegs, "--output", s3.url + "/job")
    assert result.code == 0, result
    assert s3_faults.count("PUT") > len(calm_parts) + 6
    assert parts(s3) == calm_parts


def test_a_store_that_refuses_writes_ends_the_job_clearly_and_it_goes_on_later(
    s3_faults: FaultProxy,
    s3: Bucket,
    calm_parts: dict[str, bytes],
    small_jpegs: Path,
    null_run: Callable[..., helpers.Result],
) -> None:
    """Exit 1, one message that names the part and the reason; what was committed is kept."""
    s3_faults.rule = lambda request: (
        answers(403, "AccessDenied") if is_put_of("part-000003.parquet")(request) else None
    )
    result = null_run(small_jpegs, "--output", s3.url + "/job")
    assert result.code == 1
    reported = result.err.splitlines()[-1]
    assert reported.startswith(
        f"imagemill: cannot write {s3.url}/job/predictions/part-000003.parquet: "
    )
    assert reported.endswith("finished parts are kept.")
    assert len(parts(s3)) >= 3
    s3_faults.rule = lambda _: None
    assert null_run(small_jpegs, "--output", s3.url + "/job").code == 0
    assert parts(s3) == calm_parts


def test_a_damaged_part_in_a_store_is_found_moved_aside_and_computed_again(
    s3: Bucket,
    calm_parts: dict[str, bytes],
    small_jpegs: Path,
    null_run: Callable[..., helpers.Result],
) -> None:
    """`verify` names it, `verify --quarantine` moves it below quarantine/, `run` makes it again."""
    assert null_run(small_jpegs, "--output", s3.url + "/job").code == 0
    name = "job/predictions/part-000004.parquet"
    data = bytearray(s3.get(name))
    data[len(data) // 2] ^= 1
    s3.fill({name: bytes(data)})
    found = helpers.imagemill_here("verify", s3.url + "/job", "--quarantine")
    assert found.code == 1
    assert f"{s3.url}/{name} is not the file that was committed" in found.out
    keys = s3.keys()
    assert name not in keys
    assert [key for key in keys if key.startswith("job/quarantine/part-000004.")]
    assert null_run(small_jpegs, "--output", s3.url + "/job").code == 0
    assert parts(s3) == calm_parts


def test_what_is_not_a_free_place_in_a_store_is_refused(
    s3: Bucket, small_jpegs: Path, null_run: Callable[..., helpers.Result]
) -> None:
    """A prefix with other objects, a bucket that is not there, and the web are no outputs;
    nothing is written.
    """
    s3.fill({"mine/thesis.doc": b"x"})
    custom = null_run(small_jpegs, "--output", s3.url + "/mine")
    assert (
        custom.code,
        f"--output {s3.url}/mine is not empty and not an imagemill job (it holds 'thesis.doc')"
        in custom.err,
    ) == (2, True)
    missing = null_run(small_jpegs, "--output", "s3://no-such-bucket-here/job")
    assert (
        missing.code,
        "--output s3://no-such-bucket-here/job cannot be listed: " in missing.err,
    ) == (1, True), missing
    web = null_run(small_jpegs, "--output", "https://example.invalid/job")
    assert (
        web.code,
        "https://example.invalid/job: not a place in an object store" in web.err,
    ) == (
        2,
        True,
    ), web
    refused = null_run(small_jpegs, "--output", s3.url + "/job", "--keep", "none")
    assert (refused.code, "--keep none: no source has this column" in refused.err) == (2, True)
    assert s3.keys() == ["mine/thesis.doc"]


def test_a_second_launcher_of_this_machine_is_refused(
    s3_faults: FaultProxy,
    s3: Bucket,
    small_jpegs: Path,
    null_run: Callable[..., helpers.Result],
    null_start: Callable[..., Any],
) -> None:
    """One machine does not do its work twice."""
    first = is_put_of("part-000000.parquet")
    s3_faults.rule = lambda request: hangs() if first(request) else None
    launcher = null_start(small_jpegs, "--output", s3.url + "/job")
    helpers.until(lambda: any(map(first, list(s3_faults.requests))), process=launcher)
    refused = null_run(small_jpegs, "--output", s3.url + "/job")
    assert (refused.code, f"{s3.url}/job is in use by another imagemill run" in refused.err) == (
        1,
        True,
    ), refused
    harness.kill(launcher.pid)
    launcher.communicate()


@pytest.mark.parametrize("file", ["job.json", "part-000002.parquet"])
def test_a_signal_ends_a_job_whose_store_is_silent(
    file: str,
    s3: Bucket,
    s3_faults: FaultProxy,
    null_start: Callable[..., Any],
    small_jpegs: Path,
    null_run: Callable[..., helpers.Result],
    tmp_path: Path,
) -> None:
    """A write would be tried for an hour. The logs, which cannot be written either, are not waited
    for.
    """
    silent: list[Request] = []

    def rule(request: Request) -> Fault | None:
        if is_put_of(file)(request):
            silent.append(request)
        return hangs() if silent else None

    s3_faults.rule = rule
    env = harness.hooks(tmp_path / "hooks", PATIENT)
    process = null_start(small_jpegs, "--output", s3.url + "/job", "--grace", "1", env=env)
    helpers.until(lambda: silent, process=process)
    process.send_signal(signal.SIGINT)
    result = helpers.finish(process)
    assert result.code == 130
    assert "Traceback" not in result.err
    s3_faults.rule = lambda _: None
    assert null_run(small_jpegs, "--output", s3.url + "/job").code == 0
    assert len(parts(s3)) == 6
