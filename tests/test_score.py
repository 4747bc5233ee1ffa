"""`imagemill score`: the figures are scikit-learn's, and whatever a truth can be is read or refused
in one clear line.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

import archive_files
import helpers
import imagemill
import made_jobs
import sample_images
from imagemill import cli
from imagemill.display.observer import Watcher
from imagemill.errors import OutputError, SourceError, UsageError
from imagemill.job.open_job import OpenJob
from imagemill.models import bundle
from imagemill.models.labels import imagenet_labels
from imagemill.pipeline.backends import devices
from imagemill.records import Scores, Status
from imagemill.runner import append
from imagemill.scoring import places, values
from imagemill.scoring import score as scoring
from imagemill.scoring.record import Score
from made_jobs import Answer
from s3 import Bucket
from tiny import Finished

ANIMALS = ("cat", "dog", "great_white shark", "hen")
Make = Callable[..., OpenJob]


@pytest.fixture
def make(models_dir: Path, tmp_path: Path) -> Make:
    """Makes a job of empty files in `tmp_path/images` with these answers, by path."""

    def made(
        answers: Mapping[str, Answer],
        *sources: Path | str,
        labels: Sequence[str] = ANIMALS,
        scores: Scores = Scores.LOGITS,
        rows: bool = True,
        **given: Any,
    ) -> OpenJob:
        if not sources:
            helpers.fill(tmp_path / "images", dict.fromkeys(answers, b""))
        settings = made_jobs.settings_of(
            *(sources or [tmp_path / "images"]), output=tmp_path / "out", models_dir=models_dir
        )
        model = made_jobs.tiny(models_dir)
        model = replace(model, card=replace(model.card, labels=tuple(labels), scores=scores))
        settings = replace(settings, **given)
        if not rows:
            return made_jobs.frozen_job(settings, model)
        return made_jobs.made_job(settings, model, lambda path: answers[os.fsdecode(path)])

    return made


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return f"@{path}"


def score(job: OpenJob, truth: str) -> Score:
    return scoring.score(job, truth)


# ── the figures ───────────────────────────────────────────────────────────────────────────────────

CLASSES = 12
NAMES = tuple(f"class {number:02d}" for number in range(CLASSES))


def random_answers(count: int, k: int) -> tuple[Any, Any, dict[str, Answer]]:
    """True classes, probabilities (n, classes), and the rows; class 11 is never predicted, and
    class 10 never true.
    """
    rng = np.random.default_rng(7)
    true = rng.choice([*range(10), 11], count)
    logits = rng.normal(0, 1.5, (count, CLASSES))
    logits[np.arange(count), true] += 1.5
    logits[:, 11] = -9
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    probabilities = probabilities.astype(np.float32)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    answers: dict[str, Answer] = {
        f"{NAMES[true[row]]}/{row:04d}.jpg": [(int(c), float(probabilities[row, c])) for c in best]
        for row, best in enumerate(order)
    }
    return true, probabilities, answers


@pytest.mark.ecosystem
def test_the_figures_are_those_of_scikit_learn(make: Make) -> None:
    """Of 1,000 rows: accuracy, top 5, every line of the report, every cell of the matrix."""
    from sklearn import metrics  # takes seconds to import

    true, probabilities, answers = random_answers(1_000, 5)
    found = score(make(answers, labels=NAMES, top_k=5, shard_size=64), "folders")
    predicted = probabilities.argmax(axis=1)

    def same(value: float | None, expected: float) -> None:
        assert value == pytest.approx(float(expected), abs=1e-12)

    same(found.top1.value, metrics.accuracy_score(true, predicted))
    assert found.top5 is not None
    expected = metrics.top_k_accuracy_score(true, probabilities, k=5, labels=range(CLASSES))
    same(found.top5.value, expected)
    report = metrics.classification_report(true, predicted, output_dict=True, zero_division=0)
    assert [str(item.class_id) for item in found.classes] == [
        key for key in report if key.isdigit()
    ]
    for item in found.classes:
        line = report[str(item.class_id)]
        for name in ("precision", "recall", "support"):
            same(getattr(item, name), line[name])
        same(item.f1, line["f1-score"])
    for average, name in ((found.macro, "macro avg"), (found.weighted, "weighted avg")):
        assert average is not None
        same(average.precision, report[name]["precision"])
        same(average.recall, report[name]["recall"])
        same(average.f1, report[name]["f1-score"])
    matrix = np.zeros((CLASSES, CLASSES), int)
    for true_id, predicted_id, images in found.confusion:
        assert images > 0
        matrix[true_id, predicted_id] = images
    assert (matrix == metrics.confusion_matrix(true, predicted, labels=range(CLASSES))).all()


def test_the_calibration_is_that_of_its_definition(make: Make) -> None:
    """15 bins, closed above; the error is the mean gap weighted by images."""
    true, probabilities, answers = random_answers(500, 5)
    found = score(make(answers, labels=NAMES, top_k=5, shard_size=64), "folders").calibration
    assert found is not None
    best = probabilities.max(axis=1).astype(float)
    right = probabilities.argmax(axis=1) == true
    error = 0.0
    for number, bin_ in enumerate(found.bins):
        inside = (best > number / 15) & (best <= (number + 1) / 15)
        assert bin_.images == inside.sum()
        if inside.any():
            assert bin_.probability == pytest.approx(best[inside].mean(), abs=1e-12)
            assert bin_.accuracy == pytest.approx(right[inside].mean(), abs=1e-12)
            error += inside.mean() * abs(right[inside].mean() - best[inside].mean())
    assert found.error == pytest.approx(error, abs=1e-12)
    assert sum(bin_.images for bin_ in found.bins) == 500


def test_the_most_frequent_confusions_have_their_surest_images(make: Make) -> None:
    """The most frequent one first, with the images in which the model was most certain."""
    answers: dict[str, Answer] = {
        **{f"cat/{n}.jpg": (1, 0.5 + n / 100) for n in range(5)},
        "dog/0.jpg": (0, 0.9),
        "hen/0.jpg": (3, 0.9),
    }
    job = make(answers)
    first, second = score(job, "folders").confusions
    assert (first.label, first.predicted_label, first.images) == ("cat", "dog", 5)
    paths = {row["index"]: row["path"] for row in helpers.rows(Path(job.paths.output))}
    assert [paths[index] for index in first.examples] == ["cat/4.jpg", "cat/3.jpg", "cat/2.jpg"]
    assert (second.label, second.predicted_label, second.images) == ("dog", "cat", 1)


def test_failed_images_are_reported_and_count_as_wrong(make: Make) -> None:
    """Both figures are there; the figures of classes are about readable images."""
    found = score(
        make(
            {
                "cat/0.jpg": (0, 0.9),
                "cat/1.jpg": (0, 0.9),
                "cat/2.jpg": Status.TRUNCATED,
                "dog/0.jpg": Status.MISSING,
                "dog/1.jpg": (0, 0.8),
            }
        ),
        "folders",
    )
    assert (found.labelled, found.failed) == (5, 2)
    assert found.failed_by_status == {"missing": 1, "truncated": 1}
    assert (found.top1.correct, found.top1.images) == (2, 5)
    assert (found.top1_readable.correct, found.top1_readable.images) == (2, 3)
    assert found.top1.low < 0.4 < found.top1.high
    cat, dog = found.classes
    assert (cat.support, cat.predicted, cat.correct, cat.failed) == (2, 3, 2, 1)
    assert (dog.support, dog.recall, dog.failed) == (1, 0, 1)


def test_a_job_without_a_readable_image_has_a_score(make: Make) -> None:
    """Its accuracy is 0 over all, and not known over readable ones."""
    found = score(make({"cat/0.jpg": Status.EMPTY}), "folders")
    assert (found.top1.value, found.top1_readable.value) == (0.0, None)
    from imagemill.display.results import format_score

    assert "  over readable images: not known: no image is readable" in format_score(found)


# ── where labels are ──────────────────────────────────────────────────────────────────────────────

THREE: dict[str, Answer] = {"cat/a.jpg": (0, 0.9), "dog/b.jpg": (1, 0.9), "dog/c.jpg": (0, 0.9)}


@pytest.mark.parametrize(
    "truth",
    [
        "folders",
        r"regex:^(cat|dog)/",
        r"regex:(x)?(?P<label>cat|dog)/.\.jpg$",
        "TABLE a.csv path,label\n./dog/c.jpg,dog\ncat/a.jpg,cat\ndog/b.jpg,dog\n",
        "TABLE a.csv file_name,x,class\nIMAGES/dog/c.jpg,,1\nIMAGES/cat/a.jpg,,0\nIMAGES/dog/b.jpg,,1\n",
        "TABLE a.csv path,label\nimages/dog/c.jpg,dog\nimages/cat/a.jpg,cat\nimages/dog/b.jpg,dog\n",
        "TABLE a.csv path,label\nelsewhere/c.jpg,dog\na.jpg,cat\nb.jpg,dog\n",
        'TABLE a.csv#where,what id,where,what\n7,"dog/c.jpg",dog\r\n8,cat/a.jpg,cat\n9,dog/b.jpg,DOG\n',
        "TABLE a.tsv#x path\tx\ndog/c.jpg\t1.0\ncat/a.jpg\t0.0\ndog/b.jpg\t1.0\n",
    ],
)
def test_every_form_of_truth(make: Make, tmp_path: Path, truth: str) -> None:
    """Two of three images are right, whatever names their labels."""
    job = make(THREE)
    if truth.startswith("TABLE "):
        name, text = truth.removeprefix("TABLE ").split(" ", 1)
        file, _, columns = name.partition("#")
        write(tmp_path / file, text.replace("IMAGES", str(tmp_path / "images")))
        truth = f"@{tmp_path / file}#{columns}" if columns else f"@{tmp_path / file}"
    found = score(job, truth)
    assert (found.top1.correct, found.labelled, found.notes) == (2, 3, ())
    assert found.confusion == ((0, 0, 1), (1, 0, 1), (1, 1, 1))


def test_a_table_of_paths_that_are_relative_to_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the table itself is named by a relative path, and the paths lead upwards."""
    job = make(THREE)
    monkeypatch.chdir(helpers.fill(tmp_path / "x", {"y": b""}))
    text = "".join(f"../images/{path},{path[:3]}\n" for path in THREE)
    write(Path("t.csv"), f"path,label\n{text}")
    found = score(job, "@t.csv")
    assert (found.matched_by, found.top1.correct) == ("full path", 2)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_other_encodings(make: Make, tmp_path: Path, encoding: str) -> None:
    """A byte order mark says which; names that are not ASCII are found."""
    job = make({"crème brûlée.jpg": (0, 0.9)}, labels=("Übergang", "other"))
    truth = write(tmp_path / "truth.csv", "path,label\ncrème brûlée.jpg,übergang\n", encoding)
    assert score(job, truth).top1.correct == 1


