"""The IPU's way: the cut graph, the program on its old Python, its protocol and its ends, on a
stand-in for popart that refuses what is not on record. No IPU has run any of it.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

import helpers
import popart_standin
from faults.harness import Hold
from imagemill import errors
from imagemill.models import bundle
from imagemill.models.custom import wrap
from imagemill.pipeline.backends import devices, offers, open_session
from imagemill.pipeline.backends.popart import ipu_graph
from imagemill.pipeline.backends.popart import program as popart_program
from imagemill.pipeline.backends.popart import session as popart_session
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, Bundle, DeviceSpec, Precision, Saved, SessionSpec
from tiny import CLASSES, SIZE, TINY_CARD, tiny_model

pytestmark = pytest.mark.process

PROGRAM = Path(popart_program.__file__)
TOLERANCE = 0.02


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One IPU, and a folder that records what it was asked for."""
    popart_standin.prepare(monkeypatch, tmp_path / "ipus")
    return tmp_path / "ipus"


def environment(folder: Path, models_dir: Path, **variables: object) -> dict[str, str]:
    """The same for a command line."""
    given = popart_standin.environment(folder, **variables)
    paths = os.pathsep.join([given.pop("PYTHONPATH"), helpers.environment()["PYTHONPATH"]])
    return helpers.environment(IMAGEMILL_MODELS=str(models_dir), PYTHONPATH=paths, **given)


def opened(model: Bundle, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "precision": Precision.FP16,
        "batch_size": 3,
        "batches_per_step": 2,
    }
    return open_session(
        SessionSpec(str(model.dir / "model.onnx"), model.card, **(values | changes)),
        DeviceSpec("ipu#0", "ipu", "popart", (0,)),
        Stopwatch(),
    )


def batches(count: int, size: int = SIZE) -> list[Batch]:
    rng = np.random.default_rng(0)
    return [Batch(rng.integers(0, 256, (3, size, size, 3), np.uint8), 3, ()) for _ in range(count)]


def processes(folder: Path) -> list[int]:
    """Process ids of the programs that attached to an IPU, in that order."""
    return [call["attached"] for call in popart_standin.calls(folder) if "attached" in call]


