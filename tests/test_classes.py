"""What a row says about classes: a minimum probability, thresholds per label, and networks without
a head.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import helpers
import imagemill as api
from imagemill.errors import JobMismatchError, UsageError
from imagemill.job import export
from imagemill.job.open_job import OpenJob
from imagemill.records import Settings
from imagemill.runner import run, thresholds
from tiny import LABELS

Jobs = Callable[..., Settings]
Folders = Callable[..., Path]
CLASSES_OF_A_ROW = ("class_id", "label", "probability")


def csv_of(values: dict[str, Any], header: str = "label,threshold") -> str:
    quoted = ('"' + label.replace('"', '""') + '"' for label in values)
    rows = zip(quoted, values.values(), strict=True)
    return "\n".join([header, *(f"{label},{value}" for label, value in rows)])


def problems(output: Path) -> list[str]:
    return [str(found) for found in OpenJob.open(str(output)).verify()[0]]


# ── a minimum probability ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model", ["tiny", "tags"])
def test_a_row_lists_the_classes_of_the_minimum_probability(
    job: Jobs, jpegs: Folders, tmp_path: Path, model: str
) -> None:
    """Of any kind of model: those of the full list that reach it. Without one, `class_id`, `label`
    and `probability` are null, the list is empty and the status is ok.
    """
    folder = jpegs(8, **{"bad.jpg": b""})
    settings = {"model": model, "devices": "cpu", "top_k": 10}
    run.run(job(folder, output=str(tmp_path / "all"), **settings))
    everything = helpers.rows(tmp_path / "all")
    *good, _ = everything
    # The bound lies between the images: some have no class as probable as this.
    bound = sorted(row["probability"] for row in good)[4]
    run.run(job(folder, min_probability=bound, **settings, report=True))
    for whole, row in zip(everything, helpers.rows(tmp_path / "out"), strict=True):
        if row["status"] != "ok":
            assert row["top_k"] is None
            continue
        assert row["top_k"] == [item for item in whole["top_k"] if item["probability"] >= bound]
        first = row["top_k"][0] if row["top_k"] else dict.fromkeys(CLASSES_OF_A_ROW)
        assert {name: row[name] for name in CLASSES_OF_A_ROW} == first
    counts = [len(row["top_k"]) for row in helpers.rows(tmp_path / "out")[:-1]]
    assert counts.count(0) == 4
    assert problems(tmp_path / "out") == []
    text = b"".join(export.export(OpenJob.open(str(tmp_path / "out")), export.Form.JSONL))
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["class_id"], line["top_k"]) for line in lines].count((None, [])) == 4
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Without a class</dt><dd>4<span>" in page
    assert page.count("no class</p>") == 4


def test_the_list_is_cut_at_top_k(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """`--min-probability 0` leaves nothing out."""
    run.run(job(jpegs(3), min_probability=0.0, top_k=3, devices="cpu"))
    assert [len(row["top_k"]) for row in helpers.rows(tmp_path / "out")] == [3, 3, 3]


def test_each_label_has_its_threshold(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """From a file, frozen with the job. Another file on resume is refused, the same one is not,
    wherever it lies.
    """
    folder, file = jpegs(6), tmp_path / "thresholds.csv"
    values = {label: 0.05 * place for place, label in enumerate(LABELS, 1)}
    file.write_text(csv_of(values), "utf-8")
    settings = {"model": "tags", "devices": "cpu", "top_k": 10}
    run.run(job(folder, min_probability=str(file), **settings))
    for row in helpers.rows(tmp_path / "out"):
        kept = [item["label"] for item in row["top_k"]]
        assert all(
            item["probability"] >= np.float32(values[item["label"]]) for item in row["top_k"]
        )
        assert kept
        assert len(kept) < len(LABELS)
    frozen = json.loads((tmp_path / "out" / "job.json").read_text())
    assert frozen["job"]["min_probability"] == list(values.values())
    (tmp_path / "out" / "predictions" / "part-000000.parquet").unlink()
    again = file.rename(tmp_path / "moved.csv")
    run.run(job(folder, min_probability=str(again), **settings))
    again.write_text(csv_of(values | {LABELS[3]: 0.9}), "utf-8")
    with pytest.raises(JobMismatchError) as caught:
        run.run(job(folder, min_probability=str(again), **settings))
    was, now = str(caught.value).split(", now ")
    assert "with 10 thresholds from 0.05 to 0.5 (sha256 " in was
    assert "with 10 thresholds from 0.05 to 0.9 (sha256 " in now


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        (None, 0.5, "with no --min-probability, now --min-probability 0.5 is asked for"),
        (0.5, 0.25, "with --min-probability 0.5, now --min-probability 0.25 is asked for"),
        (0.0, 0.25, "with --min-probability 0, now --min-probability 0.25 is asked for"),
    ],
)
def test_a_job_keeps_its_minimum_probability(
    job: Jobs, jpegs: Folders, was: float | None, now: float, message: str
) -> None:
    """It decides answers: leaving it out keeps it, another one is refused with both values."""
    folder = jpegs(2)
    run.run(job(folder, min_probability=was))
    with pytest.raises(JobMismatchError) as caught:
        run.run(job(folder, min_probability=now))
    assert message in str(caught.value)
    assert run.run(job(folder)).images == 2
    assert run.run(job(folder, min_probability=was)).images == 2


WHOLE = dict.fromkeys(LABELS, 0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory. Give a number from 0 to 1, or a CSV"),
        (b"label,threshold\n\xff,1", "cannot be read: it is not UTF-8"),
        ("", "its first line must name the columns label and threshold"),
        ("tench,0.5", "its first line must name the columns label and threshold"),
        ("label,threshold\nunicorn,0.5", "line 2: 'unicorn' is not a label of the model"),
        ("label,threshold\nhen,0.5\nhen,0.5", "line 3: 'hen' has a threshold already"),
        ("label,threshold\nhen,much", "line 2: the threshold 'much' is not a number from 0 to 1"),
        ("label,threshold\nhen,1.5", "line 2: the threshold '1.5' is not a number from 0 to 1"),
        ("label,threshold\nhen,nan", "line 2: the threshold 'nan' is not a number from 0 to 1"),
        ("label,threshold\nhen", "line 2: the threshold '' is not a number from 0 to 1"),
        (
            "label,threshold\ntench,0.5",
            "has no threshold for 9 of 10 labels, the first of them 'hen'. Add a line for each.",
        ),
        ('label,threshold\n"hen,0.5', "unexpected end of data"),
    ],
)
def test_a_file_that_does_not_fit_is_one_clear_error(
    tmp_path: Path, text: str | bytes | None, message: str
) -> None:
    """It names the file, the line and what is wrong there."""
    file = tmp_path / "thresholds.csv"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        thresholds.read_file(file, LABELS)
    assert str(caught.value).startswith(f"--min-probability {file}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_thresholds_may_come_from_a_spreadsheet(tmp_path: Path) -> None:
    """A byte order mark, other columns, another order, and Windows' line ends."""
    file = tmp_path / "thresholds.csv"
    file.write_bytes(b"\xef\xbb\xbfnote,threshold,label\r\nx,0.25,b\r\n,1,a\r\n")
    assert thresholds.read_file(file, ("a", "b", "a")) == (1.0, 0.25, 1.0)