def test_a_table_that_is_not_utf_8_is_one_clear_line(make: Make, tmp_path: Path) -> None:
    """With the row and what to do."""
    job = make(THREE)
    truth = write(tmp_path / "a.csv", "path,label\ncat/a.jpg,cat\ncaf\xe9.jpg,dog\n", "latin-1")
    with pytest.raises(SourceError) as raised:
        score(job, truth)
    assert str(raised.value) == (
        f"--truth {tmp_path}/a.csv is not UTF-8: row 2 has 'caf\\\\xe9.jpg'. Save it as UTF-8."
    )


def parquet(path: Path, features: Any = None, /, **columns: Any) -> Path:
    table = pa.table(columns)
    if features is not None:
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=2)
    return path


def test_a_parquet_truth(make: Make, tmp_path: Path) -> None:
    """Numbers, dictionaries, and lists of labels."""
    job = make(THREE)
    paths = pa.array(["dog/c.jpg", "cat/a.jpg", "dog/b.jpg"])
    for labels in (
        pa.array([1, 0, 1]),
        pa.array([1.0, 0.0, 1.0]),
        pa.array(["dog", "cat", "dog"]).dictionary_encode(),
    ):
        truth = f"@{parquet(tmp_path / 'a.parquet', path=paths, label=labels)}"
        assert score(job, truth).top1.correct == 2
    several = pa.array([["dog", "cat"], ["cat"], []], pa.list_(pa.string()))
    found = score(job, f"@{parquet(tmp_path / 'a.parquet', path=paths, label=several)}")
    assert (found.top1.correct, found.labelled) == (2, 2)
    assert found.omitted["confusion"] == "images have several true labels"