# The stand-in is as strict as the bindings.


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in itself, in this process."""
    monkeypatch.setenv("POPART_STANDIN_FOLDER", str(tmp_path))
    file = Path(popart_standin.__file__).with_name("popart.py")
    spec = importlib.util.spec_from_file_location("popart_standin_module", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Steps:
    """The recorded way, each step to be taken, left out or taken otherwise."""

    def __init__(self, popart: Any, tiny: Bundle) -> None:
        self.popart = popart
        model = ipu_graph.cut(tiny.dir / "model.onnx", tiny.card, 3, ["logits"]).model
        self.builder = popart.Builder(
            model, opsets={"ai.onnx": 11, "ai.onnx.ml": 1, "ai.graphcore": 1}
        )
        self.graph = popart.GraphTransformer(self.builder.getModelProto())
        self.graph.convertFloatsToHalfs()
        self.device = popart.DeviceManager().acquireAvailableDevice(1)
        self.flow = popart.DataFlow(1, {"logits": popart.AnchorReturnType("All")})
        self.options = popart.SessionOptions()
        self.x = np.zeros((3, 3, SIZE, SIZE), np.float16)

    def session(self) -> Any:
        return self.popart.InferenceSession(
            fnModel=self.graph.getModelProto(),
            dataFlow=self.flow,
            deviceInfo=self.device,
            userOptions=self.options,
        )

    def ready(self) -> tuple[Any, dict[str, Any]]:
        session = self.session()
        session.prepareDevice()
        anchors = session.initAnchorArrays()
        session.weightsFromHost()
        return session, anchors


def _run(steps: Steps, x: Any) -> Any:
    session, anchors = steps.ready()
    return session.run(steps.popart.PyStepIO({"normalised": x}, anchors))


def _without_weights(steps: Steps) -> None:
    session = steps.session()
    session.prepareDevice()
    session.run(steps.popart.PyStepIO({"normalised": steps.x}, session.initAnchorArrays()))


def _detached(steps: Steps) -> None:
    session, anchors = steps.ready()
    with steps.device:
        pass
    session.run(steps.popart.PyStepIO({"normalised": steps.x}, anchors))


REFUSED: dict[str, tuple[Callable[[Steps], Any], str]] = {
    "an unknown method": (lambda s: s.builder.getOutputs(), "no attribute 'getOutputs'"),
    "an unknown option": (lambda s: setattr(s.options, "enableCaching", True), "enableCaching"),
    "an option of another type": (
        lambda s: setattr(s.options, "cachePath", Path("x")),
        "incompatible function arguments",
    ),
    "an unknown argument": (
        lambda s: s.popart.Builder(b"", opset={}),
        "unexpected keyword argument 'opset'",
    ),
    "an argument of another type": (
        lambda s: s.popart.DataFlow("1", {}),
        "incompatible function arguments",
    ),
    "an anchor by name": (
        lambda s: s.popart.DataFlow(1, {"logits": "All"}),
        "incompatible function arguments",
    ),
    "arguments by place": (
        lambda s: s.popart.InferenceSession(b"", s.flow, s.device, s.options),
        "positional argument",
    ),
    "other operator sets": (
        lambda s: s.popart.Builder(s.builder.getModelProto(), opsets={"ai.onnx": 10}),
        "opsets",
    ),
    "memory of what is no convolution": (
        lambda s: s.builder.setAvailableMemoryProportion("r1", 0.3),
        "no output of a convolution",
    ),
    "anchors before compilation": (
        lambda s: s.session().initAnchorArrays(),
        "initAnchorArrays before prepareDevice",
    ),
    "weights before compilation": (
        lambda s: s.session().weightsFromHost(),
        "weightsFromHost before prepareDevice",
    ),
    "a run without weights": (_without_weights, "run before weightsFromHost"),
    "a run when detached": (_detached, "run before the device was attached"),
    "float32 after the conversion": (lambda s: _run(s, s.x.astype(np.float32)), "input is float32"),
    "an axis of one step": (
        lambda s: _run(s, s.x[None]),
        re.escape("input is float16 (1, 3, 3, 32, 32)"),
    ),
    "memory in another order": (
        lambda s: _run(s, np.asfortranarray(s.x + np.float16(1))),
        "C-contiguous: False",
    ),
    "anchors of one's own": (
        lambda s: s.ready()[0].run(s.popart.PyStepIO({"normalised": s.x}, {})),
        "anchors are not those",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_stand_in_refuses_what_is_not_on_record(standin: Any, tiny: Bundle, case: str) -> None:
    """Names, arguments, types and order of calls; otherwise a passed test would say little about
    the real one.
    """
    act, message = REFUSED[case]
    steps = Steps(standin, tiny)
    with pytest.raises((TypeError, AttributeError, standin.popart_exception), match=message):
        act(steps)


def test_the_stand_in_uses_its_anchors_again(standin: Any, tiny: Bundle) -> None:
    """What was not copied is gone after the next step, and axes of size 1 are dropped."""
    steps = Steps(standin, tiny)
    session, anchors = steps.ready()
    session.run(standin.PyStepIO({"normalised": steps.x}, anchors))
    first, kept = anchors["logits"], anchors["logits"].copy()
    session.run(standin.PyStepIO({"normalised": steps.x + np.float16(1)}, anchors))
    assert first.shape == (3, CLASSES)
    assert first.dtype == np.float16
    assert (first != kept).any()


# The program.


def vermin(file: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "import vermin; vermin.main()",
        "--no-tips",
        "--eval-annotations",
        "-t=3.6-",
        "--violations",
        file,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_program_can_be_read_by_python_3_6(tmp_path: Path) -> None:
    """The Poplar SDK's Python is 3.6 to 3.8."""
    found = vermin(PROGRAM)
    assert found.returncode == 0, found.stdout
    newer = tmp_path / "newer.py"
    newer.write_text(PROGRAM.read_text() + "\n\nif (answer := main()):\n    sys.exit(answer)\n")
    assert vermin(newer).returncode == 1


