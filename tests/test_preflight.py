"""The preflight: what it estimates for a new job, and that it can harm nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import helpers
import sample_images
from faults import harness
from imagemill.display import observer
from imagemill.job import plan
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.records import Clock, Progress, Settings, Summary
from imagemill.runner import preflight, run
from imagemill.runner.preflight import Sampler
from imagemill.system import serialization

pytestmark = pytest.mark.process

Jobs = Callable[..., Settings]
Folders = Callable[..., Path]

BAD_DECODER = """
def act(module):
    decode = module.decode
    def bad(data, recipe, limits, **options):
        if data in (b"crash", b"hang"):  # SIGALRM ends a process that decodes for too long
            os.kill(os.getpid(), signal.SIGSEGV if data == b"crash" else signal.SIGALRM)
        if data in (b"crash", b"hang", b"stuck"):
            open(os.environ["STUCK"], "w").close()
            time.sleep(3600)
        return decode(data, recipe, limits, **options)
    module.decode = bad
if "imagemill.pipeline.decoding.isolated" in sys.orig_argv:
    after_import("imagemill.pipeline.decoding.isolated", act)
"""


class Patient(observer.Watcher):
    """Keeps the messages, and holds the launcher up until the sample is complete, so that no job is
    over before it.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []

    def notify(self, message: str) -> None:
        self.messages.append(message)

    def begin(self, total: int, resumed: int) -> Callable[[Progress], None]:
        return lambda _: helpers.until(lambda: not is_sampling())


def is_sampling() -> bool:
    return any(thread.name == "preflight" for thread in threading.enumerate())


def decoders() -> list[int]:
    """Decoder processes that this process has started."""

    def command(pid: int) -> bytes:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes()  # empty for a zombie
        except (FileNotFoundError, ProcessLookupError):
            return b""

    return [pid for pid in harness.children(os.getpid()) if b"decoding.isolated" in command(pid)]


@pytest.fixture
def all_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job has a preflight, which samples all of its images, however long it takes."""
    monkeypatch.setattr(preflight, "sample_size", lambda images: images)
    monkeypatch.setattr(preflight, "_TIME_LIMIT_S", 600.0)
    monkeypatch.setattr(preflight, "_IMAGE_LIMIT_S", 600.0)


@pytest.fixture
def bad_decoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Isolated decoders crash, end after the time limit, or hang at images whose bytes are `crash`,
    `hang` or `stuck`.
    """
    hooks = harness.hooks(tmp_path / "hooks", BAD_DECODER)
    monkeypatch.setenv("PYTHONPATH", hooks["PYTHONPATH"])
    monkeypatch.setenv("STUCK", str(tmp_path / "stuck"))


def carried_out(settings: Settings) -> tuple[Summary, list[str]]:
    patient = Patient()
    summary = run.run(settings, patient)
    return summary, [line for line in patient.messages if line.startswith("preflight")]


def sampler_of(settings: Settings, messages: list[str]) -> Sampler:
    """A sampler over a finished job, as if it were new."""
    paths = JobPaths.of(settings.output)
    frozen = OpenJob.open(paths.root).frozen
    return Sampler(frozen.job, plan.shards(paths.plan), messages.append)


def at(seconds: float, rows: int) -> Progress:
    return Progress(
        0, Counter(), {"cpu#0": rows}, {"cpu#0": 1}, Clock(), {"cpu#0": 0}, seconds, ready=1
    )


def reported(sampler: Sampler) -> None:
    """Wait until the sampler has reported the share of unreadable images."""
    helpers.until(lambda: sampler(at(0.0, 0)) or sampler.found)


# ── what it estimates ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("images", "sampled"), [(0, 0), (4_999, 0), (5_000, 50), (20_000, 200), (10**8, 300)]
)
def test_a_sample_is_small_and_small_jobs_have_none(images: int, sampled: int) -> None:
    """The sample is 1 % of the images, at most 300."""
    assert preflight.sample_size(images) == sampled


@pytest.mark.usefixtures("all_sampled")
def test_the_share_of_unreadable_images_is_that_of_the_plan(job: Jobs, jpegs: Folders) -> None:
    """If all images are sampled, the counts by status are those of the rows. The summary keeps the
    estimates.
    """
    bad = {
        "zz.jpg": b"",
        "zy.jpg": b"no image at all",
        "zx.jpg": sample_images.jpeg(400, 300)[:3000],
        "zw.jpg": b"",
    }
    summary, messages = carried_out(job(jpegs(60, **bad)))
    found = summary.preflight
    assert found is not None
    assert found.unreadable == summary.failed_by_status
    assert found.unreadable == {"empty": 2, "not_an_image": 1, "truncated": 1}
    assert messages == [
        "preflight: 64 of 64 images sampled, 4 unreadable (2 empty, 1 not_an_image, 1 truncated)",
        "preflight: estimated unreadable images: 2.5 to 15.0 % (95 % confidence)",
    ]
    assert found.unreadable_low < 4 / 64 < found.unreadable_high
    kept = json.loads((Path(summary.output) / "summary.json").read_bytes())["preflight"]
    assert kept == serialization.to_plain(found)


