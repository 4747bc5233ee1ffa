"""The preflight: what is foretold of a new job, what it may cost, and that it can harm nothing."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import helpers
import sample_images
from faults.harness import children
from imagemill.display import observer
from imagemill.job import documents, plan
from imagemill.job.paths import JobPaths
from imagemill.models import bundle
from imagemill.pipeline.decoding.decode import FAULTS_VARIABLE
from imagemill.records import Clock, DeviceSpec, Progress, Settings, Status, Summary
from imagemill.runner import preflight, run
from imagemill.runner.preflight import Looked, Lookout, Sample
from imagemill.system import serialization
from tiny import TINY_CARD, tiny_model

Jobs = Callable[..., Settings]
Folders = Callable[..., Path]
CPU = (DeviceSpec("cpu#0", "cpu", "openvino", (0, 1)),)


@pytest.fixture(scope="module")
def heavy(models_dir: Path) -> str:
    """The tiny model with a card that says it is huge, so that a job of few images is one of many
    minutes to the preflight.
    """
    bundle.write(
        models_dir / "heavy", replace(TINY_CARD, name="heavy", parameters=2 * 10**10), tiny_model()
    )
    return "heavy"


class Patient(observer.Watcher):
    """Keeps what was said, and holds the launcher up until the preflight has ended, so that no job
    is over before it.
    """

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def begin(self, total: int, resumed: int) -> Callable[[Progress], None]:
        return lambda _: helpers.until(lambda: not preflights())


def preflights() -> list[int]:
    """Processes of ours that look at a sample now."""

    def command(pid: int) -> bytes:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes()  # of a zombie: empty
        except (FileNotFoundError, ProcessLookupError):
            return b""

    return [pid for pid in children(os.getpid()) if b"imagemill.runner.preflight" in command(pid)]


def carried_out(settings: Settings) -> tuple[Summary, list[str]]:
    patient = Patient()
    summary = run.run(settings, patient)
    return summary, [line for line in patient.said if line.startswith("preflight")]


# ── what it may cost ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("count", "parameters", "has_one"),
    [
        (30, 44_177_704, False),
        (500, 44_177_704, False),
        (1_000, 44_177_704, True),
        (1_000, 4_652_008, False),
        (6_000, 4_652_008, True),
    ],
)
def test_small_jobs_get_none(count: int, parameters: int, has_one: bool) -> None:
    """Where starting a process costs more than 2 % of the job; how many images that are depends on
    the model.
    """
    assert (preflight.budget_s(count, parameters, CPU) > 0) is has_one
    assert preflight.budget_s(count, parameters, CPU) <= 0.02 * count * (
        0.002 + 0.6e-9 * parameters
    )


def test_other_devices_than_cores_take_no_core_s_time() -> None:
    """A GPU's computing is not counted as CPU time that there is to spare."""
    gpu = (DeviceSpec("cuda#0", "cuda", "onnxruntime", (0,)),)
    assert preflight.budget_s(5_000, 44_177_704, gpu) == 0
    assert preflight.budget_s(10**6, 44_177_704, gpu) == pytest.approx(40)


def test_many_cores_do_not_wait_for_it() -> None:
    """Where cores are many a job of much CPU time is over soon: the preflight is not to last longer
    than a twentieth of it.
    """
    wide = (DeviceSpec("cpu#0", "cpu", "openvino", tuple(range(64))),)
    seconds = 100_000 * (0.002 + 0.6e-9 * 44_177_704) / 64
    assert preflight.budget_s(100_000, 44_177_704, wide) == pytest.approx(0.05 * seconds)
    assert preflight.budget_s(10_000, 44_177_704, wide) == 0


