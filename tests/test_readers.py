"""`predictions/` is a plain Parquet data set: programs that read Parquet read it as it is, by the lines
of the README.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import helpers
import sample_images
from imagemill.records import Settings
from imagemill.runner import run

pytestmark = pytest.mark.ecosystem


@pytest.fixture(scope="module")
def output(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven parts, one of them without one good image, with odd names and both extra columns."""
    folder = tmp_path_factory.mktemp("readers")
    files = {f"{number:02d}.jpg": sample_images.jpeg(40, 40, seed=number) for number in range(18)}
    files |= {"98a.jpg": b"", "98b.jpg": b"", "98c.jpg": b"", "ü\n'\".jpg": sample_images.jpeg()}
    source = helpers.fill(folder / "images", files)
    changes = {
        "output": str(folder / "out"),
        "model": "tiny",
        "models_dir": str(models_dir),
        "devices": "cpu",
    }
    run.run(Settings(sources=(str(source),), shard_size=3, save=("logits", "embedding"), **changes))  # type: ignore[arg-type]
    return folder / "out"


def expected(output: Path) -> dict[str, int]:
    return dict(Counter(row["label"] for row in helpers.rows(output) if row["status"] == "ok"))


def check_duckdb(output: Path) -> None:
    import duckdb

    with duckdb.connect() as connection:
        query = (
            f"SELECT label, count(*) AS n FROM '{output}/predictions/*.parquet' WHERE status = 'ok'"
            " GROUP BY label ORDER BY n DESC"
        )
        assert dict(connection.sql(query).fetchall()) == expected(output)
        top = connection.sql(
            f"SELECT path, top_k[1].label FROM '{output}/predictions/*.parquet' ORDER BY index"
        ).fetchall()
    assert top == [(row["path"], row["label"]) for row in helpers.rows(output)]


def check_polars(output: Path) -> None:
    import polars

    frame = polars.read_parquet(f"{output}/predictions/*.parquet")
    assert frame.sort("index").drop("logits", "embedding", strict=False).to_dicts() == [
        {name: value for name, value in row.items() if name not in ("logits", "embedding")}
        for row in helpers.rows(output)
    ]


def check_pandas(output: Path) -> None:
    import pandas

    frame = pandas.read_parquet(output / "predictions").sort_values("index")
    assert frame["path"].tolist() == [row["path"] for row in helpers.rows(output)]
    assert frame[frame["status"] == "ok"].groupby("label").size().to_dict() == expected(output)


def check_datasets(output: Path, tmp_path: Path) -> None:
    """In a process of its own: the library reads its settings when it is imported."""
    program = """
import collections, json, sys
import datasets
rows = datasets.load_dataset("parquet", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
good = rows.filter(lambda row: row["status"] == "ok")
print(json.dumps([rows.num_rows, collections.Counter(good["label"]), rows[0]["top_k"][0]["label"], rows.column_names]))
"""
    cache = str(tmp_path / "cache")
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": cache,
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", program, f"{output}/predictions/*.parquet", cache]
    found = subprocess.run(
        command, env=helpers.environment(**quiet), capture_output=True, check=False, text=True
    )
    assert found.returncode == 0, found.stderr
    count, labels, first, columns = json.loads(found.stdout)
    rows = helpers.rows(output)
    assert (count, labels, first, columns) == (
        len(rows),
        expected(output),
        rows[0]["label"],
        helpers.table(output).column_names,
    )


def test_duckdb_reads_it(output: Path) -> None:
    """The README's query, and the nested column."""
    check_duckdb(output)


def test_polars_reads_it(output: Path) -> None:
    """Every row and every column, nested ones too."""
    check_polars(output)


def test_pandas_reads_it(output: Path) -> None:
    """The folder as one frame."""
    check_pandas(output)


def test_hugging_face_datasets_reads_it(output: Path, tmp_path: Path) -> None:
    """Offline; all parts have one schema, the one without a good image too."""
    check_datasets(output, tmp_path)
