"""Sessions: batches in, outputs out, in order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from helpers import environment
from imagemill import errors
from imagemill.records import Batch, Bundle, DeviceSpec, Job, Limits, Precision, Saved
from imagemill.sessions import open_session
from imagemill.sessions.base import Session
from imagemill.sessions.openvino import properties
from imagemill.stopwatch import Stopwatch
from tiny import CLASSES, SIZE


def make(tiny: Bundle, *, backend: str = "openvino", cores: int = 1, **changes: Any) -> tuple[Session, Job]:
    values: dict[str, Any] = {"output": "/nowhere", "sources": (), "model_file": str(tiny.dir / "model.onnx"), "card": tiny.card}
    numbers = {"batch_size": 3, "batches_per_step": 0, "num_workers": 0, "top_k": 5, "save": (), "limits": Limits()}
    job = Job(**values | numbers | {"precision": Precision.FP32, "variant": "model", "plan_id": "", "answer_id": ""} | changes)
    return open_session(job, DeviceSpec("d#0", "cpu", backend, tuple(range(cores))), Stopwatch()), job


def batches(count: int, size: int = 3, last: int | None = None, seed: int = 0) -> list[Batch]:
    """Batches of random pixels, without rows: sessions do not look at them."""
    rng = np.random.default_rng(seed)
    pixels = [rng.integers(0, 256, (size, SIZE, SIZE, 3), np.uint8) for _ in range(count)]
    return [Batch(p, size if last is None or n < count - 1 else last, ()) for n, p in enumerate(pixels)]


@pytest.fixture(params=["openvino", "null"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_batches_come_back_in_order_each_with_its_own_outputs(tiny: Bundle, backend: str) -> None:
    """However many are in flight: as many as went in, in order, and what each gives alone, bit for bit."""
    session, _ = make(tiny, backend=backend)
    given = batches(9)
    found = list(session.stream(iter(given)))
    assert [batch is expected for (batch, _), expected in zip(found, given, strict=True)] == [True] * 9
    for batch, outputs in found:
        ((_, alone),) = session.stream([batch])
        assert outputs.logits.dtype == np.float32
        assert outputs.logits.tobytes() == alone.logits.tobytes()
    session.close()


def test_padding_is_dropped(tiny: Bundle, backend: str) -> None:
    """Rows beyond `filled` are not in the outputs and change none of the others."""
    session, _ = make(tiny, backend=backend)
    full, part = batches(1), batches(1, last=2)
    part[0].pixels[2] = 255
    ((_, whole),), ((_, cut),) = session.stream(full), session.stream(part)
    assert cut.logits.shape == (2, CLASSES)
    assert cut.logits.tobytes() == whole.logits[:2].tobytes()


def test_an_empty_batch_is_passed_on_uncomputed(tiny: Bundle, backend: str) -> None:
    """Where no picture of a batch could be decoded there are zero rows, and the order is kept."""
    session, _ = make(tiny, backend=backend, save=(Saved.EMBEDDING,))
    given = batches(3)
    given[1] = replace(given[1], filled=0)
    found = list(session.stream(given))
    assert [outputs.logits.shape for _, outputs in found] == [(3, CLASSES), (0, CLASSES), (3, CLASSES)]
    assert found[1][1].embedding is not None
    assert found[1][1].embedding.shape[0] == 0


def test_several_batches_are_in_flight(tiny: Bundle) -> None:
    """The stream takes more than one batch before it gives the first back, and never more than it was told to."""
    taken = []

    def noting(items: Iterable[Batch]) -> Iterator[Batch]:
        for item in items:
            taken.append(item)
            yield item

    session, _ = make(tiny, batches_per_step=3)
    stream = session.stream(noting(batches(10)))
    next(stream)
    assert len(taken) == 4  # three at work, the fourth waits for the first to be finished
    assert len(list(stream)) == 9


def test_a_stream_can_follow_a_stream(tiny: Bundle, backend: str) -> None:
    """A worker streams again when further leases come; nothing of the first stream is left over."""
    session, _ = make(tiny, backend=backend)
    assert [len(list(session.stream(batches(count)))) for count in (4, 0, 2)] == [4, 0, 2]


def test_openvino_agrees_with_onnx_runtime(tiny: Bundle) -> None:
    """Logits and embedding are those that another runtime computes from the same file."""
    session, _ = make(tiny, save=(Saved.EMBEDDING,))
    ((batch, outputs),) = session.stream(batches(1))
    reference = onnxruntime.InferenceSession(str(tiny.dir / "model.onnx"), providers=["CPUExecutionProvider"])
    logits, embedding = reference.run(["logits", "embedding"], {"pixels": batch.pixels})
    assert np.abs(outputs.logits - logits).max() < 1e-4
    assert outputs.embedding is not None
    assert np.abs(outputs.embedding - embedding).max() < 1e-4


def test_the_embedding_comes_only_where_it_is_saved(tiny: Bundle, backend: str) -> None:
    """Nobody pays for a column that nobody wants."""
    session, _ = make(tiny, backend=backend)
    ((_, outputs),) = session.stream(batches(1))
    assert outputs.embedding is None


def test_a_batch_of_another_shape_is_an_error(tiny: Bundle) -> None:
    """Shapes never recompile silently."""
    session, _ = make(tiny)
    with pytest.raises(errors.ModelError, match=r"batch of uint8 \(4, 32, 32, 3\) for a session compiled for uint8 \(3, 32, 32, 3\)"):
        list(session.stream(batches(1, size=4)))


def test_a_model_that_cannot_be_compiled_is_one_clear_error(tiny: Bundle, tmp_path: Path) -> None:
    """It names the file."""
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(errors.ModelError, match=r"model\.onnx cannot be compiled: \S"):
        make(tiny, model_file=str(tmp_path / "model.onnx"))


def test_an_unknown_backend_names_the_known_ones(tiny: Bundle) -> None:
    """A backend is one file and one line in a table; the message lists the table."""
    with pytest.raises(errors.DeviceError, match=r"backend tpu is not known\. Known: openvino, null"):
        make(tiny, backend="tpu")


def test_a_models_folder_that_cannot_be_written_costs_only_the_cache(tiny: Bundle, tmp_path: Path) -> None:
    """Compiled models are kept where that is possible; where it is not, the session works all the same."""
    (tmp_path / "file").touch()
    session, _ = make(tiny, cache_dir=str(tmp_path / "file" / "compiled"))
    assert len(list(session.stream(batches(2)))) == 2


@pytest.mark.parametrize(("precision", "hint"), [(Precision.FP32, "f32"), (Precision.BF16, "bf16")])
def test_precision_is_asked_for_by_name(precision: Precision, hint: str) -> None:
    """The plug-in's own choice is bf16 on processors that have it: accuracy would be traded silently."""
    assert properties(precision, 4)["INFERENCE_PRECISION_HINT"] == hint
    assert properties(precision, 4)["INFERENCE_NUM_THREADS"] == 4


def test_openvino_is_imported_without_its_telemetry() -> None:
    """`import openvino` sends an event of its own; the module that does so is kept out."""
    program = "import sys; from imagemill.sessions.openvino import load_openvino; load_openvino(); print(sys.modules['openvino_telemetry'])"
    found = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True, env=environment())
    assert found.stdout == "None\n"


def test_null_answers_depend_on_every_pixel(tiny: Bundle) -> None:
    """The null device stands in for a model in tests: another pixel, another answer."""
    session, _ = make(tiny, backend="null", batch_size=1)
    (batch,) = batches(1, size=1)
    ((_, before),) = session.stream([batch])
    batch.pixels[0, 17, 5, 1] ^= 1
    ((_, after),) = session.stream([batch])
    assert before.logits.tobytes() != after.logits.tobytes()
