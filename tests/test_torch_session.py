"""The PyTorch backend: what is its own, beside what all sessions promise and what each operator
computes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

import helpers
from batches import batches, make_spec, rows
from imagemill import errors
from imagemill.models import bundle, variants
from imagemill.models.architectures import resnet
from imagemill.models.custom import check as custom_check
from imagemill.models.custom import wrap
from imagemill.models.folders import folder as folders
from imagemill.pipeline.backends import library_versions, open_session
from imagemill.pipeline.backends.base import Found
from imagemill.pipeline.session_checks import check_exactness
from imagemill.pipeline.stopwatch import Stopwatch
from imagemill.records import Batch, Bundle, DeviceSpec, Limits, Precision, Saved
from imagemill.tuning import accuracy, check, command
from imagemill.tuning.check import AccuracyCheck
from imagemill.tuning.on_gpus import GpuRun
from onnx_files import complete, silent
from test_models_golden import GOLDEN, MODELS, arrays_of, built_from, onnx_of, recipe
from test_wrap import EXPORTED, FIXTURES, fixture_pixels
from tiny import SIZE, Finished, tiny_model

sys.path.insert(0, str(helpers.PROJECT / "tests" / "faults"))
torch = pytest.importorskip("torch", reason="needs torch")
import harness  # noqa: E402

import cuda_standin  # noqa: E402
from imagemill.pipeline.backends.torch import cuda  # noqa: E402
from imagemill.pipeline.backends.torch import session as torch_session  # noqa: E402
from imagemill.pipeline.backends.torch.program import (  # noqa: E402
    Loaded,
    Program,
    from_model,
)
from imagemill.pipeline.backends.torch.session import TorchSession  # noqa: E402

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("torch_is_preloaded")]
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def make(model: Bundle, kind: str = "cpu", cores: int = 1, **changes: Any) -> TorchSession:
    device = DeviceSpec(f"{kind}#0", kind, "torch", tuple(range(cores)))
    session = open_session(make_spec(model, **changes), device, Stopwatch())
    assert isinstance(session, TorchSession)
    return session


def compute(program: Program, values: np.ndarray, dtype: Any = None) -> list[np.ndarray]:
    with torch.inference_mode():
        loaded = Loaded(program, "cpu", dtype or torch.float32)
        return [found.numpy() for found in loaded(torch.from_numpy(values))]


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> cuda_standin.Cuda:
    made = cuda_standin.Cuda()
    monkeypatch.setattr(cuda, "open_card", lambda _number: (made, "cpu"))
    monkeypatch.setattr(cuda, "prepare", lambda: None)
    monkeypatch.setattr(torch_session, "_missing", lambda _kind: None)
    return made


def program_of(model: onnx.ModelProto, values: np.ndarray) -> Program:
    names = [output.name for output in model.graph.output]
    return from_model(model, model.graph.input[0].name, torch.from_numpy(values), names)


# The networks that it must compute.


@pytest.mark.parametrize("name", ["timm_resnext101_32x4d", "torchvision_resnext50_32x4d"])
def test_golden_logits_are_met(name: str) -> None:
    """In fp32. Cadene's network is timm's with other names."""
    model = built_from(arrays_of(name))
    pixels = recipe.pixels()
    logits, embedding = compute(program_of(model, pixels), pixels)
    expected = np.load(GOLDEN / f"{name}.logits.npy")
    np.testing.assert_allclose(logits, expected, rtol=0, atol=MODELS[name])
    features = np.load(GOLDEN / f"{name}.embedding.npy")
    np.testing.assert_allclose(embedding, features, rtol=0, atol=MODELS[name])


@pytest.mark.parametrize("name", EXPORTED)
def test_wrapped_files_answer_as_pytorch_did(name: str, tmp_path: Path, models_dir: Path) -> None:
    """Every network that tests of `wrap` use, in a batch of another size than it was exported
    with.
    """
    size, given = EXPORTED[name]
    file = Path(shutil.copy(FIXTURES / f"{name}.onnx", tmp_path))
    wrap.wrap(file, complete(file, **given))
    made = wrap.bundle_for(file, models_dir, silent)
    session = make(made)
    pixels = fixture_pixels(size)
    ((_, outputs),) = session.stream([Batch(pixels, 3, rows(3))])
    session.close()
    expected = np.load(FIXTURES / f"{name}.npz")["logits"]
    np.testing.assert_allclose(outputs.logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "file",
    # Most of the time would go into the weights of the other two, with the operators of AlexNet.
    [file for file in sorted(LIGHT.glob("*.onnx")) if file.stem[6:] not in ("vgg19", "zfnet512")],
    ids=lambda file: file.stem,
)
def test_light_graphs_answer_as_onnx_runtime_does(file: Path) -> None:
    """The onnx package's classifiers of ImageNet, with random weights."""
    model = onnx.load(file)
    with_weights(model)
    shape = [dim.dim_value or 1 for dim in model.graph.input[0].type.tensor_type.shape.dim]
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (expected,) = session.run(None, {model.graph.input[0].name: values})
    (found,) = compute(program_of(model, values), values)
    assert expected.std() > 1e-4, "the classes must differ"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def with_weights(model: onnx.ModelProto) -> None:
    """Put random weights, as large as keeps the signal's size, for the constants of a light graph;
    the batch norm's variance is one.
    """
    rng = np.random.default_rng(1)
    variances = {node.input[4] for node in model.graph.node if node.op_type == "BatchNormalization"}
    names = {item.name for item in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node if node.op_type == "ConstantOfShape"}
    shapes = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    for name, node in made.items():
        shape = tuple(int(side) for side in shapes[node.input[0]])
        spread = np.sqrt(2 / max(1, np.prod(shape[1:])))
        values = np.ones(shape) if name in variances else rng.normal(size=shape) * spread
        if len(shape) < 2 and name not in variances:
            values = 1 + 0.1 * rng.normal(size=shape)
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
        model.graph.node.remove(node)
    model.ir_version = 4  # from which weights need not be inputs
    for entry in list(model.graph.input):
        if entry.name in names:
            model.graph.input.remove(entry)


