"""`imagemill bench`: what it measures, what it concludes, and that it cleans up after itself."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import helpers
from faults.harness import children
from imagemill import bench
from imagemill.bench import measure
from imagemill.bench.measure import device_figures, machine, synthetic_session
from imagemill.bench.messages import Compute
from imagemill.bench.pool import MeasuringPool
from imagemill.bench.records import DeviceFigures
from imagemill.display.results import format_bench
from imagemill.errors import Interrupted, ModelError, SourceError, UsageError, WorkerError
from imagemill.pipeline import stopwatch
from imagemill.pipeline.backends import devices
from imagemill.records import (
    Bundle,
    DeviceSpec,
    DeviceSummary,
    MemoryTraffic,
    Summary,
)
from imagemill.system import cpu

SYNTHETIC = (
    "bench",
    "--synthetic",
    "--model",
    "tiny",
    "--batch-size",
    "6",
    "--batches-per-step",
    "20",
    "--iterations",
    "3",
)


def settings(**changes: Any) -> bench.BenchSettings:
    values: dict[str, Any] = {"model": "tiny", "devices": "null", "batch_size": 4, "iterations": 2}
    return bench.BenchSettings(**(values | changes))


# What is measured.


@pytest.mark.parametrize("model", ["wide", "headless"])
def test_a_model_of_any_shape_is_measured(
    imagemill: Callable[..., helpers.Result], model: str
) -> None:
    """Wider than high, and without classes."""
    flags = ["--batch-size", 2, "--batches-per-step", 2, "--iterations", 1, "--json"]
    report = imagemill("bench", "--synthetic", "--model", model, "--devices", "cpu", *flags).json
    assert report["images_per_iteration"] == {"compute_only": 4}


def test_synthetic_needs_no_image_and_keeps_the_meaning_of_its_flags(
    imagemill: Callable[..., helpers.Result],
) -> None:
    """An iteration hands `--batches-per-step` batches of `--batch-size` to each device; stdout
    holds one JSON object.
    """
    report = imagemill(*SYNTHETIC, "--devices", "null:2", "--json").json
    assert report["images_per_iteration"] == {"compute_only": 2 * 20 * 6}
    rates = report["compute_only"]
    assert len(rates["iterations"]) == 3
    assert rates["median"] == median(rates["iterations"])
    assert (rates["min"], rates["max"]) == (min(rates["iterations"]), max(rates["iterations"]))
    assert set(rates["devices"]) == {"null#0", "null#1"}
    assert all(rate > 0 for rate in rates["devices"].values())
    assert (report["decode_only"], report["end_to_end"], report["bound"], report["advice"]) == (
        None,
        None,
        None,
        None,
    )


def test_the_compute_rate_comes_from_the_real_session(
    imagemill: Callable[..., helpers.Result],
) -> None:
    """cpu:2 compiles the model twice, in two processes; the report names what decided the
    figures.
    """
    report = imagemill(*SYNTHETIC, "--devices", "cpu:2", "--json").json
    assert set(report["compute_only"]["devices"]) == {"cpu#0", "cpu#1"}
    assert report["versions"]["openvino"]
    assert report["machine"] == machine()
    assert (report["model"], report["precision"], report["batch_size"]) == ("tiny", "fp32", 6)
    assert report["settings"]["batches_per_step"] == 20


def test_people_get_a_line_per_rate_and_device(imagemill: Callable[..., helpers.Result]) -> None:
    """Without --json: the model, the rate and its spread, the devices; progress goes to stderr."""
    reported = imagemill(*SYNTHETIC, "--devices", "null:2")
    lines = reported.out.splitlines()
    assert lines[0] == "tiny in fp32, batches of 6, median of 3 iterations"
    assert lines[1].startswith("compute only")
    assert lines[1].endswith("240 images each)")
    assert [line.split()[0] for line in lines[2:]] == ["null#0", "null#1"]
    assert reported.err.count("iteration ") == 3


def test_with_images_three_rates_and_a_bottleneck(
    jpegs: Callable[..., Path],
    imagemill: Callable[..., helpers.Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decode only, compute only and end to end, which one bounds the job, and what to change: as
    the summary of a job says it.
    """
    monkeypatch.setattr(stopwatch, "SHORT_S", 0.0)
    folder = jpegs(40)
    arguments = (
        "--model",
        "tiny",
        "--devices",
        "null:2",
        "--iterations",
        2,
        "--batches-per-step",
        8,
        "--limit",
        36,
        "--json",
    )
    report = imagemill("bench", folder, *arguments).json
    assert (
        report["images_per_iteration"]["decode_only"]
        == report["images_per_iteration"]["end_to_end"]
        == 36
    )
    for name in ("compute_only", "decode_only", "end_to_end"):
        assert report[name]["median"] > 0
        assert set(report[name]["devices"]) <= {"null#0", "null#1"}
    assert report["bound"] in ("decode", "read", "write")  # the null session computes nothing
    assert report["advice"].endswith("would help")


