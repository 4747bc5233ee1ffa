"""Several backends in one job: allowed only with a flag, and named in every part."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import helpers
import sample_images
from faults.harness import Hold, assert_complete

pytestmark = pytest.mark.process

MIXED = "cpu:1@openvino+cpu:1@onnxruntime"


def backends(output: Path) -> dict[str, str]:
    """Part → backend, as its own metadata says."""
    found = {}
    for part in sorted((output / "predictions").glob("part-*.parquet")):
        metadata = pq.read_metadata(part).metadata
        found[part.name] = metadata[b"imagemill.backend"].decode()
        assert found[part.name] in json.loads(metadata[b"imagemill.versions"])
    return found


def test_backends_are_mixed_only_where_that_is_allowed(
    imagemill: Callable[..., helpers.Result], jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """The refusal names both, why, and the flag; nothing is written."""
    ended = imagemill(
        "run", jpegs(3), "--model", "tiny", "--output", tmp_path / "out", "--devices", MIXED
    )
    assert ended.code == 2
    why = (
        "--devices mixes the backends onnxruntime and openvino, whose answers differ in the last"
        " bits. Add --allow-mixed."
    )
    assert ended.err == f"imagemill: {why}\n"
    assert not (tmp_path / "out").exists()


def test_a_mixed_job_gives_one_row_an_image_and_each_part_its_backend(
    imagemill: Callable[..., helpers.Result],
    start: Callable[..., Any],
    models_dir: Path,
    tmp_path: Path,
) -> None:
    """Both devices get shards, the summary has both, and `verify` finds nothing."""
    output, hold = tmp_path / "out", Hold(tmp_path, 0, IMAGEMILL_MODELS=str(models_dir))
    images = [sample_images.jpeg(48, 40, seed=seed) for seed in range(4)]
    folder = helpers.fill(tmp_path / "in", {f"{n:03d}.jpg": images[n % 4] for n in range(48)})
    arguments = (
        "run",
        folder,
        "--model",
        "tiny",
        "--output",
        output,
        "--devices",
        MIXED,
        "--allow-mixed",
        "--shard-size",
        4,
        "--json",
    )
    process = start(*arguments, env=hold.environment)
    helpers.until(lambda: len(helpers.worker_pids(output)) == 2, process=process)
    hold.release()
    ended = helpers.finish(process)
    assert ended.code == 0, ended.err
    rows = assert_complete(output)
    assert rows.num_rows == 48
    assert imagemill("verify", output).code == 0
    summary = ended.json
    assert summary["precision"] == "fp32"
    by_backend = Counter(backends(output).values())
    assert set(by_backend) == {"openvino", "onnxruntime"}
    assert {device["name"]: device["images"] for device in summary["devices"]} == {
        "cpu#0": 4 * by_backend["openvino"],
        "cpu#1": 4 * by_backend["onnxruntime"],
    }
    job = json.loads((output / "job.json").read_text())
    assert job["backend"] == "onnxruntime+openvino"
    # The images are 12 times the same four: the backends agree but for the last bits.
    by_content: dict[int, list[float]] = {}
    for number, row in enumerate(rows.to_pylist()):
        by_content.setdefault(number % 4, []).append(row["probability"])
    assert all(np.ptp(values) < 1e-5 for values in by_content.values())


def test_a_mixed_job_is_resumed_by_the_same_command(
    imagemill: Callable[..., helpers.Result], jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """Lost parts are computed again, by whichever device; those that are there stay; one backend
    alone is another job.
    """
    output = tmp_path / "out"
    arguments = (
        "run",
        jpegs(24),
        "--model",
        "tiny",
        "--output",
        output,
        "--shard-size",
        2,
        "--json",
    )
    mixed = ("--devices", MIXED, "--allow-mixed")
    assert imagemill(*arguments, *mixed).code == 0
    before = helpers.by_path(output)
    for number in (1, 5, 6):
        (output / "predictions" / f"part-{number:06d}.parquet").unlink()
    kept = helpers.parts(output)
    resumed = imagemill(*arguments, *mixed)
    assert resumed.code == 0, resumed.err
    assert resumed.json["resumed_shards"] == 9
    assert kept.items() <= helpers.parts(output).items()
    assert imagemill("verify", output).code == 0
    for path, row in helpers.by_path(output).items():
        assert row["label"] == before[path]["label"]
        assert row["probability"] == pytest.approx(before[path]["probability"], abs=1e-5)
    alone = imagemill(*arguments, "--devices", "cpu")
    assert alone.code == 2
    assert (
        "was started with backend onnxruntime+openvino, now backend openvino is asked for"
        in alone.err
    )


def test_a_mixed_job_computes_in_a_precision_that_all_backends_have(
    imagemill: Callable[..., helpers.Result], jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """An explicit one that only one of them has is refused by name, before anything is listed."""
    arguments = (
        "run",
        jpegs(3),
        "--model",
        "tiny",
        "--output",
        tmp_path / "out",
        "--devices",
        MIXED,
        "--allow-mixed",
    )
    ended = imagemill(*arguments, "--precision", "int8")
    assert (ended.code, ended.err) == (
        2,
        (
            "imagemill: --precision int8: cpu@onnxruntime does not compute in it. Use --precision"
            " fp32.\n"
        ),
    )
    assert not (tmp_path / "out").exists()