FOLDERS = FIXTURES / "folders"


@pytest.mark.parametrize("name", sorted(item.stem for item in FOLDERS.glob("*.json")))
def test_model_folders_answer_as_onnx_runtime_does(name: str, tmp_path: Path) -> None:
    """Folders of transformers and timm, in fp32 to the last digits, in bf16 roughly."""
    made = folders.bundle_for(FOLDERS / name, tmp_path / "models", silent)
    recipe = made.card.recipe
    shape = (3, recipe.height, recipe.width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    (expected,) = custom_check.answers(made.dir / bundle.MODEL, [pixels])
    expected = expected["logits" if made.card.has_head else "embedding"]
    for precision, within in ((Precision.FP32, 1e-4), (Precision.BF16, 0.05)):
        session = make(made, precision=precision)
        ((_, outputs),) = session.stream([Batch(pixels, 3, rows(3))])
        session.close()
        found = outputs.logits if made.card.has_head else outputs.embedding
        np.testing.assert_allclose(found, expected, rtol=0, atol=within * np.abs(expected).max())


@pytest.mark.large
def test_photographs_get_the_classes_that_openvino_gives(
    photographs: Path, photographs_run: Finished, lite0: Bundle, tmp_path: Path
) -> None:
    """EfficientNet-Lite0 with its trained weights, in fp32: at most one of 60 differs."""
    environment = helpers.environment(IMAGEMILL_MODELS=str(lite0.dir.parent))
    arguments = ("--output", tmp_path / "out", "--model", "efficientnet_lite0", "--limit", 60)
    done = helpers.imagemill_here(
        "run", photographs, *arguments, "--devices", "cpu:2@torch", env=environment
    )
    assert done.code == 0, done.err
    ours, theirs = helpers.by_path(tmp_path / "out"), helpers.by_path(photographs_run.output)
    assert len(ours) == 60
    assert sum(row["class_id"] == theirs[path]["class_id"] for path, row in ours.items()) >= 59


# What it makes of a graph.


def test_a_network_is_convolutions_alone() -> None:
    """Normalisation, batch norms, sums and activations are fused, and nothing changes the layout
    that convolutions want.
    """
    layout = []

    def noting(call: Any) -> Any:
        def run(x: Any, *rest: Any) -> Any:
            layout.append(x.is_contiguous(memory_format=torch.channels_last))
            return call(x, *rest)

        return run

    architecture = resnet.ARCHITECTURES["resnext50_32x4d"]
    model = onnx_of(architecture, architecture.random(0))
    pixels = np.zeros((2, 224, 224, 3), np.uint8)
    program = program_of(model, pixels)
    kinds = [step.kind for step in program.steps]
    assert kinds == [
        "Cast", "Transpose", "Affine", "Conv", "MaxPool", *["Conv"] * 52, "GlobalAveragePool",
        "Flatten", "Gemm",
    ]  # fmt: skip
    assert [step.is_reduced for step in program.steps[:4]] == [False, False, False, True]
    assert [step.is_reduced for step in program.steps[-2:]] == [True, False]
    for step in program.steps:
        if step.kind == "Conv":
            step.call = noting(step.call)
    compute(program, pixels)
    assert layout == [True] * 53


def small_graph(nodes: list[Any], weights: dict[str, Any], width: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


CHAINS: dict[str, tuple[list[Any], str]] = {
    "gelu": (
        [
            node("Div", "x root", "a"),
            node("Erf", "a", "b"),
            node("Add", "b one", "c"),
            node("Mul", "x c", "d"),
            node("Mul", "d half", "y"),
        ],
        "Gelu",
    ),
    "gelu, half first": (
        [
            node("Mul", "x half", "h"),
            node("Mul", "x inverse", "a"),
            node("Erf", "a", "b"),
            node("Add", "one b", "c"),
            node("Mul", "h c", "y"),
        ],
        "Gelu",
    ),
    "silu": ([node("Sigmoid", "x", "a"), node("Mul", "a x", "y")], "Silu"),
    "hard swish": (
        [node("HardSigmoid", "x", "a", alpha=1 / 6), node("Mul", "x a", "y")],
        "HardSwish",
    ),
    "layer norm": (
        [
            node("ReduceMean", "x", "m", axes=[-1]),
            node("Sub", "x m", "d"),
            node("Pow", "d two", "s"),
            node("ReduceMean", "s", "v", axes=[-1]),
            node("Add", "v small", "e"),
            node("Sqrt", "e", "r"),
            node("Div", "d r", "y"),
        ],
        "LayerNorm",
    ),
}
"""Chains that exporters write → what they become."""
NUMBERS = {
    "root": np.float32(2**0.5),
    "inverse": np.float32(0.5**0.5),
    "one": np.float32(1),
    "half": np.float32(0.5),
    "two": np.float32(2),
    "small": np.float32(1e-5),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("exact", [True, False])
def test_a_chain_becomes_one_call_and_one_that_differs_does_not(name: str, exact: bool) -> None:
    """The answers stay; a chain with another number in it is left as it is."""
    nodes, kind = CHAINS[name]
    numbers = NUMBERS | ({} if exact else {"half": np.float32(0.7), "two": np.float32(3)})
    if not exact and kind in ("Silu", "HardSwish"):
        numbers["other"] = np.float32([[[1], [2], [3]]])
        nodes = [*nodes[:-1], node("Mul", "other x", "z"), node("Mul", "a z", "y")]
    used = {key: value for key, value in numbers.items() if any(key in n.input for n in nodes)}
    model = small_graph(nodes, used, 8)
    x = np.random.default_rng(0).uniform(0.1, 2, (2, 3, 8)).astype(np.float32)
    program = program_of(model, x)
    assert (kind in [step.kind for step in program.steps]) == exact
    if exact:
        assert len(program.steps) == 1
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (expected,) = session.run(None, {"x": x})
    np.testing.assert_allclose(compute(program, x)[0], expected, rtol=1e-5, atol=1e-5)


def test_an_intermediate_value_that_is_an_output_is_kept() -> None:
    """A fusion must not compute over it, nor leave it out."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3, 1)).astype(np.float32)
    model = small_graph(
        [
            node("Conv", "x w", "c"),
            node("Add", "c four", "s"),
            node("Relu", "s", "y"),
        ],
        {"w": weight, "four": np.float32(-4)},
        8,
    )
    for name in ("c", "s"):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    x = rng.normal(size=(2, 3, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for found, expected in zip(
        compute(program_of(model, x), x), session.run(None, {"x": x}), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_value_is_dropped_after_its_last_use() -> None:
    """Memory holds what is still needed, not every layer's output."""
    nodes = [node("Softplus", "x", "v0")]
    nodes += [node("Softplus", f"v{number}", f"v{number + 1}") for number in range(20)]
    model = small_graph([*nodes, node("Neg", "v20", "y")], {}, 8)
    x = np.zeros((2, 3, 8), np.float32)
    program = program_of(model, x)
    alive: list[int] = []
    made: list[Any] = []
    import weakref

    for step in program.steps:

        def run(value: Any, call: Any = step.call) -> Any:
            found = call(value)
            made.append(weakref.ref(found))
            alive.append(sum(ref() is not None for ref in made))
            return found

        step.call = run
    compute(program, x)
    assert max(alive) <= 2


# The session.


@pytest.mark.parametrize(
    ("cores", "in_flight", "at_work", "threads"),
    [(1, 0, 1, 1), (2, 0, 2, 1), (4, 1, 1, 4), (4, 2, 2, 2), (2, 5, 2, 1)],
)
def test_the_cores_of_the_device_are_all_used_and_no_more(
    tiny: Bundle, cores: int, in_flight: int, at_work: int, threads: int
) -> None:
    """A batch a core, or all cores for the one batch that may be in flight."""
    session = make(tiny, cores=cores, batches_per_step=in_flight)
    pool = session._runner._pool
    assert pool._max_workers == at_work
    assert pool.submit(torch.get_num_threads).result() == threads
    session.close()


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_position_neighbours_and_repetition_change_no_bit(
    tiny: Bundle, precision: Precision
) -> None:
    """For one batch size."""
    session = make(tiny, precision=precision, save=(Saved.EMBEDDING,))
    pixels = batches(1)[0].pixels
    noise = batches(1, seed=9)[0].pixels
    found = set()
    for place in range(3):
        other = noise.copy()
        other[place] = pixels[0]
        ((_, outputs),) = session.stream([Batch(other, 3, rows(3))])
        assert outputs.embedding is not None
        found.add((outputs.logits[place].tobytes(), outputs.embedding[place].tobytes()))
    session.close()
    assert len(found) == 1


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("size", [1, 3])
def test_the_check_of_each_start_passes(tiny: Bundle, precision: Precision, size: int) -> None:
    """Also for batches of one image."""
    session = make(tiny, precision=precision, batch_size=size)
    spec = make_spec(tiny, precision=precision, batch_size=size)
    check_exactness(session.stream, spec, "cpu#0")
    session.close()


def test_pixels_that_pytorch_does_not_take_are_copied(tiny: Bundle) -> None:
    """Read-only ones, and a reversed batch of one image."""
    session = make(tiny, batch_size=1)
    pixels = batches(1, 1)[0].pixels
    fixed = pixels.copy()
    fixed.flags.writeable = False
    found = session.stream([Batch(given, 1, rows(1)) for given in (pixels, pixels[::-1], fixed)])
    assert len({outputs.logits.tobytes() for _, outputs in found}) == 1
    session.close()


def broken(tiny: Bundle, folder: Path, kind: str) -> Path:
    """A copy of the tiny model with one more node, which nobody knows."""
    model = onnx.load(tiny.dir / "model.onnx")
    model.graph.node[-1].output[0] = "raw"
    model.graph.node.append(helper.make_node(kind, ["raw"], ["logits"]))
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(("kind", "other"), [("cpu", "cpu"), ("cuda", "cuda@onnxruntime")])
def test_an_unknown_operator_is_named_with_the_alternative(
    tiny: Bundle, tmp_path: Path, standin: cuda_standin.Cuda, kind: str, other: str
) -> None:
    """Before the first image."""
    file = broken(tiny, tmp_path, "Acosh")
    with pytest.raises(
        errors.ModelError,
        match=rf"the torch backend does not know operator Acosh\. Use --devices {other}\.",
    ):
        make(tiny, kind, model_file=str(file))


def test_a_damaged_file_is_one_clear_error(tiny: Bundle, tmp_path: Path) -> None:
    """It names file and device."""
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(errors.ModelError, match=r"model\.onnx cannot be compiled for cpu#0: \S"):
        make(tiny, model_file=str(tmp_path / "model.onnx"))


def test_a_model_of_another_size_is_one_clear_error(tiny: Bundle) -> None:
    """Shapes that do not fit are found at the start."""
    card = replace(tiny.card, recipe=replace(tiny.card.recipe, height=2 * SIZE))
    with pytest.raises(errors.ModelError, match=r"model\.onnx cannot be compiled for cpu#0: \S"):
        make(tiny, card=card)


def overflowing(folder: Path) -> Bundle:
    """The tiny model behind a convolution whose result fp16 cannot hold if an image is white; in
    fp32 it is divided down again.
    """
    model = tiny_model()
    names = {name: place for place, name in enumerate(n.op_type for n in model.graph.node)}
    first = model.graph.node[names["Conv"] - 2]
    assert first.op_type in ("Conv", "Clip")
    conv = next(item for item in model.graph.node if item.op_type == "Conv")
    conv.input[0] = "small"
    weight = np.zeros((3, 3, 1, 1), np.float32)
    for channel in range(3):
        weight[channel, channel] = 30_000
    model.graph.initializer.append(numpy_helper.from_array(weight, "large"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(30_000), "divisor"))
    place = list(model.graph.node).index(conv)
    model.graph.node.insert(place, node("Div", "huge divisor", "small"))
    model.graph.node.insert(place, node("Neg", "negative", "huge"))
    model.graph.node.insert(place, node("Neg", "product", "negative"))
    model.graph.node.insert(place, node("Conv", "normalised large", "product"))
    from tiny import TINY_CARD

    return bundle.write(folder / "over", replace(TINY_CARD, name="over"), model)


def test_a_card_that_fails_as_an_image_is_computed_again_is_lost(
    models_dir: Path, standin: cuda_standin.Cuda
) -> None:
    """As at any other computation: its worker is started again."""
    overflowing(models_dir)
    session = make(bundle.load(models_dir / "over"), "cuda", precision=Precision.FP16)
    given = batches(2)
    for batch in given:
        batch.pixels[:] = 110 + batch.pixels // 16
    given[1].pixels[1] = 255

    def broken(_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    session._exact = broken
    with pytest.raises(errors.DeviceLostError, match="illegal memory access"):
        list(session.stream(given))


def test_images_that_overflow_fp16_are_computed_in_fp32(tmp_path: Path, models_dir: Path) -> None:
    """They alone, and they are counted: the answers are those of fp32, whatever the neighbours
    are.
    """
    overflowing(models_dir)
    model = bundle.load(models_dir / "over")
    given = batches(2)
    for batch in given:
        batch.pixels[:] = 110 + batch.pixels // 16  # near the mean: nothing overflows
    given[1].pixels[1] = 255
    half = make(model, precision=Precision.FP16, save=(Saved.EMBEDDING,))
    list(half.stream([replace(given[1], rows=())]))  # as the checks at the start
    assert half._clock.read().recomputed == 0
    found = [outputs for _, outputs in half.stream(given)]
    half.close()
    assert half._clock.read().recomputed == 1
    full = make(model, save=(Saved.EMBEDDING,), batch_size=1)
    ((_, alone),) = full.stream([Batch(given[1].pixels[1:2], 1, rows(1))])
    full.close()
    assert found[1].logits[1].tobytes() == alone.logits[0].tobytes()
    assert np.isfinite(found[0].logits).all()


# The GPU's code, on a stand-in.


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16, Precision.FP16])
def test_the_gpus_path_gives_what_the_cpus_does(
    tiny: Bundle, standin: cuda_standin.Cuda, precision: Precision
) -> None:
    """One graph is captured and replayed for every batch; several batches are in flight."""
    given = batches(9, filled=2)
    session = make(tiny, "cuda", precision=precision, save=(Saved.EMBEDDING,))
    assert set(session.versions) == {"torch", "cuda", "cudnn"}
    taken = []

    def noting() -> Any:
        for batch in given:
            taken.append(batch)
            yield batch

    stream = session.stream(noting())
    first = next(stream)
    assert len(taken) == cuda.SLOTS + 1
    found = [first, *stream]
    session.close()
    assert (standin.captures, standin.replays) == (1, 10)
    plain = make(tiny, precision=precision, save=(Saved.EMBEDDING,))
    for (_, outputs), (_, expected) in zip(found, plain.stream(given), strict=True):
        assert outputs.embedding is not None
        assert expected.embedding is not None
        assert outputs.logits.tobytes() == expected.logits.tobytes()
        assert outputs.embedding.tobytes() == expected.embedding.tobytes()
    plain.close()


def residual(seed: int) -> onnx.ModelProto:
    """Two convolutions, a sum and activations, of which cuDNN has two fused with ReLU."""
    rng = np.random.default_rng(seed)
    weights = {
        "a": rng.normal(size=(8, 3, 3, 3)),
        "b": rng.normal(size=(8, 4, 3, 3)) / 6,
        "c": rng.normal(size=8),
        "e": rng.normal(size=(8, 8, 1, 1)),
    }
    nodes = [
        node("Conv", "x a c", "0", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", "0", "1"),
        node("Conv", "1 b c", "2", pads=[2, 2, 2, 2], dilations=[2, 2], group=2),
        node("Add", "1 2", "3"),
        node("Relu", "3", "4"),
        node("Conv", "4 e", "5"),
        node("Sigmoid", "5", "y"),
    ]
    return small_graph(nodes, {key: np.float32(value) for key, value in weights.items()}, 8)


@pytest.mark.parametrize("result", ["right", "wrong", "missing"])
def test_cudnns_fused_convolutions_are_used_where_they_are_right(
    standin: cuda_standin.Cuda, monkeypatch: pytest.MonkeyPatch, result: str
) -> None:
    """In `benchmarks/gpu`. A kernel that is missing or computes something else is not used."""
    monkeypatch.syspath_prepend(helpers.PROJECT / "benchmarks" / "gpu")
    import runners

    called = []

    def relu(x: Any, w: Any, b: Any, *settings: Any) -> Any:
        called.append("relu")
        if result == "missing":
            raise RuntimeError("cuDNN has no such engine")
        return torch.relu(torch.nn.functional.conv2d(x, w, b, *settings)) + (result == "wrong")

    def add_relu(x: Any, w: Any, z: Any, alpha: float, b: Any, *settings: Any) -> Any:
        called.append("add relu")
        assert alpha == 1
        if result == "missing":
            raise RuntimeError("cuDNN has no such engine")
        return torch.relu(torch.nn.functional.conv2d(x, w, b, *settings) + z) + (result == "wrong")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu, raising=False)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu, raising=False)
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    program = program_of(residual(0), x)
    assert [step.kind for step in program.steps] == ["Conv"] * 3
    (expected,) = compute(program, x)
    loaded = Loaded(program, "cpu", torch.float32)
    with torch.inference_mode():
        runners.use_cudnn(loaded)
        loaded(torch.from_numpy(x))
        assert called[:1] == ["relu"]
        assert "add relu" in called
        called.clear()
        (found,) = loaded(torch.from_numpy(x))
    assert called == (["relu", "add relu"] if result == "right" else [])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_outputs_of_the_gpus_path_are_the_callers_own(
    tiny: Bundle, standin: cuda_standin.Cuda
) -> None:
    """Its pinned memory is used again for later batches."""
    session = make(tiny, "cuda")
    stream = session.stream(batches(8))
    _, first = next(stream)
    before = first.logits.tobytes()
    assert len(list(stream)) == 7
    assert first.logits.tobytes() == before
    session.close()


def test_a_stream_of_the_gpus_path_that_is_broken_off_gives_its_slots_back(
    tiny: Bundle, standin: cuda_standin.Cuda
) -> None:
    """The next stream has all of them."""
    session = make(tiny, "cuda")
    for _ in range(3):
        stream = session.stream(batches(8))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert len(session._runner._free) == cuda.SLOTS
    assert len(list(session.stream(batches(8)))) == 8
    session.close()


def test_a_card_that_fails_in_a_run_is_lost(tiny: Bundle, standin: cuda_standin.Cuda) -> None:
    """The worker ends and is started again: after an error of the driver, a process cannot use the
    GPU.
    """
    session = make(tiny, "cuda")

    def fail(number: int) -> None:
        if number == 5:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    standin.fail = fail
    with pytest.raises(errors.DeviceLostError, match="the GPU failed: CUDA error: an illegal"):
        list(session.stream(batches(8)))


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("CUDA error: unknown"), RuntimeError("No CUDA GPUs are here")]
)
def test_a_card_that_fails_at_the_start_is_lost_and_not_the_models_fault(
    tiny: Bundle, standin: cuda_standin.Cuda, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """So that its worker is started again, and the card is retired if that does not help."""

    def fail(_number: int) -> None:
        raise error

    monkeypatch.setattr(cuda, "open_card", fail)
    with pytest.raises(errors.DeviceLostError, match=f"^cuda#0: the GPU failed: {error}$"):
        make(tiny, "cuda")


def test_a_card_that_fails_while_it_compiles_is_lost(
    tiny: Bundle, standin: cuda_standin.Cuda
) -> None:
    """As in mid-run."""

    def fail(_number: int) -> None:
        raise torch.AcceleratorError("CUDA error: misaligned address")

    standin.fail = fail
    with pytest.raises(errors.DeviceLostError, match="the GPU failed: CUDA error: misaligned"):
        make(tiny, "cuda")


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_a_card_whose_answers_depend_on_the_position_is_found(
    tiny: Bundle,
    standin: cuda_standin.Cuda,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
) -> None:
    """Before the first image, unless it is allowed."""

    def spoil(found: Any) -> None:
        found[-1, 0] += 1

    spec = make_spec(tiny, precision=precision)
    session = make(tiny, "cuda", precision=precision)
    check_exactness(session.stream, spec, "cuda#0")
    standin.spoil = spoil
    with pytest.raises(errors.InexactError, match="cuda#0: answers depend on position in the"):
        check_exactness(session.stream, spec, "cuda#0")
    helpers.capture_log(check_exactness.__module__, caplog, monkeypatch)
    check_exactness(session.stream, spec, "cuda#0", allow_inexact=True)
    assert "--allow-inexact accepts that" in caplog.text
    session.close()


LOST = """
sys.path.append(os.environ["TESTS"])

def show(module):
    module._missing = lambda _kind: None
    module.find_gpus = lambda: module.Found(("A card (8 SMs)",))

def put(module):
    import cuda_standin
    def fail(number):
        if number == 9 and once(os.environ["MARKER"]):
            raise module.torch.AcceleratorError("CUDA error: the card has fallen off the bus")
    module.open_card = lambda _number: (cuda_standin.Cuda(fail), "cpu")
    module.prepare = lambda: None

after_import("imagemill.pipeline.backends.torch.session", show)
after_import("imagemill.pipeline.backends.torch.cuda", put)
"""


def with_standin(tmp_path: Path, models_dir: Path, marker: str) -> dict[str, str]:
    """An environment in which every process finds a card. It is lost in mid-run, unless the file
    `marker` exists.
    """
    return harness.hooks(
        tmp_path / "hooks",
        LOST,
        MARKER=str(tmp_path / marker),
        TESTS=str(helpers.PROJECT / "tests"),
        IMAGEMILL_MODELS=str(models_dir),
    )


def test_a_card_lost_in_mid_run_costs_its_workers_restart(
    imagemill: Callable[..., helpers.Result],
    jpegs: Callable[..., Path],
    models_dir: Path,
    tmp_path: Path,
) -> None:
    """Every image has its row, with the same bits as if nothing had happened."""
    (tmp_path / "calm").touch()
    words = ("run", jpegs(16), "--model", "tiny", "--devices", "cuda", "--shard-size", 4)
    found = {}
    for name in ("lost", "calm"):
        env = with_standin(tmp_path, models_dir, name)
        output = tmp_path / f"{name}-out"
        ended = imagemill(*words, "--output", output, "--batch-size", 2, "--json", env=env)
        assert ended.code == 0, ended.err
        (found[name],) = ended.json["devices"]
    assert (found["lost"]["restarts"], found["calm"]["restarts"]) == (1, 0)
    assert found["lost"]["images"] == 16
    assert 0 <= found["calm"]["busy"] <= 1
    assert min(found["calm"]["clock"][name] for name in ("device", "transfer")) > 0
    assert (
        "the GPU failed: CUDA error: the card has fallen off"
        in (tmp_path / "lost-out" / "logs" / "cuda#0.log").read_text()
    )
    harness.assert_complete(tmp_path / "lost-out")
    harness.assert_same(tmp_path / "lost-out", tmp_path / "calm-out")


def test_bench_measures_what_a_card_tells_of_itself(
    imagemill: Callable[..., helpers.Result], models_dir: Path, tmp_path: Path, tiny: Bundle
) -> None:
    """Copies between host and card, and what its memory allows."""
    (tmp_path / "calm").touch()
    words = ("--devices", "cuda", "--model", "tiny", "--batch-size", 2, "--batches-per-step", 4)
    report = imagemill(
        *("bench", "--synthetic", *words, "--iterations", 2, "--json"),
        env=with_standin(tmp_path, models_dir, "calm"),
    ).json
    assert report["images_per_iteration"] == {"compute_only": 8}
    assert len(report["transfer_only"]["iterations"]) == 2
    assert set(report["transfer_only"]["devices"]) == {"cuda#0"}
    assert report["transfer_only"]["min"] > 0
    found = report["device"]
    assert found["memory_limit"] == pytest.approx(found["bytes_per_s"] / found["bytes_per_image"])
    assert found["bytes_per_image"] > 3 * SIZE * SIZE
    assert (found["busy"], found["cores_needed"]) == (None, None)


def test_the_time_of_a_card_is_its_own_events(tiny: Bundle, standin: cuda_standin.Cuda) -> None:
    """Computing and copying, from one batch to the next."""
    clock, begun = Stopwatch(), time.perf_counter()
    device = DeviceSpec("cuda#0", "cuda", "torch", (0,))
    session = open_session(make_spec(tiny), device, clock)
    before = clock.read()
    assert len(list(session.stream(batches(4)))) == 4
    after = clock.read()
    elapsed = time.perf_counter() - begun
    assert 0 < before.device < after.device < elapsed
    assert 0 < before.transfer < after.transfer < elapsed
    session.close()
    plain = make(tiny)
    assert plain.memory_traffic() is None, "a CPU's cores compute and decode"
    plain.close()


@pytest.mark.parametrize(("width", "lower"), [(4, 0), (2, 1)])
def test_the_memory_traffic_of_a_program_is_every_input_and_output_once(
    width: int, lower: int
) -> None:
    """Numbers between the products are narrow in a lower precision; so are their weights."""
    weights = {"a": np.zeros((8, 3, 1), np.float32), "b": np.zeros((5, 8, 1), np.float32)}
    nodes = [node("Conv", "x a", "0"), node("Relu", "0", "1"), node("Conv", "1 b", "y")]
    program = program_of(small_graph(nodes, weights, 8), np.zeros((2, 3, 8), np.float32))
    assert [step.kind for step in program.steps] == ["Conv", "Conv"]
    entry, between, end = 2 * 3 * 8, 2 * 8 * 8, 2 * 5 * 8
    narrow = 24 + 40 + 2 * between + end
    moved = sum(moved for _, moved in program.bytes_of_steps(width))
    assert moved == 4 * entry + (4 - 2 * lower) * narrow


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_card_without_memory_says_how_much_there_is(
    tiny: Bundle, standin: cuda_standin.Cuda, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the start, not in hour three: as an error of its own kind, with the estimated need."""

    def fail(number: int) -> None:
        raise error

    standin.fail = fail
    has = r"cuda#0 has 1\.2 of 24\.0 GB free, and batches of 3 need"
    with pytest.raises(errors.DeviceMemoryError, match=has + r" more\.$"):
        make(tiny, "cuda")
    monkeypatch.setattr(Program, "memory", lambda _self, width: width * 725_000_000)
    with pytest.raises(errors.DeviceMemoryError, match=has + r" about 2\.9 GB\.$"):
        make(tiny, "cuda")
    with pytest.raises(errors.DeviceMemoryError, match=has + r" about 4\.3 GB\.$"):
        make(tiny, "cuda", precision=Precision.FP16)  # and fp32 for images that overflow


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("CUDA error: out of memory", errors.DeviceMemoryError),
        ("CUDA error: unspecified launch failure", errors.DeviceLostError),
    ],
)
def test_a_card_that_cannot_be_opened_is_full_or_lost(
    tiny: Bundle, standin: cuda_standin.Cuda, monkeypatch: pytest.MonkeyPatch, text: str, kind: Any
) -> None:
    """CUDA itself needs memory before anything can be asked."""

    def fail(_number: int) -> None:
        raise torch.AcceleratorError(text)

    monkeypatch.setattr(cuda, "open_card", fail)
    with pytest.raises(kind):
        make(tiny, "cuda")


def test_the_memory_of_a_program_is_estimated() -> None:
    """Constants once, and the values that are needed at the same time."""
    model = small_graph(
        [
            node("Conv", "x w", "a"),
            node("Sigmoid", "a", "b"),
            node("Conv", "b w", "c"),
            node("Add", "a c", "d"),
            node("Softplus", "d", "y"),
        ],
        {"w": np.zeros((3, 3, 1), np.float32)},
        8,
    )
    program = program_of(model, np.zeros((2, 3, 8), np.float32))
    assert [step.kind for step in program.steps] == ["Conv", "Sigmoid", "Conv", "Softplus"]
    numbers = 2 * 3 * 8
    # At the second convolution: its two inputs and its output; x is no longer needed.
    assert program.memory(4) == 4 * (9 + 3 * numbers)
    assert program.memory(2) == 2 * (9 + 3 * numbers)


def test_fp32_is_never_tf32() -> None:
    """PyTorch's own default for convolutions on a card is TF32."""
    program = (
        "import torch; from imagemill.pipeline.backends.torch import cuda; cuda.prepare();"
        " b = torch.backends; print(b.cudnn.conv.fp32_precision, b.cuda.matmul.fp32_precision,"
        " b.cudnn.benchmark, b.cudnn.deterministic,"
        " b.cuda.matmul.allow_fp16_reduced_precision_reduction)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
    )
    assert found.stdout.split() == ["ieee", "ieee", "False", "True", "False"]


# The job.


def test_only_the_worker_imports_torch() -> None:
    """It takes seconds."""
    program = (
        "import sys; from imagemill.pipeline.backends import devices; import imagemill.cli;"
        " print([d.engine for d in devices.resolve('cpu@torch')], 'torch' in sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=helpers.environment(),
    )
    assert found.stdout.strip() == "['torch'] False"


def test_a_job_on_torch_is_like_any_other(
    imagemill: Callable[..., helpers.Result], jpegs: Callable[..., Path], tmp_path: Path
) -> None:
    """Two processes, every image a row, the backend in each part, and OpenVINO's labels."""
    folder = jpegs(9, **{"broken.jpg": b"\xff\xd8\xff no image"})
    arguments = ("run", folder, "--model", "tiny", "--shard-size", 4, "--save", "embedding")
    ours = imagemill(
        *arguments, "--output", tmp_path / "ours", "--devices", "cpu:2@torch", "--json"
    )
    assert ours.code == 0, ours.err
    assert (ours.json["images"], ours.json["failed"], ours.json["precision"]) == (10, 1, "fp32")
    for part in (tmp_path / "ours" / "predictions").glob("part-*"):
        metadata = pq.read_metadata(part).metadata
        assert metadata[b"imagemill.backend"] == b"torch"
        assert json.loads(metadata[b"imagemill.versions"])["torch"] == torch.__version__
    assert imagemill("verify", tmp_path / "ours").code == 0
    assert imagemill(*arguments, "--output", tmp_path / "theirs").code == 0
    helpers.assert_alike(tmp_path / "ours", tmp_path / "theirs")


def test_a_build_of_pytorch_without_cuda_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Found before anything is listed, without importing it."""
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(torch_session.util, "find_spec", lambda _name: spec)
    monkeypatch.setattr(torch_session, "find_gpus", lambda: Found(("a card",)))
    missing = TorchSession.found("cuda").missing
    assert missing is not None
    assert missing.startswith("The installed PyTorch has no CUDA: pip uninstall -y torch, then pip")
    assert TorchSession.found("cpu").missing is None
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cuda.so").touch()
    assert TorchSession.found("cuda") == Found(("a card",))
    monkeypatch.setattr(torch_session.util, "find_spec", lambda _name: None)
    assert TorchSession.found("cuda").missing == (
        "PyTorch is not installed: pip install 'imagemill[torch]'."
    )


def test_the_accuracy_check_of_a_card_compares_it_with_itself_in_fp32(
    tiny: Bundle,
    standin: cuda_standin.Cuda,
    jpegs: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On decoded images, with sessions on the card in both precisions, and measured rates."""
    model = bundle.write(tmp_path / "tiny", tiny.card, tiny_model())
    entries = tuple(command.listing([str(jpegs(9))]))
    gpu = DeviceSpec("cuda#0", "cuda", "torch", (0,), 0, "Card (1 SMs)")
    limits = {"calibration": 0, "held_out": 6, "images": 10**6, "batch_size": 3}
    monkeypatch.setattr(accuracy, "MIN_IMAGES", 6)
    monkeypatch.setattr(check, "_PROBE_S", 0.0)
    monkeypatch.setattr(GpuRun, "_gain", lambda *_: 1000.0)
    asked = AccuracyCheck(
        model, (str(tmp_path / "images"),), entries, (0,), Limits(), (Precision.FP16,),
        gpus=(gpu,), min_agreement=0.5, **limits,
    )  # fmt: skip
    found = check.carry_out(asked)["fp16"]
    assert (found.comparison.images, found.comparison.agreement) == (6, 1.0)
    assert found.versions == library_versions("torch")
    assert (found.instruction_set, found.group_channels) == ("Card (1 SMs)", 0)
    assert variants.read(model.dir)["fp16 on Card (1 SMs)"] == found
    assert standin.captures == 4, "a rate and the answers, in fp32 and fp16"
