"""ONNX Runtime: what is its own, beside what all sessions promise."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

import helpers
from batches import batches, make_spec
from imagemill import errors
from imagemill.pipeline.backends import BACKENDS, devices, open_session
from imagemill.pipeline.backends.onnxruntime import PROVIDERS, OnnxRuntimeSession
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, Bundle, DeviceSpec, Saved
from tiny import CLASSES, SIZE


def make(
    tiny: Bundle, cores: int = 1, kind: str = "cpu", backend: str = "onnxruntime", **changes: Any
) -> OnnxRuntimeSession:
    session = open_session(
        make_spec(tiny, **changes),
        DeviceSpec(f"{kind}#0", kind, backend, tuple(range(cores))),
        Stopwatch(),
    )
    assert isinstance(session, OnnxRuntimeSession)
    return session


def test_every_provider_is_one_that_onnx_runtime_knows() -> None:
    """Names are spelt as the library spells them, and each kind that the registry lists has its
    row.
    """
    assert {provider.name for provider in PROVIDERS.values()} <= set(
        onnxruntime.get_all_providers()
    )
    assert set(BACKENDS["onnxruntime"].kinds) == set(PROVIDERS)


def test_a_provider_that_is_not_active_is_an_error_never_the_cpu(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime itself only warns and goes on with the CPU; a wheel that has CUDA on a machine
    without its libraries does so.
    """
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setattr("imagemill.pipeline.backends.onnxruntime._unloadable", lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in a worker
        with pytest.raises(
            errors.DeviceError,
            match=(
                r"cuda#0: CUDAExecutionProvider was asked for, .* would use CPUExecutionProvider"
                r" instead"
            ),
        ):
            make(tiny, kind="cuda")


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_gpu_without_memory_is_an_error_of_its_own_kind(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """At the start and in a run; on the CPU it stays an error of the model."""
    session = make(tiny)
    session._device = replace(session._device, name=f"{kind}#0", kind=kind)
    monkeypatch.setattr(
        "imagemill.pipeline.backends.onnxruntime.free_memory", lambda _number: 300_000_000
    )

    class Full:
        def run(self, *_: Any) -> None:
            raise RuntimeError(
                "bfc_arena.cc:376 AllocateRawInternal Failed to allocate memory for requested"
                " buffer of size 268435456"
            )

    session._session = Full()
    expected: type[Exception] = errors.ModelError
    if kind == "cuda":
        expected = errors.DeviceMemoryError
    with pytest.raises(expected, match="batch") as caught:
        list(session.stream(batches(1)))
    session.close()
    if kind == "cuda":
        assert str(caught.value) == "cuda#0 has 0.3 GB free, and batches of 3 need more."


@pytest.mark.parametrize(
    ("kind", "expected"), [("cuda", errors.DeviceLostError), ("cpu", errors.ModelError)]
)
def test_a_gpu_that_fails_is_lost(tiny: Bundle, kind: str, expected: type[Exception]) -> None:
    """So that its worker is started again."""
    session = make(tiny)
    session._device = replace(session._device, name=f"{kind}#0", kind=kind)

    class Lost:
        def run(self, *_: Any) -> None:
            raise RuntimeError(
                "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; line=63"
            )

    session._session = Lost()
    with pytest.raises(expected, match="CUDA failure 700: an illegal memory access") as caught:
        list(session.stream(batches(1)))
    assert type(caught.value) is expected
    session.close()


def test_a_provider_whose_libraries_are_missing_names_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The provider's own library is loaded before anything is listed, so that the system's message
    can be passed on.
    """
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "capi").mkdir()
    missing = OnnxRuntimeSession.found("cuda").missing
    assert missing is not None
    assert "CUDAExecutionProvider cannot be loaded: " in missing
    assert "libonnxruntime_providers_shared.so: cannot open shared object file" in missing
    assert missing.endswith("pip install 'imagemill[cuda]'.")


def test_a_missing_onnx_runtime_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named, before anything is listed."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        errors.DeviceError,
        match=re.escape("ONNX Runtime is not installed: pip install 'imagemill[onnxruntime]'."),
    ):
        devices.resolve("cpu@onnxruntime")


@pytest.mark.parametrize(
    ("cores", "in_flight", "at_work", "threads"),
    [(1, 0, 1, 1), (2, 0, 2, 1), (4, 1, 1, 4), (4, 2, 2, 2), (2, 5, 2, 1)],
)
def test_the_cores_of_the_device_are_all_used_and_no_more(
    tiny: Bundle, cores: int, in_flight: int, at_work: int, threads: int
) -> None:
    """A batch a core, or all cores for the one batch that may be in flight."""
    session = make(tiny, cores=cores, batches_per_step=in_flight)
    assert session._pool._max_workers == at_work
    assert session._session.get_session_options().intra_op_num_threads == threads
    assert at_work * threads <= cores
    taken: list[Batch] = []

    def noting() -> Any:
        for batch in batches(30):
            taken.append(batch)
            yield batch

    next(stream := session.stream(noting()))
    assert len(taken) == (in_flight or 2 * cores) + 1
    assert len(list(stream)) == 29
    session.close()


def test_answers_depend_neither_on_the_batch_size_nor_on_threads(tiny: Bundle) -> None:
    """Promise 2, bit for bit, as with OpenVINO."""
    pixels = np.random.default_rng(5).integers(0, 256, (12, SIZE, SIZE, 3), np.uint8)
    found = set()
    for size, cores, in_flight in [(12, 1, 1), (1, 1, 2), (3, 4, 1), (4, 2, 2), (6, 2, 1)]:
        session = make(
            tiny, cores=cores, batch_size=size, batches_per_step=in_flight, save=(Saved.EMBEDDING,)
        )
        given = [
            Batch(np.ascontiguousarray(pixels[start : start + size]), size, ())
            for start in range(0, 12, size)
        ]
        outputs = [answer for _, answer in session.stream(given)]
        logits = np.concatenate([answer.logits for answer in outputs])
        embedding = np.concatenate(
            [answer.embedding for answer in outputs if answer.embedding is not None]
        )
        assert logits.shape == (12, CLASSES)
        found.add((logits.tobytes(), embedding.tobytes()))
        session.close()
    assert len(found) == 1


def test_a_model_that_cannot_be_compiled_is_one_clear_error(tiny: Bundle, tmp_path: Path) -> None:
    """It names file and device."""
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(errors.ModelError, match=r"model\.onnx cannot be compiled for cpu#0: \S"):
        make(tiny, model_file=str(tmp_path / "model.onnx"))


def test_a_batch_that_cannot_be_computed_is_one_clear_error(tiny: Bundle) -> None:
    """What is wrong shows at the start, where the first batch is computed, not in the middle of a
    job.
    """
    with pytest.raises(
        errors.ModelError, match=r"onnxruntime cannot compute a batch of 3: .*INVALID_ARGUMENT"
    ):
        make(tiny, card=replace(tiny.card, recipe=replace(tiny.card.recipe, height=SIZE + 8)))


def test_cuda_is_set_to_be_exact_and_repeatable(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own defaults compute fp32 in TF32 and choose algorithms by a stopwatch at each start."""
    device = DeviceSpec("cuda#3", "cuda", "onnxruntime", (0,), 3)
    session = make(tiny)
    assert session._session.get_session_options().use_deterministic_compute
    session.close()
    asked: list[Any] = []

    def compiled(_file: str, _options: Any, providers: list[Any], **_more: Any) -> None:
        asked.extend(providers)
        raise RuntimeError("enough")

    monkeypatch.setattr("imagemill.pipeline.backends.onnxruntime._missing", lambda _provider: None)
    monkeypatch.setattr(onnxruntime, "InferenceSession", compiled)
    with pytest.raises(errors.ModelError, match="enough"):
        OnnxRuntimeSession(make_spec(tiny), device, Stopwatch())
    settings = {"use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC", "prefer_nhwc": 1}
    assert asked == [("CUDAExecutionProvider", {"device_id": 3, **settings})]


def test_a_job_on_onnx_runtime_is_like_any_other(
    imagemill: Callable[..., helpers.Result], jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """Two processes, every image a row, the backend in each part, and the labels that OpenVINO
    gives.
    """
    folder = jpegs(17, **{"broken.jpg": b"\xff\xd8\xff no image"})
    arguments = (
        "run",
        folder,
        "--model",
        "tiny",
        "--shard-size",
        4,
        "--batch-size",
        3,
        "--save",
        "embedding",
        "--json",
    )
    ours = imagemill(*arguments, "--output", tmp_path / "ours", "--devices", "cpu:2@onnxruntime")
    assert ours.code == 0, ours.err
    assert (ours.json["images"], ours.json["failed"], ours.json["precision"]) == (18, 1, "fp32")
    for part in (tmp_path / "ours" / "predictions").glob("part-*"):
        metadata = pq.read_metadata(part).metadata
        assert metadata[b"imagemill.backend"] == b"onnxruntime"
        assert json.loads(metadata[b"imagemill.versions"])["onnxruntime"] == onnxruntime.__version__
    assert imagemill("verify", tmp_path / "ours").code == 0
    assert imagemill(*arguments, "--output", tmp_path / "theirs", "--devices", "cpu").code == 0
    helpers.assert_alike(tmp_path / "ours", tmp_path / "theirs")


def test_another_backend_does_not_continue_a_job(
    imagemill: Callable[..., helpers.Result], jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """Its answers differ in the last bits: both are named."""
    arguments = ("run", jpegs(3), "--model", "tiny", "--output", tmp_path / "out")
    assert imagemill(*arguments, "--devices", "cpu").code == 0
    ended = imagemill(*arguments, "--devices", "cpu@onnxruntime")
    assert ended.code == 2
    assert "was started with backend openvino, now backend onnxruntime is asked for" in ended.err
