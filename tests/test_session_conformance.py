"""What every session promises, whatever computes: one line in `SESSIONS` puts a further one to the
test.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx.reference
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

import helpers
import popart_standin
from batches import batches, make_spec
from faults.harness import children
from imagemill.models import bundle
from imagemill.pipeline import top_k
from imagemill.pipeline.backends import open_session
from imagemill.pipeline.backends.base import Session
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, Bundle, DeviceSpec, Precision, Saved
from tiny import CLASSES, SIZE

pytestmark = pytest.mark.process


def nothing(_monkeypatch: pytest.MonkeyPatch, _folder: Path) -> None:
    """This session needs no preparation."""


@dataclass(frozen=True)
class Candidate:
    """A session to be put to the test."""

    backend: str
    kind: str = "cpu"
    precision: Precision = Precision.FP32
    tolerance: float | None = 1e-4
    """How far a logit or an embedding's number may lie from fp32's; they are of the size of 1 to
    10. None: it computes no model.
    """
    is_queue: bool = True
    """Whether it takes several batches before it gives the first back."""
    steps: int = 1
    """How many times what was asked for it holds: one at work, others being filled."""
    prepare: Callable[[pytest.MonkeyPatch, Path], None] = nothing
    """Called before it is opened, with a folder of its own."""
    marks: tuple[pytest.MarkDecorator, ...] = ()
    """Of its tests: those that need a device are deselected unless they are asked for."""


SESSIONS = {
    "openvino": Candidate("openvino"),
    "onnxruntime": Candidate("onnxruntime"),
    "popart": Candidate(
        "popart", "ipu", Precision.FP16, tolerance=0.02, steps=2, prepare=popart_standin.prepare
    ),
    "popart-fp32": Candidate("popart", "ipu", steps=2, prepare=popart_standin.prepare),
    "torch": Candidate("torch"),
    "torch-bf16": Candidate("torch", precision=Precision.BF16, tolerance=0.1),
    "torch-cuda-fp32": Candidate("torch", "cuda", marks=(pytest.mark.gpu,)),
    "torch-cuda-fp16": Candidate(
        "torch", "cuda", Precision.FP16, tolerance=0.02, marks=(pytest.mark.gpu,)
    ),
    "torch-cuda-bf16": Candidate(
        "torch", "cuda", Precision.BF16, tolerance=0.1, marks=(pytest.mark.gpu,)
    ),
    "null": Candidate("null", "null", tolerance=None, is_queue=False),
}


class Opener:
    """Opens sessions of one candidate; whatever is open at the end of the test is closed."""

    def __init__(self, candidate: Candidate, tiny: Bundle) -> None:
        self.candidate = candidate
        self._tiny = tiny
        self._open: list[Session] = []

    def __call__(self, model: Bundle | None = None, **changes: Any) -> Session:
        job = make_spec(model or self._tiny, **({"precision": self.candidate.precision} | changes))
        device = DeviceSpec(
            f"{self.candidate.kind}#0", self.candidate.kind, self.candidate.backend, (0,)
        )
        self._open.append(open_session(job, device, Stopwatch()))
        return self._open[-1]

    def close(self) -> None:
        for session in self._open:
            session.close()


@pytest.fixture(params=[pytest.param(name, marks=one.marks) for name, one in SESSIONS.items()])
def opener(
    request: pytest.FixtureRequest, tiny: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Opener]:
    candidate = SESSIONS[request.param]
    if candidate.backend == "torch":
        pytest.importorskip("torch", reason="needs torch")
    candidate.prepare(monkeypatch, tmp_path)
    made = Opener(candidate, tiny)
    yield made
    made.close()


def noting(items: Iterable[Batch], taken: list[Batch]) -> Iterator[Batch]:
    for item in items:
        taken.append(item)
        yield item


def fp32(
    model: Bundle, pixels: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits and embedding by ONNX's own NumPy implementation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        evaluator = onnx.reference.ReferenceEvaluator(str(model.dir / "model.onnx"))
        logits, embedding = evaluator.run(["logits", "embedding"], {"pixels": pixels})
    return logits, embedding


def test_batches_come_back_in_order_each_with_its_own_outputs(opener: Opener) -> None:
    """However many are in flight: as many as went in, in order, and what each gives alone, bit for
    bit.
    """
    session = opener()
    given = batches(9)
    found = list(session.stream(iter(given)))
    assert [batch is expected for (batch, _), expected in zip(found, given, strict=True)] == [
        True
    ] * 9
    assert len({outputs.logits.tobytes() for _, outputs in found}) == 9
    for batch, outputs in found:
        ((_, alone),) = session.stream([batch])
        assert outputs.logits.dtype == np.float32
        assert outputs.logits.tobytes() == alone.logits.tobytes()


def test_padding_is_dropped_and_changes_nothing(opener: Opener) -> None:
    """Places beyond `filled` are not in the outputs, whatever they contain, and change no bit of
    the others.
    """
    session = opener(save=(Saved.EMBEDDING,))
    full, part = batches(1), batches(1, filled=2)
    part[0].pixels[2] = 255
    ((_, whole),), ((_, cut),) = session.stream(full), session.stream(part)
    assert cut.logits.shape == (2, CLASSES)
    assert cut.logits.tobytes() == whole.logits[:2].tobytes()
    assert cut.embedding is not None
    assert whole.embedding is not None
    assert cut.embedding.tobytes() == whole.embedding[:2].tobytes()


def test_an_empty_batch_is_passed_on_uncomputed(opener: Opener) -> None:
    """Where no image of a batch could be decoded there are zero rows, as wide as the others, and
    the order is kept.
    """
    session = opener(save=(Saved.EMBEDDING,))
    given = batches(3)
    given[1] = replace(given[1], filled=0, rows=())
    found = list(session.stream(given))
    assert [outputs.logits.shape for _, outputs in found] == [
        (3, CLASSES),
        (0, CLASSES),
        (3, CLASSES),
    ]
    first, empty = found[0][1].embedding, found[1][1].embedding
    assert first is not None
    assert empty is not None
    assert empty.shape == (0, first.shape[1])
    ((_, alone),) = session.stream([given[1]])
    assert alone.logits.shape == (0, CLASSES)


def test_several_batches_are_in_flight_and_no_more_than_asked_for(opener: Opener) -> None:
    """The stream takes more than one batch before it gives the first back, and reads ahead by one
    at most of what it may hold.
    """
    taken: list[Batch] = []
    stream = opener(batches_per_step=3).stream(noting(batches(10), taken))
    next(stream)
    assert (
        (2 <= len(taken) <= 3 * opener.candidate.steps + 1)
        if opener.candidate.is_queue
        else len(taken) == 1
    )
    assert len(list(stream)) == 9


def test_a_stream_can_follow_a_stream(opener: Opener) -> None:
    """A worker streams again when further leases come; nothing of the first stream is left over,
    not even of a broken one.
    """
    session = opener()
    assert [len(list(session.stream(batches(count)))) for count in (4, 0, 2)] == [4, 0, 2]

    def broken() -> Iterator[Batch]:
        yield from batches(2)
        raise RuntimeError("the feed broke")

    with pytest.raises(RuntimeError, match="the feed broke"):
        list(session.stream(broken()))
    given = batches(2, seed=7)
    assert [
        batch is expected for (batch, _), expected in zip(session.stream(given), given, strict=True)
    ] == [True, True]


def test_answers_are_those_of_fp32_within_the_tolerance(opener: Opener) -> None:
    """Logits and embedding lie as near to ONNX's own NumPy implementation as the candidate
    states.
    """
    if opener.candidate.tolerance is None:
        return
    session = opener(save=(Saved.LOGITS, Saved.EMBEDDING))
    model = bundle.load(Path(opener._tiny.dir))
    for batch, outputs in session.stream(batches(5)):
        logits, embedding = fp32(model, batch.pixels)
        assert np.abs(outputs.logits - logits).max() < opener.candidate.tolerance
        assert outputs.embedding is not None
        assert outputs.embedding.dtype == np.float32
        assert np.abs(outputs.embedding - embedding).max() < opener.candidate.tolerance


def test_a_model_that_is_wider_than_high_is_computed(opener: Opener, models_dir: Path) -> None:
    """Height and width are not mixed up: the answers are ONNX's own."""
    wide = bundle.load(models_dir / "wide")
    session = opener(wide, save=(Saved.EMBEDDING,))
    for batch, outputs in session.stream(batches(3, width=2 * SIZE)):
        assert outputs.logits.shape == (3, CLASSES)
        assert outputs.embedding is not None
        if opener.candidate.tolerance is not None:
            logits, embedding = fp32(wide, batch.pixels)
            assert np.abs(outputs.logits - logits).max() < opener.candidate.tolerance
            assert np.abs(outputs.embedding - embedding).max() < opener.candidate.tolerance


