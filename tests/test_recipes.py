"""The pages of docs/recipes: their code runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import helpers

pytestmark = pytest.mark.ecosystem
RECIPES = helpers.PROJECT / "docs" / "recipes"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    text = (RECIPES / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results with embeddings, in parts: `b` and `c` nearly as `a`, and others that are not."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 64)).astype(np.float32)
    vectors[1] = vectors[0] + 0.01
    vectors[2] = 3 * vectors[0]
    names = [f"{chr(97 + number)}.jpg" for number in range(3)] + [f"{n}.jpg" for n in range(37)]
    kind = pa.list_(pa.float32(), 64)
    folder = tmp_path / "out" / "predictions"
    folder.mkdir(parents=True)
    for part in range(2):
        rows = slice(20 * part, 20 * part + 20)
        count = len(names[rows])
        table = pa.table(
            {
                "index": pa.array(range(rows.start, rows.stop), pa.int64()),
                "path": names[rows],
                "status": ["ok"] * count,
                "class_id": pa.array([7] * count, pa.int32()),
                "embedding": pa.array(list(vectors[rows]), kind),
            }
        )
        bad = pa.table(
            {
                "index": pa.array([100 + part], pa.int64()),
                "path": ["bad.jpg"],
                "status": ["corrupt"],
                "class_id": pa.array([None], pa.int32()),
                "embedding": pa.array([None], kind),
            }
        )
        pq.write_table(pa.concat_tables([table, bad]), folder / f"part-00000{part}.parquet")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("embedded")
def test_near_duplicates_are_found_by_duckdb_and_by_an_index() -> None:
    first, second, third = blocks("near-duplicates.md", "python")
    found: list[Any] = []
    for block in (first, second, third):
        names: dict[str, Any] = {}
        exec(block, names)
        found.append(names)
    expected = {("a.jpg", "b.jpg"), ("a.jpg", "c.jpg"), ("b.jpg", "c.jpg")}
    assert {tuple(pair) for pair in found[0]["pairs"][["first", "second"]].to_numpy()} == expected
    assert set(found[1]["similar"]["path"][:3]) == {"a.jpg", "b.jpg", "c.jpg"}
    assert {pair[:2] for pair in found[2]["pairs"]} == expected