def test_a_wrong_file_is_found_before_anything_is_listed(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """Nothing is written."""
    with pytest.raises(UsageError, match=r"--min-probability 0,5 cannot be read"):
        run.run(job(jpegs(1), min_probability="0,5"))
    assert not (tmp_path / "out" / "job.json").exists()


# ── networks without a head ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("devices", ["cpu", "null"])
def test_a_network_without_a_head_saves_its_embedding(
    job: Jobs, jpegs: Folders, tmp_path: Path, devices: str
) -> None:
    """Unasked for; its classes are null in every row. Everything that reads a job takes it."""
    folder = jpegs(5, **{"bad.jpg": b""})
    summary = run.run(job(folder, model="headless", devices=devices, report=True))
    assert (summary.ok, summary.failed) == (5, 1)
    *good, bad = helpers.rows(tmp_path / "out")
    for row in good:
        assert row["status"] == "ok"
        assert [row[name] for name in (*CLASSES_OF_A_ROW, "top_k")] == [None] * 4
        assert len(row["embedding"]) == (32 if devices == "cpu" else 8)
    assert bad["embedding"] is None
    assert problems(tmp_path / "out") == []
    page = (tmp_path / "out" / "report.html").read_text()
    assert "6 images, embedded by" in page
    assert 'id="classes"' not in page
    assert "no class</p>" not in page
    assert run.run(job(folder, model="headless", devices=devices)).images == 6
    again = job(folder, model="headless", save=("embedding",), devices=devices)
    assert run.run(again).images == 6


def test_the_embedding_is_that_of_the_whole_model(
    job: Jobs, jpegs: Folders, tmp_path: Path
) -> None:
    """Cutting the head off changes no bit of it."""
    folder = jpegs(3)
    run.run(job(folder, model="headless", devices="cpu"))
    whole = str(tmp_path / "whole")
    run.run(job(folder, save=("embedding",), devices="cpu", output=whole))
    found, expected = helpers.rows(tmp_path / "out"), helpers.rows(tmp_path / "whole")
    assert [row["embedding"] for row in found] == [row["embedding"] for row in expected]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"top_k": 3}, "--top-k 3: headless has no classes, its result is an embedding."),
        ({"min_probability": 0.5}, "--min-probability 0.5: headless has no classes"),
        ({"labels": "labels.txt"}, "--labels labels.txt: headless has no classes"),
        ({"save": ("logits",)}, "--save logits: headless has no such output"),
        (
            {"precision": "int8"},
            "int8 is not possible: headless has no classes, so it is not defin",
        ),
    ],
)
def test_what_needs_classes_is_refused(
    job: Jobs, jpegs: Folders, setting: dict[str, Any], message: str
) -> None:
    """By `run` and by `load`, in one line that names the flag."""
    with pytest.raises(UsageError) as caught:
        run.run(job(jpegs(1), model="headless", devices="cpu", **setting))
    assert str(caught.value).startswith(message)
    with pytest.raises(UsageError) as caught:
        api.load("headless", **setting)
    assert str(caught.value).startswith(message)


