"""docs/backends.md: its example is a backend, its table is the registry."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import helpers
from imagemill.pipeline.backends import BACKENDS

pytestmark = pytest.mark.process

TEXT = (helpers.PROJECT / "docs" / "backends.md").read_text(encoding="utf-8")
LAST_LINE = '    "null": Backend('


def test_a_backend_is_one_file_and_one_line(
    jpegs: Callable[..., Path], models_dir: Path, tmp_path: Path
) -> None:
    """The page's example, put into a copy of the package: `--devices` knows it, two processes run a
    job on it, each part names it.
    """
    file, line = re.findall(
        r"```python\n(.*?)```", TEXT.partition("## How do I add a backend?")[2], re.DOTALL
    )
    assert line.count("\n") == 1
    package = tmp_path / "src" / "imagemill"
    shutil.copytree(
        helpers.SOURCE_ROOT / "imagemill", package, ignore=shutil.ignore_patterns("__pycache__")
    )
    (package / "pipeline" / "backends" / "colour.py").write_text(file)
    registry = package / "pipeline" / "backends" / "__init__.py"
    before = registry.read_text()
    assert before.count(LAST_LINE) == 1
    registry.write_text(before.replace(LAST_LINE, line + LAST_LINE))
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "IMAGEMILL_MODELS": str(models_dir)}
    arguments = (
        jpegs(9),
        "--model",
        "tiny",
        "--output",
        tmp_path / "out",
        "--shard-size",
        2,
        "--devices",
        "cpu:2@colour",
        "--json",
    )
    ended = helpers.imagemill_cli("run", *arguments, env=env, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert (ended.json["images"], ended.json["ok"]) == (9, 9)
    assert {row["class_id"] for row in helpers.rows(tmp_path / "out")} <= {0, 1, 2}
    for part in (tmp_path / "out" / "predictions").glob("part-*"):
        assert pq.read_metadata(part).metadata[b"imagemill.backend"] == b"colour"


def test_the_table_is_the_registry() -> None:
    """Every backend with its kinds of devices and its precisions, and none that is not there."""
    table = [
        re.split(r" *\| *", line)[1:-1] for line in TEXT.splitlines() if line.startswith("| `")
    ]
    reported: dict[str, set[str]] = {}
    for name, typed, *_ in table:
        kinds = reported.setdefault(name.strip("`"), set())
        kinds |= {re.split("[:@]", word)[0] for word in re.findall(r"`([^`]+)`", typed)}
    assert reported == {name: set(row.kinds) for name, row in BACKENDS.items()}
    for name, typed, precisions, *_ in table:
        row = BACKENDS[name.strip("`")]
        kinds = {re.split("[:@]", word)[0] for word in re.findall(r"`([^`]+)`", typed)}
        computes = {one.value for kind in kinds for one in row.kinds[kind]}
        assert set(re.findall(r"\b(?:fp32|fp16|bf16|int8)\b", precisions)) == (
            computes if name != "`null`" else set()
        )