@given(count=st.integers(1, 10**7), data=st.data())
def test_any_sample_is_spread_evenly_at_any_time(count: int, data: st.DataObject) -> None:
    """Each image once, all of a small plan; the first eighth of a large sample already reaches from
    one end to the other.
    """
    wanted = min(count, 300)
    chosen = preflight.spread(count, wanted)
    assert len(set(chosen)) == wanted == len(chosen)
    assert min(chosen) >= 0
    assert max(chosen) < count
    if wanted == 300:
        early = sorted(chosen[: data.draw(st.integers(37, 300))])
        gaps = [after - before for before, after in zip([0, *early], [*early, count], strict=True)]
        assert max(gaps) <= count / 20


def test_the_budget_ends_it(job: Jobs, jpegs: Folders, heavy: str) -> None:
    """A sample whose CPU time is spent is as long as it is."""
    settings = job(jpegs(40), model=heavy, preflight=False)
    run.run(settings)
    frozen = documents.read_frozen(JobPaths.of(settings.output))
    assert frozen is not None
    assert len(list(preflight.look(Sample(frozen.job, 40, 40, (0,), budget_s=1e9)))) == 40
    assert list(preflight.look(Sample(frozen.job, 40, 40, (0,), budget_s=0.0))) == []


# ── what it says ──────────────────────────────────────────────────────────────────────────────────


def test_the_share_of_unreadable_images_is_that_of_the_plan(
    job: Jobs, jpegs: Folders, heavy: str
) -> None:
    """All of a small plan is tried: counts by kind are those of the rows, and the summary keeps
    what was said.
    """
    bad = {
        "zz.jpg": b"",
        "zy.jpg": b"no image at all",
        "zx.jpg": sample_images.jpeg(400, 300)[:3000],
        "zw.jpg": b"",
    }
    summary, said = carried_out(job(jpegs(60, **bad), model=heavy))
    assert summary.preflight is not None
    assert (
        summary.preflight.unreadable
        == summary.failed_by_status
        == {
            "empty": 2,
            "not_an_image": 1,
            "truncated": 1,
        }
    )
    assert said == [
        "preflight: 64 of 64 images tried: 6.2 % unreadable (2 empty, 1 not_an_image, 1 truncated)",
        "preflight: so 2.5 to 15.0 % of all are likely to be unreadable",
    ]
    assert summary.preflight.unreadable_low < 4 / 64 < summary.preflight.unreadable_high
    kept = json.loads((Path(summary.output) / "summary.json").read_bytes())["preflight"]
    assert kept == serialization.to_plain(summary.preflight)


def test_where_all_can_be_read_it_says_how_many_may_not(
    job: Jobs, jpegs: Folders, heavy: str
) -> None:
    """A clean sample does not promise a clean job."""
    _, said = carried_out(job(jpegs(60), model=heavy))
    assert said == [
        "preflight: 60 of 60 images tried: none unreadable",
        "preflight: so at most 6.0 % of all are likely to be unreadable",
    ]


def test_the_display_knows_while_it_runs(job: Jobs, slow_folder: Path, heavy: str) -> None:
    """Each progress says whether the sample is being taken beside it, so that no rate is taken from
    it: at first yes, afterwards no.
    """
    seen: list[bool] = []

    class Watcher(Patient):
        def begin(self, total: int, resumed: int) -> Callable[[Progress], None]:
            wait = super().begin(total, resumed)

            def shown(progress: Progress) -> None:
                seen.append(progress.sampling)
                wait(progress)

            return shown

    run.run(job(slow_folder, model=heavy), Watcher())
    assert seen[0] is True
    assert seen[-1] is False
    assert seen == sorted(seen, reverse=True)


def test_it_ends_with_the_job(job: Jobs, jpegs: Folders, heavy: str) -> None:
    """A job that is over first leaves no process behind."""
    run.run(job(jpegs(4), model=heavy))
    assert not preflights()