# ── the Python API ────────────────────────────────────────────────────────────────────────────────


def test_a_classifier_keeps_the_classes_of_the_minimum_probability(
    tmp_path: Path, jpegs: Folders
) -> None:
    """As a job does, from a number and from a file."""
    images = sorted(jpegs(6).iterdir())
    with api.load("tags", top_k=10) as classifier:
        everything = classifier.predict(images)
    file = tmp_path / "thresholds.csv"
    file.write_text(csv_of(WHOLE), "utf-8")
    for bound in (0.5, file):
        with api.load("tags", top_k=10, min_probability=bound) as classifier:
            found = classifier.predict(images)
        for whole, one in zip(everything, found, strict=True):
            assert one.top_k == tuple(item for item in whole.top_k if item.probability >= 0.5)
            assert one.label == (one.top_k[0].label if one.top_k else None)
    with api.load("tiny", min_probability=1) as classifier:
        (none,) = classifier.predict(images[0])
    assert (none.status, none.top_k) == ("ok", ())
    assert (none.class_id, none.label, none.probability) == (None, None, None)


def test_a_classifier_without_a_head_gives_embeddings(jpegs: Folders) -> None:
    """It has no labels."""
    with api.load("headless") as embedder:
        assert embedder.labels == ()
        (found,) = embedder.predict(next(jpegs(1).iterdir()))
    assert (found.status, found.label, found.top_k, found.logits) == ("ok", None, (), None)
    assert found.embedding is not None
    assert found.embedding.shape == (32,)


def test_a_model_that_is_wider_than_high_runs(job: Jobs, jpegs: Folders, tmp_path: Path) -> None:
    """Decoded into batches of its shape, by `run` as by `load`."""
    folder = jpegs(6, **{"000.jpg": b""})  # what follows a failed image is copied to its place
    run.run(job(folder, model="wide", devices="cpu", save=("logits",)))
    with api.load("wide", save="logits") as classifier:
        predictions = classifier.predict(sorted(folder.iterdir()))
    for row, prediction in zip(helpers.rows(tmp_path / "out"), predictions, strict=True):
        assert row["status"] == prediction.status
        if row["status"] == "ok":
            assert np.float32(row["logits"]).tobytes() == prediction.logits.tobytes()