@pytest.mark.usefixtures("all_sampled")
def test_a_clean_sample_does_not_promise_a_clean_job(job: Jobs, jpegs: Folders) -> None:
    """The upper bound is printed even if every sampled image is readable."""
    _, messages = carried_out(job(jpegs(60)))
    assert messages == [
        "preflight: 60 of 60 images sampled, all readable",
        "preflight: estimated unreadable images: at most 6.0 % (95 % confidence)",
    ]


@pytest.mark.usefixtures("all_sampled")
@pytest.mark.parametrize("save", [None, ("logits",)])
def test_time_and_size_are_estimated_once_the_rate_is_known(
    job: Jobs, jpegs: Folders, save: tuple[str, ...] | None
) -> None:
    """The time follows from five seconds of the job's own rate. The size of the results is right
    within a factor of two.
    """
    settings = job(jpegs(300), preflight=False, save=save)
    run.run(settings)
    messages: list[str] = []
    with sampler_of(settings, messages) as sampler:
        reported(sampler)
        for second in range(1, 8):
            sampler(at(second, 4 * second))
            assert len(messages) == (2 if second < 5 else 3)
    assert re.fullmatch(
        r"preflight: estimated time 1m15s at 4\.0 images/s, results [\d.]+ kB", messages[2]
    )
    found = sampler.found
    assert found is not None
    assert (found.images_per_second, found.seconds) == (4.0, 75.0)
    assert found.result_bytes is not None
    parts = (Path(settings.output) / "predictions").iterdir()
    size = sum(path.stat().st_size for path in parts)
    assert size / 2 < found.result_bytes < 2 * size


def test_it_can_be_turned_off_and_is_not_repeated(
    job: Jobs, jpegs: Folders, tmp_path: Path, all_sampled: None
) -> None:
    """With `--no-preflight`, and in every resumed job, nothing is printed or kept."""
    folder = jpegs(40)
    assert (carried_out(job(folder, preflight=False))[1]) == []
    next((tmp_path / "out" / "predictions").iterdir()).unlink()
    (tmp_path / "out" / "summary.json").unlink()
    summary, messages = carried_out(job(folder))
    assert (summary.preflight, messages) == (None, [])


# ── what it cannot do ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("all_sampled", "bad_decoder")
@pytest.mark.parametrize(("fault", "status"), [("crash", "crashed_decoder"), ("hang", "timeout")])
def test_an_image_that_kills_or_hangs_its_decoder_costs_one_decoder(
    job: Jobs, jpegs: Folders, fault: str, status: str
) -> None:
    """It is one unreadable image of the sample. The other images are sampled, the job completes,
    and no process is left.
    """
    folder = jpegs(30, **{"zz.jpg": fault.encode()})
    summary, _ = carried_out(job(folder))  # its workers decode elsewhere: the row is not_an_image
    assert summary.images == 31
    assert summary.preflight is not None
    assert summary.preflight.sampled == 31
    assert summary.preflight.unreadable == {status: 1}
    helpers.until(lambda: not decoders())


@pytest.mark.usefixtures("all_sampled", "bad_decoder")
def test_a_sample_that_hangs_is_used_as_far_as_it_got(
    job: Jobs, jpegs: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the time limit the display goes on, and the end of the job does not wait for it."""
    settings = job(jpegs(60, **{"zz.jpg": b"stuck"}), preflight=False, max_seconds=600.0)
    run.run(settings)
    now = time.monotonic()
    monkeypatch.setattr(
        preflight, "time", SimpleNamespace(monotonic=lambda: now, perf_counter=time.perf_counter)
    )
    messages: list[str] = []
    with sampler_of(settings, messages) as sampler:
        helpers.until((tmp_path / "stuck").exists)
        sampler(at(0.0, 0))
        assert sampler.found is None
        now += 601
        sampler(at(0.0, 0))
        assert is_sampling()
    assert is_sampling()
    assert sampler.found is not None
    assert 10 <= sampler.found.sampled < 61
    assert sampler.found.unreadable == {}

    def ended() -> bool:
        for pid in decoders():
            harness.kill(pid)
        return not is_sampling()

    helpers.until(ended)


@pytest.mark.usefixtures("all_sampled")
def test_a_sample_that_fails_is_no_error(job: Jobs, jpegs: Folders) -> None:
    """Without a plan to read there are no estimates, and nothing is raised."""
    settings = job(jpegs(30), preflight=False)
    run.run(settings)
    messages: list[str] = []
    with sampler_of(settings, messages) as sampler:
        shutil.rmtree(JobPaths.of(settings.output).plan)
        helpers.until(lambda: not is_sampling())
        sampler(at(0.0, 0))
        sampler(at(1.0, 4))
    assert (sampler.found, messages) == (None, [])
