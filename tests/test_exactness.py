"""A device whose answers depend on an image's place, its neighbours or chance is found before the
first image. The null device stands in for a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

import helpers
import imagemill
from batches import make_spec
from imagemill.errors import InexactError
from imagemill.pipeline import backends
from imagemill.pipeline.backends import null
from imagemill.pipeline.session_checks import check_exactness
from imagemill.records import Batch, Bundle, Outputs, Saved

Change = Callable[[np.ndarray, int], None]
"""Changes the outputs of a batch, given which batch it is."""


def answering(
    change: Change | None = None, embed: bool = False
) -> Callable[[Iterable[Batch]], Iterator[tuple[Batch, Outputs]]]:
    """A stream whose answers depend on each image alone, before they are changed."""

    def stream(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Outputs]]:
        for number, batch in enumerate(batches):
            values = batch.pixels.reshape(len(batch.pixels), -1)[:, :6].astype(np.float32)
            if change:
                change(values, number)
            yield batch, Outputs(values[:, :3], values[:, 3:] if embed else None)

    return stream


def by_place(values: np.ndarray, _number: int) -> None:
    values[-1, 1] = np.nextafter(values[-1, 1], np.float32(1000))


def by_neighbours(values: np.ndarray, _number: int) -> None:
    values[0] += values[1:].sum() / 1024


def by_chance(values: np.ndarray, number: int) -> None:
    values[2, 0] += number / 1024


def only_the_embedding(values: np.ndarray, _number: int) -> None:
    values[-1, 5] = np.nextafter(values[-1, 5], np.float32(1000))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_answers_that_depend_on_their_image_alone_are_exact(tiny: Bundle, size: int) -> None:
    """Negative zeros and NaN are numbers like any other."""

    def odd(values: np.ndarray, _number: int) -> None:
        values[:, 0] = np.nan
        values[:, 1] = -0.0

    check_exactness(answering(), make_spec(tiny, batch_size=size), "cuda#0")
    check_exactness(answering(odd), make_spec(tiny, batch_size=size), "cuda#0")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (by_place, "position in the batch"),
        (by_neighbours, "neighbours"),
        (by_chance, "repetition"),
        (only_the_embedding, "position in the batch"),
    ],
)
def test_answers_that_depend_on_something_else_are_found(
    tiny: Bundle, change: Change, what: str
) -> None:
    """A single bit is enough; the message says on what they depend, and what to do."""
    spec = make_spec(tiny, batch_size=5, save=(Saved.EMBEDDING,))
    with pytest.raises(
        InexactError, match=rf"cuda#0: answers depend on .*{what}.*Add --allow-inexact"
    ):
        check_exactness(answering(change, embed=True), spec, "cuda#0")


def test_a_difference_that_is_allowed_is_logged(
    tiny: Bundle, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the log of a job shows it."""
    helpers.capture_log(check_exactness.__module__, caplog, monkeypatch)
    check_exactness(answering(by_place), make_spec(tiny), "cuda#0", allow_inexact=True)
    assert "cuda#0: answers depend on position in the batch" in caplog.text


INEXACT = b"""
from imagemill.pipeline import backends
from imagemill.pipeline.backends import null

backends.INDEPENDENT = ()
exact = null.NullSession.stream

def stream(self, batches):
    for batch, outputs in exact(self, batches):
        outputs.logits[-1:] += 0.25
        yield batch, outputs

null.NullSession.stream = stream
"""


def test_a_job_on_such_a_device_stops_before_its_first_row(
    imagemill: Callable[..., helpers.Result],
    jpegs: Callable[..., Path],
    models_dir: Path,
    tmp_path: Path,
) -> None:
    """Unless that is allowed."""
    helpers.fill(tmp_path / "inexact", {"sitecustomize.py": INEXACT})
    paths = os.pathsep.join((str(tmp_path / "inexact"), str(helpers.SOURCE_ROOT)))
    env = helpers.environment(PYTHONPATH=paths, IMAGEMILL_MODELS=str(models_dir))
    words = ("run", jpegs(6), "--output", tmp_path / "out", "--model", "tiny", "--devices", "null")
    ended = imagemill(*words, env=env)
    assert ended.code == 1
    assert "null#0: answers depend on position in the batch" in ended.err
    assert ended.err.strip().endswith("or use another --precision, --batch-size or --devices.")
    assert not list((tmp_path / "out" / "predictions").glob("*"))
    ended = imagemill(*words, "--allow-inexact", env=env)
    assert ended.code == 0, ended.err
    assert len(helpers.rows(tmp_path / "out")) == 6


def test_load_checks_such_a_device_too(
    jpegs: Callable[..., Path], models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises the error that a job ends with; `allow_inexact` accepts the device."""
    exact = null.NullSession.stream

    def stream(self: null.NullSession, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Outputs]]:
        for batch, outputs in exact(self, batches):
            outputs.logits[-1:] += 0.25
            yield batch, outputs

    monkeypatch.setattr(backends, "INDEPENDENT", ())
    monkeypatch.setattr(null.NullSession, "stream", stream)
    with pytest.raises(InexactError, match="null#0: answers depend on position in the batch"):
        imagemill.load("tiny", "null", models_dir=models_dir)
    with imagemill.load("tiny", "null", models_dir=models_dir, allow_inexact=True) as classifier:
        assert len(classifier.predict(list(jpegs(2).iterdir()))) == 2
