"""The display: rates, the time that is left, and what is shown where."""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fcntl import ioctl
from io import StringIO
from pathlib import Path
from termios import TIOCSWINSZ
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

import helpers
import made_jobs
from imagemill import cli, report
from imagemill.api import Answer, Prediction
from imagemill.display import observer, terminal
from imagemill.display import pace as pace_module
from imagemill.display.pace import Estimate, Pace
from imagemill.display.results import format_status, format_summary
from imagemill.display.text import failure_parts, fit, fit_to, format_lines, job_parts
from imagemill.job import documents
from imagemill.job.open_job import JobStatus, OpenJob
from imagemill.job.paths import JobPaths
from imagemill.job.store import open_store
from imagemill.records import Clock, DeviceSummary, Progress, Settings, Status, Summary
from imagemill.runner import run, summarise

sys.path.insert(0, str(helpers.PROJECT / "tests" / "faults"))

import harness

Folders = Callable[..., Path]


def at(
    seconds: float,
    rows: Mapping[str, int] | int,
    *,
    leased: Mapping[str, int] | None = None,
    saved: int = 0,
    ready: int = 1,
    clock: Clock | None = None,
    failed: Mapping[str, int] | None = None,
    restarts: int = 0,
) -> Progress:
    """A progress as the launcher reports it; one device if `rows` is a number."""
    devices = {"cpu#0": rows} if isinstance(rows, int) else dict(rows)
    return Progress(
        rows=saved,
        failed_by_status=Counter(failed or {}),
        devices=devices,
        leased=dict(leased if leased is not None else dict.fromkeys(devices, 1)),
        clock=clock or Clock(),
        restarts=dict.fromkeys(devices, restarts),
        since_first_lease_s=seconds,
        ready=ready,
    )


def fed(pace: Pace, course: Iterable[tuple[float, int]]) -> Estimate:
    """The estimate after the last of (seconds, rows)."""
    estimates = [pace.add(at(seconds, rows)) for seconds, rows in course]
    return estimates[-1]


# ── rate and time left ────────────────────────────────────────────────────────────────────────────


@given(
    step=st.integers(1, 64),
    every_s=st.floats(0.05, 40),
    steps=st.integers(3, 60),
    start_s=st.floats(0, 30),
    waited=st.floats(0, 0.95),
)
def test_a_steady_rate_gives_the_exact_end(
    step: int, every_s: float, steps: int, start_s: float, waited: float
) -> None:
    """However answers are lumped into batches, whenever one looks between two of them, and however
    long the first one took to come.
    """
    assume((steps - 1) * every_s >= 2.01)
    total = 10 * step * steps
    pace = Pace(total, 0)
    fed(pace, [(start_s + number * every_s, (number + 1) * step) for number in range(steps)])
    now_s = start_s + (steps - 1 + waited) * every_s
    estimate = pace.add(at(now_s, steps * step))
    assert estimate.rate == pytest.approx(step / every_s)
    assert estimate.left_s is not None
    assert now_s + estimate.left_s == pytest.approx(start_s + (10 * steps - 1) * every_s)


@given(
    course=st.lists(st.tuples(st.floats(0, 1000), st.integers(-50, 500)), max_size=40),
    total=st.integers(0, 5000),
    data=st.data(),
)
def test_any_course_gives_numbers_or_nothing(
    course: list[tuple[float, int]], total: int, data: st.DataObject
) -> None:
    """Leaps, stalls, deaths, no time between two looks, nothing to do: never an error, a negative
    time or a rate that is none.
    """
    resumed = data.draw(st.integers(0, total))
    pace, now_s, rows = Pace(total, resumed), 0.0, 0
    for seconds, more in course:
        now_s, rows = now_s + seconds, min(total - resumed, max(0, rows + more))
        estimate = pace.add(at(now_s, rows, leased={"cpu#0": data.draw(st.integers(0, 500))}))
        assert estimate.rate is None or 0 < estimate.rate < float("inf")
        assert estimate.left_s is None or 0 <= estimate.left_s < float("inf")
        assert estimate.done == resumed + rows
        assert format_lines(at(now_s, rows), estimate, 80, 16)


