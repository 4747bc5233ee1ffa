"""Sessions one by one; what all of them promise is in test_session_conformance.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from batches import batches, make_spec
from helpers import environment
from imagemill import errors
from imagemill.pipeline.backends import open_session
from imagemill.pipeline.backends.base import Session
from imagemill.pipeline.backends.openvino import _compiled, _device_name, properties
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Bundle, DeviceSpec, Precision


def make(tiny: Bundle, *, backend: str = "openvino", cores: int = 1, **changes: Any) -> Session:
    return open_session(
        make_spec(tiny, **changes),
        DeviceSpec("d#0", "cpu", backend, tuple(range(cores))),
        Stopwatch(),
    )


def test_a_model_that_cannot_be_compiled_is_one_clear_error(tiny: Bundle, tmp_path: Path) -> None:
    """It names the file."""
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(errors.ModelError, match=r"model\.onnx cannot be compiled: \S"):
        make(tiny, model_file=str(tmp_path / "model.onnx"))


def test_a_models_folder_that_cannot_be_written_costs_only_the_cache(
    tiny: Bundle, tmp_path: Path
) -> None:
    """Compiled models are kept where that is possible; where it is not, the session works all the
    same.
    """
    (tmp_path / "file").touch()
    session = make(tiny, cache_dir=str(tmp_path / "file" / "compiled"))
    assert len(list(session.stream(batches(2)))) == 2


@pytest.mark.parametrize(
    ("precision", "hint"),
    [(Precision.FP32, "f32"), (Precision.FP16, "f16"), (Precision.BF16, "bf16")],
)
def test_precision_is_asked_for_by_name(precision: Precision, hint: str) -> None:
    """The plug-in's own choice is bf16 on processors that have it: accuracy would be traded
    silently.
    """
    assert properties(precision, 4)["INFERENCE_PRECISION_HINT"] == hint
    assert properties(precision, 4)["INFERENCE_NUM_THREADS"] == 4
    assert properties(precision, 4, kind="gpu") == {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": hint,
    }


@pytest.mark.parametrize(
    ("kind", "number", "spelt"), [("cpu", 0, "CPU"), ("gpu", 1, "GPU.1"), ("npu", 0, "NPU")]
)
def test_openvino_compiles_for_the_device_it_was_given(
    tiny: Bundle, kind: str, number: int, spelt: str
) -> None:
    """Never for another one, as `AUTO` would: a device that is not here is one clear error that
    names it.
    """
    assert _device_name(kind, number) == spelt
    device = DeviceSpec(f"{kind}#{number}", kind, "openvino", (0,), number)
    if kind == "cpu":
        session = open_session(make_spec(tiny), device, Stopwatch())
        assert len(list(session.stream(batches(2)))) == 2
    else:
        with pytest.raises(errors.ModelError, match=r"model\.onnx cannot be compiled"):
            open_session(make_spec(tiny), device, Stopwatch())


def test_tests_send_no_telemetry() -> None:
    """Some import OpenVINO or NNCF themselves; conftest.py has taken the sender away by then."""
    assert sys.modules["openvino_telemetry"] is None


@pytest.mark.process
def test_openvino_is_imported_without_its_telemetry() -> None:
    """`import openvino` sends an event of its own; the module that does so is kept out."""
    program = (
        "import sys; from imagemill.system.openvino_library import load_openvino; load_openvino();"
        " print(sys.modules['openvino_telemetry'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment(),
    )
    assert found.stdout == "None\n"


def test_null_answers_depend_on_every_pixel(tiny: Bundle) -> None:
    """The null device stands in for a model in tests: another pixel, another answer."""
    session = make(tiny, backend="null", batch_size=1)
    (batch,) = batches(1, size=1)
    ((_, before),) = session.stream([batch])
    batch.pixels[0, 17, 5, 1] ^= 1
    ((_, after),) = session.stream([batch])
    assert before.logits.tobytes() != after.logits.tobytes()


def test_a_cache_that_another_worker_writes_at_the_same_moment_does_no_harm(tmp_path: Path) -> None:
    """Where OpenVINO stumbles over the other's blob, the model is compiled without the cache;
    other failures are reported as they are.
    """

    class Stumbling:
        def __init__(self, *errors: str) -> None:
            self.errors, self.properties = list(errors), [{"CACHE_DIR": str(tmp_path)}]

        def set_property(self, values: dict[str, str]) -> None:
            self.properties.append(values)

        def compile_model(self, *arguments: object) -> object:
            if self.errors:
                raise RuntimeError(self.errors.pop(0))
            return arguments

    core = Stumbling("filesystem error: cannot set permissions: No such file or directory [1.blob]")
    assert _compiled(core, "model", "CPU", {}) == ("model", "CPU", {})
    assert core.properties[-1] == {"CACHE_DIR": ""}
    with pytest.raises(RuntimeError, match="unsupported layer"):
        _compiled(Stumbling("unsupported layer"), "model", "CPU", {})


def test_compiled_models_that_nobody_uses_any_more_are_removed(
    tiny: Bundle, tmp_path: Path
) -> None:
    """The eight used last stay, and whatever was used within two days."""
    cache, day = tmp_path / "compiled", 86_400
    cache.mkdir()
    for number in range(12):
        blob = cache / f"{number}.blob"
        blob.write_bytes(b"")
        used = time.time() - (day if number < 2 else number * 2 * day)
        os.utime(blob, (used, used))
    read = time.time() - 3 * day
    os.utime(cache / "11.blob", (read, time.time() - 100 * day))  # written long ago, read since
    make(tiny, cache_dir=str(cache))
    left = {blob.name for blob in cache.glob("*.blob")}
    assert {f"{number}.blob" for number in (0, 1, 2, 11, 3, 4, 5)} <= left, (
        "with the one just made, eight"
    )
    assert not {f"{number}.blob" for number in range(6, 11)} & left
    for number in range(20):
        (cache / f"new{number}.blob").write_bytes(b"")
    make(tiny, cache_dir=str(cache))
    assert len(list(cache.glob("new*.blob"))) == 20


def test_a_batch_that_does_not_fit_is_called_too_large(tiny: Bundle) -> None:
    """Memory is what usually lacks, and the library's own words do not say so."""
    with pytest.raises(
        errors.ModelError,
        match=(
            r"cannot be compiled: .* It was for batches of 99999999: repeat the command with a"
            r" smaller"
        ),
    ):
        make(tiny, batch_size=99_999_999)