@pytest.mark.process
def test_nothing_is_left_behind(
    jpegs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The jobs that bench runs go to a temporary folder, which is gone afterwards; the source is
    only read.
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    folder = jpegs(8)
    before = sorted(folder.iterdir())
    bench.run(settings(sources=(str(folder),), batches_per_step=4))
    assert sorted(folder.iterdir()) == before
    assert list(scratch.iterdir()) == []


@pytest.mark.process
def test_every_device_is_measured_on_its_own_cores(tiny: Bundle) -> None:
    """A bench worker stays on the cores of its device, as the worker of a run does."""
    cores = cpu.usable_cores()
    chosen = devices.resolve(f"null:{len(cores)}")
    with MeasuringPool(synthetic_session(settings(), tiny, chosen), chosen) as pool:
        pool.measure({device.name: Compute(1) for device in chosen})
        found = [os.sched_getaffinity(member.child.pid) for member in pool._members]
    assert found == [{core} for core in cores]


def test_the_machine_is_described() -> None:
    """A figure without its machine says nothing."""
    found = machine()
    assert set(found) == {"system", "processor", "cores", "memory", "python", "vector_units"}
    assert found["cores"].split()[0] == str(len(cpu.usable_cores()))


# What devices other than the CPU tell.

CARDS = [DeviceSpec(f"cuda#{number}", "cuda", "torch", (0, 1, 2, 3)) for number in (0, 1)]
TRAFFIC = {card.name: MemoryTraffic(100e6, 2000e9) for card in CARDS}


def end_to_end(*busy: float | None) -> Summary:
    """A run in which devices computed for so much of the time."""
    shares = [
        DeviceSummary(f"cuda#{place}", 1, 1.0, 0, busy=share) for place, share in enumerate(busy)
    ]
    values: dict[str, Any] = dict.fromkeys(Summary.__struct_fields__)
    return Summary(**(values | {"devices": tuple(shares)}))


def report(figures: DeviceFigures | None, devices: int, **changes: Any) -> bench.BenchReport:
    def rates(median: float) -> bench.Rates:
        names = {f"cuda#{number}": median / devices for number in range(devices)}
        return bench.Rates(median, median, median, (median,), names)

    values: dict[str, Any] = dict.fromkeys(bench.BenchReport.__struct_fields__)
    values |= {
        "model": "resnet50",
        "precision": "fp16",
        "batch_size": 256,
        "images_per_iteration": {"compute_only": 5120, "decode_only": 900, "end_to_end": 900},
        "compute_only": rates(10_000),
        "settings": settings(iterations=1),
        "device": figures,
    }
    return bench.BenchReport(**(values | changes))


def test_the_figures_of_devices_are_those_of_all_together() -> None:
    """Memory limits add up, busy shares are averaged over devices, the median run counts. A device
    that was retired was not busy.
    """
    runs = [end_to_end(0.4, 0.6), end_to_end(0.5, 0.9), end_to_end(0.1, None)]
    found = device_figures(TRAFFIC, CARDS, runs, cores=30.2)
    assert found == DeviceFigures(
        busy=0.5, memory_limit=40_000, bytes_per_image=100e6, bytes_per_s=4000e9, cores_needed=31
    )


def test_what_a_device_does_not_tell_is_left_out() -> None:
    """A limit of some of the devices would be wrong for all; a CPU tells nothing."""
    some = {"cuda#0": TRAFFIC["cuda#0"]}
    assert device_figures(some, CARDS, [end_to_end(None, None)]) == DeviceFigures()
    assert device_figures({}, devices.resolve("cpu"), [end_to_end(None)], cores=3.0) is None


@pytest.mark.parametrize(
    ("count", "which", "need"),
    [(1, "cuda#0", "cuda#0 needs"), (2, "the devices", "the devices need")],
)
def test_people_get_a_line_for_each_figure_of_a_device(count: int, which: str, need: str) -> None:
    """And none for the others."""
    made = report(DeviceFigures(0.51, 26_900, 104.5e6, 2.811e12, 31), count)
    text = format_bench(made)
    assert text.splitlines()[-3:] == [
        f"{which} computed for 51% of the time end to end",
        "compute only is 37% of the 26,900.0 images/s that memory allows: 104.5 MB per image,"
        " 2,811.0 GB/s",
        f"{need} 31 such cores to be fed with these images",
    ]
    transfer = bench.Rates(90_000, 1, 2, (90_000,), {"cuda#0": 90_000})
    with_transfer = format_bench(report(None, 1, transfer_only=transfer))
    assert with_transfer.splitlines()[-1] == (
        "transfer only  90,000.0 images/s (1.0 to 2.0; 5,120 images each)"
    )
    plain = format_bench(report(DeviceFigures(), count))
    assert plain == format_bench(report(None, count))


def test_the_last_line_names_the_bottleneck() -> None:
    """Or says why it is not known. The cores that devices need are named once."""
    changes = {"bound": "decode", "advice": "more cores; the devices need 32 such cores to be fed"}
    lines = format_bench(report(DeviceFigures(cores_needed=31), 1, **changes)).splitlines()
    assert lines[1:] == [
        "compute only   10,000.0 images/s (10,000.0 to 10,000.0; 5,120 images each)",
        "bounded by decode: more cores; the devices need 32 such cores to be fed",
    ]
    why = "too short to find the bottleneck: 1.2 s, less than 5 s"
    assert format_bench(report(None, 1, advice=why)).splitlines()[-1] == why


@pytest.mark.process
def test_few_images_are_shared_by_all_devices(
    imagemill: Callable[..., helpers.Result], jpegs: Callable[..., Path]
) -> None:
    """A shard is one device's, so shards are small enough for each to have some."""
    report = imagemill(
        *("bench", jpegs(12), "--model", "tiny", "--devices", "null:3"),
        *("--iterations", 1, "--json"),
    ).json
    shares = report["decode_only"]["devices"]  # which get the shards in turn
    assert len(shares) == 3 and min(shares.values()) > 0


# What goes wrong.


@pytest.mark.process
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {},
            (
                "give a SOURCE to measure decoding and computing, or --synthetic to measure"
                " computing alone."
            ),
        ),
        (
            {"synthetic": True, "sources": ("x",)},
            "--synthetic needs no images, but x was given. Leave one of them out.",
        ),
        ({"synthetic": True, "iterations": 0}, "--iterations 0: must be at least 1."),
        (
            {"synthetic": True, "limit": 9},
            "--limit and --num-workers are for images. Leave them out with --synthetic.",
        ),
        (
            {"sources": ("x",), "devices": "cpu:1@openvino+cpu:1@onnxruntime"},
            "--devices cpu:1@openvino+cpu:1@onnxruntime: several backends. Measure each by itself.",
        ),
        ({"synthetic": True, "batches_per_step": 0}, "--batches-per-step 0: must be at least 1."),
        (
            {"synthetic": True, "precision": "fp64"},
            "--precision fp64: not known. Known: auto, fp32, fp16, bf16, int8.",
        ),
        (
            {"synthetic": True, "devices": "cpu", "precision": "int8"},
            (
                "precision int8: tiny has no int8 variant for this machine. Make it: `imagemill"
                " quantize tiny --images SOURCE`."
            ),
        ),
        (
            {"synthetic": True, "devices": "cpu", "precision": "int8", "model": "headless"},
            (
                "int8 is not possible: headless has no classes, so it is not defined when a faster"
                " precision answers as fp32 does. Use fp32."
            ),
        ),
    ],
)
def test_mistakes_are_reported_before_anything_is_measured(
    change: dict[str, Any], message: str
) -> None:
    """Each mistake has one clear message that says what to do."""
    with pytest.raises(UsageError) as caught:
        bench.run(settings(**change))
    assert str(caught.value) == message