def test_names_of_a_datasets_numbers_count(make: Make, tmp_path: Path) -> None:
    """A data set may number its classes otherwise than the model; its names decide. Names that the
    model does not know leave the numbers.
    """
    job = make(THREE)
    columns = {"path": ["dog/c.jpg", "cat/a.jpg", "dog/b.jpg"], "label": [0, 1, 0]}
    for names, correct, kind in ((["dog", "cat"], 2, "labels"), (["x", "y"], 1, "class ids")):
        features = {"label": {"_type": "ClassLabel", "names": names}}
        found = score(job, f"@{parquet(tmp_path / 'a.parquet', features, **columns)}")
        assert (found.top1.correct, found.read_as) == (correct, kind)


def test_a_column_of_a_csv_source(make: Make, tmp_path: Path) -> None:
    """Rows that the job left out do no harm."""
    source = write(
        tmp_path / "list.csv", "path,label\nx/a.jpg,cat\nx/b.jpg,dog\nx/z.png,hen\ny/c.jpg,dog\n"
    )
    answers: dict[str, Answer] = {"x/a.jpg": (0, 0.9), "x/b.jpg": (1, 0.9), "y/c.jpg": (0, 0.9)}
    job = make(answers, source, exclude=("*.png",))
    found = score(job, "column:label")
    assert (found.top1.correct, found.labelled, found.notes) == (2, 3, ())
    with pytest.raises(SourceError, match=r"list\.csv has no column 'labl'. Its columns: 'path', "):
        score(job, "column:labl")


def test_a_column_of_a_parquet_source(make: Make, tmp_path: Path) -> None:
    """Labels go by the row. A table that was replaced is refused."""
    images = [{"bytes": b"", "path": f"{name}.jpg"} for name in "aabc"]
    source = parquet(tmp_path / "data.parquet", image=images, label=[0, 0, 1, 1])
    answers: dict[str, Answer] = {
        "00000000/a.jpg": (0, 0.9), "00000001/a.jpg": (1, 0.9), "00000002/b.jpg": (1, 0.9),
        "00000003/c.jpg": (1, 0.9),
    }  # fmt: skip
    job = make(answers, source)
    found = score(job, "column:label")
    assert (found.top1.correct, found.labelled) == (3, 4)
    parquet(source, image=images[:3], label=[0, 0, 1])
    with pytest.raises(SourceError, match=r"data\.parquet was replaced since the job listed it"):
        score(job, "column:label")


def test_cls_members_of_a_webdataset(make: Make, tmp_path: Path) -> None:
    """Members of one name up to its first dot belong together."""
    files = {
        "x/000.jpg": b"", "x/000.cls": b"0\n", "x/001.seg.png": b"", "x/001.cls": b"1",
        "y/000.jpg": b"", "y/000.cls": b"1", "y/002.jpg": b"",
    }  # fmt: skip
    answers: dict[str, Answer] = {
        "x/000.jpg": (0, 0.9), "x/001.seg.png": (1, 0.9), "y/000.jpg": (0, 0.9),
        "y/002.jpg": (0, 0.9),
    }  # fmt: skip
    for mode, name in (("w", "shard.tar"), ("w:gz", "shard.tar.gz")):
        (tmp_path / name).write_bytes(archive_files.tar(files, mode))
        job = make(answers, tmp_path / name, output=str(tmp_path / f"out-{name}"))
        found = score(job, "cls")
        assert (found.top1.correct, found.labelled) == (2, 3)
        assert found.notes == (
            "note: images without a true label, not scored: 1 of 4, first: y/002.jpg",
        )
    (tmp_path / "shard.tar.gz").write_bytes(archive_files.tar({"a.cls": b"0" * 70_000}, "w:gz"))
    with pytest.raises(SourceError, match=r"member a\.cls has 70,000 bytes"):
        score(job, "cls")


