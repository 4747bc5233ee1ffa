"""An image's answer depends on nothing but the image: bit for bit, on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from msgspec.structs import replace

import helpers
import sample_images
from imagemill import records
from imagemill.job import plan
from imagemill.job.open_job import OpenJob
from imagemill.job.paths import JobPaths
from imagemill.pipeline.backends import open_session
from imagemill.pipeline.feed import Feed
from imagemill.pipeline.run_shards import run_shards
from imagemill.pipeline.sink import Sink
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Bundle, DeviceSpec, Job, Lease, Settings, Shard
from imagemill.runner import run
from tiny import Finished

pytestmark = pytest.mark.process

COUNT = 24


@pytest.fixture(scope="module")
def reference(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run of the tiny model over 24 entries, some of them bad, in the plainest way: one device,
    one batch at a time.
    """
    folder = tmp_path_factory.mktemp("reference")
    files = {
        f"{'xyz'[n % 3]}/{n:02d}.jpg": sample_images.jpeg(40 + n, 70 - n, seed=n)
        for n in range(COUNT - 4)
    }
    files |= {
        "x/bad.jpg": b"",
        "y/cut.jpg": sample_images.half(sample_images.jpeg(200, 200)),
        "z/a.png": b"text" * 99,
        "z/b.gif": sample_images.animated_gif(),
    }
    source = helpers.fill(folder / "images", files)
    settings = settings_for(
        source,
        folder / "out",
        models_dir,
        devices="cpu",
        batch_size=1,
        batches_per_step=1,
        num_workers=1,
    )
    run.run(settings)
    return Finished(helpers.Result(0, str(source), ""), folder / "out")


def settings_for(source: Path, out: Path, models_dir: Path, **changes: Any) -> Settings:
    return Settings(
        sources=(str(source),),
        output=str(out),
        model="tiny",
        models_dir=str(models_dir),
        save=("logits", "embedding"),
        report=False,
        **changes,
    )


def bits(table: pa.Table) -> list[bytes]:
    """Every column of every row, in plan order, as bytes: floats by their bits and not by their
    value.
    """
    table = table.combine_chunks().sort_by("index")
    return [
        repr(
            pa.RecordBatch.from_pylist([row], schema=table.schema).serialize().to_pybytes()
        ).encode()
        for row in table.to_pylist()
    ]


@examples(
    max_examples=2, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(
    batch_size=st.integers(1, 12),
    shard_size=st.integers(1, COUNT + 1),
    devices=st.sampled_from(["cpu", "cpu:2", "cpu:3"]),
    in_flight=st.one_of(st.none(), st.integers(1, 5)),
    threads=st.integers(1, 4),
)
@example(
    batch_size=64, shard_size=24, devices="cpu", in_flight=None, threads=2
)  # as many as a probe may choose
@example(batch_size=12, shard_size=24, devices="cpu", in_flight=4, threads=4)
@example(batch_size=5, shard_size=1, devices="cpu:3", in_flight=None, threads=2)
def test_the_same_rows_whatever_the_settings(
    reference: Finished,
    models_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    batch_size: int,
    shard_size: int,
    devices: str,
    in_flight: int | None,
    threads: int,
) -> None:
    """Any batch size, shard size, number of devices, batches in flight and decoding threads: the
    same rows, bit for bit.
    """
    out = tmp_path_factory.mktemp("any") / "out"
    changes = {
        "batch_size": batch_size,
        "shard_size": shard_size,
        "devices": devices,
        "batches_per_step": in_flight,
        "num_workers": threads,
    }
    run.run(settings_for(Path(reference.result.out), out, models_dir, **changes))
    assert bits(helpers.table(out)) == bits(helpers.table(reference.output))


class Bench:
    """The stages of a worker, in this process: one compiled model for many orders of leases."""

    def __init__(self, reference: Finished) -> None:
        frozen = OpenJob.open(reference.output).frozen
        self.frozen = frozen
        self.session = open_session(
            replace(frozen.job.session, batch_size=5),
            DeviceSpec("cpu#0", "cpu", "openvino", (0,)),
            Stopwatch(),
        )

    def run(
        self, out: Path, shard_size: int, order: list[int], calls: int
    ) -> tuple[list[Shard], list[int]]:
        """Cut the listing again and carry its shards in this order, in so many calls of
        `run_shards`; returns shards and commits.
        """
        paths = JobPaths(out)
        for folder in (paths.predictions, paths.plan):
            folder.mkdir(parents=True)
        spec = replace(self.frozen.job.session, batch_size=5, cache_dir=None)
        job: Job = replace(self.frozen.job, output=str(out), session=spec)
        listed = plan.read(
            JobPaths(Path(self.frozen.job.output)).plan,
            plan.shards(JobPaths(Path(self.frozen.job.output)).plan)[0],
        )
        plan.spool((records.Entry(row.source, row.path, row.size) for row in listed), paths.spool)
        plan.cut(paths.spool, paths.plan, shard_size, by_group=False)
        shards = plan.shards(paths.plan)
        chosen = [shards[number % len(shards)] for number in order]
        chosen = list({shard.number: shard for shard in [*chosen, *shards]}.values())
        committed = []
        sink = Sink(job, "openvino", {})
        with Feed(spec.card.recipe, job.limits, 5, 3, None, Stopwatch()) as feed:
            for start in range(0, len(chosen), -(-len(chosen) // calls)):
                leases: Iterator[Lease] = (
                    Lease(shard) for shard in chosen[start : start + -(-len(chosen) // calls)]
                )
                committed += [
                    receipt.shard
                    for receipt in run_shards(leases, self.session, feed, sink, job, Stopwatch())
                ]
        assert committed == [shard.number for shard in chosen]
        return shards, committed


@pytest.fixture(scope="module")
def bench(reference: Finished, tiny: Bundle) -> Iterator[Bench]:
    bench = Bench(reference)
    with contextlib.closing(bench.session):
        yield bench


@examples(
    max_examples=10,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    shard_size=st.integers(1, 10),
    order=st.lists(st.integers(0, COUNT), max_size=30),
    calls=st.integers(1, 4),
)
def test_the_same_rows_in_whatever_order_shards_are_done(
    bench: Bench,
    reference: Finished,
    tmp_path_factory: pytest.TempPathFactory,
    shard_size: int,
    order: list[int],
    calls: int,
) -> None:
    """Leases may come in any order and stop and come again: receipts follow them, and the rows are
    the same, bit for bit.
    """
    out = tmp_path_factory.mktemp("order") / "out"
    shards, committed = bench.run(out, shard_size, order, calls)
    assert sorted(committed) == [shard.number for shard in shards]
    assert bits(helpers.table(out)) == bits(helpers.table(reference.output))


def test_rows_differ_where_images_do(reference: Finished) -> None:
    """The tests above can fail: the tiny model tells images apart, in every column."""
    good = [row for row in helpers.rows(reference.output) if row["status"] == "ok"]
    assert len(good) == COUNT - 3
    assert len({tuple(row["logits"]) for row in good}) == len(good)
    assert len({row["class_id"] for row in good}) >= 3
