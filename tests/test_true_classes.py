"""True classes of images that belong to no job."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagemill.errors import UsageError
from imagemill.scoring.images import parse, true_classes

IMAGES = [("/data", "cat/1.jpg"), ("/data", "dog/2.jpg"), ("/data", "none/3.jpg")]
LABELS = ("cat", "dog")


@pytest.mark.parametrize("truth", ["folders", "regex:^(.*)/"])
def test_labels_are_in_the_path(truth: str) -> None:
    assert true_classes(parse(truth), IMAGES, LABELS).tolist() == [0, 1, -1]


@pytest.mark.parametrize("spelling", ["{}", "/data/{}", "{name}"])
def test_labels_are_in_a_table(tmp_path: Path, spelling: str) -> None:
    """By path, by full path or by the file's name, in any order."""
    paths = [spelling.format(path, name=path.partition("/")[2]) for _, path in IMAGES]
    table = tmp_path / "truth.csv"
    table.write_text(f"path,label\n{paths[1]},dog\n{paths[0]},cat\nother.jpg,cat\n")
    assert true_classes(parse(f"@{table}"), IMAGES, LABELS).tolist() == [0, 1, -1]


def test_labels_that_the_model_does_not_know_are_one_error() -> None:
    with pytest.raises(UsageError) as caught:
        true_classes(parse("folders"), IMAGES, ("a", "b"))
    assert str(caught.value) == (
        "--truth folders: no image has a label that the model knows, first: 'cat'. Its labels are"
        " 'a', 'b', …"
    )


@pytest.mark.parametrize("truth", ["cls", "column:label"])
def test_a_truth_of_a_jobs_sources_is_refused(truth: str) -> None:
    with pytest.raises(UsageError, match="`quantize` reads folders"):
        parse(truth)