def lookout_of(job: Jobs, folder: Path, heavy: str, said: list[str], **changes: Any) -> Lookout:
    """A lookout over a finished job, as if it were new."""
    settings = job(folder, model=heavy, preflight=False, **changes)
    run.run(settings)
    paths = JobPaths.of(settings.output)
    frozen = documents.read_frozen(paths)
    assert frozen is not None
    return Lookout(frozen.job, plan.shards(paths.plan), CPU, said.append)


def at(seconds: float, rows: int, clock: Clock, ready: int = 1) -> Progress:
    return Progress(
        0, Counter(), {"cpu#0": rows}, {"cpu#0": 1}, clock, {"cpu#0": 0}, seconds, ready
    )


def heard(lookout: Lookout) -> None:
    """Wait until the child has told all it has to tell."""
    helpers.until(lambda: lookout(at(0.0, 0, Clock())) or lookout.found)


def test_the_time_is_foretold_when_the_rate_is_known(job: Jobs, jpegs: Folders, heavy: str) -> None:
    """Not before the job has shown for some seconds how fast it computes; then rate, time,
    bottleneck, decoding alone and size.
    """
    said: list[str] = []
    with lookout_of(job, jpegs(100), heavy, said) as lookout:
        heard(lookout)
        for second in range(1, 8):
            lookout(
                at(
                    second,
                    4 * second,
                    Clock(compute=float(second), decode=0.01 * second, images=4 * second),
                )
            )
            assert len(said) == (2 if second < 5 else 4)
    assert said[2] == "preflight: about 25s in all, 4.0 images/s, bounded by compute"
    assert re.fullmatch(
        r"preflight: decoding alone [\d,]+ images/s, results of about [\d.,]+ KiB", said[3]
    )
    assert max(map(len, said)) <= 80 - len("imagemill: ")
    assert lookout.found is not None
    assert (lookout.found.images_per_second, lookout.found.seconds, lookout.found.bottleneck) == (
        4.0,
        25.0,
        "compute",
    )
    assert 0 < lookout.found.cpu_s < 30


def test_images_ahead_that_are_larger_make_it_longer(job: Jobs, jpegs: Folders, heavy: str) -> None:
    """Where decoding bounds the job, its rate so far is corrected by what decoding takes over the
    whole plan.
    """
    said: list[str] = []
    with lookout_of(job, jpegs(100), heavy, said) as lookout:
        heard(lookout)
        cheap = sum(item.decode_s for item in lookout._looked) / len(lookout._looked) / 2
        for second in range(1, 6):
            rows = 4 * second
            lookout(
                at(second, rows, Clock(starved=float(second), decode=cheap * rows, images=rows))
            )
    assert lookout.found is not None
    assert lookout.found.bottleneck == "decode"
    assert lookout.found.images_per_second == pytest.approx(2.0, rel=0.01)


def test_the_size_of_the_results_is_about_what_they_take(
    job: Jobs, jpegs: Folders, heavy: str
) -> None:
    """Within a factor of two of the parts, with logits and without; from the first parts on, as
    theirs.
    """
    for save in (None, ("logits",)):
        said: list[str] = []
        output = JobPaths.of(job().output).root.with_name(f"out-{save}")
        with lookout_of(job, jpegs(300), heavy, said, save=save, output=str(output)) as lookout:
            lookout._looked = [Looked(Status.OK, 0.0, 0.01)] * 10
            size = sum(path.stat().st_size for path in (output / "predictions").iterdir())
            foretold = lookout._result_bytes()
            assert foretold is not None
            assert size / 2 < foretold < 2 * size


