"""The pages of docs/recipes: their code runs as it is printed."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import helpers
import sample_images

pytestmark = pytest.mark.ecosystem
RECIPES = helpers.PROJECT / "docs" / "recipes"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    text = (RECIPES / page).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models_dir: Path) -> Any:
    """Runs a script in `tmp_path`, with this project's command line as `imagemill`."""
    command = tmp_path / "bin" / "imagemill"
    helpers.fill(tmp_path, {"bin/imagemill": b""})
    # A small model instead of a large one that would have to be downloaded.
    command.write_text(
        f'#!/bin/bash\nexec "{sys.executable}" -P -m imagemill "${{@/resnext101_32x4d/efficientnet_lite0}}"\n'
    )
    command.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    env = helpers.environment(IMAGEMILL_MODELS=str(models_dir))
    env["PATH"] = f"{command.parent}:{Path(sys.executable).parent}:{env['PATH']}"

    def run(script: str, *arguments: str, **more: str) -> str:
        done = subprocess.run(
            ["bash", "-ec", script, "script", *arguments],
            env=env | more,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def archive(path: Path, images: Mapping[str, bytes]) -> None:
    """Write a tar archive."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in images.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


@pytest.mark.large
def test_imagenets_validation_set_from_its_archive_to_accuracy(shell: Any, tmp_path: Path) -> None:
    """Here four images, of which two have their true synset."""
    demo = helpers.PROJECT / "src" / "imagemill" / "data" / "demo"
    images = {
        f"ILSVRC2012_val_{number:08d}.JPEG": (demo / name).read_bytes()
        for number, name in enumerate(["camera.jpg", "coffee.webp", "camera.jpg", "coffee.webp"])
    }
    archive(tmp_path / "ILSVRC2012_img_val.tar", images)
    tripod, espresso, shark = "n04485082", "n07920052", "n01484850"
    (tmp_path / "synsets.txt").write_text(f"{tripod}\n{espresso}\n{shark}\n{shark}\n")
    (script,) = blocks("imagenet-val.md", "bash")
    assert "top-1: 50.0% (2 of 4 images" in shell(script)


@pytest.mark.large
def test_the_nsfw_filter_sorts(shell: Any, tmp_path: Path) -> None:
    """The package is installed already, so `pip` has nothing to do."""
    helpers.fill(tmp_path / "photos", {"a.jpg": sample_images.jpeg(60, 60), "b.jpg": b"broken"})
    (script,) = blocks("nsfw.md", "bash")
    shell(re.sub(r"^pip install .*\n", "", script))
    files = {
        str(path.relative_to(tmp_path / "sorted")) for path in tmp_path.glob("sorted/**/*.jpg")
    }
    assert "_failed/not_an_image/b.jpg" in files
    assert len(files) <= 2
    (query,) = blocks("nsfw.md", "python")
    names: dict[str, Any] = {}
    exec(query, names)
    assert len(names["unsure"]) == 2 - len(files)


def test_the_nightly_script_adds_what_is_new(shell: Any, tmp_path: Path) -> None:
    (script,) = blocks("nightly.md", "bash")
    arguments = [str(tmp_path / name) for name in ("photos", "job", "sorted")]
    demo = helpers.PROJECT / "src" / "imagemill" / "data" / "demo"
    helpers.fill(tmp_path / "photos", {"b.jpg": (demo / "camera.jpg").read_bytes()})
    shell(script, *arguments)
    first = (tmp_path / "job" / "predictions" / "part-000000.parquet").read_bytes()
    helpers.fill(tmp_path / "photos", {"a.webp": (demo / "coffee.webp").read_bytes()})
    shell(script, *arguments)
    assert {path.name for path in tmp_path.glob("sorted/*/*")} == {"a.webp", "b.jpg"}
    assert (tmp_path / "job" / "predictions" / "part-000000.parquet").read_bytes() == first


@pytest.mark.large
def test_tasks_of_a_slurm_array_make_one_data_set(shell: Any, tmp_path: Path) -> None:
    script, check = blocks("slurm.md", "bash")
    for number in range(2):
        images = {f"{number}.jpg": sample_images.jpeg(60, 60, seed=number)}
        archive(tmp_path / "shards" / f"{number:06d}.tar", images)
        shell(script, SLURM_ARRAY_TASK_ID=str(number))
    shell(check)
    (query,) = blocks("slurm.md", "python")
    names: dict[str, Any] = {}
    exec(query, names)
    assert names["labels"]["images"].sum() == 2


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