def test_a_network_without_a_head_gives_its_embedding(opener: Opener, models_dir: Path) -> None:
    """Asked for or not; the logits have no classes. Images that are not filled have no row."""
    headless = bundle.load(models_dir / "headless")
    given = batches(3, filled=2)
    given[1] = replace(given[1], filled=0, rows=())
    found = list(opener(headless).stream(given))
    assert [outputs.logits.shape for _, outputs in found] == [(3, 0), (0, 0), (2, 0)]
    for batch, outputs in found:
        assert outputs.embedding is not None
        assert outputs.embedding.dtype == np.float32
        if opener.candidate.tolerance is not None:
            _, embedding = fp32(opener._tiny, batch.pixels)
            difference = outputs.embedding - embedding[: batch.filled]
            assert np.abs(difference).max(initial=0) < opener.candidate.tolerance


def test_the_embedding_comes_only_where_it_is_saved(opener: Opener) -> None:
    """Nobody pays for a column that nobody wants."""
    ((_, outputs),) = opener().stream(batches(1))
    assert outputs.embedding is None


def test_outputs_are_the_callers_own(opener: Opener) -> None:
    """Memory of the device that is used again for the next batch does not show through."""
    stream = opener(save=(Saved.EMBEDDING,), batches_per_step=2).stream(batches(12))
    _, first = next(stream)
    assert first.embedding is not None
    before = (first.logits.tobytes(), first.embedding.tobytes())
    assert len(list(stream)) == 11
    assert (first.logits.tobytes(), first.embedding.tobytes()) == before