# ── what it cannot do ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", ["crash", "hang"])
def test_an_image_that_ends_the_child_ends_nothing_else(
    job: Jobs, jpegs: Folders, heavy: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A crash is one unreadable image more; a hang is over when the time is. What was told before
    counts, and no process is left.
    """
    said: list[str] = []
    folder = jpegs(
        100, **{"099.jpg": b"imagemill-test-" + fault.encode()}
    )  # the last of the last pass
    monkeypatch.setattr(preflight, "_DEADLINE_S", 6.0)
    lookout = lookout_of(job, folder, heavy, said)  # the job itself takes the file for text
    with lookout:
        lookout._end()
        monkeypatch.setenv(FAULTS_VARIABLE, "1")
        lookout._start(Sample(lookout._job, 100, 100, (0, 1), 1e9))
        process = lookout._process
        assert process is not None
        heard(lookout)
        assert process.returncode is not None
    assert lookout.found is not None
    assert lookout.found.looked_at > 10
    assert lookout.found.unreadable == ({"crashed_decoder": 1} if fault == "crash" else {})
    assert lookout.found.cpu_s == 0


def test_it_hurries_and_then_gives_way(
    job: Jobs, jpegs: Folders, heavy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While workers start the child has their priority; from the first that is ready on it gets
    what they leave.
    """
    lookout = lookout_of(
        job,
        jpegs(20, **{f"{number:03d}.jpg": b"imagemill-test-hang" for number in range(20)}),
        heavy,
        [],
    )
    with lookout:
        lookout._end()
        monkeypatch.setenv(FAULTS_VARIABLE, "1")
        lookout._start(Sample(lookout._job, 20, 20, (0, 1), 1e9))
        assert lookout._process is not None
        pid, ours = lookout._process.pid, os.getpriority(os.PRIO_PROCESS, 0)
        lookout(at(0.0, 0, Clock(), ready=0))
        assert os.getpriority(os.PRIO_PROCESS, pid) == ours
        lookout(at(0.0, 0, Clock(), ready=1))
        assert os.getpriority(os.PRIO_PROCESS, pid) == 10
        assert lookout.sampling


def test_a_child_that_waits_for_servers_disturbs_nobody(
    job: Jobs, jpegs: Folders, heavy: str
) -> None:
    """What takes no time of the cores keeps no rate from being told; what decodes does, and so does
    the child's start.
    """
    with lookout_of(job, jpegs(20), heavy, []) as lookout:
        assert lookout._process is not None
        assert lookout.sampling
        lookout._looked = [Looked(Status.OK, 0.2, 0.003)] * 4
        assert not lookout.sampling
        lookout._looked += [Looked(Status.OK, 0.001, 0.3)] * 4
        assert lookout.sampling
        lookout._end()
        assert not lookout.sampling


def test_it_can_be_left_out_and_is_not_repeated(
    job: Jobs, jpegs: Folders, heavy: str, tmp_path: Path
) -> None:
    """`--no-preflight`, and every resumed job: not a word, and nothing in the summary."""
    folder = jpegs(40)
    summary, said = carried_out(job(folder, model=heavy, preflight=False))
    assert (summary.preflight, said) == (None, [])
    next((tmp_path / "out" / "predictions").iterdir()).unlink()
    (tmp_path / "out" / "summary.json").unlink()
    summary, said = carried_out(job(folder, model=heavy))
    assert (summary.preflight, said) == (None, [])


def test_servers_are_asked_for_few(job: Jobs, heavy: str, tmp_path: Path) -> None:
    """Of images over the network some two dozen are tried, however many the job has, spread over
    all of it.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            data = sample_images.jpeg(40, 40)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        names = tmp_path / "urls.txt"
        names.write_text(
            "".join(
                f"http://127.0.0.1:{server.server_port}/{number}.jpg\n" for number in range(100)
            )
        )
        settings = job(model=heavy, preflight=False)
        run.run(replace(settings, sources=(f"@{names}",)))
        frozen = documents.read_frozen(JobPaths.of(settings.output))
        assert frozen is not None
        asked.clear()
        looked = list(preflight.look(Sample(frozen.job, 100, 100, (0,), 1e9)))
        server.shutdown()
    assert [item.status for item in looked] == [Status.OK] * 24
    numbers = sorted(int(path.strip("/.jpg")) for path in asked)
    assert numbers[0] < 10
    assert numbers[-1] > 90