def test_the_program_imports_the_standard_library_numpy_and_popart_alone() -> None:
    """Nothing of ours can be imported there."""
    nodes = list(ast.walk(ast.parse(PROGRAM.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {
        "numpy",
        "popart",
    }


@pytest.mark.parametrize("line", ["no JSON", "[]", '{"run": 7}', '{"run": [0]}', '{"stop": 0}'])
def test_the_program_ends_at_a_message_that_it_does_not_know(
    folder: Path, tiny: Bundle, line: str
) -> None:
    """Cleanly, with the message named, and detached from its IPU; the session tells."""
    session = opened(tiny)
    (program,) = processes(folder)
    session._process.stdin.write(line.encode() + b"\n")
    session._process.stdin.flush()
    with pytest.raises(
        errors.DeviceLostError,
        match=re.escape(f"its program failed (the program received an unknown message: {line})"),
    ):
        session._answer("done")
    assert {"detached": program} in popart_standin.calls(folder)


def test_the_program_ends_when_its_session_does(folder: Path, tiny: Bundle) -> None:
    """It detaches, so that the IPU is free for the next one."""
    session = opened(tiny)
    session.close()
    (program,) = processes(folder)
    assert not helpers.running(program)
    assert {"detached": program} in popart_standin.calls(folder)


# What is asked of popart.


def test_a_step_has_all_its_batches(folder: Path, tiny: Bundle) -> None:
    """Whatever a step holds, answers are the same bit for bit; batches that a last step lacks are
    made up and dropped.
    """
    given = batches(7)
    answers = {}
    for steps in (1, 3, 0):
        session = opened(tiny, batches_per_step=steps, save=(Saved.EMBEDDING,))
        answers[steps] = [
            (outputs.logits.tobytes(), outputs.embedding.tobytes())
            for _, outputs in session.stream(given)
        ]
        session.close()
    assert [call["steps"] for call in popart_standin.calls(folder) if "prepared" in call] == [
        1,
        3,
        8,
    ]
    assert len(answers[1]) == 7
    assert answers[1] == answers[3] == answers[0]


def test_a_stream_that_was_broken_off_leaves_no_answer_behind(folder: Path, tiny: Bundle) -> None:
    """Steps were at work when it was: the next stream's batches get their own answers all the
    same.
    """
    session, given = opened(tiny, batches_per_step=1), batches(6)
    expected = [outputs.logits.tobytes() for _, outputs in session.stream(given)]
    broken = session.stream(given)
    next(broken)
    broken.close()
    assert [outputs.logits.tobytes() for _, outputs in session.stream(reversed(given))] == expected[
        ::-1
    ]
    session.close()


def test_everything_behind_normalisation_is_fp16_and_the_engine_is_cached(
    folder: Path, tmp_path: Path, tiny: Bundle
) -> None:
    """With --precision fp16; what was compiled is kept beside the model, where that can be
    written.
    """
    opened(tiny, cache_dir=str(tmp_path / "compiled")).close()
    opened(tiny, precision=Precision.FP32, cache_dir="/proc/nowhere").close()
    half, single = [call for call in popart_standin.calls(folder) if "prepared" in call]
    assert half == {
        "prepared": [3, 3, SIZE, SIZE], "steps": 2, "half": True, "synthetic": "Off", "cache": str(tmp_path / "compiled" / "popart")
    }  # fmt: skip
    assert (single["half"], single["cache"]) == (False, False)


def test_each_convolution_gets_its_share_of_memory(
    folder: Path, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the environment says it, and none where it says nothing."""
    opened(tiny).close()
    assert not [call for call in popart_standin.calls(folder) if "memory_proportion" in call]
    monkeypatch.setenv("IMAGEMILL_POPART_MEMORY_PROPORTION", "0.3")
    opened(tiny).close()
    asked = [call for call in popart_standin.calls(folder) if "memory_proportion" in call]
    assert asked == [
        {"memory_proportion": 0.3, "node": "c1"},
        {"memory_proportion": 0.3, "node": "c2"},
    ]


@pytest.mark.parametrize("text", ["0", "1.5", "much", "nan"])
def test_a_share_that_is_none_is_wrong_usage(
    folder: Path, tiny: Bundle, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Before anything is started."""
    monkeypatch.setenv("IMAGEMILL_POPART_MEMORY_PROPORTION", text)
    with pytest.raises(
        errors.UsageError,
        match=f"IMAGEMILL_POPART_MEMORY_PROPORTION={text}: must be a number above 0, and 1 at most",
    ):
        opened(tiny)
    assert not popart_standin.calls(folder)


def test_bench_lets_the_ipu_make_up_its_images(
    folder: Path, imagemill: Callable[..., helpers.Result], models_dir: Path
) -> None:
    """`bench --synthetic` measures the device: nothing crosses to it. A run is never synthetic."""
    arguments = (
        "--model",
        "tiny",
        "--devices",
        "ipu",
        "--precision",
        "fp16",
        "--batches-per-step",
        "4",
        "--iterations",
        "1",
        "--json",
    )
    report = imagemill("bench", "--synthetic", *arguments, env=environment(folder, models_dir))
    assert report.code == 0, report.err
    assert report.json["precision"] == "fp16"
    assert [call["synthetic"] for call in popart_standin.calls(folder) if "prepared" in call] == [
        "RandomNormal"
    ]


# The cut.


def test_the_table_is_the_graphs_own_normalisation(tiny: Bundle) -> None:
    """Each byte becomes the very number that the graph would make of it."""
    cut = ipu_graph.cut(tiny.dir / "model.onnx", tiny.card, 3, ["logits"])
    mean, scale = np.float32([123.0, 117.0, 104.0]), np.float32(1 / 58.0)
    expected = (np.arange(256, dtype=np.float32) - mean[:, None]) * scale
    assert cut.table.tobytes() == expected.tobytes()
    assert (cut.order, cut.channels_last, cut.convolutions) == ((0, 1, 2), False, ("c1", "c2"))


def custom(folder: Path, *, opset: int = 11) -> Path:
    """A classifier as others make them: BGR, (n, 12, 12, 3), its own scale."""
    rng = np.random.default_rng(5)
    weights = {"w": rng.normal(size=(6, 3, 3, 3)), "m": rng.normal(size=(6, CLASSES))}
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "custom",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 12, 12, 3])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", CLASSES])],
        [
            numpy_helper.from_array(array.astype(np.float32), name)
            for name, array in weights.items()
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10),
        folder / "custom.onnx",
    )
    labels = folder / "labels.txt"
    labels.write_text("".join(f"{number}\n" for number in range(CLASSES)))
    given = {
        "scale": 255,
        "mean": (120, 110, 100),
        "std": (60, 50, 40),
        "color": "BGR",
        "resize": "none",
        "labels": str(labels),
    }
    made, _ = wrap.wrap(folder / "custom.onnx", given, folder / "bundle")
    return made


def test_other_layouts_and_colour_orders_answer_alike(folder: Path, tmp_path: Path) -> None:
    """A wrapped model that wants BGR and channels last, written with a newer IR version: as
    OpenVINO in fp32, within the tolerance.
    """
    custom(tmp_path)
    model = bundle.load(tmp_path / "bundle")
    given = batches(3, 12)
    session = opened(model)
    reference = open_session(
        SessionSpec(str(model.dir / "model.onnx"), model.card, Precision.FP32, 3),
        DeviceSpec("cpu#0", "cpu", "openvino", (0,)),
        Stopwatch(),
    )
    for (_, found), (_, expected) in zip(
        session.stream(given), reference.stream(given), strict=True
    ):
        assert np.abs(found.logits - expected.logits).max() < TOLERANCE
        assert np.ptp(expected.logits) > 10 * TOLERANCE
    session.close()
    assert [call["prepared"] for call in popart_standin.calls(folder) if "prepared" in call] == [
        [3, 12, 12, 3]
    ]


def test_what_popart_cannot_read_is_an_error_before_it_is_started(
    folder: Path, tmp_path: Path, tiny: Bundle
) -> None:
    """A newer opset, a card without the boundary, a graph that goes round it."""
    custom(tmp_path, opset=13)
    with pytest.raises(
        errors.ModelError,
        match=(
            r"custom cannot run on an IPU: it has opset 13, PopART reads opset 6 to 11\. Export it"
            r" again"
        ),
    ):
        opened(bundle.load(tmp_path / "bundle"))
    with pytest.raises(
        errors.ModelError,
        match=r"tiny cannot run on an IPU: its card names no tensor where normalisation ends",
    ):
        opened(replace(tiny, card=replace(tiny.card, normalised=None)))
    with pytest.raises(
        errors.ModelError,
        match=r"tiny cannot run on an IPU: its embedding cannot be had from 'logits' alone",
    ):
        ipu_graph.cut(
            tiny.dir / "model.onnx", replace(tiny.card, normalised="logits"), 3, ["embedding"]
        )
    with pytest.raises(
        errors.ModelError,
        match=(
            r"tiny cannot run on an IPU: 'c1', where its normalisation ends, is not made of each"
            r" byte"
        ),
    ):
        ipu_graph.cut(tiny.dir / "model.onnx", replace(tiny.card, normalised="c1"), 3, ["logits"])
    assert not popart_standin.calls(folder)


def test_weights_in_a_file_of_their_own_are_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PopART's graphs are one message of protobuf each, which ends at 2 GiB."""
    monkeypatch.setattr(bundle, "EXTERNAL_FROM", 1)
    large = bundle.write(tmp_path / "large", TINY_CARD, tiny_model())
    with pytest.raises(
        errors.ModelError,
        match=(
            "tiny cannot run on an IPU: PopART reads models of up to 2 GiB, and its weights are"
            " more"
        ),
    ):
        ipu_graph.cut(large.dir / "model.onnx", large.card, 3, ["logits"])


# Errors.


def test_each_session_has_an_ipu_of_its_own(
    folder: Path, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process, one IPU; where none is free any more, that is said, and what to do."""
    monkeypatch.setenv("POPART_STANDIN_IPUS", "2")
    monkeypatch.setattr(popart_session, "PATIENCE_S", 0.0)
    sessions = [opened(tiny), opened(tiny)]
    assert [call["ipu"] for call in popart_standin.calls(folder) if "attached" in call] == [0, 1]
    with pytest.raises(
        errors.DeviceError,
        match=r"ipu#0: no IPU is free\. Ask for fewer with --devices ipu:N; gc-monitor shows which",
    ):
        opened(tiny)
    for session in sessions:
        session.close()


def test_an_ipu_that_comes_free_is_waited_for(
    folder: Path, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of a process that has just died is not there at once, and its worker is started again
    at once.
    """
    monkeypatch.setattr(popart_session, "PATIENCE_S", 600.0)
    first = opened(tiny)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(lambda: opened(tiny))
        helpers.until(lambda: any("refused" in call for call in popart_standin.calls(folder)))
        first.close()
        second.result().close()
    assert len(processes(folder)) == 2


def test_out_of_memory_says_what_to_change(
    folder: Path, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch size and memory proportion, with their values; the program has ended."""
    monkeypatch.setenv("POPART_STANDIN_MEMORY", "1000")
    with pytest.raises(errors.ModelError, match=r"in batches of 3 does not fit into the memory of ipu#0: Out of memory on tile 17.* smaller --batch-size, or set IMAGEMILL_POPART_MEMORY_PROPORTION to 0\.3\.$"):  # fmt: skip
        opened(tiny)
    monkeypatch.setenv("IMAGEMILL_POPART_MEMORY_PROPORTION", "0.4")
    with pytest.raises(
        errors.ModelError, match=r"or lower IMAGEMILL_POPART_MEMORY_PROPORTION, now 0\.4\.$"
    ):
        opened(tiny)
    assert not [program for program in processes(folder) if helpers.running(program)]


REMEDY = "source the enable.sh of its poplar and of its popart folder"


def test_what_is_missing_is_reported_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No interpreter, one without popart, one with another package of that name, something that is
    no Python.
    """
    monkeypatch.setenv("IMAGEMILL_POPART_PYTHON", str(tmp_path / "python3"))
    with pytest.raises(
        errors.DeviceError,
        match=rf"python3 cannot be started: No such file or directory\. .*{REMEDY}",
    ):
        devices.resolve("ipu:2")
    monkeypatch.setenv("IMAGEMILL_POPART_PYTHON", sys.executable)
    with pytest.raises(
        errors.DeviceError,
        match=rf"{sys.executable} cannot import popart: No module named 'popart'\. .*{REMEDY}",
    ):
        devices.resolve("ipu:2")
    (tmp_path / "popart.py").write_text("def pop(): pass\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        errors.DeviceError,
        match=rf"the popart in {tmp_path}/popart.py is not Graphcore's.*{REMEDY}",
    ):
        devices.resolve("ipu:2")
    monkeypatch.setenv("IMAGEMILL_POPART_PYTHON", "/bin/false")
    with pytest.raises(
        errors.DeviceError, match=rf"/bin/false ended with exit code 1\. .*{REMEDY}"
    ):
        devices.resolve("ipu:2")


def test_a_session_says_the_same(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the SDK went away between looking and opening."""
    monkeypatch.setenv("IMAGEMILL_POPART_PYTHON", sys.executable)
    with pytest.raises(errors.DeviceError, match=rf"ipu#0: .* cannot import popart: .*{REMEDY}"):
        opened(tiny)


def test_our_own_packages_are_not_shown_to_the_other_python(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker has our folder on its PYTHONPATH, where NumPy may lie too: of another Python. What
    enable.sh put there is kept.
    """
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(helpers.SOURCE_ROOT), os.environ["PYTHONPATH"]])
    )
    script = tmp_path / "python3"
    script.write_text('#!/bin/sh\necho "{\\"here\\": {\\"popart\\": \\"$PYTHONPATH\\"}}"\n')
    script.chmod(0o755)
    monkeypatch.setenv("IMAGEMILL_POPART_PYTHON", str(script))
    (offer,) = [offer for offer in offers.offers() if offer["devices"].startswith("ipu")]
    assert offer["missing"] is None
    assert str(helpers.SOURCE_ROOT) not in offer["what"].split()[1].split(os.pathsep)
    assert str(Path(popart_standin.__file__).parent) in offer["what"].split()[1].split(os.pathsep)


# Whole runs.


def top_1(output: Path) -> dict[str, int]:
    return {path: row["class_id"] for path, row in helpers.by_path(output).items()}


def test_a_run_on_two_ipus_answers_as_the_cpu_does(
    tmp_path: Path,
    jpegs: Callable[..., Path],
    imagemill: Callable[..., helpers.Result],
    models_dir: Path,
) -> None:
    """`run --devices ipu:2` gives each image the class that OpenVINO's fp32 gives it, and each one
    row.
    """
    folder = tmp_path / "ipus"
    arguments = (
        "run",
        jpegs(40, **{"bad.jpg": b"no image"}),
        "--model",
        "tiny",
        "--shard-size",
        "4",
        "--batch-size",
        "3",
        "--no-report",
        "--json",
    )
    env = environment(folder, models_dir, ipus=2)
    result = imagemill(
        *arguments,
        "--output",
        tmp_path / "ipu",
        "--devices",
        "ipu:2",
        "--precision",
        "fp16",
        env=env,
    )
    assert result.code == 0, result.err
    assert (result.json["ok"], result.json["failed"], result.json["precision"]) == (40, 1, "fp16")
    assert [device["name"] for device in result.json["devices"]] == ["ipu#0", "ipu#1"]
    assert (
        imagemill(
            *arguments, "--output", tmp_path / "cpu", "--devices", "cpu", "--precision", "fp32"
        ).code
        == 0
    )
    assert top_1(tmp_path / "ipu") == top_1(tmp_path / "cpu")
    assert not [program for program in processes(folder) if helpers.running(program)]


def test_a_program_that_is_killed_costs_a_restart_and_no_row(
    tmp_path: Path,
    jpegs: Callable[..., Path],
    imagemill: Callable[..., helpers.Result],
    models_dir: Path,
) -> None:
    """Its worker dies with a clear word and is started again; the rows are those of a run that
    nothing disturbed.
    """
    folder = tmp_path / "ipus"
    arguments = (
        "--model",
        "tiny",
        "--devices",
        "ipu",
        "--precision",
        "fp16",
        "--shard-size",
        "4",
        "--no-report",
        "--json",
    )
    source, trap = jpegs(24), tmp_path / "trap"
    trap.touch()
    killed = imagemill(
        "run",
        source,
        "--output",
        tmp_path / "a",
        *arguments,
        env=environment(folder, models_dir, dies=trap),
    )
    assert killed.code == 0, killed.err
    assert [device["restarts"] for device in killed.json["devices"]] == [1]
    assert (
        "ipu#0: its program was killed by SIGKILL"
        in (tmp_path / "a" / "logs" / "ipu#0.log").read_text()
    )
    assert (
        imagemill(
            "run",
            source,
            "--output",
            tmp_path / "b",
            *arguments,
            env=environment(folder, models_dir),
        ).code
        == 0
    )
    assert helpers.by_path(tmp_path / "a") == helpers.by_path(tmp_path / "b")
    assert len(processes(folder)) == 3


@pytest.mark.parametrize("whom", ["worker", "launcher"])
def test_the_program_dies_with_its_worker_and_with_its_launcher(
    tmp_path: Path, small_jpegs: Path, start: Callable[..., Any], models_dir: Path, whom: str
) -> None:
    """No process keeps an IPU that nobody uses. A worker's death costs a restart, as any other."""
    folder, output = tmp_path / "ipus", tmp_path / "out"
    arguments = (
        "--model",
        "tiny",
        "--devices",
        "ipu",
        "--precision",
        "fp16",
        "--shard-size",
        "4",
        "--no-report",
        "--json",
    )
    hold, env = Hold(tmp_path, 0), environment(folder, models_dir)
    env["PYTHONPATH"] += os.pathsep + hold.environment["PYTHONPATH"]
    env["HOLD"] = hold.environment["HOLD"]
    run = start("run", small_jpegs, "--output", output, *arguments, env=env)
    (worker,) = helpers.until(lambda: helpers.worker_pids(output), process=run)
    (program,) = processes(folder)
    os.kill(worker if whom == "worker" else run.pid, signal.SIGKILL)
    helpers.until(lambda: not helpers.running(program))
    helpers.until(lambda: not helpers.running(worker))
    if whom == "worker":
        hold.release()
        ended = helpers.finish(run)
        assert ended.code == 0, ended.err
        assert [device["restarts"] for device in json.loads(ended.out)["devices"]] == [1]
    assert not [pid for pid in processes(folder) if helpers.running(pid)]