def test_images_in_archives_and_tables_have_no_folder_at_the_top(
    make: Make, tmp_path: Path
) -> None:
    """The archive's own folder is no label."""
    (tmp_path / "a.tar").write_bytes(archive_files.tar({"cat/0.jpg": b"", "0.jpg": b""}))
    found = score(make({"cat/0.jpg": (0, 0.9), "0.jpg": (0, 0.9)}, tmp_path / "a.tar"), "folders")
    assert (found.top1.correct, found.labelled) == (1, 1)


def test_single_files_and_sources_that_are_a_label(make: Make, tmp_path: Path) -> None:
    """The folder of a single file, and a source without sub-folders, are labels, too."""
    helpers.fill(tmp_path, {"cat/0.jpg": b"", "dog/1.jpg": b""})
    job = make({"": (0, 0.9), "1.jpg": (0, 0.9)}, tmp_path / "cat" / "0.jpg", tmp_path / "dog")
    assert score(job, "folders").confusion == ((0, 0, 1), (1, 0, 1))
    truth = write(tmp_path / "t.csv", "path,label\n0.jpg,cat\n1.jpg,cat\n")
    assert score(job, truth).top1.correct == 2


@pytest.mark.parametrize(
    ("source", "path", "full", "folder", "name"),
    [
        ("/d", "cat/1.jpg", "/d/cat/1.jpg", "cat", "1.jpg"),
        ("/d/cat/1.jpg", "", "/d/cat/1.jpg", "cat", "1.jpg"),
        ("/d/cat/1.jpg", "1.jpg", "/d/cat/1.jpg", "cat", "1.jpg"),
        ("/d/a.zip", "cat/1.jpg", "/d/a.zip/cat/1.jpg", "cat", "1.jpg"),
        ("/d/a.zip", "1.jpg", "/d/a.zip/1.jpg", None, "1.jpg"),
        ("/d/a.parquet#img", "00000007/cat/1.jpg", "/d/a.parquet/00000007/cat/1.jpg", "cat", "1.jpg"),
        ("/d/a.parquet", "00000007", "/d/a.parquet/00000007", None, "00000007"),
        ("@/d/l.txt", "cat/1.jpg", "/d/cat/1.jpg", "cat", "1.jpg"),
        ("@/d/l.csv#file", "/e/cat/1.jpg", "/e/cat/1.jpg", "cat", "1.jpg"),
        ("@/d/l.txt", "https://h/cat/1.jpg?v=2/3", "https://h/cat/1.jpg?v=2/3", "cat", "1.jpg"),
        ("@https://h/l.txt", "../1.jpg", "../1.jpg", "..", "1.jpg"),  # above the host: as written
        ("https://h/cat/1.jpg?v=/", "", "https://h/cat/1.jpg?v=/", "cat", "1.jpg"),
        ("https://h/cat/1.jpg?v=/", "1.jpg", "https://h/cat/1.jpg?v=/", "cat", "1.jpg"),
        ("s3://b/d", "cat/1.jpg", "s3://b/d/cat/1.jpg", "cat", "1.jpg"),
    ],
)  # fmt: skip
def test_where_an_image_is(
    source: str, path: str, full: str, folder: str | None, name: str
) -> None:
    """Full path, folder and name follow from the columns `source` and `path`."""
    assert places.full_path(source, path) == full
    assert places.folder_name(source, path) == folder
    assert places.file_name(source, path) == name


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("labels", r"--truth labels: write folders, regex:PATTERN, @FILE.csv#path,label .*cls\.$"),
        ("truth.csv", r": for a table, write @truth\.csv\. Otherwise write folders"),
        ("regex:", "write folders"),
        ("regex:(", r"--truth regex:\(: the pattern is not valid: missing \)"),
        ("regex:cat", r"the pattern has no group. Put the label in parentheses"),
        ("@truth.xlsx#a,b", r"the file must be a \.csv, \.tsv or \.parquet table"),
        ("regex:(zebra)", r"no path of the job matches the pattern, first: cat/a\.jpg\.$"),
        ("cls", "no source of the job is a tar archive"),
        ("column:label", "no source of the job is a table"),
        ("regex:([abc])", r"knows none of the labels 'c', 'b'. Its labels are 'cat', 'dog', "
         r"'great_white shark', 'hen', its class ids 0 to 3\.$"),
    ],
)  # fmt: skip
def test_a_truth_that_does_not_fit_is_refused(make: Make, truth: str, message: str) -> None:
    """In one line that says what to write."""
    with pytest.raises(UsageError, match=message):
        score(make(THREE), truth)


# ── tables with faults ────────────────────────────────────────────────────────────────────────────


def notes_of(make: Make, tmp_path: Path, text: str, answers: Any = THREE) -> tuple[Score, str]:
    found = score(make(answers), write(tmp_path / "t.csv", f"path,label\n{text}"))
    return found, "\n".join(found.notes).replace(str(tmp_path), "")


def test_images_and_rows_without_a_partner(make: Make, tmp_path: Path) -> None:
    """Images without truth and truth without an image are one line each, with the first."""
    found, notes = notes_of(
        make, tmp_path, "cat/a.jpg,cat\nx.jpg,cat\ndog/b.jpg,\ny.jpg,dog\n,cat\n,cat\n"
    )
    assert notes == (
        "note: images without a true label, not scored: 2 of 3, first: dog/b.jpg\n"
        "note: paths of /t.csv that are not in the job: 2, first: x.jpg"
    )
    assert (found.labelled, found.matched_by) == (1, "path")