def test_a_nan_is_handed_on(opener: Opener, models_dir: Path) -> None:
    """A session hands NaN on as it is, so that the image's row says so; no other image's does."""
    if opener.candidate.tolerance is None:
        return
    spoilt = bundle.load(models_dir / "spoilt")
    good, bad = batches(2)
    bad.pixels[1] = 255
    (first, outputs), (second, nan) = opener(spoilt).stream([good, bad])
    rows = [
        top_k.top_k(*answer, make_spec(spoilt), 5)[0].rows
        for answer in ((first, outputs), (second, nan))
    ]
    statuses = [[row.status.value for row in some if row.status != "empty"] for some in rows]
    assert set(statuses[0]) == {"ok"}
    assert [status == "invalid_output" for status in statuses[1]] == [
        number == 1 for number in range(len(statuses[1]))
    ]


def test_closing_leaves_nothing_behind(opener: Opener) -> None:
    """Neither threads nor processes, though batches were in flight; closing twice does no harm, and
    the device can be opened again.
    """
    threads, processes = set(threading.enumerate()), set(children(os.getpid()))
    session = opener()
    stream = session.stream(batches(8))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    session.close()
    session.close()
    helpers.until(lambda: set(threading.enumerate()) <= threads)
    helpers.until(lambda: set(children(os.getpid())) <= processes)
    assert len(list(opener().stream(batches(1)))) == 1


def test_it_says_who_answered(opener: Opener) -> None:
    """Each part's metadata names the versions."""
    session = opener()
    assert all(isinstance(version, str) and version for version in session.versions.values())
    assert bool(session.versions) == (opener.candidate.tolerance is not None)