def test_resumed_images_count_as_done_but_into_no_rate() -> None:
    """A job that is resumed at nine tenths tells the rate of today."""
    estimate = fed(Pace(1_000, 900), [(2.0, 4), (3.0, 14), (4.0, 24)])
    assert (estimate.done, estimate.rate, estimate.left_s) == (924, 10.0, 7.6)


def test_nothing_is_shown_before_there_is_a_rate() -> None:
    """Without answers, and with those of the first two seconds alone, there is neither rate nor
    time.
    """
    pace = Pace(100, 0)
    for seconds, rows, ready, state in [
        (0.0, 0, 0, "starting"),
        (5.0, 0, 1, "first images in progress"),
        (6.0, 4, 1, "running"),
        (7.9, 40, 1, "running"),
    ]:
        estimate = pace.add(at(seconds, rows, ready=ready))
        assert (estimate.state, estimate.rate, estimate.left_s) == (state, None, None)


def test_a_change_of_pace_is_followed() -> None:
    """After as long again at another pace the old one is forgotten, and half-way there it counts
    for half at most.
    """
    pace = Pace(100_000, 0)
    fed(pace, [(second, 40 * second) for second in range(1, 101)])
    estimate = fed(pace, [(100 + second, 4_000 + 10 * second) for second in range(1, 51)])
    assert estimate.rate is not None
    assert 10 < estimate.rate < 25
    estimate = fed(pace, [(150 + second, 4_500 + 10 * second) for second in range(1, 52)])
    assert estimate.rate == pytest.approx(10)


def test_a_short_hitch_moves_little() -> None:
    """One second in which nothing comes, out of a hundred, is not taken for the pace."""
    pace = Pace(10_000, 0)
    course = [(second, 40 * (second - (second > 90))) for second in range(1, 101)]
    estimate = fed(pace, course)
    assert estimate.rate == pytest.approx(40, rel=0.03)


def test_a_stall_makes_the_time_longer_and_is_shown() -> None:
    """Where answers stop coming the rate falls from then on, and the display says for how long
    nothing came.
    """
    pace = Pace(2_000, 0)
    before = fed(pace, [(second, 10 * second) for second in range(1, 61)])
    lefts = [
        estimate.left_s for second in range(70, 200, 10) if (estimate := pace.add(at(second, 600)))
    ]
    assert lefts == sorted(lefts, key=lambda left: left or 0.0)
    assert before.left_s is not None
    assert lefts[-1] is not None
    assert lefts[-1] > 3 * before.left_s
    assert "no result for 2m10s" in job_parts(pace.add(at(190, 600)))
    assert not any("no result" in part for part in job_parts(pace.add(at(191, 610))))


def test_work_lost_to_a_death_is_work_to_do_again() -> None:
    """A device whose count falls back is not slower for it; what is lost is left to do."""
    pace = Pace(1_000, 0)
    fed(pace, [(second, 10 * second) for second in range(1, 31)])
    pace.add(at(30.0, 200))
    estimate = fed(pace, [(30 + second, 200 + 10 * second) for second in range(1, 31)])
    assert estimate.rate == pytest.approx(10)
    assert estimate.left_s == pytest.approx(50)


def test_devices_that_start_late_do_not_count_as_slow() -> None:
    """Each device's clock starts with its own first answers; one that has none yet is taken to be
    as fast as the others.
    """
    pace = Pace(10_000, 0)
    for second in range(1, 41):
        estimate = pace.add(at(second, {"cpu#0": 10 * second, "cpu#1": 10 * max(0, second - 20)}))
        if second == 15:
            assert estimate.rate == pytest.approx(20)
    assert estimate.devices == {"cpu#0": pytest.approx(10), "cpu#1": pytest.approx(10)}
    assert estimate.rate == pytest.approx(20)


def test_the_end_is_that_of_the_device_with_most_in_hand() -> None:
    """When nothing is left to lease, idle devices do not help: the time is that of the last
    shard.
    """
    pace = Pace(1_000, 0)
    for second in range(1, 46):
        pace.add(at(second, {"cpu#0": 10 * second, "cpu#1": 10 * second}))
    estimate = pace.add(at(45.0, {"cpu#0": 450, "cpu#1": 450}, leased={"cpu#0": 100, "cpu#1": 0}))
    assert estimate.rate == pytest.approx(10)
    assert estimate.left_s == pytest.approx(10)