def test_unknown_labels(make: Make, tmp_path: Path) -> None:
    """One line with their number and the first; their images are left out."""
    rows = "".join(f"dog/{n}.jpg,breed {n % 7}\n" for n in range(14))
    answers = {"cat/a.jpg": (0, 0.9), **{f"dog/{n}.jpg": (1, 0.9) for n in range(14)}}
    found, notes = notes_of(make, tmp_path, f"cat/a.jpg,cat\n{rows}", answers)
    assert notes == (
        "note: labels that are not among the model's labels: 7 ('breed 0', 'breed 1', 'breed 2',"
        " 'breed 3', 'breed 4', …); images with them, not scored: 14"
    )
    assert (found.labelled, found.top1.correct) == (1, 1)


def test_rows_that_repeat(make: Make, tmp_path: Path) -> None:
    """Equal labels count once."""
    found, notes = notes_of(
        make, tmp_path, "cat/a.jpg,cat\ndog/b.jpg,dog\ncat/a.jpg,cat\ndog/c.jpg,dog\n"
    )
    assert notes == ("note: labels that are given twice and count once: 1, first: cat/a.jpg")
    assert (found.top1.correct, found.labelled, len(found.confusion)) == (2, 3, 3)


def test_rows_that_contradict(make: Make, tmp_path: Path) -> None:
    """Several labels of an image are named, any of them counts, and only accuracy is given."""
    found, notes = notes_of(
        make, tmp_path, "dog/c.jpg,dog\ncat/a.jpg,cat\ndog/b.jpg,dog\ndog/c.jpg,cat\n"
    )
    assert notes == (
        "note: images with several true labels, of which any counts: 1, first: dog/c.jpg (dog, cat)"
    )
    assert (found.top1.correct, found.labelled) == (3, 3)
    assert (found.macro, found.calibration, found.classes, found.confusion) == (None, None, (), ())
    assert set(found.omitted) >= {"classes", "confusion", "calibration"}


def test_class_ids_that_start_at_1(make: Make, tmp_path: Path) -> None:
    """The line about the id beyond the last one says so."""
    _, notes = notes_of(make, tmp_path, "cat/a.jpg,1\ndog/b.jpg,2\ndog/c.jpg,4\n")
    assert notes == (
        "note: labels that are not among the model's class ids: 1 ('4'); images with them, not"
        " scored: 1. Class ids start at 0"
    )


def test_a_name_that_is_several_images_is_refused(make: Make, tmp_path: Path) -> None:
    """Neither by name nor by path is one of them chosen."""
    truth = write(tmp_path / "t.csv", "path,label\nz/1.jpg,cat\n")
    answers: dict[str, Answer] = {"a/1.jpg": (0, 0.9), "b/1.jpg": (0, 0.9)}
    with pytest.raises(
        UsageError,
        match=(
            r"no path of the table is an image of the job \(by file name, 1\.jpg is ambiguous\)\."
            r" Write full paths. The table has z/1\.jpg, the job has a/1\.jpg\."
        ),
    ):
        score(make(answers), truth)


def test_a_path_that_is_in_two_sources_is_refused(make: Make, tmp_path: Path) -> None:
    """Full paths say which is meant."""
    helpers.fill(tmp_path, {"x/1.jpg": b"", "y/1.jpg": b""})
    job = make({"1.jpg": (0, 0.9)}, tmp_path / "x", tmp_path / "y")
    with pytest.raises(UsageError, match=r"by path, 1\.jpg is ambiguous"):
        score(job, write(tmp_path / "t.csv", "path,label\n1.jpg,cat\n"))
    text = f"path,label\n{tmp_path}/x/1.jpg,cat\ny/1.jpg,dog\n"
    found = score(job, write(tmp_path / "t.csv", text))
    assert (found.matched_by, found.confusion) == ("full path", ((0, 0, 1), (1, 0, 1)))


def test_two_paths_of_a_table_with_one_name_are_refused(make: Make, tmp_path: Path) -> None:
    """If images are found by their names, a name has to be one path of the table."""
    truth = write(tmp_path / "t.csv", "path,label\nx/a.jpg,cat\ny/a.jpg,dog\n")
    with pytest.raises(UsageError, match=r"by file name, a\.jpg is ambiguous"):
        score(make({"a.jpg": (0, 0.9)}), truth)


