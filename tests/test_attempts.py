"""A device without enough free memory, and a job whose devices depend on its number of images.

Jobs are listed and frozen for real; carrying them out is faked, but for the last test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from imagemill import api
from imagemill.bench import measure as bench
from imagemill.bench.records import BenchSettings
from imagemill.display.observer import Watcher
from imagemill.errors import (
    DeviceError,
    DeviceMemoryError,
    InexactError,
    ModelError,
    OutputError,
    UsageError,
    WorkerError,
)
from imagemill.job.open_job import OpenJob
from imagemill.pipeline import backends
from imagemill.pipeline.backends import automatic, devices
from imagemill.records import DeviceSpec, Settings
from imagemill.runner import attempts, dry_run, run
from imagemill.tuning import batch_size

Job = Callable[..., tuple[Any, list[str]]]


class Lines(Watcher):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def notify(self, message: str) -> None:
        self.lines.append(message)


class Fake:
    """Machines with `null` devices, on which batches of at most `fits` images have room."""

    def __init__(self) -> None:
        self.fits = 2
        self.returns_after: int | None = None
        """Attempts after which everything has room."""
        self.worthwhile = 10**9
        self.attempts: list[tuple[int, bool]] = []
        """Batch size, and whether the job was begun before."""
        self.chosen: Sequence[DeviceSpec] = ()
        self.commits = False
        self.failure: Exception | None = None
        """Of two devices, which stand for GPUs."""

    def devices(self, spec: str) -> tuple[DeviceSpec, ...]:
        return devices.resolve(spec)

    def automatic(
        self, images: int | None, precision: str | None, notify: Callable[[str], None]
    ) -> str:
        if images is None or images >= self.worthwhile:
            return "null:2"
        notify("a GPU is not used")
        return "null"

    def close(self) -> None:
        pass

    def carry_out(
        self, opened: OpenJob, chosen: Sequence[DeviceSpec], is_resumed: bool, **_: object
    ) -> OpenJob:
        size = opened.frozen.job.session.batch_size
        self.attempts.append((size, is_resumed))
        self.chosen = chosen
        if self.failure is not None and len(chosen) > 1:
            raise self.failure
        is_full = self.returns_after is None or len(self.attempts) <= self.returns_after
        if is_full and size > self.fits:
            raise DeviceMemoryError(
                f"null#0 has 1.2 of 24.0 GB free, and batches of {size} need about 2.9 GB."
            )
        return opened


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    for module in (run, dry_run):
        monkeypatch.setattr(module, "connect", lambda *_, **__: made)
    monkeypatch.setattr(run, "_carry_out", made.carry_out)
    monkeypatch.setattr(batch_size, "rule", lambda *_: 16)
    monkeypatch.setattr(backends, "INDEPENDENT", ())
    monkeypatch.setattr(attempts, "WAIT_S", 0.0)
    monkeypatch.setattr(attempts, "_PAUSE_S", 0.0)
    monkeypatch.setattr(OpenJob, "committed", lambda _self: {0} if made.commits else set())
    return made


@pytest.fixture
def job(fake: Fake, jpegs: Callable[..., Path], models_dir: Path, tmp_path: Path) -> Job:
    """Runs the job, and returns the open job and the lines that the user sees."""
    folder = jpegs(3)

    def call(output: str = "out", **changes: Any) -> tuple[Any, list[str]]:
        given: dict[str, Any] = {"sources": (str(folder),), "output": str(tmp_path / output)}
        given |= {"model": "tiny", "models_dir": str(models_dir), "precision": "fp32"}
        watcher = Lines()
        done = run.run(Settings(**(given | {"devices": "null"} | changes)), watcher)
        return done, watcher.lines

    return call


def test_a_new_job_without_memory_takes_smaller_batches_and_freezes_them(
    fake: Fake, job: Job, tmp_path: Path
) -> None:
    """One line for each step; the frozen job is the one that was asked for with that batch size."""
    done, lines = job()
    assert fake.attempts == [(16, False), (8, False), (4, False), (2, False)]
    has = "null#0 has 1.2 of 24.0 GB free, and batches of"
    assert lines == [
        f"{has} {size} need about 2.9 GB. Starting with batches of {size // 2}."
        for size in (16, 8, 4)
    ]
    frozen = OpenJob.open(tmp_path / "out").frozen
    assert frozen == done.frozen
    assert frozen.fixed["batch size"] == "2"
    asked, _ = job("asked", batch_size=2)
    assert frozen.job.answer_id == asked.frozen.job.answer_id
    fake.fits = 16
    larger, _ = job("larger")
    assert frozen.job.answer_id != larger.frozen.job.answer_id


def test_the_smallest_batch_without_memory_is_one_clear_error(fake: Fake, job: Job) -> None:
    """It ends after batches of one image."""
    fake.fits = 0
    with pytest.raises(
        DeviceMemoryError,
        match=r"batches of 1 need about 2\.9 GB\. Free memory, or give another --output and"
        r" --devices cpu\.$",
    ):
        job()
    assert [size for size, _ in fake.attempts] == [16, 8, 4, 2, 1]


def test_a_batch_size_that_was_asked_for_is_never_changed(fake: Fake, job: Job) -> None:
    """The error says what to type."""
    with pytest.raises(
        DeviceMemoryError,
        match=r"batches of 12 need .*Free memory, or give another --output and a smaller"
        r" --batch-size\.$",
    ):
        job(batch_size=12)
    assert fake.attempts == [(12, False)]


@pytest.mark.parametrize("is_new", [False, True])
def test_a_frozen_job_without_memory_waits_and_ends_with_both_figures(
    fake: Fake, job: Job, tmp_path: Path, is_new: bool
) -> None:
    """A resumed one, and a new one that has committed something."""
    if not is_new:
        fake.fits = 16
        job()
        fake.fits, fake.attempts = 2, []
    fake.commits = is_new
    with pytest.raises(
        DeviceMemoryError,
        match=r"^null#0 has 1\.2 of 24\.0 GB free, and batches of 16 need about 2\.9 GB\. This job"
        r" was frozen with that batch size\. Free memory, or give another --output\.$",
    ):
        job()
    assert fake.attempts == [(16, not is_new), (16, True)]
    assert OpenJob.open(tmp_path / "out").frozen.job.session.batch_size == 16
    assert DeviceMemoryError.exit_code == 1


def test_memory_of_a_killed_predecessor_is_waited_for(
    fake: Fake, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says so, and the job goes on as it was frozen."""
    fake.returns_after = 0
    job()
    fake.returns_after, fake.attempts = 3, []
    monkeypatch.setattr(attempts, "WAIT_S", 3600.0)
    done, lines = job()
    assert fake.attempts == [(16, True)] * 4
    assert len(lines) == 1
    assert lines[0].endswith("need about 2.9 GB. Waiting up to 3600 s for more.")
    assert done.frozen.job.session.batch_size == 16


