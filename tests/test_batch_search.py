"""`imagemill bench --batch-size search`: which sizes are compared, and which one is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from batches import make_spec
from imagemill import bench
from imagemill.bench import batch_search, pool
from imagemill.bench.messages import Compute, Measured
from imagemill.errors import DeviceError, Interrupted, UsageError, WorkerError
from imagemill.pipeline.backends import devices
from imagemill.records import Bundle, DeviceSpec, Precision, SessionSpec

CPU = (DeviceSpec("cpu#0", "cpu", "openvino", (0, 1)),)


class FakePools:
    """Stands in for the processes that measure: makes `rates[size]` images/s, and counts who is
    there.
    """

    def __init__(self, rates: Mapping[int, float], error: Exception | None = None) -> None:
        self.rates = rates
        self.error = error or DeviceError("no memory left")
        self.opened: list[int] = []
        self.open = 0

    def __call__(
        self, spec: SessionSpec, chosen: Any, patience_s: float | None = None
    ) -> _FakePool:
        assert (
            spec.cache_dir is None
        )  # or each size that is tried would leave a compiled model behind
        assert patience_s
        self.opened.append(spec.batch_size)
        if spec.batch_size not in self.rates:
            raise self.error
        self.open += 1
        return _FakePool(self, spec.batch_size)


class _FakePool:
    def __init__(self, family: FakePools, size: int) -> None:
        self.family, self.size = family, size

    def warm_up(self, batches: int) -> None: ...

    def orders(self, seconds: float, fewest: int) -> dict[str, Compute]:
        return {"cpu#0": Compute(8)}

    def measure(self, orders: Mapping[str, Compute]) -> dict[str, Measured]:
        images = orders["cpu#0"].batches * self.size
        return {"cpu#0": Measured(images, 0.0, images / self.family.rates[self.size])}

    def close(self) -> None:
        self.family.open -= 1


def fakes(
    monkeypatch: pytest.MonkeyPatch, rates: Mapping[int, float], error: Exception | None = None
) -> FakePools:
    family = FakePools(rates, error)
    monkeypatch.setattr(batch_search, "MeasuringPool", family)
    return family


@pytest.fixture
def spec(tiny: Bundle, tmp_path: Path) -> SessionSpec:
    return make_spec(
        tiny, batch_size=4, precision=Precision.INT8, cache_dir=str(tmp_path / "compiled")
    )


@pytest.mark.parametrize(
    ("rates", "best", "tried"),
    [
        ({2: 90, 4: 100, 8: 90}, 4, [4, 2, 8]),
        (
            {1: 104, 2: 110, 4: 100},
            2,
            [4, 2, 1],
        ),  # after going down it does not look up: half was better than twice
        ({1: 120, 2: 110, 4: 100}, 1, [4, 2, 1]),
        ({1: 90, 2: 99.5, 4: 100, 8: 100}, 2, [4, 2, 1]),  # of sizes within 1 % the smaller one
        ({2: 90, 4: 100, 8: 100.5}, 4, [4, 2, 8]),
        ({2: 90, 4: 100, 8: 102, 16: 104, 32: 103}, 16, [4, 2, 8, 16, 32]),
        ({2: 90, 4: 100, 8: 110}, 8, [4, 2, 8, 16]),  # 16 fails: the device's memory is too small
        (
            {2**step: 100 * 1.1**step for step in range(12)} | {2: 90},
            64,
            [4, 2, 8, 16, 32, 64],
        ),  # the largest on a CPU
    ],
)
def test_the_search_goes_on_while_it_gains(
    rates: Mapping[int, float],
    best: int,
    tried: list[int],
    spec: SessionSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the job's size down, else up. No process is left behind, and the line names every size
    that was measured.
    """
    family = fakes(monkeypatch, rates)
    lines: list[str] = []
    size, measured = batch_search.find_batch_size(spec, CPU, lines.append)
    assert (size, family.opened, family.open) == (best, tried, 0)
    assert measured == {size: pytest.approx(rates[size]) for size in sorted(tried) if size in rates}
    assert lines[-1].startswith(f"batch size {best}; images/s, compute only: ")


def test_on_a_gpu_batches_may_be_larger(spec: SessionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 512."""
    fakes(monkeypatch, {2**step: 100 * 2.0**step for step in range(12)})
    monkeypatch.setattr(_FakePool, "orders", lambda self, seconds, fewest: {"cuda#0": Compute(8)})
    monkeypatch.setattr(
        _FakePool,
        "measure",
        lambda self, orders: {"cuda#0": Measured(8 * self.size, 0.0, 8 / 2.0**0.5)},
    )
    assert (
        batch_search.find_batch_size(
            spec, (DeviceSpec("cuda#0", "cuda", "onnxruntime", (0, 1)),), lambda _: None
        )[0]
        == 512
    )


def test_a_first_size_that_cannot_be_measured_is_an_error(
    spec: SessionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = fakes(monkeypatch, {}, WorkerError("it died"))
    with pytest.raises(WorkerError, match="it died"):
        batch_search.find_batch_size(spec, CPU, lambda _: None)
    assert family.open == 0


@pytest.mark.parametrize("rates", [{}, {4: 100}])
def test_a_signal_ends_a_search(
    rates: Mapping[int, float], spec: SessionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not count as a size that failed, and no process is left."""
    family = fakes(monkeypatch, rates, Interrupted("stop", 143))
    with pytest.raises(Interrupted):
        batch_search.find_batch_size(spec, CPU, lambda _: None)
    assert family.open == 0


# With real processes.


@pytest.fixture
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few sizes, and rounds that take no time and so mean little, on which no test here depends."""
    monkeypatch.setattr(batch_search, "MAX_ON_CPU", 4)
    monkeypatch.setattr(batch_search, "_ROUNDS", 1)
    monkeypatch.setattr(batch_search, "_ROUND_S", 0.01)


@pytest.mark.process
@pytest.mark.usefixtures("short_search")
def test_bench_reports_every_size_and_measures_in_the_fastest(jpegs: Callable[..., Path]) -> None:
    """With images and without."""
    asked: dict[str, Any] = {
        "model": "tiny",
        "devices": "cpu",
        "iterations": 1,
        "batches_per_step": 4,
        "batch_size": "search",
    }
    lines: list[str] = []
    report = bench.run(bench.BenchSettings(synthetic=True, **asked), lines.append)
    assert "finding the fastest batch size" in lines
    assert {int(size) for size in report.batch_sizes} >= {report.batch_size, 2}
    report = bench.run(bench.BenchSettings((str(jpegs(12)),), limit=12, **asked))
    assert str(report.batch_size) in report.batch_sizes


@pytest.mark.process
def test_another_word_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--batch-size fastest: must be a whole number, not str"):
        bench.run(
            bench.BenchSettings(synthetic=True, model="tiny", devices="null", batch_size="fastest")
        )


@pytest.mark.process
def test_a_process_that_measures_and_says_nothing_is_given_up(tiny: Bundle) -> None:
    """Its start alone takes longer than this patience."""
    with pytest.raises(
        WorkerError, match=r"the process that measures null#0 sent no message for 0\.001 s"
    ):
        pool.MeasuringPool(make_spec(tiny), devices.resolve("null"), patience_s=0.001)