def test_the_way_that_finds_most_images_is_used(make: Make, tmp_path: Path) -> None:
    """Not the first way that finds any."""
    rows = "a.jpg,cat\nq/b.jpg,dog\nq/c.jpg,dog\n"
    answers: dict[str, Answer] = {"a.jpg": (0, 0.9), "r/b.jpg": (1, 0.9), "r/c.jpg": (1, 0.9)}
    found, notes = notes_of(make, tmp_path, rows, answers)
    assert (found.matched_by, found.top1.correct, notes) == ("file name", 3, "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"t\.csv is empty\. Its first line must name its columns\."),
        (b"path,label\na,b,c\n", r"t\.csv cannot be read: CSV parse error: .*Expected 2 columns"),
        (b"a,b\n1,2\n", r"which column holds the paths\? Name both columns: @.*#PATH,LABEL\. The"
         r" columns are 'a', 'b'\.$"),
        (b"path,path\n1,2\n", r"which column holds the labels"),
        (b"PK\x03\x04\0\0" * 20, r"t\.csv is a zip archive"),
        (b"path,label\n", r"t\.csv: the table has no rows\."),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used(
    make: Make, tmp_path: Path, content: bytes, message: str
) -> None:
    """One line about the file."""
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises((SourceError, UsageError), match=message) as raised:
        score(make(THREE), f"@{tmp_path}/t.csv")
    assert "\n" not in str(raised.value)


def test_a_table_that_is_gone(make: Make, tmp_path: Path) -> None:
    """Or damaged, or without labels."""
    job = make(THREE)
    with pytest.raises(SourceError, match=r"none\.csv cannot be read: No such file or directory"):
        score(job, f"@{tmp_path}/none.csv")
    (tmp_path / "t.parquet").write_bytes(b"PAR1" * 9)
    with pytest.raises(SourceError, match=r"t\.parquet cannot be read: "):
        score(job, f"@{tmp_path}/t.parquet")
    nested = parquet(tmp_path / "t.parquet", path=["a"], label=[{"x": 1}])
    with pytest.raises(SourceError, match=r"a column of struct of x holds no labels or paths"):
        score(job, f"@{nested}")


# ── what values mean ──────────────────────────────────────────────────────────────────────────────

IMAGENET = imagenet_labels()


@pytest.mark.parametrize(
    ("given", "labels", "kind", "expected"),
    [
        (["Great_White  Shark", "hen"], ANIMALS, "labels", [2, 3]),
        (["0", "3", "x"], ANIMALS, "class ids", [0, 3, -1]),
        (["1.0", "03", "4", "-1", "1.5"], ANIMALS, "class ids", [1, 3, -1, -1, -1]),
        (["2", "10"], [str(n) for n in (1, 10, 2)], "labels", [2, 1]),  # labels come first
        (["n01440764", "n15075141"], IMAGENET, "synsets", [0, 999]),
        (["n01440764", "n15075141"], [f"{name}, x" for name in IMAGENET], "synsets", [0, 999]),
        (["n01440764", "n15075141"], [str(n) for n in range(1000)], "synsets", [0, 999]),
        (["n01440764", "tench"], [f"x{n}" for n in range(1000)], "labels", [-1, -1]),
        (["n01440764", "cock", "hen"], IMAGENET, "labels", [-1, 7, 8]),  # most values decide
        (["crane", "cat"], ["crane", "cat", "crane"], "labels", [-1, 1]),  # not one of two
        (["Dog", "dog"], ["dog", "Dog"], "labels", [1, 0]),
    ],
)
def test_values_are_read_in_one_way(
    given: list[str], labels: Sequence[str], kind: str, expected: list[int]
) -> None:
    """In the way that knows most of them, for all of them."""
    found = values.read(given, labels)
    assert (found.kind, found.class_ids.tolist()) == (kind, expected)


def test_the_synsets_are_sorted_as_the_labels_are() -> None:
    synsets = values.imagenet_synsets()
    assert len(set(synsets)) == 1000
    assert list(synsets) == sorted(synsets)
    assert [synsets[n] for n in (134, 517, 638)] == ["n02012849", "n03126707", "n03710637"]


# ── kinds of models and of jobs ───────────────────────────────────────────────────────────────────


def test_models_without_a_choice_are_refused(make: Make, models_dir: Path, tmp_path: Path) -> None:
    """Embeddings are not right or wrong, and of one class every row would be right."""
    settings = made_jobs.settings_of(
        helpers.fill(tmp_path / "x", {"0.jpg": b""}), output=tmp_path / "o", models_dir=models_dir
    )
    headless = made_jobs.frozen_job(settings, bundle.load(models_dir / "headless"))
    with pytest.raises(UsageError, match=r"^headless has no classes, only an embedding"):
        score(headless, "folders")
    with pytest.raises(UsageError, match=r"has one class only"):
        score(make({"cat/0.jpg": (0, 0.9)}, labels=["cat"]), "folders")


@pytest.mark.parametrize("scores", [Scores.SIGMOID, Scores.SOFTMAX])
def test_classes_that_do_not_exclude_each_other(make: Make, scores: Scores) -> None:
    """Only accuracy is given, also if a graph ends in a sigmoid of its own."""
    answers: dict[str, Answer] = {"cat/0.jpg": [(0, 0.9), (1, 0.8)], "dog/0.jpg": [(0, 0.9)]}
    found = score(make(answers, scores=scores, top_k=3), "folders")
    assert found.top1.correct == 1
    assert found.classes == () == found.confusions
    assert set(found.omitted) == {"top5", "classes", "confusion", "calibration"}
    assert found.omitted["classes"] == "the model gives each class a probability of its own"


def test_a_minimum_probability_leaves_images_without_a_class(make: Make) -> None:
    """They count as wrong; what needs the dropped classes is omitted with the reason."""
    answers: dict[str, Answer] = {"cat/0.jpg": (0, 0.9), "cat/1.jpg": (-1, 0.0)}
    found = score(make(answers, min_probability=0.5), "folders")
    assert (found.top1.correct, found.top1.images, found.unclassified) == (1, 2, 1)
    assert found.confusion == ((0, None, 1), (0, 0, 1))
    assert found.omitted == dict.fromkeys(
        ("top5", "calibration"), "--min-probability has dropped classes"
    )


@pytest.mark.parametrize(
    ("labels", "k", "why"),
    [
        (ANIMALS, 4, "the model has only 4 classes"),
        (NAMES, 3, "the job keeps 3 classes per image (--top-k)"),
    ],
)
def test_why_there_is_no_top_5(make: Make, labels: Sequence[str], k: int, why: str) -> None:
    answers: dict[str, Answer] = {f"{labels[0]}/0.jpg": (0, 0.9)}
    found = score(make(answers, labels=labels, top_k=k), "folders")
    assert (found.top5, found.omitted) == (None, {"top5": why})


def test_one_column_for_paths_and_labels_is_one_clear_error(make: Make, tmp_path: Path) -> None:
    job = make({"cat/0.jpg": (0, 0.9)})
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"path": ["cat/0.jpg"]}), table)
    for given in (write(tmp_path / "t.csv", "path\ncat/0.jpg\n"), f"@{table}"):
        with pytest.raises(UsageError, match=r"the model knows none of the labels 'cat/0\.jpg'"):
            score(job, f"{given.partition('#')[0]}#path,path")


