"""Batch sizes: the rule, the probe and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batches import make_job
from imagemill import batching, bench, devices, freezing, processor, running
from imagemill.errors import DeviceError, Interrupted, WorkerError
from imagemill.layout import JobPaths
from imagemill.measuring import crew as crews
from imagemill.measuring.records import Compute, Measured
from imagemill.records import Bundle, DeviceSpec, Job, Precision, Settings
from imagemill.watching import Watcher

CPU = (DeviceSpec("cpu#0", "cpu", "openvino", (0, 1)),)
LONG = 10_000_000
"""Pictures for which a probe pays at any of these tests' rates."""


class FakeCrews:
    """Stands in for the processes that measure: makes `rates[size]` images/s, and counts who is there."""

    def __init__(self, rates: Mapping[int, float], error: Exception | None = None) -> None:
        self.rates = rates
        self.error = error or DeviceError("no memory left")
        self.opened: list[int] = []
        self.open = 0

    def __call__(self, job: Job, chosen: Any, patience_s: float | None = None) -> _FakeCrew:
        assert job.cache_dir is None  # or each size that is tried would leave a compiled model behind
        assert patience_s
        self.opened.append(job.batch_size)
        if job.batch_size not in self.rates:
            raise self.error
        self.open += 1
        return _FakeCrew(self, job.batch_size)


class _FakeCrew:
    def __init__(self, family: FakeCrews, size: int) -> None:
        self.family, self.size = family, size

    def warm_up(self, batches: int) -> None: ...

    def orders(self, seconds: float, fewest: int) -> dict[str, Compute]:
        return {"cpu#0": Compute(8)}

    def measure(self, orders: Mapping[str, Compute]) -> dict[str, Measured]:
        pictures = orders["cpu#0"].batches * self.size
        return {"cpu#0": Measured(pictures, 0.0, pictures / self.family.rates[self.size])}

    def close(self) -> None:
        self.family.open -= 1


@pytest.fixture
def open_job(tiny: Bundle, tmp_path: Path) -> Job:
    """A job whose batch size is open."""
    return make_job(tiny, batch_size=0, precision=Precision.INT8, cache_dir=str(tmp_path / "compiled"))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without AMX, so that the rule's size is 4."""
    monkeypatch.setattr(processor, "flags", lambda *_: {"avx2"})


def crewed(monkeypatch: pytest.MonkeyPatch, rates: Mapping[int, float], error: Exception | None = None) -> FakeCrews:
    family = FakeCrews(rates, error)
    monkeypatch.setattr(crews, "Crew", family)
    return family


@pytest.mark.parametrize(
    ("precision", "flags", "backend", "size"),
    [
        (Precision.INT8, {"amx_int8"}, "openvino", 8),
        (Precision.BF16, {"amx_int8", "amx_bf16"}, "openvino", 8),
        (Precision.BF16, {"amx_int8", "avx512_bf16"}, "openvino", 4),
        (Precision.INT8, {"avx512_vnni"}, "openvino", 4),
        (Precision.FP32, {"amx_int8", "amx_bf16"}, "openvino", 2),
        (Precision.FP32, {"avx512_vnni"}, "onnxruntime", 4),
        (Precision.FP32, {"amx_int8"}, "null", 4),
    ],
)
def test_by_rule_batches_are_larger_with_matrix_units_and_smaller_in_fp32(
    precision: Precision, flags: set[str], backend: str, size: int
) -> None:
    assert batching.rule(precision, [DeviceSpec("cpu#0", "cpu", backend, (0, 1))], flags) == size