def test_its_memory_does_not_grow_with_the_job() -> None:
    """A device that has moved twenty thousand times is remembered by a few hundred of them, and the
    rate is as exact.
    """
    pace = Pace(10**7, 0)
    estimate = fed(pace, ((0.2 * number, 4 * number) for number in range(1, 20_001)))
    assert len(pace._counts["cpu#0"]._times) <= pace_module._MAX_POINTS
    assert estimate.rate == pytest.approx(20)


def test_the_bottleneck_is_that_of_the_last_seconds() -> None:
    """The clocks of the last interval decide, not those of the whole job; without an image in
    between nothing is said.
    """
    pace = Pace(10_000, 0)
    for second in range(61):
        estimate = pace.add(
            at(
                second,
                second,
                clock=Clock(compute=float(second), decode=0.1 * second, images=second),
            )
        )
    assert estimate.bottleneck == "compute"
    for second in range(61, 101):
        clock = Clock(
            compute=60.0, decode=6.0 + second - 60, starved=float(second - 60), images=second
        )
        estimate = pace.add(at(second, second, clock=clock))
    assert estimate.bottleneck == "decode"
    for second in range(101, 131):
        estimate = pace.add(at(second, 100, clock=clock))
    assert estimate.bottleneck is None


@pytest.mark.parametrize(
    ("session_cpu", "bottleneck"), [(0.0, "decode"), (0.8, "decode"), (1.0, "compute")]
)
def test_who_waits_for_images_on_cores_that_compute_too_may_be_bounded_by_computing(
    session_cpu: float, bottleneck: str
) -> None:
    """As the summary says it in the end: where the session used more CPU time than decoding,
    decoding is not the bottleneck.
    """
    pace = Pace(10_000, 0)
    for second in range(31):
        sums = {
            "decode": 0.9 * second,
            "decode_wall": 1.8 * second,
            "session_cpu": session_cpu * second,
        }
        estimate = pace.add(
            at(second, second, clock=Clock(starved=float(second), images=second, **sums))
        )
    assert estimate.bottleneck == bottleneck


def test_no_bottleneck_is_shown_before_it_is_known() -> None:
    """Not in the first seconds; the summary of so short a job names none either."""
    pace = Pace(10_000, 0)
    found = [
        pace.add(at(second, second, clock=Clock(compute=float(second), images=second))).bottleneck
        for second in range(8)
    ]
    assert found == [None] * 5 + ["compute"] * 3


# ── as text ───────────────────────────────────────────────────────────────────────────────────────

MANY_KINDS = {
    "truncated": 1_200,
    "corrupt": 340,
    "missing": 99,
    "not_an_image": 20,
    "unsupported": 7,
    "too_large": 6,
    "timeout": 3,
}


def large(devices: int, restarts: int = 0) -> tuple[Progress, Estimate]:
    """A large job in the middle."""
    pace = Pace(40_000_000, 1_000_000)
    for second in range(1, 101):
        rows = {f"cuda#{number}": 1_000 * second for number in range(devices)}
        clock = Clock(starved=float(second), decode=9.0 * second, images=second)
        now = at(second, rows, saved=90_000, failed=MANY_KINDS, clock=clock, restarts=restarts)
        estimate = pace.add(now)
    return now, estimate