def test_a_running_job(make: Make, tmp_path: Path) -> None:
    """Its rows so far are scored; rows of a table whose images come later are not called wrong."""
    answers: dict[str, Answer] = {f"cat/{number}.jpg": (0, 0.9) for number in range(9)}
    job = make(answers, rows=False)
    truth = write(tmp_path / "t.csv", "path,label\n" + "".join(f"{path},cat\n" for path in answers))
    with pytest.raises(OutputError, match=r"is not finished: 0 of 9 images have a row"):
        score(job, truth)
    for shard in job.shards[1:]:
        made_jobs.write_part(job, shard, lambda path: answers[path.decode()])
    found = score(job, truth)
    assert (found.images, found.rows, found.labelled, found.top1.correct) == (9, 5, 5, 5)
    assert [note.replace(str(tmp_path), "") for note in found.notes] == [
        "note: paths of /t.csv that are not in the rows so far: 4, first: cat/0.jpg",
        "note: /out is not finished: 5 of 9 images have a row. Run the same `imagemill run` command"
        " again to finish it, then score again.",
    ]


def test_a_job_that_was_appended_to(make: Make, models_dir: Path, tmp_path: Path) -> None:
    """All generations are one job; a score of before is older than the rows."""
    job = make(THREE)
    scoring.save(job, score(job, "folders"))
    helpers.fill(tmp_path / "images", {"bird/0.jpg": b"", "cat/z.jpg": b""})
    settings = made_jobs.settings_of(
        tmp_path / "images", output=tmp_path / "out", models_dir=models_dir
    )
    settings = replace(settings, append=True)
    job, _ = append.append(settings, job, devices.resolve("null"), Watcher())
    found = score(job, "folders")
    assert (found.images, found.rows) == (5, 3)
    for shard in job.shards[1:]:
        made_jobs.write_part(job, shard, lambda _: (0, 0.9))
    found = score(job, "folders")
    assert (found.rows, found.labelled, found.top1.correct) == (5, 4, 3)
    assert "1 ('bird')" in found.notes[0]
    older = scoring.read(job)
    assert older is not None
    assert older.rows == 3


# ── the command and the function ──────────────────────────────────────────────────────────────────


