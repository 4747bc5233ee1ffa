"""Real signals to real processes: whatever dies, there is one row per image in the end."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import helpers
import sample_images
from imagemill.errors import WorkerError
from imagemill.job import documents, inspect
from imagemill.job.paths import JobPaths
from imagemill.pipeline.decoding.decode import FAULTS_VARIABLE
from imagemill.records import Settings
from imagemill.runner import run
from imagemill.workers import launcher, supervisor

Start = Callable[..., Any]
Jobs = Callable[..., Settings]
Folders = Callable[..., Path]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def arguments(folder: Path, output: Path, *more: object) -> tuple[object, ...]:
    return (
        "run",
        folder,
        "--output",
        output,
        "--model",
        "tiny",
        "--devices",
        "null:2",
        "--shard-size",
        4,
        "--num-workers",
        1,
        *more,
    )


def complete(output: Path, count: int) -> None:
    """One ok row per image, in order, and `verify` agrees."""
    rows = helpers.rows(output)
    assert [row["index"] for row in rows] == list(range(count))
    assert {row["status"] for row in rows} == {"ok"}
    frozen = documents.read_frozen(JobPaths(output))
    assert frozen is not None
    assert inspect.verify(JobPaths(output), frozen)[0] == []


def begin(start: Start, folder: Path, output: Path, *more: object, parts: int = 3) -> Any:
    """Start a run and wait until it is well under way."""
    process = start(*arguments(folder, output, *more))
    helpers.until(
        lambda: len(helpers.parts(output)) >= parts and len(helpers.worker_pids(output)) == 2,
        process=process,
    )
    return process


def test_a_killed_worker_is_started_again(start: Start, slow_folder: Path, tmp_path: Path) -> None:
    """SIGKILL to a worker in mid-run: the job ends with one row per image, exit 0, and the restart
    is in the summary and the log.
    """
    out = tmp_path / "out"
    process = begin(start, slow_folder, out, "--json")
    victim = helpers.worker_pids(out)[0]
    os.kill(victim, signal.SIGKILL)
    result = helpers.finish(process)
    assert result.code == 0, result.err
    assert sum(device["restarts"] for device in result.json["devices"]) == 1
    assert f"(pid {victim}) died of signal SIGKILL" in (out / "logs" / "launcher.log").read_text()
    complete(out, 96)


def test_a_worker_may_die_again_and_again(
    job: Jobs, slow_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as shards are committed in between, deaths end no job: here two in a row would. No
    image is blamed for them.
    """
    monkeypatch.setattr(launcher, "DEATHS_WITHOUT_COMMIT", 2)
    out, over = tmp_path / "out", threading.Event()

    def kill() -> None:
        for deaths in range(3):
            done = len(helpers.parts(out))
            while not over.is_set() and not (
                len(helpers.worker_pids(out)) > deaths and len(helpers.parts(out)) > done
            ):
                time.sleep(0.01)
            if not over.is_set():
                os.kill(helpers.worker_pids(out)[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        summary = run.run(job(slow_folder, shard_size=4, num_workers=1))
    finally:
        over.set()
        killer.join()
    assert [device.restarts for device in summary.devices] == [3]
    complete(out, 96)


def test_workers_do_not_outlive_their_launcher_and_the_job_resumes(
    start: Start, slow_folder: Path, tmp_path: Path
) -> None:
    """SIGKILL to the launcher: workers are gone within a second; the same command ends the job
    without computing a finished part again.
    """
    out = tmp_path / "out"
    process = begin(start, slow_folder, out)
    workers = helpers.worker_pids(out)
    assert len(workers) == 2
    assert all(map(helpers.running, workers))
    process.kill()
    killed = time.monotonic()
    helpers.until(lambda: not any(map(helpers.running, workers)), seconds=10)
    assert time.monotonic() - killed < 1
    helpers.finish(process)
    before = helpers.parts(out)
    assert 3 <= len(before) < 24
    result = helpers.finish(start(*arguments(slow_folder, out, "--json")))
    assert result.code == 0, result.err
    assert result.json["resumed_shards"] == len(before)
    assert re.search(r"resuming: \d+ of 96 images are done", result.err)
    after = helpers.parts(out)
    assert {name: after[name] for name in before} == before
    assert not list(out.rglob("*.tmp"))
    complete(out, 96)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_job_and_it_resumes(
    start: Start, slow_folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Exit 130 or 143 with one clear line, workers gone, shards in hand finished; the same command
    does the rest and only that.
    """
    out = tmp_path / "out"
    process = begin(start, slow_folder, out, "--json")
    workers = helpers.worker_pids(out)
    process.send_signal(number)
    result = helpers.finish(process)
    assert (result.code, result.out) == (code, "")
    assert re.search(
        rf"imagemill: stopped by {number.name}: \d+ shards are left\. Repeat the command to"
        r" resume\.\n$",
        result.err,
    )
    assert "Traceback" not in result.err
    assert not any(map(helpers.running, workers))
    before = helpers.parts(out)
    assert not (out / "summary.json").exists()
    result = helpers.finish(start(*arguments(slow_folder, out, "--json")))
    assert result.code == 0, result.err
    after = helpers.parts(out)
    assert {name: after[name] for name in before} == before
    complete(out, 96)


def test_a_second_signal_does_not_wait(start: Start, slow_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C twice: what is in hand is dropped at once, and still nothing is lost."""
    out = tmp_path / "out"
    process = start(*arguments(slow_folder, out, "--shard-size", 96))
    helpers.until(lambda: len(helpers.worker_pids(out)) >= 1, process=process)
    process.send_signal(signal.SIGINT)
    while (
        b"a second signal drops them" not in process.stderr.readline()
    ):  # two signals at once would count as one
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    result = helpers.finish(process)
    assert result.code == 130
    assert time.monotonic() - began < 4
    assert helpers.parts(out) == {}


def test_a_signal_while_listing_leaves_nothing_in_the_way(
    start: Start, tmp_path: Path, jpegs: Folders
) -> None:
    """Before the plan is frozen there is nothing to lose: exit 143, and the same command starts
    anew.
    """
    folder = jpegs(3)
    os.mkfifo(tmp_path / "list")
    (tmp_path / "p").mkdir()
    process = start(*arguments(Path(f"@{tmp_path / 'list'}"), tmp_path / "out"))
    with (tmp_path / "list").open("wb") as listing:  # the launcher waits for lines that do not come
        listing.write(b"%b\n" % os.fsencode(folder / "000.jpg"))
        listing.flush()
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        result = helpers.finish(process)
    assert result.code == 143
    assert "Traceback" not in result.err
    assert helpers.finish(start(*arguments(folder, tmp_path / "out"))).code == 0


def test_a_second_launcher_is_refused_and_status_is_not(
    start: Start, slow_folder: Path, tmp_path: Path
) -> None:
    """Two at once would write over each other; looking is free."""
    out = tmp_path / "out"
    process = begin(start, slow_folder, out)
    process.send_signal(signal.SIGSTOP)  # it stays the holder of the folder for as long as we look
    status, second = start("status", out, "--json"), start(*arguments(slow_folder, out))
    found, refused = helpers.finish(status), helpers.finish(second)
    process.send_signal(signal.SIGCONT)
    assert refused.code == 1
    assert (
        f"imagemill: {out} is in use by another imagemill run. Wait for it or stop it"
        in refused.err
    )
    assert found.code == 0
    assert (found.json["images"], found.json["running"], found.json["complete"]) == (
        96,
        True,
        False,
    )
    result = helpers.finish(process)
    assert result.code == 0, result.err
    complete(out, 96)


def test_an_image_that_kills_its_decoder_is_a_row(
    job: Jobs, jpegs: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes its worker with it once; then it is decoded alone, and named. Its neighbours, also
    in the same shard, are ok.
    """
    monkeypatch.setenv(FAULTS_VARIABLE, "1")
    folder = jpegs(10, **{"005b.jpg": sample_images.jpeg() + b"imagemill-test-crash"})
    summary = run.run(job(folder, shard_size=4))
    assert dict(summary.failed_by_status) == {"crashed_decoder": 1}
    assert sum(device.restarts for device in summary.devices) == 1
    row = helpers.by_path(tmp_path / "out")["005b.jpg"]
    assert (row["status"], row["label"]) == ("crashed_decoder", None)
    assert "SIGSEGV" in row["error"]


def test_an_image_that_hangs_its_decoder_is_a_row(
    job: Jobs, jpegs: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher kills the worker after --max-seconds; alone it hangs again and is a `timeout`
    row.
    """
    monkeypatch.setenv(FAULTS_VARIABLE, "1")
    folder = jpegs(6, **{"003b.jpg": sample_images.jpeg() + b"imagemill-test-hang"})
    summary = run.run(job(folder, shard_size=4, max_seconds=0.5))
    assert dict(summary.failed_by_status) == {"timeout": 1}
    assert helpers.by_path(tmp_path / "out")["003b.jpg"]["status"] == "timeout"


def test_a_worker_that_cannot_start_ends_the_job_with_its_last_words(
    job: Jobs, jpegs: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times running, and no more; the log's last lines are in the message."""
    monkeypatch.setattr(supervisor.sys, "executable", "/bin/false")
    with pytest.raises(
        WorkerError,
        match=(
            r"null#0 could not start 3 times running \(last: exit code 1\)\. The last lines of"
            r" .*null#0\.log"
        ),
    ):
        run.run(job(jpegs(2)))
    monkeypatch.undo()
    monkeypatch.setenv("IMAGEMILL_MODELS", "/nowhere")
    assert run.run(Settings(sources=job(jpegs(2)).sources, output=job().output)).images == 2


def test_workers_that_die_for_ever_end_the_job(
    job: Jobs, slow_folder: Path, tmp_path: Path
) -> None:
    """Ten deaths without one shard between them: something is wrong that restarting does not
    mend.
    """
    out = tmp_path / "out"
    over = threading.Event()

    def kill_all() -> None:
        killed: set[int] = set()
        while not over.is_set():
            for pid in set(helpers.worker_pids(out)) - killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.01)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(
            WorkerError,
            match=r"workers died 10 times without finishing one shard \(last: signal SIGKILL\)",
        ):
            run.run(job(slow_folder, devices="null:2", shard_size=96, num_workers=1))
    finally:
        over.set()
        killer.join()
    assert helpers.parts(out) == {}


def test_a_part_that_cannot_be_written_ends_the_job_and_it_resumes(
    job: Jobs, jpegs: Folders, start: Start, tmp_path: Path
) -> None:
    """The system lets no file grow that far: an error that says which and what to do; finished
    parts stay, and the same command goes on.
    """
    settings = job(jpegs(80), shard_size=20, save=("logits", "embedding"))
    run.run(settings)
    out, room = tmp_path / "out", 4_500
    assert all(path.stat().st_size > room for path in (out / "predictions").iterdir())
    (out / "summary.json").unlink()
    for number in (1, 3):
        (out / "predictions" / f"part-00000{number}.parquet").unlink()
    before = helpers.parts(out)
    program = (
        f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}));"
        " os.execv(sys.argv[1], sys.argv[1:])"
    )
    result = helpers.finish(
        start("run", *settings.sources, "--output", out, before=(sys.executable, "-c", program))
    )
    assert result.code == 1
    assert re.search(
        r"imagemill: cannot write .*part-00000[13]\.parquet: File too large\. Repeat the command"
        r" once the cause is",
        result.err,
    )
    assert "Traceback" not in result.err
    assert helpers.parts(out) == before
    assert run.run(settings).images == 80
    complete(out, 80)


def test_idle_devices_help_the_others(job: Jobs, tmp_path: Path) -> None:
    """With one sub-folder per device each takes its own first, but a device whose folder is small
    does not sit idle.
    """
    data = [
        sample_images.encode(sample_images.photograph(700, 600, seed), "PNG", compress_level=1)
        for seed in range(2)
    ]
    files = {"a/0.png": data[0]} | {f"b/{number:02d}.png": data[number % 2] for number in range(60)}
    folder = helpers.fill(tmp_path / "datasets", files)
    summary = run.run(job(folder, devices="null:2", shard_size=2, num_workers=1))
    assert all(device.images > 5 for device in summary.devices)
    complete(tmp_path / "out", 61)


def test_each_process_has_its_log(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """launcher.log and one file per device, with the device's cores and rate."""
    run.run(job(jpegs(80), devices="null:2"))
    logs = tmp_path / "out" / "logs"
    assert {path.name for path in logs.iterdir()} == {"launcher.log", "null#0.log", "null#1.log"}
    assert re.search(r"device null#0, cores \[\d", (logs / "null#0.log").read_text())