def test_load_and_bench_name_a_smaller_batch_size(
    fake: Fake, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They never change it; a job that `bench` measures says the same as `bench` itself."""
    text = "null#0 has 1.2 of 24.0 GB free, and batches of 16 need about 2.9 GB."

    def full(*_: object) -> None:
        raise DeviceMemoryError(text)

    monkeypatch.setattr(api, "open_session", full)
    with pytest.raises(DeviceMemoryError) as caught:
        api.load("tiny", "null", models_dir=models_dir)
    assert str(caught.value) == (f"{text} Free memory, or use a smaller batch size: batch_size=8.")
    for cause in (None, DeviceMemoryError(text)):

        def measure(*_: object, cause: Exception | None = cause) -> None:
            raise DeviceMemoryError(text if cause is None else "more words") from cause

        monkeypatch.setattr(bench, "_synthetic", measure)
        with pytest.raises(DeviceMemoryError) as caught:
            bench.run(BenchSettings(devices="null", synthetic=True))
        assert str(caught.value) == f"{text} Free memory, or give a smaller --batch-size."


# What `auto` means for a job.


@pytest.mark.parametrize(("worthwhile", "typed", "count"), [(3, "null:2", 2), (4, "null", 1)])
@pytest.mark.parametrize("devices_setting", [None, "auto"])
def test_the_number_of_images_decides_what_auto_means_and_is_frozen(
    fake: Fake, job: Job, worthwhile: int, typed: str, count: int, devices_setting: str | None
) -> None:
    """A resumed job keeps its devices, also if `auto` is typed and would mean others now."""
    fake.fits, fake.worthwhile = 16, worthwhile
    done, lines = job(devices=devices_setting)
    assert done.frozen.devices == typed
    assert len(fake.chosen) == count
    assert lines == ([] if count == 2 else ["a GPU is not used"])
    fake.worthwhile = 7 - worthwhile
    for again in (None, "auto"):
        done, lines = job(devices=again)
        assert (done.frozen.devices, len(fake.chosen), lines) == (typed, count, [])


def test_a_dry_run_chooses_as_the_job_would(
    fake: Fake, job: Job, jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """The line about an unused GPU is among its notes."""
    settings = Settings(sources=(str(jpegs(3)),), output=str(tmp_path / "none"))
    assert dry_run.dry_run(settings).notes == ("a GPU is not used",)
    fake.worthwhile = 3
    assert dry_run.dry_run(settings).notes == ()


def test_a_precision_that_auto_cannot_have_is_an_error_before_the_listing(
    fake: Fake, job: Job
) -> None:
    """As for devices that are named."""
    with pytest.raises(UsageError, match="--precision fp16: null@null does not compute in it"):
        job(devices="auto", precision="fp16", sources=("/no/such/folder",))


UNKNOWN = ModelError("the torch backend does not know operator Acosh. Use --devices cuda@x.")


@pytest.mark.parametrize(
    "failure",
    [
        UNKNOWN,
        DeviceError("null#0: no driver"),
        WorkerError("worker null#0 failed to start 3 times in a row.\n  a line of its log"),
        DeviceMemoryError("null#0 has 1.2 of 24.0 GB free, and batches of 1 need more."),
    ],
)
def test_a_new_job_whose_gpus_fail_starts_on_the_cpu(
    fake: Fake, job: Job, monkeypatch: pytest.MonkeyPatch, failure: Exception, tmp_path: Path
) -> None:
    """One line says why. The job is frozen for the CPU, and continues there."""
    monkeypatch.setattr(automatic, "CPU", "null")
    fake.fits, fake.worthwhile, fake.failure = 16, 3, failure
    done, lines = job(devices=None)
    reason = str(failure).partition("\n")[0]
    assert lines[-1] == f"null:2 is not used, but the CPU: {reason}"
    assert (done.frozen.devices, len(fake.chosen)) == ("null", 1)
    assert OpenJob.open(tmp_path / "out").frozen.devices == "null"
    assert len(lines) == (5 if isinstance(failure, DeviceMemoryError) else 1)
    assert job(devices=None)[1] == []


@pytest.mark.parametrize(
    ("failure", "changes"),
    [
        (UNKNOWN, {"devices": "null:2"}),
        (InexactError("answers depend on position"), {}),
        (OutputError("the disk is full"), {}),
        (UNKNOWN, {"commits": True}),
    ],
)
def test_nothing_else_falls_back_to_the_cpu(
    fake: Fake, job: Job, failure: Exception, changes: dict[str, Any]
) -> None:
    """Devices that were asked for, a card whose answers depend on the batch, errors of something
    else, and jobs that have results.
    """
    fake.fits, fake.worthwhile, fake.failure = 16, 3, failure
    fake.commits = changes.pop("commits", False)
    with pytest.raises(type(failure)) as caught:
        job(**({"devices": None} | changes))
    assert caught.value is failure
    assert len(fake.attempts) == 1