def test_the_command(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """The result is on stdout and messages are on stderr; `--min-top1` decides the exit code."""
    output = make(THREE, top_k=3).paths.output
    assert cli.main(["score", output, "--truth", "folders", "--min-top1", "0.66"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0] == ("top-1: 66.7% (2 of 3 images; 95 % interval 20.8% to 93.9%)")
    assert "       1  dog → cat" in out.splitlines()
    assert out.splitlines()[-2:] == [
        "truth: folders, read as labels",
        "not given: top5, because the model has only 4 classes",
    ]
    assert cli.main(["score", output, "--truth", "folders", "--min-top1", "0.67", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err == "imagemill: top-1 0.6667 is lower than --min-top1 0.67\n"
    assert json.loads(out)["top1"]["correct"] == 2
    assert json.loads(out) == json.loads((Path(output) / "score.json").read_text())
    with pytest.raises(SystemExit):
        cli.main(["score", output, "--truth", "folders", "--min-top1", "80"])
    assert "80 is not a number from 0 to 1" in capsys.readouterr().err


def test_a_minimum_is_not_met_by_an_unfinished_job(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """A check in CI must not pass because half of the images are right."""
    answers: dict[str, Answer] = {f"cat/{number}.jpg": (0, 0.9) for number in range(9)}
    job = make(answers, rows=False)
    made_jobs.write_part(job, job.shards[0], lambda path: answers[path.decode()])
    command = ["score", job.paths.output, "--truth", "folders"]
    assert cli.main(command) == 0
    assert "is not finished: 4 of 9 images have a row" in capsys.readouterr().err
    assert cli.main([*command, "--min-top1", "0.5"]) == 1
    assert "not met before the job is finished" in capsys.readouterr().err


def test_the_function_returns_what_the_command_prints(make: Make) -> None:
    """A frozen record with a short repr, which `score.json` gives back."""
    job = make(THREE)
    found = imagemill.score(job.paths.output, "folders")
    assert isinstance(found, imagemill.Score)
    assert repr(found) == ("Score(top1=0.6667 [0.2077, 0.9385], images=3, failed=0, model='tiny')")
    assert json.loads(json.dumps(found.to_dict())) == json.loads(job.paths.score.read_text())
    assert scoring.read(job) == found
    other = replace(job, first=replace(job.first, job=replace(job.first.job, answer_id="x")))
    assert scoring.read(other) is None
    job.paths.score.write_text("{}")
    assert scoring.read(job) is None


def test_a_score_that_cannot_be_kept_is_printed_all_the_same(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a note says that the report will not have it."""
    job = make(THREE)
    job.paths.score.mkdir()
    assert cli.main(["score", job.paths.output, "--truth", "folders"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("top-1: 66.7%")
    assert err.startswith("imagemill: note: the score is not in the report: ")


@pytest.mark.process
def test_a_report_that_cannot_be_written_again_is_one_line(make: Make) -> None:
    """No traceback: it is in the log of a job, which a score does not have."""
    job = make(THREE)
    for path in (job.paths.report, job.paths.summary):
        path.write_text("{")
    result = helpers.imagemill_cli("score", job.paths.output, "--truth", "folders")
    assert result.code == 0
    assert "but the report could not be written: " in result.err
    assert "Traceback" not in result.err


@pytest.mark.process
def test_the_report_shows_the_most_frequent_confusions(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report that exists is written again, with thumbnails of the mistakes. It says so if the
    score is older than the rows. Nothing in a label becomes markup.
    """
    labels = ("<b>cat", "dog")
    answers: dict[str, Answer] = {
        "0/a.jpg": (1, 0.9), "0/b.jpg": (1, 0.8), "1/c.jpg": (1, 0.7), "1/d.jpg": Status.CORRUPT,
        "1/e.jpg": (0, 0.9),
    }  # fmt: skip
    helpers.fill(tmp_path / "images", {path: sample_images.jpeg(40, 30) for path in answers})
    settings = made_jobs.settings_of(
        tmp_path / "images", output=tmp_path / "out", models_dir=models_dir
    )
    model = made_jobs.tiny(models_dir)
    model = replace(model, card=replace(model.card, labels=labels))
    job = made_jobs.frozen_job(settings, model)
    made_jobs.write_part(job, job.shards[0], lambda path: answers[path.decode()])
    command = ["score", job.paths.output, "--truth", "folders"]
    assert cli.main([*command]) == 0
    assert not job.paths.report.exists()
    job.paths.report.write_text("an older page")
    assert cli.main([*command, "--no-report"]) == 0
    assert job.paths.report.read_text() == "an older page"
    capsys.readouterr()
    assert cli.main(command) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "imagemill: writing the report"
    html = job.paths.report.read_text()
    section = html.partition('id="score"')[2].partition("</section>")[0]
    assert section.count("data:image/webp;base64,") == 2
    assert "<bdi>&lt;b&gt;cat</bdi> taken for <bdi>dog</bdi>: 2 images" in section
    assert section.index("0/a.jpg") < section.index("0/b.jpg")
    assert "<dt>Top-1</dt><dd>25.0 %" in section
    assert "33.3 % of those that are readable" in section
    assert "Not given: top5, because the model has only 2 classes." in section
    assert "Older than the rows" not in section
    made_jobs.write_part(job, job.shards[1], lambda path: answers[path.decode()])
    assert cli.main(["report", job.paths.output]) == 0
    html = job.paths.report.read_text()
    assert "the job was scored when 4 of these 5 images had a row" in html


def test_the_score_of_a_job_in_an_object_store(s3: Bucket, make: Make, tmp_path: Path) -> None:
    """Parts, truth and `score.json` are objects."""
    bucket = s3
    helpers.fill(tmp_path / "images", dict.fromkeys(THREE, b""))
    job = make(THREE, tmp_path / "images", output=f"{bucket.url}/job")
    bucket.fill({"t.csv": b"path,label\ndog/c.jpg,dog\ncat/a.jpg,cat\ndog/b.jpg,dog\n"})
    found = imagemill.score(job.paths.output, f"@{bucket.url}/t.csv")
    assert (found.top1.correct, found.labelled) == (2, 3)
    assert json.loads(bucket.get("job/score.json"))["labelled"] == 3


@pytest.mark.process
def test_photographs_by_their_synsets(photographs_run: Finished, photographs: Path) -> None:
    """The photographs of ImageNet carry the synset in their names; a table of class ids gives the
    same figures, and neither differs from what a reader of rows counts.
    """
    by_synset = imagemill.score(photographs_run.output, r"regex:/(n\d{8})_", report=False)
    assert (by_synset.read_as, by_synset.labelled) == ("synsets", 200)
    assert by_synset.images - by_synset.labelled == 128
    with (photographs / "labels.csv").open(newline="") as lines:
        true = {row["file"]: int(row["class_id"]) for row in csv.DictReader(lines)}
    right = sum(
        row["class_id"] == true.get(os.path.basename(row["path"]), -1)
        for row in helpers.rows(photographs_run.output)
    )
    assert by_synset.top1.correct == right
    assert 0.85 < right / 200 < 0.95
    table = f"@{photographs}/labels.csv#file,class_id"
    by_table = imagemill.score(photographs_run.output, table, report=False)
    assert by_table.matched_by == "file name"
    assert by_table.confusion == by_synset.confusion
    assert math.isclose(sum(item.support for item in by_table.classes), 200 - by_table.failed)


def test_rows_without_a_path_are_no_image(make: Make, tmp_path: Path) -> None:
    """Two of them with different labels do not contradict each other."""
    text = "path,label\nx/a.jpg,cat\n,dog\n,hen\nx/b.jpg,dog\n"
    source = write(tmp_path / "list.csv", text)
    found = score(
        make({"x/a.jpg": (0, 0.9), "x/b.jpg": (1, 0.9), "": Status.MISSING}, source), "column:label"
    )
    assert (found.top1.correct, found.labelled) == (2, 2)
    assert "classes" not in found.omitted