@pytest.mark.process
def test_images_of_which_none_can_be_read_are_refused(tmp_path: Path) -> None:
    """A decode rate of broken images would be a lie."""
    folder = helpers.fill(
        tmp_path / "broken", {f"{number}.jpg": b"not an image" for number in range(5)}
    )
    with pytest.raises(SourceError, match=r"none of the first 5 images of .* can be read"):
        bench.run(settings(sources=(str(folder),)))


@pytest.mark.process
def test_a_worker_that_dies_ends_the_bench_with_its_last_words(tiny: Bundle) -> None:
    """No wait for an answer that will not come, and no figure of the others alone."""
    chosen = devices.resolve("null:2")
    with MeasuringPool(synthetic_session(settings(), tiny, chosen), chosen) as pool:
        pool._members[1].child.kill()
        with pytest.raises(
            WorkerError, match=r"the process that measures null#1 was killed by SIGKILL"
        ):
            pool.measure({device.name: Compute(1) for device in chosen})


@pytest.mark.process
def test_what_a_worker_cannot_do_is_the_error_that_run_gives(tiny: Bundle, tmp_path: Path) -> None:
    """A model that cannot be compiled is one clear ModelError from the worker's process."""
    broken = Bundle(tmp_path, tiny.card)
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    chosen = devices.resolve("cpu")
    with (
        pytest.raises(ModelError, match=r"model\.onnx cannot be compiled"),
        MeasuringPool(synthetic_session(settings(), broken, chosen), chosen),
    ):
        pass


def test_workers_end_with_the_bench(start: Callable[..., Any]) -> None:
    """However bench ends, its workers do: here by SIGKILL."""
    words = ("bench", "--synthetic", "--model", "tiny", "--devices", "null:2")
    process = start(*words, "--iterations", 100_000, before=helpers.FRESH)

    workers = helpers.until(
        lambda: found if len(found := children(process.pid)) == 2 else None, process=process
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    helpers.until(lambda: not any(map(helpers.running, workers)))


def test_a_bench_that_is_stopped_does_not_speak_of_a_job_to_resume(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it measured with was a job, but not the user's."""

    def stopped(*_: object) -> None:
        raise Interrupted(
            "stopped by SIGINT: 4 shards are left. Repeat the command to resume.", 130
        )

    monkeypatch.setattr(measure, "_synthetic", stopped)
    with pytest.raises(
        Interrupted, match=r"^measuring was stopped, and has no result\.$"
    ) as caught:
        bench.run(settings(synthetic=True))
    assert caught.value.exit_code == 130