@pytest.mark.parametrize("width", [60, 80, 100, 160, 300])
@pytest.mark.parametrize("devices", [1, 2, 8, 300])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_lost(width: int, devices: int) -> None:
    """At any width every kind of failure, rate, time and bottleneck is there whole; lines of
    devices are bounded, the rest is summed up.
    """
    now, estimate = large(devices)
    lines = format_lines(now, estimate, width, 16)
    assert max(map(len, lines)) <= width
    messages = re.sub(r",\n", ", ", "\n".join(lines))
    for kind, count in MANY_KINDS.items():
        assert f"{count:,} {kind}" in messages
    for part in (
        "images/s, ",
        " left",
        "bounded by decode",
        "1,675 failed: 1,200 truncated",
        f"{1_000_000 + 90_000:,} saved",
    ):
        assert part in messages
    shown = [line for line in lines if "#" in line]
    named = re.findall(r"cuda#\d+", "\n".join(shown))
    assert len(shown) <= 16
    assert len(named) == len(set(named))
    rest = re.search(r"and (\d+) more: ([\d,]+) images", messages)
    assert len(named) + (int(rest[1]) if rest else 0) == devices
    assert rest is None or int(rest[2].replace(",", "")) == 100_000 * int(rest[1])
    assert all(ord(letter) < 128 for letter in messages)


def test_restarts_are_shown() -> None:
    """Of the device they happened to; at 80 columns too."""
    for count, text in ((0, ""), (1, ", 1 restart"), (12, ", 12 restarts")):
        now, estimate = large(2, count)
        line = next(line for line in format_lines(now, estimate, 80, 16) if "cuda#1" in line)
        assert line.endswith(f"images/s{text}")
        assert len(line) <= 80


@pytest.mark.parametrize(
    ("course", "failed", "expected"),  # of 1,000 images after 100 that were resumed
    [
        ([(0.0, 0)], {}, "100 of 1,100 images (9 %), first images in progress"),
        ([(1.0, 0), (11.0, 500)], {}, "600 of 1,100 images (54 %), 11s elapsed"),
        (
            [(1.0, 50), (10.0, 500)],
            {},
            "600 of 1,100 images (54 %), 50.0 images/s, 10s elapsed, 10s left",
        ),
        (
            [(1.0, 50), (10.0, 500)],
            {"empty": 1, "corrupt": 2},
            "600 of 1,100 images (54 %), 50.0 images/s, 10s elapsed, 10s left, 3 failed: 2 corrupt, 1"
            " empty",
        ),
        (
            [(1.0, 50), (20.0, 1_000)],
            {},
            "1,100 of 1,100 images (100 %), 50.0 images/s, 20s elapsed, 0s left",
        ),
    ],
)
def test_a_line_says_how_far_how_fast_and_how_long(
    course: list[tuple[float, int]], failed: dict[str, int], expected: str
) -> None:
    """For log files: everything in one line."""
    estimate = fed(Pace(1_100, 100), course)
    assert ", ".join([*job_parts(estimate), *failure_parts(failed)]) == expected
    if failed:
        assert (
            format_lines(at(10.0, 500, failed=failed), estimate, 80, 16)[-2]
            == "3 failed: 2 corrupt, 1 empty"
        ), "not a line of its own"


# ── displays ──────────────────────────────────────────────────────────────────────────────────────


def test_a_log_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before there is something to tell; every ten seconds at first, ever more rarely in a job
    of a night; no control characters.
    """
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    stream = StringIO()
    display = terminal.PlainDisplay(10**6, 0, stream)
    display(at(0.0, 0, ready=0))
    assert stream.getvalue() == ""
    for second in range(1, 31):
        now[0] = 1000.0 + second
        display(at(second, 10 * second))
    assert stream.getvalue().count("\n") == 3
    for second in range(31, 36_000, 5):
        now[0] = 1000.0 + second
        display(at(second, 10 * second))
    lines = stream.getvalue().splitlines()
    assert 60 < len(lines) < 200
    assert all(line.isprintable() for line in lines)


def test_the_last_line_of_a_log_file_is_the_end_state() -> None:
    """However soon after another line the job ends, its last line says how far it came."""
    stream = StringIO()
    display = terminal.PlainDisplay(10, 0, stream)
    display(at(1.0, 4))
    display(at(2.0, 10, saved=10, failed={"empty": 1}))
    display.close()
    display.close()
    assert stream.getvalue().splitlines() == [
        "4 of 10 images (40 %), 1s elapsed",
        "10 of 10 images (100 %), finished, 2s elapsed, 1 failed: 1 empty",
    ]
    unused = terminal.PlainDisplay(10, 10, stream)
    unused.close()
    assert stream.getvalue().count("\n") == 2


@pytest.mark.parametrize("is_live", [False, True])
def test_a_download_shows_how_far_it_is(is_live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal has one line renewed in place. A log file has the first line and the end state.
    Bytes of an earlier attempt count into no rate.
    """
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    stream = StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_live)
    display = terminal.DownloadDisplay(stream)
    for second, mebibytes in [(0, 10), (2, 14), (4, 18), (5, 20)]:
        now[0] = 100.0 + second
        display(mebibytes * 2**20, 20 * 2**20)
    lines = re.split(r"\n|\r\x1b\[K", stream.getvalue().strip("\r\n"))
    assert lines[0].endswith("10.0 of 20.0 MiB (50%), 0.0 MiB/s")
    assert lines[-1].endswith("20.0 of 20.0 MiB (100%), 2.0 MiB/s, 0s left")
    assert [line.endswith("2.0 MiB/s, 3s left") for line in lines].count(True) == is_live
    assert stream.getvalue().count("\n") == (1 if is_live else 2)