@pytest.mark.parametrize(
    ("rates", "best", "tried"),
    [
        ({2: 90, 4: 100, 8: 90}, 4, [4, 2, 8]),
        ({1: 104, 2: 110, 4: 100}, 2, [4, 2, 1]),  # who has gone down does not look up: half was better than what lies there
        ({1: 120, 2: 110, 4: 100}, 1, [4, 2, 1]),
        ({2: 101, 4: 100, 8: 100}, 4, [4, 2, 8]),  # smaller batches cost more in a job than the probe sees,
        ({1: 9.8, 2: 9.95, 4: 10}, 2, [4, 2, 1]),  # of a slow model next to nothing: there the smaller one of equals is taken,
        ({2: 1_200, 4: 1_000, 8: 1_000}, 4, [4, 2, 8]),  # of a fast one much
        ({2: 90, 4: 100, 8: 102, 16: 104, 32: 103}, 16, [4, 2, 8, 16, 32]),
        ({2: 90, 4: 100, 8: 110}, 8, [4, 2, 8, 16]),  # 16 fails: the device's memory does not do
        ({2**step: 100 * 1.1**step for step in range(12)} | {2: 90}, 64, [4, 2, 8, 16, 32, 64]),  # and there it ends
    ],
)
@pytest.mark.usefixtures("plain")
def test_a_probe_goes_where_it_gains(
    rates: Mapping[int, float], best: int, tried: list[int], open_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the rule's size down, else up, as long as that is faster; no process is left behind, and the next job knows the result."""
    family = crewed(monkeypatch, rates)
    said: list[str] = []
    assert batching.resolved(open_job, CPU, LONG, said.append).batch_size == best
    assert family.opened == tried
    assert family.open == 0
    assert said[-1].startswith(f"batches of {best}: ")
    fastest = max((size for size in tried if size in rates), key=lambda size: rates[size])
    assert ("; smaller ones gain less than" in said[-1], "; larger ones gain less than" in said[-1]) == (fastest < best, fastest > best)
    assert batching.resolved(open_job, CPU, 1).batch_size == best
    assert family.opened == tried


@pytest.mark.usefixtures("plain")
def test_on_a_gpu_batches_may_be_larger(open_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 512."""
    crewed(monkeypatch, {2**step: 100 * 2.0**step for step in range(12)})
    monkeypatch.setattr(_FakeCrew, "orders", lambda self, seconds, fewest: {"cuda#0": Compute(8)})
    monkeypatch.setattr(_FakeCrew, "measure", lambda self, orders: {"cuda#0": Measured(8 * self.size, 0.0, 8 / 2.0**0.5)})
    assert batching.resolved(open_job, (DeviceSpec("cuda#0", "cuda", "onnxruntime", (0, 1)),), None).batch_size == 512


@pytest.mark.usefixtures("plain")
def test_short_jobs_are_not_kept_waiting(open_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of few pictures measures nothing; one of many looks once at the model's speed, and that is remembered: the next job of as many
    does not look again, and one that is long at that speed probes at once."""
    family = crewed(monkeypatch, {2: 90, 4: 1_000, 8: 1_100, 16: 1_000})
    assert batching.resolved(open_job, CPU, 29_999).batch_size == 4
    assert family.opened == []
    assert batching.resolved(open_job, CPU, 600_000).batch_size == 4
    assert family.opened == [4]
    assert batching.resolved(open_job, CPU, 600_000).batch_size == 4
    assert family.opened == [4]
    assert batching.resolved(open_job, CPU, 700_000).batch_size == 8
    assert family.opened == [4, 4, 2, 8, 16]
    assert family.open == 0


def test_a_size_that_was_asked_for_is_obeyed(open_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    family = crewed(monkeypatch, {})
    assert batching.resolved(replace(open_job, batch_size=7), CPU, LONG).batch_size == 7
    assert family.opened == []


@pytest.mark.parametrize("kind", ["null", "ipu", "npu"])
@pytest.mark.usefixtures("plain")
def test_some_devices_are_not_probed(kind: str, open_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    family = crewed(monkeypatch, {})
    assert batching.resolved(open_job, (DeviceSpec(f"{kind}#0", kind, "any", (0,)),), None).batch_size == 4
    assert family.opened == []


@pytest.mark.usefixtures("plain")
def test_a_probe_that_fails_costs_nothing_but_the_probe(open_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    family = crewed(monkeypatch, {}, WorkerError("it died"))
    said: list[str] = []
    assert batching.resolved(open_job, CPU, LONG, said.append).batch_size == 4
    assert said == ["batch sizes could not be compared: it died"]
    assert family.open == 0
    assert batching.look_up(open_job, CPU) is None


@pytest.mark.parametrize("rates", [{}, {4: 100}])
@pytest.mark.usefixtures("plain")
def test_a_signal_ends_a_probe(rates: Mapping[int, float], open_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for a failure, wherever it comes; nothing is kept, and no process left."""
    family = crewed(monkeypatch, rates, Interrupted("stop", 143))
    with pytest.raises(Interrupted):
        batching.resolved(open_job, CPU, LONG)
    assert family.open == 0
    assert batching.look_up(open_job, CPU) is None


@pytest.mark.usefixtures("plain")
def test_what_was_found_elsewhere_does_not_count(open_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another precision, other weights, more cores, another backend or processor: none of it is known."""
    crewed(monkeypatch, {2: 90, 4: 100, 8: 110, 16: 100})
    assert batching.resolved(open_job, CPU, None).batch_size == 8
    for other in (
        replace(open_job, precision=Precision.BF16),
        replace(open_job, variant="int8-0"),
        replace(open_job, card=replace(open_job.card, sha256="0" * 64)),
    ):
        assert batching.look_up(other, CPU) is None
    for device in (replace(CPU[0], cores=(0,)), replace(CPU[0], backend="onnxruntime")):
        assert batching.look_up(open_job, (device,)) is None
    assert batching.look_up(open_job, CPU * 2) is None
    assert batching.look_up(open_job, (replace(CPU[0], name="cpu#1", cores=(2, 3)),)) is not None
    monkeypatch.setattr(processor, "identity", lambda: "another")
    assert batching.look_up(open_job, CPU) is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"format": 2, "found": {"KEY": {"batch_size": 8}}}',
        '{"format": 1, "found": []}',
        '{"format": 1, "found": {"KEY": 8}}',
    ]
    + [f'{{"format": 1, "found": {{"KEY": {{"batch_size": {size}}}}}}}' for size in ("0", "-1", "100000", '"8"', "2.5", "true", "[8]")]
    + [
        '{"format": 1, "found": {"KEY": {"batch_size": 8, "rates": "many"}}}',
        '{"format": 1, "found": {"KEY": {"batch_size": 8, "rates": {"8": "x"}}}}',
    ],
)
@pytest.mark.usefixtures("plain")
def test_a_file_that_makes_no_sense_is_not_believed(content: str, open_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it hinder the next probe from keeping what it finds."""
    family = crewed(monkeypatch, {2: 90, 4: 100, 8: 110, 16: 100})
    file = Path(str(open_job.cache_dir)) / batching.FILE
    file.parent.mkdir()
    file.write_text(content.replace("KEY", batching._key(open_job, CPU)))
    assert batching.resolved(open_job, CPU).batch_size == 4
    assert batching.resolved(open_job, CPU, LONG).batch_size == 8
    assert family.open == 0
    assert batching.resolved(open_job, CPU).batch_size == 8


@pytest.mark.usefixtures("plain")
def test_a_cache_that_cannot_be_written_to_is_no_hindrance(open_job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crewed(monkeypatch, {2: 90, 4: 100, 8: 110, 16: 100})
    (tmp_path / "compiled").write_text("a file")
    assert batching.resolved(open_job, CPU, LONG).batch_size == 8
    assert batching.resolved(replace(open_job, cache_dir=None), CPU, LONG).batch_size == 8


def test_processors_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Virtual machines call several generations "AMD EPYC"."""
    found = []
    for number, text in enumerate(
        ("cpu family : 25\nmodel : 17\nflags : avx2", "cpu family : 26\nmodel : 2\nflags : avx2", "flags : avx512f")
    ):
        file = tmp_path / str(number)
        file.write_text(f"processor : 0\nmodel name : AMD EPYC\n{text}\n\nprocessor : 1\nmodel : 99\n")
        found.append(processor.identity(file))
    assert found == ["AMD EPYC/25/17/avx2", "AMD EPYC/26/2/avx2", "AMD EPYC/99/avx512f"]


# With real processes.


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that take no time and so say little, of which nothing here depends."""
    monkeypatch.setattr(batching, "_ROUNDS", 1)
    monkeypatch.setattr(batching, "_ROUND_S", 0.01)


@pytest.fixture
def own_models(tmp_path: Path, tiny: Bundle, copy_of: Callable[[Path], Path]) -> Path:
    """A models folder with a tiny model that nobody has measured."""
    folder = tmp_path / "models"
    folder.mkdir()
    copy_of(tiny.dir).rename(folder / "tiny")
    return folder


@pytest.mark.usefixtures("hasty")
def test_bench_finds_the_batch_size_and_the_next_one_knows_it(own_models: Path) -> None:
    asked = bench.BenchSettings(synthetic=True, model="tiny", models_dir=str(own_models), devices="cpu", iterations=1, batches_per_step=4)
    first: list[str] = []
    report = bench.run(asked, first.append)
    assert any(line.startswith("finding the fastest batch size") for line in first)
    kept = list(json.loads((own_models / "tiny" / "compiled" / batching.FILE).read_text())["found"].values())
    assert [item["batch_size"] for item in kept] == [report.batch_size]
    assert {int(size) for size in kept[0]["rates"]} >= {report.batch_size, 2}
    assert list((own_models / "tiny" / "compiled").glob("*.blob"))  # the one that was measured at the end; of those tried none is kept
    again: list[str] = []
    assert bench.run(asked, again.append).batch_size == report.batch_size
    assert not any(line.startswith("finding") for line in again)


@pytest.mark.usefixtures("hasty")
def test_bench_with_pictures_runs_in_the_size_that_it_found(own_models: Path, jpegs: Callable[..., Path]) -> None:
    asked = bench.BenchSettings((str(jpegs(12)),), model="tiny", models_dir=str(own_models), devices="cpu", iterations=1, limit=12)
    report = bench.run(asked)
    (kept,) = json.loads((own_models / "tiny" / "compiled" / batching.FILE).read_text())["found"].values()
    assert report.batch_size == kept["batch_size"]


@pytest.mark.usefixtures("hasty")
def test_a_long_job_is_frozen_with_what_its_probe_found(
    own_models: Path, jpegs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one of another engine, whose devices may be elsewhere, is not probed."""
    monkeypatch.setattr(batching, "_WORTH_LOOKING", 1)
    monkeypatch.setattr(batching, "_COST_S", 0.0)
    settings = Settings(
        (str(jpegs(6)),), str(tmp_path / "out"), model="tiny", models_dir=str(own_models), devices="cpu", precision="fp32", report=False
    )
    chosen = devices.resolve("cpu")
    model = freezing.resolve_model(settings, Watcher())
    elsewhere = JobPaths.of(str(tmp_path / "elsewhere"), None)
    for folder in (elsewhere.plan, elsewhere.logs):
        folder.mkdir(parents=True)
    freezing.freeze(replace(settings, engine="ray"), elsewhere, chosen, model, Watcher())
    assert not (own_models / "tiny" / "compiled" / batching.FILE).exists()
    running.run(settings)
    frozen = freezing.read_frozen(JobPaths(tmp_path / "out"))
    assert frozen is not None
    known = batching.look_up(frozen.job, chosen)
    assert known is not None
    assert frozen.job.batch_size == known.batch_size


def test_a_process_that_measures_and_says_nothing_is_given_up(tiny: Bundle) -> None:
    """Its start alone takes longer than this patience."""
    with pytest.raises(WorkerError, match=r"the process that measures null#0 said nothing for 0\.001 s"):
        crews.Crew(make_job(tiny), devices.resolve("null"), patience_s=0.001)