def on_terminal(
    folder: Path,
    output: Path,
    models_dir: Path,
    is_seen: Callable[[str], bool] = lambda _: True,
    **environment: str,
) -> tuple[str, list[str]]:
    """Run the command on a terminal of 80 columns. The job is held halfway until `is_seen` is true
    of the text so far.

    Returns:
        all that came, and the lines that it showed for a while, without what styles them.
    """
    import pty

    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "imagemill", "run", str(folder), "--output", str(output)]
    options = ["--model", "tiny", "--devices", "null:2", "--batch-size", "2", "--no-report"]
    hold = harness.Hold(output.parent, 24, IMAGEMILL_MODELS=str(models_dir))
    env = hold.environment | environment
    env = {name: value for name, value in env.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [*command, *options, "--shard-size", "8"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=env,
    )
    os.close(theirs)
    shown = b""
    while True:
        if is_seen(shown.decode(errors="replace")):
            hold.release()
        try:
            piece = os.read(ours, 65_536)
        except OSError:  # Linux says so when the last writer is gone
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    process.communicate()
    assert process.returncode == 0
    text = shown.decode()
    return text, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").split("\n")


def is_renewed(text: str) -> bool:
    """Whether a live display has moved up to its first line, and shows the rate of a device."""
    return "\x1b[1A" in text and any(
        "null#0" in line and "images/s" in line for line in text.split("\n")
    )


@pytest.mark.process
def test_a_terminal_gets_a_live_display(
    tiny: Any, models_dir: Path, small_jpegs: Path, tmp_path: Path
) -> None:
    """It is renewed in place, in colour, no line wider than the terminal, and removed at the end."""
    text, lines = on_terminal(
        small_jpegs, tmp_path / "out", models_dir, is_renewed, TERM="xterm-256color"
    )
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", text), "no colour"
    assert max(map(len, lines)) <= 80
    assert any(re.match(r"\d+ of 48 images \(\d+ %\), \d+ saved", line) for line in lines)
    assert "null#0" not in lines[-1]


@pytest.mark.process
def test_no_color_is_obeyed(tiny: Any, models_dir: Path, small_jpegs: Path, tmp_path: Path) -> None:
    """NO_COLOR: still renewed in place, without one colour."""
    text, lines = on_terminal(
        small_jpegs, tmp_path / "out", models_dir, is_renewed, TERM="xterm-256color", NO_COLOR="1"
    )
    assert not re.search(r"\x1b\[[0-9;]*(3|4|9|10)[0-9][;m]", text)
    assert any("null#1" in line for line in lines)


@pytest.mark.process
def test_a_dumb_terminal_gets_plain_lines(
    tiny: Any, models_dir: Path, small_jpegs: Path, tmp_path: Path
) -> None:
    """TERM=dumb: what a log file gets."""
    text, lines = on_terminal(small_jpegs, tmp_path / "out", models_dir, TERM="dumb")
    assert "\x1b" not in text
    assert any(re.match(r"\d+ of 48 images \(\d+ %\), ", line) for line in lines), text
    shown = [line for line in lines if re.match(r"\d+ of 48 images", line)]
    assert shown[-1].startswith("48 of 48 images (100 %), finished")


@pytest.mark.process
def test_answers_are_counted_before_their_shard_is_committed(
    job: Callable[..., Settings],
    small_jpegs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one large shard the display moves all the same: workers publish how many images have an
    answer, and where their time goes.
    """
    hold = harness.Hold(tmp_path, 12)
    for name in ("PYTHONPATH", "HOLD"):
        monkeypatch.setenv(name, hold.environment[name])
    seen: list[Progress] = []
    statuses: list[JobStatus] = []

    class Watcher(observer.Watcher):
        def begin(self, total: int, resumed: int) -> Callable[[Progress], None]:
            def note(progress: Progress) -> None:
                seen.append(progress)
                statuses.append(OpenJob.open(tmp_path / "out").status())
                hold.at(progress.devices["null#0"] + 12)

            return note

    run.run(job(small_jpegs, shard_size=48, batch_size=2), Watcher())
    assert statuses[-1].running
    assert set(statuses[-1].devices) == {"null#0"}, "status has the devices of a running job"
    finished = OpenJob.open(tmp_path / "out")
    assert not finished.paths.pace.exists()
    assert (finished.status().running, finished.status().devices) == (False, {})
    counts = [one.devices["null#0"] for one in seen if not one.rows]
    assert {12, 24, 36} <= set(counts)
    assert all(
        one.devices["null#0"] + one.leased["null#0"] == 48 for one in seen if one.leased["null#0"]
    )
    assert [one.clock.images for one in seen] == sorted(one.clock.images for one in seen)
    assert max(one.clock.decode for one in seen) > 0


@pytest.mark.ecosystem
def test_a_notebook_gets_a_live_display(
    models_dir: Path, small_jpegs: Path, tmp_path: Path
) -> None:
    """In a kernel the display is an output of the cell that is renewed in place, and nothing goes
    to stderr but what is said.
    """
    from jupyter_client.manager import start_new_kernel

    hold = harness.Hold(tmp_path, 24, IMAGEMILL_MODELS=str(models_dir))
    manager, client = start_new_kernel(
        kernel_name="python3", env=hold.environment, startup_timeout=300
    )
    try:
        code = f"""
import imagemill
summary = imagemill.run({str(small_jpegs)!r}, {str(tmp_path / "out")!r}, model="tiny", progress=True, report=False, devices="null")
print(summary.ok)
"""
        outputs: list[dict[str, Any]] = []

        def note(message: dict[str, Any]) -> None:
            outputs.append(message)
            if message["msg_type"] == "update_display_data":
                hold.release()

        client.execute_interactive(code, timeout=300, output_hook=note)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    shown = [
        message["content"]
        for message in outputs
        if message["msg_type"] in ("display_data", "update_display_data")
    ]
    messages = {
        message["content"]["name"]: message["content"]["text"]
        for message in outputs
        if message["msg_type"] == "stream"
    }
    assert not [message for message in outputs if message["msg_type"] == "error"], outputs
    assert messages["stdout"] == "48\n"
    assert len(shown) > 1
    assert len({content["transient"]["display_id"] for content in shown}) == 1
    lines = shown[-1]["data"]["text/plain"].splitlines()
    assert lines[0].startswith("48 of 48 images (100 %)")
    assert 'max="48" value="48"' in shown[-1]["data"]["text/html"]
    assert [line for line in lines if line.split()[:1] == ["null#0"]], lines
    assert "\x1b" not in "".join(content["data"]["text/plain"] for content in shown)


def test_the_logger_is_as_it_was_after_runs_that_overlapped(tmp_path: Path) -> None:
    """Whichever ends first."""
    logger = logging.getLogger("imagemill")
    before = (logger.level, logger.propagate, list(logger.handlers))
    first, second = (observer.logging_to(tmp_path / name) for name in "ab")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    logger.info("for the second")
    second.__exit__(None, None, None)
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
    assert "for the second" in (tmp_path / "b").read_text()
    assert not (tmp_path / "a").exists()


# ── the end of a job, its status, and notebooks ───────────────────────────────────────────────────


def summary(**changes: Any) -> Summary:
    """The summary of a job of ten images."""
    made = Summary(10, 10, 0, {}, {}, 1, 0, 2.0, 5.0, "tiny", "fp32", None, (), "out")
    return replace(made, rates={"achieved": 5.0, "decode_only": 9.0}, **changes)


def test_the_summary_names_results_failed_images_and_what_would_read_them(tmp_path: Path) -> None:
    """One line each; without failures or a report, their lines are not there."""
    for name in ("failed.txt", "report.html"):
        (tmp_path / name).write_text("content")
    failed = summary(
        **{"ok": 6, "failed": 4, "failed_by_status": {"unsupported": 4}, "extras": {"heif": 3}},
        output=str(tmp_path),
    )
    lines = format_summary(failed).splitlines()
    assert lines[-4:] == [
        f"failed images: {tmp_path}/failed.txt",
        f"report: {tmp_path}/report.html",
        f"results: {tmp_path}/predictions",
        f"as CSV: `imagemill export {tmp_path} --to csv`",
    ]
    assert lines[1] == (
        "to read 3 failed images: pip install 'imagemill[heif]', then run again with"
        " --retry-failed=unsupported"
    )
    assert not re.search("failed.txt|pip install|report", format_summary(summary()))


def test_a_lone_device_does_not_repeat_the_rate_of_the_job() -> None:
    """It has a line if there is more to say: another device, a restart, or how busy it was."""
    one = DeviceSummary("cpu#0", 10, 5.0, 0)
    for devices, lines in (
        ((one,), 0),
        ((one, replace(one, name="cpu#1")), 2),
        ((replace(one, restarts=1),), 1),
        ((replace(one, busy=0.5),), 1),
        ((replace(one, retired="no memory"),), 2),
    ):
        assert format_summary(summary(devices=devices)).count("\n  cpu#") == lines


def test_rates_for_developers_are_shown_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With -v alone; the JSON always has them."""
    monkeypatch.setattr(run, "run", lambda *_: summary())
    for options, is_shown in (([], False), (["-v"], True), (["--verbose"], True)):
        assert cli.main(["run", "a", "-o", "out", *options]) == 0
        assert ("decode only 9.0" in capsys.readouterr().out) == is_shown
    cli.main(["run", "a", "-o", "out", "--json"])
    assert json.loads(capsys.readouterr().out)["rates"]["decode_only"] == 9.0


@pytest.mark.parametrize("width", [60, 100, 160])
def test_messages_are_broken_between_words(width: int) -> None:
    """What can be copied stays whole: commands in backticks, paths and URLs. No word is lost."""
    command = "`imagemill quantize efficientnet_lite0 --images SOURCE`"
    text = f"imagemill: a message of {'many words ' * 20}with {command} and /a/{'long-' * 60}/path."
    lines = fit(text, width).split("\n")
    assert all(len(line) < width for line in lines if "long-long" not in line)
    assert any(command in line for line in lines)
    assert " ".join(fit(text, width).split()) == text
    assert fit("  indented\n\nx", width) == "  indented\n\nx"


def test_a_stream_that_is_no_terminal_gets_whole_lines() -> None:
    """For `grep`, and where stderr was closed."""
    text = "word " * 100
    assert fit_to(text, StringIO()) == fit_to(text, None) == text


def test_results_of_commands_are_broken_between_words_on_a_terminal(
    models_dir: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command that `status` names stays in one piece."""
    (tmp_path / "a.jpg").write_bytes(b"x")
    settings = made_jobs.settings_of(
        tmp_path / "a.jpg", output=tmp_path / "out", models_dir=models_dir
    )
    made_jobs.frozen_job(settings, made_jobs.tiny(models_dir))
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((40, 24)))
    for command in (["devices"], ["status", str(tmp_path / "out")], ["verify", settings.output]):
        cli.main(command)
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) > 6
    assert all(len(line) < 40 for line in lines if "/" not in line), lines
    assert f"  `imagemill run {tmp_path}/a.jpg --output {tmp_path}/out`" in lines


def test_the_report_is_announced_before_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It may take a while."""
    seen: list[str] = []
    monkeypatch.setattr(report, "write", lambda _: seen.append("written"))
    job = OpenJob(open_store(JobPaths.of(str(tmp_path))), None)  # type: ignore[arg-type]
    report.attempt(job, seen.append)
    assert seen == ["writing the report", "written"]


def test_status_shows_rate_time_left_failures_and_devices() -> None:
    """Of a running job; a finished one has no rate."""
    running = JobStatus(
        *(100, 25, 4, 1, {"corrupt": 2, "empty": 1}, True, False, {}),
        images_per_second=12.5,
        seconds_left=6.0,
        devices={"cpu#0": 12.5, "cpu#1": None},
    )
    assert format_status(running).splitlines() == [
        "25 of 100 images saved (25 %), running, 12.5 images/s, 6s left",
        "  cpu#0: 12.5 images/s",
        "  cpu#1: no rate yet",
        "failed: 2 corrupt, 1 empty",
    ]
    finished = JobStatus(1, 1, 1, 1, {}, False, True, {})
    assert format_status(finished) == "1 of 1 image saved (100 %), finished"
    stopped = replace(running, running=False, images_per_second=None, seconds_left=None, devices={})
    for command, shown in (
        ("imagemill run a", "`imagemill run a`"),
        ("", "run the same command again"),
    ):
        assert format_status(stopped, command).splitlines()[:2] == [
            "25 of 100 images saved (25 %), not finished",
            f"to continue: {shown}",
        ]


def test_a_running_job_writes_its_pace(tmp_path: Path) -> None:
    """What `status` reads; a damaged or missing file is no error."""
    paths = JobPaths.of(str(tmp_path))
    write = summarise.pace_writer(paths, 1_000, 100)
    assert documents.read_pace(paths) == documents.RunningPace()
    write(at(1.0, 0))
    summarise.pace_writer(paths, 10, 0)(at(2.0, 4))
    assert documents.read_pace(paths) == documents.RunningPace(None, None, {"cpu#0": None})
    documents.write_pace(paths, documents.RunningPace(5.0, 2.0, {"cpu#0": 5.0}))
    assert documents.read_pace(paths).devices == {"cpu#0": 5.0}
    paths.pace.write_text("{")
    assert documents.read_pace(paths) == documents.RunningPace()
    documents.write_pace(JobPaths.of(str(tmp_path / "none")), documents.RunningPace())


def test_a_summary_and_a_prediction_are_a_few_lines_in_a_notebook() -> None:
    """As text and as HTML, in which labels are no markup."""
    made = summary(ok=9, failed=1, failed_by_status={"empty": 1})
    assert repr(made).splitlines() == [
        "images: 10, 9 ok, 1 failed (1 empty)",
        "model: tiny in fp32",
        "speed: 5.0 images/s over 2.0 s",
        "results: out/predictions",
        "failed images: out/failed.txt",
    ]
    assert "<td>out/failed.txt</td>" in made._repr_html_()
    answers = [Answer(n, f"<b>{n}", 0.4 / (n + 1)) for n in range(4)]
    found = Prediction(Status.OK, None, 0, "<b>0", 0.4, tuple(answers), 8, 8)
    assert repr(found) == "Prediction(40.0% <b>0, 20.0% <b>1, 13.3% <b>2, …)"
    assert found._repr_html_().count("<tr>") == 4
    assert "<b>" not in found._repr_html_()
    failed = Prediction(Status.EMPTY, "has no bytes", None, None, None, (), None, None)
    assert repr(failed) == "Prediction(empty has no bytes)"


def test_a_notebooks_bar_ends_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """However soon after another update the job ends."""
    updates: list[dict[str, str]] = []
    handle = SimpleNamespace(update=lambda data, raw: updates.append(data))
    module = SimpleNamespace(display=lambda *_, **__: handle)
    monkeypatch.setattr(terminal.importlib, "import_module", lambda _: module)
    display = terminal.NotebookDisplay(10, 0)
    display(at(1.0, 4))
    display(at(2.0, 10, saved=10))
    display.close()
    assert [re.findall(r'max="(\d+)" value="(\d+)"', data["text/html"]) for data in updates] == [
        [("10", "4")],
        [("10", "10")],
    ]
    assert updates[-1]["text/plain"].startswith("10 of 10 images (100 %)")
